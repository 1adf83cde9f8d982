"""attach: what would leave the gate out of training without a sound is an error that says what to do."""

import copy
import gc
import io
import logging

import pytest
import torch
import torch.nn.functional as F
from timm.utils import ModelEmaV3
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import timm_csg
from timm_csg import Alternating, Joint, Progress, TrainingMixin, param_groups
from timm_csg.attachment import attachments_of
from timm_csg.mechanisms.base import Mechanism, MechanismConfig

BY_STEP = Alternating(period=2, gated=1, unit="step")


class TwoParameters(Mechanism):
    """A mechanism whose parameters have other names than a gate, one of which is its own and one shared."""

    name = "two"
    config_class = MechanismConfig

    def __init__(self, num_filters, num_classes, config, *, channels_last=False):
        super().__init__(num_filters, num_classes, config, channels_last=channels_last)
        self.scale = nn.Parameter(torch.ones(num_filters))
        self.inner = nn.Linear(2, 2)

    @property
    def needs_targets(self):
        return False

    def forward(self, features, targets=None):
        return features * self.along_filters(self.scale[None], features) if targets is not None else features

    def losses(self, features, targets, head):
        return {"inner": self.inner.weight.square().sum()}

    def loss_weights(self):
        return {"gated": 1.0, "inner": 0.1}


@pytest.fixture
def model(make_model):
    return timm_csg.differentiate(make_model(), mechanism="csg").train()


@pytest.fixture
def two(make_model):
    model = timm_csg.differentiate(make_model(), mechanism="csg").train()
    model.mechanism = TwoParameters(96, 5, MechanismConfig())
    return model


def make_loop(schedule=BY_STEP):
    loop = TrainingMixin()
    loop.schedule = schedule
    return loop


def sgd(parameters, lr=0.05):
    return torch.optim.SGD(parameters, lr=lr)


def step(loop, model, optimizer, images, targets):
    loop.losses(model, images, targets, F.cross_entropy)["loss"].backward()
    optimizer.step()
    optimizer.zero_grad()


# The optimizer


def test_optimizer_from_before_differentiate_is_refused_with_the_remedy(make_model):
    model = make_model().train()
    optimizer = sgd(model.parameters())
    timm_csg.differentiate(model, mechanism="csg")
    with pytest.raises(ValueError, match=r"lacks mechanism\.gate, which .* after differentiate\(\) .*param_groups"):
        make_loop().attach(optimizer, model)


def test_parameters_of_the_default_mechanism_are_named(make_model):
    model = make_model().train()
    optimizer = sgd(model.parameters())
    timm_csg.differentiate(model)
    with pytest.raises(ValueError, match=r"lacks mechanism\.scale, mechanism\.bias, which would never learn"):
        make_loop().attach(optimizer, model)


def test_parameters_of_other_mechanisms_are_named(two):
    optimizer = sgd([*two.fc.parameters(), two.mechanism.scale])
    with pytest.raises(ValueError, match=r"lacks mechanism\.inner\.weight, mechanism\.inner\.bias, which"):
        make_loop().attach(optimizer, two)


def test_classifier_that_was_replaced_after_the_optimizer_is_named(make_model):
    model = make_model().train()
    optimizer = sgd(model.parameters())
    timm_csg.differentiate(model, 7, mechanism="csg")
    optimizer.add_param_group({"params": list(model.mechanism.parameters())})
    with pytest.raises(ValueError, match=r"lacks fc\.weight, fc\.bias, which"):
        make_loop().attach(optimizer, model)


def test_part_of_the_weights_may_be_left_out_of_the_optimizer(model, images, targets):
    loop, optimizer = make_loop(Joint()), sgd([*model.layer4.parameters(), model.mechanism.gate])
    loop.attach(optimizer, model)
    step(loop, model, optimizer, images, targets)
    assert loop.progress.step == 1


def test_optimizers_that_share_the_parameters_are_attached_together_and_count_once(model, images, targets):
    weights = sgd([parameter for name, parameter in model.named_parameters() if not name.startswith("mechanism.")])
    gate = sgd([model.mechanism.gate], lr=0.5)
    loop = make_loop(Joint())
    with pytest.raises(ValueError, match=r"attach\(\[first, second\], model\)"):
        loop.attach(weights, model)
    loop.attach([weights, gate], model)
    for _ in range(3):
        loop.losses(model, images, targets, F.cross_entropy)["loss"].backward()
        for optimizer in (weights, gate):
            optimizer.step()
            assert model.mechanism.gate.amax(dim=0).eq(1).all()
            optimizer.zero_grad()
    assert loop.progress.step == 3
    assert model.mechanism.gate.min() < 1


