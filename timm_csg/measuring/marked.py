"""What needs a file of annotations: where filters fire beside landmarks and parts, and whether maps cover objects."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from timm_csg import metrics
from timm_csg.measuring.annotations import Annotations, read_annotations
from timm_csg.measuring.interpretability import PartInterpretability, part_interpretability
from timm_csg.measuring.localisation import cam_localisation
from timm_csg.measuring.localisation_by_gradients import gradmap
from timm_csg.measuring.localisation_by_maps import activmap
from timm_csg.measuring.peaks import collect_peaks
from timm_csg.measuring.subject import Subject
from timm_csg.pictures import upright_size

_logger = logging.getLogger(__name__)


def read_for(subject: Subject, option: str) -> Annotations:
    """The annotations of the subject's images, in their order and as the model sees them.

    Args:
        subject: Its options hold the file.
        option: ``"landmarks"`` or ``"boxes"``.

    Raises:
        ValueError: If the file cannot be read, does not name the images, or gives them other sizes than they have.
    """
    path, dataset = subject.options[option], getattr(subject.loader, "dataset", None)
    transform = getattr(dataset, "transform", None)
    while dataset is not None and not hasattr(dataset, "filenames"):
        dataset = getattr(dataset, "dataset", None)
    if dataset is None:
        raise ValueError(
            f"{path}: the images of this data set have no file names, so nothing can be looked up for them."
        )
    annotations = read_annotations(path).select(dataset.filenames())
    return annotations.to_input(transform, _sizes(path, annotations, dataset.filenames(absolute=True)))


def check_files(options: Mapping[str, Any]) -> None:
    """Read the files of annotations once before anything is measured.

    Raises:
        ValueError: If one cannot be read, or lacks what it is for: landmarks or boxes of parts, boxes of the objects.
    """
    if options.get("landmarks") and not read_annotations(options["landmarks"]).point_names:
        raise ValueError(
            f"{options['landmarks']} has no landmarks: columns NAME_x and NAME_y, or boxes of parts besides 'box'; see "
            "docs/annotations.md. For boxes of whole objects use --boxes, in Python boxes=..."
        )
    if options.get("boxes"):
        read_annotations(options["boxes"]).object_boxes()


def _sizes(path: Any, annotations: Annotations, files: Sequence[str]) -> Tensor:
    """Width and height of the pictures [images, 2]: as the file says, where it does not as the pictures themselves.

    Raises:
        ValueError: If the two differ, so that the coordinates belong to other pictures or to pictures before turning.
    """
    sizes = annotations.sizes.clone()
    for row, name in enumerate(files):
        if not Path(name).is_file():  # in an archive
            continue
        given, found = sizes[row].tolist(), upright_size(Path(name))
        if not math.isnan(given[0]) and tuple(given) != found:
            raise ValueError(
                f"{path}: {annotations.files[row]} is said to have {given[0]:g} x {given[1]:g} pixels, but has "
                f"{found[0]} x {found[1]}; coordinates are those of the picture as viewers show it, turned upright by "
                "its EXIF orientation and not resized."
            )
        sizes[row] = torch.tensor(found, dtype=sizes.dtype, device="cpu")
    return sizes


def instability(subject: Subject) -> metrics.LocationInstability:
    """How steady each filter's place is beside the landmarks."""
    landmarks = read_for(subject, "landmarks").points
    peaks = collect_peaks(subject.model, subject.loader, progress=subject.tick)
    return metrics.location_instability(peaks, landmarks, subject.num_classes)


def interpretability(subject: Subject) -> PartInterpretability | None:
    """How often each filter fits a part; None if the file has no boxes of parts."""
    names, parts = read_for(subject, "landmarks").part_boxes()
    if not names:
        return None
    return part_interpretability(subject.model, subject.loader, parts, subject.num_classes, progress=subject.tick)


def localisation(subject: Subject) -> dict[str, metrics.Localisation]:
    """Each map that the model has against the boxes of the objects, and the answer "everywhere"."""
    boxes = read_for(subject, "boxes").object_boxes()
    images, _ = next(iter(subject.loader))
    size = (int(images.shape[2]), int(images.shape[3]))
    found = {"whole_image": metrics.whole_image(boxes, subject.seen.targets, size)}
    methods: dict[str, Any] = {"gradmap": gradmap, "activmap": activmap, "cam": cam_localisation}
    for name, method in methods.items():
        try:
            found[name] = method(subject.model, subject.loader, boxes, progress=subject.tick)
        except ValueError as error:  # tokens, or a head without a weight for each class
            _logger.info("%s: %s", name, error)
    return found
