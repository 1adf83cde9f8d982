"""The Lightning mixin against the real package; that its trainings are those of the plain loop is in test_hosts.py."""

import copy
import itertools

import pytest
import torch
import torch.nn.functional as F

import timm_csg
from timm_csg import Alternating, Joint
from timm_csg.integrations.lightning import LightningTrainingMixin

L = pytest.importorskip("lightning", reason="needs the extra 'lightning'")
pytestmark = pytest.mark.filterwarnings("ignore")


class Module(LightningTrainingMixin, L.LightningModule):
    schedule = Joint()

    def __init__(self, *models):
        super().__init__()
        self.models = torch.nn.ModuleList(models)

    def training_step(self, batch, batch_idx):
        return self.losses(self.models[0], *batch, F.cross_entropy)

    def configure_optimizers(self):
        return torch.optim.SGD(timm_csg.param_groups(self.models[0], lr=0.05, gate_lr=0.5), lr=0.05, momentum=0.9)


@pytest.fixture
def model(make_model):
    return timm_csg.differentiate(make_model(), mechanism="csg", sparsity_weight=0.05).train()


@pytest.fixture
def loader(images):
    dataset = torch.utils.data.TensorDataset(images.repeat(2, 1, 1, 1), torch.arange(6) % 5)
    return torch.utils.data.DataLoader(dataset, batch_size=3)


@pytest.fixture
def make_trainer(tmp_path):
    def make(**options):
        quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
        return L.Trainer(default_root_dir=tmp_path, accelerator="cpu", devices=1, **quiet, **options)

    return make


def test_hooks_need_no_import_of_lightning():
    assert LightningTrainingMixin.__mro__[1:] == (timm_csg.TrainingMixin, object)


def test_bfloat16_training_keeps_the_gate_in_float32_and_feasible(model, loader, make_trainer):
    make_trainer(max_epochs=2, precision="bf16-mixed", enable_checkpointing=False).fit(Module(model), loader)
    gate = model.mechanism.gate
    assert gate.dtype == torch.float32
    assert gate.amax(dim=0).eq(1).all()
    assert gate.min() < 1


def test_gradient_clipping_of_lightning_does_not_get_in_the_way(model, loader, make_trainer):
    module = Module(model)
    make_trainer(max_epochs=2, gradient_clip_val=0.1, enable_checkpointing=False).fit(module, loader)
    assert module.progress == timm_csg.Progress(epoch=1, step=4)


@pytest.mark.parametrize("count", [0, 2])
def test_module_must_hold_exactly_one_differentiated_model(make_model, loader, make_trainer, count):
    models = [timm_csg.differentiate(make_model(), mechanism="csg").train() for _ in range(count)] or [make_model()]
    with pytest.raises(TypeError, match=f"one differentiated model among the attributes of Module, but found {count}"):
        make_trainer(max_epochs=1, enable_checkpointing=False).fit(Module(*models), loader)


def test_model_in_eval_mode_is_refused_since_its_gate_would_never_be_trained(model, loader, make_trainer):
    with pytest.raises(ValueError, match=r"call model\.train\(\) before training"):
        make_trainer(max_epochs=1, enable_checkpointing=False).fit(Module(model.eval()), loader)


def test_second_fit_starts_counting_anew_and_projects_once(model, loader, make_trainer):
    module = Module(model)
    optimizer = module.configure_optimizers()
    module.configure_optimizers = lambda: optimizer  # the same object twice
    for _ in range(2):
        make_trainer(max_epochs=1, enable_checkpointing=False).fit(module, loader)
        assert module.progress.step == 2


def test_loading_for_inference_does_not_ask_for_the_schedule_but_training_does(model, loader, make_trainer, tmp_path):
    trainer = make_trainer(max_epochs=1, enable_checkpointing=False)
    trainer.fit(Module(model), loader)
    trainer.save_checkpoint(tmp_path / "last.ckpt")

    class Other(Module):
        schedule = Alternating()

        def __init__(self):
            super().__init__(timm_csg.differentiate(timm_csg.undifferentiate(model), mechanism="csg"))

    trained = model.mechanism.gate.detach().clone()
    loaded = Other.load_from_checkpoint(tmp_path / "last.ckpt")
    assert torch.equal(loaded.models[0].mechanism.gate, trained)
    with pytest.raises(ValueError, match="belongs to the schedule"):
        make_trainer(max_epochs=2, enable_checkpointing=False).fit(Other(), loader, ckpt_path=tmp_path / "last.ckpt")


@pytest.mark.slow
def test_distributed_strategy_takes_schedules_that_skip_a_path(make_model, loader, make_trainer):
    trained = []
    for strategy in ("auto", "ddp_find_unused_parameters_true"):
        module = Module(timm_csg.differentiate(make_model(), mechanism="csg").train())
        module.schedule = Alternating(period=2, gated=1, unit="step")
        options = {"strategy": strategy, "use_distributed_sampler": False, "enable_checkpointing": False}
        try:
            make_trainer(max_epochs=2, **options).fit(module, loader)
        finally:
            if torch.distributed.is_initialized():
                torch.distributed.destroy_process_group()
        trained.append(module.models[0].state_dict())
    torch.testing.assert_close(*trained)


