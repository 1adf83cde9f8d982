"""differentiate: the standard path, the gated path, targets, and the way back."""

import copy

import pytest
import timm
import torch
import torch.nn.functional as F
from reference import csg as reference
from torch import nn

import timm_csg
from timm_csg import PathOutputs
from timm_csg.mechanisms.blind import blind_assignment

BOTH = ("standard", "gated")
LAYOUTS = {"test_resnet": "NCHW", "test_convnext": "NCHW", "test_mambaout": "NHWC", "test_vit": "NLC"}


@pytest.fixture(params=LAYOUTS)
def name(request):
    return request.param


def count_backbone_passes(model, monkeypatch):
    """A list that grows with every call of the model's forward_features."""
    calls, backbone = [], model.forward_features
    monkeypatch.setattr(model, "forward_features", lambda *args, **kwargs: calls.append(1) or backbone(*args, **kwargs))
    return calls


# The standard path


@pytest.mark.parametrize("mechanism", ["csg", "assigned"])
@pytest.mark.parametrize("training", [False, True])
def test_standard_path_is_bit_equal_to_plain_timm(any_model, images, gated, mechanism, training):
    plain = copy.deepcopy(any_model).train(training)
    model = gated(timm_csg.differentiate(any_model.train(training), mechanism=mechanism))
    assert torch.equal(model(images), plain(images))
    plain.load_state_dict({key: value for key, value in model.state_dict().items() if not key.startswith("mechanism.")})
    assert torch.equal(model(images, paths=("standard",)).standard, plain(images))


def test_two_halves_called_by_hand_are_bit_equal_to_plain_timm(any_model, images, gated):
    expected = any_model(images)
    model = gated(timm_csg.differentiate(any_model, mechanism="csg"))
    assert torch.equal(model.forward_head(model.forward_features(images)), expected)


def test_pre_logits_without_targets_are_those_of_plain_timm(any_model, images, gated):
    expected = any_model.forward_head(any_model.forward_features(images), pre_logits=True)
    model = gated(timm_csg.differentiate(any_model, mechanism="csg"))
    assert torch.equal(model.forward_head(model.forward_features(images), pre_logits=True), expected)


def test_standard_gradients_are_bit_equal_to_plain_timm(any_model, images, targets):
    plain = copy.deepcopy(any_model)
    model = timm_csg.differentiate(any_model, mechanism="csg")
    for each in (plain, model):
        F.cross_entropy(each(images), targets).backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    assert gradients.pop("mechanism.gate") is None
    assert all(torch.equal(gradients[name], parameter.grad) for name, parameter in plain.named_parameters())


# The gated path


@pytest.mark.parametrize("training", [False, True])
def test_gate_of_ones_leaves_logits_unchanged(any_model, images, targets, training):
    plain = copy.deepcopy(any_model).train(training)
    model = timm_csg.differentiate(any_model, initial_gate=1.0, mechanism="csg").train(training)
    assert torch.equal(model(images, targets), plain(images))


def test_gate_of_zeros_leaves_only_the_bias(tiny_model, images, targets):
    model = timm_csg.differentiate(tiny_model, initial_gate=0.0, mechanism="csg")
    assert torch.equal(model(images, targets), model.fc.bias.expand(3, -1))


def soft(targets):
    return 0.9 * F.one_hot(targets, 5).float() + 0.02


def multi_hot(targets):
    return torch.tensor([[1, 0, 1, 0, 0], [0, 0, 0, 1, 0], [1, 1, 0, 0, 1]])


FORMS_OF_TARGETS = {
    "indices": lambda targets: targets,
    "int32 indices": lambda targets: targets.int(),
    "soft": soft,
    "one-hot": lambda targets: F.one_hot(targets, 5),
    "multi-hot": multi_hot,
    "float multi-hot": lambda targets: multi_hot(targets).float(),
    "bool multi-hot": lambda targets: multi_hot(targets).bool(),
}


@pytest.mark.parametrize("form", FORMS_OF_TARGETS)
def test_gated_path_is_the_plain_head_on_gated_features(make_model, name, images, targets, gated, form):
    model = gated(timm_csg.differentiate(make_model(name), mechanism="csg"))
    given = FORMS_OF_TARGETS[form](targets)
    seen = reference.gated_features(model.forward_features(images), model.mechanism.gate, given, LAYOUTS[name])
    torch.testing.assert_close(model(images, given), model.forward_head(seen))


