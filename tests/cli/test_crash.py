"""A run that is killed, fills the disk or diverges leaves its last whole epoch, and goes on from there."""

import functools
import itertools
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from cli.unmeasured import leave_out_measuring
from PIL import Image

from timm_csg.cli import main
from timm_csg.cli import state as state_module
from timm_csg.cli.engine import Training
from timm_csg.cli.state import load_state

SMALL = ["--recipe", "paper", "--model", "test_resnet", "--img-size", "32", "--batch-size", "8", "--device", "cpu"]
SMALL += ["--workers", "0", "--warmup-epochs", "0"]


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """Folders train/ and val/ with two classes of eight pictures."""
    folder = tmp_path_factory.mktemp("data")
    for split, name, index in itertools.product(("train", "val"), "ab", range(8)):
        path = folder / split / name / f"{index}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (20, 20), (100 * "ab".index(name), 0, index)).save(path)
    return folder


def train(pictures, output, epochs=2):
    return main(["train", "--output", str(output), "--data", str(pictures), "--epochs", str(epochs), *SMALL])


@pytest.fixture
def run(pictures):
    """Train in a folder; the exit status."""
    return functools.partial(train, pictures)


@pytest.fixture(autouse=True)
def unmeasured(monkeypatch):
    leave_out_measuring(monkeypatch)


@pytest.fixture(scope="module")
def whole(pictures, tmp_path_factory):
    """A run of two epochs that nothing disturbed."""
    output = tmp_path_factory.mktemp("whole") / "out"
    with pytest.MonkeyPatch.context() as patch:
        leave_out_measuring(patch)
        assert train(pictures, output) == 0
    return output


def state(output):
    return output / "paper" / "state.pt"


def fail_in_epoch(monkeypatch, number, error):
    """Let the writing of a state fail in the middle."""
    plain, calls = state_module.torch.save, []

    def save(values, handle):
        calls.append(handle)
        if len(calls) == number:
            handle.write(b"half a file")
            raise error
        plain(values, handle)

    monkeypatch.setattr(state_module.torch, "save", save)


def test_full_disk_leaves_the_last_epoch_to_go_on_from(run, whole, tmp_path, monkeypatch, capsys):
    output = tmp_path / "out"
    with monkeypatch.context() as patch:
        fail_in_epoch(patch, 2, OSError(28, "No space left on device"))
        assert run(output) == 1
    message = capsys.readouterr().err.replace("\n", " ")
    assert f"cannot write to {output / 'paper'}" in message
    assert "No space left on device" in message
    assert "Traceback" not in message
    assert load_state(state(output))["epochs_done"] == 1
    assert not list(output.rglob(".*.tmp"))
    assert main(["train", "--resume", str(output)]) == 0
    assert (output / "model" / "model.safetensors").read_bytes() == (whole / "model" / "model.safetensors").read_bytes()


def test_file_size_limit_of_the_system_is_told_like_a_full_disk(run, tmp_path, capsys):
    resource = pytest.importorskip("resource")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))  # the state has about two megabytes
    try:
        assert run(tmp_path / "out", epochs=1) == 1
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "cannot write to" in capsys.readouterr().err
    assert not list((tmp_path / "out").rglob(".*.tmp"))


@pytest.mark.parametrize("name", ["log.csv", "metrics.json", "model.safetensors"])
def test_any_file_that_cannot_be_written_is_told_in_one_sentence(run, name, whole, tmp_path, monkeypatch, capsys):
    plain = Path.replace

    def replace(self, target):
        if Path(target).name == name:
            raise OSError(28, "No space left on device", str(target))
        return plain(self, target)

    output = tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", replace)
        assert run(output) == 1
    message = capsys.readouterr().err.replace("\n", " ")
    assert name in message
    assert "continue with --resume" in message
    assert main(["train", "--resume", str(output)]) == 0
    assert (output / "model" / "model.safetensors").read_bytes() == (whole / "model" / "model.safetensors").read_bytes()


def test_run_folder_that_cannot_be_made_is_named(run, tmp_path, capsys):
    (tmp_path / "file").touch()
    assert run(tmp_path / "file" / "out") == 2
    assert f"cannot write to the folder {tmp_path / 'file' / 'out'}" in capsys.readouterr().err.replace("\n", " ")


@pytest.mark.skipif(hasattr(os, "geteuid") and os.geteuid() == 0, reason="the administrator may write everywhere")
def test_read_only_folder_is_named(run, tmp_path, capsys):
    (tmp_path / "out").mkdir(mode=0o500)
    assert run(tmp_path / "out") == 2
    assert f"cannot write to the folder {tmp_path / 'out'}" in capsys.readouterr().err.replace("\n", " ")


def test_weights_that_are_not_finite_do_not_replace_a_state_that_is(run, tmp_path, monkeypatch, capsys):
    plain = Training._train_epoch

    def spoil_second_epoch(self, loader, batch_done):
        row = plain(self, loader, batch_done)
        if self.epochs_done == 1:
            with torch.no_grad():
                self.model.fc.bias.fill_(float("nan"))
        return row

    monkeypatch.setattr(Training, "_train_epoch", spoil_second_epoch)
    assert run(tmp_path / "out") == 1
    assert "fc.bias is not finite after epoch 1" in capsys.readouterr().err
    assert load_state(state(tmp_path / "out"))["epochs_done"] == 1


def test_loss_that_is_not_finite_leaves_the_epoch_before(run, tmp_path, monkeypatch):
    plain = Training._losses

    def losses(self, images, targets):
        found = plain(self, images, targets)
        return found | {"loss": found["loss"] * float("nan")} if self.epochs_done == 1 else found

    monkeypatch.setattr(Training, "_losses", losses)
    assert run(tmp_path / "out") == 1
    assert load_state(state(tmp_path / "out"))["epochs_done"] == 1


def test_what_a_killed_process_was_writing_is_cleared_away(run, tmp_path):
    output = tmp_path / "out"
    (output / "paper").mkdir(parents=True)
    left, own = output / "paper" / ".state.pt.0123abcd.tmp", output / ".notes.tmp"
    left.write_bytes(b"half a file")
    own.touch()
    assert run(output, epochs=1) == 0
    assert (left.exists(), own.exists()) == (False, True)


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="each process to kill is a fork of one that has loaded everything")
def test_twenty_kills_do_not_change_the_outcome(tmp_path):
    command = [sys.executable, str(Path(__file__).with_name("kill_train.py")), str(tmp_path / "runs"), "20"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    result = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert result.stdout.count("complete state of epoch") == 20, result.stdout + result.stderr
    assert "equal to an uninterrupted run: True; files left over: []" in result.stdout
