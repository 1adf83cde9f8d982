"""Time per image and largest difference against captum and pytorch-grad-cam, in one run; the goal: not slower.

Run: pytest tests/benchmarks/test_explain.py --benchmark-only --benchmark-columns=median -s

The packages take turns, so that a drifting machine slows all alike; a ratio is the median over rounds. Both are given a
batch where they can take one; pytorch-grad-cam's guided backprop takes one image at a time.
"""

import copy
import statistics
import time
import warnings

import pytest
import timm
import torch

from timm_csg import explain

captum = pytest.importorskip("captum.attr", reason="captum is not installed: pip install -e '.[compare]'")
pytorch_grad_cam = pytest.importorskip("pytorch_grad_cam", reason="grad-cam is not installed: see the extra 'compare'")
LAYERS = {"resnet18": "layer4", "densenet121": "features", "convnext_atto": "stages"}
BATCH, SIZE, ROUNDS = 4, 128, 7


def candidates(model, layer, images, targets):
    """Method → ours, and theirs by package."""
    classes = [pytorch_grad_cam.utils.model_targets.ClassifierOutputTarget(int(target)) for target in targets]
    theirs = pytorch_grad_cam.GuidedBackpropReLUModel(copy.deepcopy(model))

    def rescaled_grad_cam():
        with pytorch_grad_cam.GradCAM(model=model, target_layers=[layer]) as method:
            return torch.from_numpy(method(input_tensor=images, targets=classes))

    def guided_one_by_one():
        pairs = zip(images.split(1), targets.tolist(), strict=True)
        return torch.stack([torch.from_numpy(theirs(image.clone(), target).copy()) for image, target in pairs])

    def rescaled(maps):
        maps = maps - maps.amin(dim=(1, 2), keepdim=True)
        return maps / (maps.amax(dim=(1, 2), keepdim=True) + 1e-7)

    def by_captum(method, *args, **options):
        return lambda: getattr(captum, method)(model, *args).attribute(images, targets, **options)

    yield (
        "gradient",
        lambda: explain.gradient(model, images, targets),
        {"captum": by_captum("Saliency", abs=False)},
    )
    yield (
        "grad_cam",
        lambda: explain.grad_cam(model, images, targets, upsample=False)[:, None],
        {"captum": by_captum("LayerGradCam", layer, relu_attributions=True)},
    )
    yield (
        "grad_cam, upsampled and rescaled",
        lambda: rescaled(explain.grad_cam(model, images, targets)),
        {"pytorch-grad-cam": rescaled_grad_cam},
    )
    if not {"ReLU"} <= set(explain.activation_counts(model, images)):
        return
    yield (
        "deconvnet",
        lambda: explain.deconvnet(model, images, targets),
        {"captum": by_captum("Deconvolution")},
    )
    yield (
        "guided_backprop",
        lambda: explain.guided_backprop(model, images, targets),
        {"captum": by_captum("GuidedBackprop"), "pytorch-grad-cam": lambda: guided_one_by_one().permute(0, 3, 1, 2)},
    )
    yield (
        "guided_grad_cam",
        lambda: explain.guided_grad_cam(model, images, targets),
        {"captum": by_captum("GuidedGradCam", layer, interpolate_mode="bilinear")},
    )


def timed(run):
    start = time.perf_counter()
    result = run()
    return time.perf_counter() - start, result


@pytest.mark.parametrize("name", LAYERS)
def test_not_slower_than_captum_and_pytorch_grad_cam(benchmark, make_model, name):
    model, layer_name = make_model(name, num_classes=10), LAYERS[name]
    images = torch.randn(BATCH, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(0))
    targets = explain.class_filters(model, images).targets
    print(f"\n{name}, {BATCH} images of {SIZE}x{SIZE}, {torch.get_num_threads()} thread(s), timm {timm.__version__}")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for method, ours, others in candidates(model, model.get_submodule(layer_name), images, targets):
            for package, theirs in others.items():
                times, ratios = [], []
                for index in range(ROUNDS + 1):
                    pair = {run: timed(run) for run in ((ours, theirs) if index % 2 else (theirs, ours))}
                    times.append(pair[ours][0] / BATCH * 1e3)
                    ratios.append(pair[ours][0] / pair[theirs][0])
                found, expected = pair[ours][1], pair[theirs][1].detach()
                difference = float((found - expected).abs().max() / expected.abs().max())
                ratio, median = statistics.median(ratios[1:]), statistics.median(times[1:])
                print(f"| {name} | {method} | {package} | {difference:.1e} | {median:.1f} ms | {ratio:.2f} |")
                benchmark.extra_info[f"{method} / {package}"] = {"difference": difference, "time_ratio": ratio}
    benchmark.pedantic(explain.grad_cam, (model, images, targets), rounds=2)
