"""The same short training in every host: what differs is only whose loop it is."""

import copy
import functools
import logging
import os
import warnings
from dataclasses import dataclass, field
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from timm.task import load_task_ema_checkpoint, resume_task_checkpoint
from timm.utils import CheckpointSaver, NativeScaler

import timm_csg
from timm_csg.integrations.lightning import LightningTrainingMixin
from timm_csg.integrations.timm_task import DifferentiationTask

BATCHES, BATCH, CLASSES, LR, GATE_LR = 4, 4, 5, 0.05, 0.2
OPTIONS = {"csg": {"sparsity_weight": 0.02, "classes_per_filter": 1.1}}  # by mechanism; defaults for the others
SGD = functools.partial(torch.optim.SGD, lr=LR, momentum=0.9)


@dataclass
class Training:
    """One short training, and what was seen after each of its optimizer steps."""

    schedule: Any
    mechanism: str = "csg"
    epochs: int = 4
    accumulate: int = 1
    overflows: bool = False
    """Whether the second batch of each epoch has an infinite loss, and an AMP scaler skips that step."""
    trace: list = field(default_factory=list)
    """After each step: path, gate or None, and the sum of the classifier's weights."""
    final: dict = field(default_factory=dict)

    def criterion(self, logits, targets):
        loss = F.cross_entropy(logits, targets)
        return loss * float("inf") if self.overflows and bool((targets == CLASSES - 1).all()) else loss

    def model(self):
        torch.manual_seed(0)
        model = timm.create_model("test_resnet", num_classes=CLASSES)
        return timm_csg.differentiate(model, mechanism=self.mechanism, **OPTIONS.get(self.mechanism, {}))

    def record(self, path, model):
        matrix = model.mechanism.class_filter_matrix()
        matrix = None if matrix is None else matrix.clone()
        self.trace.append((path, matrix, model.get_classifier().weight.detach().sum().item()))

    def finish(self, model):
        self.final = copy.deepcopy(model.state_dict())
        return self


def data():
    generator = torch.Generator().manual_seed(3)
    images = torch.rand(BATCHES * BATCH, 3, 32, 32, generator=generator)
    targets = torch.arange(BATCHES * BATCH) % CLASSES
    targets[BATCH : 2 * BATCH] = CLASSES - 1
    return images, targets


class Loader:
    """This process's batches in order, with a place to go on from, which Lightning needs to resume within an epoch."""

    def __init__(self):
        self.batches = list(zip(*(part.split(BATCH) for part in data()), strict=True))
        self.batches = self.batches[int(os.environ.get("RANK", "0")) :: int(os.environ.get("WORLD_SIZE", "1"))]
        self.done = 0

    def __len__(self):
        return len(self.batches)

    def __iter__(self):
        start, self.done = self.done, 0
        for index in range(start, len(self)):
            self.done = (index + 1) % len(self)
            yield self.batches[index]

    def state_dict(self):
        return {"done": self.done}

    def load_state_dict(self, state):
        self.done = state["done"]


# Hosts: each trains, keeps a checkpoint in the folder every so many steps, or goes on from one (a number of steps).


def plain_loop(training, folder, resume=None, every=None):
    model = training.model()
    optimizer = SGD(timm_csg.param_groups(model, lr=LR, gate_lr=GATE_LR))
    scaler = torch.amp.GradScaler("cpu", enabled=training.overflows)
    loop = timm_csg.TrainingMixin()
    loop.schedule = training.schedule
    loop.attach(optimizer, model)
    objects = {"model": model, "optimizer": optimizer, "scaler": scaler}
    start = update = 0
    if resume is not None:
        state = torch.load(folder / f"{resume}.pt", weights_only=True)
        for name, target in objects.items():
            target.load_state_dict(state[name])
        loop.load_training_state(state["loop"])
        start, update = loop.progress.epoch + 1, resume
    loop.assign_filters(model, Loader())
    for epoch in range(start, training.epochs):
        loop.set_epoch(epoch)
        model.train()
        for index, (images, targets) in enumerate(Loader()):
            loss = loop.losses(model, images, targets, training.criterion)["loss"]
            scaler.scale(loss / training.accumulate).backward()
            if (index + 1) % training.accumulate == 0:
                scaler.step(optimizer)
                scaler.update()
                optimizer.zero_grad()
                update += 1
        if every:
            state = {name: target.state_dict() for name, target in objects.items()}
            torch.save({**state, "loop": loop.training_state()}, folder / f"{update}.pt")
    return training.finish(model)


