"""Interpretable filters against the paper's formulas, literally; their statistics, layouts and the chain with CSG."""

import math

import pytest
import timm
import torch
from reference import icnn as reference
from torch.nn.functional import cross_entropy

import timm_csg
from timm_csg import ICNNConfig, InterpretableFilters, measuring, metrics
from timm_csg.mechanisms.templates import (
    centre_of_gravity,
    information_terms,
    part_template,
    template_fits,
    template_table,
)
from timm_csg.peaks import peak

BOTH = ("standard", "gated")
GRIDS = pytest.mark.parametrize("grid", [(4, 4), (3, 5), (5, 3), (1, 1), (1, 4)])


def make(num_filters=3, num_classes=2, channels_last=False, **options):
    return InterpretableFilters(num_filters, num_classes, ICNNConfig(**options), channels_last=channels_last)


def sample(*shape, seed=0, dtype=torch.float64):
    """Maps with positive and negative values; as features of a stage that ends in ReLU take .relu()."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def losses(mechanism, maps, targets):
    return mechanism.losses(maps, targets, head=None)


def part_gradient(mechanism, maps, targets):
    """Gradient of the weighted sum of all filters' losses; the ReLU passes none where maps are 0."""
    maps = maps.clone().requires_grad_()
    (losses(mechanism, maps, targets)["part"] * mechanism._filter_weights().sum()).backward()
    return maps.grad


# Mask


@GRIDS
@pytest.mark.parametrize("beta", [0.0, 1.0, 4.0])
def test_mask_equals_the_literal_templates(grid, beta):
    features = sample(2, 3, *grid)
    torch.testing.assert_close(make(beta=beta)(features), reference.masked(features, beta))


def test_released_mask_sits_at_the_centre_of_gravity():
    features = sample(2, 3, 5, 5).relu()
    expected = reference.masked(features, beta=4.0 * 5 / 4, position=reference.centre)
    torch.testing.assert_close(make(variant="released")(features), expected, rtol=1e-6, atol=1e-7)


