"""TrainingMixin: paths, losses, projection, counting; and nothing but the gated path moves the gate."""

import copy
import json

import pytest
import torch
import torch.nn.functional as F
from timm.data import Mixup
from timm.loss import SoftTargetCrossEntropy
from timm.optim import create_optimizer_v2

import timm_csg
from timm_csg import Alternating, Joint, Progress, TrainingMixin, param_groups

STEPS = Alternating(period=2, gated=1, unit="step")


@pytest.fixture
def model(tiny_model):
    return timm_csg.differentiate(tiny_model, mechanism="csg").train()


def make_loop(schedule):
    loop = TrainingMixin()
    loop.schedule = schedule
    return loop


def backward(loop, model, images, targets):
    losses = loop.losses(model, images, targets, F.cross_entropy)
    losses["loss"].backward()
    return losses


# Losses


@pytest.mark.parametrize(
    ("schedule", "names"),
    [
        (Alternating(gated=0), {"standard"}),
        (Alternating(period=1, gated=1), {"gated", "sparsity", "gated_output"}),
        (Joint(), {"standard", "gated", "sparsity", "gated_output"}),
    ],
)
def test_losses_are_those_of_the_path(model, images, targets, schedule, names):
    losses = make_loop(schedule).losses(model, images, targets, F.cross_entropy)
    assert set(losses) == {"loss", "output", *names}


def test_gradient_of_the_loss_is_that_of_the_weighted_sum(make_model, images, targets):
    model = timm_csg.differentiate(make_model(), mechanism="csg", gated_weight=0.3, sparsity_weight=0.02).train()
    parameters = list(model.parameters())
    losses = make_loop(Joint()).losses(model, images, targets, F.cross_entropy)
    outputs = model(images, targets, paths=("standard", "gated"))
    gated, sparsity = F.cross_entropy(outputs.gated, targets), outputs.losses["sparsity"]
    total = F.cross_entropy(outputs.standard, targets) + 0.3 * gated + 0.02 * sparsity
    found, expected = (torch.autograd.grad(loss, parameters) for loss in (losses["loss"], total))
    torch.testing.assert_close(found, expected)
    assert sparsity > 0


@pytest.mark.parametrize("mechanism", ["assigned", "csg", "icnn"])
def test_value_of_the_loss_is_the_criterion_on_the_output(make_model, images, targets, mechanism):
    for schedule in (Joint(), Alternating(gated=0), Alternating(period=1, gated=1)):
        model = timm_csg.differentiate(make_model(), mechanism=mechanism).train()
        losses = make_loop(schedule).losses(model, images, targets, F.cross_entropy)
        assert losses["loss"].item() == F.cross_entropy(losses["output"], targets).item()


def test_term_that_is_not_finite_makes_the_loss_so(make_model, images, targets):
    model = timm_csg.differentiate(make_model(), mechanism="csg").train()
    with torch.no_grad():
        model.mechanism.gate[0, 0] = float("nan")
    losses = make_loop(Joint()).losses(model, images, targets, F.cross_entropy)
    assert losses["standard"].isfinite()
    assert losses["loss"].isnan()


def test_parts_are_the_criterion_on_the_outputs(model, images, targets):
    losses = make_loop(Joint()).losses(model, images, targets, F.cross_entropy)
    torch.testing.assert_close(losses["standard"], F.cross_entropy(losses["output"], targets).detach())
    torch.testing.assert_close(losses["gated"], F.cross_entropy(losses["gated_output"], targets).detach())


def test_only_loss_and_outputs_carry_gradients(model, images, targets):
    losses = make_loop(Joint()).losses(model, images, targets, F.cross_entropy)
    assert {name for name, value in losses.items() if value.requires_grad} == {"loss", "output", "gated_output"}


def test_dividing_the_loss_in_place_leaves_its_parts(model, images, targets):
    loop = timm_csg.TrainingMixin()
    losses = loop.losses(model, images, targets, F.cross_entropy)
    before = losses["standard"].item()
    losses["loss"] /= 4
    assert losses["standard"].item() == before


def test_output_of_a_gated_step_is_the_gated_one(model, images, targets):
    losses = make_loop(Alternating(period=1, gated=1)).losses(model, images, targets, F.cross_entropy)
    assert losses["output"] is losses["gated_output"]


