"""DifferentiationTask: timm's task contract, checkpoints that stay plain timm's, EMA, clipping, DDP."""

import copy
import datetime

import pytest
import timm
import torch
import torch.distributed
import torch.nn.functional as F
from timm.data import Mixup
from timm.loss import SoftTargetCrossEntropy
from timm.optim import create_optimizer_v2
from timm.task import ClassificationTask, load_task_ema_checkpoint, resume_task_checkpoint
from timm.utils import CheckpointSaver, dispatch_clip_grad

import timm_csg
from timm_csg import Alternating, CheckpointError, Joint
from timm_csg.integrations.timm_task import DifferentiationTask, load_task_checkpoint

STEPS = Alternating(period=2, gated=1, unit="step")


@pytest.fixture
def make_task(make_model):
    def make(schedule=None, name="test_resnet", steps_per_epoch=None, **options):
        model = timm_csg.differentiate(make_model(name), **{"mechanism": "csg", **options}).train()
        return DifferentiationTask(model, schedule=schedule, steps_per_epoch=steps_per_epoch, verbose=False)

    return make


def sgd(task, lr=0.05):
    return torch.optim.SGD(timm_csg.param_groups(task.get_trainable_module(), lr=lr), lr=lr, momentum=0.9)


def train(task, optimizer, images, targets, steps=3):
    for step in range(steps):
        result = task(images, targets)
        result["loss"].backward()
        optimizer.step()
        optimizer.zero_grad()
        task.update_ema(step=step + 1)
    return result


def inner(task, ema=False):
    return timm.utils.model.unwrap_model(task.get_eval_model(ema=ema))


@pytest.fixture
def saved(make_task, images, targets, tmp_path):
    """A task after some steps with EMA, and the checkpoint it wrote through timm's saver."""
    task = make_task(Joint(), sparsity_weight=0.02)
    optimizer = sgd(task)
    task.setup_ema(decay=0.7)
    train(task, optimizer, images, targets)
    saver = CheckpointSaver(task.get_trainable_module(), optimizer, checkpoint_dir=str(tmp_path), task=task)
    saver.save_checkpoint(0, metric=1.0)
    return task, tmp_path / "last.pth.tar"


# Losses and steps


def test_task_is_timms_and_returns_the_losses_of_the_mixin(make_task, images, targets):
    task = make_task(Joint())
    result = task(images, targets)
    assert isinstance(task, ClassificationTask)
    assert set(result) == {"loss", "output", "gated_output", "standard", "gated", "sparsity"}
    torch.testing.assert_close(result["standard"], F.cross_entropy(result["output"], targets).detach())


def test_criterion_kwargs_are_timms(make_model, images, targets):
    model = timm_csg.differentiate(make_model(), mechanism="csg").train()
    task = DifferentiationTask(model, schedule=Alternating(gated=0), criterion_kwargs={"smoothing": 0.1}, verbose=False)
    result = task(images, targets)
    expected = F.cross_entropy(result["output"], targets, label_smoothing=0.1)
    torch.testing.assert_close(result["loss"], expected)


def test_class_can_carry_the_schedule(make_model):
    class Task(DifferentiationTask):
        schedule = Joint()

    assert Task(timm_csg.differentiate(make_model(), mechanism="csg"), verbose=False).path == "both"


def test_plain_wrapped_and_compiled_models_are_refused_with_the_remedy(make_model):
    for model in (make_model(), torch.compile(timm_csg.differentiate(make_model(), mechanism="csg"), backend="eager")):
        with pytest.raises(TypeError, match=r"call differentiate\(\) first"):
            DifferentiationTask(model)


@pytest.mark.parametrize("steps", [0, -1, 2.5])
def test_steps_per_epoch_must_be_a_positive_number(make_task, steps):
    with pytest.raises(ValueError, match="steps_per_epoch must be a whole number, 1 or more"):
        make_task(steps_per_epoch=steps)


def test_epochs_follow_from_the_steps_that_train_py_counts(make_task, images, targets):
    task, seen = make_task(Alternating(period=2, gated=1), steps_per_epoch=2), []
    optimizer = sgd(task)
    for step in range(1, 7):
        seen.append("gated" if "gated" in task(images, targets) else "standard")
        optimizer.step()
        task.update_ema(step=step)
    assert seen == ["standard", "standard", "gated", "gated", "standard", "standard"]
    assert task.progress == timm_csg.Progress(epoch=3, step=6)


