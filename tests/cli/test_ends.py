"""Nothing is lost at the end of a command: what is checked before, what is saved first, and how commands end."""

import csv
import os
import signal
import subprocess
import sys
import threading

import pytest
from cli.folders_of_pictures import make_splits, train
from filelock import FileLock

import timm_csg
from timm_csg.cli import main
from timm_csg.cli import train as train_module
from timm_csg.cli.runs import RunFolder, free_folder


@pytest.fixture(scope="module")
def pets(tmp_path_factory):
    return make_splits(tmp_path_factory.mktemp("data") / "pets", ["cat", "dog"])


@pytest.fixture(scope="module")
def finished(pets, tmp_path_factory):
    output = tmp_path_factory.mktemp("run") / "run"
    assert train(pets, output) == 0
    return output


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("measure_training", "assigned could not be measured; try again: timm-csg train --resume"),
        ("write_figures", "the figures of assigned could not be drawn"),
        ("report_of_run", "the report could not be written; try again: timm-csg report"),
    ],
)
def test_the_model_is_saved_before_anything_else_can_fail(name, said, pets, tmp_path, monkeypatch, capsys):
    def fail(*args):
        raise ZeroDivisionError("float division by zero")

    output = tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr(train_module, name, fail)
        assert train(pets, output) == 1
    out, err = capsys.readouterr()
    assert f"the models are saved in {output}, but {said}" in err
    assert "(ZeroDivisionError: float division by zero)" in err
    assert len(err.splitlines()) == 1
    assert ("assigned" in out.partition("On the validation images")[2]) == (name != "measure_training")
    assert timm_csg.from_pretrained(output / "model").num_classes == 2
    assert (output / "report.html").exists() == (name != "report_of_run")
    assert main(["train", "--resume", str(output)]) == 0


def test_names_that_are_mathematics_or_long_or_markup_are_plain_text(tmp_path, capsys):
    names = ["$10_$20", "%_{", "[red]x :cat:", "n" * 200, "=1+2"]
    data = make_splits(tmp_path / "sheet", names)
    assert train(data, tmp_path / "run") == 0
    assert main(["evaluate", str(tmp_path / "run"), "--output", str(tmp_path / "out")]) == 0
    with (tmp_path / "out" / "classes_assigned.csv").open() as handle:
        assert {row["class"] for row in csv.DictReader(handle)} == {*names[:4], "'=1+2"}
    capsys.readouterr()
    picture = data / "val" / names[2] / "0.png"
    arguments = ["--checkpoint", str(tmp_path / "run"), "--target", names[2], "--output", str(tmp_path / "why")]
    assert main(["explain", str(picture), *arguments]) == 0
    assert "[red]x" in capsys.readouterr().out


@pytest.mark.parametrize(
    "encoding",
    ["ascii", pytest.param("latin-1", marks=pytest.mark.slow), pytest.param("cp932", marks=pytest.mark.slow)],
)
def test_every_terminal_gets_its_table(encoding, finished, tmp_path):
    environment = os.environ | {"PYTHONIOENCODING": encoding}
    command = [sys.executable, "-m", "timm_csg", "evaluate", str(finished), "--metrics", "accuracy,gate"]
    command += ["--output", str(tmp_path)]
    result = subprocess.run(command, capture_output=True, env=environment)
    assert (result.returncode, b"Traceback" in result.stderr) == (0, False), result.stderr
    assert b"assigned" in result.stdout


