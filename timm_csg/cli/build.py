"""From settings to the parts of a training: recipe, data config, model, optimizers; options without an effect."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import fields, replace
from typing import Any

import timm
import torch
from timm.models import resolve_model_input_args
from timm.optim import create_optimizer_v2, list_optimizers
from timm.scheduler import create_scheduler_v2
from torch import nn

from timm_csg.checks import check_choice, nearest
from timm_csg.cli.preprocessing import input_config
from timm_csg.cli.settings import DIGITS, STANDARD, TrainSettings, flag
from timm_csg.differentiation import differentiate
from timm_csg.freezing import freeze
from timm_csg.groups import param_groups
from timm_csg.hub_errors import explained
from timm_csg.mechanisms.registry import resolve_config
from timm_csg.model import is_differentiated
from timm_csg.recipes import RECIPES, Recipe
from timm_csg.schedule import Alternating, Joint

_UNCHECKED = (RuntimeError, TypeError, AssertionError, ArithmeticError, LookupError)  # timm's constructors check little


def chosen_recipes(settings: TrainSettings) -> dict[str, Recipe | None]:
    """The recipes to train, with what the settings change in them; None for plain timm training.

    Args:
        settings: Resolved.

    Raises:
        ValueError: If a name is unknown, or two trainings would be the same under two names.
    """
    for name in settings.recipe:
        check_choice("--recipe", name, (STANDARD, *RECIPES))
    recipes = {name: None if name == STANDARD else with_overrides(RECIPES[name], settings) for name in settings.recipe}
    replaced = [name for name in recipes if name != STANDARD and settings.mechanism not in (None, _own(RECIPES[name]))]
    same = replaced if len(replaced) > 1 else []
    for (one, recipe), (other, twin) in itertools.combinations(recipes.items(), 2):
        if recipe is not None and twin is not None and replace(recipe, summary=twin.summary) == twin:
            same = [one, other]
    if same:
        raise ValueError(f"with these options, --recipe {' and '.join(same)} make the same model; keep one of them.")
    return recipes


def _own(recipe: Recipe) -> str:
    """The name of a recipe's mechanism."""
    return resolve_config(recipe.mechanism, {})[0].name


def with_overrides(recipe: Recipe, settings: TrainSettings) -> Recipe:
    """The recipe with the mechanism options, schedule and gate learning rate of the command line."""
    mechanism = recipe.mechanism
    own = _own(recipe)
    name = settings.mechanism or own
    if name != own or settings.option:
        options = mechanism.to_dict() if name == own else {}
        _, mechanism = resolve_config(name, options | (settings.option or {}))
    gate_lr = settings.gate_lr
    if gate_lr is None:
        gate_lr = recipe.gate_rate(settings.opt)
    return replace(recipe, mechanism=mechanism, schedule=_schedule(recipe, settings), gate_lr=gate_lr)


def _schedule(recipe: Recipe, settings: TrainSettings) -> Alternating | Joint:
    """The recipe's schedule, or one of another kind, with the numbers that were given."""
    kind = {"alternating": Alternating, "joint": Joint, None: type(recipe.schedule)}[settings.paths]
    schedule = recipe.schedule if isinstance(recipe.schedule, kind) else kind()
    given: dict[str, Any] = {"warmup": settings.gate_warmup, "unit": settings.path_unit}
    if kind is Alternating:
        given |= {"period": settings.period, "gated": settings.gated}
    return replace(schedule, **{name: value for name, value in given.items() if value is not None})


def check_knobs(settings: TrainSettings, recipes: Mapping[str, Recipe | None]) -> None:
    """Refuse options without an effect.

    Args:
        settings: As given, not resolved.
        recipes: What is trained.

    Raises:
        ValueError: If there are any; the message says what to add or leave out.
    """
    schedules = [recipe.schedule for recipe in recipes.values() if recipe is not None]
    alternates = any(isinstance(schedule, Alternating) for schedule in schedules)
    warms_up = any(isinstance(schedule, Joint) and schedule.warmup > 0 for schedule in schedules)
    has_name = settings.data != DIGITS and settings.folder is None
    is_resumed = settings == settings.resolved()  # which has values for everything
    rules = [
        (("period", "gated"), alternates, "add --paths alternating, or a recipe that alternates, such as paper"),
        (("path_unit",), alternates or warms_up, "add --paths alternating, or --gate-warmup"),
        (
            ("paths", "gate_warmup", "gate_lr", "mechanism", "option"),
            bool(schedules),
            "add a recipe with a mechanism to --recipe",
        ),
        (("amp_dtype",), settings.amp, "add --amp"),
        (("model_ema_decay",), settings.model_ema, "add --model-ema"),
        (("scale", "hflip", "color_jitter", "aa", "reprob"), not settings.no_aug or is_resumed, "leave out --no-aug"),
        (("val_seed",), settings.val_fraction is not None, "add --val-fraction"),
        (("val_fraction",), settings.folder is not None, "it splits a folder of pictures: give --data folder:..."),
        (("data_dir", "dataset_download"), has_name, "they are for data sets that timm.data knows by name"),
        (("num_classes", "train_split", "val_split"), settings.data != DIGITS, "the digits' are fixed"),
    ]
    defaults = {item.name: item.default for item in fields(settings)}
    for names, works, remedy in rules:
        given = [name for name in names if getattr(settings, name) != defaults[name]]
        if given and not works:
            options = ", ".join(map(flag, given))
            raise ValueError(f"{options} would have no effect here; {remedy}.")


def data_config(settings: TrainSettings) -> dict[str, Any]:
    """How the model of the settings expects its images, see ``input_config``."""
    return input_config(_model_args(settings)["pretrained_cfg"], settings.in_chans, settings)


