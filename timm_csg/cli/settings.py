"""The options of ``timm-csg train``: one dataclass, the source of the command line and of the run folder's settings."""

from __future__ import annotations

import json
import math
import operator
import os
from collections.abc import Mapping
from dataclasses import Field, asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

STANDARD = "standard"
DIGITS = "digits"


def _absolute(path: str | Path) -> str:
    """A path that holds in every working directory; unlike ``resolve`` it keeps the names of links."""
    return os.path.abspath(Path(path).expanduser())  # noqa: PTH100


def flag(name: str) -> str:
    """The option of a field.

    Example:
        >>> flag("batch_size")
        '--batch-size'
    """
    return "--" + name.replace("_", "-")


def _option(default: Any, text: str, **extra: Any) -> Any:
    """A field with its help text.

    ``extra`` holds its limits and choices; what it becomes if left out, by kind of data (``digits``, ``other``) and for
    fine-tuning (``pretrained``, found on pictures held out from training, see docs/results.md); and who else takes it:
    ``of="where"`` marks what tells apart the images that a model was measured on, ``"images"`` the other options of all
    commands that look at images, ``"data"`` those of commands that go through a data set; ``machine=True`` what may
    differ where a run is resumed.
    """
    return field(default=default, metadata={"help": text, **extra})


