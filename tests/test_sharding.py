"""Models that ``fully_shard`` (FSDP2) has sharded: trained, saved whole, and refused where a whole model is needed."""

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import timm_csg
from timm_csg import explain, measuring


@pytest.fixture
def mesh(tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


def step(model, images, targets):
    loop = timm_csg.TrainingMixin()
    loop.schedule = timm_csg.Joint()
    optimizer = torch.optim.SGD(timm_csg.param_groups(model.train(), lr=0.1), lr=0.1)
    loop.attach(optimizer, model)
    loop.losses(model, images, targets, F.cross_entropy)["loss"].backward()
    optimizer.step()


@pytest.mark.parametrize("mechanism", ["assigned", "csg"])
def test_a_step_of_a_sharded_model_is_that_of_the_whole_one(make_model, mechanism, images, mesh, tmp_path):
    saved, targets = [], torch.arange(3)
    for shard in (False, True):
        model = timm_csg.differentiate(make_model(num_classes=3), mechanism=mechanism)
        if mechanism == "assigned":
            timm_csg.assign_filters(model, [(images, targets)])
        if shard:
            fully_shard(model.layer4, mesh=mesh)
            fully_shard(model, mesh=mesh)
        torch.manual_seed(0)
        step(model, images, targets)
        saved.append(timm_csg.from_pretrained(timm_csg.save_pretrained(model, tmp_path / str(shard))))
    whole, sharded = saved
    torch.testing.assert_close(sharded.state_dict(), whole.state_dict())
    if mechanism == "assigned":
        assert not sharded.fc.weight[~sharded.mechanism.assignment].any()
        assert sharded.fc.weight.any()


def test_a_masked_classifier_that_is_sharded_by_itself_is_refused_at_the_first_step(tiny_model, images, targets, mesh):
    model = timm_csg.differentiate(tiny_model, mechanism="assigned")
    fully_shard(model.fc, mesh=mesh)
    fully_shard(model, mesh=mesh)
    with pytest.raises(ValueError, match=r"cannot be set, because it is more than its weight .*its own fully_shard"):
        step(model, images, targets)


def test_what_needs_a_whole_model_says_so(tiny_model, images, targets, mesh):
    model = timm_csg.differentiate(tiny_model, mechanism="assigned")
    fully_shard(model, mesh=mesh)
    loader = [(images, targets)]
    uses = [
        lambda: measuring.collect(model, loader),
        lambda: measuring.ablate(model, loader, torch.arange(96) % 5, 5),
        lambda: explain.grad_cam(model, images),
        lambda: explain.explain_prediction(model, images),
        lambda: timm_csg.assign_filters(model, loader),
    ]
    for use in uses:
        with pytest.raises(ValueError, match=r"is sharded by fully_shard, but .* need a whole model; assign before"):
            use()
