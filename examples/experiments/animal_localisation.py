"""Where do the filters look? Location instability and localisation of checkpoints on pictures with boxes of parts.

python examples/experiments/animal_localisation.py runs/standard --images test.tar --annotations annotations.csv
"""

import argparse
import json
import sys
from pathlib import Path

import timm
import torch
from timm.data import create_dataset, create_transform

import timm_csg
from timm_csg import measuring, metrics


def load(folder):
    """A plain timm checkpoint or one of ours."""
    if (Path(folder) / "mechanism" / "timm_csg.safetensors").exists():
        return timm_csg.from_pretrained(folder)
    return timm.create_model(f"local-dir:{folder}", pretrained=True)


def first_of_each_folder(files, number):
    """Indices of the first pictures of every class, for GradMap: one backward pass for each picture and filter."""
    folders = [Path(name).parent for name in files]
    return [index for index, folder in enumerate(folders) if folders[:index].count(folder) < number]


def measure(folder, arguments):
    """All numbers of one checkpoint, totals and per class."""
    model = load(folder).eval()
    dataset = create_dataset("", root=arguments.images)
    size = (3, arguments.size, arguments.size)
    config = {key: model.pretrained_cfg[key] for key in ("mean", "std", "interpolation")}
    dataset.transform = create_transform(size, crop_mode="squash", crop_pct=1.0, **config)
    marks = measuring.read_annotations(arguments.annotations).select(dataset.filenames()).to_input(dataset.transform)
    loader = torch.utils.data.DataLoader(dataset, batch_size=50)
    few = first_of_each_folder(dataset.filenames(), arguments.gradmap_images)
    few_loader = torch.utils.data.DataLoader(torch.utils.data.Subset(dataset, few), batch_size=20)
    peaks, objects = measuring.collect_peaks(model, loader), marks.object_boxes()
    instability = metrics.location_instability(peaks, marks.points)
    firing = metrics.location_instability(peaks, marks.points, drop_silent=True)
    middle = torch.full((len(peaks.targets), 1, 2), arguments.size / 2)  # a filter that always "fires" in the middle
    fixed = peaks._replace(strength=torch.ones(len(middle), 1), place=middle)
    found = {
        "whole_image": metrics.whole_image(objects, peaks.targets, size[1:]),
        "cam": measuring.cam_localisation(model, loader, objects),
        "activmap": measuring.activmap(model, loader, objects),
        "activmap, positive": measuring.activmap(model, loader, objects, positive_only=True),
        "gradmap": measuring.gradmap(model, few_loader, objects[few]),
    }
    result = {name: {key: getattr(values, key) for key in values._fields} for name, values in found.items()}
    result["instability"] = {
        "per_class": instability.per_class,
        "one_class": float(instability.per_class.nanmean()),
        "multi_class": instability.multi_class,
        "silent": instability.silent,
        "one_class_firing": float(firing.per_class.nanmean()),
        "multi_class_firing": firing.multi_class,
        "one_class_fixed_place": float(metrics.location_instability(fixed, marks.points).per_class.nanmean()),
    }
    return result


def main(argv=None):
    """Measure every checkpoint and write one JSON file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checkpoints", nargs="+")
    parser.add_argument("--images", required=True, help="folder or tar with a folder for each class")
    parser.add_argument("--annotations", required=True, help="see docs/annotations.md")
    parser.add_argument("--size", type=int, default=160)
    parser.add_argument("--gradmap-images", type=int, default=4, help="of each class")
    parser.add_argument("--output", default="localisation.json")
    arguments = parser.parse_args(argv)
    results = {folder: measure(folder, arguments) for folder in arguments.checkpoints}
    text = json.dumps(results, default=torch.Tensor.tolist, indent=1)
    Path(arguments.output).write_text(text, encoding="utf-8")
    sys.stdout.write(text + "\n")


if __name__ == "__main__":
    main()
