"""The class-specific gate, slowly and literally: loops and Python floats, one filter, class and image at a time.

Liang et al., ECCV 2020: the gate G in [0, 1]^{C x K}, the gated path yhat_G = softmax(W . GAP(A * G_y)), the penalty
psi(relu(||G||_1 - g)) and, after every update, G_k <- G_k / max_c G_k followed by clipping to [0, 1].
"""

import math


def row(gate, target):
    """The row of one image: a class index, soft targets (mixed), or zeros and ones (strongest class present)."""
    gate = gate.tolist()
    num_filters = len(gate[0])
    if target.ndim == 0:
        return gate[int(target)]
    weights = [float(weight) for weight in target]
    if target.is_floating_point() and abs(sum(weights) - 1) < 1e-2:
        return [sum(weight * gate[c][k] for c, weight in enumerate(weights)) for k in range(num_filters)]
    present = [c for c, weight in enumerate(weights) if weight == 1]
    return [max((gate[c][k] for c in present), default=0.0) for k in range(num_filters)]


def gated_features(features, gate, targets, layout):
    """A * G_y: filter k of every image multiplied by its entry, the same for all positions."""
    result = features.clone()
    for image, target in enumerate(targets):
        for k, entry in enumerate(row(gate, target)):
            if layout == "NCHW":
                result[image, k] = features[image, k] * entry
            else:
                result[image, ..., k] = features[image, ..., k] * entry
    return result


def projected(gate):
    """Each filter divided by its largest class, then clipped; NaN is 0; without a positive entry the least bad wins."""
    num_classes, num_filters = len(gate), len(gate[0])
    result = [[0.0] * num_filters for _ in range(num_classes)]
    for k in range(num_filters):
        column = [0.0 if math.isnan(gate[c][k]) else gate[c][k] for c in range(num_classes)]
        largest = max(column)
        for c in range(num_classes):
            if largest > 0:
                result[c][k] = min(1.0, max(0.0, column[c] / largest))
            else:
                result[c][k] = 1.0 if column[c] == largest else 0.0
    return result


def paper_sparsity(gate, g):
    """relu(||G||_1 - g) of the authors' released code."""
    return max(0.0, math.fsum(abs(entry) for line in gate for entry in line) - g)


def sparsity(gate, classes_per_filter, norm):
    """Filters times psi of the mean excess per filter."""
    num_filters = len(gate[0])
    excess = paper_sparsity(gate, classes_per_filter * num_filters) / num_filters
    psi = {"l1": excess, "l2": excess**2, "smooth_l1": excess**2 / 2 if excess < 1 else excess - 0.5}
    return num_filters * psi[norm]
