"""Slow oracles of the metrics that ask which object part a filter means: literal loops, one filter at a time."""

import math

import torch


def dependence(model, height, width):
    """Which image columns each map column depends on, bool [map columns, width]: a NaN in the column reaches it."""
    images = torch.randn(width, 3, height, width, generator=torch.Generator().manual_seed(0))
    images[torch.arange(width), :, :, torch.arange(width)] = torch.nan
    with torch.no_grad():
        maps = model.forward_features(images)
    if str(getattr(model, "output_fmt", "NCHW")) == "NHWC":
        maps = maps.permute(0, 3, 1, 2)
    return maps.isnan().any(dim=1).any(dim=1).T


def location_deviation(strength, place, marks, diagonal, top):
    """D of one filter and one landmark; one entry per image of the class: strength, (x, y), (x, y) or NaN."""
    chosen = [index for index in range(len(strength)) if not math.isnan(float(marks[index][0]))]
    chosen = sorted(chosen, key=lambda index: -float(strength[index]))[:top]
    if len(chosen) < 2:
        return math.nan
    distances = [math.dist(map(float, place[index]), map(float, marks[index])) / diagonal for index in chosen]
    mean = sum(distances) / len(distances)
    return math.sqrt(sum((distance - mean) ** 2 for distance in distances) / (len(distances) - 1))


def multi_class_instability(deviations):
    """mean_f min_c mean_k from nested lists [class][filter][landmark]."""
    total = 0.0
    for index in range(len(deviations[0])):
        means = []
        for rows in deviations:
            known = [value for value in rows[index] if not math.isnan(value)]
            if known:
                means.append(sum(known) / len(known))
        total += min(means)
    return total / len(deviations[0])


def part_shares(features, targets, masks, centres, diameter, share, threshold_iou, num_classes):
    """P[class][filter][part] and T[filter]; features [images, filters, rows, columns], masks[image][part][y][x]."""
    images, filters, rows, columns = features.shape
    thresholds, table = [], [[[[] for _ in masks[0]] for _ in range(filters)] for _ in range(num_classes)]
    for kernel in range(filters):
        values = sorted(features[:, kernel].flatten().tolist(), reverse=True)
        thresholds.append(values[int(share * len(values))])
    height, width = len(masks[0][0]), len(masks[0][0][0])
    for image in range(images):
        for kernel in range(filters):
            valid = [
                (r, c)
                for r in range(rows)
                for c in range(columns)
                if features[image, kernel, r, c] > thresholds[kernel]
            ]
            region = {
                (y, x)
                for y in range(height)
                for x in range(width)
                if any(math.dist((y + 0.5, x + 0.5), (centres[0][r], centres[1][c])) <= diameter / 2 for r, c in valid)
            }
            for part, mask in enumerate(masks[image]):
                inside = {(y, x) for y in range(height) for x in range(width) if mask[y][x]}
                if inside:
                    overlap = len(region & inside) / len(region | inside)
                    table[int(targets[image])][kernel][part].append(float(overlap > threshold_iou))
    shares = [[[sum(hits) / len(hits) if hits else math.nan for hits in row] for row in rows] for rows in table]
    return shares, thresholds