@pytest.mark.parametrize("schedule", [Alternating(), Joint(warmup=1)])
def test_schedule_by_epoch_without_epochs_is_an_error_not_an_eternal_first_epoch(make_task, schedule):
    with pytest.raises(ValueError, match=r"goes by epochs, .* pass steps_per_epoch"):
        make_task(schedule).update_ema()


@pytest.mark.parametrize("schedule", [Joint(), STEPS])
def test_schedules_that_need_no_epoch_ask_for_none(make_task, schedule):
    make_task(schedule).update_ema()


def test_set_epoch_replaces_steps_per_epoch(make_task):
    task = make_task(Alternating(period=2, gated=1))
    task.set_epoch(1)
    task.update_ema()
    assert task.path == "gated"


def test_attached_task_projects_once_and_counts_once(make_task, images, targets):
    task = make_task(Joint())
    optimizer = sgd(task)
    task.attach(optimizer)
    train(task, optimizer, images, targets, steps=2)
    assert task.progress.step == 2
    assert task.get_trainable_module().mechanism.gate.amax(dim=0).eq(1).all()


def test_mixups_soft_targets_train_both_paths(make_task, images):
    task = make_task(Joint())
    task.criterion = SoftTargetCrossEntropy()
    mixed, soft = Mixup(mixup_alpha=0.8, cutmix_alpha=1.0, num_classes=5)(images[:2], torch.tensor([0, 3]))
    task(mixed, soft)["loss"].backward()
    assert task.get_trainable_module().mechanism.gate.grad.abs().sum() > 0


@pytest.mark.slow
@pytest.mark.parametrize("schedule", [Joint(), STEPS])
def test_compiled_task_trains_and_evaluates_like_the_eager_one(make_task, images, targets, schedule):
    tasks = [make_task(schedule) for _ in range(2)]
    tasks[1].compile(backend="eager")
    optimizers = [torch.optim.SGD(inner(task).parameters(), lr=0.05) for task in tasks]
    losses = [train(*pair, images, targets)["loss"] for pair in zip(tasks, optimizers, strict=True)]
    torch.testing.assert_close(*losses, rtol=1e-4, atol=1e-5)
    eager, compiled = (task.get_eval_model().eval() for task in tasks)
    torch.testing.assert_close(eager(images), compiled(images), rtol=1e-4, atol=1e-5)


# EMA


def test_ema_has_a_gate_of_its_own_that_stays_feasible(make_task, images, targets):
    task = make_task(Joint(), sparsity_weight=0.02)
    task.setup_ema(decay=0.9)
    train(task, sgd(task, lr=0.5), images, targets, steps=4)
    gate, average = (inner(task, ema).mechanism.gate for ema in (False, True))
    assert gate is not average
    assert not torch.equal(gate, average)
    torch.testing.assert_close(average.amax(dim=0), torch.ones(average.shape[1]))
    assert ((average >= 0) & (average <= 1)).all()


def test_ema_averages_projected_gates(make_task, images, targets):
    task = make_task(Joint())
    task.setup_ema(decay=0.75)
    before = inner(task).mechanism.gate.detach().clone()
    optimizer = sgd(task)
    task(images, targets)["loss"].backward()
    optimizer.step()
    task.update_ema()
    average = 0.75 * before + 0.25 * inner(task).mechanism.gate.detach()
    torch.testing.assert_close(inner(task, ema=True).mechanism.gate, average / average.amax(dim=0))


# Clipping


@pytest.mark.parametrize("name", ["test_resnet", "test_convnext", "test_mambaout", "test_vit"])
def test_clipping_without_the_head_spares_classifier_and_gate_only(make_task, name):
    task = make_task(Joint(), name)
    model = task.get_trainable_module()
    clipped = {id(parameter) for parameter in task.get_clip_parameters(exclude_head=True)}
    spared = {name for name, parameter in model.named_parameters() if id(parameter) not in clipped}
    classifier = model.pretrained_cfg["classifier"]
    assert spared == {f"{classifier}.weight", f"{classifier}.bias", "mechanism.gate"}
    assert len(list(task.get_clip_parameters())) == len(clipped) + 3


def test_agc_leaves_the_gates_gradient_alone(make_task, images, targets):
    task = make_task(Joint())
    task(images, targets)["loss"].backward()
    model = task.get_trainable_module()
    before = model.mechanism.gate.grad.clone(), model.conv1[0].weight.grad.clone()
    dispatch_clip_grad(task.get_clip_parameters(exclude_head=True), 1e-4, mode="agc")
    assert torch.equal(model.mechanism.gate.grad, before[0])
    assert model.conv1[0].weight.grad.norm() < before[1].norm()


