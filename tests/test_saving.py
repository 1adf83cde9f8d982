"""What is saved can be loaded: class names, preprocessing, weights that training tools have taken apart, gates."""

import json
import logging

import huggingface_hub
import pytest
import safetensors.torch
import timm
import torch
import torch.distributed as dist
from timm.data import resolve_model_data_config
from torch.nn.utils import parametrizations, prune, spectral_norm, weight_norm

import timm_csg
from timm_csg import CheckpointError, from_pretrained, labels, save_pretrained
from timm_csg.checkpoint import save_plain
from timm_csg.manifest import Manifest

NAMES = ["ant", "bee", "cat", "dog", "eel"]
PREPROCESSING = {
    "input_size": (3, 24, 32),
    "interpolation": "bilinear",
    "mean": (0.1, 0.2, 0.3),
    "std": (0.5, 0.6, 0.7),
    "crop_pct": 1.0,
    "crop_mode": "border",
}


@pytest.fixture
def model(tiny_model, gated):
    return gated(timm_csg.differentiate(tiny_model, mechanism="csg"))


def plain_timm(folder):
    return timm.create_model(f"local-dir:{folder}", pretrained=True).eval()


# Class names


def test_class_names_come_back_here_in_plain_timm_and_in_the_card(model, tmp_path):
    folder = save_pretrained(model, tmp_path, class_names=NAMES, label_descriptions={"eel": "a long fish"})
    for loaded in (from_pretrained(folder), plain_timm(folder)):
        assert labels.class_names(loaded) == NAMES
        assert loaded.pretrained_cfg["label_descriptions"] == {"eel": "a long fish"}
    assert "with 5 classes (ant, bee, cat, dog, eel)" in (folder / "README.md").read_text()
    config = json.loads((folder / "config.json").read_text())
    assert config["label_names"] == NAMES  # at the root, where timm and transformers look
    assert "label_names" not in config["pretrained_cfg"]


def test_class_names_outlive_a_second_save(model, tmp_path):
    save_pretrained(model, tmp_path / "first", class_names=NAMES, label_descriptions={"eel": "a long fish"})
    save_pretrained(from_pretrained(tmp_path / "first"), tmp_path / "second")
    loaded = from_pretrained(tmp_path / "second")
    assert labels.class_names(loaded) == NAMES
    assert loaded.pretrained_cfg["label_descriptions"] == {"eel": "a long fish"}


def test_class_names_set_by_hand_are_saved(model, tmp_path):
    model.pretrained_cfg["label_names"] = NAMES
    assert labels.class_names(from_pretrained(save_pretrained(model, tmp_path))) == NAMES


def test_names_of_other_classes_are_not_the_models(model, tmp_path):
    model.pretrained_cfg["label_names"] = [str(index) for index in range(1000)]
    assert labels.class_names(model) is None
    assert "label_names" not in json.loads((save_pretrained(model, tmp_path) / "config.json").read_text())


def test_names_by_index_are_read_in_order(tiny_model):
    tiny_model.pretrained_cfg["label_names"] = {str(index): NAMES[index] for index in (4, 2, 0, 1, 3)}
    assert labels.class_names(tiny_model) == NAMES
    tiny_model.pretrained_cfg["label_names"] = {str(index): "name" for index in (1, 2, 3, 4, 5)}
    assert labels.class_names(tiny_model) is None