@dataclass(frozen=True, kw_only=True)
class TrainSettings:
    """Options of one ``timm-csg train``; names and meanings as in timm's training script where it has them.

    The command line, its help, the checks and the settings of a run folder follow from these fields alone. Options left
    out are None, whatever their type, until ``resolved`` fills them in. The defaults for the digits are the main job:
    under two minutes on two cores, and the differences between the recipes are there to see.

    Raises:
        ValueError: If a number is out of its option's range, or a recipe is named twice.
    """

    # fmt: off
    data: str = _option(
        DIGITS, "digits (scikit-learn's), folder:/path, or any name timm.data knows: torch/cifar10, hfds/...",
        of="where", machine=True)
    data_dir: str | None = _option(None, "folder of torch/, tfds/ and wds/ data sets", of="where", machine=True)
    train_split: str = _option("train", "name of the training split")
    val_split: str = _option(
        "validation", "name of the validation split (test, val, ... are found too)", of="where")
    val_fraction: float | None = _option(
        None, "hold out this share of each class's pictures if a folder has no validation split",
        above=0, below=1, of="where")
    val_seed: int | None = _option(
        None, "seed that chooses the pictures of --val-fraction, whatever --seed is", low=0, of="where")
    dataset_download: bool = _option(False, "let timm download the data set", of="images")
    num_classes: int | None = _option(
        None, "number of classes; default: read from the data where possible", low=2, of="images")
    model: str = _option(
        None, "any timm model name, also hf-hub:... and local-dir:...", digits="test_resnet", other="resnet18")
    model_kwargs: dict[str, Any] | None = _option(
        None, "key=value ... for timm.create_model", digits={"output_stride": 8})
    pretrained: bool = _option(False, "start from timm's pretrained weights")
    freeze: str = _option(
        None,
        "layers that stay frozen; with 'backbone' and assigned filters, timm_csg.adapt only fits the classifier",
        choices=["none", "all-but-last-stage", "backbone"], other="none", pretrained="all-but-last-stage")
    in_chans: int = _option(None, "image channels", low=1, other=3)
    img_size: int | None = _option(None, "image size; default: the model's", low=1, of="images", digits=24)
    recipe: list[str] = _option(None, f"{STANDARD}, or recipes from the list below; each is one training",
        digits=[STANDARD, "paper", "assigned"], other=["assigned"], pretrained=[STANDARD, "assigned"])
    mechanism: str | None = _option(
        None, "mechanism, with the options of --option; default: the recipe's (icnn and picnn mean their own recipe)")
    option: dict[str, Any] | None = _option(None, "key=value ... options of the mechanism, overriding the recipe's")
    paths: str | None = _option(None, "schedule instead of the recipe's", choices=["alternating", "joint"])
    period: int | None = _option(None, "alternating: length of a cycle", low=1)
    gated: int | None = _option(None, "alternating: gated units at the end of each cycle", low=0)
    gate_warmup: int | None = _option(None, "units at the start that take the standard path only", low=0)
    path_unit: str | None = _option(None, "unit of the schedule", choices=["epoch", "step"])
    gate_lr: float | None = _option(
        None, "learning rate of the gate; default: the recipe's, a tenth unless --opt is sgd", low=0)
    epochs: int = _option(
        None, "epochs of each training; with --pretrained: as many as make 300 steps, but 5 to 30",
        low=1, digits=16, other=30, pretrained=None)
    batch_size: int = _option(None, "images in a batch, of all processes together", low=1, of="data",
        digits=32, other=64, pretrained=32)
    opt: str = _option(None, "optimizer, any of timm's", other="sgd", pretrained="adamw")
    lr: float = _option(
        None, "learning rate of the weights", above=0, digits=0.1, other=0.02, pretrained=1e-3)
    head_lr: float | None = _option(
        None, "learning rate of the classifier; default: --lr, 4 times that with --pretrained", low=0)
    momentum: float = _option(0.9, "momentum of optimizers that have one", low=0, below=1)
    weight_decay: float = _option(
        None, "weight decay (never on the gate)", low=0, digits=5e-4, other=1e-4, pretrained=0.05)
    layer_decay: float | None = _option(
        None, "layer-wise learning-rate decay; default: none, 0.8 with --pretrained --freeze none", above=0, high=1)
    clip_grad: float | None = _option(None, "clip the gradient norm", above=0)
    sched: str = _option("cosine", "learning-rate schedule, any of timm's")
    warmup_epochs: int = _option(None, "epochs of learning-rate warm-up", low=0, digits=2, other=1)
    smoothing: float = _option(0.0, "label smoothing", low=0, below=1)
    drop_rate: float | None = _option(None, "dropout before the classifier", low=0, below=1, pretrained=0.2)
    no_aug: bool = _option(False, "no training augmentation")
    scale: tuple[float, float] = _option(
        None, "area of random crops, two shares of the image", digits=(0.8, 1.0), other=(0.35, 1.0))
    hflip: float = _option(None, "probability of a horizontal flip", low=0, high=1, digits=0.0, other=0.5)
    color_jitter: float = _option(None, "strength of colour jitter", low=0, digits=0.0, other=0.4)
    aa: str | None = _option(None, "timm's auto-augment policy")
    reprob: float = _option(0.0, "random erasing probability", low=0, high=1)
    model_ema: bool = _option(False, "evaluate and save an exponential moving average of the weights")
    model_ema_decay: float | None = _option(None, "decay of that average (default: 0.9998)", low=0, high=1)
    amp: bool = _option(False, "mixed precision")
    amp_dtype: str | None = _option(
        None, "data type of --amp; default: float16 on CUDA, else bfloat16", choices=["float16", "bfloat16"])
    channels_last: bool = _option(False, "channels_last memory format")
    device: str = _option(
        "auto", "cpu, cuda, cuda:1, mps; auto: CUDA if there is one", of="images", machine=True)
    workers: int | None = _option(
        None, "processes that load images; default: none for fewer than 2,000 images or up to two cores, else 2", low=0,
        of="data", machine=True)
    log: str | None = _option(
        None, "also log every epoch for TensorBoard or wandb, through their own package; log.csv is always written",
        choices=["tensorboard", "wandb", "csv"], machine=True)
    seed: int = _option(42, "seed of initial weights, order and augmentation", low=0, below=2**32)
    # fmt: on

    def __post_init__(self) -> None:
        for item in fields(self):
            _check_range(flag(item.name), getattr(self, item.name), item.metadata)
        if self.scale is not None and not 0 < self.scale[0] <= self.scale[1] <= 1:
            raise ValueError(f"--scale takes two shares of the image area, 0 < LOW <= HIGH <= 1, but is {self.scale}.")
        if isinstance(self.recipe, str):
            raise ValueError(f"--recipe takes a list of names, [{self.recipe!r}], but is a string.")
        if self.recipe is not None and len(set(self.recipe)) != len(self.recipe):
            raise ValueError(f"--recipe names one twice: {' '.join(self.recipe)}.")

    @property
    def folder(self) -> Path | None:
        """The folder of pictures that ``data`` names; None where it names something else."""
        if self.data.startswith("folder:"):
            return Path(self.data.removeprefix("folder:")).expanduser()
        named = Path(self.data).expanduser()
        return named if self.data != DIGITS and named.is_dir() else None

    @property
    def data_name(self) -> str:
        """What to call the data: a folder by its name, without those above it."""
        return self.data if self.folder is None else Path(_absolute(self.folder)).name

    @property
    def model_name(self) -> str:
        """What to call the model: a folder or repository by its name, the ``model`` folder of a run by the run's."""
        kind, _, place = str(self.model).rpartition(":")
        path = Path(_absolute(place) if kind == "local-dir" else place)
        return path.parent.name if path.name == "model" else path.name

    def resolved(self) -> TrainSettings:
        """The same with every open option filled in, but for the epochs of fine-tuning, see ``with_epochs``.

        Paths become absolute, so that they hold in every working directory.
        """
        from timm_csg.recipes import RECIPES  # parsing options does without torch

        defaults: dict[str, Any] = {item.name: default_of(item, self.data, self.pretrained) for item in fields(self)}
        if self.mechanism in RECIPES:
            defaults["recipe"] = [STANDARD, self.mechanism] if self.data == DIGITS else [self.mechanism]
        options = {name: value for name, value in defaults.items() if value is not None and getattr(self, name) is None}
        found = replace(self, **options | self._absolute_paths())
        if found.head_lr is None:
            found = replace(found, head_lr=found.lr * (4 if found.pretrained else 1))
        if found.layer_decay is None and found.pretrained and found.freeze == "none":
            found = replace(found, layer_decay=0.8)  # measured, see docs/results.md, Smaller pictures, all layers
        return found

    def _absolute_paths(self) -> dict[str, str]:
        paths = {} if self.folder is None else {"data": f"folder:{_absolute(self.folder)}"}
        if (self.model or "").startswith("local-dir:"):
            paths["model"] = f"local-dir:{_absolute(self.model.removeprefix('local-dir:'))}"
        if self.data_dir is not None:
            paths["data_dir"] = _absolute(self.data_dir)
        return paths

    def with_epochs(self, steps_per_epoch: int) -> TrainSettings:
        """The same with the epochs of fine-tuning where none were requested: 300 steps, but 5 to 30 epochs.

        Args:
            steps_per_epoch: Batches of the training data.

        Returns:
            Settings with epochs.
        """
        return self if self.epochs else replace(self, epochs=min(30, max(5, -(-300 // max(1, steps_per_epoch)))))

    def to_json(self) -> str:
        """For the run folder."""
        return json.dumps(asdict(self), indent=2) + "\n"

    @classmethod
    def from_json(cls, text: str) -> TrainSettings:
        """Read ``to_json``'s output.

        Args:
            text: What it returned.

        Returns:
            Equal settings.

        Raises:
            ValueError: If it is damaged or from a version with other options.
        """
        try:
            values = json.loads(text)
            values["scale"] = tuple(values["scale"]) if values["scale"] else None  # JSON has no tuples
            return cls(**values)
        except (json.JSONDecodeError, TypeError, KeyError) as error:
            raise ValueError(f"the settings of this run are damaged or of another version: {error}.") from error


_LIMITS = {
    "low": ("at least", operator.ge),
    "above": ("more than", operator.gt),
    "high": ("at most", operator.le),
    "below": ("less than", operator.lt),
}


def _check_range(option: str, value: Any, metadata: Mapping[str, Any]) -> None:
    """Refuse a number that is out of its option's range, or is not finite."""
    limits = [(words, holds, metadata[key]) for key, (words, holds) in _LIMITS.items() if key in metadata]
    if value is None or not limits:
        return
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise ValueError(f"{option} must be a number, but is {value!r}.")
    if not math.isfinite(value) or not all(holds(value, limit) for _, holds, limit in limits):
        wanted = " and ".join(f"{words} {limit}" for words, _, limit in limits)
        raise ValueError(f"{option} must be {wanted}, but is {value}.")


def default_of(item: Field[Any], data: str, pretrained: bool = False) -> Any:
    """What an option is if left out: the value for this data, None where there is none."""
    values = item.metadata
    if pretrained and "pretrained" in values:
        return values["pretrained"]
    return values.get("digits", values.get("other")) if data == DIGITS else values.get("other")


def _names(*kinds: str) -> tuple[str, ...]:
    return tuple(item.name for item in fields(TrainSettings) if item.metadata.get("of") in kinds)


WHERE_OPTIONS = _names("where")
IMAGE_OPTIONS = _names("where", "images")
DATA_OPTIONS = _names("where", "images", "data")
MACHINE_OPTIONS = tuple(item.name for item in fields(TrainSettings) if item.metadata.get("machine"))