@pytest.mark.parametrize("form", ["soft", "one-hot"])
def test_one_hot_and_indices_say_the_same(tiny_model, images, targets, gated, form):
    model = gated(timm_csg.differentiate(tiny_model, mechanism="csg"))
    assert torch.equal(model(images, F.one_hot(targets, 5).float()), model(images, targets))


def test_gate_gets_gradient_only_in_the_rows_of_the_batch(any_model, images):
    model = timm_csg.differentiate(any_model, mechanism="csg")
    F.cross_entropy(model(images, torch.tensor([3, 3, 1])), torch.tensor([3, 3, 1])).backward()
    touched = model.mechanism.gate.grad.abs().sum(dim=1) > 0
    assert touched.tolist() == [False, True, False, True, False]


def test_gated_pre_logits_see_the_gate(tiny_model, images, targets, gated):
    model = gated(timm_csg.differentiate(tiny_model, mechanism="csg"))
    features = model.forward_features(images)
    plain = model.forward_head(features, pre_logits=True)
    torch.testing.assert_close(
        model.forward_head(features, targets=targets, pre_logits=True), plain * model.mechanism.gate[targets]
    )


@pytest.mark.parametrize(
    ("targets", "error", "words"),
    [
        ([0, 1, 2], TypeError, "tensor.*list"),
        (torch.ones(3, 5, dtype=torch.complex64), TypeError, "tensor of class indices"),
        (
            torch.tensor([0, 1, 5]),
            ValueError,
            r"below 5, but the largest is 5; pass num_classes=6 to differentiate\(\)",
        ),
        (torch.tensor([0, -1, 2]), ValueError, "from 0 to 4, but the smallest is -1"),
        (torch.tensor([0.0, 1.0, 2.0]), ValueError, r"integer class indices.*float32 of shape \[3\]"),
        (torch.tensor([True, False, True]), ValueError, r"integer class indices.*bool of shape \[3\]"),
        (torch.zeros(3, 4), ValueError, r"rows \[batch, 5\].*float32 of shape \[3, 4\]"),
        (torch.zeros(3, 1, dtype=torch.long), ValueError, r"int64 of shape \[3, 1\]"),
        (torch.zeros(3, 5, 1), ValueError, r"float32 of shape \[3, 5, 1\]"),
        (torch.tensor(2), ValueError, r"int64 of shape \[\]"),
        (torch.tensor([0, 1]), ValueError, "3 images but 2 targets"),
        (torch.full((2, 5), 0.2), ValueError, "3 images but 2 targets"),
        (torch.full((3, 5), -1.0), ValueError, "reach from -1 to -1.*not logits"),
        (torch.full((3, 5), 3), ValueError, "reach from 3 to 3"),
        (torch.full((3, 5), 0.5), ValueError, r"row 0 of targets sums to 2\.5.*normalise"),
        (torch.full((3, 5), float("nan")), ValueError, "rows of targets must lie in"),
    ],
)
def test_wrong_targets_are_named_with_what_was_found(tiny_model, images, targets, error, words):
    model = timm_csg.differentiate(tiny_model, mechanism="csg")
    with pytest.raises(error, match=words):
        model(images, targets)


def test_empty_batch_gives_empty_logits(tiny_model):
    model = timm_csg.differentiate(tiny_model, mechanism="csg")
    assert model(torch.rand(0, 3, 64, 64), torch.zeros(0, dtype=torch.long)).shape == (0, 5)


def test_label_gate_asks_for_the_targets_it_needs(tiny_model, images):
    model = timm_csg.differentiate(tiny_model, mechanism="csg")
    with pytest.raises(ValueError, match=r"needs targets.*model\(images, targets\).*mechanism='assigned'"):
        model(images, paths=BOTH)


@pytest.mark.parametrize("paths", [(), ("gate",), ("standard", "both"), "gated"])
def test_unknown_paths_are_named(tiny_model, images, targets, paths):
    model = timm_csg.differentiate(tiny_model, mechanism="csg")
    with pytest.raises(ValueError, match=r"one or both of \('standard', 'gated'\)"):
        model(images, targets, paths=paths)


# Both paths


