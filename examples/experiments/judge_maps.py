"""Every explanation map of the package and the best of three others, under every judge.

python examples/experiments/judge_maps.py --set animals --data animalparts --weights local-dir:mobilenetv2 \
    --cache mobilenetv2.pt --output judged.jsonl
python examples/experiments/judge_maps.py --set cifar10 --data cifar10.npz --weights resnet20/model.safetensors \
    --checkpoint examples/cifar10_resnet20_assigned --output judged.jsonl

One line of JSON for each map is added to --output; judge_maps_table.py makes the tables.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import timm
import torch
from animal_pictures import read_pictures
from fine_tuning import fine_tuned
from fine_tuning import parse as fine_tuning_options
from frozen_animals import choose, frozen_features, load_network
from frozen_once import FrozenOnce
from map_makers import makers_for
from safetensors.torch import load_file
from torch import Tensor, nn
from torchvision.transforms import v2

sys.path.insert(0, str(Path(__file__).parents[1]))

from cifar_resnet20 import Batches, load_cifar  # importing it registers resnet20_cifar

import timm_csg
from timm_csg import judging, measuring

SIDES = {"grid_2x2": 2, "grid_3x3": 3}
RATES = {"standard": (1e-3, 2e-3), "assigned": (1e-3, None)}  # of the stage and the head, as in docs/results.md


def cifar10(args: argparse.Namespace) -> tuple[nn.Module, Tensor, Tensor, None]:
    """ResNet20, and the first test pictures."""
    if args.model == "assigned":
        model = timm_csg.from_pretrained(args.checkpoint)
    else:
        model = timm.create_model("resnet20_cifar")
        model.load_state_dict(load_file(args.weights))
    model.conv1 = FrozenOnce(model.conv1, model.bn1, model.act1, model.layer1, model.layer2)
    model.bn1 = model.act1 = model.layer1 = model.layer2 = nn.Identity()
    images, targets = (part[: args.images] for part in load_cifar(args.data, "test"))
    ((images, targets),) = Batches(images, targets, len(images), is_training=False)
    return model.eval(), images, targets, None


def animals(args: argparse.Namespace) -> tuple[nn.Module, Tensor, Tensor, Tensor]:
    """MobileNetV2 with a last stage fine-tuned here, test pictures evenly over the classes, and boxes."""
    rate, head_rate = RATES[args.model]
    options = ["--data", args.data, "--weights", args.weights, "--cache", args.cache, "--method", args.model]
    options += ["--head-rate", str(head_rate)] if head_rate else []
    made = frozen_features(args.weights, Path(args.data), 160, Path(args.cache))
    trained, _ = fine_tuned(choose(made), fine_tuning_options(options), rate, args.seed)
    whole = load_network(args.weights, len(made["classes"])).eval()
    trained.conv_stem = FrozenOnce(whole.conv_stem, whole.bn1, *whole.blocks[:-1])
    pictures, names = read_pictures(Path(args.data) / "test.tar")
    rows = torch.linspace(0, len(names) - 1, args.images).round().long().tolist()
    resize = v2.Resize((160, 160), interpolation=v2.InterpolationMode.BICUBIC, antialias=True)
    mean, std = (torch.tensor(trained.pretrained_cfg[key])[:, None, None] for key in ("mean", "std"))
    images = torch.stack([(resize(pictures[row]).float() / 255 - mean) / std for row in rows])
    sizes = torch.tensor([pictures[row].shape[:0:-1] for row in rows])
    marks = measuring.read_annotations(Path(args.data) / "annotations.csv").select(names)
    boxes = (marks.object_boxes()[rows].unflatten(1, (2, 2)) * (160 / sizes[:, None])).flatten(1).clamp(0, 160)
    return trained.eval(), images, made["test_y"][rows], boxes


@torch.no_grad()
def grids_once(args: argparse.Namespace, model: nn.Module, images: Tensor, targets: Tensor) -> dict[str, dict]:
    """Options of the judges with grids: the same grids for all maps, of pictures that the network looked at once."""
    wanted = {name: side for name, side in SIDES.items() if name in (args.judges or SIDES)}
    if not wanted:
        return {}
    chances = torch.cat([model(batch).softmax(dim=1).cpu() for batch in images.split(32)])
    made = {
        name: judging.make_grids(chances, targets, side=side, grids=args.grids, seed=args.seed)
        for name, side in wanted.items()
    }
    return {name: {"grids": judging.Grids(*(part[:: args.every] for part in one))} for name, one in made.items()}


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--set", choices=["cifar10", "animals"], required=True)
    parser.add_argument("--data", required=True, help="cifar10.npz, or the folder of train.tar and test.tar")
    parser.add_argument("--weights", required=True, help="of the standard ResNet20, or of the pretrained MobileNetV2")
    parser.add_argument("--checkpoint", help="the fine-tuned ResNet20")
    parser.add_argument("--cache", help="file of the animals' frozen features")
    parser.add_argument("--model", choices=["standard", "assigned"], default="assigned")
    parser.add_argument("--maps", nargs="+", help="only these")
    parser.add_argument("--judges", nargs="+", choices=judging.JUDGES)
    parser.add_argument("--images", type=int, default=200)
    parser.add_argument("--grids", type=int, default=250, help="at most; every picture is used once")
    parser.add_argument("--every", type=int, default=1, help="use only one in so many of these grids, for slow maps")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, required=True, help="file of JSON lines, added to")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> list[dict]:
    args, found = parse(arguments), []
    model, images, targets, objects = {"cifar10": cifar10, "animals": animals}[args.set](args)
    model.to("cuda" if torch.cuda.is_available() else "cpu", memory_format=torch.channels_last)
    images = images.contiguous(memory_format=torch.channels_last)
    options = grids_once(args, model, images, targets)
    for name, maker in makers_for(model, args.maps).items():
        judges = judging.judge(
            maker, model, images, targets, judges=args.judges, objects=objects, options=options, seed=args.seed
        )
        line = {"set": args.set, "model": args.model, "seed": args.seed, "map": name, "images": len(images)}
        for judge, answer in judges.items():
            numbers = {"score": answer.score, "chance": answer.chance, "error": answer.standard_error}
            line[judge] = numbers | {"seconds": answer.seconds, "values": len(answer.values)}
        found.append(line)
        print(name, {judge: round(answer.score, 3) for judge, answer in judges.items()}, flush=True)
        with args.output.open("a") as file:
            file.write(json.dumps(line) + "\n")
    return found


if __name__ == "__main__":
    main()
