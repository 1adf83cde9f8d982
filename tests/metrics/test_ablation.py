"""ablate: the right filters go, and accuracies are counted by class."""

import pytest
import timm
import torch
from torch import nn

import timm_csg
from timm_csg import metrics


class Additive(nn.Module):
    """Four filters, two classes; the logit of a class is the sum of its two filters."""

    def forward_features(self, images):
        return images[:, :, None, None]

    def forward_head(self, features):
        return features.flatten(1) @ torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0], [0.0, 1.0]])

    def __init__(self):
        super().__init__()
        self.anything = nn.Parameter(torch.zeros(1))


IMAGES = torch.tensor([[2.0, 2.0, 1.0, 0.0], [1.0, 0.0, 3.0, 1.0], [0.0, 1.0, 0.0, 2.0]])
LOADER = [(IMAGES, torch.tensor([0, 1, 1]))]
OWNERS = torch.tensor([0, 0, 1, 1])


def test_ablation_by_hand():
    result = metrics.ablate(Additive(), LOADER, OWNERS, 2)
    assert result.before.tolist() == [1.0, 1.0]
    # Without class 0's filters its image becomes class 1; without class 1's, both of its images become class 0.
    assert result.after.tolist() == [[0.0, 1.0], [1.0, 0.0]]
    assert (result.own, result.others) == (0.0, 1.0)


def test_keep_only_by_hand():
    result = metrics.ablate(Additive(), LOADER, OWNERS, 2, keep_only=True)
    assert result.after.tolist() == [[1.0, 0.0], [0.0, 1.0]]
    assert (result.own, result.others) == (1.0, 0.0)


def test_rows_of_filters_are_the_same_as_their_owners():
    rows = torch.tensor([[True, True, False, False], [False, False, True, True]])
    expected = metrics.ablate(Additive(), LOADER, OWNERS, 2)
    assert torch.equal(metrics.ablate(Additive(), LOADER, rows, 2).after, expected.after)


def test_a_filter_may_belong_to_several_classes():
    # Without filters 0 and 3: image 0 has 2 against 1, image 1 has 0 against 3, image 2 has 1 against 0.
    rows = torch.tensor([[True, False, False, True]] * 2)
    assert metrics.ablate(Additive(), LOADER, rows, 2).after.tolist() == [[1.0, 0.5], [1.0, 0.5]]


@pytest.mark.parametrize("keep_only", [False, True])
def test_ablation_equals_zeroing_the_classifier_weights_of_the_filters(make_model, images, targets, keep_only):
    model = make_model()
    owners = torch.arange(96) % 5
    result = metrics.ablate(model, [(images, targets)], owners, 5, keep_only=keep_only)
    for index in range(5):
        changed = make_model()
        with torch.no_grad():
            changed.fc.weight[:, (owners == index) != keep_only] = 0
            hits = changed(images).argmax(1) == targets
        assert result.after[index][targets].tolist() == hits.double().tolist()
    assert result.after[:, [1, 2]].isnan().all()


def test_every_layout_loses_all_filters_when_none_are_kept(any_model, images, targets):
    model = timm_csg.differentiate(any_model)
    nothing = torch.zeros(5, model.num_features, dtype=torch.bool)
    result = metrics.ablate(model, [(images, targets)], nothing, 5, keep_only=True)
    features = model.forward_features(images)
    prediction = model.forward_head(torch.zeros_like(features)).argmax(1)
    assert result.after[0][targets].tolist() == (prediction == targets).double().tolist()


def test_modes_are_left_as_found_and_progress_counts_images(tiny_model, images, targets):
    tiny_model.train()
    tiny_model.layer1.eval()
    modes, counts = [module.training for module in tiny_model.modules()], []
    loader = [(images[:2], targets[:2]), (images[2:], targets[2:])]
    metrics.ablate(tiny_model, loader, torch.arange(96) % 5, 5, progress=counts.append)
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
        metrics.ablate(Additive(), LOADER, owners, 2)


def test_ablation_of_a_plain_timm_model_runs():
    model = timm.create_model("test_resnet", num_classes=2)
    result = metrics.ablate(model, [(torch.rand(2, 3, 32, 32), torch.tensor([0, 1]))], torch.arange(96) % 2, 2)
    assert result.after.shape == (2, 2)
