"""On a GPU: every recipe trains under AMP, in channels_last and compiled, and what is measured equals the CPU's.

Tolerances are those of convolutions with TensorFloat32.
"""

import copy

import pytest
import torch
import torch.nn.functional as F
from conftest import NUM_CLASSES

import timm_csg
from timm_csg import measuring
from timm_csg.recipes import RECIPES

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
DEVICE = "cuda"
RECIPE_NAMES = [name for name, recipe in RECIPES.items() if not recipe.separate_optimizers]
DTYPES = {"float32": None, "float16": torch.float16, "bfloat16": torch.bfloat16}


@pytest.fixture
def batch():
    generator = torch.Generator().manual_seed(0)
    return torch.rand(20, 3, 64, 64, generator=generator).to(DEVICE), (torch.arange(20) % NUM_CLASSES).to(DEVICE)


def trained(model, recipe, batch, *, dtype=None, is_compiled=False, steps=3):
    """A few steps of the recipe on the path where all its terms are, with a scaler for float16."""
    images, targets = batch
    loop = timm_csg.TrainingMixin()
    loop.schedule = timm_csg.Joint()
    groups = timm_csg.param_groups(model, lr=0.05, gate_lr=recipe.gate_lr)
    optimizer = torch.optim.SGD(groups, lr=0.05, momentum=0.9)
    loop.assign_filters(model, [batch], amp_dtype=dtype)
    attachment = loop.attach(optimizer, model)
    scaler = torch.amp.GradScaler(DEVICE, init_scale=2.0**8, enabled=dtype is torch.float16)
    run = torch.compile(model) if is_compiled else model
    for step in range(steps):
        loop.set_epoch(step)
        with torch.autocast(DEVICE, dtype=dtype, enabled=dtype is not None):
            losses = loop.losses(run.train(), images, targets, F.cross_entropy)
        scaler.scale(losses["loss"]).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
    attachment.remove()
    return losses


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", RECIPE_NAMES)
def test_trains_under_amp(make_model, batch, name, dtype):
    recipe = RECIPES[name]
    model = timm_csg.differentiate(make_model(), mechanism=recipe.mechanism).to(DEVICE)
    losses = trained(model, recipe, batch, dtype=DTYPES[dtype])
    assert all(bool(value.isfinite().all()) for value in losses.values())
    assert all(bool(value.isfinite().all()) for value in model.state_dict().values())
    assert model.mechanism.is_feasible(model.read_head())


@pytest.mark.parametrize("name", RECIPE_NAMES)
def test_trains_in_channels_last_and_compiled(make_model, batch, name):
    recipe = RECIPES[name]
    images, targets = batch
    model = timm_csg.differentiate(make_model(), mechanism=recipe.mechanism)
    model = model.to(DEVICE, memory_format=torch.channels_last)
    losses = trained(model, recipe, (images.contiguous(memory_format=torch.channels_last), targets), is_compiled=True)
    assert all(bool(value.isfinite().all()) for value in losses.values())


@pytest.mark.parametrize("name", RECIPE_NAMES)
def test_losses_are_the_cpus(make_model, batch, name, monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    model = timm_csg.differentiate(make_model(), mechanism=RECIPES[name].mechanism)
    found = {}
    for device in ("cpu", DEVICE):
        loop, run = timm_csg.TrainingMixin(), copy.deepcopy(model).to(device)
        loop.schedule = timm_csg.Joint()
        images, targets = (part.to(device) for part in batch)
        loop.assign_filters(run, [(images, targets)])
        found[device] = loop.losses(run.train(), images, targets, F.cross_entropy)
    for term, value in found[DEVICE].items():
        torch.testing.assert_close(value.cpu(), found["cpu"][term], rtol=1e-2, atol=2e-3)


def test_numbers_are_the_cpus(make_model, batch):
    model = timm_csg.differentiate(make_model())
    images, targets = (part.cpu() for part in batch)
    here = measuring.collect(model, [(images, targets)])
    there = measuring.collect(copy.deepcopy(model).to(DEVICE), [batch])
    torch.testing.assert_close(there.features, here.features, rtol=1e-2, atol=2e-3)
    owners = model.mechanism.class_filter_matrix() > 0.5
    ours = measuring.ablate(model, [(images, targets)], owners, NUM_CLASSES)
    theirs = measuring.ablate(copy.deepcopy(model).to(DEVICE), [batch], owners, NUM_CLASSES)
    torch.testing.assert_close(theirs.after, ours.after, atol=0.3, rtol=0)  # a picture at the border may change sides


@pytest.mark.parametrize("mechanism", ["csg", "assigned"])
def test_explanations_run_there(make_model, batch, mechanism):
    model = timm_csg.differentiate(make_model(), mechanism=mechanism).to(DEVICE).eval()
    explained = timm_csg.explain.cam(model, batch[0][:2], batch[1][:2])
    assert bool(torch.as_tensor(explained.maps if hasattr(explained, "maps") else explained).isfinite().all())


def test_a_checkpoint_from_there_loads_here(make_model, batch, tmp_path):
    model = timm_csg.differentiate(make_model()).to(DEVICE)
    trained(model, RECIPES["assigned"], batch)
    timm_csg.save_pretrained(model, tmp_path / "model")
    loaded = timm_csg.from_pretrained(tmp_path / "model")
    for name, value in model.state_dict().items():
        torch.testing.assert_close(loaded.state_dict()[name], value.cpu())
