"""Interpretable filters, slowly and literally: the formulas of Zhang, Wu and Zhu, CVPR 2018, one number at a time.

T_mu has entries tau max(1 - beta |[i, j] - mu|_1 / n, -1), T^- has -tau; tau = strength / n^2, n = sqrt(height width).
p(x|T) = exp(tr(x T)) / Z_T with Z_T the sum over the maps of a filter; all templates have the prior 1 / (n^2 + 1).
Loss = -sum_T p(T) sum_x p(x|T) log(p(x|T) / p(x)). Maps are [images][filters] of lists of rows.
"""

import math
from fractions import Fraction

import torch


def template(row, column, height, width, beta):
    """T_mu without tau, a list of rows."""
    n = math.sqrt(height * width)
    return [[max(1 - beta * (abs(i - row) + abs(j - column)) / n, -1.0) for j in range(width)] for i in range(height)]


def peak(rows):
    """Position of the largest value; of several the one nearest to their mean place, of these the first row by row."""
    largest = max(max(line) for line in rows)
    found = [(i, j) for i, line in enumerate(rows) for j, value in enumerate(line) if value == largest]
    if largest <= 0:
        return found[0]
    mean = [Fraction(sum(at[axis] for at in found), len(found)) for axis in (0, 1)]
    return min(found, key=lambda at: (at[0] - mean[0]) ** 2 + (at[1] - mean[1]) ** 2)


def centre(rows):
    """Position of the centre of gravity, rounded half to even."""
    total = math.fsum(value for line in rows for value in line)
    if total == 0:
        return round((len(rows) - 1) / 2), round((len(rows[0]) - 1) / 2)
    row = math.fsum(i * value for i, line in enumerate(rows) for value in line) / total
    column = math.fsum(j * value for line in rows for j, value in enumerate(line)) / total
    return round(row), round(column)


def masked(features, beta, position=peak):
    """max(x T_mu, 0) without tau, of signed maps max(x, 0) first, [images, filters, height, width]."""
    result = torch.empty_like(features)
    for image in range(features.shape[0]):
        for k in range(features.shape[1]):
            rows = [[max(float(value), 0.0) for value in line] for line in features[image, k]]
            mask = template(*position(rows), len(rows), len(rows[0]), beta)
            for i, line in enumerate(rows):
                for j, value in enumerate(line):
                    result[image, k, i, j] = max(value * mask[i][j], 0.0)
    return result


def all_templates(height, width, beta, strength):
    """T_mu of all positions, row by row, then T^-, as one tensor [templates, height, width]."""
    tau = strength / (height * width)
    positive = [template(i, j, height, width, beta) for i in range(height) for j in range(width)]
    return tau * torch.tensor([*positive, [[-1.0] * width] * height], dtype=torch.float64)


def part_loss(maps, beta, strength, log_z=None):
    """Loss of each filter [filters], written out; Z_T of these maps, held constant, or batch size times exp(log_z).

    ``maps`` [images, filters, height, width] may ask for a gradient: what autograd makes of this is the exact one.
    """
    templates = all_templates(*maps.shape[2:], beta, strength).to(maps)
    number = len(templates)
    losses = []
    for k in range(maps.shape[1]):
        fits = [[(x[k] * t).sum() for t in templates] for x in maps]
        if log_z is None:
            z = [sum(fit[t].detach().exp() for fit in fits) for t in range(number)]
        else:
            z = [len(maps) * math.exp(log_z[k][t]) for t in range(number)]
        loss = 0.0
        for fit in fits:
            given = [fit[t].exp() / z[t] for t in range(number)]
            p_x = sum(p / number for p in given)
            loss = loss - sum(p / number * torch.log(p / p_x) for p in given)
        losses.append(loss)
    return torch.stack(losses)


def paper_gradient(maps, belongs, beta, strength):
    """The paper's approximation of the loss's gradient: only the template that belongs to the image.

    -(p(T) t_ij / Z_T) exp(tr(x T)) (tr(x T) - log Z_T - log p(x)) with T = T_mu at the peak where ``belongs`` [images]
    [filters] (the image is of the filter's category), else T^-.
    """
    templates = all_templates(*maps.shape[2:], beta, strength).to(maps)
    number, width = len(templates), maps.shape[3]
    result = torch.empty_like(maps)
    for k in range(maps.shape[1]):
        fits = [[float((x[k] * t).sum()) for t in templates] for x in maps]
        z = [math.fsum(math.exp(fit[t]) for fit in fits) for t in range(number)]
        for image, fit in enumerate(fits):
            p_x = math.fsum(math.exp(fit[t]) / z[t] / number for t in range(number))
            i, j = peak(maps[image, k].tolist())
            own = i * width + j if belongs[image][k] else number - 1
            weight = math.exp(fit[own]) / z[own] / number * (fit[own] - math.log(z[own]) - math.log(p_x))
            result[image, k] = -weight * templates[own]
    return result


def released_gradient(maps, belongs, half_beta, share):
    """The released code's addition to the gradient, one filter and image at a time; w = ``half_beta`` [filters].

    Positives: a = exp(s / 0.5) (s - log Z+ + 0.5) with s = mean(x mask), others: the same of s = -mean(x); a divided by
    its mean over its kind; the gradient is -1e-5 a mask 0.5 / share, and +1e-5 a 0.5 / (1 - share).
    """
    images, filters, height, width = maps.shape
    size = math.sqrt(height * width)

    def mask(image, k):
        at = centre(maps[image, k].tolist())
        beta = 2 * half_beta[k] * size / (size - 1)
        return torch.tensor(template(*at, height, width, beta), dtype=maps.dtype)

    masks = [[mask(image, k) for k in range(filters)] for image in range(images)]
    result = torch.zeros_like(maps)
    for k in range(filters):
        other = [masks[images - 1 - image][filters - 1 - k] for image in range(images)]
        crossed = [math.exp(float((maps[image, k] * other[image]).mean()) / 0.5) for image in range(images)]
        quiet = [math.exp(-float(maps[image, k].mean()) / 0.5) for image in range(images)]
        log_positive, log_negative = (0.5 * math.log(math.fsum(z) / images) for z in (crossed, quiet))
        own = [image for image in range(images) if belongs[image][k]]
        rest = [image for image in range(images) if not belongs[image][k]]
        a = {}
        for image in range(images):
            is_own = belongs[image][k]
            s = float((maps[image, k] * masks[image][k]).mean()) if is_own else -float(maps[image, k].mean())
            a[image] = math.exp(s / 0.5) * (s - (log_positive if is_own else log_negative) + 0.5)
        for kind, weight in ((own, 0.5 / share[k]), (rest, 0.5 / (1 - share[k]))):
            for image in kind:
                level = a[image] / (math.fsum(a[other] for other in kind) / len(kind)) * weight
                slope = -level * masks[image][k] if belongs[image][k] else level * torch.ones(height, width)
                result[image, k] = 1e-5 * slope / images
    return result
