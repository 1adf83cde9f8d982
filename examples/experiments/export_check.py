"""Does an exported ONNX file say what the model says, and what does the map cost? A table over architectures.

python examples/experiments/export_check.py --output runs/export.json

Weights are random: rounding depends on the architecture, not on what it has learned. Differences are the largest one of
all values, divided by the largest value of the output, on three random images. Beside them stands the model's own
rounding, its difference from the same model in float64, measured in the same way.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path

import numpy as np
import onnxruntime
import timm
import torch
from torch import Tensor

import timm_csg
from timm_csg import explain, metrics

NAMES = (
    "resnet18", "densenet121", "efficientnet_b0", "mobilenetv2_100", "regnetx_002", "dla34", "rexnet_100", "xception41",
    "ese_vovnet19b_dw", "dpn68b", "hrnet_w18_small", "repvgg_a0", "nf_regnet_b0", "inception_v4", "mobilevit_xxs",
    "fastvit_t8", "pvt_v2_b0", "nest_tiny", "coatnet_pico_rw_224", "swin_tiny_patch4_window7_224", "mixer_s16_224",
    "twins_pcpvt_small", "vit_tiny_patch16_224:avg", "vit_tiny_patch16_224", "convnext_atto",
)  # fmt: skip
EXPLAINED = ("logits", "evidence", "map")


def make(name: str, mechanism: str = "assigned") -> torch.nn.Module:
    """A model of 10 classes with random weights and owners, its classifier masked; ``:avg`` pools the patches."""
    torch.manual_seed(0)
    architecture, _, pooling = name.partition(":")
    options = {"global_pool": pooling, "fc_norm": False} if pooling else {}
    model = timm.create_model(architecture, num_classes=10, **options).eval()
    classifier = model.get_classifier()
    torch.nn.init.normal_(getattr(classifier, "fc", classifier).weight, std=0.02)  # some start at 0
    timm_csg.differentiate(model, mechanism=mechanism)
    if mechanism == "icnn":
        model.mechanism.category.copy_(torch.arange(model.num_features) % 10)
        model.mechanism.batches.fill_(1)
    elif mechanism == "csg":
        torch.nn.init.uniform_(model.mechanism.gate)
    model.project_()
    return model


@torch.no_grad()
def expected(model: torch.nn.Module, images: Tensor, outputs: tuple[str, ...]) -> dict[str, Tensor]:
    """What the file should say, from timm's own functions and the gradients of ``explain``, in float64."""
    features = model.forward_features(images)
    if model.mechanism.acts_without_targets:
        features = model.mechanism(features)
    found = {"logits": model(images)}
    if "evidence" in outputs:
        own = metrics.owned_filters(model.mechanism.class_filter_matrix())
        pooled = timm_csg.undifferentiate(model).forward_head(features, pre_logits=True)
        classifier = model.get_classifier()
        found["evidence"] = pooled @ (getattr(classifier, "fc", classifier).weight.flatten(1) * own).T
    return {name: value.double() for name, value in found.items()}


def compare(name: str, mechanism: str = "assigned", folder: str | Path = ".") -> dict:
    """Export one architecture, run the file on three images, and compare with torch in float32 and float64."""
    model = make(name, mechanism)
    size = timm.data.resolve_data_config({}, pretrained_cfg=model.pretrained_cfg)["input_size"]
    images = torch.randn(3, *size, generator=torch.Generator().manual_seed(1))
    path = Path(folder) / f"{name.replace(':', '_')}.onnx"
    start = time.perf_counter()
    exported = timm_csg.export_onnx(model, path)
    row = {"name": name, "seconds": time.perf_counter() - start, "megabytes": path.stat().st_size / 1e6}
    found = dict(zip(exported.outputs, session(path).run(None, {"images": images.numpy()}), strict=True))
    answers = {}
    for kind in (torch.float32, torch.float64):
        again = make(name, mechanism)
        again.load_state_dict(model.state_dict())
        again.to(kind)
        predicted = torch.from_numpy(found["logits"]).argmax(dim=1)
        maps = {"map": explain.owner_map(again, images.to(kind), predicted)} if "map" in found else {}
        answers[kind] = maps | expected(again, images.to(kind), exported.outputs)
    for output in EXPLAINED:
        if output in found:
            single, double = (answers[kind][output].double().numpy() for kind in (torch.float32, torch.float64))
            row[output] = np.abs(found[output] - single).max() / np.abs(double).max()
            row[f"{output}_noise"] = np.abs(single - double).max() / np.abs(double).max()
    return row | {"missing": exported.missing}


def session(path: Path, threads: int = 2) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = threads, 3
    return onnxruntime.InferenceSession(path, options)


def latency(name: str, folder: str | Path, repeats: int) -> float:
    """Time of one image in the file with evidence and map over that in the file of logits, each its fastest."""
    model, times = make(name), {}
    paths = {outputs: Path(folder) / f"{len(outputs)}.onnx" for outputs in (EXPLAINED, EXPLAINED[:1])}
    for outputs, path in paths.items():
        timm_csg.export_onnx(model, path, outputs=outputs)
    sessions = {outputs: session(path) for outputs, path in paths.items()}
    images = np.zeros([1, *sessions[EXPLAINED].get_inputs()[0].shape[1:]], dtype=np.float32)
    for turn in range(repeats + 5):
        for outputs, file in sessions.items():
            start = time.perf_counter()
            file.run(None, {"images": images})
            if turn >= 5:
                times.setdefault(outputs, []).append(time.perf_counter() - start)
    return min(times[EXPLAINED]) / min(times[EXPLAINED[:1]])


def main(arguments: list[str] | None = None) -> list[dict]:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", default=NAMES)
    parser.add_argument("--mechanism", default="assigned", choices=["assigned", "csg", "icnn"])
    parser.add_argument("--repeats", type=int, default=100, help="timed runs of each file; 0: none")
    parser.add_argument("--output", type=Path, help="JSON file for the numbers")
    args = parser.parse_args(arguments)
    rows = []
    print("| architecture | logits | evidence | map | own rounding | MB | time with map |\n" + "|---" * 7 + "|")
    for name in args.models:
        with tempfile.TemporaryDirectory() as folder:
            row = compare(name, args.mechanism, folder)
            if args.repeats and "map" in row:
                row["latency"] = latency(name, folder, args.repeats)
        rows.append(row)
        cells = [f"{row[output]:.1e}" if output in row else "–" for output in EXPLAINED]
        cells.append(f"{max(value for key, value in row.items() if key.endswith('_noise')):.1e}")
        cells += [f"{row['megabytes']:.1f}", f"{row['latency']:.3f} ×" if "latency" in row else "–"]
        print(f"| {name} | {' | '.join(cells)} |", flush=True)
    if args.output:
        args.output.parent.mkdir(parents=True, exist_ok=True)
        args.output.write_text(json.dumps(rows, indent=2, default=float))
    return rows


if __name__ == "__main__":
    main()
