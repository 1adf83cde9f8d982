"""Slow oracle of ablation: the head runs once for every class and image, on features set to zero by hand."""

import torch


def ablate(model, images, targets, own, keep_only=False):
    """Accuracy of each class before, and [class removed or kept][class]; own: bool [classes, filters]."""

    def accuracies(kept):
        by_class = [[] for _ in own]
        for image, target in zip(images, targets.tolist(), strict=True):
            features = model.forward_features(image[None]).clone()
            for index in range(own.shape[1]):
                if not kept[index]:
                    if features.ndim == 4 and getattr(model, "output_fmt", "NCHW") != "NHWC":
                        features[:, index] = 0
                    else:
                        features[..., index] = 0
            by_class[target].append(float(model.forward_head(features).argmax() == target))
        return [sum(hits) / len(hits) if hits else torch.nan for hits in by_class]

    with torch.no_grad():
        before = accuracies([True] * own.shape[1])
        after = [accuracies((row if keep_only else ~row).tolist()) for row in own]
    return torch.tensor(before, dtype=torch.float64), torch.tensor(after, dtype=torch.float64)
