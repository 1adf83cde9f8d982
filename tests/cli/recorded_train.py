"""``timm-csg train`` as one of several processes, writing down every sample and the weights after every step."""

import contextlib

import torch
from processes import be_one_of

from timm_csg.cli import main
from timm_csg.cli.data import Digits
from timm_csg.cli.engine import Training

steps, samples, trained = [], [], {}
plain_step, plain_item, plain_begin, plain_run = Training._step, Digits.__getitem__, Training._begin, Training.run


def step(self, loss, optimizer):
    plain_step(self, loss, optimizer)
    steps.append({name: weight.detach().clone() for name, weight in self.model.named_parameters()})


def item(self, index):
    samples.append((len(self), index))
    return plain_item(self, index)


def begin(self, epoch, loader):
    plain_begin(self, epoch, loader)
    samples.append((self.name, epoch))


def run(self, *parts):
    before = {name: value.clone() for name, value in self.model.state_dict().items()}
    plain_run(self, *parts)
    trained[self.name] = before, self.model.state_dict()


def record(rank, count, port, folder, options):
    """Train as one of several; what is recorded and said is left in ``folder``."""
    be_one_of(rank, count, port)
    Training._step, Digits.__getitem__, Training._begin, Training.run = step, item, begin, run
    with (folder / f"said{rank}.txt").open("w") as said, contextlib.redirect_stdout(said):
        status = main(["train", "--output", str(folder / "run"), *options])
    torch.save({"steps": steps, "samples": samples, "trained": trained}, folder / f"rank{rank}.pt")
    raise SystemExit(status)
