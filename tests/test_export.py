"""The exported file says what the model says: logits, evidence, maps; for every mechanism, layout and batch size."""

import copy
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import timm
import torch
from PIL import Image
from reference import explain as reference
from timm.data import create_transform

import timm_csg
from timm_csg import explain
from timm_csg.cli import main

SIZE = {"input_size": (3, 64, 64)}
PREPROCESSING = SIZE | {"crop_pct": 0.5, "interpolation": "bilinear"}
NAMES = ["cat", "dog", "owl", "été", "ox"]
ROOT = Path(__file__).parents[1]


def with_owners(model, mechanism, gated):
    """Differentiate, with random owners."""
    timm_csg.differentiate(model, mechanism=mechanism)
    if mechanism == "icnn":
        model.mechanism.category.copy_(torch.arange(model.mechanism.num_filters) % model.num_classes)
        model.mechanism.batches.fill_(1)
    elif isinstance(mechanism, str):
        gated(model)
    return model


def run(path, images, target=None):
    """The file's outputs by name, as tensors."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(path, options)
    inputs = {"images": images.numpy()} | ({} if target is None else {"target": np.array(target)})
    names = [output.name for output in session.get_outputs()]
    return {name: torch.from_numpy(found) for name, found in zip(names, session.run(None, inputs), strict=True)}


def metadata(path):
    return {entry.key: entry.value for entry in onnx.load(path).metadata_props}


def contributions(model, images):
    """What each filter adds to each class's logit on the standard path [batch, classes, filters]."""
    every = [explain.class_filters(model, images, label, top=model.num_features) for label in range(model.num_classes)]
    return torch.stack([found.contribution.gather(1, found.filters.argsort(dim=1)) for found in every], dim=1)


@pytest.mark.parametrize("mechanism", ["assigned", "csg", "icnn"])
def test_file_agrees_with_torch_and_with_the_literal_loop(tiny_model, images, gated, mechanism, tmp_path):
    model = with_owners(tiny_model, mechanism, gated)
    exported = timm_csg.export_onnx(model, tmp_path / "model.onnx", preprocessing=SIZE)
    assert exported == (tmp_path / "model.onnx", ("logits", "evidence", "map", "responses"), {})
    found, logits = run(exported.path, images), model(images).detach()
    torch.testing.assert_close(found["logits"], logits)
    torch.testing.assert_close(found["responses"], explain.filter_maps(model, images, upsample=False))
    owned = timm_csg.metrics.owned_filters(model.mechanism.class_filter_matrix())
    torch.testing.assert_close(found["evidence"], (contributions(model, images) * owned).sum(dim=2))
    for image, label in enumerate(logits.argmax(dim=1).tolist()):
        gradient = (model.fc.weight[label].detach() / 4)[:, None, None].expand(-1, 2, 2)
        expected = reference.owner_map(found["responses"][image].tolist(), gradient.tolist(), owned[label].tolist())
        expected = torch.tensor(reference.upsampled(expected, 64, 64))
        torch.testing.assert_close(found["map"][image], expected, rtol=1e-4, atol=1e-6)


@pytest.fixture(scope="module")
def exported(make_model, gated, tmp_path_factory):
    """A model with assigned filters, exported while it trained; what it was before; its file, with maps of the grid."""
    model = with_owners(make_model(), "assigned", gated)
    model.project_()
    before = {name: value.clone() for name, value in model.train().state_dict().items()}
    path = tmp_path_factory.mktemp("exported") / "model.onnx"
    timm_csg.export_onnx(model, path, upsample=False, class_names=NAMES, preprocessing=PREPROCESSING)
    return model, before, path


