"""The model card: ``README.md`` of a checkpoint, made from the model and what was measured.

What we say stands between two markers; text outside them and metadata that is not ours survive later saves and pushes.
"""

from __future__ import annotations

import functools
import logging
import re
from collections.abc import Iterator, Sequence
from dataclasses import MISSING, Field, fields
from importlib.resources import files
from typing import Any, NamedTuple

import timm
import torch
from huggingface_hub import EvalResult, ModelCard, ModelCardData
from jinja2 import Environment, StrictUndefined, Template
from timm.models._input import get_model_input_config
from torch import nn

from timm_csg.labels import class_names
from timm_csg.mechanisms.base import Mechanism
from timm_csg.mechanisms.registry import list_mechanisms
from timm_csg.methods import METHODS, Method
from timm_csg.numbers import NUMBERS
from timm_csg.stage import find_stage
from timm_csg.version import __version__

_logger = logging.getLogger(__name__)
BEGIN = "<!-- timm_csg: begin. Text up to the end marker is replaced by the next save or push; write outside. -->"
END = "<!-- timm_csg: end -->"
_BLOCK = re.compile(r"<!-- timm_csg: begin\b.*?<!-- timm_csg: end -->", re.DOTALL)
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", re.ASCII)
_OURS = " (timm_csg)"
_DATA = ("data", "dataset", "data_set")  # keys of metrics that may name the data


class Facts(NamedTuple):
    """What the card cannot read from the model.

    Attributes:
        name: Title, such as the repository's name; empty: the architecture's.
        source: Where to load it from, in timm's words: ``"hf-hub:user/name"`` or ``"local-dir:folder"``.
        metrics: What was measured; ``"data"``, ``"seed"`` and ``"recipe"`` are named beside the numbers.
        base_model: Where the weights came from before training; in the metadata only if it is a Hub id.
        figures: Pictures beside the card, such as ``"assets/gate.png"``.
        class_names: One for each class; empty: those that the model was loaded with, if any.
        input_size: Channels, height and width of the images; empty: as ``model.pretrained_cfg`` says.
        layer: The last stage in words, see ``stage.Stage``; empty: looked for in the model.
    """

    name: str
    source: str
    metrics: dict[str, Any] | None = None
    base_model: str | None = None
    figures: Sequence[str] = ()
    class_names: Sequence[str] = ()
    input_size: Sequence[int] = ()
    layer: str = ""


def has_block(text: str) -> bool:
    r"""Whether a README has a block of ours.

    Example:
        >>> has_block("# My model"), has_block(f"# My model\n{BEGIN}\nwhat we say\n{END}\n")
        (False, True)
    """
    return _BLOCK.search(text) is not None


def figures_in_block(text: str) -> list[str]:
    r"""Pictures that our block of a README shows.

    Example:
        >>> figures_in_block(f"![mine](me.png)\n{BEGIN}\n![gate](assets/gate.png)\n{END}")
        ['assets/gate.png']
    """
    block = _BLOCK.search(text)
    return [] if block is None else re.findall(r"!\[[^\]]*\]\((assets/[^)\s/]+\.png)\)", block[0])


def model_card(model: nn.Module, facts: Facts, previous: str | None = None) -> str:
    """The text of ``README.md``: metadata and our block, with everything in ``previous`` that is not ours.

    Args:
        model: A differentiated model.
        facts: What the card cannot read from it.
        previous: The README so far, with or without a block of ours.

    Returns:
        The whole file. The same input gives the same text.

    Raises:
        ValueError: If the metadata of ``previous`` is not a YAML dictionary.
    """
    facts = facts._replace(name=facts.name or _architecture(model))
    block = f"{BEGIN}\n{_block(model, facts)}\n{END}"
    if previous is None:
        card = ModelCard(f"---\n{ModelCardData(library_name='timm')}\n---\n# {facts.name}\n\n{block}\n")
    else:
        card = _parse(previous)
        replaced, count = _BLOCK.subn(lambda _: block, card.text, count=1)
        card.text = replaced if count else f"{card.text.rstrip()}\n\n{block}\n"
    _update_metadata(card.data, model, facts)
    return str(card)


def _parse(text: str) -> ModelCard:
    text = text.removeprefix("\ufeff")
    try:
        has_metadata = text.lstrip().startswith("---")
        return ModelCard(text if has_metadata else f"---\nlibrary_name: timm\n---\n{text}")
    except Exception as error:  # yaml's own errors, and those of the card classes
        raise ValueError(
            f"the metadata at the top of README.md (between lines '---') cannot be read: {error}. Fix or remove it."
        ) from error


