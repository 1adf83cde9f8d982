"""timm-csg train as a user runs it: the run folder, resuming, data of several kinds, and what goes wrong."""

import csv
import itertools
import json
import re
import shutil
import tarfile

import pytest
import timm
import torch
from cli.unmeasured import leave_out_measuring
from PIL import Image
from safetensors.torch import load_file

import timm_csg
from timm_csg.cli import main
from timm_csg.cli import train as train_module
from timm_csg.cli.build import data_config, with_overrides
from timm_csg.cli.data import load_data
from timm_csg.cli.distributed import Processes
from timm_csg.cli.engine import Training, TrainingError
from timm_csg.cli.settings import TrainSettings
from timm_csg.recipes import RECIPES

SMALL = ["--img-size", "16", "--batch-size", "128", "--warmup-epochs", "0", "--device", "cpu"]


def run(output, *arguments, recipe="assigned", epochs=2):
    return main(
        ["train", "--output", str(output), "--recipe", *recipe.split(), "--epochs", str(epochs), *SMALL, *arguments]
    )


def assert_same_weights(one, other):
    for name in ("model.safetensors", "mechanism/timm_csg.safetensors"):
        left, right = load_file(one / "model" / name), load_file(other / "model" / name)
        assert left.keys() == right.keys()
        for key, value in left.items():
            assert torch.equal(value, right[key]), key


