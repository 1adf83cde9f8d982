"""Assigned filters under DistributedDataParallel: two processes on the CPU train one model."""

import pytest
import timm
import torch
import torch.distributed as dist
import torch.nn.functional as F
from processes import run_in_processes
from torch.nn.parallel import DistributedDataParallel

import timm_csg

pytestmark = pytest.mark.skipif(not dist.is_available(), reason="PyTorch without torch.distributed")


def train_in_process(rank, count, folder):
    """Assign, wrap, and take two steps on this process's half of the pictures."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=count)
    torch.manual_seed(rank)  # another start in each process: DDP takes the first one's
    model = timm_csg.differentiate(timm.create_model("test_resnet", num_classes=5))
    images = torch.rand(20, 3, 32, 32, generator=torch.Generator().manual_seed(0))[rank::count]
    targets = (torch.arange(20) // 2 % 5)[rank::count]
    wrapped = DistributedDataParallel(model)
    timm_csg.assign_filters(wrapped, [(images, targets)], distributed=True)
    loop = timm_csg.TrainingMixin()
    loop.schedule = timm_csg.Joint()
    optimizer = torch.optim.SGD(timm_csg.param_groups(wrapped, lr=0.05), momentum=0.9)
    loop.attach(optimizer, wrapped)
    for _ in range(2):
        loop.losses(wrapped.train(), images, targets, F.cross_entropy)["loss"].backward()
        optimizer.step()
        optimizer.zero_grad()
    torch.save({**model.state_dict(), "draws": model.mechanism.draws}, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def test_processes_share_assignment_weights_and_mask(tmp_path):
    run_in_processes(train_in_process, 2, str(tmp_path), count=2)
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    local = ("running_mean", "running_var", "mechanism.mean", "mechanism.variance")  # each process's own last batch
    for key, value in first.items():
        if not key.endswith(local):
            assert torch.equal(value, second[key]), key
    own = first["mechanism.owned"].bool()
    assert not first["fc.weight"][~own].any()
    assert first["fc.weight"][own].all()
