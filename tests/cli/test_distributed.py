"""Several processes train what one process trains: same batches, same gates, every sample counted once."""

import csv
import itertools
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from cli.recorded_train import record
from cli.unmeasured import leave_out_measuring
from processes import FORKS, be_one_of, free_port, run_in_processes
from torch.utils.data import DataLoader

from timm_csg.cli import main
from timm_csg.cli import train as train_module
from timm_csg.cli.build import data_config
from timm_csg.cli.data import load_data
from timm_csg.cli.distributed import GlobalBatches, Processes, epoch_order, joined, run_together
from timm_csg.cli.settings import TrainSettings

COUNTS = (1, 2, 4)


def load(rank, count, **options):
    settings = TrainSettings(img_size=16, device="cpu", **options).resolved()
    return load_data(settings, data_config(settings), Processes(rank, count))


def test_order_is_that_of_a_shuffling_loader_in_one_process():
    torch.manual_seed(7)
    assert torch.cat(list(DataLoader(torch.arange(101), batch_size=10, shuffle=True))).tolist() == epoch_order(101, 7)


@pytest.mark.parametrize("count", COUNTS)
def test_shares_of_a_batch_are_the_batch_of_one_process(count):
    def batches(rank, count):
        sampler = GlobalBatches(50, 8, seed=3, processes=Processes(rank, count))
        sampler.set_epoch(5)
        assert len(sampler) == 6
        return list(sampler)

    shares = zip(*(batches(rank, count) for rank in range(count)), strict=True)
    assert [list(itertools.chain(*parts)) for parts in shares] == batches(0, 1)


@pytest.mark.parametrize("count", COUNTS)
def test_validation_images_are_shared_without_repeats(count):
    labels = [load(rank, count).own_validation for rank in range(count)]
    seen = sorted(index for loader in labels for index in loader.sampler)
    assert seen == list(range(596))


def test_first_process_still_has_all_validation_images():
    assert len(load(0, 4).validation.dataset) == len(load(0, 4).validation.sampler) == 596


def test_batch_that_cannot_be_shared_is_refused():
    with pytest.raises(ValueError, match=r"--batch-size 32 .* by 3; use a multiple of 3, such as 33"):
        load(0, 3, batch_size=32)


def test_one_process_needs_no_group():
    alone, model = Processes(), torch.nn.Linear(1, 1)
    alone.share_buffers(model)
    alone.wait_for_first("nothing")
    assert alone.sum([1.0, 2.5]) == [1.0, 2.5]
    assert alone.from_first("value") == "value"
    assert alone.wrap(model, find_unused_parameters=True) is model


def fail_while_loading(pipe):
    def fail():
        multiprocessing.get_context("fork").Process(target=time.sleep, args=(600,), daemon=True).start()
        return 3

    run_together(fail)


def test_failing_process_leaves_no_loading_process_behind():
    ours, theirs = multiprocessing.Pipe()
    process = FORKS.Process(target=fail_while_loading, args=(theirs,))
    process.start()
    theirs.close()
    assert ours.poll(timeout=120)  # when nobody holds the other end any more
    process.join()
    assert process.exitcode == 3


def torchrun(count, *command):
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    start = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(count)]
    return subprocess.Popen(
        [*start, *command], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    )


def leave(rank, count, port):
    be_one_of(rank, count, port)
    asleep = time.sleep
    time.sleep = lambda seconds: asleep(seconds + 2)  # the others ask again when the first one is long done
    with joined("cpu") as processes:
        if rank == 0:
            asleep(1)
        processes.wait_for_first("last")


def test_first_process_does_not_leave_while_others_still_ask_its_store():
    run_in_processes(leave, 2, free_port(), count=2)


def train_without_report(rank, count, port, output):
    def fail(*_):
        raise ZeroDivisionError

    be_one_of(rank, count, port)
    with pytest.MonkeyPatch.context() as patch:
        leave_out_measuring(patch)
        patch.setattr(train_module, "report_of_run", fail)  # which the first process alone calls
        status = main(["train", "--recipe", "assigned", "--epochs", "1", "--quiet", "--output", str(output)])
    raise SystemExit(status)