# Checkpoints


def test_state_dicts_are_plain_timms_and_load_there(saved, images, make_model):
    task, path = saved
    checkpoint = torch.load(path, weights_only=True)
    plain = make_model(seed=1)
    assert list(checkpoint["state_dict"]) == list(plain.state_dict()) == list(checkpoint["state_dict_ema"])
    for key, ema in (("state_dict", False), ("state_dict_ema", True)):
        plain.load_state_dict(checkpoint[key])
        assert torch.equal(plain(images), inner(task, ema).eval()(images))


def test_timms_own_loader_takes_the_checkpoint(saved, images):
    task, path = saved
    plain = timm.create_model("test_resnet", num_classes=5, checkpoint_path=str(path)).eval()  # prefers the EMA
    assert torch.equal(plain(images), inner(task, ema=True)(images))


def test_resume_restores_gates_averages_and_progress(saved, make_task):
    task, path = saved
    fresh = make_task(Joint())
    optimizer = sgd(fresh)
    assert resume_task_checkpoint(fresh, path, optimizer, log_info=False) == 1
    fresh.setup_ema(decay=0.7)
    load_task_ema_checkpoint(fresh, path)
    assert fresh.progress == task.progress
    for ema in (False, True):
        torch.testing.assert_close(inner(fresh, ema).state_dict(), inner(task, ema).state_dict(), rtol=0, atol=0)


def test_checkpoint_without_ema_gives_the_ema_its_weights_and_gate(saved, make_task):
    task, path = saved
    checkpoint = torch.load(path, weights_only=True)
    del checkpoint["state_dict_ema"], checkpoint["task_state_ema"]
    torch.save(checkpoint, path)
    fresh = make_task(Joint())
    fresh.setup_ema()
    load_task_ema_checkpoint(fresh, path)
    assert torch.equal(inner(fresh, ema=True).mechanism.gate, inner(task).mechanism.gate)


def test_plain_timm_checkpoint_leaves_the_mechanism_and_the_progress(make_task, make_model, caplog):
    task, plain = make_task(Joint()), make_model(seed=1)
    with caplog.at_level("INFO"):
        task.load_checkpoint_state(plain.state_dict())
    assert "the checkpoint holds no mechanism" in caplog.text
    assert torch.equal(task.get_trainable_module().fc.weight, plain.fc.weight)
    assert (task.get_trainable_module().mechanism.gate == 0.5).all()


def test_checkpoint_of_timms_own_task_with_a_differentiated_model_loads(make_task, gated):
    source, target = make_task(Joint()), make_task(Joint())
    gated(source.get_trainable_module())
    state = ClassificationTask(source.get_trainable_module(), verbose=False).get_checkpoint_state()
    assert "mechanism.gate" in state["state_dict"]
    target.load_checkpoint_state(**state)
    assert torch.equal(target.get_trainable_module().mechanism.gate, source.get_trainable_module().mechanism.gate)


def test_other_mechanism_and_other_schedule_are_refused(saved, make_task):
    _, path = saved
    with pytest.raises(ValueError, match="belongs to the schedule"):
        resume_task_checkpoint(make_task(STEPS), path, log_info=False)
    task = make_task(Joint())
    with pytest.raises(CheckpointError, match="holds mechanism 'other', but the model has 'csg'"):
        task.load_task_state({"mechanism": "other"})


def test_missing_weights_are_an_error(saved, make_task):
    state = saved[0].get_checkpoint_state()
    del state["state_dict"]["fc.bias"]
    with pytest.raises(RuntimeError, match=r"Missing key.*fc\.bias"):
        make_task(Joint()).load_checkpoint_state(**state)


@pytest.mark.parametrize("ema", [False, True])
def test_finished_checkpoint_becomes_a_shared_one(saved, images, targets, tmp_path, make_model, ema):
    task, path = saved
    model = load_task_checkpoint(make_model(seed=1), path, ema=ema)
    assert model.mechanism.config == task.get_trainable_module().mechanism.config
    timm_csg.save_pretrained(model, tmp_path / "out")
    loaded, trained = timm_csg.from_pretrained(tmp_path / "out"), inner(task, ema).eval()
    assert torch.equal(loaded(images, targets), trained(images, targets))
    assert torch.equal(
        timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True).eval()(images), loaded(images)
    )


