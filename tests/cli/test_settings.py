"""Options: their ranges, options without an effect, typos, and settings of runs that were moved or are not ours."""

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import timm
from cli.folders_of_pictures import make_splits, train
from huggingface_hub.errors import LocalEntryNotFoundError

from timm_csg.cli import main
from timm_csg.cli.build import check_knobs, chosen_recipes, make_model, make_optimizers
from timm_csg.cli.checkpoints import settings_of
from timm_csg.cli.runs import RunFolder
from timm_csg.cli.settings import TrainSettings
from timm_csg.cli.train import default_output
from timm_csg.hub_errors import HubError
from timm_csg.recipes import RECIPES
from timm_csg.schedule import Alternating, Joint


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("smoothing", 3),
        ("model_ema_decay", 5),
        ("clip_grad", -1),
        ("scale", (0.9, 0.1)),
        ("hflip", 7),
        ("reprob", 3),
        ("layer_decay", -1),
        ("warmup_epochs", -3),
        ("lr", math.nan),
        ("lr", math.inf),
        ("momentum", 1.0),
        ("workers", -1),
        ("seed", -1),
        ("num_classes", 1),
        ("val_fraction", 1.0),
        ("drop_rate", 1.5),
    ],
)
def test_numbers_out_of_their_range_are_refused(name, value):
    with pytest.raises(ValueError, match=f"--{name.replace('_', '-')} "):
        TrainSettings(**{name: value})


@pytest.mark.parametrize(
    ("head_lr", "expected"), [(1e-5, [1e-5, 1e-3]), (None, [4e-5, 4e-3])], ids=["authors", "default"]
)
def test_released_recipe_trains_the_classifier_at_the_rate_of_each_optimizer(head_lr, expected):
    given = TrainSettings(recipe=["released"], pretrained=True, opt="adam", lr=1e-5, head_lr=head_lr, freeze="none")
    settings, recipe = given.resolved(), RECIPES["released"]
    model = make_model(replace(settings, pretrained=False), 10, recipe)
    optimizers = make_optimizers(model, settings, recipe)
    groups = [group for one in optimizers for group in one.param_groups]
    found = [group["lr"] for group in groups if any(weight is model.fc.weight for weight in group["params"])]
    assert found == pytest.approx(expected)


def knobs(**options):
    settings = TrainSettings(**options)
    check_knobs(settings, chosen_recipes(settings.resolved()))


@pytest.mark.parametrize(
    ("options", "remedy"),
    [
        ({"recipe": ["joint"], "period": 5}, "--period would have no effect here; add --paths alternating"),
        ({"recipe": ["joint"], "gated": 1}, "--gated"),
        ({"recipe": ["joint"], "path_unit": "step"}, "--path-unit"),
        ({"recipe": ["standard"], "gate_lr": 0.1}, "add a recipe with a mechanism"),
        ({"recipe": ["standard"], "option": {"a": 1}}, "--option"),
        ({"amp_dtype": "float16"}, "add --amp"),
        ({"model_ema_decay": 0.9}, "add --model-ema"),
        ({"no_aug": True, "hflip": 0.5, "reprob": 0.1}, "--hflip, --reprob would have no effect here; leave out"),
        ({"val_seed": 3}, "add --val-fraction"),
        ({"val_fraction": 0.2}, "it splits a folder"),
        ({"data_dir": "/x"}, "--data-dir"),
        ({"num_classes": 10}, "--num-classes"),
    ],
)
def test_an_option_without_an_effect_is_an_error_with_the_remedy(options, remedy):
    with pytest.raises(ValueError, match=remedy):
        knobs(**options)


def test_options_with_an_effect_pass():
    knobs()
    knobs(recipe=["joint"], paths="alternating", period=5, gated=2, path_unit="step")
    knobs(recipe=["paper"], period=5)
    knobs(recipe=["joint"], gate_warmup=2, path_unit="step")
    knobs(amp=True, amp_dtype="float16", model_ema=True, model_ema_decay=0.9, hflip=0.5)
    resumed = TrainSettings(no_aug=True).resolved()
    check_knobs(resumed, chosen_recipes(resumed))


def test_numbers_of_the_schedule_go_over_those_of_the_recipe():
    def schedule(recipe, **options):
        return chosen_recipes(TrainSettings(recipe=[recipe], **options).resolved())[recipe].schedule

    assert schedule("paper", period=5) == Alternating(period=5, gated=1)
    assert schedule("released", gated=2) == Alternating(period=3, gated=2, warmup=10)
    assert schedule("joint", paths="alternating", path_unit="step") == Alternating(unit="step")
    assert schedule("paper", paths="joint", gate_warmup=1) == Joint(warmup=1)


