"""Slow oracles of the measures of related methods: literal loops, one filter or picture at a time."""

import math

import torch


def class_independence(features, targets):
    result = []
    for column in features.double().T.tolist():
        above = [value - min(column) for value in column]
        shares = {}
        for value, target in zip(above, targets.tolist(), strict=True):
            shares[target] = shares.get(target, 0.0) + value
        result.append(1 - max(shares.values()) / sum(above) if sum(above) > 0 else 1.0)
    return torch.tensor(result, dtype=torch.float64)


def spatial_diversity(maps):
    result = []
    for picture in maps.double():
        softmaxes = []
        for one in picture:
            values = one.flatten().tolist()
            scale = max(sum(abs(value) for value in values) / len(values), 1e-5)
            powers = [math.exp(value / scale) for value in values]
            softmaxes.append([power / sum(powers) for power in powers])
        result.append(sum(max(column) for column in zip(*softmaxes, strict=True)) / len(softmaxes))
    return torch.tensor(result, dtype=torch.float64)


def mono_score(features, embeddings):
    """Every pair of pictures, one after the other."""
    result = []
    for column in features.double().T:
        low, high = float(column.min()), float(column.max())
        weights = [(float(value) - low) / (high - low) if high > low else 0.0 for value in column]
        total, norm = 0.0, 0.0
        for first in range(len(weights)):
            for second in range(len(weights)):
                if first != second:
                    one, other = embeddings[first].double(), embeddings[second].double()
                    cosine = float(one @ other / one.norm() / other.norm())
                    total += weights[first] * weights[second] * cosine
                    norm += weights[first] * weights[second]
        result.append(total / norm if norm > 0 else 0.0)
    return torch.tensor(result, dtype=torch.float64)


def overlap(first_mean, first_deviation, second_mean, second_deviation, steps=200_000):
    """Area under the smaller of two normal densities, by a sum."""
    low = min(first_mean - 8 * first_deviation, second_mean - 8 * second_deviation)
    high = max(first_mean + 8 * first_deviation, second_mean + 8 * second_deviation)
    x = torch.linspace(low, high, steps, dtype=torch.float64)
    densities = [
        torch.exp(-0.5 * ((x - mean) / deviation) ** 2) / deviation / math.sqrt(2 * math.pi)
        for mean, deviation in ((first_mean, first_deviation), (second_mean, second_deviation))
    ]
    return float(torch.trapezoid(torch.minimum(*densities), x))
