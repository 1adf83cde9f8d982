"""PICNN: Guo, Yang, Yin, Chen and Ye, "PICNN: A Pathway towards Interpretable Convolutional Neural Networks", AAAI 2024
(https://arxiv.org/abs/2312.12068).

Every filter of the last stage has a probability for each class, learned with the weights. Beside the standard path (the
paper's discrimination pathway) there is an interpretation pathway: a class is drawn from the model's own prediction,
every filter stays with its probability for that class or is set to 0, and what stays must name the class. The label
chooses which pictures count, but does not go into the pathway, which therefore exists without labels, too.

The formulas are those of the authors' code (https://github.com/spdj2271/PICNN); the printed equations could not be
checked. What neither says is marked as ours.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from timm_csg.checks import check_choice, check_fraction
from timm_csg.mechanisms.base import Head, Mechanism, MechanismConfig
from timm_csg.mechanisms.registry import register_mechanism
from timm_csg.mechanisms.targets import class_rows

_CERTAIN = 1e4  # a logit whose softmax is exactly 1, also in half precision
_MARGIN = 1e-6  # relaxed draws keep this far from probabilities of 0 and 1, whose logits are infinite


@dataclass(frozen=True, kw_only=True)
class PICNNConfig(MechanismConfig):
    """Options of the interpretation pathway.

    Args:
        interpretation_weight: λ, weight of the pathway's loss; the authors' value for CIFAR-10.
        table: ``"learned"``: probabilities that start near 1 / classes and are learned. ``"fixed"``: filter k belongs
            to class k modulo the number of classes and stays there, every class with the same number of filters chosen
            blindly; the baseline that this paper and the class-specific gate's argue against.
        sampling: ``"straight_through"``: zeros and ones forward, the probabilities' own gradient backward, which is the
            authors' reparametrisation. ``"concrete"``: relaxed draws with their exact gradient (Maddison et al., ICLR
            2017, https://arxiv.org/abs/1611.00712), ours.
        temperature: Of the relaxed draws; the lower, the closer to zeros and ones.

    Raises:
        ValueError: If a value is out of its range.

    Example:
        >>> PICNNConfig(table="fixed").interpretation_weight
        2.0
    """

    interpretation_weight: float = 2.0
    table: Literal["learned", "fixed"] = "learned"
    sampling: Literal["straight_through", "concrete"] = "straight_through"
    temperature: float = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        check_fraction("interpretation_weight", self.interpretation_weight)
        check_choice("table", self.table, ("learned", "fixed"))
        check_choice("sampling", self.sampling, ("straight_through", "concrete"))
        check_fraction("temperature", self.temperature)
        if not self.temperature > 0:
            raise ValueError(f"temperature must be more than 0, but is {self.temperature}.")


def draw_classes(logits: Tensor, noise: Tensor, temperature: float | None = None) -> Tensor:
    """One class for each picture, drawn from the softmax of its logits.

    Args:
        logits: [batch, classes].
        noise: Uniform in (0, 1), the same shape. The class is the largest of logit + Gumbel noise −log(−log u), which
            draws from the softmax (the authors draw from it directly).
        temperature: None: one-hot rows o = p + ε, ε = (1 − p) for the drawn class and −p for the others, held fixed, so
            that the gradient is that of p = softmax(logits). A number: the softmax of the noisy logits over it.

    Returns:
        Rows [batch, classes], largest for the drawn class.

    Example:
        >>> draw_classes(torch.tensor([[0.0, 3.0]]), torch.tensor([[0.5, 0.5]]))
        tensor([[0., 1.]])
    """
    noisy = logits - torch.log(-torch.log(noise))
    if temperature is not None:
        return (noisy / temperature).softmax(dim=1)
    return _straight_through(class_rows(noisy.argmax(dim=1), logits.shape[1], logits.dtype), logits.softmax(dim=1))


def draw_filters(probabilities: Tensor, noise: Tensor, temperature: float | None = None) -> Tensor:
    """Which filters stay: a Bernoulli draw for each picture and filter.

    Args:
        probabilities: q [batch, filters].
        noise: u, uniform in (0, 1), the same shape; a filter stays where u < q.
        temperature: None: zeros and ones m = q + ε, ε = 1 − q where the filter stays and −q elsewhere, held fixed, so
            that the gradient is that of q. A number: sigmoid((logit q − logit u) / temperature), which is above 1/2
            where the filter stays.

    Returns:
        Mask [batch, filters] in [0, 1].

    Example:
        >>> draw_filters(torch.tensor([[0.9, 0.1]]), torch.tensor([[0.5, 0.5]]))
        tensor([[1., 0.]])
    """
    if temperature is None:
        return _straight_through((noise < probabilities).to(probabilities.dtype), probabilities)
    inner = probabilities.clamp(_MARGIN, 1 - _MARGIN)
    return ((inner.logit() - noise.logit()) / temperature).sigmoid()


def _straight_through(values: Tensor, like: Tensor) -> Tensor:
    """``values`` exactly, with the gradient of ``like``."""
    return values + (like - like.detach())


def interpretation_loss(logits: Tensor, drawn: Tensor, targets: Tensor) -> Tensor:
    """Cross entropy of the pathway's logits with the drawn class, mean over the pictures that show this class.

    With class indices these are the pictures whose class was drawn right, as in the authors' code; 0 if there are none.
    Soft targets weigh each picture with the drawn class's share, multi-hot ones count it if the class is there (ours).

    Args:
        logits: Of the interpretation pathway [batch, classes].
        drawn: Drawn classes, integers [batch].
        targets: Class indices [batch], soft or multi-hot targets [batch, classes].

    Returns:
        Scalar in nats, 0 or more.

    Example:
        >>> logits = torch.tensor([[0.0, 0.0], [9.0, 0.0]])
        >>> interpretation_loss(logits, torch.tensor([0, 0]), torch.tensor([0, 1]))
        tensor(0.6931)
    """
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    shares = class_rows(targets, logits.shape[1], logits.dtype).gather(1, drawn[:, None])[:, 0]
    losses = F.cross_entropy(logits, drawn, reduction="none")
    return (shares * losses).sum() / shares.sum().clamp_min(torch.finfo(logits.dtype).tiny)


@register_mechanism("picnn", PICNNConfig)
class InterpretationPathway(Mechanism):
    """The interpretation pathway of Guo et al., AAAI 2024; see ``PICNNConfig``.

    In eval mode nothing is drawn (ours): the class is the predicted one, and each filter is multiplied by its
    probability for it, the mean of the draws.
    """

    config: PICNNConfig
    correspondence: Tensor

    def __init__(self, num_filters: int, num_classes: int, config: PICNNConfig, *, channels_last: bool = False) -> None:
        super().__init__(num_filters, num_classes, config, channels_last=channels_last)
        if config.table == "learned":
            start = torch.rand(num_classes, num_filters, dtype=torch.float32)
            self.correspondence = nn.Parameter(start.softmax(dim=0))
            return
        if num_filters < num_classes:
            raise ValueError(
                f"table='fixed' gives every class filters of its own, but there are {num_filters} filters for "
                f"{num_classes} classes; use table='learned'."
            )
        blind = F.one_hot(torch.arange(num_filters) % num_classes, num_classes).T
        self.register_buffer("correspondence", _CERTAIN * blind.float())

    @property
    def needs_targets(self) -> bool:
        """The pathway goes by the model's own prediction."""
        return False

    def probabilities(self) -> Tensor:
        """How probable it is that a filter serves a class [classes, filters], float32 or wider; columns sum to 1."""
        wide = self.correspondence.to(torch.promote_types(self.correspondence.dtype, torch.float32))
        return wide.softmax(dim=0)

    def gated_logits(self, features: Tensor, targets: Tensor | None, head: Head) -> Tensor:
        """Logits [batch, classes] of the interpretation pathway; targets are not looked at."""
        return self._interpret(features, head)[0]

    def _interpret(self, features: Tensor, head: Head) -> tuple[Tensor, Tensor]:
        """The pathway's logits [batch, classes] and the class of each picture [batch]."""
        logits = head.logits(features)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        table = self.probabilities().to(logits.dtype)
        if self.training:
            temperature = self.config.temperature if self.config.sampling == "concrete" else None
            rows = draw_classes(logits, _uniform(logits), temperature)
            kept = (rows @ table).clamp(0, 1)  # a sum of rounded numbers
            mask = draw_filters(kept, _uniform(kept), temperature)
        else:
            rows = class_rows(logits.argmax(dim=1), self.num_classes, logits.dtype)
            mask = rows @ table
        return head.logits(features * self.along_filters(mask, features)), rows.argmax(dim=1)

    def losses(self, features: Tensor, targets: Tensor | None, head: Head) -> dict[str, Tensor]:
        """``{"interpretation": ...}``, see ``interpretation_loss``; nothing without targets."""
        if targets is None:
            return {}
        logits, drawn = self._interpret(features, head)
        return {"interpretation": interpretation_loss(logits, drawn, targets)}

    def loss_weights(self) -> dict[str, float | Tensor]:
        """λ for ``"interpretation"``; ``"gated"``, the criterion on all pictures, is measured but not trained on."""
        return {"gated": 0.0, "interpretation": self.config.interpretation_weight}

    def class_filter_matrix(self) -> Tensor:
        """Each filter's probabilities over its largest one [classes, filters]: 1 for its owner, as in a gate (ours).

        The probabilities themselves have the same mean whatever is learned.
        """
        table = self.probabilities().detach()
        return table / table.amax(dim=0)


def _uniform(like: Tensor) -> Tensor:
    """Uniform noise of the same shape, never exactly 0 or 1, so that its logarithms are finite."""
    return torch.rand_like(like).clamp(1e-7, 1 - 1e-7)