def test_reset_classifier_makes_the_next_step_an_error(model, images, targets):
    loop, optimizer = make_loop(Joint()), sgd(model.parameters())
    loop.attach(optimizer, model)
    model.reset_classifier(5)
    loop.losses(model, images, targets, F.cross_entropy)["loss"].backward()
    with pytest.raises(ValueError, match=r"was replaced \(reset_classifier.*make a new optimizer"):
        optimizer.step()
    optimizer = sgd(model.parameters())
    loop.attach(optimizer, model)
    step(loop, model, optimizer, images, targets)
    assert loop.progress.step == 1


def test_arguments_in_the_wrong_order_are_named(model):
    with pytest.raises(TypeError, match="an optimizer and the model, in this order, but found ResNet"):
        make_loop().attach(model, sgd(model.parameters()))
    with pytest.raises(TypeError, match="in this order, but found CosineAnnealingLR"):
        make_loop().attach(torch.optim.lr_scheduler.CosineAnnealingLR(sgd(model.parameters()), 3), model)


# Frozen mechanisms


def test_frozen_gate_is_refused_unless_it_is_meant(model, images, targets, caplog):
    model.mechanism.requires_grad_(False)
    optimizer = sgd(param_groups(model, lr=0.05))
    assert "the mechanism is frozen and in no group" in caplog.text
    loop = make_loop(Joint())
    with pytest.raises(ValueError, match=r"mechanism\.gate is frozen .*requires_grad_\(True\).*frozen=True"):
        loop.attach(optimizer, model)
    loop.attach(optimizer, model, frozen=True)
    step(loop, model, optimizer, images, targets)
    assert loop.progress.step == 1


def test_all_frozen_parameters_of_a_mechanism_are_named(make_model):
    assigned = timm_csg.differentiate(make_model())
    assigned.mechanism.requires_grad_(False)
    with pytest.raises(ValueError, match=r"^mechanism\.scale, mechanism\.bias are frozen and would never learn"):
        make_loop(Joint()).attach(sgd(assigned.parameters()), assigned)


def test_mechanism_that_is_frozen_in_part_trains_on(two, images, targets):
    two.mechanism.inner.requires_grad_(False)
    loop, optimizer = make_loop(Joint()), sgd(param_groups(two, lr=0.05))
    loop.attach(optimizer, two)
    step(loop, two, optimizer, images, targets)
    assert loop.progress.step == 1


# Twice


def test_attaching_again_takes_the_place_of_the_first_time(model, images, targets):
    loop, optimizer, paths = make_loop(), sgd(model.parameters()), []
    for _ in range(2):
        loop.attach(optimizer, model)
    for _ in range(4):
        paths.append(loop.path)
        step(loop, model, optimizer, images, targets)
    assert paths == ["standard", "gated", "standard", "gated"]
    assert loop.progress.step == 4


def test_another_loop_takes_the_optimizer_over(model, images, targets):
    old, new, optimizer = make_loop(), make_loop(Joint()), sgd(model.parameters())
    old.attach(optimizer, model)
    new.attach(optimizer, model)
    gate = model.mechanism.gate.clone()
    step(new, model, optimizer, images, targets)  # the old loop, at a standard step, would clear the gate's gradient
    assert (old.progress.step, new.progress.step) == (0, 1)
    assert not torch.equal(model.mechanism.gate, torch.ones_like(gate))


def test_one_optimizer_of_two_models_serves_both(make_model, images, targets):
    models = [timm_csg.differentiate(make_model(), mechanism="csg").train() for _ in range(2)]
    optimizer = sgd([parameter for model in models for parameter in model.parameters()])
    loops = [make_loop(Joint()) for _ in models]
    for loop, model in zip(loops, models, strict=True):
        loop.attach(optimizer, model)
        loop.losses(model, images, targets, F.cross_entropy)["loss"].backward()
    optimizer.step()
    assert [loop.progress.step for loop in loops] == [1, 1]


