"""Attacks against a model whose gradient is known by hand; detectors against scikit-learn and by hand."""

import numpy as np
import pytest
import torch
from sklearn.metrics import roc_auc_score
from torch import nn

import timm_csg
from timm_csg import measuring, metrics

MEAN, STD = (0.5, 0.25, 0.0), (0.5, 0.25, 1.0)
WEIGHT = torch.tensor([[1.0, -2.0, 0.0], [0.0, 1.0, 3.0]])


def linear_model():
    """Logits WEIGHT · mean over positions; the loss has the gradient (p - one-hot) · WEIGHT / positions everywhere."""
    model = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 2, bias=False))
    model[2].weight.data.copy_(WEIGHT)
    return model


def pixels_of(images):
    return images * torch.tensor(STD)[:, None, None] + torch.tensor(MEAN)[:, None, None]


def normalised(pixels):
    return (pixels - torch.tensor(MEAN)[:, None, None]) / torch.tensor(STD)[:, None, None]


def test_fgsm_moves_every_pixel_by_eps_along_the_sign_known_by_hand():
    pixels = torch.rand(4, 3, 2, 2, generator=torch.Generator().manual_seed(0)) * 0.8 + 0.1
    targets = torch.tensor([0, 1, 0, 1])
    attacked = measuring.fgsm(linear_model(), normalised(pixels), targets, eps=0.05, mean=MEAN, std=STD)
    # d loss / d x = (p_other) × (row of the other class - row of the true class), and p_other > 0.
    sign = torch.stack([(WEIGHT[1] - WEIGHT[0]).sign(), (WEIGHT[0] - WEIGHT[1]).sign()])[targets]
    torch.testing.assert_close(pixels_of(attacked), pixels + 0.05 * sign[:, :, None, None])


def test_pgd_of_a_linear_model_ends_in_the_same_corner():
    pixels = torch.rand(4, 3, 2, 2, generator=torch.Generator().manual_seed(0)) * 0.8 + 0.1
    images, targets = normalised(pixels), torch.tensor([0, 1, 0, 1])
    options = {"eps": 0.05, "mean": MEAN, "std": STD}
    expected = measuring.fgsm(linear_model(), images, targets, **options)
    torch.testing.assert_close(measuring.pgd(linear_model(), images, targets, **options), expected)
    one_step = measuring.pgd(linear_model(), images, targets, steps=1, step=0.02, random_start=False, **options)
    torch.testing.assert_close((pixels_of(one_step) - pixels).abs().max(), torch.tensor(0.02))


@pytest.mark.parametrize("attack", [measuring.fgsm, measuring.pgd])
def test_attacked_pixels_stay_valid_and_within_eps_and_the_loss_rises(tiny_model, attack, targets):
    mean, std = tiny_model.pretrained_cfg["mean"], tiny_model.pretrained_cfg["std"]
    mean, std = (torch.tensor(value)[:, None, None] for value in (mean, std))
    pixels = torch.rand(3, 3, 64, 64, generator=torch.Generator().manual_seed(0)).round(decimals=1)
    images = (pixels - mean) / std
    attacked = attack(tiny_model, images, targets, eps=8 / 255)  # mean and std are the model's own
    found = attacked * std + mean
    assert found.min() >= -1e-6
    assert found.max() <= 1 + 1e-6
    assert (found - pixels).abs().max() <= 8 / 255 + 1e-6
    loss = nn.functional.cross_entropy
    assert loss(tiny_model(attacked), targets) > loss(tiny_model(images), targets) + 0.01
    torch.testing.assert_close(measuring.fgsm(tiny_model, images, targets, eps=0.0), images)


def test_attacks_leave_modes_gradients_statistics_and_random_state_as_found(make_model, targets):
    model = timm_csg.differentiate(make_model(), mechanism="csg").train()
    model.layer1.eval()
    model(torch.rand(3, 3, 64, 64)).sum().backward()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    gradients = {name: value.grad.clone() for name, value in model.named_parameters() if value.grad is not None}
    modes, state = [module.training for module in model.modules()], torch.random.get_rng_state()
    images = torch.zeros(3, 3, 64, 64, requires_grad=True)
    with torch.no_grad():
        attacked = measuring.pgd(model, images, targets, eps=0.1, steps=2)
    with torch.inference_mode():
        again = measuring.pgd(model, images, targets, eps=0.1, steps=2)
    assert torch.equal(attacked, again)
    assert not attacked.requires_grad
    assert images.grad is None
    assert [module.training for module in model.modules()] == modes
    assert torch.equal(torch.random.get_rng_state(), state)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert gradients.keys() == {name for name, value in model.named_parameters() if value.grad is not None}
    assert all(torch.equal(dict(model.named_parameters())[name].grad, value) for name, value in gradients.items())


