"""Landmarks and boxes of objects and their parts: read them from CSV or JSON, and bring them into a model's input.

The format is described in docs/annotations.md. Pixel i covers [i, i + 1), so a box from 10 to 20 has its centre at 15.
"""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from timm_csg.measuring.geometry import input_geometry
from timm_csg.metrics.display import in_one_line

_CORNERS = ("x0", "y0", "x1", "y1")
_FILE_NAMES = ("file", "image")


@in_one_line
@dataclass(frozen=True)
class Annotations:
    """Points and boxes of a set of pictures; NaN where a picture lacks one.

    Attributes:
        files: Name of each picture, as in the file.
        box_names: Names of the boxes; ``"box"`` is that of the whole object.
        boxes: x0, y0, x1, y1 in pixels, float32 [images, boxes, 4].
        point_names: Names of the landmarks: points of the file, then the centres of all boxes but ``"box"``.
        points: x, y in pixels, float32 [images, points, 2].
        sizes: Width and height of the picture where the file tells them, float32 [images, 2].
    """

    files: tuple[str, ...]
    box_names: tuple[str, ...]
    boxes: Tensor
    point_names: tuple[str, ...]
    points: Tensor
    sizes: Tensor

    def select(self, files: Iterable[str]) -> Annotations:
        """The annotations of these pictures in this order, for example of ``dataset.filenames()``.

        Args:
            files: Names of picture files: paths below the data set's folder.

        Returns:
            Annotations with a row for each.

        Raises:
            ValueError: If a picture has no annotation; set up NaN rows yourself if that is meant.
        """
        row = {_plain_path(name): index for index, name in enumerate(self.files)}
        wanted = tuple(files)
        missing = [name for name in wanted if _plain_path(name) not in row]
        if missing:
            raise ValueError(
                f"{len(missing)} of {len(wanted)} pictures have no annotation, the first is {missing[0]!r}; the names "
                f"in the annotations look like {self.files[0]!r}: paths below the data set's folder."
            )
        rows = [row[_plain_path(name)] for name in wanted]
        return Annotations(
            wanted, self.box_names, self.boxes[rows], self.point_names, self.points[rows], self.sizes[rows]
        )

    def part_boxes(self) -> tuple[tuple[str, ...], Tensor]:
        """Names and boxes [images, parts, 4] of the parts: all boxes but the object's own."""
        kept = [index for index, name in enumerate(self.box_names) if name != "box"]
        return tuple(self.box_names[index] for index in kept), self.boxes[:, kept]

    def object_boxes(self) -> Tensor:
        """Boxes of the whole objects [images, 4].

        Raises:
            ValueError: If the file has none.
        """
        if "box" not in self.box_names:
            raise ValueError(
                f"there is no box named 'box' (the box of the whole object); the boxes are {', '.join(self.box_names)}."
            )
        return self.boxes[:, self.box_names.index("box")]

    def to_input(self, transform: Any, sizes: Tensor | None = None) -> Annotations:
        """The annotations as the model sees them, behind a transform that resizes and crops.

        Points outside the input become NaN, boxes are cut at its border, and NaN if nothing of them is left.

        Args:
            transform: An evaluation transform, for example ``timm.data.create_transform(...)``.
            sizes: Width and height of the pictures [images, 2], if the annotation file does not tell them.

        Returns:
            Annotations in pixels of the model's input.

        Raises:
            ValueError: If sizes are missing, or the transform has random or unknown steps.
        """
        sizes = self.sizes if sizes is None else sizes
        if sizes.isnan().any():
            raise ValueError(
                f"the size of {int(sizes.isnan().any(1).sum())} pictures is unknown; add the columns width and height, "
                "or pass sizes."
            )
        known = {size: input_geometry(transform, int(size[0]), int(size[1])) for size in map(tuple, sizes.tolist())}
        found = [known[size] for size in map(tuple, sizes.tolist())]
        scale = torch.tensor([g.scale for g in found], device="cpu")
        offset = torch.tensor([g.offset for g in found], device="cpu")
        input_sizes = torch.tensor([g.size for g in found], dtype=torch.float32, device="cpu")
        points = self.points * scale[:, None] + offset[:, None]
        outside = ((points < 0) | (points > input_sizes[:, None])).any(dim=-1)
        points = points.masked_fill(outside[..., None], math.nan)
        corners = self.boxes.unflatten(-1, (2, 2)) * scale[:, None, None] + offset[:, None, None]
        corners = torch.minimum(corners.clamp_min(0), input_sizes[:, None, None])
        empty = (corners[..., 1, :] <= corners[..., 0, :]).any(dim=-1)
        boxes = corners.flatten(-2).masked_fill(empty[..., None], math.nan)
        return Annotations(self.files, self.box_names, boxes, self.point_names, points, input_sizes)