def test_eval_mode_gives_the_standard_path_whatever_the_schedule(model, images, targets):
    model.eval()
    losses = make_loop(Joint()).losses(model, images, targets, F.cross_entropy)
    assert set(losses) == {"loss", "output", "standard"}
    assert torch.equal(losses["output"], model(images))


def test_both_paths_take_one_backbone_pass_each_step(model, images, targets, monkeypatch):
    calls, backbone = [], model.forward_features
    monkeypatch.setattr(model, "forward_features", lambda x: calls.append(1) or backbone(x))
    make_loop(Joint()).losses(model, images, targets, F.cross_entropy)
    assert len(calls) == 1


@pytest.mark.parametrize("mechanism", ["csg", "assigned"])
def test_soft_targets_of_timms_mixup_train_both_paths(make_model, images, mechanism):
    model = timm_csg.differentiate(make_model(), mechanism=mechanism).train()
    mixup = Mixup(mixup_alpha=0.8, cutmix_alpha=1.0, label_smoothing=0.1, num_classes=5)
    mixed, soft = mixup(images.repeat(2, 1, 1, 1)[:4], torch.tensor([0, 1, 2, 3]))
    losses = make_loop(Joint()).losses(model, mixed, soft, SoftTargetCrossEntropy())
    losses["loss"].backward()
    assert losses["loss"].isfinite()
    assert all(parameter.grad.abs().sum() > 0 for parameter in model.mechanism.parameters())


def test_multi_hot_targets_train_with_a_binary_loss(model, images):
    targets = torch.tensor([[1.0, 0, 1, 0, 0], [0, 0, 0, 0, 0], [1, 1, 1, 1, 1]])
    losses = make_loop(Joint()).losses(model, images, targets, F.binary_cross_entropy_with_logits)
    losses["loss"].backward()
    assert losses["loss"].isfinite()


def test_plain_model_is_refused_with_the_remedy(make_model, images, targets):
    loop, plain = TrainingMixin(), make_model()
    for call in (
        lambda: loop.losses(plain, images, targets, F.cross_entropy),
        lambda: loop.attach(torch.optim.SGD(plain.parameters(), lr=0.1), plain),
        lambda: loop.after_step(plain),
    ):
        with pytest.raises(TypeError, match=r"found ResNet; call differentiate\(\) first"):
            call()


def test_compiled_model_is_looked_through(model, images, targets):
    compiled = torch.compile(model, backend="eager")
    losses = make_loop(Joint()).losses(compiled, images, targets, F.cross_entropy)
    assert losses["loss"].isfinite()


# Schedule and progress


def test_paths_alternate_by_epoch(model, images, targets):
    loop, seen = make_loop(Alternating(period=3, gated=1)), []
    for epoch in range(4):
        loop.set_epoch(epoch)
        for _ in range(2):
            losses = loop.losses(model, images, targets, F.cross_entropy)
            seen.append("gated" if "gated" in losses else "standard")
            loop.after_step(model)
    assert seen == ["standard"] * 4 + ["gated"] * 2 + ["standard"] * 2
    assert loop.progress == Progress(epoch=3, step=8)


def test_paths_alternate_by_optimizer_step_not_by_micro_batch(model, images, targets):
    loop = make_loop(STEPS)
    optimizer = torch.optim.SGD(param_groups(model, lr=0.01))
    loop.attach(optimizer, model)
    seen = []
    for batch in range(8):
        seen.append(loop.path)
        backward(loop, model, images, targets)
        if batch % 2:
            optimizer.step()
            optimizer.zero_grad()
    assert seen == ["standard", "standard", "gated", "gated"] * 2
    assert loop.progress.step == 4


def test_accumulated_gate_gradient_is_the_sum_of_its_micro_batches(make_model, images, targets):
    model = timm_csg.differentiate(make_model(), mechanism="csg", sparsity_weight=0.0)
    for module in model.modules():
        module.training = isinstance(
            module, timm_csg.DifferentiatedModel
        )  # batch norm in eval: batches are independent
    loop = make_loop(Alternating(period=1, gated=1))
    total = torch.zeros_like(model.mechanism.gate)
    for image, target in zip(images.split(1), targets.split(1), strict=True):
        backward(loop, model, image, target)
    accumulated = model.mechanism.gate.grad.clone()
    model.zero_grad()
    backward(loop, model, images, targets)
    total = 3 * model.mechanism.gate.grad
    torch.testing.assert_close(accumulated, total, rtol=1e-4, atol=1e-6)


