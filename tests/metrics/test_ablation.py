"""ablate: the right filters go, and accuracies are counted by class."""

import sys

import pytest
import timm
import torch
from reference.ablation import ablate as reference
from torch import nn

import timm_csg
from timm_csg import measuring, metrics
from timm_csg.head import find_linear_head


class Additive(nn.Module):
    """Four filters, two classes; the logit of a class is the sum of its two filters."""

    def forward_features(self, images):
        return images

    def forward_head(self, features):
        return features.flatten(1) @ torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0], [0.0, 1.0]])

    def __init__(self):
        super().__init__()
        self.anything = nn.Parameter(torch.zeros(1))


IMAGES = torch.tensor([[2.0, 2.0, 1.0, 0.0], [1.0, 0.0, 3.0, 1.0], [0.0, 1.0, 0.0, 2.0]])[:, :, None, None]
LOADER = [(IMAGES, torch.tensor([0, 1, 1]))]
OWNERS = torch.tensor([0, 0, 1, 1])


def test_ablation_by_hand():
    result = measuring.ablate(Additive(), LOADER, OWNERS, 2)
    assert result.before.tolist() == [1.0, 1.0]
    # Without class 0's filters its image becomes class 1; without class 1's, both of its images become class 0.
    assert result.after.tolist() == [[0.0, 1.0], [1.0, 0.0]]
    assert (result.own, result.others) == (0.0, 1.0)


def test_keep_only_by_hand():
    result = measuring.ablate(Additive(), LOADER, OWNERS, 2, keep_only=True)
    assert result.after.tolist() == [[1.0, 0.0], [0.0, 1.0]]
    assert (result.own, result.others) == (1.0, 0.0)


def test_rows_of_filters_are_the_same_as_their_owners():
    rows = torch.tensor([[True, True, False, False], [False, False, True, True]])
    expected = measuring.ablate(Additive(), LOADER, OWNERS, 2)
    assert torch.equal(measuring.ablate(Additive(), LOADER, rows, 2).after, expected.after)


def test_a_filter_may_belong_to_several_classes():
    # Without filters 0 and 3: image 0 has 2 against 1, image 1 has 0 against 3, image 2 has 1 against 0.
    rows = torch.tensor([[True, False, False, True]] * 2)
    assert measuring.ablate(Additive(), LOADER, rows, 2).after.tolist() == [[1.0, 0.5], [1.0, 0.5]]


@pytest.mark.parametrize("keep_only", [False, True])
def test_ablation_equals_zeroing_the_classifier_weights_of_the_filters(make_model, images, targets, keep_only):
    model = make_model()
    owners = torch.arange(96) % 5
    result = measuring.ablate(model, [(images, targets)], owners, 5, keep_only=keep_only)
    for index in range(5):
        changed = make_model()
        with torch.no_grad():
            changed.fc.weight[:, (owners == index) != keep_only] = 0
            hits = changed(images).argmax(1) == targets
        assert result.after[index][targets].tolist() == hits.double().tolist()
    assert result.after[:, [1, 2]].isnan().all()


def test_every_layout_loses_all_filters_when_none_are_kept(any_model, images, targets):
    model = timm_csg.differentiate(any_model, mechanism="csg")
    nothing = torch.zeros(5, model.num_features, dtype=torch.bool)
    result = measuring.ablate(model, [(images, targets)], nothing, 5, keep_only=True)
    features = model.forward_features(images)
    prediction = model.forward_head(torch.zeros_like(features)).argmax(1)
    assert result.after[0][targets].tolist() == (prediction == targets).double().tolist()


def test_modes_are_left_as_found_and_progress_counts_images(tiny_model, images, targets):
    tiny_model.train()
    tiny_model.layer1.eval()
    modes, counts = [module.training for module in tiny_model.modules()], []
    loader = [(images[:2], targets[:2]), (images[2:], targets[2:])]
    measuring.ablate(tiny_model, loader, torch.arange(96) % 5, 5, progress=counts.append)
    assert [module.training for module in tiny_model.modules()] == modes
    assert counts == [2, 1]


