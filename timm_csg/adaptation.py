"""Owners without training: one pass, an assignment, and a classifier fitted on a class's own filters only."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from timm_csg.assignment import Assignment, features_of, find_assigned, no_sums, use_sums
from timm_csg.mechanisms.targets import is_soft
from timm_csg.responses import ResponseSums

_PENALTIES = (1.0, 0.3, 0.1, 0.03, 0.01, 0.003)
_HELD_OUT = 5  # every fifth picture of a class


class Adaptation(NamedTuple):
    """What ``adapt`` did.

    Attributes:
        assignment: Which filters the classes own, see ``assign_filters``.
        penalty: The weight of the L2 penalty that was chosen.
        held_out_accuracy: Accuracy on a fifth of the pictures, with a classifier fitted on the others.
    """

    assignment: Assignment
    penalty: float
    held_out_accuracy: float


@torch.no_grad()
def adapt(
    model: nn.Module,
    loader: Iterable[tuple[Tensor, Tensor]],
    *,
    amp_dtype: torch.dtype | None = None,
    progress: Callable[[int], None] | None = None,
    distributed: bool = False,
) -> Adaptation:
    """Give the filters owners without training the network, in about the time of one evaluation.

    One pass in eval mode, an assignment as ``assign_filters`` makes it, and a softmax regression on the pooled features
    in which every class may use its own filters only. The filters themselves stay as they are; fine-tune afterwards if
    they do not know their class well enough. Keeps 4 bytes for each picture and filter.

    Args:
        model: A model with the mechanism ``"assigned"``; its modes are left as found, its classifier is replaced.
        loader: Training pictures, best without augmentation: yields (images, class indices or soft targets).
        amp_dtype: Autocast dtype; None: no autocast.
        progress: Called with the number of images after each batch.
        distributed: Call it in every process of the running process group, each with a loader of its own share: all get
            the same assignment and classifier.

    Returns:
        The assignment and how well the classifier does on pictures held out from the fit.

    Raises:
        TypeError: If the model has no assigned filters.
        ValueError: If its head has other layers between pooling and classifier than a norm, the loader yields nothing,
            a class has no pictures, targets are multi-hot, or responses are not finite.

    Example:
        >>> import timm, timm_csg
        >>> model = timm_csg.differentiate(timm.create_model("test_resnet"), 2, mechanism="assigned")
        >>> adapt(model, [(torch.rand(4, 3, 32, 32), torch.tensor([0, 1, 1, 0]))]).assignment.matrix.shape
        torch.Size([2, 96])
    """
    inner, mechanism = find_assigned(model)
    head = inner.read_head()
    if head.weight is None or not mechanism.config.mask_classifier:
        why = "its classifier is not masked" if head.weight is not None else f"its head is of kind {head.kind!r}"
        raise ValueError(
            f"adapt() fits the classifier on a class's own filters, but {why}, so that there is no weight for each "
            "filter and class; fine-tune with assign_filters() instead."
        )
    weight = head.own_weight()
    sums = no_sums(mechanism)
    seen: list[tuple[Tensor, Tensor]] = []
    for features, targets in features_of(inner, loader, amp_dtype=amp_dtype, progress=progress):
        if targets.ndim == 2 and not is_soft(targets):
            raise ValueError("adapt() fits one class for each picture, but targets are multi-hot; fine-tune instead.")
        sums = sums.plus(ResponseSums.of(mechanism.responses(features, head), targets, len(sums.target)))
        labels = targets.long() if targets.ndim == 1 else targets.float()
        seen.append((head.pooled(features).flatten(1).float(), labels))
    if distributed:
        sums, seen = sums.of_all_processes(), _of_all_processes(seen, weight.device)
    assignment = use_sums(inner, mechanism, sums)
    inputs, targets = (torch.cat(column) for column in zip(*seen, strict=True))
    fit = fit_masked_classifier(inputs, targets, mechanism.assignment, with_bias=head.bias is not None)
    with torch.no_grad():
        weight.copy_(fit.weight)
        if head.bias is not None:
            head.bias.copy_(fit.bias)
    for parameter in (weight, head.bias) if distributed else ():
        if parameter is not None:
            dist.broadcast(parameter.data, 0)  # sums on a GPU may differ in the last bits
    return Adaptation(assignment, fit.penalty, fit.held_out_accuracy)


def _of_all_processes(seen: list[tuple[Tensor, Tensor]], device: torch.device) -> list[tuple[Tensor, Tensor]]:
    """What every process saw, in the order of their ranks."""
    parts: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(parts, [(inputs.cpu(), targets.cpu()) for inputs, targets in seen])
    return [(inputs.to(device), targets.to(device)) for part in parts for inputs, targets in part]


class MaskedFit(NamedTuple):
    """A classifier that ``fit_masked_classifier`` found.

    Attributes:
        weight: [classes, filters], 0 where a class does not own a filter.
        bias: [classes].
        penalty: Weight of the L2 penalty on weights per standard deviation.
        held_out_accuracy: Accuracy on the pictures held out to choose it.
    """

    weight: Tensor
    bias: Tensor
    penalty: float
    held_out_accuracy: float


def fit_masked_classifier(inputs: Tensor, targets: Tensor, assignment: Tensor, *, with_bias: bool = True) -> MaskedFit:
    """Softmax regression in which the logit of a class sees that class's own filters only.

    Minimises the mean cross entropy + penalty / 2 × Σ w² over weights per standard deviation, with L-BFGS. The penalty
    is the one of 1, 0.3, 0.1, 0.03, 0.01 and 0.003 with the smallest cross entropy on every fifth picture of each
    class, held out; then all pictures are fitted.

    Args:
        inputs: What the classifier sees [pictures, filters].
        targets: Class indices [pictures] or soft targets [pictures, classes].
        assignment: Whether a class owns a filter, bool [classes, filters].
        with_bias: Whether the classifier has a bias; if not, it is fitted without one and the bias is 0.

    Returns:
        The classifier.

    Example:
        >>> inputs, targets = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 0.1], [0.1, 1.0]]), torch.tensor([0, 1, 0, 1])
        >>> (fit_masked_classifier(inputs, targets, torch.eye(2).bool()).weight > 0).int()
        tensor([[1, 0],
                [0, 1]], dtype=torch.int32)
    """
    mean, deviation = inputs.mean(dim=0), inputs.std(dim=0, correction=0)
    deviation = torch.where(deviation > 1e-6 * mean.abs(), deviation, torch.inf)  # a constant says nothing
    mean = mean if with_bias else torch.zeros_like(mean)
    inputs = (inputs - mean) / deviation
    classes = targets if targets.ndim == 1 else targets.argmax(dim=1)
    held_out = _every_fifth(classes)
    penalty, accuracy = _PENALTIES[0], float("nan")
    if held_out.any():
        fits = _fits(inputs[~held_out], targets[~held_out], assignment, _PENALTIES, with_bias)
        logits = [F.linear(inputs[held_out], weight, bias) for weight, bias in fits]
        best = min(range(len(fits)), key=lambda index: float(F.cross_entropy(logits[index], targets[held_out])))
        penalty = _PENALTIES[best]
        accuracy = float((logits[best].argmax(dim=1) == classes[held_out]).double().mean())
    weight, bias = _fits(inputs, targets, assignment, (penalty,), with_bias)[0]
    weight = weight / deviation
    return MaskedFit(weight, bias - weight @ mean, penalty, accuracy)


def _every_fifth(classes: Tensor) -> Tensor:
    """Whether a picture is the fifth, tenth, ... of its class, bool [pictures]."""
    order = classes.argsort(stable=True)
    counts = torch.bincount(classes)
    place = torch.arange(len(classes), device=classes.device) - (counts.cumsum(0) - counts)[classes[order]]
    fifth = torch.empty_like(place, dtype=torch.bool)
    fifth[order] = place % _HELD_OUT == _HELD_OUT - 1
    return fifth


def _fits(
    inputs: Tensor, targets: Tensor, assignment: Tensor, penalties: tuple[float, ...], with_bias: bool
) -> list[tuple[Tensor, Tensor]]:
    """Weight and bias for each penalty, each fit starting from the one before."""
    own = assignment.to(inputs.dtype)
    weight = torch.zeros_like(own, requires_grad=True)
    bias = torch.zeros(len(own), dtype=own.dtype, device=own.device, requires_grad=with_bias)
    fitted = [weight, bias] if with_bias else [weight]
    results = []
    for penalty in penalties:
        optimizer = torch.optim.LBFGS(fitted, max_iter=100, line_search_fn="strong_wolfe")

        def loss(penalty: float = penalty, optimizer: torch.optim.LBFGS = optimizer) -> Tensor:
            optimizer.zero_grad()
            value = F.cross_entropy(F.linear(inputs, weight * own, bias), targets)
            value = value + penalty / 2 * (weight * own).square().sum()
            value.backward()
            return value

        with torch.enable_grad():
            optimizer.step(loss)
        results.append(((weight * own).detach().clone(), bias.detach().clone()))
    return results
