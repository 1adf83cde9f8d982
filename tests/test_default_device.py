"""``torch.set_default_device``: what is computed from tensors on the CPU stays there.

The default device is "meta" here: a tensor that lands on it by accident has no values, and what uses it fails loudly.
"""

import pytest
import torch

import timm_csg
from timm_csg import explain, judging, measuring, metrics, plots

CLASSES, IMAGES, FILTERS = 4, 32, 12


@pytest.fixture
def on_meta():
    """The default device is "meta" from ``on_meta()`` to the end of the test."""
    yield lambda: torch.set_default_device("meta")
    torch.set_default_device(None)


def responses():
    """Responses [32, 12] that depend on the class, the classes [32], and a matrix [4, 12]."""
    generator = torch.Generator().manual_seed(0)
    targets = torch.arange(IMAGES) % CLASSES
    features = torch.rand(IMAGES, FILTERS, generator=generator)
    features[torch.arange(IMAGES), targets] += 1
    return features, targets, torch.rand(CLASSES, FILTERS, generator=generator)


def logits_of(features):
    return features[:, :CLASSES]


def places(features):
    """Places of 12 filters [32, 12, 2] and of 3 parts [32, 3, 2]."""
    spots = features[:, :, None].expand(-1, -1, 2)
    return spots, spots[:, :3]


def numbers_of(judged):
    return {name: (one.score, one.chance) for name, one in judged.items()}


OF_RESPONSES = {
    "ablate_linear": lambda f, t, m: metrics.ablate_linear(f, t, m, None, metrics.owners(m)),
    "accuracy_interval": lambda f, t, m: metrics.accuracy_interval(logits_of(f), t),
    "accuracy_per_class": lambda f, t, m: metrics.accuracy_per_class(logits_of(f), t, CLASSES),
    "activation_similarity": lambda f, t, m: metrics.activation_similarity(f),
    "chance_agreement": lambda f, t, m: metrics.chance_agreement(m, m.flip(1)),
    "class_correlation": lambda f, t, m: metrics.class_correlation(f, t),
    "class_independence": lambda f, t, m: metrics.class_independence(f, t),
    "class_rates": lambda f, t, m: metrics.class_rates(logits_of(f), t, CLASSES),
    "class_selectivity": lambda f, t, m: metrics.class_selectivity(f, t),
    "contrastiveness": lambda f, t, m: metrics.contrastiveness(f),
    "detection_errors": lambda f, t, m: metrics.detection_errors(f, f + 1),
    "judge_filters": lambda f, t, m: numbers_of(judging.judge_filters(f, t)),
    "gate_counts": lambda f, t, m: metrics.gate_counts(m),
    "half_sample_interval": lambda f, t, m: metrics.half_sample_interval(lambda rows: f[rows].mean(), t, resamples=3),
    "mono_score": lambda f, t, m: metrics.mono_score(f, f),
    "mutual_information": lambda f, t, m: metrics.mutual_information(f, t),
    "mutual_information_bound": lambda f, t, m: metrics.mutual_information_bound(t),
    "mutual_information_per_class": lambda f, t, m: metrics.mutual_information_per_class(m),
    "mutual_information_per_filter": lambda f, t, m: metrics.mutual_information_per_filter(m),
    "mutual_information_score_interval": lambda f, t, m: metrics.mutual_information_score_interval(f, t, resamples=3),
    "noise_floor": lambda f, t, m: metrics.noise_floor(lambda labels: f[labels == 0].mean(), t),
    "owner_agreement": lambda f, t, m: metrics.owner_agreement(m, m),
    "owner_purity": lambda f, t, m: metrics.owner_purity(f, t, metrics.owners(m)),
    "part_consistency": lambda f, t, m: judging.part_consistency(*places(f), t, metrics.owners(m), half_side=0.2).score,
    "path_disagreement": lambda f, t, m: metrics.path_disagreement(f, f.flip(1)),
    "purity": lambda f, t, m: metrics.purity(f, t),
    "relearning": lambda f, t, m: metrics.relearning(f, t, metrics.owners(m), (f, t)),
    "spatial_diversity": lambda f, t, m: metrics.spatial_diversity(f.view(IMAGES, 3, 2, 2)),
    "threshold_detection": lambda f, t, m: metrics.threshold_detection(f[:, 0], f[:, 1]),
    "to_dataframe": lambda f, t, m: metrics.to_dataframe(metrics.mutual_information_per_class(m)),
    "top_filters": lambda f, t, m: metrics.top_filters(m, 2),
    "verdict": lambda f, t, m: metrics.verdict(metrics.owned_filters(m).float(), f, t, accuracy=0.5, removal=None),
    "weight_similarity": lambda f, t, m: metrics.weight_similarity(f),
    "whole_image": lambda f, t, m: metrics.whole_image(torch.tensor([[0.0, 0, 9, 9]] * 2, device="cpu"), t[:2], (9, 9)),
}


