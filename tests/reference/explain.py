"""Visual explanations, slowly and literally: one image, one number at a time, layers as plain lists.

A network is a list of layers, each a tuple: ("conv", weight, bias, padding), ("relu",), ("max_pool", size). Maps are
nested lists [filters][height][width]. Rules at a ReLU: Simonyan et al. (1312.6034), Zeiler & Fergus (1311.2901),
Springenberg et al. (1412.6806). CAM: Zhou et al. (1512.04150) eq. 2. Grad-CAM: Selvaraju et al. (1610.02391) eq. 1, 2.
"""


def zeros(filters, height, width):
    return [[[0.0] * width for _ in range(height)] for _ in range(filters)]


def shape(maps):
    return len(maps), len(maps[0]), len(maps[0][0])


def windows(maps_shape, weight, padding):
    """Every term of a convolution: (output filter, row, column), (input filter, row, column), weight."""
    _, height, width = maps_shape
    size = len(weight[0][0])
    for k in range(len(weight)):
        for y in range(height + 2 * padding - size + 1):
            for x in range(width + 2 * padding - size + 1):
                for c in range(len(weight[k])):
                    for dy in range(size):
                        for dx in range(size):
                            row, column = y + dy - padding, x + dx - padding
                            if 0 <= row < height and 0 <= column < width:
                                yield (k, y, x), (c, row, column), weight[k][c][dy][dx]


def forward(layers, image):
    """Inputs of all layers, and the output of the last one."""
    inputs, maps = [], image
    for layer in layers:
        inputs.append(maps)
        filters, height, width = shape(maps)
        if layer[0] == "conv":
            _, weight, bias, padding = layer
            size = len(weight[0][0])
            out = zeros(len(weight), height + 2 * padding - size + 1, width + 2 * padding - size + 1)
            for k, plane in enumerate(out):
                for row in plane:
                    row[:] = [bias[k]] * len(row)
            for (k, y, x), (c, row, column), value in windows(shape(maps), weight, padding):
                out[k][y][x] += value * maps[c][row][column]
        elif layer[0] == "relu":
            out = [[[max(0.0, value) for value in row] for row in plane] for plane in maps]
        else:
            size = layer[1]
            out = zeros(filters, height // size, width // size)
            for k, y, x, row, column in switches(maps, size):
                out[k][y][x] = maps[k][row][column]
        maps = out
    return inputs, maps


def switches(maps, size):
    """Where the maximum of each pooling window is: (filter, pooled row, pooled column, row, column)."""
    filters, height, width = shape(maps)
    for k in range(filters):
        for y in range(height // size):
            for x in range(width // size):
                places = [(y * size + dy, x * size + dx) for dy in range(size) for dx in range(size)]
                row, column = max(places, key=lambda place: maps[k][place[0]][place[1]])
                yield k, y, x, row, column


def through_relu(value, signal, rule):
    if rule == "gradient":
        return signal if value > 0 else 0.0
    if rule == "deconvnet":
        return signal if signal > 0 else 0.0
    return signal if value > 0 and signal > 0 else 0.0


def backward(layers, inputs, signal, rule):
    """Send a signal at the last output back to the image."""
    for layer, maps in zip(reversed(layers), reversed(inputs), strict=True):
        below = zeros(*shape(maps))
        if layer[0] == "conv":
            _, weight, _, padding = layer
            for (k, y, x), (c, row, column), value in windows(shape(maps), weight, padding):
                below[c][row][column] += value * signal[k][y][x]
        elif layer[0] == "relu":
            for k, plane in enumerate(maps):
                for y, row in enumerate(plane):
                    for x, value in enumerate(row):
                        below[k][y][x] = through_relu(value, signal[k][y][x], rule)
        else:
            for k, y, x, row, column in switches(maps, layer[1]):
                below[k][row][column] += signal[k][y][x]
        signal = below
    return signal


def projection(layers, image, class_weight, rule):
    """A class's logit (mean pooling, then the class's row of a linear layer) sent back to the pixels."""
    inputs, maps = forward(layers, image)
    filters, height, width = shape(maps)
    start = [[[class_weight[k] / (height * width)] * width for _ in range(height)] for k in range(filters)]
    return backward(layers, inputs, start, rule)


def cam(maps, class_weight):
    _, height, width = shape(maps)
    return [
        [sum(weight * plane[y][x] for weight, plane in zip(class_weight, maps, strict=True)) for x in range(width)]
        for y in range(height)
    ]


def grad_cam(maps, gradient):
    """From the maps of one image and the gradient of the logit to them."""
    _, height, width = shape(maps)
    alpha = [sum(sum(row) for row in plane) / (height * width) for plane in gradient]
    return [[max(0.0, value) for value in row] for row in cam(maps, alpha)]


def coarse_map(maps, gradient):
    """ReLU(dy/dF) * F, summed over filters."""
    filters, height, width = shape(maps)
    return [
        [sum(max(0.0, gradient[k][y][x]) * maps[k][y][x] for k in range(filters)) for x in range(width)]
        for y in range(height)
    ]


def owner_map(maps, gradient, owned):
    """dy/dA * A, summed over the filters that the class owns."""
    _, height, width = shape(maps)
    return [
        [sum(gradient[k][y][x] * maps[k][y][x] for k in range(len(maps)) if owned[k]) for x in range(width)]
        for y in range(height)
    ]


def upsampled(plane, height, width):
    """Bilinear; the centre of cell i of n lies at (i + 1/2) / n of the side, and the border is repeated."""

    def weights(length, cells):
        for i in range(length):
            place = max(0.0, (i + 0.5) * cells / length - 0.5)
            low = min(int(place), cells - 1)
            yield low, min(low + 1, cells - 1), place - low

    return [
        [
            (1 - fy) * ((1 - fx) * plane[y0][x0] + fx * plane[y0][x1])
            + fy * ((1 - fx) * plane[y1][x0] + fx * plane[y1][x1])
            for x0, x1, fx in weights(width, len(plane[0]))
        ]
        for y0, y1, fy in weights(height, len(plane))
    ]


def strongest(responses, top):
    """Positions of the largest numbers, largest first; of equal ones the earlier."""
    return sorted(range(len(responses)), key=lambda i: (-responses[i], i))[:top]
