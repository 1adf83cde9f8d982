"""Do the filters that a contrast names decide between two classes? They are removed, and the answers counted.

python examples/experiments/contrast_check.py --data animalparts --weights local-dir:mobilenetv2 --cache frozen.pt

The network of fine_tuning.py, with assigned filters or without, on the animals. For each of the most confused pairs, of
all test pictures that are answered with one of the two classes: the deciding filters of the picture are set to 0 in the
last stage; does the answer turn? Beside it, as many random filters of the class that was answered, and as many of all.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from fine_tuning import fine_tuned, parse
from frozen_animals import choose, frozen_features
from torch import Tensor, nn

import timm_csg
from timm_csg import explain, measuring, metrics

PAIRS, DRAWS = 20, 10


def confused_pairs(logits: Tensor, targets: Tensor, count: int = PAIRS) -> list[tuple[int, int]]:
    """Pairs of classes that are most often taken for each other, then those whose logits are closest."""
    classes = logits.shape[1]
    wrong = torch.zeros(classes, classes)
    wrong.index_put_((targets, logits.argmax(dim=1)), torch.ones(len(targets)), accumulate=True)
    doubt = torch.zeros(classes, classes).index_add_(0, targets, logits.softmax(dim=1))  # decides between equal counts
    both = (wrong + wrong.T + 1e-3 * (doubt + doubt.T)).triu(diagonal=1)
    best = both.flatten().topk(count).indices
    return [(int(index) // classes, int(index) % classes) for index in best]


@torch.no_grad()
def answers_without(model: nn.Module, images: Tensor, removed: Tensor) -> Tensor:
    """What the model answers when filters [images, filters] of the last stage are silent."""
    features = model.forward_features(images)
    return model.forward_head(features * (~removed)[:, :, None, None]).argmax(dim=1)


def random_like(removed: Tensor, allowed: Tensor, generator: torch.Generator) -> Tensor:
    """As many of the allowed filters of each image [images, filters], drawn at random; all if there are fewer."""
    chance = torch.rand(removed.shape, generator=generator).masked_fill(~allowed, -1.0)
    rank = chance.argsort(dim=1, descending=True).argsort(dim=1)
    return (rank < removed.sum(dim=1, keepdim=True)) & allowed


@torch.no_grad()
def owners_of(model: nn.Module, features: Tensor, targets: Tensor) -> Tensor:
    """Which filters each class owns; of a plain model by mutual information."""
    if timm_csg.is_differentiated(model):
        return metrics.owned_filters(model.mechanism.class_filter_matrix())
    return metrics.owned_filters(metrics.mutual_information(features, targets, model.num_classes))


def check(model: nn.Module, images: Tensor, pairs: list[tuple[int, int]], owned: Tensor, *, close: bool) -> dict:
    """Shares of pictures whose answer turns, of all pairs; ``close``: where the other class comes second."""
    generator, tally = torch.Generator().manual_seed(0), {}
    with torch.no_grad():
        answer, second = model(images).topk(2, dim=1).indices.unbind(dim=1)
    for one, other in pairs:
        is_first, is_second = ((best == one) | (best == other) for best in (answer, second))
        rows = (is_first & is_second if close else is_first).nonzero()[:, 0]
        if not len(rows):
            continue
        found = explain.contrast(model, images[rows], one, other, upsample=False)
        own = owned[answer[rows]]
        top = torch.zeros_like(found.deciding).scatter(1, found.filters, True) & found.deciding
        sets = {"deciding": [found.deciding], "top5": [top]}
        sets["random own"] = [random_like(found.deciding, own, generator) for _ in range(DRAWS)]
        sets["random"] = [random_like(found.deciding, torch.ones_like(own), generator) for _ in range(DRAWS)]
        rival = torch.where(answer[rows] == one, other, one)
        for name, removals in sets.items():
            for removed in removals:
                new = answers_without(model, images[rows], removed)
                tally.setdefault(f"{name}: another answer", []).append(new != answer[rows])
                tally.setdefault(f"{name}: the other of the two", []).append(new == rival)
        tally.setdefault("filters that decide", []).append(found.deciding.sum(dim=1))
        tally.setdefault("of them own", []).append((found.deciding & own).sum(dim=1) / found.deciding.sum(dim=1))
    result = {name: float(torch.cat(values).float().mean()) for name, values in tally.items()}
    counts = torch.cat(tally["filters that decide"]).float()
    return result | {"median filters that decide": float(counts.median()), "pictures": len(counts)}


def main(arguments: list[str] | None = None) -> list[dict]:
    args, results = parse(arguments), []
    made = frozen_features(args.weights, args.data, args.size, args.cache)
    animals = choose(made)
    images, targets = (torch.cat(parts) for parts in zip(*animals.measured(), strict=True))
    for seed in args.seed:
        model, _ = fine_tuned(animals, args, args.rate[0], seed)
        seen = measuring.collect(model, animals.measured())
        pairs = confused_pairs(seen.logits, targets)
        owned = owners_of(model, seen.features, targets)
        found = {"method": args.method, "seed": seed, "accuracy": metrics.accuracy(seen.logits, targets)}
        for close in (False, True):
            results.append(found | {"close": close} | check(model, images, pairs, owned, close=close))
            print(json.dumps(results[-1]), flush=True)
        print("pairs:", ", ".join(f"{animals.classes[one]}/{animals.classes[other]}" for one, other in pairs))
        if args.output:
            args.output.parent.mkdir(parents=True, exist_ok=True)
            with Path(args.output).open("a") as file:
                file.writelines(json.dumps(result) + "\n" for result in results[-2:])
    return results


if __name__ == "__main__":
    main()