def tensors_in(value):
    """All tensors of a result, however it is nested."""
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, dict):
        for one in value.values():
            yield from tensors_in(one)
    elif isinstance(value, (list, tuple)):
        for one in value:
            yield from tensors_in(one)
    elif hasattr(value, "__dict__"):
        yield from tensors_in(vars(value))


def same(found, expected):
    """Whether every tensor of a result is on the CPU and equals that of another result."""
    pairs = list(zip(tensors_in(found), tensors_in(expected), strict=True))
    for one, other in pairs:
        assert one.device.type == "cpu"
        torch.testing.assert_close(one, other, equal_nan=True)
    return pairs


@pytest.mark.parametrize("name", OF_RESPONSES)
def test_metrics_stay_on_the_cpu(on_meta, name):
    given = responses()
    expected = OF_RESPONSES[name](*given)
    on_meta()
    found = OF_RESPONSES[name](*given)
    assert same(found, expected) or repr(found) == repr(expected)


WITHOUT_GRIDS = [name for name in judging.JUDGES if not name.startswith("grid")]
BOXES = [[4.0, 4.0, 40.0, 48.0]] * 12


def boxes():
    return torch.tensor(BOXES, device="cpu")


OF_MODELS = {
    "ablate": lambda model, x, y: measuring.ablate(model, [(x, y)], torch.arange(96, device="cpu") % CLASSES, CLASSES),
    "activmap": lambda model, x, y: measuring.activmap(model, [(x, y)], boxes()),
    "assign_filters": lambda model, x, y: timm_csg.assign_filters(model, [(x, y)]),
    "cam_localisation": lambda model, x, y: measuring.cam_localisation(model, [(x, y)], boxes()),
    "class_filters": lambda model, x, y: explain.class_filters(model, x, y),
    "collect": lambda model, x, y: measuring.collect(model, [(x, y)]),
    "collect_peaks": lambda model, x, y: measuring.collect_peaks(model, [(x, y)]),
    "contrast": lambda model, x, y: explain.contrast(model, x[:1], 0, 1),
    "effective_diameter": lambda model, x, y: measuring.effective_diameter(model, x),
    "evidence_map": lambda model, x, y: explain.evidence_map(model, x),
    "explain_prediction": lambda model, x, y: explain.explain_prediction(model, x),
    "factor_maps": lambda model, x, y: explain.factor_maps(model, x, 2),
    "fgsm": lambda model, x, y: measuring.fgsm(model, x, y, eps=0.1),
    "gradmap": lambda model, x, y: measuring.gradmap(model, [(x, y)], boxes()),
    "guided_evidence_map": lambda model, x, y: explain.guided_evidence_map(model, x),
    "guided_grad_cam": lambda model, x, y: explain.guided_grad_cam(model, x),
    "judge": lambda model, x, y: numbers_of(
        judging.judge(explain.grad_cam, model, x, y, judges=WITHOUT_GRIDS, objects=boxes())
    ),
    "make_grids": lambda model, x, y: judging.make_grids(torch.nn.functional.one_hot(y).float(), y),
    "measure": lambda model, x, y: measuring.measure(model, [(x, y)], explanations=2, filters=True).numbers,
    "owner_map": lambda model, x, y: explain.owner_map(model, x),
    "part_interpretability": lambda model, x, y: measuring.part_interpretability(model, [(x, y)], boxes()[:, None]),
    "pgd": lambda model, x, y: measuring.pgd(model, x, y, eps=0.1, steps=2),
    "receptive_field": lambda model, x, y: measuring.receptive_field(model, 64),
    "stage_weight": lambda model, x, y: measuring.stage_weight(model),
    "strongest_images": lambda model, x, y: explain.strongest_images(model, [x], [0, 1], top=2),
}


@pytest.fixture
def twelve_images():
    return torch.rand(12, 3, 64, 64, generator=torch.Generator().manual_seed(0)), torch.arange(12) % CLASSES


@pytest.mark.parametrize("name", OF_MODELS)
def test_models_on_the_cpu_are_measured_and_explained_there(make_model, twelve_images, on_meta, name):
    model = timm_csg.differentiate(make_model(num_classes=CLASSES)).eval()
    other = timm_csg.differentiate(make_model(num_classes=CLASSES)).eval()
    expected = OF_MODELS[name](model, *twelve_images)
    on_meta()
    found = OF_MODELS[name](other, *twelve_images)
    assert same(found, expected) or repr(found) == repr(expected)


def test_a_report_is_written(make_model, twelve_images, on_meta, tmp_path):
    model = timm_csg.differentiate(make_model(num_classes=CLASSES)).eval()
    on_meta()
    plots.report(model, [twelve_images], tmp_path / "report.html")
    assert (tmp_path / "report.html").stat().st_size > 10_000