def test_after_step_by_hand_while_attached_is_refused(model, images, targets):
    loop, optimizer = make_loop(), sgd(model.parameters())
    handle = loop.attach(optimizer, model)
    step(loop, model, optimizer, images, targets)
    with pytest.raises(ValueError, match=r"each step would count twice.*remove\(\)"):
        loop.after_step(model)
    handle.remove()
    loop.after_step(model)
    assert loop.progress.step == 2


def test_optimizer_that_is_gone_is_no_longer_attached(model):
    loop, optimizer = make_loop(), sgd(model.parameters())
    loop.attach(optimizer, model)
    assert len(attachments_of(loop, model)) == 1
    del optimizer
    gc.collect()
    assert attachments_of(loop, model) == []
    loop.after_step(model)


# Wrapped


class Wrapper(torch.optim.Optimizer):
    """As accelerate's: an Optimizer by class, without the state of one."""

    def __init__(self, optimizer):
        self.optimizer = optimizer

    @property
    def param_groups(self):
        return self.optimizer.param_groups

    def step(self, closure=None):
        self.optimizer.step(closure)


def test_wrapped_optimizer_is_looked_through_and_the_wrapper_left_alone(model, images, targets):
    loop, optimizer = make_loop(Joint()), sgd(model.parameters())
    loop.attach(Wrapper(optimizer), model)
    step(loop, model, optimizer, images, targets)
    assert loop.progress.step == 1
    Wrapper(sgd(nn.Linear(2, 2).parameters())).step()  # an attachment that patched the class would break this one


@pytest.mark.parametrize("prepared_first", [True, False])
def test_accelerate_trains_in_either_order(model, images, targets, prepared_first):
    accelerate = pytest.importorskip("accelerate")
    accelerator, loop, optimizer = accelerate.Accelerator(cpu=True), make_loop(Joint()), sgd(model.parameters())
    if not prepared_first:
        loop.attach(optimizer, model)
    prepared, optimizer = accelerator.prepare(model, optimizer)
    if prepared_first:
        loop.attach(optimizer, prepared)
    for _ in range(2):
        accelerator.backward(loop.losses(prepared, images, targets, F.cross_entropy)["loss"])
        optimizer.step()
        optimizer.zero_grad()
    assert loop.progress.step == 2
    assert model.mechanism.gate.amax(dim=0).eq(1).all()
    assert model.mechanism.gate.min() < 1


def test_model_inside_of_another_is_named(model, images, targets):
    host = nn.Module()
    host.timm_model = model
    with pytest.raises(TypeError, match=r"found Module; pass the one in it, \.timm_model"):
        make_loop().losses(host, images, targets, F.cross_entropy)


class Adapted(nn.Module):
    """As peft's: the model inside is reached by a method."""

    def __init__(self, model):
        super().__init__()
        self.base_model = model

    def get_base_model(self):
        return self.base_model

    def forward(self, *args, **kwargs):
        return self.base_model(*args, **kwargs)


def test_model_inside_of_an_adapter_trains(model, images, targets):
    loop, optimizer = make_loop(Joint()), sgd(model.parameters())
    adapted = Adapted(model)
    loop.attach(optimizer, adapted)
    step(loop, adapted, optimizer, images, targets)
    assert loop.progress.step == 1


