"""Part filters on animal pictures: an ordinary fine-tuned network against ICNN, one budget.

python examples/experiments/animal_parts.py --data animalparts --weights local-dir:mobilenetv2 --output runs/icnn

Only the last stage is trained. What the frozen layers make of ten random crops of a picture is kept in --cache.
For measuring, whole pictures are resized to 160x160, so that no landmark is lost. The seed draws nine tenths of the
training pictures, the classifier's first weights, and the order. The recipe "both" has part filters and assigned ones
on one network.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import timm
import torch
from animal_features import frozen_features
from animal_measures import evaluate
from animal_pictures import SIZE, nine_tenths, one_against_others
from animal_training import behind_frozen_layers, train_last_stage
from frozen_animals import Animals
from owner_numbers import measure

import timm_csg
from timm_csg import checkpoint
from timm_csg.measuring.fields import receptive_field
from timm_csg.recipes import RECIPES


def main(arguments: list[str] | None = None) -> dict:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="folder of train.tar, test.tar and annotations.csv")
    parser.add_argument("--weights", default="mobilenetv2_100", help="a timm MobileNetV2 or EfficientNet-Lite")
    parser.add_argument("--recipe", default="icnn", choices=["standard", "both", *RECIPES])
    parser.add_argument("--option", type=json.loads, default={}, help="JSON: options over the recipe's (both: icnn's)")
    parser.add_argument("--mechanism-rate", type=float, help="learning rate of the mechanism's own weights, if any")
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--cache", type=Path, default=Path("animal_features.pt"), help="another one with --objects")
    parser.add_argument("--objects", action="store_true", help="cut the main object out of every picture")
    parser.add_argument("--one-class", metavar="NAME", help="a net for this class against the others, as the paper has")
    parser.add_argument("--validate", action="store_true", help="hold out 18 training pictures a class, test on these")
    parser.add_argument("--owners", action="store_true", help="measure as well whether filters know their class")
    parser.add_argument("--output", type=Path, required=True)
    args = parser.parse_args(arguments)
    torch.manual_seed(args.seed)
    model = timm.create_model(args.weights, pretrained=":" in args.weights, output_stride=16)
    model.pretrained_cfg.update(input_size=(3, SIZE, SIZE), crop_pct=1.0, crop_mode="squash")  # for who loads it later
    field = receptive_field(model, SIZE)
    train, test = frozen_features(model, args.data, args.cache, objects=args.objects, validate=args.validate)
    train = train.select(nine_tenths(train.targets, args.seed))
    if args.one_class:
        train, test = one_against_others(train, args.one_class), one_against_others(test, args.one_class)
    model.reset_classifier(int(train.targets.max()) + 1)
    torch.nn.init.normal_(model.classifier.weight, std=0.01)
    recipe = RECIPES.get("icnn" if args.recipe == "both" else args.recipe)
    if recipe:
        config = type(recipe.mechanism).from_dict(recipe.mechanism.to_dict() | args.option)
        both = [config, RECIPES["assigned"].mechanism]
        model = timm_csg.differentiate(model, mechanism=both if args.recipe == "both" else config)
    model = model.to(memory_format=torch.channels_last)
    with behind_frozen_layers(model):
        how = {"epochs": args.epochs, "batch_size": args.batch_size, "mechanism_rate": args.mechanism_rate}
        train_last_stage(model, train, recipe, **how)
        found = evaluate(model, test, args.data / "annotations.csv", field, one_class=bool(args.one_class))
        if args.owners:
            classes = sorted({name.split("/")[0] for name in train.names})
            animals = Animals(train.whole, train.crops, train.targets, test.whole, test.targets, test.names, classes)
            found |= measure(model, animals, model.mechanism.class_filter_matrix() if recipe else None)
    result = {"recipe": args.recipe, "data": "ILSVRC DET animal parts", "seed": args.seed, "epochs": args.epochs}
    options = args.option | ({} if args.mechanism_rate is None else {"mechanism_rate": args.mechanism_rate})
    result |= {"options": json.dumps(options), "one_class": args.one_class or "", **found}
    if recipe:
        timm_csg.save_pretrained(model, args.output, metrics=result)
    else:
        checkpoint.save_plain(model, args.output)
    (args.output / "metrics.json").write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result))
    return result


if __name__ == "__main__":
    main()