@pytest.mark.parametrize("mechanism", ["csg", "assigned"])
def test_both_paths_take_one_backbone_pass(any_model, images, targets, gated, mechanism, monkeypatch):
    model = gated(timm_csg.differentiate(any_model, mechanism=mechanism))
    expected = PathOutputs(model(images), model(images, targets), {})
    calls = count_backbone_passes(model, monkeypatch)
    found = model(images, targets, paths=BOTH)
    assert len(calls) == 1
    assert torch.equal(found.standard, expected.standard)
    assert torch.equal(found.gated, expected.gated)
    assert set(found.losses) == {"sparsity" if mechanism == "csg" else "solo"}


def test_only_the_paths_asked_for_are_computed(tiny_model, images, targets):
    model = timm_csg.differentiate(tiny_model, mechanism="csg")
    standard, gated = model(images, targets, paths=("standard",)), model(images, targets, paths=("gated",))
    assert standard.gated is None
    assert standard.losses == {}
    assert gated.standard is None
    assert set(gated.losses) == {"sparsity"}


def test_calling_with_targets_returns_logits_as_every_timm_model_does(tiny_model, images, targets):
    model = timm_csg.differentiate(tiny_model, mechanism="csg")
    assert isinstance(model(images), torch.Tensor)
    assert isinstance(model(images, targets), torch.Tensor)
    assert isinstance(model(images, targets, paths=BOTH), PathOutputs)


# A gated path without labels


def test_logits_of_assigned_filters_ignore_the_targets(any_model, images, targets, gated):
    model = gated(timm_csg.differentiate(any_model, mechanism="assigned"))
    without = model(images, paths=("gated",)).gated
    assert torch.equal(model(images, targets), without)
    assert torch.equal(model(images, (targets + 1) % 5), without)


def test_gradient_of_both_paths_reaches_mechanism_backbone_and_classifier(any_model, images, targets, gated):
    model = gated(timm_csg.differentiate(any_model, mechanism="assigned"))
    found = model(images, targets, paths=BOTH)
    (F.cross_entropy(found.standard, targets) + F.cross_entropy(found.gated, targets)).backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    assert model.mechanism.scale.grad.abs().sum() > 0


def test_head_kind_does_not_depend_on_fresh_batch_norm_statistics():
    class NormThenLinear(timm.models.ResNet):
        """Pool → batch norm → linear, which looks linear without a bias only until the statistics move."""

        def forward_head(self, x, pre_logits=False):
            x = self.head_norm(self.global_pool(x))
            return x if pre_logits else self.fc(x)

    def build():
        model = timm.models.ResNet(timm.models.resnet.BasicBlock, [1, 1, 1, 1], channels=(8, 8, 8, 8), num_classes=5)
        model.__class__ = NormThenLinear
        model.head_norm = nn.BatchNorm1d(8)
        return model.eval()

    fresh = timm_csg.differentiate(build(), mechanism="assigned")
    trained = build()
    trained.head_norm.running_mean.fill_(0.3)
    trained.head_norm.bias.data.fill_(0.2)
    trained = timm_csg.differentiate(trained, mechanism="assigned")
    assert fresh.head_kind == trained.head_kind == "normed"


def test_norm_behind_the_pre_logits_is_not_taken_for_one_before_them():
    class LinearOfNorm(timm.models.ResNet):
        """Pool → (pre-logits) → batch norm → linear; a fresh norm changes nothing, so that it could be overlooked."""

        def forward_head(self, x, pre_logits=False):
            x = self.global_pool(x)
            return x if pre_logits else self.fc(self.head_norm(x))

    model = timm.models.ResNet(timm.models.resnet.BasicBlock, [1, 1, 1, 1], channels=(8, 8, 8, 8), num_classes=5)
    model.__class__ = LinearOfNorm
    model.head_norm = nn.BatchNorm1d(8)
    assert timm_csg.differentiate(model.eval()).head_kind == "pooled"


# What differentiate leaves alone


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("mechanism", ["csg", "assigned"])
def test_differentiating_leaves_weights_modes_grads_and_random_state(any_model, mechanism, training):
    any_model.train(training)
    first = next(any_model.parameters())
    first.grad = torch.ones_like(first)
    first.requires_grad_(False)
    next(any_model.children()).train(not training)
    before = copy.deepcopy(any_model.state_dict())
    modes = {name: module.training for name, module in any_model.named_modules()}
    rng = torch.random.get_rng_state()
    model = timm_csg.differentiate(any_model, mechanism=mechanism)
    assert torch.equal(torch.random.get_rng_state(), rng)
    after = {name: module.training for name, module in model.named_modules()}
    assert after.pop("mechanism") is training
    assert after == modes
    assert torch.equal(first.grad, torch.ones_like(first))
    assert not first.requires_grad
    assert [p.grad for p in model.parameters() if p is not first] == [None] * (len(list(model.parameters())) - 1)
    assert all(torch.equal(model.state_dict()[key], value) for key, value in before.items())


