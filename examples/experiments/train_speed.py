"""``timm-csg train`` against timm's train.py on the same pictures, model and batches: pictures per second.

python examples/experiments/train_speed.py pytorch-image-models/train.py

Both are started as a user would start them, on class folders drawn here. An epoch is the time from one line of a
command's log to the next, so that validation and checkpoints count, but neither the start nor our measurements at the
end. Two commands run side by side, each on cores of its own and all others idle, and then once more with cores
exchanged: what slows the machine down slows both. timm's script also runs beside itself: the error of the measurement.
Beside the clock's time stands the processor's, of which other programs take little.
A GPU cannot be shared like that; there (--device cuda) they take turns. Linux only.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from functools import partial
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


def command_of(name: str, args: argparse.Namespace, pictures: Path, output: Path) -> list[str]:
    """How a contestant is started, ``timm`` or a recipe of ``timm-csg train``; all augment and validate alike."""
    shared = ["--model", args.model, "--img-size", args.size, "--batch-size", args.batch_size, "--epochs", args.epochs]
    shared += ["--workers", args.workers, "--device", args.device, "--opt", "sgd", "--lr", 0.02, "--warmup-epochs", 0]
    shared += ["--scale", 0.35, 1.0, "--hflip", 0.5, "--color-jitter", 0.4]
    shared += ["--weight-decay", 1e-4, "--output", output]
    timm = [args.train, "--data-dir", pictures, "--num-classes", CLASSES, "--smoothing", 0]
    timm += ["--train-interpolation", "bilinear"]
    ours = ["-m", "timm_csg", "train", "--data", f"folder:{pictures}", "--quiet", "--recipe", name]
    return [sys.executable, *map(str, timm if name == "timm" else ours), *map(str, shared)]


def epochs_done(folder: Path) -> int:
    """Lines of the log of a run: ``log.csv`` of timm-csg, ``summary.csv`` of timm's script, one folder deeper."""
    logs = [*folder.glob("log.csv"), *folder.glob("*/summary.csv")]
    return max(0, len(logs[0].read_text().splitlines()) - 1) if logs else 0


def processor_time(process: subprocess.Popen) -> float:
    """Seconds that a running process has used so far, of the kernel too; without its loading processes."""
    ticks = Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()[11:13]
    return sum(map(int, ticks)) / os.sysconf("SC_CLK_TCK")


def race(commands: list[list[str]], outputs: list[Path], epochs: int) -> list[np.ndarray]:
    """Clock and processor time of an epoch of each command, all at once, each on its share of the cores: medians.

    Raises:
        SystemExit: If one fails; with the end of what it printed.
    """
    cores, share = sorted(os.sched_getaffinity(0)), max(1, len(os.sched_getaffinity(0)) // len(commands))
    times: list[list[tuple[float, float]]] = [[] for _ in commands]
    running = []
    for index, (command, output) in enumerate(zip(commands, outputs, strict=True)):
        keep_to = partial(os.sched_setaffinity, 0, cores[index * share : (index + 1) * share])
        with output.with_suffix(".log").open("w") as log:
            running.append(subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, preexec_fn=keep_to))
    while any(process.poll() is None for process in running) and any(len(seen) < epochs for seen in times):
        time.sleep(0.02)
        for seen, process, output in zip(times, running, outputs, strict=True):
            if epochs_done(output) > len(seen):
                seen.append((time.perf_counter(), processor_time(process)))
    for process, output in zip(running, outputs, strict=True):
        if process.wait():
            raise SystemExit(f"{process.args}\nfailed: {output.with_suffix('.log').read_text()[-2000:]}")
    return [np.median(np.diff(seen, axis=0), axis=0) for seen in times]


def one_round(args: argparse.Namespace, pictures: Path, rival: str) -> list[list[np.ndarray]]:
    """Times of an epoch, timm's and the rival's, twice: with cores exchanged or, on a GPU, one after the other."""
    found = []
    for turned in (False, True):
        with tempfile.TemporaryDirectory() as folder:
            outputs = [Path(folder) / name for name in ("first", "second")]
            names = [rival, "timm"] if turned else ["timm", rival]
            commands = [command_of(name, args, pictures, run) for name, run in zip(names, outputs, strict=True)]
            if args.device == "cpu":
                times = race(commands, outputs, args.epochs)
            else:
                times = [race([commands[turn]], [outputs[turn]], args.epochs)[0] for turn in (0, 1)]
        found.append(times[::-1] if turned else times)
    return found


def main(arguments: list[str] | None = None) -> dict:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("train", type=Path, help="timm's train.py, from its repository")
    parser.add_argument("--model", default="resnet18")
    parser.add_argument("--size", type=int, default=128, help="side of the model's input, in pixels")
    parser.add_argument("--pictures", type=int, default=640, help="for training")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--epochs", type=int, default=4, help="of every run; the first is not timed")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--workers", type=int, default=0)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--rival", nargs="*", default=["timm", "standard", "assigned"])
    args = parser.parse_args(arguments)
    result = {}
    with tempfile.TemporaryDirectory() as folder:
        draw_pictures(Path(folder), args.pictures)
        for rival in args.rival:
            times = np.array([pair for _ in range(args.rounds) for pair in one_round(args, Path(folder), rival)])
            ratios = times[:, 1] / times[:, 0]
            clock, processor = np.exp(np.log(ratios).mean(axis=0)).tolist()
            speeds = (args.pictures / np.median(times[:, :, 0], axis=0)).tolist()
            result[rival] = {"clock": clock, "processor": processor, "pictures_per_second": speeds}
            result[rival]["ratios"] = ratios.tolist()
            print(f"{rival}: {clock:.3f} times timm's time, {processor:.3f} times its processor time", flush=True)
            print(json.dumps(result[rival]), flush=True)
    return result


if __name__ == "__main__":
    main()
