"""The interpretation pathway, slowly and literally: loops and Python floats, one picture, class and filter at a time.

Guo et al., AAAI 2024, as the authors' code computes it: P = softmax(Q) over classes; a class is drawn from softmax(z1);
a filter stays with its probability for that class; z2 = W (pooled * mask) + b; the loss is the mean cross entropy of z2
over the pictures whose class was drawn right. The straight-through gradients are written out by the chain rule.
"""

import math


def softmax(values):
    largest = max(values)
    powers = [math.exp(value - largest) for value in values]
    return [power / math.fsum(powers) for power in powers]


def table(correspondence):
    """P [classes][filters] of Q [classes][filters]."""
    columns = [softmax(list(column)) for column in zip(*correspondence, strict=True)]
    return [list(row) for row in zip(*columns, strict=True)]


def drawn_class(logits, noise):
    """The class that is largest after Gumbel noise."""
    noisy = [logit - math.log(-math.log(u)) for logit, u in zip(logits, noise, strict=True)]
    return noisy.index(max(noisy))


def mask(probabilities, noise):
    return [1.0 if u < q else 0.0 for q, u in zip(probabilities, noise, strict=True)]


def logits(pooled, weight, bias):
    return [math.fsum(w * x for w, x in zip(row, pooled, strict=True)) + b for row, b in zip(weight, bias, strict=True)]


def loss(pathway, drawn, targets):
    """Mean cross entropy over pictures whose class was drawn right; 0 without any."""
    right = [z for z, found, target in zip(pathway, drawn, targets, strict=True) if found == target]
    kept = [target for found, target in zip(drawn, targets, strict=True) if found == target]
    losses = [-math.log(softmax(z)[target]) for z, target in zip(right, kept, strict=True)]
    return math.fsum(losses) / len(losses) if losses else 0.0


def straight_through(pooled, weight, bias, correspondence, targets, class_noise, filter_noise):
    """The loss, and its straight-through derivatives with respect to Q, to W and to the pooled features.

    Forward, drawn values are zeros and ones; backward, the derivative of a drawn class is that of p = softmax(z1), of a
    drawn filter that of its probability q.
    """
    num_classes, num_filters = len(correspondence), len(correspondence[0])
    probabilities = table(correspondence)
    first = [logits(x, weight, bias) for x in pooled]
    drawn = [drawn_class(z, u) for z, u in zip(first, class_noise, strict=True)]
    masks = [mask(probabilities[c], u) for c, u in zip(drawn, filter_noise, strict=True)]
    second = [
        logits([value * kept for value, kept in zip(x, m, strict=True)], weight, bias)
        for x, m in zip(pooled, masks, strict=True)
    ]
    to_table = [[0.0] * num_filters for _ in range(num_classes)]
    to_weight = [[0.0] * num_filters for _ in range(num_classes)]
    to_pooled = [[0.0] * num_filters for _ in pooled]
    count = sum(c == y for c, y in zip(drawn, targets, strict=True))
    for n, (x, m, c, y) in enumerate(zip(pooled, masks, drawn, targets, strict=True)):
        if c != y:
            continue
        slope = [(value - (k == y)) / count for k, value in enumerate(softmax(second[n]))]  # of z2
        to_mask = [x[j] * math.fsum(slope[k] * weight[k][j] for k in range(num_classes)) for j in range(num_filters)]
        to_class = [math.fsum(to_mask[j] * probabilities[k][j] for j in range(num_filters)) for k in range(num_classes)]
        p = softmax(first[n])
        mean = math.fsum(p[k] * to_class[k] for k in range(num_classes))
        to_first = [p[k] * (to_class[k] - mean) for k in range(num_classes)]
        for j in range(num_filters):
            to_table[c][j] += to_mask[j]
            for k in range(num_classes):
                to_weight[k][j] += slope[k] * x[j] * m[j] + to_first[k] * x[j]
                to_pooled[n][j] += slope[k] * weight[k][j] * m[j] + to_first[k] * weight[k][j]
    to_correspondence = [[0.0] * num_filters for _ in range(num_classes)]
    for j in range(num_filters):
        mean = math.fsum(probabilities[k][j] * to_table[k][j] for k in range(num_classes))
        for k in range(num_classes):
            to_correspondence[k][j] = probabilities[k][j] * (to_table[k][j] - mean)
    return loss(second, drawn, targets), to_correspondence, to_weight, to_pooled
