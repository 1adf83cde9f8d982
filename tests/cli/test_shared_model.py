"""A model that has left its run folder: the same images, the same classes, the same numbers as in its run."""

import json
import shutil

import pytest
import timm
import torch
from PIL import Image
from timm.data import create_transform, resolve_model_data_config

from timm_csg import labels
from timm_csg.cli import main
from timm_csg.cli.checkpoints import load_checkpoint_and_data
from timm_csg.cli.evaluate import evaluate
from timm_csg.cli.explain import explain
from timm_csg.cli.settings import TrainSettings

PETS, INSECTS = ("cat", "dog", "fox"), ("ant", "bee", "cow")
SIZE = 24


def write_folders(root, names, count=8):
    generator = torch.Generator().manual_seed(0)
    for split in ("train", "validation"):
        for place, name in enumerate(names):
            folder = root / split / name
            folder.mkdir(parents=True)
            for number in range(count):
                pixels = (torch.rand(40, 30, 3, generator=generator) * 60 + 80 * place).byte().numpy()
                Image.fromarray(pixels).save(folder / f"{number}.png")
    return root


@pytest.fixture(scope="module")
def pets(tmp_path_factory):
    return write_folders(tmp_path_factory.mktemp("pets"), PETS)


@pytest.fixture(scope="module")
def insects(tmp_path_factory):
    return write_folders(tmp_path_factory.mktemp("insects"), INSECTS)


@pytest.fixture(scope="module")
def run(pets, tmp_path_factory):
    output = tmp_path_factory.mktemp("runs") / "run"
    arguments = ["--data", f"folder:{pets}", "--model", "test_resnet", "--img-size", str(SIZE), "--epochs", "3"]
    more = ["--batch-size", "8", "--workers", "0", "--device", "cpu", "--lr", "0.1", "--quiet", "--recipe", "standard"]
    assert main(["train", *arguments, *more, "paper", "--output", str(output)]) == 0
    return output


@pytest.fixture
def shared(run, tmp_path):
    return shutil.copytree(run / "model", tmp_path / "shared")


def options(data):
    return {"data": f"folder:{data}", "workers": 0, "batch_size": 8, "device": "cpu"}


@pytest.mark.parametrize("recipe", ["standard", "paper"])
def test_evaluate_measures_what_train_measured(run, pets, tmp_path, recipe):
    folder = shutil.copytree(run / recipe / "model", tmp_path / "shared")
    measured = json.loads((run / "metrics.json").read_text())[recipe]["accuracy"]
    found = evaluate([str(folder)], groups=["accuracy"], **options(pets))
    assert found["checkpoints"]["shared"]["accuracy"] == measured
    assert found["classes"] == list(PETS)


def test_plain_timm_measures_what_train_measured(run, shared, pets):
    model = timm.create_model(f"local-dir:{shared}", pretrained=True).eval()
    transform = create_transform(**resolve_model_data_config(model), is_training=False)
    names, hits = model.pretrained_cfg["label_names"], []
    for file in sorted((pets / "validation").rglob("*.png")):
        with torch.no_grad():
            hits.append(names[int(model(transform(Image.open(file))[None]).argmax())] == file.parent.name)
    assert sum(hits) / len(hits) == json.loads((run / "metrics.json").read_text())["paper"]["accuracy"]


def test_explain_needs_no_data_to_name_the_classes(shared, pets):
    (found,) = explain([pets / "validation" / "cat" / "0.png"], str(shared), target="dog", output=None, device="cpu")
    assert (found.answer, found.why.target) == ("dog", 1)


def test_data_with_other_classes_is_refused_by_name(shared, pets, insects, capsys):
    picture = str(pets / "validation" / "cat" / "0.png")
    data = ["--data", f"folder:{insects}", "--device", "cpu"]
    for command in (
        ["evaluate", str(shared)],
        ["report", str(shared)],
        ["explain", picture, "--checkpoint", str(shared)],
    ):
        assert main([*command, *data]) == 2
        assert ": ant, bee, cow; it has cat, dog, fox." in capsys.readouterr().err


def test_data_with_some_of_the_classes_gets_the_models_labels(shared, pets, tmp_path, caplog):
    some = shutil.copytree(pets, tmp_path / "some")
    shutil.rmtree(some / "validation" / "cat")
    settings = TrainSettings(**options(some)).resolved()
    model, loader, names = load_checkpoint_and_data(str(shared), settings)
    assert names == list(PETS) == labels.class_names(model)
    assert torch.cat([targets for _, targets in loader]).unique().tolist() == [1, 2]
    assert "there are no images of: cat" in caplog.text


def test_data_in_another_order_gets_the_models_labels(shared, pets, tmp_path):
    config = json.loads((shared / "config.json").read_text())
    config["label_names"] = ["fox", "cat", "dog"]
    (shared / "config.json").write_text(json.dumps(config))
    loader = load_checkpoint_and_data(str(shared), TrainSettings(**options(pets)).resolved()).loader
    targets = torch.cat([targets for _, targets in loader])
    assert targets.tolist() == [1] * 8 + [2] * 8 + [0] * 8  # cat, dog, fox


def test_a_stream_in_another_order_is_refused(shared, pets, monkeypatch):
    class Stream(torch.utils.data.IterableDataset):
        class_to_idx = {"fox": 0, "cat": 1, "dog": 2}  # noqa: RUF012

        def __iter__(self):
            return iter(())

    monkeypatch.setattr("timm_csg.cli.checkpoints.open_split", lambda *_, **__: Stream())
    with pytest.raises(ValueError, match=r"are in a different order from those of .* cannot be relabelled"):
        load_checkpoint_and_data(str(shared), TrainSettings(**options(pets)).resolved())


def test_grey_model_keeps_its_preprocessing(pets, tmp_path):
    arguments = ["--data", f"folder:{pets}", "--model", "test_resnet", "--img-size", str(SIZE), "--epochs", "1"]
    more = ["--batch-size", "8", "--workers", "0", "--device", "cpu", "--in-chans", "1", "--quiet"]
    assert main(["train", *arguments, *more, "--recipe", "paper", "--output", str(tmp_path / "run")]) == 0
    folder = shutil.copytree(tmp_path / "run" / "model", tmp_path / "shared")
    found = resolve_model_data_config(timm.create_model(f"local-dir:{folder}", pretrained=True))
    assert (list(found["input_size"]), list(found["mean"])) == ([1, SIZE, SIZE], [0.5])
    measured = json.loads((tmp_path / "run" / "metrics.json").read_text())["paper"]["accuracy"]
    assert (
        evaluate([str(folder)], groups=["accuracy"], **options(pets))["checkpoints"]["shared"]["accuracy"] == measured
    )


def test_file_of_weights_is_called_a_file(shared, tmp_path, capsys):
    torch.save({"state_dict": {}}, tmp_path / "last.pth.tar")
    assert main(["evaluate", str(tmp_path / "last.pth.tar"), "--data", "digits"]) == 2
    assert "last.pth.tar is a file of weights" in capsys.readouterr().err
