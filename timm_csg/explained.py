"""A model that returns its explanations with its logits, computed forward only: what ``timm_csg.export`` writes."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from timm_csg.explain._grid import token_grid
from timm_csg.explain._run import masked, per_filter
from timm_csg.explain.class_maps import own_filters
from timm_csg.head import effective_weight, find_classifier
from timm_csg.mechanisms.base import Head
from timm_csg.model import DifferentiatedModel
from timm_csg.running import check_images
from timm_csg.stage import is_channels_last

OUTPUTS = ("logits", "evidence", "map", "responses")


class ExplainedModel(nn.Module):
    """A differentiated model in eval mode that returns everything at once; made inside ``borrowed``.

    Args:
        model: The model.
        outputs: Those that are wanted.
        upsample: See ``export_onnx``.
        input_size: Channels, height and width of the images.

    Attributes:
        outputs: Those that there are, of those that are wanted.
        inputs: Names of the inputs; ``target`` only where there is a map.
        missing: Outputs that are wanted and do not exist, each with the reason.
        images: Two images of zeros, since ``torch.export`` takes a batch of one for a constant.
    """

    weight: Tensor
    places: Tensor
    rows: Tensor
    columns: Tensor

    def __init__(
        self, model: DifferentiatedModel, outputs: Sequence[str], upsample: bool, input_size: tuple[int, int, int]
    ) -> None:
        super().__init__()
        self.model, self.upsample = model, upsample
        parameter = next(parameter for parameter in model.parameters() if parameter.is_floating_point())
        self.images = torch.zeros(2, *input_size, device=parameter.device, dtype=parameter.dtype)
        check_images(model, self.images)
        with torch.no_grad():
            features = masked(model, model.forward_features(self.images))
        head = model.read_head()
        self.grid, self.prefix = self._find_grid(features)
        self.missing: dict[str, str] = {}
        self._find_evidence(head, features, set(outputs))
        self.outputs = tuple(name for name in OUTPUTS if name in outputs and name not in self.missing)
        self.inputs = ("images", "target") if "map" in self.outputs else ("images",)
        self.train(False)

    def _find_grid(self, features: Tensor) -> tuple[tuple[int, int] | None, int]:
        if features.ndim == 4:
            return None, 0
        try:
            return token_grid(self.model, features, self.images)
        except ValueError:
            return None, 0

    def _find_evidence(self, head: Head, features: Tensor, wanted: set[str]) -> None:
        """The weights of own filters and of places; what there is not is noted as missing."""
        kind = type(self.model).__name__
        without = _why_no_evidence(self.model)
        if without is not None:
            self.missing = {name: without for name in ("evidence", "map") if name in wanted}
            return
        weight, _ = effective_weight(find_classifier(self.model))
        self.register_buffer("weight", (weight * own_filters(self.model)).detach())
        if "map" not in wanted:
            return
        places = _weights_of_places(self.model, head, features)
        if places is None:
            self.missing["map"] = f"the head of {kind} does not pool with fixed weights, as a mean does"
        elif features.ndim == 3 and self.grid is None:
            self.missing["map"] = f"the features of {kind} do not form a grid"
        elif not places[self.prefix :].any():
            self.missing["map"] = f"the head of {kind} reads only a class token, which has no place in the image"
        else:
            self.register_buffer("places", places[self.prefix :])
            grid = self._responses(features).shape[2:]
            for name, cells, pixels in zip(("rows", "columns"), grid, self.images.shape[2:], strict=True):
                self.register_buffer(name, _bilinear(cells, pixels).to(self.images))

    def forward(self, images: Tensor, target: Tensor | None = None) -> dict[str, Tensor]:
        """All outputs by name, in the order of ``outputs``."""
        features = masked(self.model, self.model.forward_features(images))
        head = self.model.read_head()
        found = {"logits": head.logits(features)}
        responses = self._responses(features)
        if "evidence" in self.outputs:
            found["evidence"] = F.linear(head.pooled(features).flatten(1), self.weight)
        if "map" in self.outputs and target is not None:
            chosen = torch.where(target < 0, found["logits"].argmax(dim=1), target)
            maps = self.weight.index_select(0, chosen)[:, None] @ responses.flatten(2) * self.places
            maps = maps.reshape(-1, *responses.shape[2:])
            found["map"] = self.rows @ maps @ self.columns.T if self.upsample else maps
        found["responses"] = responses
        return {name: found[name] for name in self.outputs}

    def _responses(self, features: Tensor) -> Tensor:
        """[batch, filters, height, width], or [batch, filters, tokens] without a grid."""
        if features.ndim == 4:
            return features.permute(0, 3, 1, 2) if is_channels_last(self.model) else features
        tokens = features[:, self.prefix :].transpose(1, 2)
        return tokens if self.grid is None else tokens.unflatten(2, self.grid)


def _bilinear(cells: int, pixels: int) -> Tensor:
    """What each cell counts in each pixel of one side [pixels, cells]: two small products beat a general resize."""
    each = torch.eye(cells, device="cpu")[None]
    return F.interpolate(each, size=pixels, mode="linear", align_corners=False)[0].T.contiguous()


def _why_no_evidence(model: DifferentiatedModel) -> str | None:
    """Why no sum over own filters is a part of the logit; None where it is."""
    if model.head_kind != "linear":
        return f"the head of {type(model).__name__} is more than pooling and a linear layer ({model.head_kind!r})"
    try:
        own_filters(model)
    except ValueError as error:
        return str(error).partition(";")[0]
    return None


def _weights_of_places(model: DifferentiatedModel, head: Head, features: Tensor) -> Tensor | None:
    """How much each position counts in what the head pools [positions]; None if that depends on the values."""
    rows = []
    for seed in (0, 1):
        generator = torch.Generator().manual_seed(seed)
        leaf = torch.rand(features[:1].shape, generator=generator, device="cpu").to(features).requires_grad_()
        (gradient,) = torch.autograd.grad(head.pooled(leaf).sum(), leaf)
        rows.append(per_filter(model, gradient)[0])
    weights = torch.cat(rows)  # of all filters, twice
    is_fixed = torch.allclose(weights, weights[:1].expand_as(weights), rtol=1e-3, atol=1e-7)
    return weights[0].detach() if is_fixed else None
