"""Hugging Face Trainer: scikit-learn's digits, a timm model in TimmWrapper, assigned filters.

python examples/hf_trainer.py
python examples/hf_trainer.py --epochs 20 --resume    # goes on from the last checkpoint in runs/
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch
from sklearn.datasets import load_digits
from torch.nn import functional as F
from transformers import TimmWrapperConfig, TimmWrapperForImageClassification, Trainer, TrainingArguments

import timm_csg
from timm_csg.integrations.transformers import TransformersTrainingMixin
from timm_csg.recipes import RECIPES

RECIPE = RECIPES["assigned"]


class DifferentiationTrainer(TransformersTrainingMixin, Trainer):
    """The Trainer with the recipe's schedule, and a learning rate of its own for the gate."""

    schedule = RECIPE.schedule
    gate_lr = RECIPE.gate_lr


def accuracy(predicted):
    return {"accuracy": float(np.mean(predicted.predictions.argmax(axis=1) == predicted.label_ids))}


def main(arguments: list[str] | None = None) -> dict[str, float]:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=12)
    parser.add_argument("--resume", action="store_true")
    parser.add_argument("--output", type=Path, default=Path("runs"))
    args = parser.parse_args(arguments)

    digits = load_digits()
    images = torch.from_numpy(digits.images).float()[:, None] / 8 - 1  # [samples, 1, 8, 8], values 0 to 16 at first
    images, targets = F.interpolate(images, size=24, mode="bilinear"), torch.from_numpy(digits.target).long()
    samples = [{"pixel_values": image, "labels": label} for image, label in zip(images, targets, strict=True)]
    train = [sample for index, sample in enumerate(samples) if index % 3 != 2]
    test = [sample for index, sample in enumerate(samples) if index % 3 == 2]

    options = {"in_chans": 1, "output_stride": 8}
    torch.manual_seed(0)
    model = TimmWrapperForImageClassification(
        TimmWrapperConfig(architecture="test_resnet", num_labels=10, model_args=options)
    )  # or TimmWrapperForImageClassification.from_pretrained("timm/resnet18.a1_in1k", num_labels=10, ...)
    timm_csg.differentiate(model.timm_model, mechanism=RECIPE.mechanism)

    settings = TrainingArguments(
        str(args.output),
        num_train_epochs=args.epochs,
        per_device_train_batch_size=64,
        per_device_eval_batch_size=256,
        learning_rate=0.1,
        lr_scheduler_type="constant",
        save_strategy="epoch",
        save_total_limit=1,
        eval_strategy="epoch",
        logging_strategy="epoch",
        report_to="none",
        disable_tqdm=True,
    )
    sgd = (torch.optim.SGD, {"lr": settings.learning_rate, "momentum": 0.9, "nesterov": True})
    trainer = DifferentiationTrainer(
        model, settings, train_dataset=train, eval_dataset=test, compute_metrics=accuracy, optimizer_cls_and_kwargs=sgd
    )
    trainer.train(resume_from_checkpoint=args.resume)
    timm_csg.save_pretrained(model.timm_model, args.output / "model")  # to share: loads in timm and transformers too
    result = trainer.evaluate()
    print(f"accuracy {result['eval_accuracy']:.3f}, loss {result['eval_loss']:.3f}")
    return result


if __name__ == "__main__":
    main()
