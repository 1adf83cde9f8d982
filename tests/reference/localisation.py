"""Slow oracles of localisation: one image and one filter at a time, as the protocols describe it."""

import math

import torch
import torch.nn.functional as F


def box_mask(box, height, width):
    mask = torch.zeros(height, width)
    for row in range(height):
        for column in range(width):
            mask[row, column] = float(box[0] <= column + 0.5 < box[2] and box[1] <= row + 0.5 < box[3])
    return mask


def iou(first, second):
    return float(torch.minimum(first, second).sum() / torch.maximum(first, second).sum())


def upsampled(one_map, size):
    return F.interpolate(one_map[None, None], size, mode="bilinear", align_corners=False)[0, 0]


def means(values, classes, num_classes):
    """Mean of a list for each class."""
    groups = [[value for value, index in zip(values, classes, strict=True) if index == c] for c in range(num_classes)]
    return [sum(group) / len(group) if group else math.nan for group in groups]


def cam(features, weight, classes, masks, share):
    """Overlap of each image; features [images, filters, height, width]."""
    scores = []
    for image, index, mask in zip(features, classes, masks, strict=True):
        heat = upsampled(sum(weight[index][kernel] * image[kernel] for kernel in range(len(image))), mask.shape)
        values = sorted(heat.flatten().tolist())
        scores.append(iou((heat >= values[-int(len(values) * share)]).float(), mask))
    return scores


def activmap(features, classes, masks, share, num_classes):
    """Class, mean overlap and share above 0.3 of each filter."""
    found = []
    large = [F.interpolate(image[None], masks[0].shape, mode="bilinear", align_corners=False)[0] for image in features]
    for kernel in range(features.shape[1]):
        values = sorted(features[:, kernel].flatten().tolist())
        threshold = values[-int(share * len(values))]
        scores = [iou((image[kernel] >= threshold).float(), mask) for image, mask in zip(large, masks, strict=True)]
        hits = means([float(score > 0.3) for score in scores], classes, num_classes)
        best = max(range(num_classes), key=lambda index: (hits[index], -index))
        found.append((best, means(scores, classes, num_classes)[best], hits[best]))
    return found


def gradmap(responses, images, classes, masks, filters, sigma, threshold):
    """Overlap of each image; ``responses`` makes features [1, filters, height, width] from one image."""
    scores = []
    for image, index, mask in zip(images, classes, masks, strict=True):
        total = 0.0
        for kernel in filters[index]:
            one = image[None].clone().requires_grad_()
            responses(one)[0, kernel].mean().backward()
            gradient = one.grad[0]
            length = sum(colour**2 for colour in gradient).sqrt()
            length = length / math.sqrt(float((length**2).sum()) / length.numel())
            radius = round(sigma)
            offsets = range(-radius, radius + 1)
            kernel_2d = torch.tensor([[math.exp(-(a * a + b * b) / (2 * sigma**2)) for b in offsets] for a in offsets])
            padded = F.pad(length[None, None], (radius,) * 4, mode="reflect")
            blurred = F.conv2d(padded, (kernel_2d / kernel_2d.sum())[None, None])[0, 0]
            total += iou((blurred > threshold).float(), mask)
        scores.append(total / len(filters[index]))
    return scores
