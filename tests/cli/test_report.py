"""timm-csg report as a user runs it: runs, folders, plain models, references, plugins, and what goes wrong."""

import re

import pytest
import timm
from PIL import Image

import timm_csg
from timm_csg.checkpoint import save_plain
from timm_csg.cli import main
from timm_csg.cli.runs import RunFolder

SMALL = ["--img-size", "16", "--batch-size", "128", "--warmup-epochs", "0", "--device", "cpu", "--epochs", "1"]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run of the main job's data with a standard model and one with assigned filters."""
    output = tmp_path_factory.mktemp("run") / "out"
    options = ["--recipe", "standard", "assigned", "--model", "test_resnet", *SMALL]
    assert main(["train", "--output", str(output), *options]) == 0
    return output


@pytest.fixture
def pictures(tmp_path):
    """Validation pictures of two classes in folders."""
    for shade, name in ((60, "dark"), (190, "light")):
        (tmp_path / "data" / "val" / name).mkdir(parents=True)
        for index in range(4):
            Image.new("RGB", (24, 24), (shade, shade, 10 * index)).save(
                tmp_path / "data" / "val" / name / f"{index}.png"
            )
    return tmp_path / "data"


def test_run_folder_has_a_report_of_its_gated_model_beside_the_standard_one(run):
    text = (run / "report.html").read_text(encoding="utf-8")
    assert "<title>What test_resnet has learned of digits</title>" in text
    assert "standard model:" in text


def test_report_of_a_run_is_that_which_the_run_wrote(run, tmp_path, capsys):
    path = tmp_path / "report.html"
    title = "What test_resnet has learned of digits"
    assert main(["report", str(run), "--output", str(path), "--title", title]) == 0
    both = (path.read_text(encoding="utf-8"), (run / "report.html").read_text(encoding="utf-8"))
    again, before = (re.sub(r"<dt>(Date|Data)</dt><dd>.*?</dd>", "", text) for text in both)
    assert again == before
    assert re.search(r"report.html \(\d\.\d MB\): open it in a browser", capsys.readouterr().out.replace("\n", ""))


def test_data_options_are_found_in_the_run(run):
    assert RunFolder.of(run / "standard" / "model").settings().img_size == 16
    assert RunFolder.of("resnet18") is None


def test_standard_model_of_a_run_gets_a_report_without_reference(run, tmp_path):
    path = tmp_path / "report.html"
    assert main(["report", str(run / "standard" / "model"), "--output", str(path)]) == 0
    text = path.read_text(encoding="utf-8")
    assert "standard model:" not in text
    assert "Training did not give the filters owners" in text


def test_folder_of_pictures_names_the_classes_and_needs_no_training_split(pictures, tmp_path):
    model = timm_csg.differentiate(timm.create_model("test_resnet", num_classes=2), mechanism="assigned")
    timm_csg.save_pretrained(model, tmp_path / "model")
    save_plain(timm.create_model("test_resnet", num_classes=2), tmp_path / "plain")
    path = tmp_path / "report.html"
    options = ["--data", str(pictures), "--img-size", "32", "--workers", "0", "--reference", str(tmp_path / "plain")]
    assert main(["report", f"local-dir:{tmp_path / 'model'}", "--output", str(path), *options]) == 0
    text = path.read_text(encoding="utf-8")
    assert "Class “light”" in text
    assert "standard model:" in text


def test_plugin_registers_the_architecture(tmp_path):
    plugin = tmp_path / "my_net.py"
    plugin.write_text(
        "import timm\nfrom timm.models import register_model\n\n@register_model\n"
        "def my_net(pretrained=False, **kwargs):\n    return timm.create_model('test_resnet', **kwargs)\n"
    )
    assert main(["report", "my_net", "--plugin", str(plugin), "--output", str(tmp_path / "report.html")]) == 2
    assert "my_net" in timm.list_models()
    assert main(["report", "x", "--plugin", str(tmp_path / "none.py")]) == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere"], "no checkpoint at nowhere"),
        (["{run}", "--data", "folder:/does/not/exist"], "does not exist"),
        (["{run}", "--reference", "nowhere"], "no checkpoint at nowhere"),
        (["{run}", "--plugin", "no_such_module"], "is not a module"),
        (["{run}", "--device", "cuda:99"], "cuda:99"),
    ],
)
def test_wrong_option_is_one_sentence_and_exit_2(arguments, message, run, tmp_path, capsys):
    arguments = [argument.format(run=run) for argument in arguments]
    assert main(["report", "--output", str(tmp_path / "report.html"), *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error.replace("\n", " ")
    assert "Traceback" not in error
    assert list(tmp_path.iterdir()) == []


def test_data_of_other_classes_is_refused(run, pictures, tmp_path, capsys):
    assert main(["report", str(run), "--data", str(pictures), "--output", str(tmp_path / "report.html")]) == 2
    assert "has 10 classes, but" in capsys.readouterr().err.replace("\n", " ")


def test_reference_for_other_images_is_refused(run, tmp_path, capsys):
    model = timm_csg.from_pretrained(run / "model")
    model.pretrained_cfg["mean"] = (0.1, 0.2, 0.3)
    timm_csg.save_pretrained(model, tmp_path / "model")
    assert main(["report", str(tmp_path / "model"), "--reference", str(run / "standard" / "model")]) == 2
    assert "another mean" in capsys.readouterr().err.replace("\n", " ")
