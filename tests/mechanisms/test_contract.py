"""What every registered mechanism keeps to, whichever paper it comes from."""

import json
from dataclasses import FrozenInstanceError, dataclass, fields

import pytest
import torch
from torch.nn.functional import cross_entropy

import timm_csg
from timm_csg import Mechanism, MechanismConfig, list_mechanisms, register_mechanism
from timm_csg.mechanisms import registry

BOTH = ("standard", "gated")
pytestmark = pytest.mark.parametrize("name", list_mechanisms())


@pytest.fixture
def model(name, make_model):
    """A tiny ResNet with the mechanism, in training mode."""
    return timm_csg.differentiate(make_model(), mechanism=name).train()


def test_forward_keeps_shape_layout_and_dtype(name, model, images, targets):
    features = model.forward_features(images)
    for given in (None, targets):
        seen = model.mechanism(features, given)
        assert (seen.shape, seen.dtype, seen.device) == (features.shape, features.dtype, features.device)


def test_only_mechanisms_that_say_so_act_without_targets(name, model, images):
    features = model.forward_features(images)
    changed = not torch.equal(model.mechanism(features), features)
    assert changed is model.mechanism.acts_without_targets


def test_losses_are_named_finite_scalars_with_a_weight_each(name, model, images, targets):
    outputs = model(images, targets, paths=BOTH)
    weights = model.mechanism.loss_weights()
    assert set(weights) >= {"gated", *outputs.losses}
    assert all(weight >= 0 for weight in weights.values())
    assert all(loss.ndim == 0 and loss.isfinite() for loss in outputs.losses.values())
    assert not {"loss", "output", "gated_output", "standard"} & set(weights)


def test_every_parameter_gets_a_gradient_from_the_gated_path(name, model, images, targets):
    outputs = model(images, targets, paths=("gated",))
    (cross_entropy(outputs.gated, targets) + sum(outputs.losses.values())).backward()
    assert all(parameter.grad is not None for parameter in model.mechanism.parameters() if parameter.requires_grad)


def test_projection_is_idempotent_and_keeps_parameters_in_place(name, model):
    mechanism = model.mechanism
    with torch.no_grad():
        for parameter in mechanism.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0)))
    before = [(parameter, parameter.data_ptr()) for parameter in mechanism.parameters()]
    mechanism.project_()
    once = [parameter.clone() for parameter in mechanism.parameters()]
    mechanism.project_()
    assert [(parameter, parameter.data_ptr()) for parameter in mechanism.parameters()] == before
    assert all(torch.equal(*pair) for pair in zip(mechanism.parameters(), once, strict=True))


def test_class_filter_matrix_is_classes_by_filters_in_0_to_1(name, model):
    matrix = model.mechanism.class_filter_matrix()
    if matrix is not None:
        assert matrix.shape == (5, 96)
        assert ((matrix >= 0) & (matrix <= 1)).all()
        assert not matrix.requires_grad


def test_parameters_and_buffers_follow_the_model(name, model):
    model.to(torch.bfloat16)
    assert all(tensor.dtype == torch.bfloat16 for tensor in model.mechanism.parameters())
    model.eval()
    assert not model.mechanism.training


def test_names_without_weight_decay_are_parameters(name, model):
    assert set(model.mechanism.no_weight_decay()) <= {name for name, _ in model.mechanism.named_parameters()}


def test_no_method_is_one_that_timms_reparameterisation_calls(name, model):
    forbidden = ("fuse", "reparameterize", "switch_to_deploy")
    assert not [method for method in forbidden if hasattr(model.mechanism, method)]


def test_config_is_frozen_and_json_in_both_directions(name):
    config_class = registry._MECHANISMS[name].config_class
    config = config_class()
    assert config_class.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    with pytest.raises(FrozenInstanceError):
        setattr(config, fields(config)[0].name, None)


def test_unknown_option_lists_the_valid_ones(name, tiny_model):
    options = [field.name for field in fields(registry._MECHANISMS[name].config_class)]
    with pytest.raises(ValueError, match=f"no option typo; its options are {', '.join(options)}"):
        timm_csg.differentiate(tiny_model, mechanism=name, typo=1)


def test_config_and_name_select_the_same_mechanism(name, make_model):
    config = registry._MECHANISMS[name].config_class()
    by_config = timm_csg.differentiate(make_model(), mechanism=config).mechanism
    by_name = timm_csg.differentiate(make_model(), mechanism=name).mechanism
    assert type(by_config) is type(by_name)
    assert by_config.config == by_name.config == config
    assert by_name.name == name


def test_taken_name_is_refused(name):
    with pytest.raises(ValueError, match=f"{name!r} is already registered by"):
        register_mechanism(name, MechanismConfig)(Mechanism)


def test_repr_shows_size_and_config(name, model):
    assert "filters=96, classes=5" in repr(model.mechanism)


def test_training_lowers_the_loss_and_stays_feasible(name, model, images, targets):
    loop = timm_csg.TrainingMixin()
    loop.schedule = timm_csg.Joint()
    optimizer = torch.optim.SGD(timm_csg.param_groups(model, lr=0.02), momentum=0.9)
    loop.attach(optimizer, model)
    loop.set_epoch(0)
    history = []
    for _ in range(8):
        losses = loop.losses(model, images, targets, cross_entropy)
        losses["loss"].backward()
        optimizer.step()
        optimizer.zero_grad()
        history.append(losses["standard"].item())
    assert history[-1] < history[0]
    after = [parameter.clone() for parameter in model.mechanism.parameters()]
    model.mechanism.project_()
    assert all(torch.equal(*pair) for pair in zip(after, model.mechanism.parameters(), strict=True))


def test_checkpoint_round_trip_is_bit_equal(name, model, images, targets, tmp_path):
    model.eval()
    loaded = timm_csg.from_pretrained(timm_csg.save_pretrained(model, tmp_path))
    expected, found = model(images, targets, paths=BOTH), loaded(images, targets, paths=BOTH)
    assert torch.equal(found.standard, expected.standard)
    assert torch.equal(found.gated, expected.gated)


def test_config_that_belongs_to_no_mechanism_is_refused(name, tiny_model):
    @dataclass(frozen=True, kw_only=True)
    class StrayConfig(MechanismConfig):
        pass

    with pytest.raises(ValueError, match="StrayConfig belongs to no registered mechanism"):
        timm_csg.differentiate(tiny_model, mechanism=StrayConfig())
