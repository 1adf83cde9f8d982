"""timm's own train.py, unmodified, with a differentiated model.

python examples/timm_train.py train.py --recipe assigned DATA --model resnet18 --num-classes 10 --model-ema ...

train.py is not in timm's wheel: take the one that belongs to your timm from its repository, for example
https://raw.githubusercontent.com/huggingface/pytorch-image-models/v1.0.31/train.py. All options but the two below are
its own. What it imports from timm is replaced while it runs: its model is differentiated, its task assigns the filters
and has the recipe's schedule. Under torchrun, start this file instead of train.py.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import runpy
import sys
from typing import Any
from unittest import mock

import timm.task
from timm.models import create_model
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2

import timm_csg
from timm_csg.integrations.loaders import NotedLoaders
from timm_csg.integrations.timm_task import DifferentiationTask
from timm_csg.recipes import RECIPES

DISTILLATION = [f"{kind}DistillationTask" for kind in ("Logit", "Feature", "Token")]
NAMES = sorted(name for name, recipe in RECIPES.items() if not recipe.separate_optimizers)


def refuse(switch: str, *arguments: Any, **options: Any) -> None:
    raise SystemExit(f"timm_train.py: a differentiated model cannot be trained with {switch}; leave it out.")


def main(arguments: list[str] | None = None) -> DifferentiationTask:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("script", help="train.py of timm")
    parser.add_argument("--recipe", choices=NAMES, default="assigned")
    parser.add_argument("--gate-lr", type=float, help="default: the recipe's, meant for SGD with momentum")
    args, others = parser.parse_known_args(arguments)
    recipe = RECIPES[args.recipe]
    gate_lr = recipe.gate_lr if args.gate_lr is None else args.gate_lr
    tasks, create_loader = [], NotedLoaders()

    def create_differentiated(*arguments: Any, **options: Any) -> Any:
        if options.get("scriptable"):
            refuse("--torchscript")
        try:
            return timm_csg.differentiate(create_model(*arguments, **options), mechanism=recipe.mechanism)
        except (TypeError, ValueError) as error:
            raise SystemExit(f"timm_train.py: {error}") from error

    def create_task(model: Any, **options: Any) -> DifferentiationTask:
        tasks.append(DifferentiationTask(model, schedule=recipe.schedule, **options))
        return tasks[0]

    def create_optimizer(model, lr, weight_decay=0.0, layer_decay=None, **options: Any) -> Any:
        decays = {"weight_decay": weight_decay, "layer_decay": layer_decay}
        groups = timm_csg.param_groups(model, lr=lr, gate_lr=gate_lr, **decays)
        optimizer = create_optimizer_v2(groups, lr=lr, **options)
        tasks[0].attach(optimizer)
        return optimizer

    def create_scheduler(optimizer: Any, *arguments: Any, **options: Any) -> tuple[Any, int]:
        tasks[0].steps_per_epoch = options["updates_per_epoch"]
        tasks[0].assign_filters(tasks[0].get_trainable_module(), create_loader.plain)
        return create_scheduler_v2(optimizer, *arguments, **options)

    with contextlib.ExitStack() as replaced:
        for place, name, ours in (
            (timm.models, "create_model", create_differentiated),
            (timm.data, "create_loader", create_loader),
            (timm.task, "ClassificationTask", create_task),
            (timm.optim, "create_optimizer_v2", create_optimizer),
            (timm.scheduler, "create_scheduler_v2", create_scheduler),
            (timm.data, "create_naflex_loader", functools.partial(refuse, "--naflex-loader")),
            *((timm.task, name, functools.partial(refuse, "--kd-model-name")) for name in DISTILLATION),
            (sys, "argv", [args.script, *others]),
        ):
            replaced.enter_context(mock.patch.object(place, name, ours))
        runpy.run_path(args.script, run_name="__main__")
    return tasks[0]


if __name__ == "__main__":
    main()