def test_same_object_comes_back_and_is_still_its_timm_class(any_model):
    plain_class = type(any_model)
    model = timm_csg.differentiate(any_model, mechanism="csg")
    assert model is any_model
    assert isinstance(model, plain_class)
    assert isinstance(model, timm_csg.DifferentiatedModel)
    assert timm_csg.is_differentiated(model)


def test_models_of_one_class_share_one_differentiated_class(make_model):
    first, second = (
        timm_csg.differentiate(make_model(), mechanism="csg"),
        timm_csg.differentiate(make_model(), mechanism="assigned"),
    )
    assert type(first) is type(second)
    assert type(first).__name__ == "ResNet"  # as timm's CheckpointSaver writes it, without args
    assert repr(first).startswith("DifferentiatedResNet(")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_mechanism_follows_the_models_dtype(tiny_model, dtype):
    assert timm_csg.differentiate(tiny_model.to(dtype), mechanism="csg").mechanism.gate.dtype == dtype


def test_differentiating_twice_is_refused_with_the_remedy(tiny_model):
    model = timm_csg.differentiate(tiny_model, mechanism="csg")
    with pytest.raises(ValueError, match=r"already differentiated \(mechanism 'csg'\); undifferentiate\(\) it first"):
        timm_csg.differentiate(model, mechanism="csg")


def test_attribute_of_the_same_name_is_refused(tiny_model):
    tiny_model.mechanism = nn.Identity()
    with pytest.raises(ValueError, match="already has an attribute 'mechanism'; rename"):
        timm_csg.differentiate(tiny_model, mechanism="csg")


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"mechanism": "cgs"}, ValueError, "unknown mechanism 'cgs'; known are assigned, chain, csg"),
        ({"mechanism": 3}, TypeError, "mechanism must be a name"),
        ({"beta": 4.0}, ValueError, "no option beta; its options are filters_per_class"),
        (
            {"mechanism": "csg", "sparsity_norm": "l3"},
            ValueError,
            "sparsity_norm must be one of 'l1', 'l2', 'smooth_l1', but is 'l3'",
        ),
        ({"num_classes": 0}, ValueError, "num_classes must be .* but is 0"),
        ({"num_classes": 2.0}, ValueError, r"num_classes must be .* but is 2\.0"),
        ({"mechanism": "csg", "classes_per_filter": 6.0}, ValueError, r"between 1 and the 5 classes, but is 6\.0"),
        ({"mechanism": timm_csg.CSGConfig(), "beta": 1}, ValueError, r"either a CSGConfig or options.*beta"),
    ],
)
def test_wrong_option_is_named_and_the_model_left_plain(tiny_model, options, error, words):
    with pytest.raises(error, match=words):
        timm_csg.differentiate(tiny_model, **options)
    assert type(tiny_model) is timm.models.ResNet
    assert tiny_model.num_classes == 5
    assert not hasattr(tiny_model, "mechanism")


# Number of classes


def test_number_of_classes_is_kept_unless_given(tiny_model):
    classifier = tiny_model.fc
    model = timm_csg.differentiate(tiny_model, mechanism="csg")
    assert model.fc is classifier
    assert model.mechanism.gate.shape == (5, 96)


def test_same_number_of_classes_keeps_the_classifier(tiny_model):
    classifier = tiny_model.fc
    assert timm_csg.differentiate(tiny_model, num_classes=5, mechanism="csg").fc is classifier


def test_other_number_of_classes_resets_the_classifier_with_a_log_line(any_model, images, caplog):
    with caplog.at_level("INFO", logger="timm_csg"):
        model = timm_csg.differentiate(any_model, num_classes=7, mechanism="csg")
    assert "from 5 to 7 classes" in caplog.text
    assert model.num_classes == 7
    assert model(images).shape == model(images, torch.tensor([0, 5, 6])).shape == (3, 7)


def test_model_without_classes_needs_a_number(make_model):
    model = make_model(num_classes=0)
    with pytest.raises(ValueError, match="but is 0; pass num_classes="):
        timm_csg.differentiate(model, mechanism="csg")
    assert timm_csg.differentiate(model, num_classes=3, mechanism="csg").mechanism.gate.shape == (3, 96)


