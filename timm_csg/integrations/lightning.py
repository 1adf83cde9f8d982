"""Train a differentiated model with Lightning: one mixin, automatic optimisation, resumable checkpoints.

Works with the packages ``lightning`` and ``pytorch_lightning`` alike, since it imports neither.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from torch import Tensor

from timm_csg.attachment import Attachment
from timm_csg.integrations.loaders import as_long_as_training
from timm_csg.model import DifferentiatedModel
from timm_csg.training import Progress, TrainingMixin

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule as _Host
else:
    _Host = object
_KEY = "timm_csg"


class LightningTrainingMixin(TrainingMixin, _Host):  # type: ignore[misc]  # lightning's types are not checked
    """``TrainingMixin`` for a ``LightningModule``; name it first among the bases.

    Its hooks assign the filters to classes before the first step (see ``assignment_loader``), tell the schedule the
    epoch, attach the projection to the optimizers when training starts (so do not call ``attach`` yourself), and keep
    the progress in Lightning's checkpoints. If you override one of them, call ``super()``. With
    DistributedDataParallel, schedules other than ``Joint()`` need ``strategy="ddp_find_unused_parameters_true"``.

    Example:
        >>> import timm, timm_csg, torch
        >>> class Classifier(LightningTrainingMixin):  # and lightning.LightningModule
        ...     schedule = timm_csg.Joint()
        ...
        ...     def training_step(self, batch, batch_idx):
        ...         images, targets = batch
        ...         return self.losses(self.model, images, targets, torch.nn.functional.cross_entropy)
        ...
        ...     def configure_optimizers(self):
        ...         return torch.optim.SGD(timm_csg.param_groups(self.model, lr=0.1), lr=0.1)
    """

    _attachment: Attachment | None = None
    _loaded_state: dict[str, Any] | None = None

    def on_train_start(self) -> None:
        """Assign the filters and attach to the optimizers; go on where the checkpoint was, if there is one.

        Raises:
            TypeError: If the module does not hold exactly one differentiated model.
            ValueError: If the model is in eval mode, or the checkpoint belongs to another schedule.
        """
        super().on_train_start()
        models = _differentiated(self)
        if len(models) != 1:
            raise TypeError(
                f"expected one differentiated model among the attributes of {type(self).__name__}, but found "
                f"{len(models)}; call differentiate() on the model before training, or use TrainingMixin itself."
            )
        if not models[0].training:
            raise ValueError(
                "the model is in eval mode, in which only the standard path runs, and Lightning leaves modes as they "
                "are; call model.train() before training."
            )
        if self._loaded_state is not None:
            self.load_training_state(self._loaded_state)
            self._loaded_state = None
        elif self.trainer.global_step == 0:
            self.progress = Progress()  # fit() a second time
        if self._attachment is not None:  # of an earlier fit()
            self._attachment.remove()
        self._attachment = self.attach(self.trainer.optimizers, models[0])
        if self.trainer.global_step == 0:
            self.assign_filters(models[0], self.assignment_loader(), averages=self._averages())

    def assignment_loader(self) -> Iterable[tuple[Tensor, Tensor]]:
        """The pictures from which filters are assigned to classes: those of training, as ``training_step`` gets them.

        Override it to leave out augmentation, or if your batches are not (images, targets).

        Raises:
            TypeError: If they are not.
        """
        loader: Any = self.trainer.train_dataloader
        for batch in as_long_as_training(loader, self.trainer.num_training_batches):
            batch = self.trainer.precision_plugin.convert_input(batch)
            batch = self._on_before_batch_transfer(batch)
            batch = self.trainer.strategy.batch_to_device(batch)
            if not isinstance(batch, (tuple, list)) or len(batch) < 2:
                raise TypeError(
                    "filters are assigned to classes from batches (images, targets, ...), but found "
                    f"{type(batch).__name__}; let {type(self).__name__}.assignment_loader() yield such pairs."
                )
            yield batch[0], batch[1]

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> Any:
        """Tell the schedule which epoch it is.

        Args:
            batch: Not looked at.
            batch_idx: Not looked at.

        Returns:
            What the module's own hook returns.
        """
        self.set_epoch(self.current_epoch)  # on_train_epoch_start is left out on resume after an epoch's last batch
        return super().on_train_batch_start(batch, batch_idx)

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Project the averages of callbacks (``WeightAveraging``, ``StochasticWeightAveraging``), which come first.

        Args:
            outputs: For the module's own hook, as all that follow.
            batch: Not looked at.
            batch_idx: Not looked at.
        """
        super().on_train_batch_end(outputs, batch, batch_idx)
        self._project_averages()

    def _averages(self) -> list[DifferentiatedModel]:
        kept = (getattr(callback, "_average_model", None) for callback in self.trainer.callbacks)  # no public way
        return [model for average in kept if average is not None for model in _differentiated(average)]

    def _project_averages(self) -> None:
        for average in self._averages():
            average.project_()

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add the progress of training; averages in the checkpoint are those of the callbacks, projected here.

        Args:
            checkpoint: What Lightning saves; changed in place.
        """
        super().on_save_checkpoint(checkpoint)
        self._project_averages()
        checkpoint[_KEY] = self.training_state()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep the progress for when training starts; loading for inference does not ask for the same schedule.

        Args:
            checkpoint: What Lightning has loaded; left as it is.
        """
        super().on_load_checkpoint(checkpoint)
        self._loaded_state = checkpoint.get(_KEY)


def _differentiated(module: Any) -> list[DifferentiatedModel]:
    return [part for part in module.modules() if isinstance(part, DifferentiatedModel)]
