"""One training of ``timm-csg train``: a recipe with its model, optimizers, epochs and state on disk.

Every epoch starts from a seed of its own, so that a training resumed from the end of an epoch goes on as if nothing had
happened: on the CPU it ends with the same weights.
"""

from __future__ import annotations

import logging
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from timm.utils import ModelEmaV3, NativeScaler, dispatch_clip_grad, random_seed
from torch import Tensor, nn

from timm_csg import measuring, metrics
from timm_csg.adaptation import adapt
from timm_csg.assignment import has_assigned
from timm_csg.checkpoint import replacing, save_plain, save_pretrained
from timm_csg.cli.build import find_amp_dtype, make_model, make_optimizers, make_scheduler
from timm_csg.cli.distributed import GlobalBatches, Processes
from timm_csg.cli.preprocessing import Loader
from timm_csg.cli.settings import STANDARD, TrainSettings
from timm_csg.cli.state import load_state, save_state, writing
from timm_csg.cli.terminal import TrainingError
from timm_csg.model import hold_frozen, is_differentiated
from timm_csg.recipes import Recipe
from timm_csg.schedule import Joint
from timm_csg.training import TrainingMixin

_logger = logging.getLogger(__name__)


class Training(TrainingMixin):
    """A recipe at work. ``run`` trains to the end or until interrupted; the state is read back if there is one.

    Args:
        name: Of the training, in the log and on disk.
        recipe: What to train with; None: plain timm training.
        settings: Resolved settings.
        num_classes: Classes of the data.
        steps_per_epoch: Length of the training loader.
        state_file: What the state is saved to and resumed from.
        processes: Who trains, and where; all of them make the same ``Training``. Only the first reads and writes the
            file.
    """

    def __init__(
        self,
        name: str,
        recipe: Recipe | None,
        settings: TrainSettings,
        num_classes: int,
        steps_per_epoch: int,
        state_file: Path,
        processes: Processes,
    ) -> None:
        self.name, self.settings, self.state_file, self.processes = name, settings, state_file, processes
        self.device = device = processes.device
        self.history: list[dict[str, Any]] = []
        self.epochs_done = 0
        random_seed(settings.seed)
        self.model = make_model(settings, num_classes, recipe).to(device)
        if settings.channels_last:
            self.model = self.model.to(memory_format=torch.channels_last)
        if recipe is not None:
            self.schedule = recipe.schedule
        self.assigns = has_assigned(self.model)
        decay = 0.9998 if settings.model_ema_decay is None else settings.model_ema_decay
        self.ema = ModelEmaV3(self.model, decay=decay) if settings.model_ema else None
        self.optimizers = make_optimizers(self.model, settings, recipe)
        if recipe is not None:
            self.attach(self.optimizers, self.model, averages=[] if self.ema is None else [self.ema])
        self.schedulers = [
            make_scheduler(optimizer, settings, updates_per_epoch=steps_per_epoch) for optimizer in self.optimizers
        ]
        self.amp_dtype = find_amp_dtype(settings, device)
        self.scaler = NativeScaler(device=device.type) if self.amp_dtype == torch.float16 else None
        self.criterion = nn.CrossEntropyLoss(label_smoothing=settings.smoothing)
        self._load()
        sees_all = recipe is None or (isinstance(self.schedule, Joint) and self.schedule.warmup == 0)
        self.wrapped = self.processes.wrap(self.model, find_unused_parameters=not sees_all)

    @property
    def eval_model(self) -> nn.Module:
        """The model that is measured and saved."""
        return self.model if self.ema is None else self.ema.module

    def assign(self, plain: Loader) -> None:
        """Share out the filters before the first step; with a frozen backbone, fit the classifier and be done.

        Args:
            plain: This process's share of the training images, without augmentation.
        """
        if not self.assigns:
            return
        if self.settings.freeze != "backbone":
            averages = [] if self.ema is None else [self.ema.module]
            self.assign_filters(self.model, plain, averages=averages, amp_dtype=self.amp_dtype)
        elif not self.epochs_done:
            adapt(self.model, plain, amp_dtype=self.amp_dtype, distributed=self.processes.count > 1)
            if self.ema is not None:
                self.ema.set(self.model)
            self.epochs_done = self.settings.epochs
            self._keep()

    def run(
        self,
        train: Loader,
        validation: Loader,
        batch_done: Callable[[str], None],
        epoch_done: Callable[[dict[str, Any]], None],
    ) -> None:
        """Train the epochs that are left; after each one the state is on disk.

        Args:
            train: Shuffled batches.
            validation: This process's share of the validation images.
            batch_done: Called after every batch with the path that it took.
            epoch_done: Called after every epoch, in the first process, with its line of the log.

        Raises:
            TrainingError: If the loss or a weight is not finite any more, or the state cannot be written.
        """
        while self.epochs_done < self.settings.epochs:
            epoch = self.epochs_done
            self._begin(epoch, train)
            start = time.perf_counter()
            row = {"recipe": self.name, "epoch": epoch, "path": self._path(), **self._train_epoch(train, batch_done)}
            self._check_weights(epoch)
            row |= self._evaluate(validation) | {"seconds": round(time.perf_counter() - start, 2)}
            self.history.append(row)
            self.epochs_done += 1
            self._keep()
            if self.processes.is_first:
                epoch_done(row)

    def _begin(self, epoch: int, loader: Loader) -> None:
        """Seeds that depend on the epoch only, so that it can be repeated; augmentation differs between processes."""
        random_seed(self.settings.seed, rank=epoch + 1 + 1_000_000 * self.processes.rank)
        batches = getattr(loader, "batch_sampler", None)
        if isinstance(batches, GlobalBatches):
            batches.set_epoch(epoch)
        self.set_epoch(epoch)

    def _path(self) -> str:
        return self.path if is_differentiated(self.model) else STANDARD

    def _train_epoch(self, loader: Loader, batch_done: Callable[[str], None]) -> dict[str, float]:
        hold_frozen(self.model.train())
        sums: dict[str, Tensor] = {}
        counts: dict[str, int] = {}
        updates = self.epochs_done * len(loader)
        for index, (images, targets) in enumerate(loader):
            images, targets = images.to(self.device, non_blocking=True), targets.to(self.device, non_blocking=True)
            if self.settings.channels_last and images.ndim == 4:  # features of a frozen backbone may be tokens
                images = images.contiguous(memory_format=torch.channels_last)
            path = self._path()
            with torch.autocast(self.device.type, dtype=self.amp_dtype, enabled=self.amp_dtype is not None):
                losses = self._losses(images, targets)
            optimizer = self.optimizers[1 if path == "gated" and len(self.optimizers) > 1 else 0]
            self._step(losses["loss"], optimizer)
            for name, value in losses.items():
                if value.ndim == 0:
                    sums[name] = sums.get(name, torch.zeros_like(value)) + value.detach()
                    counts[name] = counts.get(name, 0) + 1
            for scheduler in self.schedulers:
                scheduler.step_update(updates + index + 1)
            batch_done(path)
        totals = self.processes.sum([float(total) for total in sums.values()])
        means = {name: total / counts[name] / self.processes.count for name, total in zip(sums, totals, strict=True)}
        if not means:
            raise TrainingError("the training set has fewer images than one batch; lower --batch-size.")
        bad = [name for name, value in means.items() if not abs(value) < float("inf")]
        if bad:
            raise TrainingError(
                f"{self.name}: the {' and '.join(bad)} loss is not finite in epoch {self.epochs_done}. Lower --lr or "
                "--gate-lr, or train without --amp; the last complete epoch is saved."
            )
        self.processes.share_buffers(self.model)
        if self.ema is not None:
            self.processes.share_buffers(self.ema.module)
        return {"lr": self.optimizers[0].param_groups[0]["lr"], **means}

    def _check_weights(self, epoch: int) -> None:
        """The loss reflects every step but the last, and a state that is not finite must not replace a finite one."""
        bad = [name for name, weight in self.model.named_parameters() if not bool(weight.isfinite().all())]
        if bad:
            raise TrainingError(
                f"{self.name}: {bad[0]} is not finite after epoch {epoch}. Lower --lr or --gate-lr, or train without "
                "--amp; the last complete epoch is saved."
            )

    def _losses(self, images: Tensor, targets: Tensor) -> dict[str, Tensor]:
        if is_differentiated(self.model):
            return self.losses(self.wrapped, images, targets, self.criterion)
        loss = self.criterion(self.wrapped(images), targets)
        return {"loss": loss, "standard": loss}

    def _step(self, loss: Tensor, optimizer: torch.optim.Optimizer) -> None:
        clip = self.settings.clip_grad
        if self.scaler is not None:
            self.scaler(loss, optimizer, clip_grad=clip, parameters=self.model.parameters())
        else:
            loss.backward()
            if clip is not None:
                dispatch_clip_grad(self.model.parameters(), clip)
            optimizer.step()
        self.model.zero_grad()
        if self.ema is not None:
            self.ema.update(self.model)

    def _evaluate(self, loader: Loader) -> dict[str, float]:
        hits = [0.0, 0.0, 0.0]  # images, right on the standard path, right on the gated path
        if len(loader) > 0:  # with few images and many processes some have none
            seen = measuring.collect(self.eval_model, loader, amp_dtype=self.amp_dtype)
            logits = [seen.logits, seen.logits if seen.gated_logits is None else seen.gated_logits]
            right = [float((path.argmax(dim=1) == seen.targets).sum()) for path in logits]
            hits = [float(len(seen.targets)), *right]
        images, standard, gated = self.processes.sum(hits)
        row = {"accuracy": standard / images}
        if is_differentiated(self.eval_model):
            row["gated_accuracy"] = gated / images
            matrix = self.eval_model.mechanism.class_filter_matrix()
            row |= {} if matrix is None else {"density": float(metrics.gate_density(matrix))}
        return row

    def save_model(
        self, folder: Path, measured: dict[str, Any] | None = None, figure: Path | None = None, **about: Any
    ) -> Path:
        """Write a checkpoint that plain timm loads, and ``timm_csg.from_pretrained`` with its mechanism.

        Args:
            folder: Where to.
            measured: For ``metrics.json`` and the model card.
            figure: PNG of the gate for the card; not needed to exist.
            **about: ``class_names`` and ``preprocessing``, see ``save_pretrained``.

        Returns:
            The folder.
        """
        timm_model: Any = self.eval_model
        if not is_differentiated(self.eval_model):
            return save_plain(timm_model, folder, **about)
        if figure is not None and figure.is_file():
            (folder / "assets").mkdir(parents=True, exist_ok=True)
            with replacing(folder / "assets" / "gate.png") as temporary:
                shutil.copyfile(figure, temporary)
        base = timm_model.pretrained_cfg.get("hf_hub_id") if self.settings.pretrained else None
        return save_pretrained(timm_model, folder, metrics=measured, base_model=base, **about)

    def _parts(self) -> dict[str, Any]:
        return {"model": self.model, "ema": self.ema, "scaler": self.scaler}

    def _keep(self) -> None:
        if self.processes.is_first:
            with writing(self.state_file.parent):
                self._save()

    def _save(self) -> None:
        self.state_file.parent.mkdir(parents=True, exist_ok=True)
        state = {
            **{name: None if part is None else part.state_dict() for name, part in self._parts().items()},
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            "loop": self.training_state(),
            "epochs_done": self.epochs_done,
            "history": self.history,
        }
        save_state(state, self.state_file)

    def _load(self) -> None:
        """Resume from the state on disk, if there is one; the other processes have it from the first."""
        found = load_state(self.state_file) if self.processes.is_first and self.state_file.exists() else None
        state = self.processes.from_first(found)
        if state is None:
            return
        for name, part in self._parts().items():
            if part is not None:
                part.load_state_dict(state[name])
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        self.load_training_state(state["loop"])
        self.epochs_done, self.history = state["epochs_done"], state["history"]
        _logger.info("%s: resuming after epoch %d of %d", self.name, self.epochs_done, self.settings.epochs)
