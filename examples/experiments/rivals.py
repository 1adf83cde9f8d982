"""Other ways to fine-tune for class-specific filters, a few lines each, on one network: for fine_tuning.py.

Each takes the network (changed in place), whole training pictures, the number of classes and the filters of a class,
and returns the loss of a batch, with ``owners``, bool [classes, filters], where it says whose a filter is. No code of
the authors was used; departures from the papers are named.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from timm_csg.adaptation import fit_masked_classifier
from timm_csg.assignment import ResponseSums, assign, correlation


class Loss:
    """A loss of a batch, and what it says about the owners of filters."""

    def __init__(self, of_batch: Callable[[Tensor, Tensor], Tensor] | None, owners: Tensor | None = None) -> None:
        self.of_batch, self.owners = of_batch, owners


@torch.no_grad()
def pooled_responses(model: nn.Module, pictures: Iterable) -> tuple[Tensor, Tensor]:
    """Pooled responses [pictures, filters] in eval mode, and targets [pictures]."""
    model.eval()
    found = [(model.global_pool(model.forward_features(images)).flatten(1), targets) for images, targets in pictures]
    responses, targets = (torch.cat(column) for column in zip(*found, strict=True))
    return responses, targets


def _assignment(model: nn.Module, pictures: Iterable, classes: int, filters: int | None) -> tuple[Tensor, ResponseSums]:
    sums = ResponseSums.of(*pooled_responses(model, pictures), classes)
    return assign(correlation(sums), filters), sums


def standard(model: nn.Module, pictures: Iterable, classes: int, filters: int | None) -> Loss:
    """Cross entropy alone."""
    return Loss(lambda images, targets: F.cross_entropy(model(images), targets))


def probe(model: nn.Module, pictures: Iterable, classes: int, filters: int | None) -> Loss:
    """A dense linear classifier on the pretrained features, fitted as ``adapt`` does; nothing else is trained."""
    responses, targets = pooled_responses(model, pictures)
    fit = fit_masked_classifier(responses, targets, torch.ones(classes, responses.shape[1], dtype=torch.bool))
    with torch.no_grad():
        model.classifier.weight.copy_(fit.weight)
        model.classifier.bias.copy_(fit.bias)
    return Loss(None)


def contrastive(model: nn.Module, pictures: Iterable, classes: int, filters: int | None) -> Loss:
    """Non-negative contrastive learning (Wang et al., ICLR 2024), with labels: pictures of a class are alike.

    Cross entropy plus a supervised contrastive loss, temperature 0.1, on the normalised pooled responses behind a ReLU;
    pairs are pictures of one class in a batch.
    """

    def of_batch(images: Tensor, targets: Tensor) -> Tensor:
        pooled = model.global_pool(model.forward_features(images)).flatten(1).relu()
        unit = F.normalize(pooled)
        itself = torch.eye(len(unit), dtype=torch.bool)
        shares = (unit @ unit.T / 0.1).masked_fill(itself, -1e4).log_softmax(dim=1)
        alike = ((targets[:, None] == targets) & ~itself).float()
        pairs = -(shares * alike).sum(dim=1) / alike.sum(dim=1).clamp(min=1)
        has_pair = alike.sum(dim=1) > 0
        logits = model.classifier(F.dropout(pooled, model.drop_rate))
        return F.cross_entropy(logits, targets) + (pairs[has_pair].mean() if has_pair.any() else 0)

    return Loss(of_batch)


def mutual_channel(model: nn.Module, pictures: Iterable, classes: int, filters: int | None) -> Loss:
    """Mutual-channel loss (Chang et al., 2020): a class is named by the largest of its channels at every place.

    Weights 2 and 20 and a third of the channels masked, as released. The groups of channels are those of our
    assignment, which is kinder to it than the paper's, by number.
    """
    owners, _ = _assignment(model, pictures, classes, filters)
    fewest = int(owners.sum(dim=1).min())
    groups = torch.stack([row.nonzero()[:fewest, 0] for row in owners])  # [classes, channels]

    def of_batch(images: Tensor, targets: Tensor) -> Tensor:
        maps = model.forward_features(images)
        grouped = maps.flatten(2)[:, groups]  # [batch, classes, channels, places]
        kept = torch.rand(groups.shape).argsort(dim=1) >= fewest // 3
        discriminative = F.cross_entropy((grouped * kept[..., None]).amax(dim=2).mean(dim=2), targets)
        diverse = 1 - grouped.softmax(dim=3).amax(dim=2).sum(dim=2).mean() / fewest
        return F.cross_entropy(model.forward_head(maps), targets) + 2 * discriminative + 20 * diverse

    return Loss(of_batch, owners)


def binary_head(model: nn.Module, pictures: Iterable, classes: int, filters: int | None) -> Loss:
    """A fixed binary head as in QPM (Norrenbrock et al., ICLR 2025): a logit sums a class's standardised filters.

    Statistics and head stay as found before training. Filters are chosen by our assignment and not shared by classes;
    QPM shares them, and solves for features that are also unlike each other.
    """
    owners, sums = _assignment(model, pictures, classes, filters)
    with torch.no_grad():
        model.classifier.weight.copy_(owners / sums.deviation().clamp(min=1e-6))
        model.classifier.bias.copy_(-model.classifier.weight @ sums.mean().float())
    model.classifier.requires_grad_(False)
    return Loss(lambda images, targets: F.cross_entropy(model(images), targets), owners)


RIVALS = {
    "standard": standard,
    "probe": probe,
    "contrastive": contrastive,
    "mutual-channel": mutual_channel,
    "binary-head": binary_head,
}