def test_two_loops_do_not_share_their_progress():
    first, second = TrainingMixin(), TrainingMixin()
    first.set_epoch(5)
    assert second.progress == Progress()
    assert TrainingMixin.progress == Progress()


def test_mixin_needs_no_call_of_its_constructor(model, images, targets):
    class Host:
        def __init__(self):
            self.own = 1

    class Loop(TrainingMixin, Host):
        schedule = Joint()

    losses = Loop().losses(model, images, targets, F.cross_entropy)
    assert "gated" in losses


# Projection


@pytest.mark.parametrize("optimizer", ["sgd", "adamw", "lion", "lookahead_sgd"])
def test_every_optimizer_step_ends_projected(model, images, targets, optimizer):
    loop = make_loop(Joint())
    optimizer = create_optimizer_v2(model, opt=optimizer, lr=0.05)
    loop.attach(optimizer, model)
    for step in range(3):
        backward(loop, model, images, targets)
        optimizer.step()
        gate = model.mechanism.gate
        assert (gate.amax(dim=0) == 1).all()
        assert (gate >= 0).all()
        assert loop.progress.step == step + 1


def test_detached_loop_neither_projects_nor_counts(model, images, targets):
    loop = make_loop(Joint())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    loop.attach(optimizer, model).remove()
    backward(loop, model, images, targets)
    optimizer.step()
    assert loop.progress.step == 0
    assert model.mechanism.gate.max() < 1


def test_after_step_by_hand_does_what_attach_does(make_model, images, targets):
    models = [timm_csg.differentiate(make_model(), mechanism="csg").train() for _ in range(2)]
    for attached, model in zip((True, False), models, strict=True):
        loop = make_loop(Joint())
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
        if attached:
            loop.attach(optimizer, model)
        for _ in range(2):
            backward(loop, model, images, targets)
            optimizer.step()
            if not attached:
                loop.after_step(model)
            optimizer.zero_grad()
    assert torch.equal(models[0].mechanism.gate, models[1].mechanism.gate)


@pytest.mark.parametrize("set_to_none", [True, False])
@pytest.mark.parametrize(
    "make_optimizer",
    [
        lambda parameters: torch.optim.SGD(parameters, lr=0.1, momentum=0.9, weight_decay=0.1, nesterov=True),
        lambda parameters: torch.optim.AdamW(parameters, lr=0.05, weight_decay=0.1),
        lambda parameters: torch.optim.Adam(parameters, lr=0.05, weight_decay=0.1, foreach=True),
    ],
    ids=["sgd", "adamw", "adam"],
)
def test_standard_steps_do_not_move_the_gate(model, images, targets, set_to_none, make_optimizer):
    loop = make_loop(Alternating(period=4, gated=1, unit="step"))
    loop.progress = Progress(step=3)
    optimizer = make_optimizer(model.parameters())
    loop.attach(optimizer, model)
    backward(loop, model, images, targets)  # gated: fills the momentum of the gate
    optimizer.step()
    optimizer.zero_grad(set_to_none=set_to_none)
    gate, weight = model.mechanism.gate.clone(), model.fc.weight.clone()
    for _ in range(3):
        assert loop.path == "standard"
        backward(loop, model, images, targets)
        optimizer.step()
        optimizer.zero_grad(set_to_none=set_to_none)
    assert torch.equal(model.mechanism.gate, gate)
    assert not torch.equal(model.fc.weight, weight)


def test_standard_steps_leave_the_rest_as_plain_training_does(make_model, images, targets):
    plain, model = make_model().train(), timm_csg.differentiate(make_model(), mechanism="csg").train()
    loop = make_loop(Alternating(gated=0))
    for each, attach in ((plain, False), (model, True)):
        optimizer = torch.optim.SGD(each.parameters(), lr=0.05, momentum=0.9, weight_decay=1e-3)
        if attach:
            loop.attach(optimizer, each)
        for _ in range(3):
            optimizer.zero_grad()
            F.cross_entropy(each(images), targets).backward()
            optimizer.step()
    assert all(torch.equal(model.state_dict()[key], value) for key, value in plain.state_dict().items())