def read_annotations(path: str | Path) -> Annotations:
    """Read landmarks and boxes from a CSV or JSON file; one row or record for each picture, or for each point.

    Args:
        path: A file ending in ``.csv`` or ``.json``, see docs/annotations.md.

    Returns:
        The annotations.

    Raises:
        ValueError: If the file does not exist or is not in the format; the message names file, line and column.
    """
    path = Path(path).expanduser()
    if path.suffix.lower() not in (".csv", ".json"):
        raise ValueError(f"{path} must end in .csv or .json, the supported annotation formats.")
    if not path.is_file():
        raise ValueError(f"there is no file of annotations {path}.")
    records = _read_csv(path) if path.suffix.lower() == ".csv" else _read_json(path)
    if not records:
        raise ValueError(f"{path} has no annotations; it needs at least one row below the header.")
    point_names = list(dict.fromkeys(name for record in records for name in record.points))
    box_names = list(dict.fromkeys(name for record in records for name in record.boxes))
    double = [name for name in box_names if name in point_names]
    if double:
        raise ValueError(f"{path}: {double[0]!r} is both a point and a box; give them different names.")
    nan = math.nan
    boxes = torch.tensor(
        [[record.boxes.get(name, [nan] * 4) for name in box_names] for record in records], device="cpu"
    )
    boxes = boxes.reshape(len(records), len(box_names), 4)
    points = torch.tensor(
        [[record.points.get(name, [nan] * 2) for name in point_names] for record in records], device="cpu"
    )
    parts = [index for index, name in enumerate(box_names) if name != "box"]
    centres = (boxes[:, parts, :2] + boxes[:, parts, 2:]) / 2
    return Annotations(
        files=tuple(record.file for record in records),
        box_names=tuple(box_names),
        boxes=boxes,
        point_names=(*point_names, *(box_names[index] for index in parts)),
        points=torch.cat([points.reshape(len(records), len(point_names), 2), centres], dim=1),
        sizes=torch.tensor([record.size for record in records], device="cpu"),
    )


@dataclass
class _Record:
    file: str
    size: list[float]
    boxes: dict[str, list[float]]
    points: dict[str, list[float]]


def _plain_path(name: str) -> str:
    return name.replace("\\", "/").removeprefix("./")


def _read_csv(path: Path) -> list[_Record]:
    with path.open(newline="", encoding="utf-8-sig") as file:
        reader = csv.DictReader(file)
        header = list(reader.fieldnames or [])
        file_column = next((name for name in _FILE_NAMES if name in header), None)
        if file_column is None:
            raise ValueError(f"{path}, line 1: no column 'file' or 'image'; the header is {', '.join(header)!r}.")
        long = {"part", "x", "y"} <= set(header)
        groups = {"": ("x", "y")} if long else _groups(path, header)
        records: dict[str, _Record] = {}
        for row in reader:
            where = f"{path}, line {reader.line_num}"
            name = (row[file_column] or "").strip()
            if not name:
                raise ValueError(f"{where}, column {file_column!r}: the name of the picture is empty.")
            if name in records and not long:
                raise ValueError(f"{where}, column {file_column!r}: {name!r} appears twice; keep one row per picture.")
            size = [_number(row.get(column), f"{where}, column {column!r}") for column in ("width", "height")]
            record = records.setdefault(name, _Record(name, size, {}, {}))
            for group, ends in groups.items():
                values = _values(row, [f"{group}_{end}" if group else end for end in ends], where)
                part = (row["part"] or "").strip() if long else group
                if not part:
                    raise ValueError(f"{where}, column 'part': the name of the part is empty.")
                if long and part in record.points:
                    raise ValueError(f"{where}, column 'part': {name!r} has the part {part!r} twice.")
                (record.boxes if len(ends) == 4 else record.points)[part] = values
    return list(records.values())


