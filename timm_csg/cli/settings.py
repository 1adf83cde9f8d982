"""The options of ``timm-csg train``: one dataclass, the source of the command line and of the run folder's settings."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal

from timm_csg.schedule import Alternating, Joint

STANDARD = "standard"
DIGITS = "digits"
REPORT = "report.html"


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
    dataset_download: bool = _option(False, "let timm download the data set")
    num_classes: int | None = _option(None, "classes; found from the data where it says so")
    model: str = _option(None, "any timm model name, also hf-hub:... and local-dir:...")
    model_kwargs: dict[str, Any] | None = _option(None, "key=value ... for timm.create_model")
    pretrained: bool = _option(False, "start from timm's pretrained weights")
    freeze: str = _option(
        None,
        "layers that stay as they are; with backbone and assigned filters there is no training, only timm_csg.adapt",
        choices=["none", "all-but-last-stage", "backbone"],
    )
    in_chans: int = _option(None, "image channels")
    img_size: int | None = _option(None, "image size; default: the model's")
    recipe: list[str] = _option(None, f"{STANDARD}, or recipes from the list below; each is one training")
    mechanism: str | None = _option(
        None, "mechanism, with the options given by --option; default: the recipe's (icnn alone means --recipe icnn)"
    )
    option: dict[str, Any] | None = _option(None, "key=value ... options of the mechanism, over the recipe's")
    paths: str | None = _option(None, "schedule over the recipe's", choices=["alternating", "joint"])
    period: int = _option(3, "alternating: length of a cycle")
    gated: int = _option(1, "alternating: gated units at the end of each cycle")
    gate_warmup: int = _option(0, "units at the start that take the standard path only")
    path_unit: Literal["epoch", "step"] = _option("epoch", "unit of the schedule", choices=["epoch", "step"])
    gate_lr: float | None = _option(
        None, "learning rate of the gate; default: the recipe's, a tenth unless --opt is sgd"
    )
    epochs: int = _option(None, "epochs of every training; default with --pretrained: 300 steps, but 5 to 60 epochs")
    batch_size: int = _option(None, "images in a batch, of all processes together")
    opt: str = _option(None, "optimizer, any of timm's")
    lr: float = _option(None, "learning rate of the weights")
    head_lr: float | None = _option(None, "learning rate of the classifier; default: lr, 4 times that if --pretrained")
    momentum: float = _option(0.9, "momentum of optimizers that have one")
    weight_decay: float = _option(None, "weight decay (never on the gate)")
    layer_decay: float | None = _option(None, "layer-wise learning-rate decay")
    clip_grad: float | None = _option(None, "clip the gradient norm")
    sched: str = _option("cosine", "learning-rate schedule, any of timm's")
    warmup_epochs: int = _option(None, "epochs of learning-rate warm-up")
    smoothing: float = _option(0.0, "label smoothing")
    drop_rate: float | None = _option(None, "dropout before the classifier")
    no_aug: bool = _option(False, "no training augmentation")
    scale: tuple[float, float] = _option(None, "random crop area, two numbers")
    hflip: float = _option(None, "probability of a horizontal flip")
    color_jitter: float = _option(None, "strength of colour jitter")
    aa: str | None = _option(None, "timm's auto-augment policy")
    reprob: float = _option(0.0, "random erasing probability")
    model_ema: bool = _option(False, "evaluate and save an exponential moving average")
    model_ema_decay: float = _option(0.9998, "its decay")
    amp: bool = _option(False, "mixed precision")
    amp_dtype: str | None = _option(
        None, "its type; default float16 on CUDA, else bfloat16", choices=["float16", "bfloat16"]
    )
    channels_last: bool = _option(False, "channels_last memory format")
    device: str = _option("auto", "cpu, cuda, cuda:1, mps; auto: CUDA if there is one")
    workers: int = _option(None, "processes that load images")
    seed: int = _option(42, "seed of initial weights, order and augmentation")

    def __post_init__(self) -> None:
        for name in ("epochs", "batch_size", "num_classes", "img_size", "in_chans"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"--{name.replace('_', '-')} must be 1 or more, but is {value}.")
        if self.lr is not None and not self.lr > 0:
            raise ValueError(f"--lr must be positive, but is {self.lr}.")
        from timm_csg.recipes import RECIPES  # not to print help: it imports torch

        for name in self.recipe or ():
            if name != STANDARD and name not in RECIPES:
                raise ValueError(f"unknown recipe {name!r}; known are {STANDARD}, {', '.join(RECIPES)}.")
        if self.recipe is not None and len(set(self.recipe)) != len(self.recipe):
            raise ValueError(f"--recipe names one twice: {' '.join(self.recipe)}.")

    @property
    def schedule(self) -> Alternating | Joint | None:
        """The schedule that replaces the recipe's, if one was asked for."""
        if self.paths == "joint":
            return Joint(warmup=self.gate_warmup, unit=self.path_unit)
        if self.paths == "alternating":
            return Alternating(period=self.period, gated=self.gated, warmup=self.gate_warmup, unit=self.path_unit)
        return None

    def resolved(self) -> TrainSettings:
        """The same with every open option filled in, but for the epochs of fine-tuning, see ``with_epochs``."""
        defaults = dict(DIGITS_DEFAULTS if self.data == DIGITS else DEFAULTS)
        if self.pretrained:
            defaults |= PRETRAINED_DEFAULTS
        if self.mechanism == "icnn":
            defaults["recipe"] = [STANDARD, "icnn"] if self.data == DIGITS else ["icnn"]
        found = replace(self, **{name: value for name, value in defaults.items() if getattr(self, name) is None})
        if found.head_lr is None:
            found = replace(found, head_lr=found.lr * (4 if found.pretrained else 1))
        return found

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
