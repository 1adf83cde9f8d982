"""The examples run, and stay short enough to be read."""

import importlib.util
import io
import json
import os
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image

import timm_csg
from timm_csg import checkpoint, judging

EXAMPLES = Path(__file__).parents[1] / "examples"


@pytest.fixture
def run_example(monkeypatch):
    """Load an example as a script would see it, and call its main."""
    monkeypatch.setattr(sys, "path", [str(EXAMPLES / "experiments"), str(EXAMPLES), *sys.path])

    def run(name, *arguments):
        path = next(EXAMPLES.rglob(f"{name}.py"))
        spec = importlib.util.spec_from_file_location(name, path)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module.main([str(argument) for argument in arguments])

    return run


@pytest.fixture
def cifar(tmp_path):
    """An .npz like that of CIFAR-10: encoded pictures one after the other, their offsets and labels."""
    random, arrays = np.random.default_rng(0), {}
    for split, size in (("train", 40), ("test", 40)):
        encoded = []
        for pixels in random.integers(0, 256, (size, 32, 32, 3), dtype=np.uint8):
            handle = io.BytesIO()
            Image.fromarray(pixels).save(handle, "PNG")
            encoded.append(handle.getvalue())
        arrays[f"{split}_data"] = np.frombuffer(b"".join(encoded), dtype=np.uint8)
        arrays[f"{split}_offset"] = np.cumsum([0, *map(len, encoded)])
        arrays[f"{split}_label"] = np.arange(size) % 10
    np.savez(tmp_path / "cifar.npz", **arrays)
    return tmp_path / "cifar.npz"


@pytest.mark.parametrize("path", sorted(EXAMPLES.rglob("*.py")), ids=lambda path: path.name)
def test_examples_are_short(path):
    longest = 160 if path.parent.name == "experiments" else 90
    assert len(path.read_text(encoding="utf-8").splitlines()) <= longest


@pytest.mark.parametrize("options", [[], ["--paper"]], ids=["assigned", "paper"])
def test_plain_loop_learns_and_saves(run_example, tmp_path, options):
    result = run_example("plain_loop", "--epochs", 3, "--output", tmp_path / "model", *options)
    assert result["accuracy"] > 0.5
    assert 0 < result["MIS"] < 0.34
    assert 0.1 <= result["density"] <= 1
    plain = timm.create_model(f"local-dir:{tmp_path / 'model'}", pretrained=True).eval()
    images = torch.rand(2, 1, 24, 24)
    assert torch.equal(plain(images), timm_csg.from_pretrained(tmp_path / "model")(images))


@pytest.mark.parametrize("recipe", ["standard", "assigned", "paper"])
def test_cifar10_runs_on_a_file_of_its_format(run_example, cifar, tmp_path, recipe):
    output = tmp_path / recipe
    arguments = ["--data", cifar, "--recipe", recipe, "--epochs", 1, "--batch-size", 20, "--output", output]
    result = run_example("cifar10", *arguments)
    assert json.loads((output / "metrics.json").read_text()) == result
    assert 0 <= result["accuracy"] <= 1
    assert ("gate_density" in result) == (recipe != "standard")
    if recipe != "standard":
        assert timm_csg.from_pretrained(output).mechanism.class_filter_matrix().shape == (10, 64)


@pytest.mark.parametrize("recipe", ["standard", "paper", "again", "assigned"])
def test_cifar_curves_measures_over_epochs(run_example, cifar, tmp_path, recipe):
    arguments = ["--data", cifar, "--recipe", recipe, "--epochs", 2, "--batch-size", 20, "--output", tmp_path / "out"]
    rows = run_example("cifar_curves", *arguments, "--device", "cpu")
    assert [row["epoch"] for row in rows] == [1, 2]
    assert (tmp_path / "out").read_text().splitlines() == [json.dumps(row) for row in rows]
    assert ("density" in rows[0]) == (recipe != "standard")


def test_factor_maps_draws_its_sheet(run_example, tmp_path):
    result = run_example("factor_maps", "--epochs", 1, "--output", tmp_path)
    assert result["reconstruction"] > 0
    assert (tmp_path / "factors.png").stat().st_size > 10_000