def test_two_names_for_one_model_are_refused(tmp_path, capsys):
    arguments = ["--mechanism", "icnn", "--recipe", "paper", "assigned", "--output", str(tmp_path / "run")]
    assert main(["train", *arguments]) == 2
    assert "--recipe paper and assigned make the same model" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
    arguments = ["--recipe", "paper", "joint", "--paths", "joint", "--option", "classes_per_filter=1.0"]
    arguments += ["--output", str(tmp_path / "run")]
    assert main(["train", *arguments]) == 2
    assert "--recipe paper and joint make the same model" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "alike"),
    [
        (["--recipe", "asigned"], "Did you mean 'assigned'?"),
        (["--mechanism", "icn"], "Did you mean 'icnn'?"),
        (["--model", "resnet81"], "Did you mean 'resnet"),
        (["--opt", "adamv"], "Did you mean 'adam"),
        (["--sched", "cosin"], "try cosine"),
    ],
)
def test_typos_offer_the_nearest_name(arguments, alike, tmp_path, capsys):
    assert main(["train", "--output", str(tmp_path / "run"), *arguments]) == 2
    assert alike in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_typos_in_names_of_checkpoints_and_metrics_offer_the_nearest(tmp_path, monkeypatch, capsys):
    (tmp_path / "run").mkdir()
    monkeypatch.chdir(tmp_path)
    assert main(["report", "rnu"]) == 2
    assert "Did you mean 'run'?" in capsys.readouterr().err
    assert main(["evaluate", "x", "--metrics", "acuracy"]) == 2
    assert "Did you mean 'accuracy'?" in capsys.readouterr().err
    assert main(["evaluate", "x", "--metrics", ""]) == 2
    assert "no group of metrics is named" in capsys.readouterr().err


def test_weights_that_cannot_be_downloaded_name_a_way_without_a_network(monkeypatch):
    def fail(*args, **options):
        raise LocalEntryNotFoundError("no connection")

    monkeypatch.setattr(timm, "create_model", fail)
    way = "'hf download timm/mobilenetv2_100.ra_in1k --local-dir FOLDER'"
    with pytest.raises(HubError, match=f"load the weights of mobilenetv2_100: .*not in the cache.*{way}"):
        make_model(TrainSettings(model="mobilenetv2_100", pretrained=True).resolved(), 3, None)


