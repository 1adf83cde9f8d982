"""Figures and the report. Figures need matplotlib, which comes with ``pip install 'timm_csg[plots]'``."""

from timm_csg.plots.colours import filter_colour
from timm_csg.plots.contrast_bars import contrast_figure
from timm_csg.plots.heat import overlay
from timm_csg.plots.maps import map_figure
from timm_csg.plots.matrix import class_filter_figure
from timm_csg.plots.reporting import report

__all__ = ["class_filter_figure", "contrast_figure", "filter_colour", "map_figure", "overlay", "report"]
