"""``report``: one HTML file that shows what a model has learned to a person who knows nothing of the method."""

from __future__ import annotations

import base64
import functools
import hashlib
import os
from collections.abc import Iterable, Mapping, Sequence
from importlib.resources import files
from pathlib import Path

import timm
import torch
from jinja2 import Environment, PackageLoader, StrictUndefined
from torch import Tensor, nn

from timm_csg import labels
from timm_csg.checkpoint import replacing
from timm_csg.model import is_differentiated
from timm_csg.plots.colours import filter_colour
from timm_csg.plots.reporting import words
from timm_csg.plots.reporting.book import Book, Limits, make_book
from timm_csg.plots.reporting.facts import class_facts, filter_facts, sharing
from timm_csg.plots.reporting.findings import find_out
from timm_csg.plots.reporting.matrices import script_data, shown_matrices
from timm_csg.plots.reporting.pairs import Pair, make_pairs
from timm_csg.version import __version__

_MOST_BYTES = 10_000_000
_VERSIONS = {"timm_csg": __version__, "timm": timm.__version__, "torch": torch.__version__}
_FILES = files(__package__)
_ASSETS = {"style": "report.css", "early": "early.js", "script": "report.js"}


def report(
    model: nn.Module,
    loader: Iterable[tuple[Tensor, Tensor]],
    path: str | os.PathLike[str] = "report.html",
    *,
    class_names: Sequence[str] | None = None,
    reference: nn.Module | None = None,
    title: str | None = None,
    about: Mapping[str, str] | None = None,
) -> Path:
    """Write a report of what a model's filters have learned: one file that needs no network, below 10 MB.

    It shows which classes own which filters, what each filter responds to, why images were given their class, which
    classes share filters and are confused, and how the numbers compare with those of another model. In a model without
    a class-filter matrix, a plain one for example, the owner of a filter is the class it reveals most about.

    The images are passed through the model once, and through the reference once; where the head is not linear, once
    more for the effect of removing filters. Large models are shown in part: the report says what was left out. The
    same model and images give the same bytes.

    Args:
        model: A plain or differentiated timm classifier; left as found.
        loader: Yields (images, class indices), images normalised as timm does, in the same order every time: no
            shuffling. Best are images that the model was not trained on.
        path: The file, written whole or not at all.
        class_names: One for each class; None: the model's own, or their numbers.
        reference: A model to compare with, for example one from standard training; its filters are not shown.
        title: Of the report; None: the architecture's name.
        about: What else the page about the report says, by heading: date, checkpoint, seed, data, command.

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
    path = Path(path).expanduser()
    num_classes = int(getattr(model, "num_classes", 0))
    own = labels.class_names(model) or [str(index) for index in range(num_classes)]
    names = [_encodable(str(name)) for name in (own if class_names is None else class_names)]
    title = None if title is None else _encodable(title)
    if len(names) != num_classes:
        raise ValueError(f"the model has {num_classes} classes, but there are {len(names)} class names.")
    if reference is not None and int(getattr(reference, "num_classes", 0)) != num_classes:
        raise ValueError(
            f"the model has {num_classes} classes, but the reference has {getattr(reference, 'num_classes', 0)}; "
            "compare models with the same classes."
        )
    compared, standard_accuracy = None, None
    if reference is not None:
        kind = "reference" if is_differentiated(reference) else "standard model"
        compared = (kind, find_out(reference, loader).numbers)
        standard_accuracy = None if is_differentiated(reference) else compared[1]["accuracy"]
    findings = find_out(model, loader, standard_accuracy)
    limits = Limits()
    while True:
        book = make_book(model, loader, findings, names, title, compared, limits)
        html = _html(book, make_pairs(model, loader, book), about)
        if len(html) <= _MOST_BYTES or limits == limits.tighter():
            break
        limits = limits.tighter()
    with replacing(path) as temporary:
        temporary.write_bytes(html)
    return path


def _encodable(text: str) -> str:
    """The text with half characters, as names of files that are not UTF-8 have them, written as their codes."""
    return text.encode("utf-8", "backslashreplace").decode()


def _html(book: Book, pairs: list[Pair], about: Mapping[str, str] | None) -> bytes:
    assets = {name: (_FILES / file).read_text(encoding="utf-8") for name, file in _ASSETS.items()}
    rows = {_encodable(name): _encodable(text) for name, text in (about or {}).items()}
    template = _templates().get_template("report.html")
    return template.render(book=book, pairs=pairs, about=rows, **assets).encode("utf-8")


@functools.cache
def _templates() -> Environment:
    """The templates, with the functions that they call; everything is escaped unless a template says ``safe``."""
    environment = Environment(
        loader=PackageLoader(__name__),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    uses = (words.count, words.measures, filter_colour, class_facts, filter_facts, sharing, shown_matrices, script_data)
    environment.filters |= {"percent": words.percent, "on_scale": words.on_scale, "policy_hash": _policy_hash}
    environment.globals |= {function.__name__: function for function in uses}
    environment.globals |= {"version": __version__, "versions": _VERSIONS}
    environment.policies["json.dumps_kwargs"] = {"separators": (",", ":")}
    return environment


def _policy_hash(text: str) -> str:
    """What the page's security policy calls a style sheet or a script that it allows."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"
