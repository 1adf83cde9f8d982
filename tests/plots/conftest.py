"""A small trained model and its report, made once."""

import pytest
import timm
import torch
from plots.colours import CLASS_NAMES, batches, coloured
from torch.nn import functional as F

import timm_csg
from timm_csg.plots import report


@pytest.fixture(scope="session")
def trained():
    """A model with assigned filters, and the standard one it is compared with; eight steps of training each."""
    images, targets = coloured(96, seed=1)
    models = []
    for mechanism in ("assigned", None):
        torch.manual_seed(0)
        model = timm.create_model("test_resnet", num_classes=4, output_stride=8, channels=(16, 16, 24, 24))
        if mechanism:
            model = timm_csg.differentiate(model, mechanism="assigned")
            timm_csg.assign_filters(model, batches(images, targets))
        loop = timm_csg.TrainingMixin()
        loop.schedule = timm_csg.Joint()
        optimizer = torch.optim.SGD(timm_csg.param_groups(model, lr=0.1), lr=0.1, momentum=0.9)
        model.train()
        loop.set_epoch(0)
        for step in range(8):
            inputs, labels = images[step % 3 * 32 :][:32], targets[step % 3 * 32 :][:32]
            losses = loop.losses(model, inputs, labels, F.cross_entropy) if mechanism else {}
            (losses["loss"] if mechanism else F.cross_entropy(model(inputs), labels)).backward()
            optimizer.step()
            optimizer.zero_grad()
            if mechanism:
                loop.after_step(model)
        models.append(model.eval())
    return models


@pytest.fixture(scope="session")
def loader():
    """Images the models have not seen."""
    return batches(*coloured(64, seed=2))


@pytest.fixture(scope="session")
def report_file(trained, loader, tmp_path_factory):
    """The report of that model beside the standard one; one class name is an attack."""
    model, standard = trained
    path = tmp_path_factory.mktemp("report") / "report.html"
    return report(model, loader, path, class_names=CLASS_NAMES, reference=standard, title="Colours & <squares>")
