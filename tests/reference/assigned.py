"""Assigned filters, slowly and literally: loops over draws, classes and pictures, and every assignment tried."""

import itertools
import math

import numpy as np


def draws(assignment):
    """Filters of each class in each draw: a class's in turn, until the class with most has shown all.

    One at a time; each with the next one where two classes share a filter and a class has several.
    """
    owned = [[k for k, own in enumerate(row) if own] for row in assignment]
    most = max(map(len, owned))
    size = 2 if most > 1 and any(sum(column) > 1 for column in zip(*assignment, strict=True)) else 1
    return [[[row[(draw + i) % len(row)] for i in range(size)] for row in owned] for draw in range(most)]


def cross_entropy(logits, winner, rivals):
    """-log of the softmax of one logit against some others."""
    largest = max(logits[c] for c in (winner, *rivals))
    total = math.fsum(math.exp(logits[c] - largest) for c in (winner, *rivals))
    return math.log(total) + largest - logits[winner]


def solo(evidence, bias, assignment, targets):
    """Mean loss over pictures and draws.

    A target is a class; a list of floats with a sum of 1, cross entropy with these; or a list of zeros and ones, the
    mean over classes present of the loss against those absent. A class whose filters all serve the target is no rival.
    """
    losses = []
    for responses, target in zip(evidence, targets, strict=True):
        for filters in draws(assignment):
            logits = [math.fsum(responses[k] for k in own) / len(own) + b for own, b in zip(filters, bias, strict=True)]
            classes = range(len(logits))
            if isinstance(target, list) and all(isinstance(share, float) for share in target):
                terms = (
                    share * cross_entropy(logits, c, [d for d in classes if d != c]) for c, share in enumerate(target)
                )
                losses.append(math.fsum(terms))
                continue
            present = [target] if isinstance(target, int) else [c for c in classes if target[c]]
            rivals = [c for c in classes if not all(any(assignment[p][k] for p in present) for k in filters[c])]
            found = [cross_entropy(logits, p, rivals) for p in present]
            losses.append(math.fsum(found) / len(found) if found else 0.0)
    return math.fsum(losses) / len(losses)


def correlation(responses, rows):
    """numpy's correlation of every filter with every class's targets; 0 where one of them is constant."""
    return [
        [
            0.0 if np.ptp(target) == 0 or np.ptp(response) == 0 else np.corrcoef(target, response)[0, 1]
            for response in np.asarray(responses, dtype=np.float64).T
        ]
        for target in np.asarray(rows, dtype=np.float64).T
    ]


def best_total(correlations, filters_per_class=None):
    """The largest sum of correlations of any exclusive assignment: every one is tried.

    Without ``filters_per_class`` all filters are given away and no class gets two more than another one.
    """
    num_classes, num_filters = len(correlations), len(correlations[0])
    nobody = [] if filters_per_class is None else [num_classes]
    best = -math.inf
    for owners in itertools.product([*range(num_classes), *nobody], repeat=num_filters):
        counts = [owners.count(c) for c in range(num_classes)]
        fewest = num_filters // num_classes
        if filters_per_class is None:
            allowed = all(fewest <= count <= fewest + 1 for count in counts)
        else:
            allowed = all(count == filters_per_class for count in counts)
        if allowed:
            total = math.fsum(correlations[c][k] for k, c in enumerate(owners) if c < num_classes)
            best = max(best, total)
    return best


def standardised(responses):
    """Each filter's responses less their mean, over their standard deviation (not corrected); 1e-6 in the variance."""
    responses = np.asarray(responses, dtype=np.float64)
    return (responses - responses.mean(axis=0)) / np.sqrt(responses.var(axis=0) + 1e-6)