def test_animal_localisation_measures_every_checkpoint(run_example, tmp_path):
    random, rows = np.random.default_rng(0), ["file,width,height,box_x0,box_y0,box_x1,box_y1,head_x,head_y"]
    for number in range(8):
        path = tmp_path / "pictures" / ("cat", "dog")[number % 2] / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(random.integers(0, 256, (48, 64, 3), dtype=np.uint8)).save(path)
        rows.append(f"{path.relative_to(tmp_path / 'pictures').as_posix()},64,48,10,10,40,40,{number + 5},20")
    (tmp_path / "marks.csv").write_text("\n".join(rows))
    model = timm.create_model("test_resnet", num_classes=2)
    timm.models.save_for_hf(model, tmp_path / "plain", safe_serialization=True)
    timm_csg.save_pretrained(timm_csg.differentiate(model, mechanism="csg"), tmp_path / "ours")
    output = tmp_path / "out.json"
    common = ["--images", tmp_path / "pictures", "--annotations", tmp_path / "marks.csv", "--size", 64]
    run_example("animal_localisation", tmp_path / "plain", tmp_path / "ours", *common, "--output", output)
    results = json.loads(output.read_text())
    assert results[str(tmp_path / "plain")] == results[str(tmp_path / "ours")]  # the standard path of both is the same
    assert set(results[str(tmp_path / "ours")]) >= {"whole_image", "cam", "activmap", "gradmap", "instability"}


