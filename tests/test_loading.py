"""Checkpoints of hosts load into a model: Lightning, transformers' Trainer, averaged ones."""

import argparse
import dataclasses
import enum
import json
from pathlib import Path

import numpy as np
import pytest
import timm
import torch

import timm_csg
from timm_csg import CheckpointError, load_checkpoint


@pytest.fixture
def model(tiny_model, gated):
    return gated(timm_csg.differentiate(tiny_model, mechanism="csg")).eval()


@pytest.fixture
def other(make_model, gated):
    return gated(timm_csg.differentiate(make_model(seed=9), mechanism="csg"), seed=9).eval()


def assert_same_state(found, expected):
    expected = expected.state_dict()
    assert all(torch.equal(value, expected[key]) for key, value in found.state_dict().items())


def under(prefix, state):
    return {prefix + key: value for key, value in state.items()}


class Colour(enum.Enum):
    RED = 1


@dataclasses.dataclass
class Options:
    rate: float
    where: Path


HYPER_PARAMETERS = {
    "path": Path("/data"),
    "object": Options(0.1, Path("x")),
    "namespace": argparse.Namespace(lr=0.1),
    "enum": Colour.RED,
    "numpy": {"scalar": np.float64(0.5), "array": np.arange(3)},
    "function": json.dumps,
    "nested": [{"dtype": torch.float32, "device": torch.device("cpu"), "slice": slice(3)}, {1, 2}],
}


@pytest.mark.parametrize("name", HYPER_PARAMETERS)
def test_lightning_checkpoint_loads_whatever_its_hyper_parameters_are(model, other, tmp_path, name):
    state = under("model.", model.state_dict()) | {"criterion.weight": torch.ones(5)}
    hyper_parameters = {name: HYPER_PARAMETERS[name]}
    torch.save({"state_dict": state, "hyper_parameters": hyper_parameters, "epoch": 3}, tmp_path / "last.ckpt")
    assert_same_state(load_checkpoint(other, tmp_path / "last.ckpt"), model)


def test_lightning_checkpoint_of_a_plain_model_keeps_the_gate(model, make_model, tmp_path):
    plain, gate = make_model(seed=4), model.mechanism.gate.detach().clone()
    torch.save({"state_dict": under("net.", plain.state_dict())}, tmp_path / "last.ckpt")
    load_checkpoint(model, tmp_path / "last.ckpt")
    assert torch.equal(model.mechanism.gate, gate)
    assert torch.equal(model.fc.weight, plain.fc.weight)


def test_one_of_several_models_in_a_file_is_chosen_by_its_prefix(model, other, make_model, gated, tmp_path):
    state = under("model.", model.state_dict()) | under("ema.module.", other.state_dict())
    torch.save({"state_dict": state}, tmp_path / "last.ckpt")
    fresh = gated(timm_csg.differentiate(make_model(seed=3), mechanism="csg"), seed=3)
    before = {key: value.clone() for key, value in fresh.state_dict().items()}
    with pytest.raises(CheckpointError, match=r"several models.*'ema.module.' and 'model.'.*prefix='ema.module.'"):
        load_checkpoint(fresh, tmp_path / "last.ckpt")
    with pytest.raises(CheckpointError, match=r"no key in .* begins with 'net.'; its keys begin with ema., model."):
        load_checkpoint(fresh, tmp_path / "last.ckpt", prefix="net.")
    assert all(torch.equal(value, before[key]) for key, value in fresh.state_dict().items())
    assert_same_state(load_checkpoint(fresh, tmp_path / "last.ckpt", prefix="ema.module."), other)


class Options2(dict):
    """A dictionary of another package: its entries cannot be left out by torch's reader."""


def test_file_that_cannot_be_read_safely_names_the_call_that_reads_it(model, tmp_path):
    torch.save({"state_dict": model.state_dict(), "hyper_parameters": Options2(a=1)}, tmp_path / "last.ckpt")
    with pytest.raises(CheckpointError, match=r"Options2.*If you trust the file.*weights_only=False"):
        load_checkpoint(model, tmp_path / "last.ckpt")


