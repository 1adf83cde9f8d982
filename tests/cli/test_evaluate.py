"""timm-csg evaluate as a user runs it: the numbers, the files, the table, and what goes wrong."""

import csv
import json
import shutil

import pandas
import pytest
import timm
import torch
from PIL import Image
from rich.console import Console

import timm_csg
from timm_csg import measuring, metrics
from timm_csg.checkpoint import save_plain
from timm_csg.cli import main
from timm_csg.cli import results as results_module
from timm_csg.cli.comparison import comparison
from timm_csg.cli.evaluate import evaluate, expand
from timm_csg.cli.settings import TrainSettings
from timm_csg.head import head_on_pooled
from timm_csg.numbers import GROUPS, NUMBERS

CLASSES, SIDE, EACH = ("ant", "bee", "cat"), 64, 8
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
INPUT = {"input_size": (3, SIDE, SIDE), "crop_pct": 1.0, "mean": MEAN, "std": STD}  # so that no picture is resized


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A folder of noisy pictures in three colours, and the annotations of a square in each."""
    root = tmp_path_factory.mktemp("data")
    generator = torch.Generator().manual_seed(0)
    rows = []
    for index, name in enumerate(CLASSES):
        (root / "val" / name).mkdir(parents=True)
        for number in range(EACH):
            pixels = torch.randint(0, 120, (SIDE, SIDE, 3), generator=generator)
            x, y = torch.randint(0, SIDE - 24, (2,), generator=generator).tolist()
            pixels[y : y + 24, x : x + 24, index] += 130
            Image.fromarray(pixels.byte().numpy()).save(root / "val" / name / f"{number}.png")
            rows.append([f"{name}/{number}.png", SIDE, SIDE, x, y, x + 24, y + 24, x, y, x + 12, y + 12])
    with (root / "boxes.csv").open("w", newline="") as handle:
        header = [
            "file",
            "width",
            "height",
            "box_x0",
            "box_y0",
            "box_x1",
            "box_y1",
            "head_x0",
            "head_y0",
            "head_x1",
            "head_y1",
        ]
        csv.writer(handle).writerows([header, *rows])
    return root


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """A plain test_resnet, one with the label gate and one with assigned filters, none with fresh weights."""
    root = tmp_path_factory.mktemp("models")
    torch.manual_seed(0)
    for name, mechanism in (("standard", None), ("paper", "csg"), ("assigned", "assigned")):
        model = timm.create_model("test_resnet", num_classes=3, pretrained_cfg_overlay=INPUT)
        with torch.no_grad():
            for _ in range(8):
                model.train()(torch.randn(16, 3, SIDE, SIDE))  # statistics of BatchNorm
            model.fc.weight.normal_()
        if mechanism is None:
            save_plain(model.eval(), root / name / "model")
            continue
        model = timm_csg.differentiate(model.eval(), mechanism=mechanism)
        with torch.no_grad():
            for parameter in model.mechanism.parameters():
                parameter.uniform_()
            model.project_()
        timm_csg.save_pretrained(model, root / name / "model")
    return [str(root / name / "model") for name in ("standard", "paper", "assigned")]


@pytest.fixture(scope="module")
def options(data):
    return {"data": f"folder:{data}", "img_size": SIDE, "workers": 0, "batch_size": 10, "device": "cpu"}


@pytest.fixture(scope="module")
def output(tmp_path_factory):
    return tmp_path_factory.mktemp("evaluate") / "out"


@pytest.fixture(scope="module")
def results(checkpoints, options, output):
    """All groups of metrics, for the three models."""
    boxes = f"{options['data'].removeprefix('folder:')}/boxes.csv"
    marked = {"landmarks": boxes, "boxes": boxes, "filters": True, "explanations": 3, "csv": True}
    return evaluate(checkpoints, attacks=["fgsm"], eps=[64.0], output=output, **marked, **options)


def batches(data):
    """The images as an independent reader sees them: no resizing is needed."""
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (MEAN, STD))
    images, targets = [], []
    for index, name in enumerate(CLASSES):
        for number in range(EACH):
            pixels = torch.tensor(list(Image.open(data / "val" / name / f"{number}.png").getdata())).view(SIDE, SIDE, 3)
            images.append((pixels.permute(2, 0, 1) / 255 - mean) / std)
            targets.append(index)
    return [(torch.stack(images), torch.tensor(targets))]


def run(checkpoints, data, *arguments):
    common = ["--data", f"folder:{data}", "--img-size", str(SIDE), "--workers", "0", "--device", "cpu"]
    return main(["evaluate", *checkpoints, *common, *map(str, arguments)])


def test_every_model_has_the_same_keys(results):
    keys = [list(values) for values in results["checkpoints"].values()]
    assert list(results["checkpoints"]) == ["standard", "paper", "assigned"]
    assert keys[0] == keys[1] == keys[2]
    assert {number.key for number in NUMBERS} <= set(keys[0])


def test_json_is_what_python_returned_and_says_where_numbers_come_from(results, output):
    assert json.loads((output / "metrics.json").read_text()) == json.loads(json.dumps(results))
    assert (results["images"], results["classes"], results["seed"]) == (24, list(CLASSES), 0)
    assert results["metrics"] == list(GROUPS)
    assert results["versions"]["timm_csg"] == timm_csg.__version__
    assert not list(output.rglob("*.tmp"))


def test_numbers_are_those_of_the_metrics_on_the_same_images(results, checkpoints, data):
    loader = batches(data)
    model = timm_csg.from_pretrained(checkpoints[2])
    found = results["checkpoints"]["assigned"]
    seen = measuring.collect(model, loader)
    gate = model.mechanism.class_filter_matrix().detach()
    mutual = metrics.mutual_information(seen.features, seen.targets, 3)
    without = measuring.ablate(model, loader, metrics.owners(gate), 3)
    only = measuring.ablate(model, loader, metrics.owners(gate), 3, keep_only=True)
    alike = metrics.summarize_similarity(metrics.activation_similarity(seen.features), metrics.owners(gate))
    expected = {
        "accuracy": metrics.accuracy(seen.logits, seen.targets),
        "gated_accuracy": metrics.accuracy(seen.gated_logits, seen.targets),
        "mutual_information_score": float(metrics.mutual_information_score(mutual)),
        "gate_density": float(gate.mean()),
        "owner_agreement": float(metrics.owner_agreement(gate, mutual)),
        "class_without_its_filters": without.own,
        "other_classes": without.others,
        "class_with_only_its_filters": only.own,
        "activation_similarity_within": alike.within,
    }
    assert {key: found[key] for key in expected} == pytest.approx(expected, abs=2e-3)
    assert found["filters_per_class"] == torch.bincount(metrics.owners(gate), minlength=3).tolist()


def test_optional_numbers_are_those_of_the_metrics_on_the_same_images(results, checkpoints, data):
    loader = batches(data)
    model = timm.create_model(f"local-dir:{checkpoints[0]}", pretrained=True).eval()
    found = results["checkpoints"]["standard"]
    annotations = measuring.read_annotations(data / "boxes.csv")  # in the order of the images, at their size
    instability = metrics.location_instability(measuring.collect_peaks(model, loader), annotations.points, 3)
    parts = measuring.part_interpretability(model, loader, annotations.part_boxes()[1], 3)
    assert found["location_instability"] == pytest.approx(float(instability.per_class.nanmean()), abs=1e-4)
    assert found["part_interpretability"] == pytest.approx(float(parts.per_class.nanmean()), abs=1e-3)
    assert found["cam_iou"] == pytest.approx(
        measuring.cam_localisation(model, loader, annotations.object_boxes()).total_iou, abs=1e-3
    )
    assert found["whole_image_iou"] == pytest.approx(24 * 24 / SIDE**2)
    images, targets = loader[0]
    attacked = measuring.fgsm(model, images, targets, eps=64 / 255)
    with torch.no_grad():
        accuracy = metrics.accuracy(model(attacked), targets)
    assert found["adversarial"]["fgsm 64/255"]["accuracy"] == pytest.approx(accuracy)
    assert found["adversarial"]["fgsm 64/255"]["detection_errors"] is None  # too few images to learn from


def test_what_does_not_apply_is_none(results):
    standard, paper = results["checkpoints"]["standard"], results["checkpoints"]["paper"]
    assert standard["gate_density"] is standard["gated_accuracy"] is standard["owner_agreement"] is None
    assert standard["filter_owners_by"] == "mutual information"
    assert paper["gated_accuracy_uses_labels"] is True
    assert results["checkpoints"]["assigned"]["gated_accuracy_uses_labels"] is False


def test_tables_by_class_and_filter_are_written(results, output):
    with (output / "classes_paper.csv").open() as handle:
        classes = list(csv.DictReader(handle))
    with (output / "filters_paper.csv").open() as handle:
        filters = list(csv.DictReader(handle))
    assert [row["class"] for row in classes] == list(CLASSES)
    assert sum(int(row["filters"]) for row in classes) == len(filters) == 96
    assert {row["owner"] for row in filters} <= set(CLASSES)
    shares = [float(row["accuracy"]) for row in classes]
    assert sum(shares) / 3 == pytest.approx(results["checkpoints"]["paper"]["accuracy"], abs=1e-5)
    assert {path.name for path in (output / "figures").iterdir()} == {
        "gate_paper.png", "gate_assigned.png", "mutual_information_standard.png", "mutual_information_paper.png",
        "mutual_information_assigned.png",
    }  # fmt: skip


def text_of(results, width):
    console = Console(width=width, file=None, record=True, quiet=False, force_terminal=False)
    with console.capture() as capture:
        console.print(comparison(results, width))
    return capture.get()


def test_matrices_are_written_by_class_and_filter(results, output, checkpoints):
    gate = pandas.read_csv(output / "gate_paper.csv", index_col="class")
    assert gate.index.tolist() == list(CLASSES)
    assert gate.columns[-1] == "filter 95"
    expected = timm_csg.from_pretrained(checkpoints[1]).mechanism.class_filter_matrix()
    assert gate.to_numpy() == pytest.approx(expected.numpy(), rel=1e-5, abs=1e-6)
    mutual = pandas.read_csv(output / "mutual_information_standard.csv", index_col="class").to_numpy()
    expected = results["checkpoints"]["standard"]["mutual_information_score"]
    assert mutual.max(axis=0).mean() == pytest.approx(expected, rel=1e-5)
    assert not (output / "gate_standard.csv").exists()


@pytest.mark.parametrize("width", [60, 80, 120])
def test_table_fits_the_width_and_shows_every_model(results, width):
    text = text_of(results, width)
    assert max(map(len, text.splitlines())) <= width
    assert "standard" in text
    assert "assigned" in text
    assert "…" not in text


def test_table_marks_the_best_and_warns_of_given_labels(results):
    lines = text_of(results, 120).splitlines()
    best = max(values["accuracy"] for values in results["checkpoints"].values())
    [accuracy] = [line for line in lines if line.strip().startswith("accuracy ")]
    [gated] = [line for line in lines if line.strip().startswith("gated accuracy ")]
    assert f"*{best:.4f}" in accuracy
    assert gated.count("†") == 1
    assert any(line.startswith("† the label gate is given the true label") for line in lines)


def test_command_prints_the_table_and_the_folder(checkpoints, data, tmp_path, capsys):
    assert run(checkpoints[:1], data, "--metrics", "accuracy", "--output", tmp_path / "out") == 0
    out = capsys.readouterr().out
    assert "24 images of" in out
    assert "MIS" not in out
    assert "results: " in out
    assert list((tmp_path / "out").glob("*.png")) == []


def test_command_prints_json_alone(checkpoints, data, tmp_path, capsys):
    assert run(checkpoints[1:2], data, "--metrics", "accuracy", "--json", "--output", tmp_path / "out") == 0
    assert json.loads(capsys.readouterr().out) == json.loads((tmp_path / "out" / "metrics.json").read_text())


def test_ablation_needs_no_second_pass_where_the_head_is_pooling_and_linear(make_model, images, targets):
    for name, needs_images in (("test_resnet", False), ("test_mambaout", False), ("test_vit", True)):
        model = make_model(name)
        loader = [(images, targets)]
        seen = measuring.collect(model, loader)
        head = head_on_pooled(model, seen.features, seen.logits)
        assert (head is None) == needs_images
        owners = torch.arange(seen.features.shape[1]) % 5
        if head is not None:
            found = measuring.ablate(head, [(seen.features[:, :, None, None], seen.targets)], owners, 5)
            expected = measuring.ablate(model, loader, owners, 5)
            assert torch.equal(found.after.nan_to_num(), expected.after.nan_to_num())


def test_another_number_of_classes_is_refused(checkpoints, tmp_path, data, capsys):
    folder = save_plain(timm.create_model("test_resnet", num_classes=4), tmp_path / "four")
    assert run([checkpoints[0], folder.as_posix()], data, "--output", tmp_path / "out") == 2
    assert "has 4 classes, but" in capsys.readouterr().err.replace("\n", " ")
    assert not (tmp_path / "out").exists()


def test_classes_of_another_name_are_refused(checkpoints, tmp_path, options):
    folder = save_plain(timm.create_model("test_resnet", num_classes=3), tmp_path / "named")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"label_names": ["ant", "wasp", "cat"]}))
    with pytest.raises(ValueError, match=r"has classes missing from .*named: bee; it has ant, wasp, cat\."):
        evaluate([str(folder)], groups=["accuracy"], **options)
    (folder / "config.json").write_text(json.dumps(config | {"label_names": list(CLASSES)}))
    assert evaluate([str(folder)], groups=["accuracy"], **options)["images"] == 24


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--metrics", "acuracy"], "there is no group of metrics 'acuracy'"),
        (["--metrics", "parts"], "the metrics 'parts' need --landmarks"),
        (["--attacks", "carlini"], "unknown attack carlini"),
        (["--landmarks", "nowhere.csv"], "there is no file of annotations nowhere.csv"),
        (["--eps", "4"], "--eps would have no effect here; add --attacks"),
        (["--attack-images", "5"], "--attack-images would have no effect here; add --attacks"),
        (["--explanation-images", "5"], "--explanation-images would have no effect here; add --explanations"),
        (["--explanations", "--explanation-images", "0"], "--explanation-images must be at least 1, but is 0"),
        (["--encoder", "resnet81"], "timm has no model 'resnet81' for the encoder. Did you mean"),
        (["--seed", "-1"], "seed must be a whole number, 0 or more"),
    ],
)
def test_wrong_options_are_refused_before_anything_is_measured(checkpoints, data, tmp_path, capsys, arguments, message):
    assert run(checkpoints[:1], data, "--output", tmp_path / "out", *arguments) == 2
    assert message in capsys.readouterr().err.replace("\n", " ")


def test_strengths_that_are_no_numbers_are_named(checkpoints, data, capsys):
    with pytest.raises(SystemExit):
        run(checkpoints[:1], data, "--attacks", "fgsm", "--eps", "2;8")
    assert "--eps expects numbers with commas between them, but found '2;8'" in capsys.readouterr().err


def test_without_data_the_images_have_to_be_named(checkpoints):
    with pytest.raises(ValueError, match="name the images with --data"):
        evaluate(checkpoints)


def test_without_data_a_missing_checkpoint_is_named_first(checkpoints, tmp_path):
    (tmp_path / "empty").mkdir()
    for missing in ("nowhere", f"local-dir:{tmp_path}/nowhere", f"{tmp_path}/nowhere", f"{tmp_path}/empty"):
        with pytest.raises(timm_csg.CheckpointError, match=f"no checkpoint at .*{missing[-5:]}"):
            evaluate([*checkpoints, missing])
    with pytest.raises(ValueError, match="name the images with --data"):
        evaluate(["user/repository"])


def test_a_run_stands_for_all_its_models(checkpoints, tmp_path):
    run_folder = tmp_path / "run"
    for recipe, checkpoint in zip(("standard", "paper"), checkpoints, strict=False):
        (run_folder / recipe).mkdir(parents=True)
        (run_folder / recipe / "model").symlink_to(checkpoint)
    (run_folder / "settings.json").write_text(TrainSettings(recipe=["standard", "paper"]).to_json())
    assert list(expand([str(run_folder)])) == ["standard", "paper"]
    assert list(expand([str(run_folder), checkpoints[0]])) == ["run/standard", "run/paper", "models0/standard"]


def test_names_are_short_and_differ():
    assert list(expand(["user/a", "hf-hub:other/a", "resnet18"])) == ["user/a", "hf-hub:other/a", "resnet18"]
    with pytest.raises(ValueError, match="named twice: resnet18"):
        expand(["resnet18", "resnet18"])
    with pytest.raises(ValueError, match="the tables of a/b_c and a_b/c would have the same file names"):
        expand(["x/a/b_c", "x/a_b/c", "y/b_c", "y/c"])


def test_interrupted_evaluation_keeps_the_finished_models(checkpoints, data, tmp_path, monkeypatch):
    from timm_csg.cli import evaluate as module

    write = module.write_tables

    def interrupt(found, class_names, label, output, **options):
        if label == "paper":
            raise KeyboardInterrupt
        write(found, class_names, label, output, **options)

    monkeypatch.setattr(module, "write_tables", interrupt)
    assert run(checkpoints[:2], data, "--metrics", "accuracy", "--output", tmp_path / "out") == 130
    assert list(json.loads((tmp_path / "out" / "metrics.json").read_text())["checkpoints"]) == ["standard"]


def test_every_group_of_the_table_is_explained_below_it(results):
    text = " ".join(text_of(results, 120).split())
    for said in (
        "MIS: how much a filter reveals",
        "density: mean gate, at least 1 / classes = 0.333",
        "attack strengths in",
    ):
        assert said in text
    assert "Removal hides a class: other filters can still know it." in text


def test_cells_are_text_for_spreadsheets_and_filters_of_nobody_have_no_name(tmp_path):
    columns = {"class": ["=1+2", "+a", "-b", "@x", "plain"], "owner": torch.tensor([-1, 0, 1, 2, 4])}
    results_module._write_table(tmp_path / "table.csv", columns, ["a", "b", "c", "d", "e"])
    with (tmp_path / "table.csv").open(newline="") as handle:
        assert list(csv.reader(handle))[1:] == [["'=1+2", ""], ["'+a", "a"], ["'-b", "b"], ["'@x", "c"], ["plain", "e"]]


def test_runs_on_different_data_are_not_compared(checkpoints, tmp_path):
    folders = []
    for number, checkpoint in enumerate(checkpoints[:2]):
        (tmp_path / f"data{number}").mkdir()
        run = tmp_path / f"run{number}"
        shutil.copytree(checkpoint, run / "paper" / "model")
        (run / "settings.json").write_text(
            TrainSettings(recipe=["paper"], data=f"folder:{tmp_path}/data{number}").to_json()
        )
        folders.append(str(run))
    with pytest.raises(ValueError, match=r"were trained on different data or parts of it .*; choose with --data"):
        evaluate(folders)