@pytest.fixture
def group(tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/group", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def test_wrapping_before_differentiating_is_refused(group, make_model, images, targets):
    wrapped = nn.parallel.DistributedDataParallel(make_model().train())
    model = timm_csg.differentiate(wrapped.module, mechanism="csg")
    for call in (
        lambda: make_loop().attach(sgd(model.parameters()), wrapped),
        lambda: make_loop().losses(wrapped, images, targets, F.cross_entropy),
    ):
        with pytest.raises(ValueError, match=r"made before differentiate\(\).*wrap the model afterwards"):
            call()


def test_wrapping_afterwards_trains(group, model, images, targets):
    wrapped = nn.parallel.DistributedDataParallel(model)
    loop, optimizer = make_loop(Joint()), sgd(model.parameters())
    loop.attach(optimizer, wrapped)
    step(loop, wrapped, optimizer, images, targets)
    assert loop.progress.step == 1


# The first epoch


@pytest.mark.parametrize("schedule", [Joint(), Alternating(period=1)])
def test_loss_of_the_standard_path_alone_is_caught_at_the_first_gated_step(model, images, targets, schedule):
    loop, optimizer = make_loop(schedule), sgd(model.parameters())
    loop.attach(optimizer, model)
    F.cross_entropy(model(images), targets).backward()
    with pytest.raises(ValueError, match=r"no gradient reached mechanism\.gate; back-propagate loop\.losses"):
        optimizer.step()


def test_standard_steps_need_no_gradient_of_the_gate(model, images, targets):
    loop, optimizer = make_loop(Joint(warmup=1, unit="step")), sgd(model.parameters())
    loop.attach(optimizer, model)
    F.cross_entropy(model(images), targets).backward()
    optimizer.step()
    assert loop.progress.step == 1


def test_model_left_in_eval_mode_is_caught(model, images, targets):
    loop, optimizer = make_loop(Joint()), sgd(model.parameters())
    loop.attach(optimizer, model)
    step(loop, model, optimizer, images, targets)
    model.eval()  # validation, and nobody went back
    with pytest.raises(ValueError, match=r"is in eval mode.*call model\.train\(\) before every epoch"):
        step(loop, model, optimizer, images, targets)


@pytest.mark.parametrize("in_eval_mode", [False, True])
def test_loops_that_project_by_hand_are_checked_too(model, images, targets, in_eval_mode):
    loop, optimizer = make_loop(Joint()), sgd(model.parameters())
    F.cross_entropy(model.train(not in_eval_mode)(images), targets).backward()
    optimizer.step()
    with pytest.raises(ValueError, match="eval mode" if in_eval_mode else "no gradient reached"):
        loop.after_step(model)
    optimizer.zero_grad()
    loop.after_step(model)  # nothing can be seen any more
    step(loop, model.train(), optimizer, images, targets)
    loop.after_step(model)


def test_gradients_may_come_from_a_closure(model, images, targets):
    loop, optimizer = make_loop(Joint()), sgd(model.parameters())
    loop.attach(optimizer, model)

    def closure():
        optimizer.zero_grad()
        loss = loop.losses(model, images, targets, F.cross_entropy)["loss"]
        loss.backward()
        return loss

    for _ in range(2):
        optimizer.step(closure)
    assert loop.progress.step == 2


def test_mechanism_that_is_only_measured_needs_no_gradient(make_model, images, targets):
    model = timm_csg.differentiate(make_model(), mechanism="csg", gated_weight=0.0, sparsity_weight=0.0).train()
    loop, optimizer = make_loop(Joint()), sgd(model.parameters())
    loop.attach(optimizer, model)
    F.cross_entropy(model(images), targets).backward()
    optimizer.step()
    assert loop.progress.step == 1


@pytest.mark.parametrize("attached", [True, False])
@pytest.mark.parametrize("schedule", [Alternating(), Joint(warmup=1), Alternating(period=1, warmup=3)])
def test_epochs_that_nobody_tells_are_caught_at_the_first_step(model, images, targets, schedule, attached):
    loop, optimizer = make_loop(schedule), sgd(model.parameters())
    if attached:
        loop.attach(optimizer, model)
    loop.losses(model, images, targets, F.cross_entropy)["loss"].backward()
    with pytest.raises(ValueError, match=r"goes by epochs, but the epoch is not set.*loop\.set_epoch\(epoch\)"):
        optimizer.step() if attached else loop.after_step(model)
    loop.set_epoch(0)
    optimizer.step() if attached else loop.after_step(model)


@pytest.mark.parametrize("mechanism", ["icnn", ["icnn", "csg"]])
def test_mechanism_that_goes_by_epochs_asks_for_them(make_model, mechanism):
    model = timm_csg.differentiate(make_model(), mechanism=mechanism).train()
    with pytest.raises(ValueError, match="goes by epochs, but the epoch is not set"):
        make_loop(Joint()).after_step(model)


@pytest.mark.parametrize("schedule", [Joint(), Alternating(gated=0), Alternating(period=1), BY_STEP])
def test_schedules_whose_path_no_epoch_changes_ask_for_none(model, schedule):
    loop = make_loop(schedule)
    loop.after_step(model)
    assert loop.progress == Progress(step=1)


def test_schedule_that_nobody_set_is_told_once(model, caplog):
    loop = TrainingMixin()
    loop.set_epoch(0)
    for _ in range(2):
        loop.after_step(model)
    assert caplog.text.count("no schedule was set, so that this is Alternating(period=3, gated=1") == 1
    caplog.clear()
    chosen = make_loop(Alternating())
    chosen.set_epoch(0)
    chosen.after_step(model)
    assert caplog.text == ""


# Averages


def make_averages(model):
    return {
        "ema": ModelEmaV3(model, decay=0.5),
        "swa": AveragedModel(model),
        "torch_ema": AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.5)),
    }


