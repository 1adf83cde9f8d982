"""Checkpoints: bit-equal round trips in both worlds, all or nothing on disk, one clear error for anything damaged."""

import argparse
import copy
import hashlib
import json
import logging

import pytest
import safetensors.torch
import timm
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from timm.utils import CheckpointSaver

import timm_csg
from timm_csg import CheckpointError, from_pretrained, load_checkpoint, save_pretrained

BOTH = ("standard", "gated")
FILES = ("model.safetensors", "mechanism/timm_csg.safetensors", "config.json")


@pytest.fixture
def model(tiny_model, gated):
    return gated(timm_csg.differentiate(tiny_model, mechanism="csg"))


@pytest.fixture
def saved(model, tmp_path):
    return save_pretrained(model, tmp_path / "out")


@pytest.fixture
def other(make_model, gated):
    """Another model of the same kind, with other weights and another gate."""
    return gated(timm_csg.differentiate(make_model(seed=9), mechanism="csg"), seed=9)


def assert_bit_equal(found, expected, images, targets):
    found, expected = found(images, targets, paths=BOTH), expected(images, targets, paths=BOTH)
    assert torch.equal(found.standard, expected.standard)
    assert torch.equal(found.gated, expected.gated)


def assert_refused(call, model, words):
    """The call raises CheckpointError with these words and leaves the model in memory as it was."""
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(CheckpointError, match=words):
        call()
    after = model.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[key], value) for key, value in before.items())


def contents(directory):
    return {
        path.relative_to(directory).as_posix(): path.read_bytes() for path in directory.rglob("*") if path.is_file()
    }


# Round trips


@pytest.mark.parametrize("options", [{"mechanism": "csg", "sparsity_weight": 0.25}, {"mechanism": "assigned"}])
def test_round_trip_is_bit_equal_on_both_paths(make_model, images, targets, tmp_path, gated, options):
    for name in ("test_resnet", "test_convnext", "test_mambaout"):
        model = timm_csg.differentiate(make_model(name), **options)
        model = gated(model) if options["mechanism"] == "csg" else model
        loaded = from_pretrained(save_pretrained(model, tmp_path / name))
        assert_bit_equal(loaded, model, images, targets)
        assert loaded.mechanism.config == model.mechanism.config
        assert not loaded.training


def test_model_with_its_own_image_size_comes_back(make_model, images, targets, tmp_path, gated):
    model = gated(timm_csg.differentiate(make_model("test_vit"), mechanism="csg"))
    assert_bit_equal(from_pretrained(save_pretrained(model, tmp_path)), model, images, targets)


def test_model_with_constructor_arguments_comes_back(make_model, targets, tmp_path, gated):
    model = gated(timm_csg.differentiate(make_model(in_chans=1, global_pool="max"), mechanism="csg"))
    loaded = from_pretrained(save_pretrained(model, tmp_path))
    assert_bit_equal(loaded, model, torch.rand(3, 1, 64, 64), targets)


def test_reset_class_count_comes_back(make_model, images, targets, tmp_path):
    model = timm_csg.differentiate(make_model(), num_classes=7, mechanism="csg")
    model.reset_classifier(9)
    loaded = from_pretrained(save_pretrained(model, tmp_path))
    assert loaded.num_classes == 9
    assert_bit_equal(loaded, model.eval(), images, targets)


def test_plain_timm_loads_the_folder_with_bit_equal_logits(model, saved, images):
    plain = timm.create_model(f"local-dir:{saved}", pretrained=True).eval()
    assert type(plain) is timm.models.ResNet
    assert plain.num_classes == 5
    assert torch.equal(plain(images), model(images))


def test_weights_file_has_exactly_the_keys_of_plain_timm(make_model, saved):
    with safetensors.safe_open(saved / "model.safetensors", "pt") as weights:
        assert sorted(weights.keys()) == sorted(make_model().state_dict())
        assert weights.metadata() == {"format": "pt"}
    assert list(safetensors.torch.load_file(saved / "mechanism/timm_csg.safetensors")) == ["gate"]


def test_channels_last_model_round_trips(model, tmp_path, images, targets):
    model.to(memory_format=torch.channels_last)
    loaded = from_pretrained(save_pretrained(model, tmp_path))
    assert all(torch.equal(loaded.state_dict()[key], value) for key, value in model.state_dict().items())
    assert not model.conv1[0].weight.is_contiguous()


