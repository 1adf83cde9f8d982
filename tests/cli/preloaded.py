"""What a training imports only when it needs it: imported once, before processes that train are forked."""

import importlib

LATE = ("timm_csg.cli.train", "timm_csg.plots.reporting", "matplotlib.backends.backend_agg", "sklearn.datasets")
for name in (*LATE, "scipy.optimize"):
    importlib.import_module(name)