def test_checkpoint_in_the_home_folder_is_found(saved, make_model, monkeypatch):
    monkeypatch.setenv("HOME", str(saved[1].parent))
    model = load_task_checkpoint(make_model(seed=1), f"~/{saved[1].name}")
    assert torch.equal(model.fc.weight, inner(saved[0]).fc.weight)


def test_load_checkpoint_takes_the_mechanism_from_the_task_state(saved, make_model):
    task, path = saved
    trained = task.get_trainable_module()
    model = timm_csg.differentiate(make_model(seed=1), mechanism=trained.mechanism.config)
    timm_csg.load_checkpoint(model, path)
    assert torch.equal(model.mechanism.gate, trained.mechanism.gate)
    plain = timm_csg.load_checkpoint(make_model(seed=1), path)
    assert torch.equal(plain.fc.weight, trained.fc.weight)


def test_converting_names_what_is_wrong_with_the_file(saved, make_model, tmp_path):
    _, path = saved
    with pytest.raises(CheckpointError, match="does not exist"):
        load_task_checkpoint(make_model(), tmp_path / "none.pth.tar")
    with pytest.raises(CheckpointError, match=r"does not fit this ResNet[^']*fc\.weight"):
        load_task_checkpoint(make_model(num_classes=7), path)
    checkpoint = torch.load(path, weights_only=True)
    torch.save({"state_dict": checkpoint["state_dict"]}, path)
    with pytest.raises(CheckpointError, match=r"lacks 'task_state'.*load plain timm's with"):
        load_task_checkpoint(make_model(), path)
    with pytest.raises(CheckpointError, match=r"lacks 'state_dict_ema'.*and an EMA"):
        load_task_checkpoint(make_model(), path, ema=True)
    path.write_bytes(b"not a checkpoint")
    with pytest.raises(CheckpointError, match="damaged or not a checkpoint of tensors"):
        load_task_checkpoint(make_model(), path)


# Optimizers


def test_layer_decay_keeps_the_gate_undecayed_at_its_own_rate(make_task, images, targets):
    task = make_task(Joint())
    groups = timm_csg.param_groups(task.get_trainable_module(), lr=0.1, gate_lr=0.3, weight_decay=0.05, layer_decay=0.5)
    optimizer = create_optimizer_v2(groups, opt="adamw", lr=0.1)
    task.attach(optimizer)
    train(task, optimizer, images, targets)
    gate = task.get_trainable_module().mechanism.gate
    (group,) = [group for group in optimizer.param_groups if any(one is gate for one in group["params"])]
    assert (group["lr"], group["weight_decay"]) == (0.3, 0.0)
    assert len({group["lr"] for group in optimizer.param_groups}) > 3


# Many processes


@pytest.fixture
def process_group(tmp_path):
    store = torch.distributed.FileStore(str(tmp_path / "store"), 1)
    torch.distributed.init_process_group(
        "gloo", store=store, rank=0, world_size=1, timeout=datetime.timedelta(seconds=30)
    )
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("schedule", [Joint(), STEPS, Joint(warmup=1, unit="step")])
def test_wrapped_task_trains_on_every_path_and_saves_plain_keys(process_group, make_task, images, targets, schedule):
    task, alone = make_task(schedule), make_task(schedule)
    optimizer = sgd(task)
    task.setup_ema(decay=0.5)
    task.prepare_distributed(device_ids=[torch.device("cpu")])
    train(task, optimizer, images, targets)
    train(alone, sgd(alone), images, targets)
    torch.testing.assert_close(inner(task).state_dict(), inner(alone).state_dict())
    assert not any("mechanism" in key or "module" in key for key in task.get_checkpoint_state()["state_dict"])
    with task.no_sync():
        task(images, targets)["loss"].backward()


def test_only_schedules_that_skip_a_path_look_for_unused_parameters(process_group, make_task):
    for schedule, expected in ((Joint(), False), (Joint(warmup=1), True), (Alternating(), True)):
        task = make_task(schedule).prepare_distributed()
        assert task.trainable_module.find_unused_parameters is expected


def test_task_can_be_copied(make_task, images, targets):
    task = make_task(Joint())
    twin = copy.deepcopy(task)
    train(twin, sgd(twin), images, targets)
    assert (task.progress.step, twin.progress.step) == (0, 3)