@pytest.mark.slow
def test_others_do_not_wait_for_a_first_process_that_could_not_finish(tmp_path):
    port = free_port()
    started = [FORKS.Process(target=train_without_report, args=(rank, 2, port, tmp_path / "run")) for rank in (0, 1)]
    for process in started:
        process.start()
    for process in started:
        process.join(120)
    assert [process.exitcode for process in started] == [1, 0]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """The same training by one, two and four processes: what every process recorded, and the log.

    A model without BatchNorm, whose statistics are those of each process's own share; no augmentation and no dropout,
    which are drawn in each process anew.
    """
    options = "--recipe paper --model test_convnext --img-size 32 --batch-size 240 --epochs 4 --lr 0.02"
    schedule = "--paths alternating --path-unit step --no-aug --device cpu"
    return {count: recorded(count, tmp_path_factory, f"{options} {schedule}") for count in COUNTS}


def recorded(count, tmp_path_factory, options):
    folder = tmp_path_factory.mktemp(f"processes{count}")
    run_in_processes(record, count, free_port(), folder, options.split(), count=count)
    said = "".join((folder / f"said{rank}.txt").read_text() for rank in range(count))
    assert said.count("On the validation images") == 1
    with (folder / "run" / "log.csv").open() as handle:
        log = list(csv.DictReader(handle))
    return [torch.load(folder / f"rank{rank}.pt") for rank in range(count)], log


@pytest.mark.slow
@pytest.mark.parametrize("count", COUNTS[1:])
def test_all_weights_are_bit_equal_in_all_processes_after_every_step(count, runs):
    first, *others = (recorded["steps"] for recorded in runs[count][0])
    assert len(first) == 20
    for other in others:
        for one, same in zip(first, other, strict=True):
            assert all(torch.equal(weight, same[name]) for name, weight in one.items())


@pytest.mark.slow
@pytest.mark.parametrize("count", COUNTS[1:])
def test_weights_and_gates_are_those_of_one_process_after_every_step(count, runs):
    alone, together = runs[1][0][0]["steps"], runs[count][0][0]["steps"]
    for one, other in zip(alone, together, strict=True):
        for name, weight in one.items():
            torch.testing.assert_close(other[name], weight, rtol=0, atol=2e-6, msg=lambda text, name=name: name + text)
    for part in ("weight or gate", "gate"):
        names = [name for name in alone[0] if part != "gate" or name == "mechanism.gate"]
        pairs = zip(alone, together, strict=True)
        largest = max(float((one[name] - other[name]).abs().max()) for one, other in pairs for name in names)
        sys.stdout.write(f"{count} processes: largest difference of a {part} {largest:.1e}\n")
    moved = [step["mechanism.gate"] for step in alone]
    assert not torch.equal(moved[0], moved[9])


@pytest.mark.slow
@pytest.mark.parametrize("count", COUNTS[1:])
def test_losses_and_accuracies_are_those_of_one_process(count, runs):
    for one, other in zip(runs[1][1], runs[count][1], strict=True):
        for name in ("loss", "accuracy", "gated_accuracy", "density"):
            assert float(other[name]) == pytest.approx(float(one[name]), abs=1e-4), name


@pytest.mark.slow
@pytest.mark.parametrize("count", COUNTS)
def test_every_sample_is_seen_once_an_epoch(count, runs):
    seen = {}
    for recorded in runs[count][0]:
        epoch = None
        for event in recorded["samples"]:
            if isinstance(event[0], str):
                epoch = event
            else:
                seen.setdefault((epoch, event[0]), []).append(event[1])
    for (epoch, size), indices in seen.items():
        if size == 1201:
            assert len(indices) == len(set(indices)) == 1200  # the last, incomplete batch is left out
        elif epoch[1] == 0:  # the last epoch is followed by the final measurement, in the first process
            assert sorted(indices) == list(range(596))


@pytest.fixture(scope="module")
def frozen_runs(tmp_path_factory):
    """A frozen backbone with batch norms, whose statistics stay: so these too are the same in any number of processes.

    Without augmentation its features are computed once, by all processes together.
    """
    options = "--recipe standard paper assigned --freeze backbone --no-aug --epochs 2 --lr 0.05 --batch-size 240"
    return {count: recorded(count, tmp_path_factory, f"{options} --img-size 32 --device cpu") for count in (1, 3)}


