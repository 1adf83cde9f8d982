"""``report``: one HTML file that shows what a model has learned to a person who knows nothing of the method."""

from __future__ import annotations

import base64
import hashlib
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from string import Template

from torch import Tensor, nn

from timm_csg.checkpoint import replacing
from timm_csg.model import is_differentiated
from timm_csg.plots.report.book import Book, Limits, make_book
from timm_csg.plots.report.findings import find_out
from timm_csg.plots.report.matrices import data
from timm_csg.plots.report.pages import all_pages
from timm_csg.plots.report.templates import asset, clean
from timm_csg.version import __version__

_MOST_BYTES = 10_000_000


def report(
    model: nn.Module,
    loader: Iterable[tuple[Tensor, Tensor]],
    path: str | os.PathLike[str] = "report.html",
    *,
    class_names: Sequence[str] | None = None,
    reference: nn.Module | None = None,
    title: str | None = None,
) -> Path:
    """Write a report of what a model's filters have learned: one file that needs no network, below 10 MB.

    It shows which classes own which filters, what each filter responds to, why images were given their class, which
    classes share filters and are confused, and how the numbers compare with those of another model. In a model without
    a class-filter matrix, a plain one for example, the owner of a filter is the class it tells most about.

    The images are passed through the model once, and through the reference once; where the head is not linear, once
    more for the effect of removing filters. Large models are shown in part: the report says what was left out. The
    same model and images give the same bytes.

    Args:
        model: A plain or differentiated timm classifier; left as found.
        loader: Yields (images, class indices), images normalised as timm does, in the same order every time: no
            shuffling. Best are images that the model was not trained on.
        path: The file, written whole or not at all.
        class_names: One for each class; None: their numbers.
        reference: A model to compare with, for example one from standard training; its filters are not shown.
        title: Of the report; None: the architecture's name.

    Returns:
        The path.

    Raises:
        TypeError: If a model is not a timm classifier.
        ValueError: If the names do not fit, the loader yields nothing or shuffles, or the models have other classes.

    Example:
        >>> import tempfile, timm, torch
        >>> model = timm.create_model("test_resnet", num_classes=2)
        >>> loader = [(torch.rand(4, 3, 32, 32), torch.tensor([0, 1, 0, 1]))]
        >>> report(model, loader, tempfile.mkdtemp() + "/report.html", class_names=["cat", "dog"]).name
        'report.html'
    """
    path = Path(path)
    num_classes = int(getattr(model, "num_classes", 0))
    names = [str(index) for index in range(num_classes)] if class_names is None else list(map(str, class_names))
    if len(names) != num_classes:
        raise ValueError(f"the model has {num_classes} classes, but there are {len(names)} class names.")
    if reference is not None and int(getattr(reference, "num_classes", 0)) != num_classes:
        raise ValueError(
            f"the model has {num_classes} classes, the reference {getattr(reference, 'num_classes', 0)}; compare "
            "models of the same classes."
        )
    findings = find_out(model, loader)
    compared = None
    if reference is not None:
        compared = (
            "reference" if is_differentiated(reference) else "standard model",
            find_out(reference, loader).numbers,
        )
    architecture = str((getattr(model, "pretrained_cfg", None) or {}).get("architecture") or type(model).__name__)
    title = title or f"What {architecture} has learned"
    limits = Limits()
    html = _html(make_book(model, loader, findings, names, title, compared, limits))
    while len(html) > _MOST_BYTES and limits != limits.tighter():
        limits = limits.tighter()
        html = _html(make_book(model, loader, findings, names, title, compared, limits))
    with replacing(path) as temporary:
        temporary.write_bytes(html)
    return path


def _html(book: Book) -> bytes:
    body = all_pages(book)  # names the pictures that the style sheet then holds
    style, pictures, early, script = asset("report.css"), book.pictures.style(), asset("early.js"), asset("report.js")
    policy = "; ".join(
        [
            "default-src 'none'",
            "img-src data:",
            f"style-src {_hash(style)} {_hash(pictures)}",
            f"script-src {_hash(early)} {_hash(script)}",
            "base-uri 'none'",
            "form-action 'none'",
        ]
    )
    text = Template(asset("page.html")).substitute(
        policy=policy, version=__version__, title=clean(book.title), early=early, style=style, pictures=pictures,
        pages=body, data=data(book), script=script,
    )  # fmt: skip
    return text.encode("utf-8")


def _hash(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"
