"""A stand-in for timm's train.py, which is not in the wheel: its imports, its order of calls, random images."""

import argparse
from pathlib import Path

import torch
from PIL import Image
from timm.data import create_loader, create_naflex_loader
from timm.models import create_model
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from timm.task import (
    ClassificationTask,
    LogitDistillationTask,
    load_task_ema_checkpoint,
    resume_task_checkpoint,
)
from timm.utils import CheckpointSaver


class Pictures(torch.utils.data.Dataset):
    """Random ones, always the same; every class in turn."""

    def __init__(self, num_classes, size=20):
        generator = torch.Generator().manual_seed(42)
        pixels = torch.randint(256, (size, 40, 40, 3), generator=generator, dtype=torch.uint8)
        self.images, self.num_classes, self.transform = (
            [Image.fromarray(part.numpy()) for part in pixels],
            num_classes,
            None,
        )

    def __len__(self):
        return len(self.images)

    def __getitem__(self, index):
        return self.transform(self.images[index]), index % self.num_classes


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("data_dir")
    parser.add_argument("--model")
    parser.add_argument("--num-classes", type=int)
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--lr", type=float, default=0.05)
    parser.add_argument("--layer-decay", type=float)
    parser.add_argument("--grad-accum-steps", type=int, default=1)
    parser.add_argument("--model-ema", action="store_true")
    parser.add_argument("--resume", default="")
    parser.add_argument("--torchscript", action="store_true")
    parser.add_argument("--kd-model-name")
    parser.add_argument("--naflex-loader", action="store_true")
    parser.add_argument("--gp")
    parser.add_argument("--size", type=int, default=20)
    args = parser.parse_args()

    torch.manual_seed(42)
    common = {"input_size": (3, 32, 32), "batch_size": 4, "num_workers": 0, "use_prefetcher": False}
    loader = create_loader(
        Pictures(args.num_classes, args.size), is_training=True, auto_augment="rand-m9", re_prob=0.5, **common
    )
    create_loader(Pictures(args.num_classes, args.size), is_training=False, crop_pct=0.8, **common)
    model = create_model(
        args.model, pretrained=False, num_classes=args.num_classes, global_pool=args.gp, scriptable=args.torchscript
    )
    if args.naflex_loader:
        loader = create_naflex_loader(None)
    if args.kd_model_name is not None:
        LogitDistillationTask(student_model=model, teacher_model=args.kd_model_name)
    task = ClassificationTask(
        model=model, criterion=torch.nn.CrossEntropyLoss(), device=torch.device("cpu"), dtype=None, verbose=False
    )
    model = task.get_trainable_module()
    layers = {"layer_decay": args.layer_decay} if args.layer_decay else {}
    optimizer = create_optimizer_v2(model, opt="sgd", lr=args.lr, weight_decay=1e-4, momentum=0.9, **layers)
    start = 0
    if args.resume:
        start = resume_task_checkpoint(task, args.resume, optimizer=optimizer, loss_scaler=None, log_info=True)
    if args.model_ema:
        task.setup_ema(decay=0.9, use_warmup=False, device=None)
        if args.resume:
            load_task_ema_checkpoint(task, args.resume)
    saver = CheckpointSaver(model=model, optimizer=optimizer, args=args, checkpoint_dir=args.data_dir, task=task)
    updates_per_epoch = (len(loader) + args.grad_accum_steps - 1) // args.grad_accum_steps
    scheduler, num_epochs = create_scheduler_v2(
        optimizer, sched="cosine", num_epochs=args.epochs, updates_per_epoch=updates_per_epoch
    )
    for epoch in range(start, num_epochs):
        task.get_trainable_module().train()
        num_updates = epoch * updates_per_epoch
        optimizer.zero_grad()
        for index, (images, targets) in enumerate(loader):
            result = task(images, targets)
            result["loss"].backward()
            if (index + 1) % args.grad_accum_steps and index + 1 < len(loader):
                continue
            optimizer.step()
            num_updates += 1
            optimizer.zero_grad()
            task.update_ema(step=num_updates)
        task.get_eval_model().eval()
        saver.save_checkpoint(epoch, metric=float(epoch))
        scheduler.step(epoch + 1)
    Path(args.data_dir, "updates.txt").write_text(str(num_updates))


if __name__ == "__main__":
    main()
