"""Let file operations of ``timm-csg train`` fail, stop it by signals, and damage its pictures, again and again.

Each time it must say why in one line and be finished or resumable.

Run: python tests/cli/faulty_train.py FOLDER [OPERATIONS [SIGNALS [DAMAGES]]]

Every operation on the run folder that Python's audit hooks see (open, rename, mkdir, remove, chmod, list) fails once,
with "no space left", "permission denied" and "input/output error" in turn; OPERATIONS of them, spread over the run.
SIGTERM, SIGINT and SIGKILL come at SIGNALS random moments. Every tenth picture is damaged, others each time, before the
run or while it goes on; they are mended afterwards. In the end the same command is given again.
"""

import contextlib
import errno
import functools
import os
import random
import signal
import sys
import time
from pathlib import Path

from safetensors.torch import load_file

import timm_csg.cli.train  # the commands import late: once here, before the forks
import timm_csg.plots.reporting  # noqa: F401
from timm_csg.cli import main

ERRORS = (errno.ENOSPC, errno.EACCES, errno.EIO)
EVENTS = ("open", "os.rename", "os.mkdir", "os.remove", "os.rmdir", "os.chmod", "os.listdir", "os.scandir")
STATUSES = {signal.SIGTERM: 143, signal.SIGINT: 130, signal.SIGKILL: -9}


def command(data, output):
    options = ["--model", "test_resnet", "--img-size", "32", "--epochs", "2", "--batch-size", "4", "--workers", "0"]
    options += ["--device", "cpu", "--warmup-epochs", "0", "--recipe", "standard", "paper"]
    return ["train", "--data", str(data), "--output", str(output), *options]


def fail_at(output, number, seen):
    """Let the operation of this number on the run folder fail; ``seen`` counts them."""

    def hook(event, arguments):
        if event not in EVENTS or not isinstance(arguments[0], (str, bytes, os.PathLike)):
            return
        if not os.fsdecode(arguments[0]).startswith(str(output)):
            return
        seen.append(event)
        if len(seen) == number:
            code = ERRORS[number % len(ERRORS)]
            raise OSError(code, os.strerror(code), os.fsdecode(arguments[0]))

    sys.addaudithook(hook)


def run(data, output, *, fail=None, then=None):
    """Train in a process of its own; its status, what it said on stderr, and how many operations it did.

    ``fail`` is the number of an operation; ``then``: (seconds, function that then gets the process's id).
    """
    said, counts = output.with_suffix(".said"), output.with_suffix(".count")
    child = os.fork()
    if child == 0:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        os.dup2(os.open(said, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 2)
        seen = []
        fail_at(output, fail, seen)
        try:
            status = main(command(data, output))
        except BaseException as error:  # what would be a traceback
            os.write(2, f"TRACEBACK {type(error).__name__}: {error}\n".encode())
            status = 99
        counts.write_text(str(len(seen)))
        os._exit(status)
    if then is not None:
        delay, action = then
        time.sleep(delay)
        action(child)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    return status, said.read_text(), int(counts.read_text()) if counts.exists() else 0


def send(kind, child):
    os.kill(child, kind)


def verdict(data, output, status, said, weights, allowed):
    """Empty if the run ended as it should and can be finished; else what is wrong."""
    lines = said.splitlines()
    if status not in allowed or (status > 0 and len(lines) != 1) or "raceback" in said.lower():
        return f"status {status}, said {said!r}"
    status, said, _ = run(data, output)
    if status != 0:
        return f"cannot be finished: status {status}, said {said!r}"
    found = load_file(output / "model" / "model.safetensors")
    same = all((found[key] == value).all() for key, value in weights.items())
    return "" if same else "ends with other weights"


@contextlib.contextmanager
def damaged(data, number):
    """A function that damages every tenth picture, in three ways; they are mended at the end of the block."""
    pictures = sorted(data.rglob("*.png"))
    whole = {path: path.read_bytes() for path in pictures[number % 10 :: 10]}

    def damage(child=None):
        for index, (path, content) in enumerate(whole.items()):
            path.write_bytes([content[: len(content) // 2], b"", b"no picture"][(number + index) % 3])

    yield damage
    for path, content in whole.items():
        path.write_bytes(content)


def main_of_script(folder, operations, signals, damages):
    from cli.folders_of_pictures import make_splits

    data = make_splits(folder / "pets", ["cat", "dog"], train=8, validation=4)
    start = time.monotonic()
    status, said, count = run(data, folder / "whole")
    seconds = time.monotonic() - start
    weights = load_file(folder / "whole" / "model" / "model.safetensors")
    problems = [] if status == 0 else [f"undisturbed: {said}"]
    for number in sorted({1 + index * count // operations for index in range(operations)}):
        output = folder / f"fail{number}"
        status, said, _ = run(data, output, fail=number)
        problem = verdict(data, output, status, said, weights, {0, 1, 2})
        problems += [f"operation {number} of {count}: {problem}"] * bool(problem)
    chance = random.Random(0)
    for number in range(signals):
        kind, delay = list(STATUSES)[number % 3], chance.uniform(0.05, seconds)
        output = folder / f"stop{number}"
        status, said, _ = run(data, output, then=(delay, functools.partial(send, kind)))
        problem = verdict(data, output, status, said, weights, {0, STATUSES[kind]})
        problems += [f"{kind.name} after {delay:.2f} s: {problem}"] * bool(problem)
    for number in range(damages):
        output = folder / f"damage{number}"
        with damaged(data, number) as damage:
            late = number % 2 == 1
            if not late:
                damage()
            status, said, _ = run(data, output, then=(chance.uniform(0.05, seconds), damage) if late else None)
        problem = verdict(data, output, status, said, weights, {0, 1, 2} if late else {2})
        if not problem and status and str(data) not in said:
            problem = f"names no picture: {said!r}"
        problems += [f"damage {number}: {problem}"] * bool(problem)
    count = f"{operations} failures, {signals} signals and {damages} damages"
    sys.stdout.write("\n".join([*problems, f"{count}, {len(problems)} problems\n"]))


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[1]))
    numbers = [int(text) for text in sys.argv[2:]]
    main_of_script(Path(sys.argv[1]).absolute(), *(numbers + [40, 12, 6][len(numbers) :]))