@pytest.mark.parametrize("target", [[2], [4, 0, 2]], ids=["one class", "a class for each image"])
def test_map_of_a_chosen_class_sums_to_its_evidence_and_with_bias_to_its_logit(exported, images, target):
    model, found = copy.deepcopy(exported[0]).eval(), run(exported[2], images, target)
    labels = torch.tensor(target).expand(3)[:, None]
    assert found["map"].shape == (3, 2, 2)
    torch.testing.assert_close(found["map"].sum(dim=(1, 2)), found["evidence"].gather(1, labels)[:, 0])
    torch.testing.assert_close(found["evidence"] + model.fc.bias.detach(), found["logits"])
    torch.testing.assert_close(found["map"], explain.owner_map(model, images, labels[:, 0], upsample=False))


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("test_resnet", {}),
        ("test_vit", {"global_pool": "avg", "fc_norm": False, "reg_tokens": 3}),
        pytest.param("test_vit", {"global_pool": "avg", "fc_norm": False}, marks=pytest.mark.slow),
        pytest.param("test_efficientnet", {}, marks=pytest.mark.slow),
    ],
)
def test_batches_of_any_size_and_layout(make_model, gated, name, options, tmp_path):
    model = with_owners(make_model(name, **options), "assigned", gated)
    path = timm_csg.export_onnx(model, tmp_path / "model.onnx", preprocessing=SIZE).path
    for batch in (1, 5):
        images = torch.rand(batch, 3, 64, 64, generator=torch.Generator().manual_seed(batch))
        found = run(path, images)
        torch.testing.assert_close(found["logits"], model(images).detach(), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(found["map"], explain.owner_map(model, images), rtol=1e-4, atol=1e-5)


def test_program_agrees_with_the_file(exported, images, tmp_path):
    program = timm_csg.export_program(copy.deepcopy(exported[0]), upsample=False, preprocessing=SIZE)
    torch.export.save(program, tmp_path / "model.pt2")
    found = torch.export.load(tmp_path / "model.pt2").module()(images, torch.tensor([1]))
    expected = run(exported[2], images, [1])
    assert list(found) == list(expected)
    for name, value in found.items():
        torch.testing.assert_close(value.detach(), expected[name], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "options", "missing", "reason"),
    [
        ("test_convnext", {}, ["evidence", "map"], "more than pooling and a linear layer ('normed')"),
        ("test_vit", {"global_pool": "token"}, ["map"], "reads only a class token"),
        ("test_resnet", {"global_pool": "max"}, ["map"], "does not pool with fixed weights"),
    ],
)
def test_what_a_head_does_not_allow_is_left_out_and_said(
    make_model, images, gated, name, options, missing, reason, tmp_path, caplog
):
    model = with_owners(make_model(name, **options), "assigned", gated)
    exported = timm_csg.export_onnx(model, tmp_path / "model.onnx", preprocessing=SIZE)
    assert list(exported.missing) == missing
    told = metadata(exported.path)
    for output in missing:
        assert reason in exported.missing[output]
        assert f"exported without {output}: " in caplog.text
        assert told[output].startswith("missing: ")
    found = run(exported.path, images)
    assert set(found) == {"logits", "evidence", "map", "responses"} - set(missing)
    torch.testing.assert_close(found["logits"], model(images).detach(), rtol=1e-4, atol=1e-5)
    if "evidence" in found:
        owned = model.mechanism.owned
        torch.testing.assert_close(found["evidence"], (contributions(model, images) * owned).sum(dim=2))


def test_part_filters_without_categories_have_no_evidence(tiny_model, tmp_path):
    model = timm_csg.differentiate(tiny_model, mechanism="icnn")
    exported = timm_csg.export_onnx(model, tmp_path / "model.onnx", preprocessing=SIZE)
    assert "only after a training step" in exported.missing["evidence"]


def test_metadata_says_how_to_prepare_images_and_name_classes(exported):
    model, _, path = exported
    told = metadata(path)
    found = told["timm_csg"], told["architecture"], told["mechanism"]
    assert found == (timm_csg.__version__, "test_resnet", "assigned")
    assert json.loads(told["class_names"]) == NAMES
    expected = timm.data.resolve_data_config({}, pretrained_cfg=model.pretrained_cfg) | PREPROCESSING
    assert json.loads(told["preprocessing"]) == json.loads(json.dumps(expected))


def test_plain_classifier_on_request(tiny_model, images, gated, tmp_path):
    model = with_owners(tiny_model, "assigned", gated)
    path = timm_csg.export_onnx(model, tmp_path / "model.onnx", outputs=["logits"], preprocessing=SIZE).path
    assert list(run(path, images)) == ["logits"]


def test_model_is_left_as_found(exported, images):
    model, before, path = exported
    assert all(module.training for module in model.modules())
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    torch.testing.assert_close(run(path, images)["logits"], copy.deepcopy(model).eval()(images).detach())


def test_half_precision_and_wrapped_models(tiny_model, images, gated, tmp_path):
    model = with_owners(tiny_model, "assigned", gated).half()
    found = run(timm_csg.export_onnx(torch.compile(model), tmp_path / "m.onnx", preprocessing=SIZE).path, images.half())
    torch.testing.assert_close(found["logits"], model.eval()(images.half()).detach(), rtol=1e-2, atol=1e-2)