@pytest.mark.parametrize("name", ["ema", "swa", "torch_ema"])
def test_averages_are_projected_after_every_update(make_model, images, targets, name, caplog):
    model = timm_csg.differentiate(make_model(), mechanism="csg", sparsity_weight=0.1).train()
    optimizer, loop = sgd(model.parameters(), lr=0.5), make_loop(Joint())
    average = make_averages(model)[name]
    with caplog.at_level(logging.WARNING):
        handle = loop.attach(optimizer, model, averages=[average])
    update = average.update if name == "ema" else average.update_parameters
    reference = copy.deepcopy(model.mechanism.gate.detach())
    for _ in range(4):
        step(loop, model, optimizer, images, targets)
        update(model)
        gate = average.module.mechanism.gate
        assert gate.amax(dim=0).eq(1).all()
    assert not torch.equal(gate, model.mechanism.gate)
    assert not torch.equal(gate, reference)
    assert average(images).shape == (3, 5)
    handle.remove()
    assert "update" not in average.__dict__
    assert "update_parameters" not in average.__dict__


def test_projected_average_can_be_copied_and_saved(model, images, targets):
    average, loop, optimizer = ModelEmaV3(model), make_loop(Joint()), sgd(model.parameters())
    loop.attach(optimizer, model, averages=[average])
    step(loop, model, optimizer, images, targets)
    other = copy.deepcopy(average)
    before = {name: value.clone() for name, value in average.state_dict().items()}
    other.update(model, step=0)
    assert all(torch.equal(average.state_dict()[name], value) for name, value in before.items())
    assert torch.equal(other.module.fc.weight, model.fc.weight)
    torch.save(average.state_dict(), io.BytesIO())


def test_masked_classifiers_of_averages_stay_masked_when_the_assignment_changes(make_model, images, targets):
    model = timm_csg.differentiate(make_model(), mechanism="assigned").train()
    average, loop, optimizer = ModelEmaV3(model, decay=0.5), make_loop(Joint()), sgd(model.parameters())
    loop.attach(optimizer, model, averages=[average])
    assignment = model.mechanism.assignment.clone()
    for shift in range(3):
        mechanism = model.mechanism
        mechanism.assign_(assignment.roll(shift, 0), torch.zeros(96), torch.ones(96))
        step(loop, model, optimizer, images, targets)
        average.update(model)
        averaged = average.module
        assert not averaged.fc.weight[~averaged.mechanism.assignment].any()


def test_average_from_before_the_assignment_is_refused_or_given_it(make_model, images, targets):
    model = timm_csg.differentiate(make_model(), mechanism="assigned").train()
    average, other, loop = ModelEmaV3(model), ModelEmaV3(model), make_loop(Joint())
    loop.assign_filters(model, [(torch.rand(10, 3, 64, 64), torch.arange(10) % 5)], averages=[other])
    with pytest.raises(ValueError, match=r"before the filters were assigned .*averages="):
        loop.attach(sgd(model.parameters()), model, averages=[average])
    loop.attach(sgd(model.parameters()), model, averages=[other])


def test_average_that_copied_the_assignment_is_trained_by_it(make_model, images, targets):
    model = timm_csg.differentiate(make_model(), mechanism="assigned").train()
    average = ModelEmaV3(model, decay=0.0)
    model.mechanism.assign_(model.mechanism.assignment.roll(2, 0), torch.rand(96), torch.rand(96) + 1)
    average.update(model)
    make_loop().attach(sgd(average.module.parameters()), average.module.train())
    assert torch.equal(average.module.mechanism.draws, model.mechanism.draws)
    found = average.module(images, targets, paths=("gated",)).losses["solo"]
    torch.testing.assert_close(found, model(images, targets, paths=("gated",)).losses["solo"])


def test_average_of_a_plain_model_is_refused(make_model):
    plain = make_model().train()
    average = ModelEmaV3(plain)
    model = timm_csg.differentiate(plain, mechanism="csg")
    with pytest.raises(TypeError, match=r"made after differentiate\(\).*found ModelEmaV3 of ResNet"):
        make_loop().attach(sgd(model.parameters()), model, averages=[average])