def test_transformers_reads_the_class_names(model, tmp_path):
    transformers = pytest.importorskip("transformers", reason="needs the extra 'transformers'")
    folder = save_pretrained(model, tmp_path, class_names=NAMES)
    wrapper = transformers.TimmWrapperForImageClassification.from_pretrained(folder)
    assert wrapper.config.id2label == dict(enumerate(NAMES))


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"class_names": NAMES[:4]}, ValueError, "one name for each of the 5 classes, but holds 4"),
        ({"class_names": "abcde"}, TypeError, "a sequence of strings"),
        ({"class_names": range(5)}, TypeError, "a sequence of strings"),
        ({"label_descriptions": {"ant": "small"}}, ValueError, "pass class_names"),
        ({"class_names": NAMES, "label_descriptions": {"elk": "large"}}, ValueError, "describe elk"),
        ({"preprocessing": {"input_sise": (3, 32, 32)}}, ValueError, "no entry input_sise.*resolve_data_config"),
        ({"preprocessing": {"input_size": (1, 32, 32)}}, ValueError, "1 input channels, but the model accepts 3"),
    ],
)
def test_what_does_not_suit_the_model_is_refused_before_anything_is_written(model, tmp_path, options, error, words):
    with pytest.raises(error, match=words):
        save_pretrained(model, tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


# Preprocessing


def test_preprocessing_is_what_the_loaded_model_asks_for(model, tmp_path):
    folder = save_pretrained(model, tmp_path, preprocessing=PREPROCESSING)
    for loaded in (from_pretrained(folder), plain_timm(folder)):
        found = resolve_model_data_config(loaded)
        assert {key: tuple(v) if isinstance(v, list) else v for key, v in found.items()} == PREPROCESSING
    assert "torch.rand(1, 3, 24, 32)" in (folder / "README.md").read_text()


def test_plain_models_keep_names_and_preprocessing_too(tiny_model, tmp_path):
    loaded = plain_timm(save_plain(tiny_model, tmp_path, class_names=NAMES, preprocessing=PREPROCESSING))
    assert labels.class_names(loaded) == NAMES
    assert resolve_model_data_config(loaded)["input_size"][1:] == (24, 32)


def test_size_of_a_model_with_a_fixed_one_is_checked(tmp_path):
    model = timm_csg.differentiate(timm.create_model("vit_tiny_patch16_224", num_classes=2))
    with pytest.raises(ValueError, match="the model requires"):
        save_pretrained(model, tmp_path, preprocessing={"input_size": (3, 32, 32)})


def test_preprocessing_of_other_number_types_is_written(model, tmp_path):
    numpy = pytest.importorskip("numpy")
    values = {
        "mean": numpy.float32([0.5, 0.5, 0.5]),
        "crop_pct": numpy.float32(0.5),
        "input_size": torch.Size([3, 8, 8]),
    }
    found = resolve_model_data_config(from_pretrained(save_pretrained(model, tmp_path, preprocessing=values)))
    assert (list(found["mean"]), found["crop_pct"], list(found["input_size"])) == ([0.5] * 3, 0.5, [3, 8, 8])


# Weights that are not where plain timm has them


def pruned(model):
    prune.l1_unstructured(model.fc, "weight", 0.5)
    prune.random_unstructured(model.fc, "weight", 0.2)
    with torch.no_grad():
        model.fc.weight_orig += 0.1  # fc.weight is stale until the next forward


def with_parametrizations(model):
    parametrizations.weight_norm(model.fc)
    parametrizations.spectral_norm(model.layer1[0].conv1)
    with torch.no_grad():
        model.fc.parametrizations.weight.original0 += 0.1


def with_older_hooks(model):
    weight_norm(model.fc)
    spectral_norm(model.layer1[0].conv1)
    with torch.no_grad():
        model.fc.weight_g += 0.1


TOOLS = {
    "freeze": lambda model: timm.utils.freeze(model, ["layer1"]),
    "prune": pruned,
    "parametrize": with_parametrizations,
    "older hooks": with_older_hooks,
    "compiled part": lambda model: setattr(model, "layer2", torch.compile(model.layer2, backend="eager")),
    "pruned gate": lambda model: prune.l1_unstructured(model.mechanism, "gate", 0),
}


@pytest.mark.parametrize("tool", TOOLS)
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_weights_that_a_tool_has_taken_apart_are_merged(model, images, targets, tmp_path, tool):
    TOOLS[tool](model)
    model.eval()
    state = {key: value.clone() for key, value in model.state_dict().items()}
    folder = save_pretrained(model, tmp_path)
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    loaded, expected = from_pretrained(folder), model(images, targets, paths=("standard", "gated"))
    found = loaded(images, targets, paths=("standard", "gated"))
    torch.testing.assert_close(found.standard, expected.standard)
    torch.testing.assert_close(found.gated, expected.gated)
    assert torch.equal(plain_timm(folder)(images), found.standard)


def test_spectral_norm_takes_no_step_while_saving(model, tmp_path):
    parametrizations.spectral_norm(model.fc)
    model.train()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    save_pretrained(model, tmp_path)
    assert model.fc.parametrizations.weight.training
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def with_another_head(model):
    model.fc = torch.nn.Sequential(torch.nn.Linear(96, 8), torch.nn.Linear(8, 5))
    return model


def with_an_adapter(model):
    model.fc.lora_A = torch.nn.Linear(96, 2, bias=False)
    return model


def quantised(model):
    return torch.ao.quantization.quantize_dynamic(model.eval(), {torch.nn.Linear})


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (quantised, r"fc\._packed_params.* not a plain tensor; it is quantised: save it before quantising"),
        (with_an_adapter, r"unexpected fc\.lora_A\.weight.*merge_and_unload"),
        (with_another_head, r"missing fc\.weight.*unexpected fc\.0\.weight.*torch\.save"),
    ],
)
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_what_could_not_be_loaded_is_refused_with_the_remedy(model, tmp_path, change, words):
    with pytest.raises(ValueError, match=words):
        save_pretrained(change(model), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_reparameterized_model_is_refused_with_the_remedy(tmp_path):
    model = timm_csg.differentiate(timm.create_model("mobileone_s0", num_classes=3)).eval()
    logging.getLogger("timm").setLevel(logging.ERROR)
    with pytest.raises(ValueError, match=r"tensors of mobileone_s0.*save it before what changes its layers"):
        save_pretrained(timm.utils.reparameterize_model(model), tmp_path)
    with pytest.raises(ValueError, match="no longer has the tensors of mobileone_s0"):
        save_plain(timm.utils.reparameterize_model(timm.create_model("mobileone_s0", num_classes=3)), tmp_path)


def test_sharded_model_is_saved_whole(model, images, targets, tmp_path, monkeypatch):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    expected = model(images, targets)
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        fully_shard(model, mesh=init_device_mesh("cpu", (1,)))
        folder = save_pretrained(model, tmp_path / "out")
        monkeypatch.setattr(dist, "get_rank", lambda: 1)
        save_pretrained(model, tmp_path / "second")
    finally:
        dist.destroy_process_group()
    assert torch.equal(from_pretrained(folder)(images, targets), expected)
    assert not (tmp_path / "second").exists()


@pytest.mark.slow
def test_as_many_classes_as_a_face_data_set_has(tmp_path):
    names = [f"person {index}" for index in range(85_742)]
    model = timm_csg.differentiate(timm.create_model("test_resnet", num_classes=len(names)))
    loaded = from_pretrained(save_pretrained(model, tmp_path, class_names=names))
    assert labels.class_names(loaded) == names


def test_other_tools_that_want_one_safetensors_file_find_plain_timms(model, tiny_model, make_model, images, tmp_path):
    folder = save_pretrained(model, tmp_path)
    other = make_model(seed=5)
    found = huggingface_hub.load_torch_model(other, folder, strict=True)
    assert (found.missing_keys, found.unexpected_keys) == ([], [])
    assert torch.equal(other(images), model(images))


# Gates outside their feasible set


def test_gate_that_was_never_projected_is_projected_in_the_file_with_a_warning(model, tmp_path, caplog):
    with torch.no_grad():
        model.mechanism.gate.mul_(0.5).sub_(0.1)
    before = model.mechanism.gate.detach().clone()
    folder = save_pretrained(model, tmp_path)
    assert "outside its feasible set and is projected in the file" in caplog.text
    assert torch.equal(model.mechanism.gate, before)
    model.mechanism.project_()
    saved = safetensors.torch.load_file(folder / "mechanism" / "timm_csg.safetensors")["gate"]
    assert torch.equal(saved, model.mechanism.gate)


@pytest.mark.parametrize("mechanism", ["csg", "icnn", ["icnn", "csg"]])
def test_feasible_and_untrained_mechanisms_are_saved_as_they_are(make_model, tmp_path, caplog, mechanism):
    model = timm_csg.differentiate(make_model(), mechanism=mechanism)
    loaded = from_pretrained(save_pretrained(model, tmp_path / "untrained"))
    assert all(
        torch.equal(a, b) for a, b in zip(loaded.state_dict().values(), model.state_dict().values(), strict=True)
    )
    model.mechanism.project_()
    loaded = from_pretrained(save_pretrained(model, tmp_path / "projected"))
    assert all(
        torch.equal(a, b) for a, b in zip(loaded.state_dict().values(), model.state_dict().values(), strict=True)
    )
    assert "feasible" not in caplog.text


def test_feasibility_is_what_projecting_would_leave_alone(model):
    assert model.mechanism.is_feasible()
    with torch.no_grad():
        model.mechanism.gate[0, 0] = 1.5
    assert not model.mechanism.is_feasible()
    assert float(model.mechanism.gate[0, 0]) == 1.5


# Files that are not folders


def test_file_of_weights_is_called_a_file(model, tmp_path):
    torch.save(model.state_dict(), tmp_path / "last.pth.tar")
    with pytest.raises(CheckpointError, match=r"last.pth.tar is a file of weights.*load_checkpoint\(model, "):
        from_pretrained(str(tmp_path / "last.pth.tar"))


def test_classifier_that_was_never_masked_is_masked_in_the_file(make_model, images, tmp_path, caplog):
    model = timm_csg.differentiate(make_model(), mechanism="assigned").eval()
    own = model.mechanism.assignment
    save_pretrained(model, tmp_path / "blind")
    assert torch.equal(plain_timm(tmp_path / "blind")(images), model(images))
    model.mechanism.assign_(own.clone(), torch.zeros(96), torch.ones(96))
    assert "feasible" not in caplog.text
    save_pretrained(model, tmp_path / "assigned")
    assert "outside its feasible set" in caplog.text
    assert bool((model.fc.weight[~own] != 0).any())
    model.project_()
    assert torch.equal(plain_timm(tmp_path / "assigned")(images), model(images))


@pytest.mark.parametrize(
    "tool", [lambda fc: prune.l1_unstructured(fc, "weight", 0.5), parametrizations.weight_norm], ids=["prune", "norm"]
)
def test_masked_classifier_that_a_tool_has_taken_apart_is_merged(make_model, images, tmp_path, tool):
    model = timm_csg.differentiate(make_model(), mechanism="assigned").eval()
    model.mechanism.assign_(model.mechanism.assignment.clone(), torch.zeros(96), torch.ones(96))
    model.project_()
    tool(model.fc)
    loaded = from_pretrained(save_pretrained(model, tmp_path))
    torch.testing.assert_close(loaded(images), timm_csg.undifferentiate(model).eval()(images))
    assert not bool(loaded.fc.weight[~loaded.mechanism.assignment].any())


def test_tilde_is_the_home_folder(model, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert timm_csg.save_pretrained(model, "~/saved") == tmp_path / "saved"
    assert type(timm_csg.from_pretrained("~/saved")) is type(model)
    assert type(timm_csg.from_pretrained("local-dir:~/saved")) is type(model)
    assert timm_csg.load_checkpoint(model, "~/saved") is model


@pytest.mark.parametrize("name", ["conv1.0.weight", "fc.bias", "mechanism.scale"])
def test_weights_that_are_not_finite_are_refused(make_model, tmp_path, name):
    model = timm_csg.differentiate(make_model(), mechanism="assigned")
    with torch.no_grad():
        model.get_parameter(name).view(-1)[0] = float("nan")
    with pytest.raises(ValueError, match=f"{name} is not finite.* training diverged"):
        timm_csg.save_pretrained(model, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_weights_without_values_and_names_of_files_are_refused(model, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="file is a file, but a checkpoint is a folder"):
        timm_csg.save_pretrained(model, tmp_path / "file")
    with pytest.raises(ValueError, match=r"conv1\.0\.weight has no values yet .*'meta'"):
        timm_csg.save_pretrained(model.to("meta"), tmp_path / "out")


def test_a_card_without_its_layer_does_not_prevent_saving(model, tmp_path, monkeypatch, caplog):
    def fail(model):
        raise RuntimeError("no such operation")

    monkeypatch.setattr("timm_csg.checkpoint.find_stage", fail)
    timm_csg.save_pretrained(model, tmp_path)
    assert "the model card does not describe the layer: no such operation" in caplog.text
    assert "96 filters" in (tmp_path / "README.md").read_text()


def test_a_config_with_long_names_of_many_classes_is_read(model, tmp_path):
    timm_csg.save_pretrained(model, tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["label_names"] = [f"{index:060}" for index in range(86_000)]
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert len(Manifest.read(tmp_path).config["label_names"]) == 86_000