def test_what_cannot_be_exported_is_refused_with_the_remedy(tiny_model, tmp_path, monkeypatch):
    with pytest.raises(TypeError, match=r"ResNet is plain.*differentiate\(\) and train it"):
        timm_csg.export_onnx(tiny_model, tmp_path / "model.onnx")
    model = timm_csg.differentiate(tiny_model)
    for outputs in ("logits", ["logits", "heat"], []):
        with pytest.raises(ValueError, match="outputs must be some of logits, evidence, map, responses"):
            timm_csg.export_onnx(model, tmp_path / "model.onnx", outputs=outputs)
    with pytest.raises(ValueError, match="one name for each of the 5 classes"):
        timm_csg.export_onnx(model, tmp_path / "model.onnx", class_names=["cat"])
    monkeypatch.setattr("timm_csg.export._MOST_BYTES", 1000)
    with pytest.raises(ValueError, match=r"at most 2 GB; export it in half precision"):
        timm_csg.export_onnx(model, tmp_path / "model.onnx")
    monkeypatch.setattr("timm_csg.export.importlib.util.find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"pip install 'timm_csg\[export\]'"):
        timm_csg.export_onnx(model, tmp_path / "model.onnx")
    assert list(tmp_path.iterdir()) == []


def test_operation_that_the_exporter_does_not_know_is_one_sentence(tiny_model, tmp_path, monkeypatch):
    def fail(*args, **options):
        raise torch.onnx.OnnxExporterError("no such operation")

    monkeypatch.setattr(torch.onnx, "export", fail)
    with pytest.raises(ValueError, match=r"cannot convert; export_program may still work.*no such operation"):
        timm_csg.export_onnx(timm_csg.differentiate(tiny_model), tmp_path / "model.onnx", preprocessing=SIZE)


def test_fused_attention_is_as_before_afterwards(make_model, tmp_path):
    model = timm_csg.differentiate(make_model("test_vit"))
    fused = [module.fused_attn for module in model.modules() if hasattr(module, "fused_attn")]
    timm_csg.export_onnx(model, tmp_path / "model.onnx", preprocessing=SIZE)
    assert [module.fused_attn for module in model.modules() if hasattr(module, "fused_attn")] == fused
    assert any(fused)


def test_nothing_to_export_is_an_error(make_model, tmp_path):
    model = timm_csg.differentiate(make_model("test_convnext"))
    with pytest.raises(ValueError, match="nothing to export: the head of ConvNeXt"):
        timm_csg.export_onnx(model, tmp_path / "model.onnx", outputs=["map"])


@pytest.fixture
def checkpoint(tiny_model, gated, tmp_path):
    model = with_owners(tiny_model, "assigned", gated)
    preprocessing = {"input_size": (3, 64, 64), "crop_pct": 0.875, "interpolation": "bicubic"}
    names = ["cat", "dog", "owl", "fox", "ox"]
    return timm_csg.save_pretrained(model, tmp_path / "model", class_names=names, preprocessing=preprocessing)


def test_command_writes_the_file_and_says_what_it_holds(checkpoint, images, tmp_path, capsys):
    path = tmp_path / "served.onnx"
    assert main(["export", str(checkpoint), "--output", str(path), "--grid", "--outputs", "logits,map"]) == 0
    assert ": logits, map" in capsys.readouterr().out
    found = run(path, images)
    assert [list(value.shape) for value in found.values()] == [[3, 5], [3, 2, 2]]
    assert json.loads(metadata(path)["class_names"]) == ["cat", "dog", "owl", "fox", "ox"]
    assert json.loads(metadata(path)["preprocessing"])["crop_pct"] == 0.875
    assert main(["export", str(checkpoint), "--output", str(path), "--img-size", "96"]) == 0
    assert run(path, torch.zeros(2, 3, 96, 96))["map"].shape == (2, 96, 96)


BLOCKED = """
import runpy, sys
for name in ("torch", "timm", "timm_csg", "torchvision"):
    sys.modules[name] = None  # importing it is an ImportError
sys.argv = sys.argv[1:]
found = runpy.run_path(sys.argv[0], run_name="__main__")
import numpy
numpy.savez("served.npz", **{name: found[name] for name in ("images", "logits", "evidence", "heat")})
"""


def test_serving_example_gives_the_numbers_of_torch_without_it(checkpoint, tmp_path):
    timm_csg.cli.main(["export", str(checkpoint), "--output", str(tmp_path / "model.onnx"), "--quiet"])
    for size in ((100, 81), (63, 127), (50, 50)):
        check_served(checkpoint, size, tmp_path)


def check_served(checkpoint, size, folder):
    pixels = torch.randint(0, 256, (*size[::-1], 3), generator=torch.Generator().manual_seed(1), dtype=torch.uint8)
    picture = Image.fromarray(pixels.numpy())
    exif = picture.getexif()
    exif[0x0112] = 6  # turned by a quarter
    picture.save(folder / "photo.png", exif=exif)
    script = [sys.executable, "-c", BLOCKED, str(ROOT / "examples/serve_onnx.py"), "model.onnx", "photo.png", "owl"]
    result = subprocess.run(script, cwd=folder, capture_output=True, text=True)
    assert (result.returncode, result.stderr) == (0, "")
    served = {name: torch.from_numpy(value) for name, value in np.load(folder / "served.npz").items()}
    model = timm_csg.from_pretrained(checkpoint)
    config = timm.data.resolve_data_config({}, pretrained_cfg=model.pretrained_cfg)
    image = create_transform(**config)(picture.transpose(Image.Transpose.ROTATE_270))[None]
    assert torch.equal(served["images"], image)
    logits = model(image).detach()
    torch.testing.assert_close(served["logits"], logits)
    torch.testing.assert_close(served["heat"], explain.owner_map(model, image, 2))
    names = ["cat", "dog", "owl", "fox", "ox"]
    assert result.stdout.startswith(f"{names[int(logits.argmax())]} evidence")


def test_serving_example_has_at_most_25_lines():
    assert len((ROOT / "examples/serve_onnx.py").read_text().splitlines()) <= 25
