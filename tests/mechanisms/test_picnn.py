"""The interpretation pathway against its formulas, literally; its draws, its owners, and what a short training does."""

import math

import pytest
import timm
import torch
from reference import picnn as reference
from sklearn.datasets import load_digits
from torch.nn.functional import cross_entropy, linear

import timm_csg
from timm_csg import InterpretationPathway, PICNNConfig, measuring, metrics
from timm_csg.mechanisms import Head, picnn
from timm_csg.mechanisms.picnn import draw_classes, draw_filters, interpretation_loss

CLASSES, FILTERS, BATCH = 3, 5, 8


def make(num_filters=FILTERS, num_classes=CLASSES, **options):
    torch.manual_seed(0)
    return InterpretationPathway(num_filters, num_classes, PICNNConfig(**options)).double()


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def uniform(*shape, seed=0):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def linear_head(weight, bias):
    """A head that pools by the mean."""
    return Head("linear", lambda x: linear(x.mean((2, 3)), weight, bias), lambda x: x.mean((2, 3)), weight, bias, True)


@pytest.fixture
def case(monkeypatch):
    """A batch with its noise, of whose pictures some have their class drawn and some have not."""
    weight, bias = random(CLASSES, FILTERS, seed=1), random(CLASSES, seed=2)
    pooled, targets = random(BATCH, FILTERS, seed=3).abs(), torch.arange(BATCH) % CLASSES
    noise = [uniform(BATCH, CLASSES, seed=4), uniform(BATCH, FILTERS, seed=5)]
    waiting = []

    def next_noise(like):
        if not waiting:
            waiting.extend(noise)
        return waiting.pop(0)

    monkeypatch.setattr(picnn, "_uniform", next_noise)
    return weight.requires_grad_(), bias, pooled.requires_grad_(), targets, noise


# Formulas


def test_probabilities_are_the_softmax_over_classes():
    mechanism = make()
    expected = torch.tensor(reference.table(mechanism.correspondence.tolist()), dtype=torch.float64)
    torch.testing.assert_close(mechanism.probabilities(), expected)
    torch.testing.assert_close(mechanism.probabilities().sum(dim=0), torch.ones(FILTERS, dtype=torch.float64))


def test_loss_and_straight_through_gradients_are_those_of_the_loops(case):
    weight, bias, pooled, targets, noise = case
    mechanism = make().train()
    features = pooled[:, :, None, None].expand(-1, -1, 2, 2)
    found = mechanism.losses(features, targets, linear_head(weight, bias))["interpretation"]
    found.backward()
    lists = [tensor.tolist() for tensor in (pooled, weight, bias, mechanism.correspondence, targets, *noise)]
    value, to_table, to_weight, to_pooled = reference.straight_through(*lists)
    drawn = draw_classes(linear(pooled, weight, bias), noise[0]).argmax(dim=1)
    assert 0 < int((drawn == targets).sum()) < BATCH
    assert found.item() == pytest.approx(value)
    for gradient, expected in ((mechanism.correspondence, to_table), (weight, to_weight), (pooled, to_pooled)):
        torch.testing.assert_close(gradient.grad, torch.tensor(expected, dtype=torch.float64))


def test_gated_logits_are_those_of_the_filters_that_stay(case):
    weight, bias, pooled, targets, noise = case
    mechanism = make().train()
    found = mechanism.gated_logits(pooled[:, :, None, None], targets, linear_head(weight, bias))
    table = reference.table(mechanism.correspondence.tolist())
    for n in range(BATCH):
        c = reference.drawn_class(linear(pooled, weight, bias)[n].tolist(), noise[0][n].tolist())
        kept = reference.mask(table[c], noise[1][n].tolist())
        shown = [value * mask for value, mask in zip(pooled[n].tolist(), kept, strict=True)]
        assert found[n].tolist() == pytest.approx(reference.logits(shown, weight.tolist(), bias.tolist()))