def test_tied_tensors_round_trip_and_stay_tied_in_memory(model, tmp_path, images, targets):
    model.layer4[0].bn1.weight = model.layer4[0].bn2.weight
    save_pretrained(model, tmp_path)
    assert model.layer4[0].bn1.weight is model.layer4[0].bn2.weight
    assert_bit_equal(from_pretrained(tmp_path), model, images, targets)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_weights_are_written_as_they_are(model, tmp_path, dtype):
    save_pretrained(model.to(dtype), tmp_path)
    weights = safetensors.torch.load_file(tmp_path / "model.safetensors")
    assert weights["fc.weight"].dtype == dtype
    assert torch.equal(weights["fc.weight"], model.fc.weight)


@pytest.mark.parametrize("wrap", [torch.nn.DataParallel, lambda model: torch.compile(model, backend="eager")])
def test_wrapped_model_is_saved_without_its_wrapper(model, tmp_path, images, targets, wrap):
    save_pretrained(wrap(model), tmp_path)
    assert_bit_equal(from_pretrained(f"local-dir:{tmp_path}"), model, images, targets)


def test_saving_leaves_the_model_as_it_was(model, tmp_path, images, targets):
    model.train()
    before = copy.deepcopy(model.state_dict())
    save_pretrained(model, tmp_path)
    assert timm_csg.is_differentiated(model)
    assert model.training
    assert all(torch.equal(model.state_dict()[key], value) for key, value in before.items())


def test_folder_with_odd_characters_in_its_name(model, tmp_path, images, targets):
    folder = tmp_path / "a model, ünïcode & 100%"
    assert_bit_equal(from_pretrained(save_pretrained(model, folder)), model, images, targets)


def test_config_says_what_was_saved(model, tmp_path):
    save_pretrained(model, tmp_path, metrics={"accuracy": 0.5}, base_model="timm/x", base_revision="abc")
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["architecture"] == "test_resnet"
    assert config["num_classes"] == 5
    assert "num_classes" not in config.get("model_args", {})
    own = config["timm_csg"]
    assert own["format"] == 1
    assert own["mechanism"] == "csg"
    assert own["config"] == model.mechanism.config.to_dict()
    assert own["acts_without_targets"] is False
    assert (own["base_model"], own["base_revision"]) == ("timm/x", "abc")
    assert own["versions"]["timm"] == timm.__version__
    assert json.loads((tmp_path / "metrics.json").read_text()) == {"accuracy": 0.5}


def test_plain_model_is_refused_with_the_remedy(make_model, tmp_path):
    with pytest.raises(TypeError, match=r"found ResNet.*save_for_hf"):
        save_pretrained(make_model(), tmp_path)


# Atomic


@pytest.mark.parametrize("failing", ["model.safetensors", "timm_csg.safetensors", "config.json", "metrics.json"])
def test_failure_in_the_middle_leaves_the_old_files_whole(model, other, saved, images, targets, monkeypatch, failing):
    save_pretrained(model, saved, metrics={"run": 1})
    before = contents(saved)
    if failing.endswith("safetensors"):
        save_file = safetensors.torch.save_file

        def broken(tensors, path, **kwargs):
            save_file(tensors, path, **kwargs)
            if failing in path.name:
                raise OSError("no space left on device")

        monkeypatch.setattr(safetensors.torch, "save_file", broken)
    else:
        to_json = timm_csg.checkpoint._to_json

        def broken(values):
            if ("timm_csg" in values) is (failing == "config.json"):
                raise OSError("no space left on device")
            return to_json(values)

        monkeypatch.setattr(timm_csg.checkpoint, "_to_json", broken)
    with pytest.raises(OSError, match="no space left"):
        save_pretrained(other, saved, metrics={"run": 2})
    assert contents(saved) == before
    assert timm_csg.is_differentiated(other)
    assert_bit_equal(from_pretrained(saved), model, images, targets)