def test_top_filters_takes_so_many_of_each_class_and_the_first_of_equal_ones():
    matrix = torch.tensor([[0.5, 0.5, 0.1, 0.5], [0.0, 0.1, 0.2, 0.3]])
    assert metrics.top_filters(matrix, 2).int().tolist() == [[1, 1, 0, 0], [0, 0, 1, 1]]
    assert metrics.top_filters(matrix, [0, 4]).int().tolist() == [[0, 0, 0, 0], [1, 1, 1, 1]]
    for wrong in (5, [1], [1, -1]):
        with pytest.raises(ValueError, match="between 0 and 4 filters"):
            metrics.top_filters(matrix, wrong)


@pytest.mark.parametrize(
    ("owners", "message"),
    [
        (torch.arange(4).float(), "class indices"),
        (torch.ones(4, dtype=torch.bool), "class indices"),
        (torch.ones(3, 4, dtype=torch.bool), "2 classes, but filter_owners has 3 rows"),
        (torch.arange(5), "of 5 filters, but the stage has 4"),
    ],
)
def test_owners_that_do_not_fit_are_refused(owners, message):
    with pytest.raises(ValueError, match=message):
        measuring.ablate(Additive(), LOADER, owners, 2)


def test_ablation_of_a_plain_timm_model_runs():
    model = timm.create_model("test_resnet", num_classes=2)
    result = measuring.ablate(model, [(torch.rand(2, 3, 32, 32), torch.tensor([0, 1]))], torch.arange(96) % 2, 2)
    assert result.after.shape == (2, 2)


def count_head_passes(model, monkeypatch):
    calls, forward_head = [], model.forward_head

    def counted(*args, **options):
        calls.append(1)
        return forward_head(*args, **options)

    monkeypatch.setattr(model, "forward_head", counted)
    return calls


def overlapping(classes, filters):
    """Filters of two classes, of none, and a class without any."""
    own = torch.rand(classes, filters, generator=torch.Generator().manual_seed(3)) < 0.4
    own[0] = False
    return own


