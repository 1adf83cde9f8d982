"""Fixtures for the whole suite: timm's smallest models with weights that are not those of a fresh initialisation."""

import os

os.environ.setdefault("MPLBACKEND", "Agg")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # also in the processes that tests start

import pytest
import timm
import torch

torch.set_num_threads(1)
NUM_CLASSES = 5
IMAGE_SIZE = 64
# Layout of the features -> the smallest model that has it.
TINY_MODELS = {
    "test_resnet": {},  # NCHW, pool → linear
    "test_convnext": {},  # NCHW, pool → norm → linear
    "test_mambaout": {},  # NHWC, pool → norm → linear
    "test_vit": {"img_size": IMAGE_SIZE},  # tokens
}


@torch.no_grad()
def perturb(model, seed=0):
    """Move every parameter and statistic away from its initial value, so that nothing is 0, 1 or equal by accident."""
    generator = torch.Generator().manual_seed(seed)
    for name, tensor in model.state_dict().items():
        if name.startswith("mechanism.") or not tensor.is_floating_point():
            continue
        noise = 0.05 * torch.randn(tensor.shape, generator=generator)
        tensor += noise.abs() if name.endswith("running_var") else noise
    return model


@pytest.fixture(scope="session")
def make_model():
    """Factory of plain tiny models in eval mode: the same weights at every call."""

    def make(name="test_resnet", num_classes=NUM_CLASSES, seed=0, **kwargs):
        state = torch.random.get_rng_state()
        torch.manual_seed(seed)
        model = timm.create_model(name, num_classes=num_classes, **TINY_MODELS.get(name, {}), **kwargs)
        torch.random.set_rng_state(state)
        return perturb(model, seed).eval()

    return make


@pytest.fixture
def tiny_model(make_model):
    """A plain test_resnet with 5 classes, in eval mode."""
    return make_model()


@pytest.fixture(params=TINY_MODELS)
def any_model(request, make_model):
    """A plain tiny model of every layout, in turn."""
    return make_model(request.param)


@pytest.fixture
def images():
    return torch.rand(3, 3, IMAGE_SIZE, IMAGE_SIZE, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def targets():
    return torch.tensor([0, 3, 4])


@pytest.fixture(scope="session")
def random_gate():
    """Factory of feasible gates [classes, filters]: entries in [0, 1], every filter's largest is 1."""

    def make(num_classes, num_filters, seed=2):
        gate = torch.rand(num_classes, num_filters, generator=torch.Generator().manual_seed(seed))
        return gate / gate.amax(dim=0)

    return make


@pytest.fixture(scope="session")
def random_assignment():
    """Factory of assignments [classes, filters]: every class owns a filter, some filters serve none or two classes."""

    def make(num_classes, num_filters, seed=2):
        generator = torch.Generator().manual_seed(seed)
        assignment = torch.rand(num_classes, num_filters, generator=generator) < 1 / num_classes
        assignment[torch.arange(num_classes), torch.randperm(num_filters, generator=generator)[:num_classes]] = True
        return assignment

    return make


@pytest.fixture(scope="session")
def gated(random_gate, random_assignment):
    """Give a differentiated model a random gate, or random assigned filters; returns the model."""

    def set_state(model, seed=2):
        mechanism = model.mechanism
        with torch.no_grad():
            if mechanism.name == "csg":
                mechanism.gate.copy_(random_gate(*mechanism.gate.shape, seed=seed))
            elif mechanism.name == "picnn":
                mechanism.correspondence.copy_(4 * random_gate(*mechanism.correspondence.shape, seed=seed))
            else:
                generator = torch.Generator().manual_seed(seed)
                mean, variance, scale = torch.rand(3, mechanism.num_filters, generator=generator).add(0.5)
                mechanism.assign_(random_assignment(*mechanism.assignment.shape, seed=seed), mean, variance)
                mechanism.scale.copy_(scale)
                mechanism.bias.copy_(torch.randn(mechanism.num_classes, generator=generator))
        return model

    return set_state