def test_relaxed_draws_have_their_exact_gradient():
    logits, probabilities = random(2, CLASSES).requires_grad_(), (0.1 + 0.8 * uniform(2, FILTERS)).requires_grad_()
    noise = 0.1 + 0.8 * uniform(2, FILTERS, seed=1)
    assert torch.autograd.gradcheck(lambda q: draw_filters(q, noise, temperature=0.5), (probabilities,))
    noise = 0.1 + 0.8 * uniform(2, CLASSES, seed=1)
    assert torch.autograd.gradcheck(lambda z: draw_classes(z, noise, temperature=0.5), (logits,))


def test_relaxed_draws_are_the_hard_ones_in_the_limit():
    logits, probabilities = random(50, CLASSES), uniform(50, FILTERS)
    for draw, values, noise in (
        (draw_classes, logits, uniform(50, CLASSES, seed=1)),
        (draw_filters, probabilities, uniform(50, FILTERS, seed=1)),
    ):
        torch.testing.assert_close(draw(values, noise, 1e-5), draw(values, noise), rtol=0, atol=1e-4)


def test_draws_have_the_probabilities_they_claim():
    logits, probabilities = torch.tensor([[0.0, 1.0, 2.0]]).double(), torch.tensor([[0.05, 0.5, 0.9]]).double()
    classes = draw_classes(logits.expand(40000, -1), uniform(40000, 3)).mean(dim=0)
    filters = draw_filters(probabilities.expand(40000, -1), uniform(40000, 3)).mean(dim=0)
    torch.testing.assert_close(classes, logits[0].softmax(dim=0), rtol=0, atol=0.01)
    torch.testing.assert_close(filters, probabilities[0], rtol=0, atol=0.01)


# Which pictures count


def test_without_a_class_drawn_right_there_is_nothing_to_learn():
    logits = random(2, CLASSES).requires_grad_()
    loss = interpretation_loss(logits, torch.tensor([0, 1]), torch.tensor([1, 2]))
    loss.backward()
    assert loss.item() == 0
    assert not logits.grad.any()


@pytest.mark.parametrize("kind", ["one-hot", "multi-hot", "soft"])
def test_pictures_weigh_with_the_share_of_the_drawn_class(kind):
    logits, drawn = random(3, CLASSES), torch.tensor([0, 1, 2])
    rows = {
        "one-hot": [[1.0, 0.0, 0.0], [1.0, 0.0, 0.0], [0.0, 0.0, 1.0]],
        "multi-hot": [[1.0, 1.0, 0.0], [0.0, 0.0, 0.0], [1.0, 1.0, 1.0]],
        "soft": [[0.6, 0.4, 0.0], [0.9, 0.0, 0.1], [0.0, 0.7, 0.3]],
    }[kind]
    shares = [row[c] for row, c in zip(rows, drawn.tolist(), strict=True)]
    losses = [-math.log(reference.softmax(z)[c]) for z, c in zip(logits.tolist(), drawn.tolist(), strict=True)]
    expected = math.fsum(s * loss for s, loss in zip(shares, losses, strict=True)) / math.fsum(shares)
    assert interpretation_loss(logits, drawn, torch.tensor(rows)).item() == pytest.approx(expected)


def test_label_does_not_enter_the_pathway(make_model, images):
    model = timm_csg.differentiate(make_model(), mechanism="picnn")
    gated = model(images, paths=("gated",)).gated
    for targets in (torch.tensor([0, 3, 4]), torch.tensor([1, 1, 1])):
        assert torch.equal(model(images, targets), gated)


# Evaluation, the fixed table, numbers at the edge


def test_in_evaluation_filters_keep_their_probability_for_the_predicted_class():
    weight, bias, pooled = random(CLASSES, FILTERS), random(CLASSES, seed=1), random(BATCH, FILTERS, seed=2).abs()
    mechanism = make().eval()
    found = mechanism.gated_logits(pooled[:, :, None, None], None, linear_head(weight, bias))
    predicted = linear(pooled, weight, bias).argmax(dim=1)
    torch.testing.assert_close(found, linear(pooled * mechanism.probabilities()[predicted], weight, bias))
    again = mechanism.gated_logits(pooled[:, :, None, None], None, linear_head(weight, bias))
    assert torch.equal(again, found)


