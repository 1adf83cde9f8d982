"""Numbers of NumPy's types wherever a number is asked for; what is kept of them is plain and JSON."""

import json

import numpy as np
import pytest
import timm
import torch

import timm_csg
from timm_csg import (
    Alternating,
    ChainConfig,
    CSGConfig,
    ICNNConfig,
    Joint,
    Progress,
    TrainingMixin,
    explain,
    measuring,
    metrics,
)
from timm_csg.checks import check_fraction, plain_number, whole
from timm_csg.integrations.timm_task import DifferentiationTask

SCHEDULES = [
    (Alternating(period=np.int64(3), gated=np.int32(1), warmup=np.uint8(2)), Alternating(3, 1, 2)),
    (Joint(warmup=np.int16(1)), Joint(1)),
]
CONFIGS = [
    (
        CSGConfig(sparsity_weight=np.float64(0.5), classes_per_filter=np.float32(1.5), gated_weight=np.int64(2)),
        CSGConfig(sparsity_weight=0.5, classes_per_filter=1.5, gated_weight=2),
    ),
    (ICNNConfig(beta=np.float32(3), part_weight=np.int64(1)), ICNNConfig(beta=3.0, part_weight=1)),
    (
        ChainConfig(members=({"mechanism": "icnn", "beta": np.float32(3)}, "csg")),
        ChainConfig(members=(ICNNConfig(beta=3.0), "csg")),
    ),
]


@pytest.mark.parametrize(("found", "expected"), SCHEDULES)
def test_schedules_hold_plain_numbers(found, expected):
    loop = TrainingMixin()
    loop.schedule = found
    loop.set_epoch(np.int64(4))
    state = json.loads(json.dumps(loop.training_state()))
    loop.schedule = expected
    loop.load_training_state(state)
    assert loop.progress == Progress(epoch=4)


@pytest.mark.parametrize(("found", "expected"), CONFIGS)
def test_configs_hold_plain_numbers(found, expected):
    assert json.loads(json.dumps(found.to_dict())) == json.loads(json.dumps(expected.to_dict()))
    assert found == expected


def test_configs_train(make_model, images, targets):
    options = {"sparsity_weight": np.float32(0.02), "initial_gate": np.float64(0.25), "gated_weight": np.float32(0.5)}
    model = timm_csg.differentiate(make_model(), np.int64(5), mechanism="csg", **options).train()
    loop = TrainingMixin()
    loop.schedule = Joint()
    optimizer = torch.optim.SGD(timm_csg.param_groups(model, lr=np.float32(0.1), gate_lr=np.int64(1)), lr=0.1)
    assert all(type(group["lr"]) in (int, float) for group in optimizer.param_groups)
    loop.attach(optimizer, model)
    loop.losses(model, images, targets, torch.nn.functional.cross_entropy)["loss"].backward()
    optimizer.step()
    assert model.mechanism.gate.amax(dim=0).eq(1).all()


def test_numbers_of_classes_may_be_numpys(tmp_path):
    model = timm_csg.differentiate(timm.create_model("test_resnet", num_classes=3), num_classes=np.int64(4))
    assert type(model.num_classes) is type(model.mechanism.num_classes) is int
    timm_csg.save_pretrained(model, tmp_path)
    assert timm_csg.from_pretrained(tmp_path).num_classes == 4
    model.reset_classifier(np.int32(6))
    assert type(model.mechanism.num_classes) is int


def test_steps_per_epoch_may_be_numpys(make_model):
    task = DifferentiationTask(
        timm_csg.differentiate(make_model(), mechanism="csg"), steps_per_epoch=np.int64(3), verbose=False
    )
    assert type(task.steps_per_epoch) is int


def test_counts_of_explanations_and_metrics_may_be_numpys(make_model, images, targets):
    model, three = timm_csg.differentiate(make_model(), mechanism="csg"), np.int64(3)
    assert explain.class_filters(model, images, top=three).filters.shape == (3, 3)
    assert len(explain.explain_prediction(model, images, top=three)[0].filters) == 3
    assert explain.strongest_images(model, [images], [0, 1], top=three).indices.shape == (2, 3)
    assert metrics.top_filters(torch.rand(5, 9), three).sum() == 15
    assert measuring.receptive_field(make_model(), np.int64(64)).local
    features = torch.rand(20, 2, dtype=torch.float64)
    found = metrics.mutual_information(features, torch.arange(20) % 2, neighbors=three)
    assert torch.equal(found, metrics.mutual_information(features, torch.arange(20) % 2, neighbors=3))


@pytest.mark.parametrize("value", [1.0, np.float64(2), "3", None, True, torch.tensor([1, 2]), torch.tensor(0.5)])
def test_what_is_no_whole_number_stays_none(value):
    assert whole(value) is None


def test_tensors_of_one_integer_are_whole_numbers():
    assert whole(torch.tensor(7)) == 7


@pytest.mark.parametrize("value", [np.float32("nan"), np.float64("inf"), np.int64(-1), True, "1", None])
def test_numbers_out_of_range_are_refused_whatever_their_type(value):
    with pytest.raises(ValueError, match="x must be a number, 0 or more, but is"):
        check_fraction("x", value)


def test_plain_numbers_keep_what_is_no_number():
    assert [type(plain_number(value)) for value in (np.int8(1), np.float16(1), True, "a", None)] == [
        int,
        float,
        bool,
        str,
        type(None),
    ]


@pytest.mark.parametrize(
    ("call", "found"),
    [
        (lambda model: timm_csg.differentiate(model, num_classes=np.float64(3)), "num_classes must be a whole number"),
        (lambda model: timm_csg.differentiate(model, num_classes=True), "num_classes must be a whole number"),
        (lambda model: timm_csg.differentiate(model).reset_classifier(np.int64(0)), "needs classes, but num_classes=0"),
        (lambda model: Progress(step=np.float64(1)), "epoch and step must be whole numbers"),
    ],
)
def test_numbers_of_the_wrong_kind_are_refused(tiny_model, call, found):
    with pytest.raises(ValueError, match=found):
        call(tiny_model)
