"""Figures; the only place that imports matplotlib, which comes with ``pip install 'timm_csg[plots]'``."""

from timm_csg.plots.matrix import class_filter_figure

__all__ = ["class_filter_figure"]
