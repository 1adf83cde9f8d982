"""Why this class: for each image the filters that gave the logit, where they fired, and how much each gave."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from timm_csg.explain._grid import to_maps
from timm_csg.explain._run import Path, StageRun, Targets, looking_at, per_filter, readable, resized, run_head
from timm_csg.explain.filters import check_top, contributions, filter_matrix, is_exact, shares
from timm_csg.explain.inputs import Images
from timm_csg.labels import class_names
from timm_csg.metrics.display import html_table, in_one_line
from timm_csg.metrics.frames import frame_of_rows
from timm_csg.metrics.gate import owners
from timm_csg.model import is_differentiated
from timm_csg.running import as_input

if TYPE_CHECKING:
    import pandas


@in_one_line
@dataclass(frozen=True)
class FilterEvidence:
    """What one filter says for the explained class in one image.

    Attributes:
        filter: Index of the filter.
        gate: How much the filter serves the class, in [0, 1]; None without a class-filter matrix.
        owner: The class that the filter serves most; None without a class-filter matrix, and where it serves none.
        activation: Mean response over positions.
        contribution: What it adds to the class's logit on this path.
        share: Contribution divided by the sum of all positive contributions of the image.
        map: Where it responds, upsampled to the image [height, width]; None for tokens without a grid, and where the
            head reads only a class token.
    """

    filter: int
    gate: float | None
    owner: int | None
    activation: float
    contribution: float
    share: float
    map: Tensor | None


@dataclass(frozen=True)
class PathEvidence:
    """One path's answer for one image, and the filters behind the explained class's logit.

    Attributes:
        path: ``"standard"`` or ``"gated"``.
        predicted: The class this path predicts. With label gating the gate of the explained class was applied, so
            this is no prediction for an unlabelled image.
        probability: Softmax probability of the explained class.
        logit: Logit of the explained class.
        filters: The strongest filters, by contribution. On the gated path, and on the standard path of a model with a
            class-filter matrix, only filters that the class owns, if it owns any.
        owned_share: Share of the positive contributions that comes from filters the class owns; None without a matrix.
        exact: Whether contributions plus the bias sum to the logit; if not they are gradient × activation.
    """

    path: str
    predicted: int
    probability: float
    logit: float
    filters: list[FilterEvidence]
    owned_share: float | None
    exact: bool

    def __repr__(self) -> str:
        return (
            f"PathEvidence({self.path}: predicted={self.predicted}, probability={self.probability:.3f}, "
            f"logit={self.logit:.2f}, {self._shares})"
        )

    @property
    def _shares(self) -> str:
        """The filters with their shares, for ``repr``."""
        return "filters " + ", ".join(f"{found.filter}: {found.share:.1%}" for found in self.filters)


@dataclass(frozen=True)
class PredictionExplanation:
    """Why an image was given a class.

    Attributes:
        target: The explained class: the one asked for, or the one predicted by the standard path.
        standard: The standard path's evidence.
        gated: The gated path's evidence, through the gate of the explained class; None for plain models.
        class_names: The model's names for its classes; None where it has none.
    """

    target: int
    standard: PathEvidence
    gated: PathEvidence | None
    class_names: Sequence[str] | None = field(default=None, repr=False, compare=False)

    def __repr__(self) -> str:
        return (
            f"PredictionExplanation(target={self.name(self.target)}, predicted={self.name(self.predicted)}, "
            f"probability={self.probability:.3f}, {self.standard._shares})"
        )

    def _repr_html_(self) -> str:
        title = f"Why {self.name(self.target)}? Predicted: {self.name(self.predicted)}; probability of "
        title += f"{self.name(self.target)}: {self.probability:.1%}"
        rows = [
            {
                "path": path.path,
                "filter": found.filter,
                "serves": "–" if found.owner is None else self.name(found.owner),
                "response": f"{found.activation:.3g}",
                "contribution": f"{found.contribution:+.3g}",
                "share": f"{found.share:.1%} " + "▇" * round(20 * max(0.0, found.share)),
            }
            for path in self._paths
            for found in path.filters
        ]
        return html_table(rows, title)

    @property
    def _paths(self) -> list[PathEvidence]:
        return [path for path in (self.standard, self.gated) if path is not None]

    def name(self, index: int) -> str:
        """The name of a class, or its number where the model has no names.

        Args:
            index: Of the class.

        Returns:
            The name, or the number as text.
        """
        return str(index) if self.class_names is None else self.class_names[index]

    def to_dataframe(self) -> pandas.DataFrame:
        """A row for each filter that is named, of both paths: what ``FilterEvidence`` holds but for the map.

        Raises:
            ImportError: If pandas is missing.
        """
        return frame_of_rows(
            [
                {
                    "target": self.name(self.target),
                    "path": path.path,
                    "filter": found.filter,
                    "owner": None if found.owner is None else self.name(found.owner),
                    "gate": found.gate,
                    "activation": found.activation,
                    "contribution": found.contribution,
                    "share": found.share,
                }
                for path in self._paths
                for found in path.filters
            ]
        )

    @property
    def predicted(self) -> int:
        """The class that the standard path predicts."""
        return self.standard.predicted

    @property
    def probability(self) -> float:
        """The standard path's probability of the explained class."""
        return self.standard.probability

    @property
    def filters(self) -> list[FilterEvidence]:
        """The standard path's strongest filters."""
        return self.standard.filters