def timm_task(training, folder, resume=None, every=None, *, attached=True):
    """The order of calls in timm's train.py."""
    task = DifferentiationTask(training.model(), training.criterion, schedule=training.schedule, verbose=False)
    groups = timm_csg.param_groups(task.get_trainable_module(), lr=LR, gate_lr=GATE_LR)
    optimizer = SGD(groups)
    if attached:
        task.attach(optimizer)
    scaler = NativeScaler(device="cpu") if training.overflows else None
    updates_per_epoch = BATCHES // training.accumulate
    start = 0
    path = folder / "checkpoint-{}.pth.tar"
    if resume is not None:
        path = str(path).format(resume // updates_per_epoch - 1)
        start = resume_task_checkpoint(task, path, optimizer, scaler, log_info=False)
    task.setup_ema(decay=0.5)
    if resume is not None:
        load_task_ema_checkpoint(task, path)
    task.assign_filters(task.get_trainable_module(), Loader())
    task.steps_per_epoch = updates_per_epoch
    model, eval_model = task.get_trainable_module(), task.get_eval_model()
    saver = CheckpointSaver(model, optimizer, amp_scaler=scaler, checkpoint_dir=str(folder), task=task)
    for epoch in range(start, training.epochs):
        task.get_trainable_module().train()
        num_updates = epoch * updates_per_epoch
        optimizer.zero_grad()
        for index, (images, targets) in enumerate(Loader()):
            need_update = (index + 1) % training.accumulate == 0
            loss = task(images, targets)["loss"]
            loss /= training.accumulate  # in place, as train.py does it
            if scaler is not None:
                scaler(loss, optimizer, parameters=task.get_clip_parameters(), need_update=need_update)
            else:
                loss.backward()
                if need_update:
                    optimizer.step()
            if need_update:
                num_updates += 1
                optimizer.zero_grad()
                task.update_ema(step=num_updates)
        for evaluated in (eval_model, task.get_eval_model(ema=True)):
            evaluated.eval()
            with torch.inference_mode():
                evaluated(data()[0])
        if every:
            saver.save_checkpoint(epoch, metric=float(epoch))
    return training.finish(model)


def lightning(training, folder, resume=None, every=None):
    pytest.importorskip("lightning", reason="needs the extra 'lightning'")
    from lightning import LightningModule, Trainer
    from lightning.pytorch.callbacks import ModelCheckpoint
    from lightning.pytorch.plugins.precision import MixedPrecision

    class Module(LightningTrainingMixin, LightningModule):
        def __init__(self):
            super().__init__()
            self.model = training.model()

        def training_step(self, batch, batch_idx):
            return self.losses(self.model, *batch, training.criterion)

        def configure_optimizers(self):
            return SGD(timm_csg.param_groups(self.model, lr=LR, gate_lr=GATE_LR))

    class Scaled(MixedPrecision):
        """Only the scaler: autocast would compute other numbers than the plain loop."""

        def autocast_context_manager(self):
            return torch.autocast("cpu", enabled=False)

    module = Module()
    module.schedule = training.schedule
    plugins = [Scaled("16-mixed", "cpu", torch.amp.GradScaler("cpu"))] if training.overflows else None
    saving = [ModelCheckpoint(folder, "{step}", every_n_train_steps=every, save_top_k=-1)] if every else []
    quiet()
    trainer = Trainer(
        max_epochs=training.epochs,
        accumulate_grad_batches=training.accumulate,
        callbacks=saving,
        enable_checkpointing=bool(every),
        default_root_dir=folder,
        accelerator="cpu",
        devices=int(os.environ.get("WORLD_SIZE", "1")),
        strategy="ddp" if "WORLD_SIZE" in os.environ else "auto",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        plugins=plugins,
    )
    trainer.fit(module, Loader(), ckpt_path=None if resume is None else folder / f"step={resume}.ckpt")
    return training.finish(module.model)


def transformers(training, folder, resume=None, every=None):
    pytest.importorskip("transformers", reason="needs the extra 'transformers'")
    pytest.importorskip("accelerate", reason="needs the extra 'transformers'")
    from transformers import TimmWrapperConfig, TimmWrapperForImageClassification, Trainer, TrainingArguments

    from timm_csg.integrations.transformers import TransformersTrainingMixin

    class DifferentiationTrainer(TransformersTrainingMixin, Trainer):
        schedule, gate_lr = training.schedule, GATE_LR

        def criterion(self, logits, targets):
            return training.criterion(logits, targets)

        def _get_train_sampler(self, *args):
            return torch.utils.data.SequentialSampler(self.train_dataset)

    wrapper = TimmWrapperForImageClassification(TimmWrapperConfig(architecture="test_resnet", num_labels=CLASSES))
    wrapper.timm_model = training.model()
    arguments = TrainingArguments(
        str(folder),
        num_train_epochs=training.epochs,
        per_device_train_batch_size=BATCH,
        gradient_accumulation_steps=training.accumulate,
        max_grad_norm=0,
        lr_scheduler_type="constant",
        save_strategy="steps" if every else "no",
        save_steps=every or 500,
        use_cpu=True,
        report_to="none",
        disable_tqdm=True,
        logging_strategy="no",
    )
    dataset = [{"pixel_values": image, "labels": target} for image, target in zip(*data(), strict=True)]
    trainer = DifferentiationTrainer(
        wrapper, arguments, train_dataset=dataset, optimizer_cls_and_kwargs=(torch.optim.SGD, SGD.keywords)
    )
    if training.overflows:
        trainer.accelerator.scaler = torch.amp.GradScaler("cpu")
    trainer.train(resume_from_checkpoint=None if resume is None else str(folder / f"checkpoint-{resume}"))
    return training.finish(wrapper.timm_model)


def quiet():
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="lightning")


HOSTS = {
    "plain loop": plain_loop,
    "timm task": timm_task,
    "timm task, not attached": functools.partial(timm_task, attached=False),
    "Lightning": lightning,
    "transformers": transformers,
}