def _groups(path: Path, header: Sequence[str]) -> dict[str, tuple[str, ...]]:
    """Names of boxes and points with the ends of their columns."""
    groups: dict[str, tuple[str, ...]] = {}
    for column in header:
        name, _, end = column.rpartition("_")
        if not name or end not in (*_CORNERS, "x", "y"):
            continue
        ends = _CORNERS if end in _CORNERS else ("x", "y")
        lacking = [f"{name}_{other}" for other in ends if f"{name}_{other}" not in header]
        if lacking:
            raise ValueError(f"{path}, line 1, column {column!r}: it needs a column {lacking[0]!r} as well.")
        groups.setdefault(name, ends)
    if not groups:
        raise ValueError(
            f"{path}, line 1: no landmarks; expected columns part, x, y, or NAME_x, NAME_y, or NAME_x0, NAME_y0, "
            f"NAME_x1, NAME_y1, but the header is {', '.join(header)!r}."
        )
    return groups


def _number(text: Any, where: str) -> float:
    if text is None or str(text).strip() == "":
        return math.nan
    try:
        value = float(text)
    except (TypeError, ValueError):
        value = math.inf
    if isinstance(text, bool) or math.isinf(value):
        raise ValueError(f"{where}: expected a number of pixels, but found {text!r}.")
    return value


def _values(row: dict[str, Any], columns: Sequence[str], where: str) -> list[float]:
    values = [_number(row.get(column), f"{where}, column {column!r}") for column in columns]
    empty = [column for column, value in zip(columns, values, strict=True) if math.isnan(value)]
    if empty and len(empty) < len(columns):
        raise ValueError(
            f"{where}, column {empty[0]!r} is empty, but its neighbours are not; fill in all of them or none."
        )
    _check_box(values, f"{where}, column {columns[0]!r}")
    return values


def _check_box(values: Sequence[float], where: str) -> None:
    if len(values) == 4 and (values[2] <= values[0] or values[3] <= values[1]):
        raise ValueError(f"{where}: a box is x0, y0, x1, y1 with x0 < x1 and y0 < y1, but this is {list(values)}.")


def _read_json(path: Path) -> list[_Record]:
    try:
        entries = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}, line {error.lineno}, column {error.colno}: not JSON ({error.msg}).") from error
    if not isinstance(entries, list):
        raise ValueError(f"{path}: expected a list of records, one per picture.")
    records: dict[str, _Record] = {}
    for number, entry in enumerate(entries):
        where = f"{path}, record {number}"
        name = next((entry[key] for key in _FILE_NAMES if key in entry), None) if isinstance(entry, dict) else None
        if not isinstance(name, str) or not name:
            raise ValueError(f"{where}: expected an object with the name of the picture in 'file' or 'image'.")
        if name in records:
            raise ValueError(f"{where}, key 'file': {name!r} appears twice; keep one record per picture.")
        size = [_number(entry.get(key), f"{where}, key {key!r}") for key in ("width", "height")]
        record = records.setdefault(name, _Record(name, size, {}, {}))
        objects = entry.get("objects")
        chosen = entry if objects is None else _main_object(objects, where)
        for key, value in chosen.items():
            if isinstance(value, list) and len(value) in (2, 4) and key != "objects":
                values = [_number(item, f"{where}, key {key!r}") for item in value]
                _check_box(values, f"{where}, key {key!r}")
                (record.boxes if len(values) == 4 else record.points)[key] = values
    return list(records.values())


def _main_object(objects: Any, where: str) -> dict[str, Any]:
    """Of several objects the one marked as the main one, else the first."""
    if not isinstance(objects, list) or not all(isinstance(item, dict) for item in objects):
        raise ValueError(f"{where}, key 'objects': expected a list of objects with boxes and points.")
    return next((item for item in objects if item.get("main")), objects[0] if objects else {})
