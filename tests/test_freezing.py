"""freeze: what is trained, and that frozen layers stay as they are, statistics included."""

import copy

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import nn

import timm_csg
from timm_csg import freeze

# The last stage and the classifier, as timm numbers them.
LAST = {
    "test_resnet": {"layer4", "fc"},
    "test_convnext": {"stages", "head"},
    "test_mambaout": {"stages", "head"},
    "test_vit": {"blocks", "norm", "head"},
}


def trained_children(names):
    return {name.split(".")[0] for name in names}


def train_steps(model, images, targets, steps=2):
    loop = timm_csg.TrainingMixin()
    loop.schedule = timm_csg.Joint()
    optimizer = torch.optim.SGD(timm_csg.param_groups(model, lr=0.05, weight_decay=0.01), lr=0.05, momentum=0.9)
    loop.attach(optimizer, model)
    for _ in range(steps):
        loop.losses(model.train(), images, targets, F.cross_entropy)["loss"].backward()
        optimizer.step()
        optimizer.zero_grad()


def test_last_stage_and_classifier_stay_trainable(any_model, request):
    name = request.node.callspec.params["any_model"]
    names = freeze(any_model)
    assert trained_children(names) <= LAST[name]
    assert any(parameter is any_model.get_classifier().weight for parameter in any_model.parameters())
    assert any_model.get_classifier().weight.requires_grad
    assert names == [key for key, parameter in any_model.named_parameters() if parameter.requires_grad]


def test_only_the_classifier_stays_trainable(any_model):
    freeze(any_model, "backbone")
    head = {id(parameter) for parameter in any_model.head.parameters()} if hasattr(any_model, "head") else set()
    head |= {id(parameter) for parameter in any_model.get_classifier().parameters()}
    head |= {id(parameter) for name, parameter in any_model.named_parameters() if name.startswith("norm.")}
    assert {id(parameter) for parameter in any_model.parameters() if parameter.requires_grad} <= head
    assert any_model.get_classifier().weight.requires_grad


def test_none_freezes_nothing(any_model):
    assert len(freeze(any_model, "none")) == len(list(any_model.parameters()))


@pytest.mark.parametrize("what", ["all-but-last-stage", "backbone"])
def test_mechanism_stays_trainable(any_model, what):
    names = freeze(timm_csg.differentiate(any_model), what)
    assert {"mechanism.scale", "mechanism.bias"} <= set(names)


@pytest.mark.parametrize("what", ["all-but-last-stage", "backbone"])
def test_training_leaves_frozen_layers_as_they_are_with_their_statistics(make_model, images, targets, gated, what):
    model = gated(timm_csg.differentiate(make_model()))
    names = set(freeze(model, what))
    before = copy.deepcopy(model.state_dict())
    train_steps(model, images, targets)
    frozen_children = {"conv1", "bn1", "layer1", "layer2", "layer3"} | ({"layer4"} if what == "backbone" else set())
    for key, value in model.state_dict().items():
        if key.split(".")[0] in frozen_children:
            assert torch.equal(value, before[key]), key
    assert all(not torch.equal(model.state_dict()[name], before[name]) for name in names)


def test_batch_norms_of_trained_layers_keep_training(make_model):
    model = timm_csg.differentiate(make_model())
    freeze(model)
    model.train()
    modes = {name: m.training for name, m in model.named_modules() if isinstance(m, nn.BatchNorm2d)}
    assert {name for name, training in modes.items() if training} == {n for n in modes if n.startswith("layer4.")}
    assert model.training
    assert not model.eval().training


def test_unfrozen_model_trains_all_its_batch_norms(make_model):
    model = timm_csg.differentiate(make_model()).train()
    assert all(module.training for module in model.modules())


def test_frozen_model_survives_a_copy(make_model):
    model = timm_csg.differentiate(make_model())
    freeze(model)
    twin = copy.deepcopy(model).train()
    assert not twin.bn1.training


def test_plain_model_wants_its_batch_norms_held_by_hand(make_model):
    model = make_model()
    freeze(model)
    model.train()
    timm_csg.model.hold_frozen(model)
    assert not model.bn1.training
    assert model.layer4[0].bn1.training


def test_undifferentiated_model_is_free_again(make_model):
    model = timm_csg.differentiate(make_model())
    freeze(model)
    plain = timm_csg.undifferentiate(model)
    assert "holds_frozen" not in vars(plain)


def test_unknown_word_is_refused(make_model):
    with pytest.raises(ValueError, match="one of 'none', 'all-but-last-stage', 'backbone', but found 'all'"):
        freeze(make_model(), "all")


def test_model_without_stages_is_refused():
    with pytest.raises(ValueError, match="does not know the stages of Linear; freeze layers by hand"):
        freeze(nn.Linear(2, 2))


@pytest.mark.parametrize("name", ["mobilenetv2_050", "test_efficientnet", "swin_tiny_patch4_window7_224"])
def test_other_families_keep_a_part_that_is_neither_all_nor_nothing(name):
    with torch.device("meta"):
        model = timm.create_model(name, num_classes=3)
    total = sum(parameter.numel() for parameter in model.parameters())
    freeze(model)
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    assert 0.1 < trained / total < 0.95
    assert model.get_classifier().weight.requires_grad