def test_one_optimizer_per_path_as_the_authors_do(model, images, targets):
    loop = make_loop(STEPS)
    optimizers = {path: torch.optim.Adam(param_groups(model, lr=1e-3)) for path in ("standard", "gated")}
    for optimizer in optimizers.values():
        loop.attach(optimizer, model)
    gates = []
    for _ in range(4):
        path = loop.path
        backward(loop, model, images, targets)
        optimizers[path].step()
        optimizers[path].zero_grad()
        gates.append(model.mechanism.gate.clone())
    assert loop.progress.step == 4
    assert torch.equal(gates[1], gates[2])  # the standard step in between
    assert not torch.equal(gates[2], gates[3])


def test_step_that_the_amp_scaler_skips_does_not_count(model, images, targets):
    loop = make_loop(Joint())
    optimizer = torch.optim.SGD(param_groups(model, lr=0.01), momentum=0.9)
    loop.attach(optimizer, model)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    for overflow in (True, False):
        losses = loop.losses(model, images, targets, F.cross_entropy)
        scaler.scale(losses["loss"] * (float("inf") if overflow else 1.0)).backward()
        before = model.mechanism.gate.clone()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        assert torch.equal(model.mechanism.gate, before) is overflow
        assert loop.progress.step == (0 if overflow else 1)


def test_weight_decay_on_the_gate_is_warned_about(model, caplog):
    TrainingMixin().attach(torch.optim.AdamW(model.parameters(), weight_decay=0.05), model)
    assert "weight_decay=0.05 to the mechanism" in caplog.text
    assert "param_groups" in caplog.text
    caplog.clear()
    TrainingMixin().attach(create_optimizer_v2(model, opt="adamw", weight_decay=0.05), model)
    assert caplog.text == ""


# Resuming


def test_training_resumes_bit_equal(make_model, images, targets, tmp_path):
    def start():
        model = timm_csg.differentiate(make_model(), mechanism="csg").train()
        optimizer = torch.optim.SGD(param_groups(model, lr=0.05), momentum=0.9)
        loop = make_loop(STEPS)
        loop.attach(optimizer, model)
        return model, optimizer, loop

    def train(model, optimizer, loop, steps):
        for _ in range(steps):
            backward(loop, model, images, targets)
            optimizer.step()
            optimizer.zero_grad()

    whole, optimizer, loop = start()
    train(whole, optimizer, loop, 3)
    state = {"model": whole.state_dict(), "optimizer": optimizer.state_dict(), "loop": loop.training_state()}
    torch.save(state, tmp_path / "state.pt")
    train(whole, optimizer, loop, 3)

    resumed, optimizer, loop = start()
    state = torch.load(tmp_path / "state.pt", weights_only=True)
    resumed.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    loop.load_training_state(state["loop"])
    assert loop.progress == Progress(epoch=0, step=3)
    assert loop.path == "gated"
    train(resumed, optimizer, loop, 3)
    assert all(torch.equal(resumed.state_dict()[key], value) for key, value in whole.state_dict().items())


@pytest.mark.parametrize("schedule", [Alternating(period=4, warmup=2), Joint(warmup=1, unit="step")])
def test_training_state_is_json(schedule):
    loop = make_loop(schedule)
    loop.progress = Progress(epoch=7, step=123)
    other = make_loop(copy.copy(schedule))
    other.load_training_state(json.loads(json.dumps(loop.training_state())))
    assert other.progress == Progress(epoch=7, step=123)


@pytest.mark.parametrize(
    "state",
    [
        None,
        {},
        [],
        {"progress": {"epoch": 1, "step": 2}},
        {"progress": {"epoch": 1, "step": 2, "batch": 3}, "schedule": {}},
        {"progress": None, "schedule": {}},
    ],
)
def test_damaged_training_state_is_refused(state):
    loop = TrainingMixin()
    with pytest.raises(ValueError, match=r"expected the dictionary made by training_state\(\)"):
        loop.load_training_state(state)
    assert loop.progress == Progress()


