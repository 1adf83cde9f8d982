"""The options of ``timm-csg train``: one dataclass, the source of the command line and of the run folder's settings."""

from __future__ import annotations

import json
import math
import operator
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

STANDARD = "standard"
DIGITS = "digits"
REPORT = "report.html"
RUN_SETTINGS = "settings.json"
_DATA_KINDS = ("torch", "hfds", "hfids", "tfds", "wds")
MACHINE_OPTIONS = ("data", "data_dir", "device", "workers")  # what may differ where a run is resumed


def _absolute(path: str | Path) -> str:
    """A path that holds in every working directory; unlike ``resolve`` it keeps the names of links."""
    return os.path.abspath(Path(path).expanduser())  # noqa: PTH100


def _option(default: Any, text: str, **extra: Any) -> Any:
    return field(default=default, metadata={"help": text, **extra})


@dataclass(frozen=True, kw_only=True)
class TrainSettings:
    """Options of one ``timm-csg train``; names and meanings as in timm's training script where it has them.

    Options left out are None, whatever their type, until ``resolved`` fills in ``DIGITS_DEFAULTS`` or ``DEFAULTS``.
    """

    data: str = _option(
        DIGITS, "digits (scikit-learn's), folder:/path, or any name timm.data knows: torch/cifar10, hfds/..."
    )
    data_dir: str | None = _option(None, "where torch/, tfds/ and wds/ data sets are")
    train_split: str = _option("train", "name of the training split")
    val_split: str = _option("validation", "name of the validation split (test, val, ... are found too)")
    val_fraction: float | None = _option(
        None,
        "hold out this share of each class's pictures for validation, where a folder has no such split",
        above=0,
        below=1,
    )
    val_seed: int | None = _option(
        None, "chooses the pictures of --val-fraction, the same ones for every --seed", low=0
    )
    dataset_download: bool = _option(False, "let timm download the data set")
    num_classes: int | None = _option(None, "classes; found from the data where it says so", low=2)
    model: str = _option(None, "any timm model name, also hf-hub:... and local-dir:...")
    model_kwargs: dict[str, Any] | None = _option(None, "key=value ... for timm.create_model")
    pretrained: bool = _option(False, "start from timm's pretrained weights")
    freeze: str = _option(
        None,
        "layers that stay as they are; with backbone and assigned filters there is no training, only timm_csg.adapt",
        choices=["none", "all-but-last-stage", "backbone"],
    )
    in_chans: int = _option(None, "image channels", low=1)
    img_size: int | None = _option(None, "image size; default: the model's", low=1)
    recipe: list[str] = _option(None, f"{STANDARD}, or recipes from the list below; each is one training")
    mechanism: str | None = _option(
        None,
        "mechanism, with the options given by --option; default: the recipe's (icnn and picnn alone mean their own)",
    )
    option: dict[str, Any] | None = _option(None, "key=value ... options of the mechanism, over the recipe's")
    paths: str | None = _option(None, "schedule over the recipe's", choices=["alternating", "joint"])
    period: int | None = _option(None, "alternating: length of a cycle", low=1)
    gated: int | None = _option(None, "alternating: gated units at the end of each cycle", low=0)
    gate_warmup: int | None = _option(None, "units at the start that take the standard path only", low=0)
    path_unit: str | None = _option(None, "unit of the schedule", choices=["epoch", "step"])
    gate_lr: float | None = _option(
        None, "learning rate of the gate; default: the recipe's, a tenth unless --opt is sgd", low=0
    )
    epochs: int = _option(
        None, "epochs of every training; default with --pretrained: 300 steps, but 5 to 60 epochs", low=1
    )
    batch_size: int = _option(None, "images in a batch, of all processes together", low=1)
    opt: str = _option(None, "optimizer, any of timm's")
    lr: float = _option(None, "learning rate of the weights", above=0)
    head_lr: float | None = _option(
        None, "learning rate of the classifier; default: lr, 4 times that if --pretrained", low=0
    )
    momentum: float = _option(0.9, "momentum of optimizers that have one", low=0, below=1)
    weight_decay: float = _option(None, "weight decay (never on the gate)", low=0)
    layer_decay: float | None = _option(None, "layer-wise learning-rate decay", above=0, high=1)
    clip_grad: float | None = _option(None, "clip the gradient norm", above=0)
    sched: str = _option("cosine", "learning-rate schedule, any of timm's")
    warmup_epochs: int = _option(None, "epochs of learning-rate warm-up", low=0)
    smoothing: float = _option(0.0, "label smoothing", low=0, below=1)
    drop_rate: float | None = _option(None, "dropout before the classifier", low=0, below=1)
    no_aug: bool = _option(False, "no training augmentation")
    scale: tuple[float, float] = _option(None, "random crop area, two numbers")
    hflip: float = _option(None, "probability of a horizontal flip", low=0, high=1)
    color_jitter: float = _option(None, "strength of colour jitter", low=0)
    aa: str | None = _option(None, "timm's auto-augment policy")
    reprob: float = _option(0.0, "random erasing probability", low=0, high=1)
    model_ema: bool = _option(False, "evaluate and save an exponential moving average")
    model_ema_decay: float | None = _option(None, "its decay (default: 0.9998)", low=0, high=1)
    amp: bool = _option(False, "mixed precision")
    amp_dtype: str | None = _option(
        None, "its type; default float16 on CUDA, else bfloat16", choices=["float16", "bfloat16"]
    )
    channels_last: bool = _option(False, "channels_last memory format")
    device: str = _option("auto", "cpu, cuda, cuda:1, mps; auto: CUDA if there is one")
    workers: int = _option(None, "processes that load images", low=0)
    seed: int = _option(42, "seed of initial weights, order and augmentation", low=0, below=2**32)

    def __post_init__(self) -> None:
        for item in fields(self):
            _check_range("--" + item.name.replace("_", "-"), getattr(self, item.name), item.metadata)
        if self.scale is not None and not 0 < self.scale[0] <= self.scale[1] <= 1:
            raise ValueError(f"--scale takes two shares of the image area, 0 < LOW <= HIGH <= 1, but is {self.scale}.")
        if self.recipe is not None and len(set(self.recipe)) != len(self.recipe):
            raise ValueError(f"--recipe names one twice: {' '.join(self.recipe)}.")

    @property
    def folder(self) -> Path | None:
        """The folder of pictures that ``data`` names; None where it names something else."""
        if self.data.startswith("folder:"):
            return Path(self.data.removeprefix("folder:")).expanduser()
        named = Path(self.data).expanduser()
        return named if named.is_dir() else None

    @property
    def data_name(self) -> str:
        """What to call the data: a folder by its name, without those above it."""
        return self.data if self.folder is None else Path(_absolute(self.folder)).name

    def resolved(self) -> TrainSettings:
        """The same with every open option filled in, but for the epochs of fine-tuning, see ``with_epochs``.

        Paths become absolute, so that they hold in every working directory.
        """
        defaults = dict(DIGITS_DEFAULTS if self.data == DIGITS else DEFAULTS)
        if self.pretrained:
            defaults |= PRETRAINED_DEFAULTS
        if self.mechanism in ("icnn", "picnn"):
            defaults["recipe"] = [STANDARD, self.mechanism] if self.data == DIGITS else [self.mechanism]
        options: dict[str, Any] = {name: value for name, value in defaults.items() if getattr(self, name) is None}
        found = replace(self, **options | self._absolute_paths())
        if found.head_lr is None:
            found = replace(found, head_lr=found.lr * (4 if found.pretrained else 1))
        return found

    def _absolute_paths(self) -> dict[str, str]:
        paths = {} if self.folder is None else {"data": f"folder:{_absolute(self.folder)}"}
        if (self.model or "").startswith("local-dir:"):
            paths["model"] = f"local-dir:{_absolute(self.model.removeprefix('local-dir:'))}"
        if self.data_dir is not None:
            paths["data_dir"] = _absolute(self.data_dir)
        return paths

    def with_epochs(self, steps_per_epoch: int) -> TrainSettings:
        """The same with the epochs that fine-tuning takes where none were asked for: 300 steps, but 5 to 60 epochs."""
        return self if self.epochs else replace(self, epochs=min(60, max(5, -(-300 // max(1, steps_per_epoch)))))

    def to_json(self) -> str:
        """For the run folder."""
        return json.dumps(asdict(self), indent=2) + "\n"

    @classmethod
    def from_json(cls, text: str) -> TrainSettings:
        """Read ``to_json``'s output.

        Raises:
            ValueError: If it is damaged or from a version with other options.
        """
        try:
            values = json.loads(text)
            values["scale"] = tuple(values["scale"]) if values["scale"] else None  # JSON has no tuples
            return cls(**values)
        except (json.JSONDecodeError, TypeError, KeyError) as error:
            raise ValueError(f"the settings of this run are damaged or of another version: {error}.") from error


def settings_of_run(folder: Path) -> TrainSettings | None:
    """The settings of the run in a folder; None if there is none, such as beside another program's ``settings.json``.

    Raises:
        ValueError: If there is one and its settings are damaged.
    """
    path = folder / RUN_SETTINGS
    if not path.is_file():
        return None
    text = path.read_text(encoding="utf-8", errors="replace")
    is_run = any(folder.glob("*/state.*")) or all(f'"{name}":' in text for name in ("data", "model", "recipe"))
    return TrainSettings.from_json(text) if is_run else None


_LIMITS = {
    "low": ("at least", operator.ge),
    "above": ("more than", operator.gt),
    "high": ("at most", operator.le),
    "below": ("less than", operator.lt),
}


def check_data_name(settings: TrainSettings) -> None:
    """Refuse data that is no folder and no name for timm, which would take the folder of ``--data-dir`` for it.

    Raises:
        ValueError: With the names that timm knows, or the option that is missing.
    """
    kind, is_named, _ = settings.data.partition("/")
    if not is_named or kind.lower() not in _DATA_KINDS:
        listed = ", ".join(f"{known}/" for known in _DATA_KINDS)
        raise ValueError(
            f"--data {settings.data} is no folder, and names that timm.data knows begin with {listed}; give "
            f"{DIGITS}, a folder, or such a name."
        )
    if kind.lower() == "torch" and settings.data_dir is None:
        raise ValueError(f"--data {settings.data} needs --data-dir, the folder that holds it or is to hold it.")


def _check_range(option: str, value: Any, metadata: Mapping[str, Any]) -> None:
    """Refuse a number that is out of its option's range, or is not finite."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return
    limits = [(words, holds, metadata[key]) for key, (words, holds) in _LIMITS.items() if key in metadata]
    if not math.isfinite(value) or not all(holds(value, limit) for _, holds, limit in limits):
        wanted = " and ".join(f"{words} {limit}" for words, _, limit in limits)
        raise ValueError(f"{option} must be {wanted}, but is {value}.")


# The main job: under two minutes on two cores, and the differences between the recipes are there to see.
DIGITS_DEFAULTS: dict[str, Any] = {
    "model": "test_resnet",
    "model_kwargs": {"output_stride": 8},
    "recipe": [STANDARD, "paper", "assigned"],
    "freeze": "none",
    "in_chans": 3,
    "img_size": 24,
    "epochs": 16,
    "batch_size": 32,
    "opt": "sgd",
    "lr": 0.1,
    "weight_decay": 5e-4,
    "warmup_epochs": 2,
    "scale": (0.8, 1.0),
    "hflip": 0.0,
    "color_jitter": 0.0,
    "workers": 0,
}
DEFAULTS: dict[str, Any] = {
    "model": "resnet18",
    "recipe": ["assigned"],
    "freeze": "none",
    "in_chans": 3,
    "epochs": 30,
    "batch_size": 64,
    "opt": "sgd",
    "lr": 0.02,
    "weight_decay": 1e-4,
    "warmup_epochs": 1,
    "scale": (0.35, 1.0),
    "hflip": 0.5,
    "color_jitter": 0.4,
    "workers": 2,
}
# Fine-tuning; found on pictures held out from training, see docs/results.md.
PRETRAINED_DEFAULTS: dict[str, Any] = {
    "recipe": [STANDARD, "assigned"],
    "freeze": "all-but-last-stage",
    "epochs": None,
    "batch_size": 32,
    "opt": "adamw",
    "lr": 1e-3,
    "weight_decay": 0.05,
    "drop_rate": 0.2,
}
