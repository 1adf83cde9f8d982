"""Options of ``timm-csg train`` that would have no effect: an error with the remedy."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields

from timm_csg.cli.settings import DIGITS, TrainSettings, flag
from timm_csg.recipes import Recipe
from timm_csg.schedule import Alternating, Joint


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
        (("val_fraction",), settings.folder is not None, "it divides folders of pictures: give --data folder:..."),
        (("data_dir", "dataset_download"), has_name, "they are for data sets that timm.data knows by name"),
        (("num_classes", "train_split", "val_split"), settings.data != DIGITS, "the digits have classes and splits"),
    ]
    defaults = {item.name: item.default for item in fields(settings)}
    for names, works, remedy in rules:
        given = [name for name in names if getattr(settings, name) != defaults[name]]
        if given and not works:
            options = ", ".join(map(flag, given))
            raise ValueError(f"{options} would have no effect here; {remedy}.")