def test_failure_between_two_renames_is_noticed_on_loading(model, other, saved, monkeypatch):
    replace = type(saved).replace

    def broken(self, target):
        if target.name == "timm_csg.safetensors":
            raise OSError("disk on fire")
        return replace(self, target)

    monkeypatch.setattr(type(saved), "replace", broken)
    with pytest.raises(OSError, match="on fire"):
        save_pretrained(other, saved)
    monkeypatch.undo()
    assert sorted(contents(saved)) == sorted([*FILES, "README.md"])
    assert_refused(lambda: load_checkpoint(model, saved), model, "checksum differs")


@pytest.mark.parametrize("metrics", [{"loss": float("nan")}, {"tensor": torch.ones(1)}])
def test_metrics_that_are_not_json_are_refused_before_anything_is_written(model, saved, metrics):
    before = contents(saved)
    with pytest.raises(ValueError, match="values that JSON can hold"):
        save_pretrained(model, saved, metrics=metrics)
    assert contents(saved) == before


def test_other_files_in_the_folder_are_left_alone(model, saved):
    (saved / "README.md").write_text("mine")
    save_pretrained(model, saved)
    assert (saved / "README.md").read_text() == "mine"
    assert sorted(contents(saved)) == sorted([*FILES, "README.md"])


# Into a model that exists


def test_folder_loads_into_a_differentiated_model(model, other, saved, images, targets):
    assert load_checkpoint(other, saved) is other
    assert_bit_equal(other, model, images, targets)


def test_folder_loads_into_a_plain_model_without_the_mechanism(model, saved, make_model, images):
    plain = load_checkpoint(make_model(seed=9), saved)
    assert torch.equal(plain(images), model(images))
    assert type(plain) is timm.models.ResNet


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_plain_timm_checkpoint_keeps_the_gate(make_model, other, images, tmp_path, suffix, caplog):
    plain, gate = make_model(), other.mechanism.gate.clone()
    path = tmp_path / f"plain{suffix}"
    save = safetensors.torch.save_file if suffix == ".safetensors" else torch.save
    save(plain.state_dict(), path)
    with caplog.at_level(logging.INFO, logger="timm_csg"):
        load_checkpoint(other, path)
    assert torch.equal(other(images), plain(images))
    assert torch.equal(other.mechanism.gate, gate)
    assert "mechanism keeps its values" in caplog.text


@pytest.mark.parametrize("args", [None, argparse.Namespace(model="test_resnet", lr=0.1)])
def test_file_of_timms_checkpoint_saver_loads(model, other, images, targets, tmp_path, args):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    saver = CheckpointSaver(model, optimizer, args=args, checkpoint_dir=str(tmp_path), recovery_dir=str(tmp_path))
    saver.save_checkpoint(epoch=0, metric=0.5)
    load_checkpoint(other, tmp_path / "last.pth.tar")
    assert_bit_equal(other, model, images, targets)


def test_names_given_by_data_parallel_and_compile_are_understood(model, other, images, targets, tmp_path):
    for prefix in ("module.", "_orig_mod."):
        state = {prefix + key: value for key, value in model.state_dict().items()}
        torch.save({"state_dict": state}, tmp_path / "wrapped.pth")
        load_checkpoint(other, tmp_path / "wrapped.pth")
        assert_bit_equal(other, model, images, targets)


def test_loading_into_a_wrapped_model_reaches_the_inner_one(model, other, saved, images, targets):
    load_checkpoint(torch.nn.DataParallel(other), saved)
    assert_bit_equal(other, model, images, targets)


# Damage


@pytest.mark.parametrize("name", FILES)
def test_missing_file_is_named(model, saved, name):
    (saved / name).unlink()
    for call in (lambda: load_checkpoint(model, saved), lambda: from_pretrained(saved)):
        assert_refused(call, model, name)


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("keep", [0, 1, 100, -1])
def test_truncated_file_is_named(model, other, saved, name, keep):
    (saved / name).write_bytes((saved / name).read_bytes()[: keep if keep >= 0 else -3])
    for call in (lambda: load_checkpoint(other, saved), lambda: from_pretrained(saved)):
        assert_refused(call, other, f"{name} is damaged")


@pytest.mark.parametrize("name", FILES)
def test_garbage_is_named(other, saved, name):
    (saved / name).write_bytes(b"\x80\x04garbage\xff\xfe" * 50)
    assert_refused(lambda: load_checkpoint(other, saved), other, f"{name} is damaged")


