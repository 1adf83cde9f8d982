"""Lightning: scikit-learn's digits, a tiny timm model, assigned filters in every step.

python examples/lightning_loop.py
python examples/lightning_loop.py --resume runs/last.ckpt --epochs 20
"""

from __future__ import annotations

import argparse
from pathlib import Path

import lightning as L
import timm
import torch
from sklearn.datasets import load_digits
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import timm_csg
from timm_csg.integrations.lightning import LightningTrainingMixin
from timm_csg.recipes import RECIPES

RECIPE = RECIPES["assigned"]


class Classifier(LightningTrainingMixin, L.LightningModule):
    """A LightningModule as always, but for ``self.losses`` and the optimizer's groups."""

    schedule = RECIPE.schedule

    def __init__(self, lr: float = 0.1) -> None:
        super().__init__()
        self.save_hyperparameters()
        model = timm.create_model("test_resnet", num_classes=10, in_chans=1, output_stride=8)
        self.model = timm_csg.differentiate(model, mechanism=RECIPE.mechanism)

    def training_step(self, batch, batch_idx):
        losses = self.losses(self.model, *batch, F.cross_entropy)
        self.log_dict({name: losses[name] for name in ("standard", "gated", "solo")})
        return losses

    def validation_step(self, batch, batch_idx):
        images, targets = batch
        outputs = self.model(images, paths=("standard", "gated"))
        for name, logits in (("accuracy", outputs.standard), ("gated_accuracy", outputs.gated)):
            self.log(name, (logits.argmax(dim=1) == targets).float().mean(), prog_bar=True)

    def configure_optimizers(self):
        lr = self.hparams.lr
        groups = timm_csg.param_groups(self.model, lr=lr, gate_lr=RECIPE.gate_lr, weight_decay=5e-4)
        return torch.optim.SGD(groups, lr=lr, momentum=0.9, nesterov=True)


def main(arguments: list[str] | None = None) -> dict[str, float]:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=12)
    parser.add_argument("--resume", type=Path, help="a checkpoint of Lightning")
    parser.add_argument("--output", type=Path, default=Path("runs"))
    args = parser.parse_args(arguments)

    L.seed_everything(0)
    digits = load_digits()
    images = torch.from_numpy(digits.images).float()[:, None] / 8 - 1  # [samples, 1, 8, 8], values 0 to 16 at first
    images, targets = F.interpolate(images, size=24, mode="bilinear"), torch.from_numpy(digits.target).long()
    held_out = torch.arange(len(images)) % 3 == 2
    train = DataLoader(TensorDataset(images[~held_out], targets[~held_out]), batch_size=64, shuffle=True)
    test = DataLoader(TensorDataset(images[held_out], targets[held_out]), batch_size=64)

    module = Classifier()
    trainer = L.Trainer(max_epochs=args.epochs, accelerator="auto", devices=1, logger=False, enable_checkpointing=False)
    trainer.fit(module, train, test, ckpt_path=args.resume)
    trainer.save_checkpoint(args.output / "last.ckpt")  # to go on from
    timm_csg.save_pretrained(module.model, args.output / "model")  # to share
    result = {name: float(value) for name, value in trainer.callback_metrics.items()}
    print(", ".join(f"{name} {value:.3f}" for name, value in sorted(result.items())))
    return result


if __name__ == "__main__":
    main()