@pytest.fixture
def unmeasured(monkeypatch):
    leave_out_measuring(monkeypatch)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A finished run of standard and assigned, two epochs each."""
    output = tmp_path_factory.mktemp("run") / "out"
    assert run(output, recipe="standard assigned") == 0
    return output


def test_run_folder_holds_model_metrics_log_and_figures(finished):
    with (finished / "log.csv").open() as handle:
        rows = list(csv.DictReader(handle))
    assert [(row["recipe"], row["epoch"]) for row in rows] == [
        ("standard", "0"), ("standard", "1"), ("assigned", "0"), ("assigned", "1")
    ]  # fmt: skip
    metrics = json.loads((finished / "metrics.json").read_text())
    assert list(metrics) == ["standard", "assigned"]
    assert metrics["assigned"]["accuracy"] == float(rows[-1]["accuracy"])
    assert 0 < metrics["assigned"]["mutual_information_score"] < metrics["assigned"]["mutual_information_bound"]
    assert metrics["standard"]["gate_density"] is None
    assert {path.name for path in (finished / "figures").iterdir()} == {
        "gate_assigned.png", "mutual_information_assigned.png", "mutual_information_standard.png"
    }  # fmt: skip


def test_models_load_here_and_in_plain_timm_with_equal_logits(finished):
    images = torch.rand(2, 3, 16, 16)
    ours = timm_csg.from_pretrained(finished / "model")
    plain = timm.create_model(f"local-dir:{finished / 'model'}", pretrained=True).eval()
    with torch.no_grad():
        assert torch.equal(ours(images), plain(images))
    assert timm.create_model(f"local-dir:{finished / 'standard' / 'model'}", pretrained=True).num_classes == 10


def test_quiet_output_is_one_table(finished, capsys):
    assert main(["train", "--resume", str(finished), "--quiet"]) == 0
    out, err = capsys.readouterr()
    assert out.startswith("On the validation images")
    assert "assigned" in out
    assert "epoch" not in out
    assert err == ""


def test_a_pipe_gets_the_run_folder_first_and_a_line_for_each_epoch(tmp_path, unmeasured, capsys):
    assert run(tmp_path / "out", recipe="paper") == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"run folder: {tmp_path / 'out'}"
    epochs = [line for line in lines if line.startswith("paper: epoch")]
    assert [line.partition(",")[0] for line in epochs] == ["paper: epoch 1/2 (standard)", "paper: epoch 2/2 (standard)"]
    assert "accuracy 0." in epochs[0]
    assert epochs[0].endswith("left")
    assert lines.index("measuring paper") > lines.index(epochs[1])
    assert "writing the report" in lines


def test_resuming_a_finished_run_changes_no_weight(finished):
    before = (finished / "model" / "model.safetensors").read_bytes()
    assert main(["train", "--resume", str(finished)]) == 0
    assert (finished / "model" / "model.safetensors").read_bytes() == before


def test_interrupted_run_resumes_to_the_same_weights(finished, tmp_path, monkeypatch, capsys):
    def interrupt(self, training, row):
        raise KeyboardInterrupt

    output = tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr(train_module._Run, "_epoch", interrupt)
        assert run(output) == 130
    assert f"--resume {output}" in capsys.readouterr().err.replace("\n", "")
    assert timm_csg.from_pretrained(output / "model").num_classes == 10  # usable as it is
    assert main(["train", "--resume", str(output)]) == 0
    assert_same_weights(output, finished)


@pytest.mark.parametrize("options", [["--model-ema"], ["--amp"], ["--opt", "adamw", "--lr", "0.001"]])
def test_resuming_is_exact_with(options, tmp_path, unmeasured, monkeypatch):
    assert run(tmp_path / "whole", *options) == 0
    original = Training._save

    def save_and_stop(self):
        original(self)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Training, "_save", save_and_stop)
        assert run(tmp_path / "halves", *options) == 130
    assert main(["train", "--resume", str(tmp_path / "halves")]) == 0
    assert_same_weights(tmp_path / "whole", tmp_path / "halves")


def test_released_recipe_uses_one_optimizer_for_each_path(tmp_path):
    settings = TrainSettings(recipe=["released"], opt="adam", lr=1e-5, img_size=16, device="cpu").resolved()
    training = Training("released", RECIPES["released"], settings, 10, 5, tmp_path / "state.pt", Processes())
    assert [optimizer.param_groups[0]["initial_lr"] for optimizer in training.optimizers] == [1e-5, 1e-3]
    assert all(
        optimizer.param_groups[-1]["params"][0] is training.model.mechanism.gate for optimizer in training.optimizers
    )


@pytest.mark.parametrize(
    ("options", "gate_lr"), [({"opt": "sgd"}, 0.1), ({"opt": "adamw"}, 0.01), ({"gate_lr": 0.3}, 0.3)]
)
def test_learning_rate_of_the_gate_suits_the_optimizer(options, gate_lr):
    settings = TrainSettings(**options).resolved()
    assert with_overrides(RECIPES["paper"], settings).gate_lr == pytest.approx(gate_lr)


@pytest.fixture
def image_folder(tmp_path):
    """Two classes of tiny pictures, told apart by brightness, in train/ and val/."""
    generator = torch.Generator().manual_seed(0)
    for split, count in (("train", 16), ("val", 6)):
        for shade, name in ((60, "dark"), (190, "light")):
            (tmp_path / "data" / split / name).mkdir(parents=True)
            for index in range(count):
                pixels = (torch.randn(20, 24, 3, generator=generator) * 20 + shade).clamp(0, 255).byte().numpy()
                Image.fromarray(pixels).save(tmp_path / "data" / split / name / f"{index}.png")
    return tmp_path / "data"


FOLDER = ["--model", "test_resnet", "--workers", "0", "--batch-size", "8", "--img-size", "32", "--epochs", "1"]


@pytest.mark.parametrize("form", ["folder:{}", "{}", "torch/image_folder"])
def test_trains_on_pictures_of_the_user(form, image_folder, tmp_path):
    data = ["--data", form.format(image_folder)]
    data += ["--data-dir", str(image_folder)] if form.startswith("torch/") else []
    assert main(["train", "--output", str(tmp_path / "out"), *data, *FOLDER]) == 0
    assert timm_csg.from_pretrained(tmp_path / "out" / "model").num_classes == 2


def test_trains_on_tar_files_with_names_from_inside(image_folder, tmp_path):
    for split in ("train", "val"):
        with tarfile.open(image_folder / f"{split}.tar", "w") as tar:
            tar.add(image_folder / split, arcname=".")
        shutil.rmtree(image_folder / split)
    assert main(["train", "--output", str(tmp_path / "out"), "--data", str(image_folder), *FOLDER]) == 0


def test_command_can_be_corrected_without_another_folder(image_folder, tmp_path):
    command = ["train", "--output", str(tmp_path / "out"), "--data", str(image_folder), *FOLDER]
    assert main([*command, "--val-split", "nowhere"]) == 2
    assert main(command) == 0


def test_mechanism_options_and_schedule_of_the_command_line_win(image_folder, tmp_path):
    options = ["--recipe", "paper", "--option", "classes_per_filter=1.5", "sparsity_norm=l2", "--paths", "joint"]
    assert main(["train", "--output", str(tmp_path / "out"), "--data", str(image_folder), *FOLDER, *options]) == 0
    config = timm_csg.from_pretrained(tmp_path / "out" / "model").mechanism.config
    assert (config.classes_per_filter, config.sparsity_norm) == (1.5, "l2")
    assert "both" in (tmp_path / "out" / "log.csv").read_text()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--recipe", "magic"], "--recipe must be one of 'standard', "),
        (["--data", "folder:/does/not/exist"], "does not exist"),
        (["--model", "no_such_model"], "no_such_model"),
        (["--device", "cuda:99"], "cuda:99"),
        (["--option", "sparsety_weight=1"], "sparsity_weight"),
        (["--epochs", "0"], "--epochs must be at least 1"),
        (["--resume", "/does/not/exist"], "nothing to resume"),
    ],
)
def test_wrong_option_is_one_sentence_and_exit_2(arguments, message, tmp_path, capsys):
    output = [] if "--resume" in arguments else ["--output", str(tmp_path / "out")]
    assert main(["train", *output, *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error.replace("\n", " ")
    assert "Traceback" not in error


def test_missing_split_is_named_with_what_is_there(image_folder, tmp_path, capsys):
    (image_folder / "val").rename(image_folder / "holdout")
    assert main(["train", "--output", str(tmp_path / "out"), "--data", str(image_folder), *FOLDER]) == 2
    assert "holdout" in capsys.readouterr().err


def test_other_settings_in_the_same_folder_are_refused(finished, capsys):
    assert run(finished, "--lr", "0.5", recipe="standard assigned") == 2
    assert "other settings" in capsys.readouterr().err


def test_loss_that_is_not_finite_stops_with_the_last_epoch_on_disk(tmp_path, monkeypatch, capsys):
    plain = Training._losses

    def losses(self, images, targets):
        return {"loss": plain(self, images, targets)["loss"] * float("nan")}

    monkeypatch.setattr(Training, "_losses", losses)
    assert run(tmp_path / "out") == 1
    assert "not finite" in capsys.readouterr().err
    assert not (tmp_path / "out" / "assigned" / "state.pt").exists()


def test_training_set_smaller_than_a_batch_is_refused(tmp_path):
    settings = TrainSettings(recipe=["paper"], img_size=16, device="cpu").resolved()
    with pytest.raises(TrainingError, match="lower --batch-size"):
        Training("paper", RECIPES["paper"], settings, 10, 1, tmp_path / "state.pt", Processes()).run([], [], None, None)


def test_settings_survive_json():
    settings = TrainSettings(scale=(0.5, 1.0), option={"psi": 1}, recipe=["paper"])
    assert TrainSettings.from_json(settings.to_json()) == settings


def test_help_names_every_recipe(capsys):
    with pytest.raises(SystemExit):
        main(["train", "--help"])
    out = capsys.readouterr().out
    assert all(name in out for name in ("standard", "released", "paper", "joint", "assigned"))


def test_validation_images_are_cropped_as_the_model_wants(tmp_path):
    for split, name in itertools.product(("train", "val"), ("ant", "bee")):
        folder = tmp_path / split / name
        folder.mkdir(parents=True)
        for number in range(2):
            Image.new("RGB", (40, 20)).save(folder / f"{number}.png")
    settings = TrainSettings(data=f"folder:{tmp_path}", img_size=32, batch_size=2, device="cpu", workers=0).resolved()
    sizes = {}
    for mode in ("center", "squash"):
        config = data_config(settings) | {"crop_mode": mode, "crop_pct": 1.0}
        loader = load_data(settings, config, Processes()).validation
        sizes[mode] = loader.dataset.transform.transforms[0].size
    assert sizes["center"] == 32  # the short side, before the centre is cut out
    assert tuple(sizes["squash"]) == (32, 32)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (
            "--model test_vit --img-size 32 --model-kwargs pos_drop_rate=0 --mechanism icnn",
            "icnn' needs maps, or tokens on a square grid",
        ),
        (
            "--model test_vit",
            "test_vit cannot be built .*; for the digits --model-kwargs is output_stride=8, for ResNets",
        ),
        ("--model vgg11", "vgg11 cannot be built with these options: AssertionError; for the digits"),
        (
            "--batch-size 1 --img-size 8",
            "cannot be trained on 1 images of 3 x 8 x 8 at a time: Expected more than 1 value",
        ),
        (
            "--model-kwargs global_pool=",
            "cannot be trained on 2 images of 3 x 24 x 24 at a time: a and b must have same",
        ),
    ],
)
def test_what_fails_on_the_first_batch_is_refused_before_there_is_a_run_folder(arguments, said, tmp_path, capsys):
    output = tmp_path / "out"
    common = ["--recipe", "standard", "assigned", "--device", "cpu", "--output", str(output)]
    assert main(["train", *common, *arguments.split()]) == 2
    out, err = capsys.readouterr()
    assert re.search(said, err.replace("\n", " "))
    assert "assigned to classes blindly" not in err
    assert (out, output.exists()) == ("", False)