@pytest.mark.parametrize("progress", [{"epoch": "1", "step": 2}, {"epoch": 1, "step": -1}, {"epoch": 1.5, "step": 0}])
def test_training_state_with_impossible_progress_is_refused(progress):
    loop = TrainingMixin()
    with pytest.raises(ValueError, match=r"expected the dictionary made by training_state\(\)"):
        loop.load_training_state({**loop.training_state(), "progress": progress})
    assert loop.progress == Progress()


def test_state_of_another_schedule_is_refused_with_the_remedy():
    state = make_loop(Joint()).training_state()
    loop = make_loop(Alternating(period=5))
    with pytest.raises(ValueError, match=r"belongs to the schedule.*Joint.*period=5.*set loop.schedule first"):
        loop.load_training_state(state)


# Groups


def test_gate_has_its_own_group_with_its_own_learning_rate(model):
    groups = param_groups(model, lr=0.1, gate_lr=10.0, weight_decay=0.05)
    assert groups[-1] == {"params": [model.mechanism.gate], "lr": 10.0, "weight_decay": 0.0, "use_fallback": True}
    assert {group["lr"] for group in groups[:-1]} == {0.1}
    parameters = [parameter for group in groups for parameter in group["params"]]
    assert {id(parameter) for parameter in parameters} == {id(parameter) for parameter in model.parameters()}
    assert len(parameters) == len(list(model.parameters()))


def test_gate_shares_the_learning_rate_unless_told(model):
    assert param_groups(model, lr=0.1)[-1]["lr"] == 0.1


def test_biases_and_norms_are_not_decayed(model):
    groups = param_groups(model, lr=0.1, weight_decay=0.05)
    undecayed = {id(parameter) for group in groups if not group["weight_decay"] for parameter in group["params"]}
    assert {id(model.fc.bias), id(model.layer4[0].bn1.weight), id(model.mechanism.gate)} <= undecayed
    assert id(model.fc.weight) not in undecayed


def test_layer_decay_lowers_the_learning_rate_of_early_layers_only(model):
    groups = param_groups(model, lr=0.1, gate_lr=1.0, layer_decay=0.5)
    rate = {id(parameter): group["lr"] for group in groups for parameter in group["params"]}
    assert rate[id(model.conv1[0].weight)] < rate[id(model.layer4[0].conv1.weight)] < rate[id(model.fc.weight)] == 0.1
    assert rate[id(model.mechanism.gate)] == 1.0


def test_frozen_gate_is_in_no_group(model):
    model.mechanism.gate.requires_grad_(False)
    parameters = [parameter for group in param_groups(model, lr=0.1) for parameter in group["params"]]
    assert not any(parameter is model.mechanism.gate for parameter in parameters)


def test_plain_model_gets_timms_groups(make_model):
    groups = param_groups(make_model(), lr=0.1, weight_decay=0.05)
    assert [group["weight_decay"] for group in groups] == [0.0, 0.05]


@pytest.mark.parametrize(
    "numbers", [{"lr": -0.1}, {"lr": 0.1, "gate_lr": -1}, {"lr": 0.1, "weight_decay": float("nan")}]
)
def test_negative_numbers_are_refused(model, numbers):
    with pytest.raises(ValueError, match="must be a number, 0 or more, but is"):
        param_groups(model, **numbers)


def test_groups_suit_timms_hybrid_optimizer(model, images, targets):
    optimizer = create_optimizer_v2(model, opt="muon", lr=0.01, param_group_fn=lambda m: param_groups(m, lr=0.01))
    own = [group for group in optimizer.param_groups if any(p is model.mechanism.gate for p in group["params"])]
    assert [group.get("use_fallback") for group in own] == [True]
    loop = make_loop(Joint())
    loop.attach(optimizer, model)
    backward(loop, model, images, targets)
    optimizer.step()
    assert (model.mechanism.gate.amax(dim=0) == 1).all()


def test_images_of_bytes_are_refused_in_one_sentence(make_model, targets):
    model = timm_csg.differentiate(make_model()).train()
    with pytest.raises(TypeError, match=r"images must be floating-point numbers.* but are torch.uint8; see timm.data"):
        TrainingMixin().losses(model, torch.zeros(3, 3, 64, 64, dtype=torch.uint8), targets, F.cross_entropy)
