"""What docs/how-to/pitfalls-in-training-loops.md calls silent is so; what is an error is tested with its feature."""

import pytest
import timm
import torch
import torch.nn.functional as F
from timm.utils import ModelEmaV3

import timm_csg

torch.manual_seed(0)
LOADER = [(torch.rand(10, 3, 32, 32), torch.arange(10) % 5) for _ in range(2)]


@pytest.fixture
def training():
    """Model with assigned filters, loop and optimizer, not attached."""
    torch.manual_seed(0)
    model = timm_csg.differentiate(timm.create_model("test_resnet", num_classes=5)).train()
    loop = timm_csg.TrainingMixin()
    loop.schedule = timm_csg.Joint()
    loop.assign_filters(model, LOADER)
    return model, loop, torch.optim.SGD(timm_csg.param_groups(model, lr=0.05), lr=0.05)


def step(model, loop, optimizer, scale=1.0):
    images, targets = LOADER[0]
    loop.losses(model, images * scale, targets, F.cross_entropy)["loss"].backward()
    optimizer.step()


def foreign_weight(model):
    """The largest classifier weight of a filter that its class does not own."""
    return float(model.fc.weight.detach()[~model.mechanism.assignment].abs().max())


def test_without_attach_the_classifier_leaves_its_own_filters(training):
    model, loop, _ = training
    step(*training)
    assert foreign_weight(model) > 0
    assert loop.progress.step == 0


def test_average_from_before_the_assignment_leaves_its_own_filters(training):
    _, loop, _ = training
    fresh = timm_csg.differentiate(timm.create_model("test_resnet", num_classes=5)).train()
    ema = ModelEmaV3(fresh, decay=0.9)
    loop.assign_filters(fresh, LOADER)
    ema.update(fresh)
    assert foreign_weight(fresh) == 0
    assert foreign_weight(ema.module) > 0


def test_after_step_by_hand_counts_a_step_that_the_scaler_skipped(training):
    model, loop, optimizer = training
    scaler = torch.amp.GradScaler("cpu")
    images, targets = LOADER[0]
    scaler.scale(loop.losses(model, images * float("nan"), targets, F.cross_entropy)["loss"]).backward()
    scaler.step(optimizer)
    loop.after_step(model)
    assert loop.progress.step == 1


def test_norms_of_layers_frozen_by_hand_go_on_changing(training):
    model, _, _ = training
    model.layer1.requires_grad_(False)
    before = model.layer1[0].bn1.running_mean.clone()
    step(*training)
    assert not torch.equal(model.layer1[0].bn1.running_mean, before)


def test_one_rate_for_a_schedule_replaces_all(training):
    model, _, _ = training
    optimizer = torch.optim.AdamW(timm_csg.param_groups(model, lr=1e-3, head_lr=4e-3), lr=1e-3)
    torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=1e-3, total_steps=10)
    assert {group["max_lr"] for group in optimizer.param_groups} == {1e-3}


def test_filters_are_not_assigned_after_the_first_step(training):
    model, loop, optimizer = training
    loop.attach(optimizer, model)
    step(*training)
    fresh = timm_csg.differentiate(timm.create_model("test_resnet", num_classes=5))
    assert loop.assign_filters(fresh, LOADER) is None
    assert not fresh.mechanism.assigned_from_data