@pytest.mark.parametrize("mechanism", ["csg", "assigned"])
def test_reset_classifier_makes_the_mechanism_anew(any_model, images, gated, mechanism):
    options = {"initial_gate": 0.25} if mechanism == "csg" else {"filters_per_class": 2}
    model = gated(timm_csg.differentiate(any_model, mechanism=mechanism, **options)).train()
    model.reset_classifier(9)
    model.eval()
    expected = torch.full((9, model.num_features), 0.25)
    if mechanism == "assigned":
        expected = blind_assignment(9, model.num_features, filters_per_class=2).float()
    assert torch.equal(model.mechanism.class_filter_matrix(), expected)
    assert model.mechanism.name == mechanism
    assert model(images, torch.tensor([0, 5, 8])).shape == (3, 9)


def test_reset_classifier_probes_the_head_again(tiny_model, images):
    model = timm_csg.differentiate(tiny_model, mechanism="assigned")
    model.reset_classifier(5, global_pool="catavgmax")
    assert model.head_kind == "map"
    assert model(images, paths=("gated",)).gated.shape == (3, 5)


def test_reset_classifier_to_no_classes_is_refused(tiny_model):
    model = timm_csg.differentiate(tiny_model, mechanism="csg")
    with pytest.raises(ValueError, match=r"needs classes, but num_classes=0; undifferentiate\(\) first"):
        model.reset_classifier(0)
    assert model.fc.out_features == 5


def test_refused_reset_leaves_the_model_as_it_was(tiny_model, images, targets):
    model = timm_csg.differentiate(tiny_model, classes_per_filter=4.0, mechanism="csg")
    expected = model(images, targets)
    with pytest.raises(ValueError, match="classes_per_filter"):
        model.reset_classifier(3)
    assert model.num_classes == 5
    assert torch.equal(model(images, targets), expected)


# The way back


@pytest.mark.parametrize("mechanism", ["csg", "assigned"])
def test_undifferentiate_is_the_exact_inverse(any_model, images, gated, mechanism):
    plain_class, expected = type(any_model), any_model(images)
    keys, attributes = list(any_model.state_dict()), set(vars(any_model))
    model = timm_csg.undifferentiate(gated(timm_csg.differentiate(any_model, mechanism=mechanism)))
    assert model is any_model
    assert type(model) is plain_class
    assert list(model.state_dict()) == keys
    assert set(vars(model)) == attributes
    assert torch.equal(model(images), expected)
    assert not timm_csg.is_differentiated(model)


def test_undifferentiated_model_can_be_differentiated_again(tiny_model):
    model = timm_csg.undifferentiate(timm_csg.differentiate(tiny_model, mechanism="csg"))
    assert timm_csg.differentiate(model, mechanism="assigned").mechanism.name == "assigned"


def test_undoing_a_plain_model_is_refused(tiny_model):
    with pytest.raises(ValueError, match="ResNet is not differentiated"):
        timm_csg.undifferentiate(tiny_model)


def test_plain_lends_timms_own_class_and_keys_and_gives_back_the_same_mechanism(any_model, images, gated):
    keys, plain_class = list(any_model.state_dict()), type(any_model)
    model = gated(timm_csg.differentiate(any_model, mechanism="csg"))
    mechanism, all_keys = model.mechanism, list(model.state_dict())
    with timm_csg.plain(model) as borrowed:
        assert borrowed is model
        assert type(borrowed) is plain_class
        assert list(borrowed.state_dict()) == keys
    assert model.mechanism is mechanism
    assert list(model.state_dict()) == all_keys
    assert timm_csg.is_differentiated(model)


def test_plain_gives_back_after_an_error(tiny_model):
    model = timm_csg.differentiate(tiny_model, mechanism="csg")
    with pytest.raises(KeyError), timm_csg.plain(model):
        raise KeyError
    assert timm_csg.is_differentiated(model)


def test_plain_lets_plain_models_through(tiny_model):
    with timm_csg.plain(tiny_model) as borrowed:
        assert borrowed is tiny_model
    assert type(tiny_model) is timm.models.ResNet


def test_plain_can_be_nested(tiny_model):
    model = timm_csg.differentiate(tiny_model, mechanism="csg")
    with timm_csg.plain(model), timm_csg.plain(model):
        assert type(model) is timm.models.ResNet
    assert timm_csg.is_differentiated(model)