def test_fixed_table_deals_filters_out_in_turn_and_learns_nothing(make_model, images, targets):
    mechanism = make(table="fixed")
    expected = [[1, 0, 0, 1, 0], [0, 1, 0, 0, 1], [0, 0, 1, 0, 0]]
    assert mechanism.probabilities().tolist() == mechanism.class_filter_matrix().tolist() == expected
    assert not list(mechanism.parameters())
    model = timm_csg.differentiate(make_model(), mechanism="picnn", table="fixed")
    first, second = (model.train()(images, targets, paths=("gated",)).gated for _ in range(2))
    assert first.shape == second.shape == (3, 5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_fixed_table_is_exact_in_any_precision(dtype):
    table = make(table="fixed").to(dtype).probabilities()
    assert table.unique().tolist() == [0.0, 1.0]


def test_fixed_table_wants_a_filter_for_every_class():
    with pytest.raises(ValueError, match=r"there are 2 filters for 3 classes; use table='learned'"):
        make(num_filters=2, table="fixed")
    assert make(num_filters=2).class_filter_matrix().shape == (3, 2)


@pytest.mark.parametrize("noise", [0.0, 1.0])
@pytest.mark.parametrize("sampling", ["straight_through", "concrete"])
def test_extreme_noise_gives_finite_draws(make_model, images, targets, monkeypatch, noise, sampling):
    model = timm_csg.differentiate(make_model(), mechanism="picnn", sampling=sampling).train()
    monkeypatch.setattr(torch, "rand_like", lambda like: torch.full_like(like, noise))
    outputs = model(images, targets, paths=("gated",))
    outputs.losses["interpretation"].backward()
    assert outputs.gated.isfinite().all()
    assert model.mechanism.correspondence.grad.isfinite().all()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"table": "blind"}, "table .* 'blind'"),
        ({"sampling": "gumbel"}, "sampling .* 'gumbel'"),
        ({"temperature": 0}, "temperature must be more than 0, but is 0"),
        ({"interpretation_weight": -1}, "interpretation_weight .* -1"),
    ],
)
def test_config_names_the_wrong_value(options, words):
    with pytest.raises(ValueError, match=words):
        PICNNConfig(**options)


# Owners


def test_every_filter_has_one_owner_at_full_strength():
    mechanism = make()
    matrix = mechanism.class_filter_matrix()
    assert (matrix.amax(dim=0) == 1).all()
    assert torch.equal(metrics.owners(matrix), mechanism.probabilities().argmax(dim=0))


@pytest.mark.parametrize("sampling", ["straight_through", "concrete"])
def test_short_training_makes_filters_of_their_owners(sampling):
    digits = load_digits(n_class=3)
    images = torch.tensor(digits.images, dtype=torch.float32)[:480, None] / 16
    images, targets = torch.nn.functional.interpolate(images, size=32), torch.tensor(digits.target[:480])
    torch.manual_seed(0)
    model = timm.create_model("test_resnet", num_classes=3, in_chans=1)
    model = timm_csg.differentiate(model, mechanism="picnn", sampling=sampling).train()
    before = model.mechanism.probabilities().amax(dim=0).mean()
    loop = timm_csg.TrainingMixin()
    loop.schedule = timm_csg.Joint()
    optimizer = torch.optim.SGD(timm_csg.param_groups(model, lr=0.02, gate_lr=0.5), lr=0.02, momentum=0.9)
    loop.attach(optimizer, model)
    for _ in range(12):
        for batch in torch.randperm(480).split(60):
            optimizer.zero_grad()
            loop.losses(model, images[batch], targets[batch], cross_entropy)["loss"].backward()
            optimizer.step()
    seen = measuring.collect(model.eval(), [(images, targets)])
    mutual = metrics.mutual_information(seen.features, targets, num_classes=3)
    gate = model.mechanism.class_filter_matrix()
    removed = measuring.ablate(model, [(images, targets)], metrics.owners(gate), num_classes=3)
    assert float((seen.logits.argmax(dim=1) == targets).float().mean()) > 0.95
    assert float((seen.gated_logits.argmax(dim=1) == targets).float().mean()) > 0.95
    assert model.mechanism.probabilities().amax(dim=0).mean() > before + 0.1
    assert metrics.owner_agreement(gate, mutual) > 2 / 3  # a third by chance
    assert removed.own < 2 / 3  # without a class's own filters; 1 before
