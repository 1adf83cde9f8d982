"""``timm-csg train`` as a process of torchrun runs it, writing down every sample and the weights after every step.

Run: torchrun --nproc-per-node 2 tests/cli/recorded_train.py FOLDER train ...
"""

import os
import sys
from pathlib import Path

import torch

from timm_csg.cli import main
from timm_csg.cli.data import Digits
from timm_csg.cli.engine import Training

rank = int(os.environ.get("RANK", 0))
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


if __name__ == "__main__":
    Training._step, Digits.__getitem__, Training._begin, Training.run = step, item, begin, run
    status = main(sys.argv[2:])
    torch.save({"steps": steps, "samples": samples, "trained": trained}, Path(sys.argv[1]) / f"rank{rank}.pt")
    sys.exit(status)