def averaging(kind):
    callbacks = L.pytorch.callbacks
    if kind == "swa":
        return callbacks.StochasticWeightAveraging(swa_lrs=0.05, swa_epoch_start=2)
    return callbacks.EMAWeightAveraging(decay=0.5) if kind == "ema" else callbacks.WeightAveraging()


@pytest.mark.parametrize("kind", ["swa", "ema", "average"])
def test_averages_of_lightnings_callbacks_are_projected_in_the_model_and_in_checkpoints(
    model, loader, make_trainer, tmp_path, kind
):
    model.mechanism.config = timm_csg.CSGConfig(sparsity_weight=0.3)
    module = Module(model)
    every_step = L.pytorch.callbacks.ModelCheckpoint(tmp_path, every_n_train_steps=1, save_top_k=-1)
    make_trainer(max_epochs=4, callbacks=[averaging(kind), every_step]).fit(module, loader)
    gate = model.mechanism.gate
    assert gate.min() < 1
    torch.testing.assert_close(gate.amax(dim=0), torch.ones(96), rtol=0, atol=0)
    for path in tmp_path.rglob("*.ckpt"):
        saved = torch.load(path, weights_only=False)["state_dict"]["models.0.mechanism.gate"]
        torch.testing.assert_close(saved.amax(dim=0), torch.ones(96), rtol=0, atol=0)


def test_last_epoch_of_stochastic_weight_averaging_trains_nothing_and_is_let_pass(make_model, loader, make_trainer):
    model = timm_csg.differentiate(make_model(), mechanism="assigned").train()
    swa = L.pytorch.callbacks.StochasticWeightAveraging(swa_lrs=0.05, swa_epoch_start=1)
    make_trainer(max_epochs=3, callbacks=[swa], enable_checkpointing=False).fit(Module(model), loader)
    assert model.mechanism.assigned_from_data
    assert not model.fc.weight[~model.mechanism.assignment].any()


@pytest.mark.parametrize("kind", ["ema", "average"])
def test_averages_made_before_training_get_the_assignment(make_model, loader, make_trainer, kind):
    model = timm_csg.differentiate(make_model(), mechanism="assigned").train()
    expected = timm_csg.assign_filters(copy.deepcopy(model), loader).matrix
    seen = []

    class Seen(Module):
        def on_train_batch_start(self, batch, batch_idx):
            seen.append(copy.deepcopy(self._averages()[0].mechanism))
            return super().on_train_batch_start(batch, batch_idx)

    average = averaging(kind) if kind == "ema" else L.pytorch.callbacks.WeightAveraging()
    make_trainer(max_epochs=2, callbacks=[average], enable_checkpointing=False).fit(Seen(model), loader)
    assert all(torch.equal(mechanism.assignment, expected) for mechanism in seen)
    assert not model.fc.weight[~expected].any()  # the average, put in the place of the weights


class Stream(torch.utils.data.IterableDataset):
    """Pictures without an end, each as (image, class) or as a dictionary."""

    def __init__(self, images, form=lambda image, target: (image, target)):
        self.images, self.form = images, form

    def __iter__(self):
        return (self.form(self.images[index % 3], torch.tensor(index % 5)) for index in itertools.count())


def test_stream_without_an_end_is_read_as_long_as_an_epoch_is(make_model, images, make_trainer):
    model = timm_csg.differentiate(make_model(), mechanism="assigned").train()
    stream = torch.utils.data.DataLoader(Stream(images), batch_size=3)
    make_trainer(max_epochs=1, limit_train_batches=2, enable_checkpointing=False).fit(Module(model), stream)
    assert model.mechanism.assigned_from_data


def test_other_batches_need_a_loader_for_the_assignment(make_model, images, loader, make_trainer):
    class Dictionaries(Module):
        def training_step(self, batch, batch_idx):
            return super().training_step((batch["image"], batch["target"]), batch_idx)

    class WithLoader(Dictionaries):
        def assignment_loader(self):
            return loader

    stream = Stream(images, lambda image, target: {"image": image, "target": target})
    batches = torch.utils.data.DataLoader(stream, batch_size=3)
    options = {"max_epochs": 1, "limit_train_batches": 2, "enable_checkpointing": False}
    model = timm_csg.differentiate(make_model(), mechanism="assigned").train()
    with pytest.raises(TypeError, match=r"found dict; let Dictionaries\.assignment_loader\(\) yield such pairs"):
        make_trainer(**options).fit(Dictionaries(model), batches)
    make_trainer(**options).fit(WithLoader(model), batches)
    assert model.mechanism.assigned_from_data


@pytest.mark.parametrize("kind", ["ema", "average"])
def test_averages_that_are_validated_are_projected(model, loader, make_trainer, kind):
    peaks = []

    class Validated(Module):
        def validation_step(self, batch, batch_idx):
            peaks.append(self.models[0].mechanism.gate.detach().amax(dim=0))

    make_trainer(max_epochs=3, callbacks=[averaging(kind)], enable_checkpointing=False, num_sanity_val_steps=0).fit(
        Validated(model), loader, loader
    )
    assert len(peaks) == 6
    assert all(bool((peak == 1).all()) for peak in peaks)