def explain_prediction(
    model: nn.Module, images: Images, targets: Targets = None, *, top: int = 5
) -> list[PredictionExplanation]:
    """Why each image is given its class: the filters that fired, where, and how much of the logit each gave.

    For a differentiated model these are the filters that the class owns (its row of the class-filter matrix holds their
    largest entry), and the gated path is explained too. For a plain model they are the strongest of all filters.

    Args:
        model: Any timm classifier, plain or differentiated; left as found.
        images: [batch, channels, height, width], normalised as in training; or pictures of any kind, see ``as_batch``.
        targets: Classes by index or name [batch], or one for all images, to ask "why not this class"; None: the class
            predicted by the standard path.
        top: Filters per image and path, at most.

    Returns:
        One explanation per image.

    Raises:
        TypeError: If the model is not a timm classifier, or an argument has the wrong type.
        ValueError: If an argument is out of its range.

    Example:
        >>> import timm, timm_csg
        >>> model = timm_csg.differentiate(timm.create_model("test_resnet", num_classes=2)).eval()
        >>> why = explain_prediction(model, torch.ones(1, 3, 64, 64), top=2)[0]
        >>> len(why.standard.filters), why.gated.path
        (2, 'gated')
    """
    with looking_at(model, images) as (inner, images):
        with torch.no_grad():
            features = inner.forward_features(as_input(inner, images))
        run = run_head(inner, features, targets)
        standard = _path_evidence(inner, run, images, "standard", top)
        gated: list[PathEvidence] | list[None] = [None] * len(images)
        if is_differentiated(inner):
            gated = _path_evidence(inner, run_head(inner, features, run.targets, "gated"), images, "gated", top)
        names = class_names(inner)
    return [PredictionExplanation(*parts, names) for parts in zip(run.targets.tolist(), standard, gated, strict=True)]


def _path_evidence(model: Any, run: StageRun, images: Tensor, path: Path, top: int) -> list[PathEvidence]:
    """Evidence of one path for every image."""
    contribution = contributions(model, run)
    num_filters = contribution.shape[1]
    check_top(top, num_filters)
    share, activation = shares(contribution), readable(per_filter(model, run.features)).mean(dim=2)
    probability = readable(run.logits).softmax(dim=1)
    maps = _maps(model, run, images)
    exact = is_exact(model, run.features, path)
    matrix = filter_matrix(model)
    owner = None if matrix is None else owners(matrix)
    evidence = []
    for row, target in enumerate(run.targets.tolist()):
        owned = None if owner is None else owner == target
        candidates = contribution[row]
        if owned is not None and owned.any():
            candidates = candidates.masked_fill(~owned, -torch.inf)
        strongest = candidates.topk(min(top, int((candidates > -torch.inf).sum()))).indices.tolist()
        drawn = None if maps is None else readable(resized(maps[row, strongest][None], images))[0]
        found = [
            FilterEvidence(
                filter=index,
                gate=None if matrix is None else float(matrix[target, index]),
                owner=None if owner is None or owner[index] < 0 else int(owner[index]),
                activation=float(activation[row, index]),
                contribution=float(contribution[row, index]),
                share=float(share[row, index]),
                map=None if drawn is None else drawn[place],
            )
            for place, index in enumerate(strongest)
        ]
        evidence.append(
            PathEvidence(
                path=path,
                predicted=int(run.logits[row].argmax()),
                probability=float(probability[row, target]),
                logit=float(run.logits[row, target]),
                filters=found,
                owned_share=None if owned is None else float(share[row][owned].clamp(min=0).sum()),
                exact=exact,
            )
        )
    return evidence


def _maps(model: Any, run: StageRun, images: Tensor) -> Tensor | None:
    """The filters' maps; None for tokens that have no grid, or a grid that the head does not read."""
    try:
        unread = run.gradient.ndim == 3 and run.gradient.any() and not to_maps(model, run.gradient, images).any()
        return None if unread else to_maps(model, run.features, images)
    except ValueError:
        return None