def _model_args(settings: TrainSettings) -> dict[str, Any]:
    requested = {"in_chans": settings.in_chans, "img_size": settings.img_size}
    try:
        args: dict[str, Any] = resolve_model_input_args(settings.model, requested, **(settings.model_kwargs or {}))
    except (RuntimeError, OSError) as error:
        question = nearest(settings.model, timm.list_models(), 3) if ":" not in settings.model else ""
        raise ValueError(f"--model {settings.model}: {error}.{question}") from error
    return args


def check_model(settings: TrainSettings, num_classes: int, recipe: Recipe | None) -> None:
    """Refuse what cannot be built, before anything is trained; costs no memory, and no weights are downloaded.

    Raises:
        ValueError: If the model, its options, the mechanism, the optimizer or the learning-rate schedule do not work.
    """
    try:
        with torch.device("meta"):
            model = make_model(replace(settings, pretrained=False), num_classes, recipe)
    except _UNCHECKED as error:
        remedy = ""
        if "output_stride" in (settings.model_kwargs or {}):
            remedy = "; for the digits --model-kwargs is output_stride=8, for ResNets; name others of this model"
        raise ValueError(
            f"--model {settings.model} cannot be built with these options: {_words(error)}{remedy}"
        ) from error
    try:
        optimizer = make_optimizers(model, settings, recipe)[0]
    except (ValueError, AssertionError) as error:
        question = nearest(settings.opt.lower(), list_optimizers())
        raise ValueError(f"--opt {settings.opt} cannot be used: {error}.{question}") from error
    make_scheduler(optimizer, settings, updates_per_epoch=1)
    _check_step(model, settings)


def _check_step(model: nn.Module, settings: TrainSettings) -> None:
    """Refuse what fails on the first batch: shapes alone run through the model and its mechanism.

    What shapes cannot decide is left to the first batch.
    """
    size, batch = data_config(settings)["input_size"], min(2, settings.batch_size)
    images = torch.zeros(batch, *size, device="meta")
    targets = torch.zeros(batch, dtype=torch.long, device="meta")
    paths = {"paths": ("standard", "gated")} if is_differentiated(model) else {}
    for name, module in model.train().named_modules():
        module.train(not name.startswith("mechanism"))  # which would warn of a blind assignment, and keep statistics
    try:
        model(images, *([targets] if paths else []), **paths)
    except NotImplementedError:  # wants values, which tensors without memory lack
        return
    except (ValueError, *_UNCHECKED) as error:
        if "meta" in str(error):
            return
        shape = " x ".join(map(str, size))
        raise ValueError(
            f"--model {settings.model} cannot be trained on {batch} images of {shape} at a time: {_words(error)}"
        ) from error


def _words(error: Exception) -> str:
    """What an error says; its kind if that is nothing."""
    return str(error).rstrip(".") or type(error).__name__


def make_scheduler(optimizer: torch.optim.Optimizer, settings: TrainSettings, *, updates_per_epoch: int) -> Any:
    """The learning-rate schedule of an optimizer.

    Raises:
        ValueError: If timm has no schedule of that name.
    """
    try:
        return create_scheduler_v2(
            optimizer,
            settings.sched,
            num_epochs=settings.epochs,
            warmup_epochs=min(settings.warmup_epochs, settings.epochs - 1),
            warmup_lr=0.0,
            step_on_epochs=False,
            updates_per_epoch=updates_per_epoch,
        )[0]
    except (ValueError, AssertionError) as error:
        found = str(error).rstrip(".")
        raise ValueError(f"--sched {settings.sched}: {found}; try cosine, step, poly or tanh.") from error


def make_model(settings: TrainSettings, num_classes: int, recipe: Recipe | None) -> nn.Module:
    """The model of the settings, differentiated if there is a recipe, and frozen as far as they say."""
    args, own = _model_args(settings), {"num_classes": num_classes, "drop_rate": settings.drop_rate}
    with explained(f"load the weights of {settings.model}", args["pretrained_cfg"].get("hf_hub_id")):
        model: nn.Module = timm.create_model(**args, **own, pretrained=settings.pretrained)
    if recipe is not None:
        differentiate(model, num_classes, recipe.mechanism)
    freeze(model, settings.freeze)  # type: ignore[arg-type]  # one of the choices
    return model


def make_optimizers(model: nn.Module, settings: TrainSettings, recipe: Recipe | None) -> list[torch.optim.Optimizer]:
    """One optimizer, or with ``separate_optimizers`` a second one for gated steps, all at the gate's learning rate.

    The classifier's rate is as many times that of the other weights in both.
    """
    gate_lr = None if recipe is None else recipe.gate_lr
    rates = [settings.lr]
    if recipe is not None and recipe.separate_optimizers:
        rates.append(recipe.gate_lr)
    return [
        create_optimizer_v2(
            param_groups(
                model,
                lr=rate,
                gate_lr=gate_lr,
                head_lr=None if settings.head_lr is None else settings.head_lr * (rate / settings.lr),
                weight_decay=settings.weight_decay,
                layer_decay=settings.layer_decay,
            ),
            opt=settings.opt,
            lr=rate,
            momentum=settings.momentum,
        )
        for rate in rates
    ]


def find_amp_dtype(settings: TrainSettings, device: torch.device) -> torch.dtype | None:
    """The autocast dtype; None without ``--amp``."""
    if not settings.amp:
        return None
    name = settings.amp_dtype or ("float16" if device.type == "cuda" else "bfloat16")
    return {"float16": torch.float16, "bfloat16": torch.bfloat16}[name]