def test_an_image_is_attacked_the_same_alone_and_in_a_batch(tiny_model, targets):
    images = torch.rand(3, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    together = measuring.fgsm(tiny_model, images, targets, eps=0.01)
    alone = measuring.fgsm(tiny_model, images[1:2], targets[1:2], eps=0.01)
    assert (together[1:2] - alone).abs().max() < 1e-3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"eps": 8.0}, "pass 8 / 255"),
        ({"eps": 0.1, "steps": 0}, "steps=0"),
        ({"eps": 0.1, "mean": None}, "does not state how its images are normalised"),
        ({"eps": 0.1, "mean": (0.5,)}, "one value per channel"),
        ({"eps": 0.1, "std": (1.0, 1.0, 1.0)}, r"between -2.10 and 3.40, not in \[0, 1\]"),
    ],
)
def test_wrong_options_are_refused(options, message):
    images = torch.zeros(1, 3, 2, 2)
    images[0, 0, 0, 0], images[0, 2, 0, 0] = -2.6, 3.4
    options = {"mean": MEAN, "std": STD, **options}
    with pytest.raises(ValueError, match=message):
        measuring.pgd(linear_model(), images, torch.tensor([0]), **options)


class Remembers:
    """A classifier that notes which rows it was given."""

    def fit(self, rows, labels):
        self.seen, self.labels = rows[:, 0], labels
        return self

    def predict(self, rows):
        self.judged = rows[:, 0]
        return np.zeros(len(rows))


def test_no_twin_of_a_judged_image_was_learnt_from():
    clean, spy = torch.arange(21.0)[:, None], Remembers()
    errors = metrics.detection_errors(clean, clean + 100, classifiers={"spy": spy})
    assert errors == {"spy": 0.5}
    learnt, judged = set(spy.seen % 100), set(spy.judged % 100)
    assert learnt.isdisjoint(judged)
    assert learnt | judged == set(range(21))
    assert sorted(spy.seen % 100) == sorted([*learnt, *learnt])
    assert [int(value >= 100) for value in spy.seen] == spy.labels.tolist()


def test_equal_responses_cannot_be_told_apart_and_shifted_ones_can():
    clean = torch.randn(120, 3, generator=torch.Generator().manual_seed(0))
    assert all(error >= 0.4 for error in metrics.detection_errors(clean, clean.clone()).values())
    assert all(error <= 0.1 for error in metrics.detection_errors(clean, clean + 5).values())
    with pytest.raises(ValueError, match="same images, at least 4"):
        metrics.detection_errors(clean, clean[:-1])


def test_disagreement_is_the_total_variation_by_hand():
    standard, gated = torch.tensor([[0.7, 0.2, 0.1], [0.3, 0.3, 0.4]]), torch.tensor([[0.1, 0.8, 0.1], [0.3, 0.3, 0.4]])
    torch.testing.assert_close(metrics.path_disagreement(standard.log(), gated.log()), torch.tensor([0.6, 0.0]))
    with pytest.raises(ValueError, match="same images and classes"):
        metrics.path_disagreement(standard, gated[:1])


def test_auc_is_that_of_scikit_learn_with_ties():
    generator = torch.Generator().manual_seed(0)
    clean, attacked = torch.rand(80, generator=generator).round(decimals=1), torch.rand(80, generator=generator) ** 0.5
    attacked = attacked.round(decimals=1)
    expected = roc_auc_score([0] * 80 + [1] * 80, torch.cat([clean, attacked]).numpy())
    assert metrics.threshold_detection(clean, attacked).auc == pytest.approx(expected)


def test_threshold_sees_half_of_the_clean_images_and_nothing_else():
    generator = torch.Generator().manual_seed(0)
    clean = torch.rand(2000, generator=generator)
    first = metrics.threshold_detection(clean, clean + 0.5, false_alarm_rate=0.1)
    assert metrics.threshold_detection(clean, clean - 9, false_alarm_rate=0.1).threshold == first.threshold
    assert first.threshold == pytest.approx(0.9, abs=0.03)
    assert first.false_alarms == pytest.approx(0.1, abs=0.03)
    assert first.misses == pytest.approx(0.4, abs=0.05)
    assert first.error == (first.false_alarms + first.misses) / 2
    with pytest.raises(ValueError, match="between 0 and 1, but is 5"):
        metrics.threshold_detection(clean, clean, false_alarm_rate=5)