@pytest.fixture
def animals(tmp_path):
    """Options of the fine-tuning scripts: pictures of two animals, a tiny network without weights, a cache."""
    random = np.random.default_rng(0)
    for split, size in (("train", 40), ("test", 24)):
        with tarfile.open(tmp_path / f"{split}.tar", "w") as archive:
            for number in range(size):
                path, shade = tmp_path / "picture.jpg", 150 * (number % 2)
                pixels = random.integers(shade, shade + 100, (48, 40, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(path)
                archive.add(path, f"{('cat', 'dog')[number % 2]}/{split}{number}.jpg")
    return ["--data", tmp_path, "--weights", "mobilenetv2_035", "--size", 32, "--cache", tmp_path / "frozen.pt"]


METHODS = ["assigned", "random", "paper", "standard", "probe", "contrastive", "mutual-channel", "binary-head"]


@pytest.mark.parametrize("method", METHODS)
def test_fine_tuning_measures_every_method(run_example, animals, tmp_path, method):
    output = tmp_path / "runs.jsonl"
    options = ["--method", method, "--epochs", 1, "--batch-size", 20, "--output", output]
    (result,) = run_example("fine_tuning", *animals, *options)
    assert json.loads(output.read_text()) == result
    assert 0 <= result["MIS"] < 0.8  # log 2 at most, but for the error of the estimate
    assert ("agreement" in result) == (method in ("assigned", "random", "paper", "mutual-channel", "binary-head"))
    assert ("gated" in result) == (method in ("assigned", "random", "paper"))
    if method == "assigned":
        assert result["without"] <= 0.5 + 1e-6  # a class without its filters is left with its bias


def test_fine_tuning_holds_pictures_out_and_prints_its_table(run_example, animals, tmp_path):
    output = tmp_path / "runs.jsonl"
    options = ["--hold-out", "--filters-per-class", 2, "--epochs", 1, "--batch-size", 4, "--seed", 0, 1]
    first, second = run_example("fine_tuning", *animals, *options, "--output", output)
    assert (first["seed"], second["seed"]) == (0, 1)
    assert first["density"] == pytest.approx(2 / 1280)
    table = run_example("fine_tuning_table", output).splitlines()
    assert table[2].startswith("| 2 | mobilenetv2_035 | 32 | False | None | True | assigned | 0.001 |")
    assert " ± " in table[2]


def test_fine_tuning_takes_some_classes_and_pictures(run_example, animals):
    with pytest.raises(ValueError, match="is not in list"):
        run_example("fine_tuning", *animals, "--classes", "cow")
    (result,) = run_example("fine_tuning", *animals, "--classes", "dog", "cat", "--per-class", 3, "--epochs", 1)
    assert result["classes"] == ["dog", "cat"]


def test_fine_tuning_trains_all_layers(run_example, animals, tmp_path):
    options = ["--cache", tmp_path / "pictures.pt", "--all-layers", "--epochs", 1, "--batch-size", 20]
    (result,) = run_example("fine_tuning", *animals, *options)
    assert result["all_layers"]
    assert torch.load(tmp_path / "pictures.pt")["test"].shape == (24, 3, 32, 32)


def test_adapting_compares_with_a_dense_probe(run_example, animals):
    found = run_example("adapting", *animals, "--filters-per-class", 3, "--time", "--every", 3)
    assert set(found) == {"probe", "all filters", "3 a class", "seconds"}
    assert found["3 a class"]["density"] == pytest.approx(3 / 1280)
    assert found["seconds"]["ratio"] > 0


def test_filter_figure_draws_a_row_for_each_filter(run_example, animals, tmp_path):
    options = ["--animal", "cat", "--filters", 2, "--epochs", 1, "--output", tmp_path / "filters.jpg"]
    strongest = run_example("filter_figure", *animals, *options)
    assert [rows.shape for rows in strongest.values()] == [(2, 3), (2, 3)]
    assert Image.open(tmp_path / "filters.jpg").size[0] > 500


@pytest.fixture
def annotated(tmp_path):
    """Folder of pictures of two animals with head and legs."""
    random, rows = (
        np.random.default_rng(0),
        ["file,width,height,head_x,head_y,legs_x,legs_y,box_x0,box_y0,box_x1,box_y1"],
    )
    for split, size in (("train", 20), ("test", 24)):
        with tarfile.open(tmp_path / f"{split}.tar", "w") as archive:
            for number in range(size):
                name = f"{('cat', 'dog')[number % 2]}/{split}{number}.jpg"
                path = tmp_path / "picture.jpg"
                Image.fromarray(random.integers(0, 256, (48, 64, 3), dtype=np.uint8)).save(path)
                archive.add(path, name)
                rows.append(f"{name},64,48,{number + 5},20,20,{number + 10},4,8,48,40")
    (tmp_path / "annotations.csv").write_text("\n".join(rows))
    return tmp_path


def test_parts_and_owners_measures_every_method_and_draws(run_example, annotated):
    common = ["--data", annotated, "--weights", "mobilenetv2_035", "--size", 64, "--stride", 16]
    common += ["--cache", annotated / "frozen.pt", "--epochs", 1, "--batch-size", 9]
    files = ["--figure", annotated / "parts.png", "--output", annotated / "runs.jsonl"]
    found = {result["method"]: result for result in run_example("parts_and_owners", *common, *files)}
    assert list(found) == ["standard", "icnn", "assigned", "both"]
    assert [json.loads(line)["method"] for line in (annotated / "runs.jsonl").read_text().splitlines()] == list(found)
    assert all(0 < result["instability_all_classes"] < 1 for result in found.values())
    assert [name for name, result in found.items() if "instability_owner" in result] == ["assigned", "both"]
    assert all(found[name]["density"] == 0.5 for name in ("assigned", "both"))
    assert {name: set(parts) for name, parts in found["both"]["figure"].items()} == {
        "cat": {"head", "legs"},
        "dog": {"head", "legs"},
    }
    assert Image.open(annotated / "parts.png").size[0] > 500


def test_seeds_of_the_part_scripts_draw_other_pictures(run_example, annotated, monkeypatch):
    monkeypatch.syspath_prepend(str(EXAMPLES / "experiments"))
    nine_tenths = importlib.import_module("animal_pictures").nine_tenths
    targets = torch.arange(40) % 2
    first, again, other = (nine_tenths(targets, seed) for seed in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert torch.bincount(targets[first]).tolist() == torch.bincount(targets[other]).tolist() == [18, 18]


@pytest.mark.slow
def test_animal_parts_measures_and_draws(run_example, annotated):
    tmp_path = annotated
    common = ["--data", tmp_path, "--cache", tmp_path / "cache.pt", "--epochs", 1, "--batch-size", 4]
    for recipe in ("standard", "assigned", "icnn", "both"):
        options = ["--recipe", recipe, "--output", tmp_path / recipe, *(["--owners"] if recipe == "both" else [])]
        result = run_example("animal_parts", *common, *options)
        assert 0 < result["instability_own_class"] < 1
    assert 0 <= result["agreement"] <= 1
    objects = [*common, "--objects", "--cache", tmp_path / "objects.pt"]
    run_example("animal_parts", *objects, "--recipe", "icnn", "--output", tmp_path / "objects")
    with pytest.raises(ValueError, match="holds features of objects; give another --cache"):
        run_example("animal_parts", *common, "--cache", tmp_path / "objects.pt", "--output", tmp_path / "wrong")
    regions = torch.load(tmp_path / "objects.pt")["test_regions"]
    assert regions[0].tolist() == [0, 5, 52, 43]  # a margin of a tenth
    assert timm_csg.from_pretrained(tmp_path / "icnn").mechanism.name == "icnn"
    folders = [tmp_path / "standard", tmp_path / "icnn"]
    run_example(
        "part_figure", *folders, "--data", tmp_path, "--objects", "--filters", 2, "--output", tmp_path / "parts.png"
    )
    assert (tmp_path / "parts.png").stat().st_size > 10_000


@pytest.mark.slow
def test_released_code_trains_with_two_rates_and_localises(run_example, annotated):
    common = ["--data", annotated, "--weights", "mobilenetv2_035", "--cache", annotated / "squares.pt"]
    common += ["--classes", "dog", "cat", "--epochs", 12, "--batch-size", 18, "--gradmap-images", 1]
    found = run_example("released_code", *common, "--output", annotated / "runs.jsonl")
    assert [result["method"] for result in found] == ["standard", "two-rates", "released", "assigned"]
    lines = (annotated / "runs.jsonl").read_text().splitlines()
    assert [json.loads(line)["localisation"] for line in lines] == [result["localisation"] for result in found]
    assert set(found[0]["localisation"]) == {"whole", "cam", "activmap", "activmap_positive", "gradmap"}
    assert [result.get("density") for result in found[:2]] == [None, None]
    assert found[3]["density"] == 0.5
    first = torch.load(annotated / "squares.pt")["test_boxes"][0].tolist()
    assert first == pytest.approx([0, 6 / 44 * 128, 128, 38 / 44 * 128], abs=1e-3)


def test_squares_are_black_beyond_the_picture(monkeypatch):
    monkeypatch.syspath_prepend(str(EXAMPLES / "experiments"))
    cut_square = importlib.import_module("released_pictures").cut_square
    picture = torch.full((3, 40, 100), 200, dtype=torch.uint8)
    square, box = cut_square(picture, torch.tensor([10.0, 0.0, 74.0, 40.0]))
    assert square.shape == (3, 128, 128)
    assert box.tolist() == [0, 24, 128, 104]
    assert square[:, :20].max() == 0
    assert square[:, 28:100].min() == 200
    assert square[:, 108:].max() == 0


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="cores are chosen as Linux does")
@pytest.mark.parametrize("device", ["cpu", "cuda"])  # side by side, in turns
def test_train_speed_compares_with_a_script_of_timms_options(run_example, tmp_path, device):
    script = tmp_path / "train.py"
    script.write_text(
        "import sys, time, pathlib\n"
        "options = dict(zip(sys.argv[1::1], sys.argv[2::1]))\n"
        "assert len(list(pathlib.Path(options['--data-dir'], 'train').rglob('*.jpg'))) == 8\n"
        "folder = pathlib.Path(options['--output'], 'name')\n"
        "folder.mkdir(parents=True)\n"
        "for epoch in range(-1, int(options['--epochs'])):\n"
        "    with (folder / 'summary.csv').open('a') as file: print(epoch, file=file)\n"
        "    start = time.perf_counter()\n"
        "    while time.perf_counter() < start + 0.4: pass\n"
    )
    options = [script, "--pictures", 8, "--epochs", 3, "--device", device, "--rival", "timm"]
    result = run_example("train_speed", *options)["timm"]
    assert np.array(result["ratios"]).shape == (2, 2)
    assert result["processor"] == pytest.approx(1, rel=0.5)
    assert result["clock"] == pytest.approx(1, rel=0.2)
    assert result["pictures_per_second"] == pytest.approx([8 / 0.4] * 2, rel=0.2)
    script.write_text("raise SystemExit('no such option')")
    with pytest.raises(SystemExit, match="no such option"):
        run_example("train_speed", *options)


@pytest.mark.slow
def test_cifar10_metrics_compares_checkpoints(run_example, cifar, tmp_path):
    run_example("cifar10", "--data", cifar, "--epochs", 1, "--batch-size", 20, "--output", tmp_path / "ours")
    checkpoint.save_plain(timm.create_model("resnet20_cifar"), tmp_path / "plain")
    groups = [f"standard={tmp_path / 'plain'}", f"assigned={tmp_path / 'ours'},{tmp_path / 'ours'}"]
    result = run_example("cifar10_metrics", "--data", cifar, "--output", tmp_path / "table", *groups)
    assert json.loads((tmp_path / "table.json").read_text()) == result
    assert result["assigned"][0] == result["assigned"][1]
    assert "gate density" in result["assigned"][0]
    assert "gate density" not in result["standard"][0]
    table = (tmp_path / "table.md").read_text().splitlines()
    assert table[0] == "| metric | standard | assigned |"
    assert any(line.startswith("| gate density | – | ") and line.endswith(" ± 0.0000 |") for line in table)


def test_maps_are_judged_and_tabled(run_example, cifar, tmp_path):
    for package in ("captum", "pytorch_grad_cam", "torchcam"):
        pytest.importorskip(package, reason="pip install -e '.[compare]'")
    torch.manual_seed(0)
    checkpoint, output = EXAMPLES / "cifar10_resnet20_assigned", tmp_path / "judged.jsonl"
    options = [
        "--set",
        "cifar10",
        "--data",
        cifar,
        "--checkpoint",
        checkpoint,
        "--weights",
        checkpoint / "model.safetensors",
    ]
    options += ["--images", 8, "--judges", "deletion", "random_logit", "--output", output]
    for model in ("assigned", "standard"):
        lines = run_example(
            "judge_maps", *options, "--model", model, "--maps", "evidence map", "CAM", "grad-cam HiResCAM"
        )
        assert [line["map"] for line in lines][-2:] == ["CAM", "grad-cam HiResCAM"]
        assert len(lines) == (3 if model == "assigned" else 2)
    text = run_example("judge_maps_table", output)
    assert text.count("| assigned, ") == 3
    assert "deletion" in text


def test_maps_are_judged_on_grids_chosen_once(monkeypatch):
    for package in ("captum", "pytorch_grad_cam", "torchcam"):
        pytest.importorskip(package, reason="pip install -e '.[compare]'")
    monkeypatch.syspath_prepend(str(EXAMPLES / "experiments"))
    judge_maps = importlib.import_module("judge_maps")
    model = torch.nn.Sequential(torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten())  # ten colours, ten classes
    images, targets = 9 * torch.eye(10).repeat(8, 1)[:, :, None, None], torch.arange(10).repeat(8)
    options = ["--set", "cifar10", "--data", "", "--weights", "", "--output", "", "--grids", "5", "--seed", "1"]
    made = judge_maps.grids_once(judge_maps.parse([*options, "--every", "2"]), model, images, targets)
    for name, side in (("grid_2x2", 2), ("grid_3x3", 3)):
        expected = judging.make_grids(model(images).softmax(dim=1), targets, side=side, grids=5, seed=1)
        assert torch.equal(made[name]["grids"].rows, expected.rows[[0, 2, 4]])
        assert torch.equal(made[name]["grids"].targets, expected.targets[[0, 2, 4]])
    assert not judge_maps.grids_once(judge_maps.parse([*options, "--judges", "deletion"]), model, images, targets)


def test_frozen_layers_look_at_a_picture_once(monkeypatch):
    monkeypatch.syspath_prepend(str(EXAMPLES / "experiments"))
    convolution, seen = torch.nn.Conv2d(3, 2, 1), []
    once = importlib.import_module("frozen_once").FrozenOnce(convolution)
    convolution.register_forward_hook(lambda module, inputs, output: seen.append(len(inputs[0])))
    images = torch.rand(2, 3, 4, 4)[[0, 1, 0]]
    torch.testing.assert_close(once(images), convolution(images))
    torch.testing.assert_close(once(images[1:]), convolution(images[1:]))
    assert seen == [2, 3, 2]  # the second and the last are the convolution itself
    with torch.no_grad():
        convolution.weight.neg_()
    torch.testing.assert_close(once(images), convolution(images))
    once(images.requires_grad_()).sum().backward()
    assert images.grad.abs().sum() > 0
