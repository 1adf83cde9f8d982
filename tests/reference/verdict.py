"""Slow oracle of how far responses bear out owners: numpy.corrcoef for every filter and class, one at a time."""

import numpy as np
from reference.class_specificity import class_correlation


def owner_evidence(matrix, features, targets):
    """Share of filters in use with one owner, share of those that respond most to it, mean correlation with it."""
    matrix, correlation = matrix.numpy(), class_correlation(features, targets, len(matrix))
    in_use, exclusive, agreed, correlations = 0, 0, 0, []
    for column in range(matrix.shape[1]):
        classes = [row for row in range(len(matrix)) if matrix[row, column] > 0.5]
        in_use += len(classes) > 0
        exclusive += len(classes) == 1
        if len(classes) == 1 and (targets == classes[0]).any():
            own = correlation[classes[0], column]
            agreed += own > 0 and own >= correlation[:, column].max() - 1e-12
            correlations.append(own)
    return exclusive / in_use, agreed / len(correlations), np.mean(correlations)
