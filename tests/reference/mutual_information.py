"""Slow oracle of timm_csg.metrics.mutual_information: scikit-learn, one class after the other."""

import numpy as np
from sklearn.feature_selection import mutual_info_classif
from torch import Tensor


def mutual_information(
    features: Tensor, targets: Tensor, num_classes: int, neighbors: int = 3, random_state: int = 0
) -> np.ndarray:
    """[classes, filters] in nats, as in `mutualinfo/mutualinfo.py` of the authors of CSG."""
    rows = [
        mutual_info_classif(
            features.double().numpy(),
            (targets == index).numpy(),
            n_neighbors=neighbors,
            random_state=random_state,
        )
        for index in range(num_classes)
    ]
    return np.stack(rows)
