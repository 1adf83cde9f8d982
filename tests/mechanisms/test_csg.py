"""The class-specific gate against the paper, literally; and its invariants for any gate."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import csg as reference

from timm_csg import ClassSpecificGate, CSGConfig
from timm_csg.mechanisms.csg import project_gate_, sparsity_loss
from timm_csg.mechanisms.targets import class_rows, target_rows

ENTRIES = st.floats(-3, 3, width=32) | st.sampled_from([0.0, -0.0, 1.0, 1e-30, -1e-30, 1e30, float("nan")])


@st.composite
def gates(draw, entries=ENTRIES):
    """Gates [classes, filters] as lists of rows, 1 to 5 classes and filters."""
    num_filters = draw(st.integers(1, 5))
    return draw(st.lists(st.lists(entries, min_size=num_filters, max_size=num_filters), min_size=1, max_size=5))


def make(num_filters=6, num_classes=4, **options):
    return ClassSpecificGate(num_filters, num_classes, CSGConfig(**options))


# Projection


@given(gates())
def test_projection_equals_the_literal_steps(gate):
    found = project_gate_(torch.tensor(gate))
    torch.testing.assert_close(found, torch.tensor(reference.projected(gate)), rtol=1e-6, atol=0)


@given(gates(ENTRIES | st.sampled_from([float("inf"), -float("inf")])))
def test_projected_gate_lies_in_0_to_1_and_every_filter_reaches_exactly_1(gate):
    found = project_gate_(torch.tensor(gate))
    assert ((found >= 0) & (found <= 1)).all()
    assert (found.amax(dim=0) == 1).all()


@given(gates())
def test_projecting_twice_changes_nothing(gate):
    once = project_gate_(torch.tensor(gate))
    assert torch.equal(project_gate_(once.clone()), once)


@given(gates(st.floats(0.0009765625, 1, width=32)), st.sampled_from([0.25, 0.5, 2.0, 1024.0]))
def test_projection_ignores_the_scale_of_a_positive_filter(gate, scale):
    assert torch.equal(project_gate_(scale * torch.tensor(gate)), project_gate_(torch.tensor(gate)))


def test_projection_runs_over_classes_not_filters():
    gate = torch.tensor([[0.2, 0.1, 0.4], [0.1, 0.2, 0.1]])
    assert project_gate_(gate).amax(dim=0).tolist() == [1.0, 1.0, 1.0]
    assert gate[1].tolist() == [0.5, 1.0, 0.25]


@pytest.mark.parametrize(
    ("column", "expected"),
    [
        ([-1.0, -2.0], [1.0, 0.0]),
        ([0.0, 0.0], [1.0, 1.0]),
        ([0.0, -1.0], [1.0, 0.0]),
        ([math.nan, 0.5], [0.0, 1.0]),
        ([math.nan, math.nan], [1.0, 1.0]),
        ([2.0, -1.0], [1.0, 0.0]),
    ],
)
def test_filter_without_a_positive_entry_keeps_its_least_negative_class(column, expected):
    assert project_gate_(torch.tensor(column)[:, None])[:, 0].tolist() == expected


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_projection_is_exact_in_any_precision(dtype):
    gate = torch.rand(7, 50, generator=torch.Generator().manual_seed(0)).to(dtype)
    assert (project_gate_(gate).amax(dim=0) == 1).all()
    assert gate.dtype == dtype


def test_projection_is_in_place_and_leaves_no_gradient():
    mechanism = make()
    mechanism.project_()
    assert torch.equal(mechanism.gate, torch.ones(4, 6))
    assert mechanism.gate.requires_grad
    assert mechanism.gate.grad is None
    assert mechanism.gate.is_leaf


# Sparsity


@given(gates(st.floats(-3, 3, width=32)), st.floats(1, 5), st.sampled_from(["l1", "l2", "smooth_l1"]))
def test_sparsity_equals_the_literal_formula(gate, classes_per_filter, norm):
    found = sparsity_loss(torch.tensor(gate), classes_per_filter, norm)
    assert float(found) == pytest.approx(reference.sparsity(gate, classes_per_filter, norm), rel=1e-4, abs=1e-4)


@given(gates(st.floats(0, 1, width=32)), st.floats(1, 3))
def test_l1_sparsity_is_the_papers_term(gate, classes_per_filter):
    bound = classes_per_filter * len(gate[0])
    found = sparsity_loss(torch.tensor(gate), classes_per_filter)
    assert float(found) == pytest.approx(reference.paper_sparsity(gate, bound), rel=1e-4, abs=1e-4)


def test_default_bound_is_the_authors_fifth_of_all_entries():
    mechanism = make(num_filters=64, num_classes=10)
    found = sparsity_loss(mechanism.gate, mechanism.classes_per_filter)
    assert found.item() == pytest.approx(reference.paper_sparsity(mechanism.gate.tolist(), 0.2 * 64 * 10))
    assert found.item() == pytest.approx(192)


@pytest.mark.parametrize(("num_classes", "expected"), [(10, 2.0), (100, 20.0), (3, 1.0), (1, 1.0)])
def test_default_bound_is_never_below_one_class_per_filter(num_classes, expected):
    assert make(num_classes=num_classes).classes_per_filter == expected


@pytest.mark.parametrize("norm", ["l1", "l2", "smooth_l1"])
def test_feasible_gate_within_the_bound_costs_nothing_and_pulls_nothing(norm):
    gate = torch.eye(4).repeat(1, 3).requires_grad_()
    loss = sparsity_loss(gate, 1.0, norm)
    loss.backward()
    assert loss.item() == 0
    assert not gate.grad.any()


@pytest.mark.parametrize("norm", ["l1", "l2", "smooth_l1"])
def test_pull_on_an_entry_is_the_same_for_any_number_of_filters(norm):
    pulls = []
    for num_filters in (3, 300):
        gate = torch.full((4, num_filters), 0.5, requires_grad=True)
        sparsity_loss(gate, 1.2, norm).backward()
        pulls.append(gate.grad[0, 0].item())
    assert pulls[0] == pytest.approx(pulls[1], rel=1e-4)
    assert pulls[0] > 0


def test_l1_pulls_with_one_per_entry():
    gate = torch.full((4, 5), 0.5, requires_grad=True)
    sparsity_loss(gate, 1.0).backward()
    torch.testing.assert_close(gate.grad, torch.ones(4, 5))


@pytest.mark.parametrize("norm", ["l1", "l2", "smooth_l1"])
def test_gradient_of_the_sparsity_term_is_correct(norm):
    gate = (0.1 + torch.rand(3, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))).requires_grad_()
    assert torch.autograd.gradcheck(lambda gate: sparsity_loss(gate, 1.0, norm), (gate,))


# Rows


@given(gates(st.floats(0, 1, width=32)), st.data())
def test_row_of_an_index_is_that_row(gate, data):
    targets = torch.tensor(data.draw(st.lists(st.integers(0, len(gate) - 1), min_size=1, max_size=6)))
    expected = torch.tensor([reference.row(torch.tensor(gate), target) for target in targets])
    torch.testing.assert_close(target_rows(torch.tensor(gate), targets), expected, rtol=0, atol=0)


@given(gates(st.floats(0, 1, width=32)), st.data())
def test_row_of_several_classes_is_the_strongest(gate, data):
    rows = st.lists(st.integers(0, 1), min_size=len(gate), max_size=len(gate))
    targets = torch.tensor(data.draw(st.lists(rows, min_size=1, max_size=6)))
    expected = torch.tensor([reference.row(torch.tensor(gate), target) for target in targets])
    for form in (targets, targets.bool(), targets.float()):
        torch.testing.assert_close(target_rows(torch.tensor(gate), form), expected, rtol=0, atol=0)


@given(gates(st.floats(0, 1, width=32)), st.data())
def test_row_of_soft_targets_is_the_mixture(gate, data):
    raw = data.draw(st.lists(st.floats(0.01, 1), min_size=len(gate), max_size=len(gate)))
    targets = (torch.tensor(raw) / sum(raw))[None]
    expected = torch.tensor([reference.row(torch.tensor(gate), targets[0])])
    torch.testing.assert_close(target_rows(torch.tensor(gate), targets), expected)


def test_soft_and_multi_hot_rows_may_share_a_batch():
    gate = torch.tensor([[1.0, 0.0], [0.5, 1.0]])
    targets = torch.tensor([[0.5, 0.5], [1.0, 1.0], [1.0, 0.0], [0.0, 0.0]])
    assert target_rows(gate, targets).tolist() == [[0.75, 0.5], [1.0, 1.0], [1.0, 0.0], [0.0, 0.0]]


@pytest.mark.parametrize("targets", [[2, 0], [[0.5, 0.5, 0.0], [1.0, 0.0, 1.0]], [[1, 0, 1], [0, 0, 0]]])
def test_rows_of_classes_are_those_of_the_unit_matrix(targets):
    targets = torch.tensor(targets)
    assert torch.equal(class_rows(targets, 3, torch.float64), target_rows(torch.eye(3).double(), targets))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_soft_targets_in_low_precision_are_still_soft(dtype):
    targets = torch.full((1, 10), 0.1).to(dtype)
    torch.testing.assert_close(target_rows(torch.ones(10, 3), targets), torch.ones(1, 3), rtol=1e-2, atol=0)


@settings(deadline=None)
@given(st.sampled_from([(2, 6, 3, 3), (2, 5, 6)]), st.booleans(), st.integers(0, 100))
def test_gated_features_equal_the_literal_loop(shape, channels_last, seed):
    generator = torch.Generator().manual_seed(seed)
    features = torch.randn(shape, generator=generator)
    layout = "NLC" if len(shape) == 3 else "NHWC" if channels_last else "NCHW"
    features = features.permute(0, 2, 3, 1) if layout == "NHWC" else features
    mechanism = ClassSpecificGate(6, 4, CSGConfig(), channels_last=channels_last)
    torch.nn.init.uniform_(mechanism.gate, generator=generator)
    targets = torch.randint(0, 4, (2,), generator=generator)
    expected = reference.gated_features(features, mechanism.gate, targets, layout)
    torch.testing.assert_close(mechanism(features, targets), expected)


# Config


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"sparsity_norm": "l3"}, "sparsity_norm .* 'l3'"),
        ({"gated_weight": -1}, "gated_weight .* -1"),
        ({"gated_weight": True}, "gated_weight .* True"),
        ({"sparsity_weight": math.nan}, "sparsity_weight .* nan"),
        ({"sparsity_weight": math.inf}, "sparsity_weight .* inf"),
        ({"sparsity_weight": "1e-3"}, "sparsity_weight .* '1e-3'"),
        ({"initial_gate": 1.5}, r"initial_gate .* between 0 and 1, but is 1\.5"),
        ({"classes_per_filter": 0.5}, r"classes_per_filter .* 1 or more, but is 0\.5"),
    ],
)
def test_config_names_the_wrong_value(options, words):
    with pytest.raises(ValueError, match=words):
        CSGConfig(**options)


def test_bound_above_the_number_of_classes_is_refused():
    with pytest.raises(ValueError, match=r"between 1 and the 4 classes, but is 4\.5"):
        make(classes_per_filter=4.5)


def test_defaults_are_the_papers():
    config = CSGConfig()
    assert (config.initial_gate, config.gated_weight, config.sparsity_weight) == (0.5, 1.0, 1e-3)
    assert (config.sparsity_norm, config.classes_per_filter) == ("l1", None)


def test_class_filter_matrix_is_clipped_detached_and_shaped_classes_by_filters():
    mechanism = make()
    with torch.no_grad():
        mechanism.gate[0, 0], mechanism.gate[1, 1] = -0.5, 1.5
    matrix = mechanism.class_filter_matrix()
    assert matrix.shape == (4, 6)
    assert not matrix.requires_grad
    assert (matrix[0, 0], matrix[1, 1], matrix[2, 2]) == (0, 1, 0.5)