@GRIDS
def test_positions_are_those_of_the_loops(grid):
    maps = sample(4, 2, *grid).relu()
    peaks = torch.stack([peak(maps) // grid[1], peak(maps) % grid[1]], dim=-1)
    for found, literal in ((peaks, reference.peak), (torch.stack(centre_of_gravity(maps), dim=-1), reference.centre)):
        expected = [[literal(rows) for rows in image] for image in maps.tolist()]
        assert found.tolist() == [[list(at) for at in image] for image in expected]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("grid", [(7, 7), (10, 10), (6, 11), (45, 45)])
def test_peak_of_a_plateau_is_its_centre_as_in_the_loops(grid, dtype):
    smooth = torch.nn.functional.avg_pool2d(sample(1, 30, *grid), 3, stride=1, padding=1)
    maps = (20 * smooth).clamp(0, 6).to(dtype)  # as a ReLU6 cuts: plateaus of every size, in one piece or several
    maps[0, 0], maps[0, 1] = 6, 0
    with torch.autocast("cpu", dtype=torch.bfloat16):  # in which a matrix product would round
        found = peak(maps)
    expected = [reference.peak(rows) for rows in maps[0].tolist()]
    assert [divmod(at, grid[1]) for at in found[0].tolist()] == expected
    assert divmod(int(found[0, 0]), grid[1]) == ((grid[0] - 1) // 2, (grid[1] - 1) // 2)
    assert int(found[0, 1]) == 0
    values = maps[0].flatten(1).gather(1, found[0][:, None])[:, 0]
    assert torch.equal(values, maps[0].amax(dim=(1, 2)))


def test_mask_of_a_plateau_sits_in_its_middle():
    features = torch.zeros(1, 1, 5, 5)
    features[0, 0, 1:4, 1:4] = 6.0
    masked = make(num_filters=1)(features)[0, 0]
    assert masked[2, 2] == 6
    assert (masked.flatten() == 6).sum() == 1
    assert torch.equal(masked, masked.flip(0, 1))


def test_empty_map_stays_empty_and_has_a_finite_gradient():
    features = torch.zeros(2, 3, 4, 4, requires_grad=True)
    for variant in ("paper", "released"):
        make(variant=variant)(features).sum().backward()
        assert not make(variant=variant)(features).any()
    assert features.grad.isfinite().all()


def test_gradient_of_the_mask_is_the_mask_itself():
    features = sample(1, 1, 4, 4).relu().requires_grad_()
    make(num_filters=1)(features).sum().backward()
    expected = part_template(peak(features) // 4, peak(features) % 4, 4, 4, 4.0).clamp(min=0) * (features > 0)
    torch.testing.assert_close(features.grad, expected.double())


def test_layouts_give_the_same_numbers():
    features = sample(2, 3, 4, 4)
    expected = make()(features)
    nhwc = make(channels_last=True)(features.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
    tokens = make()(features.flatten(2).transpose(1, 2)).transpose(1, 2).unflatten(2, (4, 4))
    memory = make()(features.contiguous(memory_format=torch.channels_last))
    for found in (nhwc, tokens, memory):
        torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("mechanism", ["icnn", ["icnn", "csg"]])
@pytest.mark.parametrize(
    ("options", "found"),
    [
        ({"img_size": (48, 80)}, "has a class or register token"),  # 15 patches and a class token: 16, which is 4 x 4
        ({"img_size": (32, 128), "class_token": False, "global_pool": "avg"}, "has a grid of 2 x 8 tokens"),
    ],
)
def test_models_whose_tokens_only_count_like_a_square_are_refused_at_once(options, found, mechanism):
    model = timm.create_model("test_vit", num_classes=3, **options)
    with pytest.raises(ValueError, match=f"'icnn' needs maps, .* but VisionTransformer {found}; use a model without"):
        timm_csg.differentiate(model, 5, mechanism)
    assert model.num_classes == 3
    timm_csg.differentiate(model, 5, "csg")


def test_tokens_without_a_square_grid_are_refused():
    with pytest.raises(ValueError, match="needs maps, or tokens on a square grid, but there are 17 tokens"):
        make()(torch.rand(2, 17, 3))


@pytest.mark.parametrize("size", [64, 160])
@pytest.mark.parametrize("name", ["test_resnet", "test_convnext", "test_mambaout"])
def test_mask_acts_in_models_of_every_layout_and_size_of_map(name, size):
    model = timm_csg.differentiate(timm.create_model(name, num_classes=3), mechanism="icnn").eval()
    images = torch.rand(2, 3, size, size)
    features = model.forward_features(images)
    seen = model.mechanism(features)
    assert seen.shape == features.shape
    assert (seen >= 0).all()
    assert (seen != 0).sum() <= (features > 0).sum()
    assert (seen.amax() - features.amax()).abs() < 1e-6  # the strongest position keeps its value
    torch.testing.assert_close(model(images), model(images, paths=("gated",)).gated)


# Loss


@pytest.mark.parametrize("grid", [(4, 4), (3, 5), (1, 1)])
@pytest.mark.parametrize("strength", [0.5, 40.0])
def test_loss_and_its_gradient_equal_the_literal_formula(grid, strength):
    maps = sample(5, 2, *grid).relu()
    fits = template_fits(maps.flatten(2), template_table(*grid, 4.0).double(), strength)
    log_z = fits.logsumexp(dim=0) - math.log(5)
    leaf = maps.clone().requires_grad_()
    expected = reference.part_loss(leaf, 4.0, strength)
    expected.sum().backward()
    terms = information_terms(fits, log_z)
    torch.testing.assert_close(-terms.sum(dim=(0, 2)), expected.detach(), rtol=1e-6, atol=1e-9)
    slope = -strength / (grid[0] * grid[1]) * (terms[..., :-1] @ template_table(*grid, 4.0).double() - terms[..., -1:])
    torch.testing.assert_close(slope.unflatten(2, grid), leaf.grad, rtol=1e-5, atol=1e-10)


@pytest.mark.parametrize("chunk", [1, 2**20])
def test_mechanisms_first_batch_is_the_literal_loss(monkeypatch, chunk):
    monkeypatch.setattr("timm_csg.mechanisms.icnn._CHUNK", chunk)
    maps, targets = sample(4, 3, 7, 7).relu(), torch.tensor([0, 1, 0, 1])
    mechanism = make(strength=30.0).train()
    literal = maps.clone().requires_grad_()
    reference.part_loss(literal, 4.0, 30.0).mul(maps.amax(dim=(2, 3)).mean(dim=0)).sum().backward()
    torch.testing.assert_close(part_gradient(mechanism, maps, targets), literal.grad * (maps > 0), rtol=1e-3, atol=1e-6)


def test_normalisers_are_a_moving_average_of_the_mean_of_exp():
    first, second = sample(4, 2, 7, 7, seed=1).relu(), sample(4, 2, 7, 7).relu()
    targets, table = torch.tensor([0, 1, 0, 1]), template_table(7, 7, 4.0).double()
    mechanism = make(num_filters=2, strength=20.0).train()
    losses(mechanism, first, targets)
    found = losses(mechanism, second, targets)["part"]
    means = [template_fits(maps.flatten(2), table, 20.0).exp().mean(dim=0) for maps in (first, second)]
    log_z = (0.9 * means[0] + 0.1 * means[1]).log()
    torch.testing.assert_close(mechanism.log_z.double(), log_z, rtol=1e-4, atol=1e-5)
    weights = mechanism.mean_maximum.double()
    expected = reference.part_loss(second, 4.0, 20.0, log_z.tolist())
    torch.testing.assert_close(found.double(), (expected * weights).sum() / weights.sum(), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("size", [4, 10, 28])
def test_loss_stays_bounded_on_maps_of_any_size_however_strong(size):
    mechanism = make(strength=1000.0).train()
    for seed in range(3):
        part = losses(mechanism, sample(4, 3, size, size, seed=seed, dtype=torch.float32).relu(), torch.zeros(4).long())
    assert part["part"].abs() < 10 * math.log(10 * 4 * (size**2 + 1))


def test_mutual_information_lies_between_0_and_the_entropy_of_the_templates():
    maps = sample(6, 3, 7, 7).relu()
    for strength in (0.0, 0.5, 1000.0):
        part = losses(make(strength=strength).train(), maps, torch.tensor([0, 1, 0, 1, 0, 1]))["part"]
        assert -math.log(50) - 1e-5 <= part <= 1e-6


def test_papers_approximation_equals_its_formula_and_is_another_gradient():
    """Cosine with the exact gradient .30, length .06 times its: it keeps one template of fifty for each image."""
    maps, targets = sample(6, 3, 7, 7).relu(), torch.tensor([0, 1, 0, 1, 0, 1])
    weights = maps.amax(dim=(2, 3)).mean(dim=0)[:, None, None]
    found = {}
    for gradient in ("autograd", "paper"):
        mechanism = make(strength=30.0, gradient=gradient).train()
        found[gradient] = part_gradient(mechanism, maps, targets)
    belongs = [[int(target) == int(category) for category in mechanism.category] for target in targets]
    expected = reference.paper_gradient(maps, belongs, 4.0, 30.0) * weights * (maps > 0)
    torch.testing.assert_close(found["paper"], expected, rtol=1e-3, atol=1e-6)
    cosine = torch.cosine_similarity(found["paper"].flatten(), found["autograd"].flatten(), dim=0)
    assert cosine == pytest.approx(0.30, abs=0.02)
    assert found["paper"].norm() / found["autograd"].norm() == pytest.approx(0.06, abs=0.01)


def test_released_gradient_equals_the_literal_loops():
    maps, targets = sample(6, 3, 5, 5).relu(), torch.tensor([0, 1, 0, 1, 0, 0])
    mechanism = make(variant="released").train()
    before = mechanism.half_beta.tolist()
    found = part_gradient(mechanism, maps, targets)
    belongs = [[int(target) == int(category) for category in mechanism.category] for target in targets]
    share = [(4 / 6, 2 / 6)[category] for category in mechanism.category]
    expected = reference.released_gradient(maps, belongs, before, share) * (maps > 0)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-9)


def test_released_widths_follow_the_spread_of_the_responses_and_stay_in_their_range():
    points, blocks = torch.zeros(2, 3, 7, 7), torch.zeros(2, 3, 7, 7)
    points[:, :, 3, 3] = blocks[:, :, 2:5, 2:5] = 1
    spread = math.sqrt(2 / 3) * 14 / 7  # of a block, in cells of a 14x14 map
    for maps, expected in ((points, 3.0), (blocks, 3 / spread)):
        mechanism = make(variant="released").train()
        for _ in range(200):
            losses(mechanism, maps, torch.tensor([0, 0]))
        assert mechanism.half_beta.tolist() == pytest.approx([2 + (expected - 2) * (1 - 0.99**200)] * 3, rel=1e-3)


def test_nothing_is_added_without_targets():
    assert losses(make(), torch.rand(2, 3, 4, 4), None) == {}


def test_soft_and_multi_hot_targets_are_taken():
    maps = torch.rand(2, 3, 4, 4)
    for targets in (torch.tensor([[0.3, 0.7], [1.0, 0.0]]), torch.tensor([[1, 1], [0, 1]])):
        assert losses(make(gradient="paper").train(), maps, targets)["part"].isfinite()


# Statistics


def test_category_is_the_class_with_the_strongest_mean_response():
    mechanism = make(num_filters=2, num_classes=3).train()
    maps = torch.zeros(4, 2, 3, 3)
    maps[0, 0], maps[1, 0], maps[2, 1], maps[3, 1] = 1.0, 0.2, 0.5, 1.0
    assert mechanism.class_filter_matrix() is None
    losses(mechanism, maps, torch.tensor([0, 0, 1, 2]))
    assert mechanism.category.tolist() == [0, 2]
    assert mechanism.class_filter_matrix().tolist() == [[1, 0], [0, 0], [0, 1]]


def test_papers_category_changes_at_the_end_of_an_epoch_only():
    mechanism = make(num_filters=1).train()
    maps = torch.stack([torch.ones(1, 3, 3), torch.zeros(1, 3, 3)])
    mechanism.set_epoch(0)
    losses(mechanism, maps, torch.tensor([0, 1]))
    mechanism.set_epoch(1)
    losses(mechanism, maps, torch.tensor([1, 0]))
    assert mechanism.category.tolist() == [0]
    mechanism.set_epoch(1)
    assert mechanism.category.tolist() == [0]
    mechanism.set_epoch(2)
    assert mechanism.category.tolist() == [1]


def test_released_category_follows_a_moving_average():
    mechanism = make(num_filters=1, variant="released").train()
    maps = torch.stack([torch.ones(1, 3, 3), torch.zeros(1, 3, 3)])
    losses(mechanism, maps, torch.tensor([0, 1]))
    history = []
    for _ in range(10):
        losses(mechanism, maps, torch.tensor([1, 0]))
        history.append(int(mechanism.category))
    assert history == [0] * 6 + [1] * 4  # 0.9^7 < 0.5


def test_weight_falls_with_the_epoch_and_rises_with_the_activations():
    maps, targets = torch.rand(2, 3, 4, 4), torch.tensor([0, 1])
    weights = []
    for scale, epoch in ((1, 0), (2, 0), (1, 1)):
        mechanism = make(part_weight=3.0).train()
        losses(mechanism, scale * maps, targets)
        mechanism.set_epoch(epoch)
        weights.append(float(mechanism.loss_weights()["part"]))
    assert weights[0] == pytest.approx(3.0 * float(maps.amax(dim=(2, 3)).mean(dim=0).sum()))
    assert weights == pytest.approx([weights[0], 2 * weights[0], weights[0] / 2])


def test_evaluation_leaves_the_statistics_alone():
    mechanism = make().eval()
    before = {name: buffer.clone() for name, buffer in mechanism.named_buffers()}
    losses(mechanism, torch.rand(2, 3, 4, 4), torch.tensor([0, 1]))
    assert all(torch.equal(buffer, before[name]) for name, buffer in mechanism.named_buffers())


# In a model


@pytest.mark.parametrize("kind", ["depthwise", "full"])
def test_extra_convolution_starts_as_the_identity_and_learns(make_model, images, targets, kind):
    with_conv = timm_csg.differentiate(make_model(), mechanism="icnn", extra_conv=kind).eval()
    without = timm_csg.differentiate(make_model(), mechanism="icnn").eval()
    torch.testing.assert_close(with_conv(images), without(images))
    with_conv(images, targets, paths=BOTH).standard.sum().backward()
    assert with_conv.mechanism.conv.weight.grad.any()


@pytest.mark.parametrize("kind", ["none", "depthwise", "full"])
@pytest.mark.parametrize("variant", ["paper", "released"])
def test_trains_with_amp_and_measures_half_precision_features(make_model, images, targets, kind, variant):
    model = timm_csg.differentiate(make_model(), mechanism="icnn", extra_conv=kind, variant=variant).train()
    loop = timm_csg.TrainingMixin()
    loop.schedule = timm_csg.Joint()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        losses = loop.losses(model, images, targets, torch.nn.functional.cross_entropy)
        features = model.forward_features(images)
    losses["loss"].backward()
    assert all(weight.grad.isfinite().all() for weight in model.parameters() if weight.grad is not None)
    assert features.dtype == torch.bfloat16
    assert model.mechanism(features).isfinite().all()  # outside autocast, as a measure of stored features does


def test_part_loss_sees_the_maps_of_the_mask_with_amp(make_model, images, targets):
    model = timm_csg.differentiate(make_model(), mechanism="icnn", extra_conv="full").train()
    seen = []
    model.mechanism.conv.register_forward_hook(lambda module, inputs, output: seen.append(output.detach()))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        model(images, targets, paths=BOTH)
    assert [maps.dtype for maps in seen] == [torch.bfloat16, torch.bfloat16]
    assert torch.equal(*seen)


def test_icnn_loads_in_plain_timm_without_its_mask(make_model, images, tmp_path):
    model = timm_csg.differentiate(make_model(), mechanism="icnn", extra_conv="depthwise").eval()
    timm_csg.save_pretrained(model, tmp_path)
    plain = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    assert not torch.allclose(plain(images), model(images))
    with timm_csg.plain(model) as borrowed:
        torch.testing.assert_close(plain(images), borrowed(images))
    assert "without the mechanism, which acts at inference too" in (tmp_path / "README.md").read_text()


def test_both_paths_are_computed_once_and_counted_once(make_model, images, targets):
    model = timm_csg.differentiate(make_model(), mechanism="icnn").train()
    outputs = model(images, targets, paths=BOTH)
    assert outputs.gated is outputs.standard
    loop = timm_csg.TrainingMixin()
    loop.schedule = timm_csg.Joint()
    found = loop.losses(model, images, targets, cross_entropy)
    assert "gated" not in found
    standard, part = cross_entropy(outputs.standard, targets), outputs.losses["part"]
    total = standard + model.mechanism.loss_weights()["part"] * part
    gradients = [torch.autograd.grad(loss, model.fc.weight)[0] for loss in (found["loss"], total)]
    torch.testing.assert_close(*gradients)


def test_mixin_tells_the_epoch(make_model, images, targets):
    model, loop = timm_csg.differentiate(make_model(), mechanism="icnn").train(), timm_csg.TrainingMixin()
    loop.set_epoch(4)
    loop.losses(model, images, targets, cross_entropy)
    assert int(model.mechanism.epoch) == 4


@pytest.mark.slow
def test_mask_survives_compile(make_model, images):
    model = timm_csg.differentiate(make_model(), mechanism="icnn").eval()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(images), model(images))


# Chain


@pytest.mark.parametrize("members", [["csg", "icnn"], ["icnn", "csg"]])
def test_chain_passes_features_through_both(make_model, images, targets, members, gated):
    model = timm_csg.differentiate(make_model(), mechanism=members).eval()
    gate = next(member for member in model.mechanism.members if member.name == "csg")
    part = next(member for member in model.mechanism.members if member.name == "icnn")
    with torch.no_grad():
        gate.gate.copy_(torch.rand(gate.gate.shape, generator=torch.Generator().manual_seed(0)))
    features = model.forward_features(images)
    with timm_csg.plain(model) as plain:
        expected = plain.forward_head(part(features)), plain.forward_head(gate(part(features), targets))
    outputs = model(images, targets, paths=BOTH)
    torch.testing.assert_close(outputs.standard, expected[0])
    torch.testing.assert_close(outputs.gated, expected[1])
    assert set(outputs.losses) == {"sparsity", "part"}
    assert torch.equal(model.mechanism.class_filter_matrix(), gate.class_filter_matrix())


@pytest.mark.parametrize("name", ["test_resnet", "test_convnext", "test_mambaout"])
def test_parts_and_owners_live_on_one_model(make_model, name, tmp_path):
    images = torch.rand(12, 3, 64, 64, generator=torch.Generator().manual_seed(3))
    targets = torch.arange(12) % 3
    for index in range(3):
        images[targets == index, index] += 1.0  # each class has a colour of its own
    loader = [(images, targets)]
    model = timm_csg.differentiate(make_model(name, num_classes=3), mechanism=["icnn", "assigned"]).train()
    parts, owners = model.mechanism.members
    assigned = timm_csg.assign_filters(model, loader)
    assert torch.equal(model.mechanism.class_filter_matrix().bool(), assigned.matrix)
    loop = timm_csg.TrainingMixin()
    loop.schedule = timm_csg.Joint()
    optimizer = torch.optim.AdamW(timm_csg.param_groups(model, lr=1e-3, gate_lr=1e-2))
    loop.attach(optimizer, model)
    for epoch in range(4):
        loop.set_epoch(epoch)
        found = loop.losses(model, images, targets, cross_entropy)
        found["loss"].backward()
        optimizer.step()
        optimizer.zero_grad()
    assert {"part", "solo", "gated", "standard"} <= set(found)
    assert (int(parts.epoch), bool(parts.batches == 4), bool(owners.assigned_from_data)) == (3, True, True)
    if model.head_kind in ("linear", "normed"):
        assert not model.get_classifier().weight[~owners.assignment].any()
    model.eval()
    with torch.no_grad():
        maps = model.forward_features(images)
        masked = parts(maps)
        assert torch.equal(model.mechanism(maps), masked)
        expected = owners.gated_logits(masked, None, model.read_head())
        assert torch.equal(model(images, paths=("gated",)).gated, expected)
    seen, removal = measuring.collect(model, loader), measuring.ablate(model, loader, assigned.matrix, 3)
    judged = metrics.verdict(assigned.matrix.float(), seen.features, targets, accuracy=0.9, removal=removal)
    assert 0 <= judged.agreement <= 1
    peaks = measuring.collect_peaks(model, loader)
    largest = masked.amax(dim=(1, 2) if parts.channels_last else (2, 3))
    torch.testing.assert_close(peaks.strength, largest)
    marks = torch.rand(12, 2, 2, generator=torch.Generator().manual_seed(4)) * 64
    steady = metrics.location_instability(peaks, marks, 3).by_owner(assigned.matrix.int().argmax(dim=0))
    assert ((steady >= 0) & (steady < 1)).all()
    again = timm_csg.from_pretrained(timm_csg.save_pretrained(model, tmp_path))
    with torch.no_grad():
        assert torch.equal(again(images), model(images))


@pytest.mark.parametrize("first", [True, False])
def test_assigned_filters_in_a_chain_answer_without_targets(make_model, images, first):
    own = timm_csg.AssignedConfig(gated_weight=0.5)
    model = timm_csg.differentiate(make_model(), mechanism=[own, "icnn"] if first else ["icnn", own]).eval()
    alone = timm_csg.differentiate(make_model(), mechanism=own).eval()
    part = InterpretableFilters(96, 5, ICNNConfig())
    seen = part(alone.forward_features(images))
    expected = alone._gated_logits(seen, None, alone.read_head())
    torch.testing.assert_close(model(images, paths=("gated",)).gated, expected)
    assert model.mechanism.loss_weights()["gated"] == 0.5


def test_losses_of_the_same_name_are_told_apart(make_model, images, targets):
    model = timm_csg.differentiate(make_model(), mechanism=["csg", timm_csg.CSGConfig(sparsity_weight=0.5)])
    assert set(model(images, targets, paths=BOTH).losses) == {"0_sparsity", "1_sparsity"}
    assert model.mechanism.loss_weights()["1_sparsity"] == 0.5


@pytest.mark.parametrize(
    ("mechanism", "options", "message"),
    [
        (["csg"], {}, "two mechanisms or more"),
        (["csg", "icnn"], {"beta": 1.0}, r"belong in their configs, but found \['beta'\]"),
        (["csg", ["csg", "icnn"]], {}, "a chain cannot be a member"),
        (["csg", "nothing"], {}, "unknown mechanism 'nothing'"),
        (["csg", "icnn", "csg"], {}, None),
    ],
)
def test_wrong_chains_are_refused(make_model, mechanism, options, message):
    if message is None:
        assert len(timm_csg.differentiate(make_model(), mechanism=mechanism).mechanism.members) == 3
        return
    with pytest.raises(ValueError, match=message):
        timm_csg.differentiate(make_model(), mechanism=mechanism, **options)


def test_two_members_that_look_into_the_head_are_refused(make_model):
    with pytest.raises(ValueError, match="only one member of a chain can look into the head"):
        timm_csg.differentiate(make_model(), mechanism=["assigned", "assigned"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"variant": "new"}, "variant must be one of 'paper', 'released', but is 'new'"),
        ({"beta": -1.0}, "beta must be a number, 0 or more, but is -1.0"),
        ({"variant": "released", "gradient": "paper"}, "has a gradient of its own"),
    ],
)
def test_impossible_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        ICNNConfig(**options)


@pytest.mark.parametrize(
    ("wrong", "error"),
    [
        (torch.tensor([0, 3, 9]), "targets must hold class indices below 5, but the largest is 9"),
        (torch.tensor([0, 3, -1]), "targets must be class indices from 0 to 4, but the smallest is -1"),
        (torch.full((3, 5), 0.5), "row 0 of targets sums to 2.5"),
        (torch.zeros(3, 4), r"rows \[batch, 5\], but are float32 of shape \[3, 4\]"),
    ],
    ids=["too large", "negative", "neither soft nor multi-hot", "other classes"],
)
def test_targets_that_fit_no_class_are_refused(make_model, images, wrong, error):
    model = timm_csg.differentiate(make_model(), mechanism="icnn").train()
    with pytest.raises(ValueError, match=error):
        model(images, wrong, paths=("gated",))