def _update_metadata(data: Any, model: Any, facts: Facts) -> None:
    """Set what is ours; tags of other mechanisms go, everything else stays."""
    mechanism = model.mechanism.name
    others = set(list_mechanisms()) - {mechanism}
    before = [data.tags] if isinstance(data.tags, str) else list(data.tags or [])
    ours = ["image-classification", "timm", "timm-csg", mechanism, "interpretability"]
    data.tags = list(dict.fromkeys([*(tag for tag in before if tag not in others), *ours]))
    data.library_name, data.pipeline_tag = "timm", "image-classification"
    if facts.base_model is not None and _HUB_ID.fullmatch(facts.base_model):
        data.base_model = facts.base_model
    kept = [result for result in data.eval_results or [] if not str(result.metric_name).endswith(_OURS)]
    results = kept + _eval_results(facts)
    data.eval_results = results or None
    if results and data.model_name is None:
        data.model_name = facts.name


def _eval_results(facts: Facts) -> list[EvalResult]:
    metrics = facts.metrics or {}
    data = _told(metrics, *_DATA)
    if data is None or not _is_number(metrics.get("accuracy")):
        return []
    dataset = re.sub(r"[^\w./-]+", "-", data, flags=re.ASCII).strip("-./") or "unknown"
    return [
        EvalResult(
            task_type="image-classification",
            dataset_type=dataset,
            dataset_name=data,
            metric_type="accuracy",
            metric_name=f"accuracy, standard path{_OURS}",
            metric_value=metrics["accuracy"],
        )
    ]


def _block(model: Any, facts: Facts) -> str:
    mechanism, metrics = model.mechanism, facts.metrics or {}
    block: str = _template().render(
        facts=facts,
        model=model,
        mechanism=mechanism,
        method=METHODS.get(mechanism.name, Method(f"the mechanism `{mechanism.name}`")),
        architecture=_architecture(model),
        is_of_timm=model._plain_class.__module__.startswith("timm."),
        names=[_plain(name) for name in facts.class_names or class_names(model) or []],
        layer=facts.layer or str(find_stage(model)),
        shape=facts.input_size or get_model_input_config(model)["input_size"],
        options=[_option(mechanism, field) for field in fields(mechanism.config)],
        rows=list(_results(mechanism, metrics)),
        judged=" ".join(_sentence(metrics[name]) for name in ("verdict", "verdict_advice") if metrics.get(name)),
        recipe=_told(metrics, "recipe"),
        data=_told(metrics, *_DATA),
        seed=_told(metrics, "seed", "seeds"),
        versions=(__version__, timm.__version__, torch.__version__),
    )
    return block


def _architecture(model: Any) -> str:
    """The model's name in timm, or that of its class."""
    return str(model.pretrained_cfg.get("architecture", model._plain_class.__name__))


@functools.cache
def _template() -> Template:
    environment = Environment(undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters["plain"] = _plain
    return environment.from_string(files("timm_csg").joinpath("templates/card.md").read_text(encoding="utf-8"))


def _option(mechanism: Mechanism, field: Field[Any]) -> tuple[str, Any, Any]:
    """Name, value and default."""
    default = None if field.default is MISSING else field.default
    return field.name, getattr(mechanism.config, field.name), default


def _results(mechanism: Mechanism, metrics: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """Titles and values of what was measured, those that this package knows first."""
    numbers = {name: value for name, value in metrics.items() if _is_number(value) and name != "seed"}
    titles = {number.key: number.title for number in NUMBERS if number.title}
    leaks = bool(metrics.get("gated_accuracy_uses_labels", mechanism.needs_targets))
    for name in sorted(numbers, key=lambda name: list(titles).index(name) if name in titles else len(titles)):
        note = " (the gate is given the true label)" if name == "gated_accuracy" and leaks else ""
        shown = f"{numbers[name]:.4f}" if isinstance(numbers[name], float) else str(numbers[name])
        if isinstance(ends := metrics.get(f"{name}_interval"), (list, tuple)) and len(ends) == 2:
            shown += f" (95 % interval {ends[0]:.4f} to {ends[1]:.4f})"
        yield f"{titles.get(name, _plain(name.replace('_', ' ')))}{note}", shown


def _told(metrics: dict[str, Any], *names: str) -> str | None:
    """The first of these entries that is a short text or number, or a list of numbers."""
    for name in names:
        value = metrics.get(name)
        if isinstance(value, (list, tuple)) and value and all(_is_number(item) for item in value):
            value = ", ".join(map(str, value))
        if isinstance(value, str) or _is_number(value):
            return _plain(str(value))
    return None


def _plain(text: str) -> str:
    """One short line without anything that Markdown, YAML or our markers could take for their own."""
    return _sentence(text)[:120]


def _sentence(text: object) -> str:
    """The same, of any length."""
    return re.sub(r"[\s|`<>\[\]]+", " ", str(text)).strip()


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