def test_one_flipped_bit_is_noticed(other, saved):
    path = saved / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[-5] ^= 1
    path.write_bytes(data)
    assert_refused(lambda: load_checkpoint(other, saved), other, "model.safetensors is damaged.*checksum")


@pytest.mark.parametrize("suffix", [".safetensors", ".pth", ".pth.tar", ".bin", ""])
@pytest.mark.parametrize(
    "data", [b"", b"\x00", b"PK\x03\x04", b"\x80\x02", b"not a checkpoint", b"(dp0\n.", b"\x80\x05]."]
)
def test_garbage_file_is_one_error(model, tmp_path, suffix, data):
    path = tmp_path / f"weights{suffix}"
    path.write_bytes(data)
    assert_refused(lambda: load_checkpoint(model, path), model, f"weights{suffix}")


@settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.binary(max_size=60), suffix=st.sampled_from([".safetensors", ".pth"]), pickled=st.booleans())
def test_random_bytes_are_one_error(model, tmp_path, data, suffix, pickled):
    path = tmp_path / f"random{suffix}"
    path.write_bytes(b"\x80\x02" * pickled + data)
    assert_refused(lambda: load_checkpoint(model, path), model, "random")


@settings(deadline=None, max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(position=st.floats(0, 1), length=st.integers(1, 200))
def test_damaged_zip_is_one_error_or_harmless(model, tmp_path, position, length):
    path = tmp_path / "zip.pth"
    torch.save(model.state_dict(), path)
    data = bytearray(path.read_bytes())
    start = int(position * (len(data) - length))
    data[start : start + length] = b"\xa5" * length
    path.write_bytes(data)
    twin = copy.deepcopy(model)
    try:
        load_checkpoint(twin, path)
    except CheckpointError:
        assert all(torch.equal(twin.state_dict()[key], value) for key, value in model.state_dict().items())


def test_missing_path_is_named(model, tmp_path):
    assert_refused(lambda: load_checkpoint(model, tmp_path / "no.pth"), model, "no.pth does not exist")
    assert_refused(lambda: load_checkpoint(model, tmp_path / "no.safetensors"), model, "no.safetensors")
    assert_refused(lambda: from_pretrained(tmp_path / "nowhere"), model, "no checkpoint at .*nowhere")


class Evil:
    """What pickle would run on loading."""

    def __reduce__(self):
        return (exec, ("raise SystemExit('code of a checkpoint was run')",))


def test_code_in_a_pickle_is_never_run(model, tmp_path):
    torch.save({"state_dict": Evil()}, tmp_path / "evil.pth")
    assert_refused(lambda: load_checkpoint(model, tmp_path / "evil.pth"), model, "evil.pth")


@pytest.mark.parametrize("content", [[1, 2], {"state_dict": [1]}, {"weight": 3}, torch.ones(2), "text", None])
def test_file_of_something_else_is_named(model, tmp_path, content):
    torch.save(content, tmp_path / "other.pth")
    assert_refused(
        lambda: load_checkpoint(model, tmp_path / "other.pth"), model, "other.pth holds a .*not a state dict"
    )


def test_missing_unexpected_and_misshapen_keys_are_named(model, tmp_path):
    state = model.state_dict()
    state["extra"] = state.pop("fc.bias")
    state["fc.weight"] = torch.ones(2, 2)
    torch.save(state, tmp_path / "odd.pth")
    assert_refused(
        lambda: load_checkpoint(model, tmp_path / "odd.pth"),
        model,
        r"missing fc.bias; unexpected extra; fc.weight has shape \[2, 2\] instead of \[5, 96\]",
    )


def test_checkpoint_of_another_architecture_is_refused(make_model, saved, tmp_path):
    model = timm_csg.differentiate(make_model("test_convnext"), mechanism="csg")
    assert_refused(lambda: load_checkpoint(model, saved), model, r"does not fit this \w*ConvNeXt.* and \d+ more")


def test_other_class_count_is_refused(make_model, saved):
    model = timm_csg.differentiate(make_model(), num_classes=4, mechanism="csg")
    assert_refused(lambda: load_checkpoint(model, saved), model, r"fc.weight has shape \[5, 96\] instead of \[4, 96\]")


def test_mechanism_in_a_file_does_not_go_into_a_plain_model(model, make_model, tmp_path):
    torch.save(model.state_dict(), tmp_path / "csg.pth")
    plain = make_model(seed=9)
    assert_refused(lambda: load_checkpoint(plain, tmp_path / "csg.pth"), plain, r"differentiate\(\) the model first")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_gate_that_is_not_finite_is_refused(model, other, tmp_path, value):
    save_pretrained(model, tmp_path)
    with torch.no_grad():
        model.mechanism.gate[0, 0] = value
    with pytest.raises(ValueError, match=r"mechanism.gate is not finite.*save an earlier state"):
        save_pretrained(model, tmp_path / "new")
    assert not (tmp_path / "new").exists()
    file = tmp_path / "mechanism/timm_csg.safetensors"
    safetensors.torch.save_file(model.mechanism.state_dict(), file)
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    edit(tmp_path, lambda config: config["timm_csg"]["sha256"].update({"mechanism/timm_csg.safetensors": digest}))
    assert_refused(lambda: load_checkpoint(other, tmp_path), other, "mechanism.gate is not finite")
    assert_refused(lambda: from_pretrained(tmp_path), other, "mechanism.gate is not finite")


def edit(directory, change):
    config = json.loads((directory / "config.json").read_text())
    change(config)
    (directory / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda config: config["timm_csg"].update(format=2), "format 2, this version reads up to 1; pip install"),
        (lambda config: config["timm_csg"].update(format=2, versions=None), "format 2, this version reads up to 1"),
        (lambda config: config["timm_csg"].pop("format"), "no format number"),
        (lambda config: config["timm_csg"].update(format="1"), "no format number"),
        (lambda config: config.pop("timm_csg"), r"without a mechanism.*timm.create_model.*differentiate\(\)"),
        (lambda config: config.update(timm_csg=[1]), "no format number"),
        (lambda config: config["timm_csg"].update(mechanism="xyz"), "names the mechanism 'xyz'; known here are"),
        (lambda config: config["timm_csg"].update(mechanism=None), "names the mechanism None"),
        (lambda config: config["timm_csg"].pop("config"), "mechanism"),
        (lambda config: config["timm_csg"].update(sha256=[]), "damaged"),
    ],
)
def test_wrong_config_is_explained(other, saved, change, words):
    edit(saved, change)
    for call in (lambda: load_checkpoint(other, saved), lambda: from_pretrained(saved)):
        assert_refused(call, other, words)