@pytest.mark.parametrize("keep_only", [False, True])
def test_ablation_of_every_layout_equals_a_head_pass_for_each_class_and_image(any_model, keep_only):
    images = torch.rand(12, 3, 64, 64, generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        targets = any_model(images).argmax(1)  # so that removal changes many answers
    own = overlapping(5, any_model.num_features)
    loader = [(images[:5], targets[:5]), (images[5:], targets[5:])]
    found = measuring.ablate(any_model, loader, own, 5, keep_only=keep_only)
    before, after = reference(any_model, images, targets, own, keep_only)
    torch.testing.assert_close(found.before, before, equal_nan=True)
    torch.testing.assert_close(found.after, after, equal_nan=True)
    off_diagonal = ~torch.eye(5, dtype=torch.bool)
    assert found.others == pytest.approx(float(after[off_diagonal].nanmean()))


@pytest.mark.parametrize(
    ("name", "options", "is_linear"),
    [
        ("test_resnet", {}, True),
        ("test_vit", {}, True),
        ("test_efficientnet", {}, True),
        ("test_resnet", {"global_pool": "max"}, False),
        ("test_convnext", {}, False),
        ("test_mambaout", {}, False),
        ("test_vit", {"global_pool": "avg"}, False),
    ],
)
def test_a_linear_head_runs_as_often_with_ten_times_the_classes(make_model, name, options, is_linear, monkeypatch):
    passes = []
    for classes in (5, 50):
        model = make_model(name, classes, **options)
        calls = count_head_passes(model, monkeypatch)
        loader = [(torch.rand(4, 3, 64, 64), torch.arange(4))] * 2
        measuring.ablate(model, loader, torch.arange(model.num_features) % classes, classes)
        passes.append(len(calls))
    assert (passes[0] == passes[1]) == is_linear, passes


def test_classes_that_own_the_same_filters_share_a_pass(make_model, monkeypatch):
    model = make_model("test_convnext", 50)
    calls = count_head_passes(model, monkeypatch)
    measuring.ablate(model, [(torch.rand(1, 3, 64, 64), torch.tensor([0]))] * 2, torch.arange(64) % 3, 50)
    assert len(calls) == 3 + 2 * (1 + 3 + 1)  # a look at the head; then all filters, three owners, and nobody's


@pytest.mark.parametrize("keep_only", [False, True])
def test_ablation_from_collected_responses_is_that_of_the_model(make_model, keep_only):
    model = make_model()
    images = torch.rand(20, 3, 64, 64, generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        targets = model(images).argmax(1)
        features = model.forward_head(model.forward_features(images), pre_logits=True)
    own = overlapping(5, 96)
    found = metrics.ablate_linear(features, targets, model.fc.weight, model.fc.bias, own, keep_only=keep_only)
    expected = measuring.ablate(model, [(images, targets)], own, 5, keep_only=keep_only)
    torch.testing.assert_close(found, expected, equal_nan=True)


def test_what_a_layer_really_does_is_read_and_not_its_weight(make_model, images, targets):
    class Doubled(nn.Linear):
        def forward(self, responses):
            return super().forward(responses) - 2 * responses @ self.weight.T

    model = make_model()
    plain, model.fc.__class__ = measuring.ablate(model, [(images, targets)], torch.arange(96) % 5, 5), Doubled
    found = measuring.ablate(model, [(images, targets)], torch.arange(96) % 5, 5)
    before, after = reference(model, images, targets, torch.arange(96) % 5 == torch.arange(5)[:, None])
    torch.testing.assert_close(found, metrics.Ablation(before, after), equal_nan=True)
    assert not torch.equal(found.after.nan_to_num(), plain.after.nan_to_num())


def test_equal_logits_name_the_first_class_as_a_head_pass_does():
    weight = torch.tensor([[0.0, 0.1, 0.0, 0.0, 0.0], [0.7, 0.1, 0.3, 0.0, 0.0]])  # filter 1 serves both alike
    features = torch.rand(50, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    found = metrics.ablate_linear(features, torch.zeros(50).long(), weight, None, torch.tensor([1, 0, 1, 0, 0]))
    assert found.after[1].tolist()[0] == 1


@pytest.mark.parametrize(("dtype", "error"), [(torch.bfloat16, 2**-8), (torch.float32, 1e-6), (torch.float64, 1e-12)])
def test_weights_are_read_as_they_are_beside_a_large_bias(make_model, images, dtype, error):
    model = make_model().to(dtype)
    with torch.no_grad():
        model.fc.bias += 30
        head = find_linear_head(model, model.forward_features(images.to(dtype)))
    torch.testing.assert_close(head.weight, model.fc.weight.double(), rtol=error, atol=error / 4)
    assert torch.equal(head.bias, model.fc.bias.double())


def test_autocast_changes_little(make_model, images):
    images = images.repeat(20, 1, 1, 1)
    with torch.no_grad():
        targets = make_model()(images).argmax(1)
    found = [
        measuring.ablate(make_model(), [(images, targets)], torch.arange(96) % 5, 5, amp_dtype=dtype)
        for dtype in (None, torch.bfloat16)
    ]
    torch.testing.assert_close(found[0], found[1], equal_nan=True, atol=0.34, rtol=0)


def test_a_head_that_is_not_linear_announces_what_it_costs(make_model, images, targets, monkeypatch, caplog):
    monkeypatch.setattr(sys.modules["timm_csg.measuring.ablating"], "_SLOW", 1e-6)
    owners = torch.arange(64) % 5
    measuring.ablate(make_model("test_convnext"), [(images, targets)] * 3, owners, 5)
    assert [record.getMessage().split(":")[0] for record in caplog.records] == [
        "the head of ConvNeXt is not linear, so removing filters takes 6 passes of it for each batch"
    ]
    measuring.ablate(make_model(), [(images, targets)], torch.arange(96) % 5, 5)
    assert len(caplog.records) == 1


def test_a_mask_that_acts_at_inference_is_kept(make_model, images, targets):
    model = timm_csg.differentiate(make_model(), mechanism="icnn")
    own = torch.arange(96) % 5 == torch.arange(5)[:, None]
    before, after = reference(model, images, targets, own)
    torch.testing.assert_close(measuring.ablate(model, [(images, targets)], own, 5), (before, after), equal_nan=True)


def test_responses_weight_and_owners_of_different_filters_are_refused():
    with pytest.raises(ValueError, match="same filters, but there are 4, 3 and 4"):
        metrics.ablate_linear(torch.ones(2, 4), torch.tensor([0, 1]), torch.ones(2, 3), None, torch.arange(4) % 2)
