"""One colour for each filter, the same in every figure and on every page."""

from __future__ import annotations

import colorsys

_TURN = 0.6180339887498949  # of the hue, from one filter to the next: the golden ratio, so that neighbours differ most


def filter_colour(index: int) -> str:
    """The colour of a filter, by its index alone, so that it is the same wherever the filter is drawn.

    Hues follow the golden ratio, and lightness changes every third filter; of the few filters in one figure two can
    look alike, which is why their numbers stand beside them.

    Args:
        index: Of the filter.

    Returns:
        Red, green and blue as ``"#rrggbb"``, dark enough to be read on white.

    Example:
        >>> filter_colour(0), filter_colour(1)
        ('#cb2a2a', '#1f4398')
    """
    lightness = (0.48, 0.36, 0.42)[index % 3]
    red, green, blue = colorsys.hls_to_rgb(index * _TURN % 1.0, lightness, 0.66)
    return "#" + "".join(f"{round(255 * part):02x}" for part in (red, green, blue))
