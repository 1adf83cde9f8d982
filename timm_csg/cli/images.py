"""How every command reads images; unreadable files and wrong labels are named."""

from __future__ import annotations

from typing import Any

from PIL import Image
from timm.data import ImageDataset
from torch.utils.data import Dataset

from timm_csg.pictures import ImageError, convert, shown, unreadable


class CheckedImages(Dataset[tuple[Any, int]]):
    """A map-style data set whose unreadable images and wrong labels are errors that name them.

    timm's own reader puts the next image in place of one that it cannot read, which counts that one twice.

    Args:
        dataset: From ``timm.data.create_dataset``, without transform.
        num_classes: Labels must be below.
        mode: ``"RGB"`` or ``"L"``: what every image is converted to.
        new_labels: For each label of this data set the one to give; None: they stay.
    """

    def __init__(
        self, dataset: Any, num_classes: int, *, mode: str = "RGB", new_labels: list[int] | None = None
    ) -> None:
        self.dataset, self.num_classes, self.mode, self.new_labels = dataset, num_classes, mode, new_labels
        self.transform: Any = None

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        try:
            image, target = self._read(index)
        except Exception as error:  # readers raise anything on bytes that are not an image
            raise unreadable(self.name(index), error) from error
        label = self._label(index, target)
        return (image if self.transform is None else self.transform(image)), label

    def name(self, index: int) -> str:
        """The file of an image, or its number if it has none."""
        if isinstance(self.dataset, ImageDataset):
            return shown(str(self.dataset.filename(index, absolute=True)))
        samples = getattr(self.dataset, "samples", None)
        return shown(str(samples[index][0])) if samples else f"image {index} of {type(self.dataset).__name__}"

    def _read(self, index: int) -> tuple[Any, Any]:
        if isinstance(self.dataset, ImageDataset):
            file, target, *_ = self.dataset.reader[index]
            with file, Image.open(file) as image:
                return convert(image, self.mode), target
        image, target = self.dataset[index]
        return (convert(image, self.mode) if isinstance(image, Image.Image) else image), target

    def _label(self, index: int, target: Any) -> int:
        if target is None or int(target) < 0:
            raise ImageError(f"{self.name(index)} has no label; is this a split for submissions?")
        label = int(target) if self.new_labels is None else self.new_labels[int(target)]
        if label >= self.num_classes:
            raise ImageError(
                f"{self.name(index)} has label {label}, but with {self.num_classes} classes labels end at "
                f"{self.num_classes - 1}; correct --num-classes or the label."
            )
        return label
