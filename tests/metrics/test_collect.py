"""collect: ungated features, both logits, everything as found."""

import pytest
import torch
from torch import nn

import timm_csg
from timm_csg import metrics


def loader(images, targets):
    return [(images[:2], targets[:2]), (images[2:], targets[2:])]


def test_features_are_the_spatial_mean_before_the_gate(any_model, images, targets, gated):
    expected = any_model.forward_features(images)
    if expected.ndim == 4 and str(getattr(any_model, "output_fmt", "NCHW")) != "NHWC":
        expected = expected.permute(0, 2, 3, 1)
    expected = expected.reshape(len(images), -1, expected.shape[-1]).mean(1)
    model = gated(timm_csg.differentiate(any_model))
    seen = metrics.collect(model, loader(images, targets))
    torch.testing.assert_close(seen.features, expected)
    torch.testing.assert_close(seen.logits, model(images))
    torch.testing.assert_close(seen.gated_logits, model(images, targets))
    assert torch.equal(seen.targets, targets)


def test_plain_model_has_no_gated_logits(tiny_model, images, targets):
    assert metrics.collect(tiny_model, loader(images, targets)).gated_logits is None


def test_modes_and_statistics_are_left_as_found(tiny_model, images, targets):
    tiny_model.train()
    tiny_model.layer1.eval()
    before = {name: value.clone() for name, value in tiny_model.state_dict().items()}
    modes = [module.training for module in tiny_model.modules()]
    metrics.collect(tiny_model, loader(images, targets))
    assert [module.training for module in tiny_model.modules()] == modes
    assert all(torch.equal(value, before[name]) for name, value in tiny_model.state_dict().items())
    assert all(parameter.grad is None for parameter in tiny_model.parameters())


def test_progress_counts_images(tiny_model, images, targets):
    counts = []
    metrics.collect(tiny_model, loader(images, targets), progress=counts.append)
    assert counts == [2, 1]


def test_empty_loader_and_soft_targets_are_refused(tiny_model, images):
    with pytest.raises(ValueError, match="no images"):
        metrics.collect(tiny_model, [])
    with pytest.raises(ValueError, match="class indices"):
        metrics.collect(tiny_model, [(images, torch.rand(3, 5))])


class Additive(nn.Module):
    """Four filters, two classes; the logit of a class is the sum of its two filters."""

    def forward_features(self, images):
        return images[:, :, None, None]

    def forward_head(self, features):
        return features.flatten(1) @ torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0], [0.0, 1.0]])

    def __init__(self):
        super().__init__()
        self.anything = nn.Parameter(torch.zeros(1))


def test_ablation_by_hand():
    images = torch.tensor([[2.0, 2.0, 1.0, 0.0], [1.0, 0.0, 3.0, 1.0], [0.0, 1.0, 0.0, 2.0]])
    result = metrics.ablate(Additive(), [(images, torch.tensor([0, 1, 1]))], torch.tensor([0, 0, 1, 1]), 2)
    assert result.before.tolist() == [1.0, 1.0]
    # Without class 0's filters its image becomes class 1; without class 1's, both of its images become class 0.
    assert result.after.tolist() == [[0.0, 1.0], [1.0, 0.0]]
    assert (result.own, result.others) == (0.0, 1.0)


def test_gate_metrics_by_hand():
    gate = torch.tensor([[1.0, 0.25, 0.0], [0.5, 1.0, 1.0]])
    assert float(metrics.gate_density(gate)) == pytest.approx(3.75 / 6)
    assert metrics.owners(gate).tolist() == [0, 1, 1]
    assert metrics.filters_per_class(gate, threshold=0.4).tolist() == [1, 3]
    assert metrics.classes_per_filter(gate, threshold=0.4).tolist() == [2, 1, 1]
    information = torch.tensor([[0.2, 0.3, 0.0], [0.1, 0.1, 0.1]])
    assert float(metrics.owner_agreement(gate, information)) == pytest.approx(2 / 3)
    with pytest.raises(ValueError, match="one shape"):
        metrics.owner_agreement(gate, information[:1])
