"""The model card: ``README.md`` of a checkpoint, made from the model and what was measured.

What we say stands between two markers; text outside them and metadata that is not ours survive later saves and pushes.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Sequence
from dataclasses import MISSING, fields
from typing import Any, NamedTuple

import timm
import torch
from huggingface_hub import EvalResult, ModelCard, ModelCardData
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
_MOST_CLASSES = 20


class Facts(NamedTuple):
    """What the card cannot read from the model.

    Attributes:
        name: Title, such as the repository's name.
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
    data = _told(metrics, "data", "dataset", "data_set")
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
    sections = [
        _summary(model, facts),
        _usage(model, facts),
        *(f"![{figure.removeprefix('assets/')}]({figure})" for figure in facts.figures),
        _recipe(model.mechanism, facts),
        _results(model.mechanism, facts),
        _limits(model.mechanism),
    ]
    citation = _method(model.mechanism).citation
    if citation:
        sections.append(f"## Citation\n\n```bibtex\n{citation}\n```")
    sections.append(f"Made with timm_csg {__version__}, timm {timm.__version__}, torch {torch.__version__}.")
    return "\n\n".join(section for section in sections if section)


def _summary(model: Any, facts: Facts) -> str:
    architecture = model.pretrained_cfg.get("architecture", model._plain_class.__name__)
    layer = facts.layer or str(find_stage(model))
    names = list(map(_plain, facts.class_names or class_names(model) or []))
    more = f" and {len(names) - _MOST_CLASSES} more" if len(names) > _MOST_CLASSES else ""
    classes = f" ({', '.join(names[:_MOST_CLASSES])}{more})" if names else ""
    trained = f" Training started from `{_plain(facts.base_model)}`." if facts.base_model else ""
    return (
        f"An image classifier of timm, `{architecture}` with {model.num_classes} classes{classes}, "
        f"trained with {_method(model.mechanism).words}.\n"
        f"The layer: {layer}.{trained}"
    )


def _method(mechanism: Mechanism) -> Method:
    return METHODS.get(mechanism.name, Method(f"the mechanism `{mechanism.name}`"))


def _usage(model: Any, facts: Facts) -> str:
    shape = ", ".join(map(str, facts.input_size or get_model_input_config(model)["input_size"]))
    register = ""
    if not model._plain_class.__module__.startswith("timm."):
        register = "\nThe architecture is not part of timm: import the file that registers it first.\n"
    targets = ", targets" if model.mechanism.needs_targets else ""
    define = "targets = torch.tensor([0])  # the class whose filters to look through\n" if targets else ""
    matrix = ""
    if model.mechanism.class_filter_matrix() is not None:
        matrix = "\nmatrix = model.mechanism.class_filter_matrix()  # [classes, filters] in [0, 1]"
        matrix += "\nowners = timm_csg.metrics.owners(matrix)  # the class of each filter, -1 for none"
    return f"""## Usage
{register}
With plain timm, the standard path:

```python
import timm
import torch

model = timm.create_model("{facts.source}", pretrained=True).eval()
images = torch.rand(1, {shape})
logits = model(images)
```

With timm_csg, also the mechanism:

```python
import timm_csg

model = timm_csg.from_pretrained("{facts.source}")
logits = model(images)
{define}gated = model(images{targets}, paths=("gated",)).gated{matrix}
```"""


def _recipe(mechanism: Mechanism, facts: Facts) -> str:
    recipe = _told(facts.metrics or {}, "recipe")
    rows = []
    for field in fields(mechanism.config):
        value = getattr(mechanism.config, field.name)
        default = field.default if field.default is not MISSING else None
        rows.append(f"| `{field.name}` | {value} | {default} |")
    named = f"Recipe `{recipe}`. " if recipe else ""
    head = f"## Recipe\n\n{named}Options of the mechanism `{mechanism.name}`:\n"
    return "\n".join([head, "| option | value | default |", "|---|---|---|", *rows])


def _results(mechanism: Mechanism, facts: Facts) -> str:
    metrics = facts.metrics or {}
    numbers = {name: value for name, value in metrics.items() if _is_number(value) and name != "seed"}
    if not numbers:
        return "## Results\n\nNothing was measured for this card."
    data, seed = _told(metrics, "data", "dataset", "data_set"), _told(metrics, "seed", "seeds")
    titles = {number.key: number.title for number in NUMBERS if number.title}
    leaks = bool(metrics.get("gated_accuracy_uses_labels", mechanism.needs_targets))
    rows = []
    for name in sorted(numbers, key=lambda name: list(titles).index(name) if name in titles else len(titles)):
        note = " (the gate is given the true label)" if name == "gated_accuracy" and leaks else ""
        shown = f"{numbers[name]:.4f}" if isinstance(numbers[name], float) else str(numbers[name])
        rows.append(f"| {titles.get(name, _plain(name.replace('_', ' ')))}{note} | {shown} |")
    judged = " ".join(_sentence(metrics[name]) for name in ("verdict", "verdict_advice") if metrics.get(name))
    where = f"Data: {data or 'not recorded'}. Seed: {seed or 'not recorded'}."
    opening = f"{judged}\n\n{where}" if judged else where
    return "\n".join([f"## Results\n\n{opening}\n\n| measure | value |\n|---|---|", *rows])


def _limits(mechanism: Mechanism) -> str:
    limits = []
    if mechanism.acts_without_targets:
        limits.append(
            "Plain timm loads these weights, but without the mechanism, which acts at inference too: its logits "
            "differ. Use timm_csg for the numbers above."
        )
    else:
        limits.append("Without targets the model computes exactly what plain timm does; the mechanism is not in it.")
    if mechanism.needs_targets:
        limits.append(
            "On the gated path the true label picks the filters, so labels leak through the gate: its accuracy says "
            "nothing about new images. Read the accuracy of the standard path."
        )
    limits.append("Removing a class's filters hides the class; what the other filters know of it stays in them.")
    limits.append(
        "That a filter serves a class says where its evidence goes, not that a person would recognise what it sees."
    )
    return "## Limits\n\n" + "\n".join(f"- {limit}" for limit in limits)


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
