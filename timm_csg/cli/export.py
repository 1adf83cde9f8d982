"""``timm-csg export``: a checkpoint, with the preprocessing of its run, as an ONNX file."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from timm_csg.cli.checkpoint_data import load_with_input
from timm_csg.cli.checkpoints import import_plugins
from timm_csg.export import Exported, export_onnx


def export(
    checkpoint: str,
    path: str | Path,
    *,
    outputs: Sequence[str],
    upsample: bool = True,
    img_size: int | None = None,
    plugins: Sequence[str] = (),
) -> Exported:
    """Export a checkpoint to ONNX; what ``timm-csg export`` calls.

    Args:
        checkpoint: See ``timm_csg.cli.report.report``; it must be differentiated.
        path: The file.
        outputs: See ``timm_csg.export_onnx``.
        upsample: See ``timm_csg.export_onnx``.
        img_size: Side of the images; None: that of the run, or the model's own.
        plugins: Python files or modules to import first.

    Returns:
        The file, its outputs, and what is missing and why.

    Raises:
        TypeError, ValueError, ImportError: As ``timm_csg.export_onnx``.
        CheckpointError, HubError: If the checkpoint cannot be loaded.
    """
    import_plugins(plugins)
    given = {"device": "cpu"} if img_size is None else {"device": "cpu", "img_size": img_size}
    model, config, _ = load_with_input(checkpoint, given)
    return export_onnx(model, path, outputs=outputs, upsample=upsample, preprocessing=config)
