"""Interpretable filters (ICNN): Zhang, Wu and Zhu, "Interpretable Convolutional Neural Networks", CVPR 2018
(https://arxiv.org/abs/1710.00935).

Every filter learns to answer to one part of the objects of one category. A template at the filter's strongest position
masks the rest of its map, in training and at inference; a loss, the negative mutual information between maps and
templates, rewards maps with one peak on the filter's category and quiet maps on the others. Two variants are here:
``"paper"``, the formulas as printed, and ``"released"``, what the authors' code computes; both are in ``templates.py``.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from timm_csg.checks import check_choice, check_fraction
from timm_csg.mechanisms.base import Head, Mechanism, MechanismConfig
from timm_csg.mechanisms.registry import register_mechanism
from timm_csg.mechanisms.targets import class_rows
from timm_csg.mechanisms.templates import (
    centre_of_gravity,
    check_grid,
    fitting_width,
    information_terms,
    log_mean_exp,
    part_template,
    regrid,
    released_slope,
    square_grid,
    template_fits,
    template_table,
    with_gradient,
)
from timm_csg.peaks import peak

_KEPT_GRID = 7  # running normalisers are kept on a grid of this size, whatever the map's, so that checkpoints fit
_RATE = 0.1  # share of the newest batch in running statistics (the authors' code)
_WIDTH_RATE = 0.01  # the same for the learned widths; the authors' pseudo-gradient and learning rates: 0.005 to 0.05
_CHUNK = 2**20  # map values whose fits with all templates are in memory at a time


@dataclass(frozen=True, kw_only=True)
class ICNNConfig(MechanismConfig):
    """Options of interpretable filters.

    Args:
        variant: ``"paper"``: mask at the strongest position, width fixed, mutual information over all templates,
            category of a filter chosen once an epoch. ``"released"``: mask at the centre of gravity, width learned,
            per-image weights, category followed by a moving average.
        beta: Width of the templates: they fall from 1 to 0 within 1 / ``beta`` of the map's side. The released
            variant starts with it.
        strength: The numerator of τ = ``strength`` / n², with which the paper's variant weighs the fit of a map with a
            template.
        gradient: Of the paper's loss: ``"autograd"``, exact, or ``"paper"``, the paper's approximation, which keeps
            only the template that belongs to the image: the one at the peak if the image shows the filter's category,
            else the negative one.
        part_weight: Factor in λ, the weight of the part loss: ``part_weight`` / epoch, counted from 1, and for the
            paper's variant times the mean maximum of a filter's maps. The authors' code has 0.1 for one class, 0.02 for
            up to 10 and 0.002 for more.
        extra_conv: A 3x3 convolution with ReLU before the mask, at first the identity: ``"none"``, ``"depthwise"`` or
            ``"full"`` (the paper's, filters × filters).

    Raises:
        ValueError: If a value is out of its range.

    Example:
        >>> ICNNConfig(beta=3.0).variant
        'paper'
    """

    variant: Literal["paper", "released"] = "paper"
    beta: float = 4.0
    strength: float = 0.5
    gradient: Literal["autograd", "paper"] = "autograd"
    part_weight: float = 1.0
    extra_conv: Literal["none", "depthwise", "full"] = "none"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("variant", self.variant, ("paper", "released"))
        check_choice("gradient", self.gradient, ("autograd", "paper"))
        check_choice("extra_conv", self.extra_conv, ("none", "depthwise", "full"))
        check_fraction("beta", self.beta)
        check_fraction("strength", self.strength)
        check_fraction("part_weight", self.part_weight)
        if self.variant == "released" and self.gradient != "autograd":
            raise ValueError("gradient belongs to variant='paper'; the released variant has a gradient of its own.")


@register_mechanism("icnn", ICNNConfig)
class InterpretableFilters(Mechanism):
    """Part filters of Zhang et al., CVPR 2018; see ``ICNNConfig``.

    The mask acts at every forward, so that both paths of the model are the same. Maps with negative values go through a
    ReLU first. Tokens need a square grid without class token. Under DistributedDataParallel the running statistics are
    those of the first process, which broadcasts its buffers.
    """

    config: ICNNConfig
    acts_without_targets = True
    category: Tensor
    class_sums: Tensor
    class_counts: Tensor
    mean_maximum: Tensor
    log_z: Tensor
    half_beta: Tensor
    batches: Tensor
    epoch: Tensor

    def __init__(self, num_filters: int, num_classes: int, config: ICNNConfig, *, channels_last: bool = False) -> None:
        super().__init__(num_filters, num_classes, config, channels_last=channels_last)
        self.conv: nn.Conv2d | None = None
        if config.extra_conv != "none":
            groups = num_filters if config.extra_conv == "depthwise" else 1
            self.conv = nn.Conv2d(num_filters, num_filters, 3, padding=1, groups=groups, bias=False)
            nn.init.dirac_(self.conv.weight, groups)
        self.register_buffer("category", torch.zeros(num_filters, dtype=torch.long))
        self.register_buffer("class_sums", torch.zeros(num_classes, num_filters))
        self.register_buffer("class_counts", torch.zeros(num_classes))
        self.register_buffer("mean_maximum", torch.zeros(num_filters))
        if config.variant == "paper":
            self.register_buffer("log_z", torch.zeros(num_filters, _KEPT_GRID**2 + 1))
        else:
            self.register_buffer("half_beta", torch.full((num_filters,), config.beta / 2))
        self.register_buffer("batches", torch.zeros((), dtype=torch.long))
        self.register_buffer("epoch", torch.zeros((), dtype=torch.long))
        self._told_epoch: int | None = None

    @property
    def needs_targets(self) -> bool:
        """The mask needs none."""
        return False

    @property
    def paths_differ(self) -> bool:
        """The mask acts on both paths, which are therefore one."""
        return False

    def check_model(self, model: Any) -> None:
        """As ``templates.check_grid``."""
        check_grid(model)

    def set_epoch(self, epoch: int) -> None:
        """Begin an epoch: λ falls, and the paper's variant gives every filter the category of the last epoch's sums."""
        told, self._told_epoch = self._told_epoch, epoch
        if epoch == told or epoch == int(self.epoch):
            return
        self.epoch.fill_(epoch)
        if self.config.variant == "paper":
            self.category.copy_(torch.where(self.class_counts.sum() > 0, self._strongest_class(), self.category))
            self.class_sums.zero_()
            self.class_counts.zero_()

    def forward(self, features: Tensor, targets: Tensor | None = None) -> Tensor:
        """Features behind the mask: max(x · T, 0) with the template T at the filter's own position, without its τ."""
        maps = self._maps(features)
        with torch.no_grad():
            mask = self._masks(maps, low=0.0)
        return self._like(maps * mask, features)

    def _maps(self, features: Tensor) -> Tensor:
        """What is masked: ReLU of the features, behind the extra convolution, [batch, filters, height, width]."""
        maps = F.relu(features)
        if maps.ndim == 3:
            maps = maps.transpose(1, 2).unflatten(2, square_grid(maps.shape[1]))
        elif self.channels_last:
            maps = maps.permute(0, 3, 1, 2)
        return maps if self.conv is None else F.relu(self.conv(maps.to(self.conv.weight.dtype)))

    def _like(self, maps: Tensor, features: Tensor) -> Tensor:
        if features.ndim == 3:
            return maps.flatten(2).transpose(1, 2)
        return maps.permute(0, 2, 3, 1) if self.channels_last else maps

    def _masks(self, maps: Tensor, low: float = -1.0) -> Tensor:
        """The positive template of each map [batch, filters, height, width], in [``low``, 1], without τ."""
        height, width = maps.shape[-2:]
        if self.config.variant == "paper":
            table = template_table(height, width, self.config.beta, maps.device).clamp(min=low)
            return F.embedding(peak(maps), table.to(maps.dtype)).reshape(maps.shape)
        size = math.sqrt(height * width)  # the authors' distances are in units of half a map, (size - 1) / 2
        beta = 2 * self.half_beta.float() * size / max(size - 1, 1)
        template = part_template(*centre_of_gravity(maps.float()), height, width, beta[:, None, None])
        return template.clamp(min=low).to(maps.dtype)

    def losses(self, features: Tensor, targets: Tensor | None, head: Head) -> dict[str, Tensor]:
        """``{"part": ...}``, of the paper's variant the mean over filters of −MI(X; T) in nats; none without targets.

        Filters weigh with their mean maximum, as the paper's λ does. The released variant has no loss but a gradient;
        what is returned is the number whose derivative it is.
        """
        if targets is None:
            return {}
        maps = self._maps(features)  # in autocast's dtype, as the mask sees them
        with torch.autocast(features.device.type, enabled=False):
            maps, membership = maps.float(), class_rows(targets, self.num_classes, torch.float32)
            with torch.no_grad():
                if self.training:
                    self._observe(maps, membership)
                member = membership[:, self.category]
                is_paper = self.config.variant == "paper"
                value, slope = self._paper_terms(maps, member) if is_paper else self._released_terms(maps, member)
            per_filter = with_gradient(value, maps, slope)
            return {"part": (per_filter * self._filter_weights()).sum() / self._filter_weights().sum().clamp_min(1e-12)}

    def _filter_weights(self) -> Tensor:
        return self.mean_maximum.float() if self.config.variant == "paper" else torch.ones_like(self.mean_maximum)

    def loss_weights(self) -> dict[str, float | Tensor]:
        """λ for ``"part"``: the factor, over the epoch counted from 1, times the sum of the filters' own weights."""
        return {"gated": 1.0, "part": self.config.part_weight * self._filter_weights().sum() / (1 + self.epoch)}

    def class_filter_matrix(self) -> Tensor | None:
        """1 for each filter's category, else 0, [classes, filters]; None before the first training step."""
        if not int(self.batches):
            return None
        return F.one_hot(self.category, self.num_classes).T.float()

    def _observe(self, maps: Tensor, membership: Tensor) -> None:
        """Bring running statistics up to date with one batch."""
        rate = _rate(self.batches == 0).to(self.mean_maximum)
        self.batches += 1
        peaks = maps.amax(dim=(2, 3))
        self.mean_maximum.copy_(self.mean_maximum.lerp(peaks.mean(dim=0).to(self.mean_maximum), rate))
        seen = membership.sum(dim=0)
        if self.config.variant == "paper":
            self.class_sums += membership.T @ maps.sum(dim=(2, 3))
            self.class_counts += seen
            # Until the first epoch has ended there are no sums but these.
            self.category.copy_(torch.where(self.epoch == 0, self._strongest_class(), self.category))
        else:
            means = membership.T @ peaks / seen.clamp_min(1e-12)[:, None]
            rates = _rate(self.class_counts == 0)[:, None]
            followed = self.class_sums.lerp(means.to(self.class_sums), rates.to(self.class_sums))
            self.class_sums.copy_(torch.where(seen[:, None] > 0, followed, self.class_sums))
            self.class_counts += seen
            self.category.copy_(self.class_sums.argmax(dim=0))

    def _strongest_class(self) -> Tensor:
        return (self.class_sums / self.class_counts.clamp_min(1e-12)[:, None]).argmax(dim=0)

    def _paper_terms(self, maps: Tensor, member: Tensor) -> tuple[Tensor, Tensor]:
        """−MI [filters] and its derivative with respect to the maps, a few filters at a time."""
        batch, _, height, width = maps.shape
        positions = height * width
        table = template_table(height, width, self.config.beta, maps.device)
        step = max(1, _CHUNK // (batch * positions))
        values, slope = [], torch.empty_like(maps, memory_format=torch.contiguous_format)
        for start in range(0, self.num_filters, step):
            some = slice(start, start + step)
            fits = template_fits(maps[:, some].flatten(2), table, self.config.strength)
            terms = information_terms(fits, self._log_z(fits, some, height, width))
            values.append(-terms.sum(dim=(0, 2)))
            if self.config.gradient == "paper":
                at = peak(maps[:, some])[..., None]
                own = torch.zeros_like(terms).scatter_(2, at, terms.gather(2, at) * member[:, some, None])
                own[..., -1] = terms[..., -1] * (1 - member[:, some])
                terms = own
            pull = terms[..., :-1] @ table - terms[..., -1:]
            slope[:, some] = (-self.config.strength / positions * pull).unflatten(2, (height, width))
        return torch.cat(values), slope

    def _log_z(self, fits: Tensor, some: slice, height: int, width: int) -> Tensor:
        """Logarithm of Z_T / maps for some filters [filters, templates]: a moving average, this batch included."""
        found = log_mean_exp(fits)
        rate = _rate(self.batches <= (1 if self.training else 0))
        kept = regrid(self.log_z[some].float(), (_KEPT_GRID, _KEPT_GRID), (height, width))
        mixed = torch.logaddexp(kept + torch.log1p(-rate), found + rate.log())
        if self.training:
            self.log_z[some] = regrid(mixed, (height, width), (_KEPT_GRID, _KEPT_GRID)).to(self.log_z)
        return mixed

    def _released_terms(self, maps: Tensor, member: Tensor) -> tuple[Tensor, Tensor]:
        masks = self._masks(maps)
        if self.training:
            self._learn_widths(maps, masks, member)
        share = (self.class_counts / self.class_counts.sum().clamp_min(1e-12)).float()
        if self.num_classes > 10:
            share = torch.full_like(share, 1 / self.num_classes)
        slope = released_slope(maps, masks, member, share[self.category].clamp(1e-3, 1 - 1e-3))
        return (slope * maps).flatten(2).sum(dim=(0, 2)), slope

    def _learn_widths(self, maps: Tensor, masks: Tensor, member: Tensor) -> None:
        """Move each filter's β / 2 towards what fits its responses."""
        wanted = fitting_width(maps, masks, member)
        wanted = torch.where(wanted.isfinite(), wanted, self.half_beta.to(wanted))
        self.half_beta.copy_(self.half_beta.lerp(wanted.to(self.half_beta), _WIDTH_RATE))


def _rate(is_first: Tensor) -> Tensor:
    """Share of the newest batch in a running statistic: all of it for the first, float32 whatever torch's default."""
    return is_first.float() * (1 - _RATE) + _RATE