def test_real_lightning_checkpoint_loads(model, other, images, targets, tmp_path):
    lightning = pytest.importorskip("lightning", reason="needs the extra 'lightning'")

    class Module(lightning.LightningModule):
        def __init__(self, net, where):
            super().__init__()
            self.save_hyperparameters(ignore=["net"])
            self.net = net

        def training_step(self, batch, index):
            return self.net(batch[0]).mean()

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.0)

    trainer = lightning.Trainer(
        max_steps=1, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False,
    )  # fmt: skip
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(images, targets), batch_size=3)
    trainer.fit(Module(model, Path("/data")), loader)
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    assert_same_state(load_checkpoint(other, tmp_path / "last.ckpt"), model)


def test_folder_of_the_trainer_names_the_call_and_the_call_loads_it(model, other, tmp_path):
    transformers = pytest.importorskip("transformers", reason="needs the extra 'transformers'")
    config = transformers.TimmWrapperConfig(architecture="test_resnet", num_labels=5)
    wrapper = transformers.TimmWrapperForImageClassification(config)
    wrapper.timm_model = model
    folder = tmp_path / "checkpoint-6"
    wrapper.save_pretrained(folder)
    with pytest.raises(CheckpointError, match=r"written by transformers.*timm_csg\.load_checkpoint\(model, '.*-6'\)"):
        timm_csg.from_pretrained(folder)
    assert_same_state(load_checkpoint(other, folder), model)
    plain = timm.create_model("test_resnet", num_classes=5)
    with pytest.raises(CheckpointError, match="it holds a mechanism: differentiate"):
        load_checkpoint(plain, folder)


@pytest.mark.parametrize("files", [["pytorch_model.bin"], ["model.safetensors.index.json"], []], ids=str)
def test_other_files_of_the_trainer_load_or_are_named(model, other, tmp_path, files):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "timm_wrapper"}))
    for name in files:
        torch.save(under("timm_model.", model.state_dict()), tmp_path / name)
    if files == ["pytorch_model.bin"]:
        assert_same_state(load_checkpoint(other, tmp_path), model)
        return
    why = "several files; .*max_shard_size='1TB'" if files else r"has no model\.safetensors\.$"
    with pytest.raises(CheckpointError, match=why):
        load_checkpoint(other, tmp_path)


@pytest.mark.parametrize("entry", ["state_dict", "model", "model_state_dict", "module", "net"])
def test_weights_are_found_in_the_entries_of_common_loops(model, other, tmp_path, entry):
    torch.save({"epoch": 3, entry: model.state_dict()}, tmp_path / "last.pt")
    assert_same_state(load_checkpoint(other, tmp_path / "last.pt"), model)


def test_other_entries_are_named_with_what_to_save(model, tmp_path):
    torch.save({"epoch": 3, "generator": model.state_dict()}, tmp_path / "last.pt")
    with pytest.raises(CheckpointError, match=r"dict with the entries epoch, generator, not a .*torch\.save"):
        load_checkpoint(model, tmp_path / "last.pt")
    torch.save(model, tmp_path / "whole.pt")
    with pytest.raises(CheckpointError, match=r"not a state dict of tensors; save the one of the model"):
        load_checkpoint(model, tmp_path / "whole.pt")


def test_averaged_checkpoint_of_timm_loads(model, other, tmp_path):
    average = {key: value.to(torch.float32) for key, value in model.state_dict().items()}
    torch.save(average, tmp_path / "averaged.pth")
    assert_same_state(load_checkpoint(other, tmp_path / "averaged.pth"), model)
    counters = [value for key, value in other.state_dict().items() if key.endswith("num_batches_tracked")]
    assert {value.dtype for value in counters} == {torch.int64}


def test_checkpoint_of_frozen_batch_norms_loads(model, other, tmp_path):
    timm.utils.freeze(model, ["layer1"])
    torch.save(model.state_dict(), tmp_path / "frozen.pth")
    load_checkpoint(other, tmp_path / "frozen.pth")
    assert torch.equal(other.layer1[0].bn1.running_mean, model.layer1[0].bn1.running_mean)


def test_names_of_timm_models_are_no_checkpoints():
    for name in ("resnet18", "resnet18.a1_in1k"):
        with pytest.raises(timm_csg.CheckpointError, match=rf"timm.create_model\('{name}', pretrained=True\)"):
            timm_csg.from_pretrained(name)


def test_run_folder_is_answered_with_the_model_in_it(tmp_path, tiny_model):
    timm_csg.save_pretrained(timm_csg.differentiate(tiny_model), tmp_path / "run" / "model")
    with pytest.raises(timm_csg.CheckpointError, match=r"is the folder of a run; its model is in .*run/model"):
        timm_csg.from_pretrained(tmp_path / "run")