@pytest.mark.parametrize(
    "change",
    [
        lambda config: config["timm_csg"]["config"].update(sparsity_norm="other"),
        lambda config: config["timm_csg"]["config"].update(typo=1),
        lambda config: config.pop("architecture"),
        lambda config: config.update(architecture="resnet_of_the_future"),
        lambda config: config.update(num_classes=-1),
        lambda config: config.update(num_classes="many"),
        lambda config: config.update(model_args=[1]),
        lambda config: config.update(pretrained_cfg=7),
    ],
)
def test_config_that_builds_no_model_is_one_error(other, saved, change):
    edit(saved, change)
    assert_refused(lambda: from_pretrained(saved), other, "config.json does not describe a model that can be built")


def test_config_and_weights_of_different_models_are_one_error(other, saved):
    edit(saved, lambda config: config.update(num_classes=4))
    assert_refused(lambda: from_pretrained(saved), other, "does not fit this")


@pytest.mark.parametrize("text", ["[]", "null", "3", '"text"'])
def test_config_that_is_no_dictionary_is_refused(other, saved, text):
    (saved / "config.json").write_text(text)
    assert_refused(lambda: from_pretrained(saved), other, "names no architecture of timm")


def test_files_have_the_permissions_of_any_new_file(tiny_model, tmp_path):
    (tmp_path / "any").touch()
    timm_csg.save_pretrained(timm_csg.differentiate(tiny_model), tmp_path / "out")
    assert {path.stat().st_mode for path in (tmp_path / "out").rglob("*") if path.is_file()} == {
        (tmp_path / "any").stat().st_mode
    }


def test_numbers_of_other_weights_do_not_stay(tiny_model, tmp_path):
    model = timm_csg.differentiate(tiny_model, mechanism="csg")
    timm_csg.save_pretrained(model, tmp_path, metrics={"accuracy": 0.5})
    timm_csg.save_pretrained(model, tmp_path)
    assert not (tmp_path / "metrics.json").exists()
