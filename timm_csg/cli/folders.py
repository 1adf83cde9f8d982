"""Folders of pictures: each folder that holds pictures is a class, numbered as timm numbers them.

Hidden folders are never classes, every file that Pillow reads is a picture whatever its suffix, and what is left out is
counted and named.
"""

from __future__ import annotations

import hashlib
import os
from collections import Counter
from pathlib import Path
from typing import BinaryIO

from timm.data.readers.reader import Reader
from timm.utils.misc import natural_key

from timm_csg.pictures import Found, find_pictures, shown, visible


class PictureFolder(Reader):  # type: ignore[misc]
    """The picture files below a folder and their labels, one folder for each class; a reader for timm's data sets.

    Classes have the names of the folders that hold pictures, in timm's order.

    Args:
        root: The folder of the class folders.
        fraction: Share of each class's pictures that is validation; None: the folder is one split.
        seed: Chooses them, by their names alone: the same everywhere, and nearly the same after pictures were added.
        is_training: Whether to use the other pictures.

    Attributes:
        samples: Files and labels, in timm's order.
        class_to_idx: Labels by name.
        empty: Folders beside the classes that hold no picture.

    Raises:
        ValueError: If there are no pictures, or the class of one is ambiguous.
    """

    def __init__(self, root: Path, *, fraction: float | None = None, seed: int = 0, is_training: bool = False) -> None:
        found = find_pictures(root)
        for stray in found.pictures.pop(Path(), []):
            found.ignore("pictures beside the class folders", stray)
        found.say_what_is_ignored(root)
        if not found.pictures:
            seen = found.summary() or "nothing"
            raise ValueError(f"{shown(str(root))} has no subfolder with pictures, one for each class; found {seen}.")
        _check_classes(root, found)
        self.root = root
        labels = {folder: shown(folder.name) for folder in found.pictures}
        self.class_to_idx = {name: index for index, name in enumerate(sorted(labels.values(), key=natural_key))}
        samples = []
        for folder, files in found.pictures.items():
            chosen = files if fraction is None else _part(folder, files, fraction, seed, is_training=is_training)
            samples += [(str(root / file), self.class_to_idx[labels[folder]]) for file in chosen]
        self.samples = sorted(samples, key=lambda sample: natural_key(sample[0]))
        used = {folder.parts[0] for folder in found.pictures}
        beside = [path.name for path in root.iterdir() if path.is_dir() and path.name not in used]
        self.empty = sorted(shown(name) for name in visible(root, beside, Path(), Found()) if name[0] != "_")

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> tuple[BinaryIO, int]:
        path, label = self.samples[index]
        return Path(path).open("rb"), label

    def _filename(self, index: int, basename: bool = False, absolute: bool = False) -> str:
        path = Path(self.samples[index][0])
        return path.name if basename else str(path if absolute else path.relative_to(self.root))


def _check_classes(root: Path, found: Found) -> None:
    """Refuse folders whose pictures could belong to several classes."""
    places: dict[Path, Path] = {}
    for folder in found.pictures:
        if (other := places.setdefault((root / folder).resolve(), folder)) != folder:
            raise ValueError(
                f"{shown(str(root / folder))} is {shown(str(other))} by another name (a link), so its pictures would "
                "be in two classes; remove the link."
            )
        above = next((parent for parent in folder.parents if parent in found.pictures), None)
        if above is not None:
            raise ValueError(
                f"{shown(str(root / above))} holds pictures and also the folder {shown(folder.name)} with pictures; a "
                "class is one folder: merge its pictures into one folder, or move those of another class elsewhere."
            )
    counts = Counter(shown(folder.name) for folder in found.pictures)
    twice = [name for name, count in counts.items() if count > 1]
    if twice:
        listed = ", ".join(shown(str(folder)) for folder in found.pictures if shown(folder.name) == twice[0])
        raise ValueError(f"{shown(str(root))} has several classes named {twice[0]!r}: {listed}; rename the folders.")


def _part(folder: Path, files: list[Path], fraction: float, seed: int, *, is_training: bool) -> list[Path]:
    """A class's pictures for training or for validation, at least one of each."""
    if len(files) < 2:
        raise ValueError(f"{shown(str(folder))} has only one picture; --val-fraction needs two or more per class.")
    order = sorted(files, key=lambda file: hashlib.sha256(f"{seed}/".encode() + os.fsencode(file)).digest())
    held_out = min(max(1, round(fraction * len(files))), len(files) - 1)
    return order[held_out:] if is_training else order[:held_out]
