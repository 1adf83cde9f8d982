"""Kill ``timm-csg train`` with SIGKILL again and again, resume it each time, and compare with a run left alone.

Run: python tests/cli/kill_train.py FOLDER [KILLS]

The moments are random, in turn during a step, an evaluation and the writing of the state, the last ones while the
finished model is measured and saved. Half of a state is on disk for a tenth of a second, so that kills hit it.
"""

import csv
import io
import json
import os
import random
import signal
import sys
import time
from pathlib import Path

import torch

import timm_csg.plots.reporting  # noqa: F401  # the commands import late: once here, before the forks
from timm_csg.cli import main
from timm_csg.cli import train as train_module
from timm_csg.cli.engine import Training
from timm_csg.cli.state import load_state

EPOCHS = 10
# What is announced, and for how many seconds afterwards a kill may come.
PHASES = {"step": 0.05, "evaluation": 0.15, "writing": 0.12, "measuring": 0.3, "saving": 0.02}


def train(output, notify):
    """Train or go on, and tell which phase begins."""

    def announced(function, phase):
        def call(*args, **kwargs):
            notify(phase)
            return function(*args, **kwargs)

        return call

    save = torch.save

    def save_in_two_halves(values, handle):
        content = io.BytesIO()
        save(values, content)
        half = content.tell() // 2
        handle.write(content.getvalue()[:half])
        handle.flush()
        notify("writing")
        time.sleep(0.1)
        handle.write(content.getvalue()[half:])

    Training._step = announced(Training._step, "step")
    Training._evaluate = announced(Training._evaluate, "evaluation")
    Training.save_model = announced(Training.save_model, "saving")
    train_module.measure_training = announced(train_module.measure_training, "measuring")
    torch.save = save_in_two_halves
    options = ["--recipe", "assigned", "--model-ema", "--img-size", "16", "--batch-size", "128", "--device", "cpu"]
    return main(["train", "--output", str(output), "--epochs", str(EPOCHS), "--quiet", *options])


def train_until(output, phase, occurrence, delay):
    """Train in a process of its own; kill it after the given occurrence of a phase, or let it end (phase None)."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reading)
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        os._exit(train(output, lambda name: os.write(writing, f"{name}\n".encode())))
    os.close(writing)
    with os.fdopen(reading) as phases:
        for line in phases:
            occurrence -= line.strip() == phase
            if occurrence == 0:
                time.sleep(delay)
                os.kill(child, signal.SIGKILL)
                break
    return os.waitpid(child, 0)[1]


def epochs_done(output):
    """Whole epochs on disk; fails if the state is not complete."""
    state = output / "assigned" / "state.pt"
    return load_state(state)["epochs_done"] if state.exists() else 0


def outcome(output):
    """Everything a run leaves, but for its times."""
    with (output / "log.csv").open() as handle:
        log = [{key: value for key, value in row.items() if key != "seconds"} for row in csv.DictReader(handle)]
    metrics = json.loads((output / "metrics.json").read_text())["assigned"]
    weights = [output / "model" / name for name in ("model.safetensors", "mechanism/timm_csg.safetensors")]
    return log, metrics | {"seconds": None}, [path.read_bytes() for path in weights]


def kills(folder, count):
    generator = random.Random(0)
    output = folder / "killed"
    for number in range(1, count + 1):
        done = epochs_done(output)
        at_end = number > count - 4
        more = EPOCHS - done if at_end else generator.randint(0, 1) if done < EPOCHS - 2 else 0
        phase = generator.choice(["measuring", "saving"]) if at_end else list(PHASES)[number % 3]
        first = 1 + more * 9 if phase == "step" else 1 + more  # nine steps are an epoch
        occurrence = 1 if at_end else generator.randint(first, first + 8) if phase == "step" else first
        status = train_until(output, phase, occurrence, generator.uniform(0, PHASES[phase]))
        if status != signal.SIGKILL:
            raise SystemExit(f"kill {number}: the process was not killed but ended with {status}")
        left = sum(path.stat().st_size for path in output.rglob(".*.tmp"))
        yield number, phase, done, epochs_done(output), left


def run(folder, count):
    folder.mkdir(parents=True, exist_ok=True)
    for number, phase, before, after, left in kills(folder, count):
        sys.stdout.write(
            f"kill {number:2} of {count} during {phase:10}: began at epoch {before:2}, complete state of epoch "
            f"{after:2} on disk, {left} bytes of an unfinished file\n"
        )
        sys.stdout.flush()
    for output in (folder / "killed", folder / "whole"):
        if train_until(output, phase=None, occurrence=-1, delay=0) != 0:
            raise SystemExit(f"{output} did not end")
    equal = outcome(folder / "killed") == outcome(folder / "whole")
    rest = [str(path) for path in (folder / "killed").rglob(".*.tmp")]
    sys.stdout.write(f"log, metrics and weights equal to an uninterrupted run: {equal}; files left over: {rest}\n")
    return 0 if equal and not rest else 1


if __name__ == "__main__":
    sys.exit(run(Path(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 20))
