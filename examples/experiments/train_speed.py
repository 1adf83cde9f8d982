"""``timm-csg train`` against timm's train.py on the same pictures, model and batches: pictures per second.

python examples/experiments/train_speed.py pytorch-image-models/train.py

Both are started as a user would start them, in turns, on class folders drawn here. Every round runs each contestant
twice, with --epochs and with one epoch, in changing order: the difference of the two is the time of the epochs in
between, validation and checkpoints included, the start and our measurements at the end left out. Clock and processor
time are reported. timm's script takes part twice: its ratio to itself is the error of this measurement.
"""

from __future__ import annotations

import argparse
import json
import random
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from PIL import Image

CLASSES = 4
VALIDATION = 64  # pictures


def draw_pictures(folder: Path, number: int) -> None:
    """JPEGs of 160x160, as smooth as photographs, in folders of classes."""
    generator = np.random.default_rng(0)
    for split, count in (("train", number), ("validation", VALIDATION)):
        for index in range(count):
            path = folder / split / f"class{index % CLASSES}" / f"{index}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            coarse = Image.fromarray(generator.integers(0, 256, (20, 20, 3), dtype=np.uint8))
            coarse.resize((160, 160), Image.Resampling.BICUBIC).save(path, quality=87)


def commands(args: argparse.Namespace, pictures: Path, output: Path) -> dict[str, list[str]]:
    """How each contestant is started, without its epochs; all augment and validate alike."""
    shared = [
        "--model",
        args.model,
        "--img-size",
        args.size,
        "--batch-size",
        args.batch_size,
        "--workers",
        args.workers,
    ]
    shared += ["--device", args.device, "--opt", "sgd", "--lr", 0.02, "--warmup-epochs", 0]
    shared += ["--scale", 0.35, 1.0, "--hflip", 0.5, "--color-jitter", 0.4]
    shared += ["--weight-decay", 1e-4, "--output", output]
    timm = [args.train, "--data-dir", pictures, "--num-classes", CLASSES, "--smoothing", 0]
    timm += ["--train-interpolation", "bilinear", *shared]
    ours = ["-m", "timm_csg", "train", "--data", f"folder:{pictures}", "--quiet", *shared]
    found = {"timm": timm, "timm again": timm}
    found |= {f"timm-csg {recipe}": [*ours, "--recipe", recipe] for recipe in args.recipe}
    return {name: [sys.executable, *map(str, command)] for name, command in found.items()}


def seconds(command: list[str]) -> tuple[float, float]:
    """Clock and processor time of one process and its workers.

    Raises:
        SystemExit: If it fails; with the end of what it printed.
    """
    before, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    done = subprocess.run(command, capture_output=True, text=True)
    clock, after = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_CHILDREN)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)}\nfailed: {(done.stderr or done.stdout)[-2000:]}")
    return clock, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def one_round(args: argparse.Namespace, pictures: Path, order: list[str]) -> dict[str, tuple[float, float]]:
    """Clock and processor time of an epoch of each contestant."""
    found = {}
    for name in order:
        times = []
        for epochs in (args.epochs, 1):
            with tempfile.TemporaryDirectory() as output:
                command = commands(args, pictures, Path(output) / "run")[name]
                times.append(seconds([*command, "--epochs", str(epochs)]))
        clock, processor = ((longer - shorter) / (args.epochs - 1) for longer, shorter in zip(*times, strict=True))
        found[name] = (clock, processor)
    return found


def main(arguments: list[str] | None = None) -> dict:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("train", type=Path, help="timm's train.py, from its repository")
    parser.add_argument("--model", default="resnet18")
    parser.add_argument("--size", type=int, default=128, help="side of the model's input, in pixels")
    parser.add_argument("--pictures", type=int, default=640, help="for training")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--epochs", type=int, default=4, help="of the longer run; the shorter one has 1")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--recipe", nargs="*", default=["standard", "assigned"])
    args = parser.parse_args(arguments)
    rounds = []
    with tempfile.TemporaryDirectory() as folder:
        draw_pictures(Path(folder), args.pictures)
        order = list(commands(args, Path(folder), Path(folder)))
        for index in range(args.rounds):
            random.Random(index).shuffle(order)
            rounds.append(one_round(args, Path(folder), order))
            print(json.dumps(rounds[-1]), flush=True)
    result = {}
    for name in rounds[0]:
        clock, processor = (statistics.median(one[name][kind] / one["timm"][kind] for one in rounds) for kind in (0, 1))
        speed = args.pictures / statistics.median(one[name][0] for one in rounds)
        result[name] = {"pictures_per_second": speed, "clock": clock, "processor": processor}
        print(f"{name}: {speed:.1f} pictures/s; time x {clock:.3f} timm's, processor time x {processor:.3f}")
    return result


if __name__ == "__main__":
    main()
