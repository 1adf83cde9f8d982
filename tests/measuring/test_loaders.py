"""Everything that reads a loader refuses, in one sentence, batches that it would otherwise misread or fail on."""

import pytest
import torch

import timm_csg
from timm_csg import judging, measuring

BOXES = torch.tensor([[4.0, 4.0, 40.0, 40.0]] * 6)
OWNERS = torch.arange(96) % 3
READERS = {
    "ablate": lambda model, loader: measuring.ablate(model, loader, OWNERS, 3),
    "activmap": lambda model, loader: measuring.activmap(model, loader, BOXES),
    "assign_filters": lambda model, loader: timm_csg.assign_filters(model, loader),
    "cam_localisation": lambda model, loader: measuring.cam_localisation(model, loader, BOXES),
    "collect": lambda model, loader: measuring.collect(model, loader),
    "collect_peaks": lambda model, loader: measuring.collect_peaks(model, loader),
    "embed": lambda model, loader: judging.embed(model, loader),
    "gradmap": lambda model, loader: measuring.gradmap(model, loader, BOXES),
    "measure": lambda model, loader: measuring.measure(model, loader),
    "part_interpretability": lambda model, loader: measuring.part_interpretability(model, loader, BOXES[:, None]),
}


@pytest.fixture
def model(make_model):
    return timm_csg.differentiate(make_model(num_classes=3))


@pytest.mark.parametrize("name", READERS)
def test_images_of_bytes_are_refused(model, name):
    loader = [(torch.zeros(6, 3, 64, 64, dtype=torch.uint8), torch.arange(6) % 3)]
    with pytest.raises(TypeError, match=r"images must be floating-point numbers.* but are torch.uint8; see timm.data"):
        READERS[name](model, loader)


@pytest.mark.parametrize("name", READERS)
def test_dictionaries_are_refused_with_the_remedy(model, name):
    loader = [{"image": torch.rand(6, 3, 64, 64), "label": torch.arange(6) % 3}]
    with pytest.raises(TypeError, match=r"yields dict; for dictionaries pass \(\(batch\['image'\], batch\['label'\]\)"):
        READERS[name](model, loader)