def test_validation_images_that_cannot_be_measured_are_refused_before_training(pets, tmp_path, capsys):
    for name, classes, images, said in (
        ("one", ["cat"], 3, "all validation images"),
        ("few", ["cat", "dog"], 1, "has 2 validation images; measuring needs at least 3"),
    ):
        data = make_splits(tmp_path / name, ["cat", "dog"], validation=0)
        make_splits(data, classes, train=0, validation=images)
        assert train(data, tmp_path / "run") == 2
        assert said in capsys.readouterr().err
        assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--batch-size", "500"], "--batch-size 500 is larger than the training set (8 images)"),
        (
            ["--data", "cifar1000"],
            "--data cifar1000 is not a folder, and names that timm.data knows begin with torch/, hfds/",
        ),
        (["--data", "pets/nothere", "--data-dir", "."], "--data pets/nothere is not a folder"),
        (["--data", "torch/cifar10"], "--data torch/cifar10 needs --data-dir"),
        (["--aa", "bogus"], "--aa bogus or the like is wrong: Unknown AA policy bogus."),
        (["--model-kwargs", "block_sizes=3"], "--model"),
        (["--recipe", "standard", "icnn", "--option", "strength=-1"], "strength"),
        (["--model", "crossvit_9_240", "--img-size", "240"], ""),
    ],
)
def test_what_can_be_checked_is_checked_before_training(arguments, said, pets, tmp_path, capsys):
    assert train(pets, tmp_path / "run", *arguments) == 2
    err = capsys.readouterr().err
    assert said in err
    assert "Traceback" not in err
    assert not (tmp_path / "run").exists()


def test_the_place_of_a_report_is_checked_before_the_work(finished, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("timm_csg.cli.report.load_checkpoint_and_data", lambda *args: pytest.fail("it has begun"))
    assert main(["report", str(finished), "--output", str(tmp_path / "missing" / "r.html")]) == 2
    assert "does not exist; create it" in capsys.readouterr().err
    assert main(["report", str(finished), "--output", str(tmp_path)]) == 2
    assert f"is a folder; name a file in it, such as {tmp_path / 'report.html'}" in capsys.readouterr().err


def test_a_free_folder_is_given_once(tmp_path):
    found = []
    threads = [threading.Thread(target=lambda: found.append(free_folder("a/b", folder=tmp_path))) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert {path.name for path in found} == {f"a_b-{number}" for number in range(1, 9)}


def test_a_folder_that_another_process_writes_to_is_refused(pets, tmp_path, capsys):
    output = tmp_path / "run"
    output.mkdir()
    with FileLock(output / ".lock"):
        assert train(pets, output) == 2
    assert f"another process is writing to {output}" in capsys.readouterr().err


def test_a_claimed_folder_leaves_nothing_behind(tmp_path):
    with RunFolder(tmp_path / "empty").claimed():
        pass
    with RunFolder(tmp_path / "full").claimed():
        (tmp_path / "full" / "file").touch()
    (tmp_path / "of the user").mkdir()
    with RunFolder(tmp_path / "of the user").claimed():
        pass
    assert {path.name for path in tmp_path.rglob("*")} == {"full", "file", "of the user"}


def test_a_plugin_can_bring_a_model_to_train(pets, tmp_path):
    (tmp_path / "my_plugin.py").write_text(
        "from timm.models import register_model, create_model\n\n"
        "@register_model\ndef my_resnet(pretrained=False, **kwargs):\n"
        "    return create_model('test_resnet', pretrained=pretrained, **kwargs)\n"
    )
    arguments = ["--plugin", str(tmp_path / "my_plugin.py"), "--model", "my_resnet"]
    assert train(pets, tmp_path / "run", *arguments) == 0


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_stopped_training_says_how_to_go_on(number, status, tmp_path):
    output = tmp_path / "run"
    command = ["train", "--output", str(output), "--recipe", "paper", "--epochs", "200", "--device", "cpu"]
    command += ["--img-size", "16", "--batch-size", "128"]
    process = subprocess.Popen(
        [sys.executable, "-m", "timm_csg", *command],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # shells' background jobs ignore it
    )
    line = process.stdout.readline()
    while "epoch 1/200" not in line:
        line = process.stdout.readline()
    process.send_signal(number)
    _, err = process.communicate(timeout=60)
    assert (process.returncode, len(err.splitlines())) == (status, 1), err
    assert f"continue with: timm-csg train --resume {output}" in err
    assert (output / "paper" / "state.pt").is_file()
    assert not (output / ".lock").exists()
