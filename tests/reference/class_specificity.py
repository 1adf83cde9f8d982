"""Slow oracles of the statistics of one filter and its classes: literal loops, one filter at a time."""

import itertools

import numpy as np


def purity(features, targets, count):
    """Mean class shares over every choice among equal responses at the last place, then the largest class."""
    result = []
    for column in features.double().T.tolist():
        last = sorted(column, reverse=True)[count - 1]
        stronger = [index for index, value in enumerate(column) if value > last]
        equal = [index for index, value in enumerate(column) if value == last]
        shares = {int(target): 0.0 for target in targets}
        choices = list(itertools.combinations(equal, count - len(stronger)))
        for choice in choices:
            for index in [*stronger, *choice]:
                shares[int(targets[index])] += 1 / count / len(choices)
        result.append(max(shares.values()))
    return np.array(result)


def class_selectivity(features, targets):
    """Morcos et al., ICLR 2018, section 2.3, for one filter after the other."""
    result = []
    for column in features.double().T.tolist():
        by_class = {}
        for value, target in zip(column, targets.tolist(), strict=True):
            by_class.setdefault(target, []).append(value)
        means = sorted(sum(values) / len(values) for values in by_class.values())
        *others, best = means
        rest = sum(others) / len(others) if others else best
        result.append((best - rest) / (best + rest) if best > 0 else 0.0)
    return np.array(result)


def class_correlation(features, targets, num_classes):
    """numpy.corrcoef of each filter with each indicator; 0 where either is constant."""
    features, targets = features.double().numpy(), targets.numpy()
    result = np.zeros((num_classes, features.shape[1]))
    for row, column in np.ndindex(*result.shape):
        response, indicator = features[:, column], (targets == row).astype(float)
        if np.ptp(response) > 0 and np.ptp(indicator) > 0:
            result[row, column] = np.corrcoef(response, indicator)[0, 1]
    return result