@pytest.mark.parametrize(
    ("model", "name"),
    [
        ("mobilenetv2_100.ra_in1k", "mobilenetv2_100.ra_in1k"),
        ("hf-hub:timm/resnet18.a1_in1k", "resnet18.a1_in1k"),
        ("local-dir:/weights/of/mobilenetv2_100", "mobilenetv2_100"),
        ("local-dir:nets/mine/", "mine"),
        ("local-dir:runs/photos-1/model", "photos-1"),
    ],
)
def test_run_folders_are_named_after_the_model_without_the_folders_above_it(model, name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert default_output(TrainSettings(model=model, data="torch/cifar10")) == Path(f"runs/torch_cifar10-{name}-1")


def test_a_name_that_may_be_a_missing_folder_is_said_to_be_none(capsys):
    assert main(["evaluate", "runs/nothere"]) == 2
    assert "runs/nothere is not a folder here" in capsys.readouterr().err
    assert main(["evaluate", "resnet18"]) == 2
    assert "not a folder" not in capsys.readouterr().err


@pytest.mark.parametrize("option", [["--attack-images", "0"], ["--eps", "-1"]])
def test_ranges_of_evaluate(option, capsys):
    assert main(["evaluate", "x", "--attacks", "fgsm", *option]) == 2
    assert option[0].strip("-").replace("-", "_") in capsys.readouterr().err.replace("-", "_")
    assert main(["evaluate", "x", *option]) == 2
    assert f"{option[0]} would have no effect here; add --attacks" in capsys.readouterr().err


def test_a_run_made_with_relative_paths_works_from_elsewhere_and_with_moved_data(tmp_path, monkeypatch, capsys):
    make_splits(tmp_path / "pets", ["cat", "dog"])
    monkeypatch.chdir(tmp_path)
    assert train("folder:pets", "run") == 0
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert main(["evaluate", "../run", "--metrics", "accuracy", "--output", "measured"]) == 0
    assert main(["train", "--resume", "../run"]) == 0
    (tmp_path / "pets").rename(tmp_path / "animals")
    assert main(["train", "--resume", "../run"]) == 2
    assert main(["train", "--resume", "../run", "--data", "../animals"]) == 0
    assert RunFolder.of("../run").settings().data == f"folder:{tmp_path / 'animals'}"
    assert main(["train", "--resume", "../run", "--lr", "1"]) == 2
    assert "cannot be combined with --lr; it takes --data, --data-dir" in capsys.readouterr().err


def test_the_home_folder_is_found_where_no_shell_names_it(tmp_path, monkeypatch):
    make_splits(tmp_path / "pets", ["cat", "dog"])
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    assert train("folder:~/pets", "~/run") == 0
    assert main(["evaluate", "~/run", "--metrics", "accuracy", "--output", "~/measured"]) == 0
    assert main(["report", "~/run", "--output", "~/r.html"]) == 0
    assert main(["explain", "~/pets/val/cat/0.png", "--checkpoint", "~/run", "--output", "~/out"]) == 0
    assert not (tmp_path / "~").exists()
    assert {"run", "measured", "r.html", "out"} <= {path.name for path in tmp_path.iterdir()}


@pytest.mark.parametrize("text", ['{"editor.fontSize": 12}', "// comment\n{}", "[]"])
def test_settings_of_another_program_are_not_those_of_a_run(text, tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "settings.json").write_text(text)
    assert RunFolder.of(str(tmp_path)) is None
    assert RunFolder.of(str(tmp_path / "model")) is None


def test_settings_of_a_run_are_those_of_its_models_only(tmp_path):
    (tmp_path / "settings.json").write_text(TrainSettings(data="torch/x").resolved().to_json())
    (tmp_path / "paper" / "model").mkdir(parents=True)
    (tmp_path / "other" / "checkpoint").mkdir(parents=True)
    assert RunFolder.of(str(tmp_path / "paper" / "model")).settings().data == "torch/x"
    assert RunFolder.of(str(tmp_path / "other" / "checkpoint")) is None


def test_another_folder_keeps_what_the_run_was_trained_with(tmp_path):
    make_splits(tmp_path / "a", ["cat", "dog"])
    (tmp_path / "b").mkdir()
    settings = TrainSettings(data=str(tmp_path / "a" / "train"), img_size=32, val_fraction=0.5).resolved()
    (tmp_path / "settings.json").write_text(settings.to_json())
    moved = settings_of({"data": str(tmp_path / "b")}, str(tmp_path))
    assert (moved.img_size, moved.val_fraction) == (32, 0.5)
    divided = settings_of({"data": str(tmp_path / "a")}, str(tmp_path))
    assert (divided.img_size, divided.val_fraction) == (32, None)
    assert json.loads(moved.to_json())["data"] == f"folder:{tmp_path / 'b'}"


def test_a_folder_named_digits_does_not_hide_the_digits(tmp_path, monkeypatch):
    (tmp_path / "digits").mkdir()
    monkeypatch.chdir(tmp_path)
    assert TrainSettings().resolved().data == "digits"
    assert TrainSettings(data="folder:digits").folder is not None


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"epochs": "three"}, "--epochs must be a number, but is 'three'"),
        ({"lr": True}, "--lr must be a number, but is True"),
        ({"recipe": "paper"}, r"--recipe takes a list of names, \['paper'\]"),
        ({"bogus": 1}, "damaged or of another version: .*'bogus'"),
    ],
    ids=str,
)
def test_settings_that_somebody_changed_are_one_sentence(change, said):
    with pytest.raises(ValueError, match=said):
        TrainSettings.from_json(json.dumps(json.loads(TrainSettings().to_json()) | change))


def test_settings_that_are_no_text_are_one_sentence(tmp_path):
    (tmp_path / "settings.json").write_bytes(b"\xff\xfe")
    with pytest.raises(ValueError, match="the settings of this run are damaged"):
        RunFolder(tmp_path).settings()


def test_a_file_in_a_run_is_answered_with_its_folder(tmp_path, capsys):
    (tmp_path / "settings.json").write_text("{}")
    assert main(["inspect", str(tmp_path / "settings.json")]) == 2
    assert f"is a file in a checkpoint or run; name the folder, {tmp_path}." in capsys.readouterr().err


def test_all_paths_of_the_settings_hold_everywhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    found = TrainSettings(data="torch/cifar10", data_dir="~/sets", model="local-dir:saved/model").resolved()
    assert (found.data_dir, found.model) == (f"{tmp_path}/home/sets", f"local-dir:{tmp_path}/saved/model")


def test_layer_decay_where_all_pretrained_layers_are_trained():
    def decay(**options):
        return TrainSettings(data="folder:photos", **options).resolved().layer_decay

    assert decay(pretrained=True, freeze="none") == 0.8
    assert decay(pretrained=True, freeze="none", layer_decay=1.0) == 1.0
    assert decay(pretrained=True) is None
    assert decay(freeze="none") is None
