"""Slow oracles of the judges of maps: one picture, one pixel and one step at a time, as the papers describe them."""

import math
from itertools import pairwise

import numpy as np
import torch
from scipy.ndimage import gaussian_filter
from scipy.stats import spearmanr


def grid_share(maps, side):
    """Share of each map's positive sum in its own cell; map i belongs to cell i modulo side²."""
    shares = []
    for number, one in enumerate(maps.tolist()):
        height, width = len(one) // side, len(one[0]) // side
        cell = number % side**2
        inside = total = 0.0
        for row, line in enumerate(one):
            for column, value in enumerate(line):
                total += max(value, 0.0)
                if (row // height) * side + column // width == cell:
                    inside += max(value, 0.0)
        shares.append(inside / total if total > 0 else 0.0)
    return shares


def grids(chances, targets, side, confidence):
    """Rows that may stand in a grid, by class, the most confident first."""
    result = {}
    for row, (chance, target) in enumerate(zip(chances.tolist(), targets.tolist(), strict=True)):
        if chance.index(max(chance)) == target and chance[target] >= confidence:
            result.setdefault(target, []).append((-chance[target], row))
    return {target: [row for _, row in sorted(rows)] for target, rows in result.items()}


def curve(model, image, target, one_map, game, steps):
    """Probabilities while pixels of one image [channels, height, width] change; the map's values are all different."""
    blur = np.stack([gaussian_filter(channel, 5.0, radius=5, mode="reflect") for channel in image.double().numpy()])
    start, finish = image.clone(), torch.zeros_like(image)
    if game == "insertion":
        start, finish = torch.from_numpy(blur).float(), image.clone()
    order = sorted(range(one_map.numel()), key=lambda pixel: -float(one_map.flatten()[pixel]))
    found, done = [], 0
    for step in range(steps + 1):
        while done < round(step * len(order) / steps):
            row, column = divmod(order[done], one_map.shape[1])
            start[:, row, column] = finish[:, row, column]
            done += 1
        with torch.no_grad():
            logits = model(start[None])[0].tolist()
        powers = [math.exp(logit - max(logits)) for logit in logits]
        found.append(powers[target] / sum(powers))
    return found


def area(points):
    """Trapezoids under a curve over [0, 1]."""
    return sum((a + b) / 2 for a, b in pairwise(points)) / (len(points) - 1)


def inside(box, row, column):
    """Whether a pixel's centre lies in a box."""
    x0, y0, x1, y1 = box
    return x0 <= column + 0.5 < x1 and y0 <= row + 0.5 < y1


def pixels(one_map):
    """Row, column and value of every pixel."""
    for row, line in enumerate(one_map.tolist()):
        for column, value in enumerate(line):
            yield row, column, value


def pointing(one_map, box, tolerance):
    """Whether the largest value lies within so many pixels of the box's pixels, corners included."""
    best = max(pixels(one_map), key=lambda pixel: pixel[2])
    height, width = one_map.shape
    near = [
        (row, column)
        for row in range(height)
        for column in range(width)
        if inside(box, row, column) and abs(row - best[0]) <= tolerance and abs(column - best[1]) <= tolerance
    ]
    return float(bool(near))


def energy(one_map, box):
    positive = [(row, column, max(value, 0.0)) for row, column, value in pixels(one_map)]
    total = sum(value for *_, value in positive)
    return sum(value for row, column, value in positive if inside(box, row, column)) / total if total else 0.0


def plausibility(one_map, box):
    largest = max(value for *_, value in pixels(one_map))
    own = [max(value, 0.0) for row, column, value in pixels(one_map) if inside(box, row, column)]
    return max(own, default=0.0) / largest if largest > 0 else 0.0


def rank_correlation(first, second):
    return float(spearmanr(first.flatten().numpy(), second.flatten().numpy()).statistic)


def hits(places, points, half_side):
    """For every picture and filter the set of landmarks in the square."""
    return [
        [
            {
                part
                for part, (x, y) in enumerate(marks)
                if not math.isnan(x) and abs(x - place[0]) <= half_side and abs(y - place[1]) <= half_side
            }
            for place in row
        ]
        for row, marks in zip(places.tolist(), points.tolist(), strict=True)
    ]


def consistency(places, points, targets, owners, half_side, share):
    found, result = hits(places, points, half_side), []
    for kernel, owner in enumerate(owners.tolist()):
        rows = [row for row, target in enumerate(targets.tolist()) if target == owner]
        rates = []
        for part in range(points.shape[1]):
            seen = [row for row in rows if not math.isnan(float(points[row, part, 0]))]
            if seen:
                rates.append(sum(part in found[row][kernel] for row in seen) / len(seen))
        result.append(float(max(rates) >= share) if rates else math.nan)
    return result


def stability(places, noisy, points, targets, owners, half_side):
    before, after = hits(places, points, half_side), hits(noisy, points, half_side)
    result = []
    for kernel, owner in enumerate(owners.tolist()):
        rows = [row for row, target in enumerate(targets.tolist()) if target == owner]
        same = [before[row][kernel] == after[row][kernel] for row in rows]
        result.append(sum(same) / len(same) if same else math.nan)
    return result