@pytest.mark.slow
@pytest.mark.parametrize("recipe", ["standard", "paper", "assigned"])
def test_frozen_backbone_ends_alike_in_all_processes(recipe, frozen_runs):
    _, first = frozen_runs[3][0][0]["trained"][recipe]
    for other in frozen_runs[3][0][1:]:
        for name, value in other["trained"][recipe][1].items():
            assert torch.equal(value, first[name]), name


@pytest.mark.slow
@pytest.mark.parametrize("recipe", ["standard", "paper", "assigned"])
def test_frozen_backbone_of_several_processes_ends_as_that_of_one(recipe, frozen_runs):
    _, alone = frozen_runs[1][0][0]["trained"][recipe]
    before, together = frozen_runs[3][0][0]["trained"][recipe]
    fitted = {name for name in together if name.startswith(("mechanism.", "fc."))}
    for name in together.keys() - fitted:
        assert torch.equal(together[name], before[name]), name
    if recipe == "assigned":
        fitted -= {"fc.weight", "fc.bias"}  # other pictures are held out to choose the penalty
        assert torch.cosine_similarity(together["fc.weight"], alone["fc.weight"]).min() > 0.99
        responds = alone["mechanism.variance"] > 0  # whose the others are is chance
        together["mechanism.owned"], alone["mechanism.owned"] = (
            state["mechanism.owned"] * responds for state in (together, alone)
        )
    for name in fitted:
        torch.testing.assert_close(together[name], alone[name], rtol=1e-5, atol=2e-5, msg=lambda text, n=name: n + text)


SMALL = ["--recipe", "paper", "--img-size", "16", "--batch-size", "128", "--warmup-epochs", "0", "--device", "cpu"]


@pytest.mark.slow
def test_wrong_option_is_told_once_and_ends_all(tmp_path):
    process = torchrun(2, "-m", "timm_csg", "train", "--output", str(tmp_path / "out"), *SMALL, "--batch-size", "33")
    _, err = process.communicate(timeout=300)
    assert process.returncode != 0
    assert err.count("--batch-size 33 is for all processes") == 1


@pytest.mark.slow
def test_image_that_one_process_cannot_read_ends_all_with_its_name(tmp_path):
    from PIL import Image

    for split, name, index in itertools.product(("train", "val"), "ab", range(8)):
        path = tmp_path / "data" / split / name / f"{index}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (20, 20), (100 * "ab".index(name), 0, index)).save(path)
    damaged = tmp_path / "data" / "val" / "b" / "7.png"  # the last validation image: the share of process 1
    damaged.write_bytes(damaged.read_bytes()[:40])
    options = ["--data", str(tmp_path / "data"), "--model", "test_resnet", "--img-size", "32", "--batch-size", "8"]
    process = torchrun(2, "-m", "timm_csg", "train", "--output", str(tmp_path / "out"), *options, "--device", "cpu")
    _, err = process.communicate(timeout=300)
    assert process.returncode != 0
    assert err.count(f"{damaged} cannot be read as an image") == 1
    assert "Connection closed" not in err


@pytest.mark.slow
def test_run_goes_on_after_one_process_was_killed(tmp_path):
    def weights(name):
        return (tmp_path / name / "model" / "model.safetensors").read_bytes()

    train = ["-m", "timm_csg", "train", "--output"]
    whole = torchrun(2, *train, str(tmp_path / "whole"), "--epochs", "6", *SMALL)
    assert whole.wait(timeout=300) == 0
    process = torchrun(2, *train, str(tmp_path / "killed"), "--epochs", "6", *SMALL)
    state = tmp_path / "killed" / "paper" / "state.pt"
    while not state.exists() and process.poll() is None:
        time.sleep(0.05)
    workers = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    if not workers.exists():
        process.wait(timeout=300)
        pytest.skip("no /proc to find the processes in")
    os.kill(int(random.Random(0).choice(workers.read_text().split())), signal.SIGKILL)
    _, err = process.communicate(timeout=300)
    assert process.returncode != 0
    assert "Traceback" not in err.split("torch/distributed/elastic")[0]
    again = torchrun(2, *train, str(tmp_path / "killed"), "--epochs", "6", *SMALL)
    assert again.wait(timeout=300) == 0
    assert weights("killed") == weights("whole")
