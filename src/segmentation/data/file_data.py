"""FileData: samples whose images and masks lie in files, however these were found."""

from abc import abstractmethod
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from segmentation.data.base import SPLITS, Sample, SegmentationData
from segmentation.data.files import read_image, read_mask
from segmentation.data.labels import Labels
from segmentation.data.layout import Files
from segmentation.data.values import ClassesMissing, Value, codes_of, count_values
from segmentation.errors import InputError


class FileData(SegmentationData):
    """Samples whose images and masks lie in files. What the images are like, where it is not declared, the first one
    says; the others must be so too.

    Args:
        classes: as `Labels.parse` takes them.
        ignore: mask value, or list of values, of pixels that count nowhere (void).
        channels: bands of the images; null: those of the first.
        task: `binary` or `multiclass`; null: two classes are binary.
        files: split -> name -> kind -> files.
        scale: what stands for 1.0; null: the largest integer of the images' type, 1 for floats.
        mask_threshold: gray level from which a mask's pixel is of the class with the larger value, for masks that were
            saved as JPEG or smoothed.
        as_rgb: take gray, palette, RGBA and CMYK pictures as RGB.
        folders_name_classes: whether a sample's folder names the class of what is not 0 in its mask.

    Raises:
        InputError: no image can be read; classes are not declared, or not two where a mask has only two values.
    """

    @abstractmethod  # a subclass says which files
    def __init__(
        self,
        classes: dict[str, Any] | None,
        ignore: Value | list[Value] | None,
        channels: int | None,
        task: str | None,
        files: dict[str, dict[str, Files]],
        scale: float | None = None,
        mask_threshold: int | None = None,
        folders_name_classes: bool = False,
        as_rgb: bool = False,
    ) -> None:
        self.files, self.as_rgb = files, as_rgb
        self._names = {split: list(files.get(split, {})) for split in SPLITS}
        self.mask_threshold, self.folders_name_classes = mask_threshold, folders_name_classes
        first = self._first_image(channels)
        if classes is None:
            raise ClassesMissing(self._mask_values())
        labels = Labels.parse(classes, ignore, len(first), task)
        super().__init__(replace(labels, dtype=str(first.dtype), scale=scale))
        self.of_objects = any(len(sample["mask"]) > 1 for split in files.values() for sample in split.values())
        self.two_valued = mask_threshold is not None or folders_name_classes or self.of_objects
        if self.two_valued and (labels.by_color or (labels.num_classes != 2 and not folders_name_classes)):
            raise InputError(
                "masks of objects, and mask_threshold, tell two classes apart, of integer values; declared are "
                f"{', '.join(labels.names)}. For more, name folders after the classes: {{class}} in images and masks"
            )

    def names(self, split: str) -> list[str]:
        return self._names[split]

    def load(self, split: str, index: int) -> Sample:
        name = self._names[split][index]
        files = self.files[split][name]
        path = files["image"][0]
        image = torch.from_numpy(read_image(path, self.labels.channels, self.as_rgb))
        if str(image.numpy().dtype) != self.labels.dtype:
            raise InputError(
                f"{path}: is {image.numpy().dtype}, but the first image is {self.labels.dtype}. Save all as one type"
            )
        masks = [read_mask(mask, self.labels.by_color) for mask in files["mask"]]
        for mask, values in zip(files["mask"], masks, strict=True):
            _check_size(mask, values.shape[:2], path, tuple(image.shape[1:]))
        values = self._two_valued(masks, name, files["mask"][0]) if self.two_valued else masks[0]
        sample = Sample(image=image, mask=torch.from_numpy(self.labels.encode(values, str(files["mask"][0]))))
        if "instance" in files:
            ids = read_mask(files["instance"][0])
            if ids.ndim != 2:
                raise InputError(f"{files['instance'][0]}: is a colour image. Save one id an individual, 0 for none")
            _check_size(files["instance"][0], ids.shape, path, tuple(image.shape[1:]))
            sample["instance"] = torch.from_numpy(ids.astype(np.int64))
        elif self.of_objects:
            ids = np.zeros(image.shape[1:], np.int64)
            for number, mask in enumerate(masks, start=1):
                ids[mask >= (self.mask_threshold or 1)] = number
            sample["instance"] = torch.from_numpy(ids)
        return sample

    def fingerprint(self, split: str) -> str:
        stats = [(str(p), p.stat()) for files in self.files[split].values() for paths in files.values() for p in paths]
        options = (self.labels, self.mask_threshold, self.folders_name_classes, self.as_rgb)
        return repr((options, [(path, stat.st_size, stat.st_mtime_ns) for path, stat in stats]))

    def _first_image(self, channels: int | None) -> np.ndarray:
        """The first training image that can be read."""
        errors = []
        for files in list(self.files["train"].values())[:20]:
            try:
                return read_image(files["image"][0], channels, self.as_rgb)
            except InputError as error:
                errors.append(error)
        raise errors[0]

    def _two_valued(self, masks: list[np.ndarray], name: str, path: Path) -> np.ndarray:
        """Declared values of masks that only tell an object from the ground."""
        labels = self.labels
        if any(mask.ndim != 2 for mask in masks):
            raise InputError(f"{path}: is a colour image, but its object is told by a gray level. Save it as gray")
        values = np.maximum.reduce(masks)
        ground, thing = sorted((0, 1), key=lambda index: labels.values[index][0])
        if self.folders_name_classes:
            folder = name.partition("/")[0]
            if folder not in labels.names:
                raise InputError(
                    f"{path}: its folder {folder!r} names no class. Declared: {', '.join(labels.names)}. "
                    "Rename the folder, or declare the class"
                )
            ground, thing = 0, labels.names.index(folder)
        declared = np.where(values >= (self.mask_threshold or 1), labels.values[thing][0], labels.values[ground][0])
        return declared if self.mask_threshold else np.where(np.isin(values, labels.ignore), values, declared)

    def _mask_values(self) -> dict[Value, int]:
        """Value -> pixels, of some training masks."""
        counts: dict[Value, int] = {}
        files = [paths["mask"][0] for paths in self.files["train"].values()]
        for path in files[:: max(1, len(files) // 20)]:
            mask = read_mask(path)
            for value, pixels in count_values(codes_of(mask), mask.ndim == 3).items():
                counts[value] = counts.get(value, 0) + pixels
        return counts


def _check_size(path: Path, size: tuple[int, ...], image: Path, image_size: tuple[int, ...]) -> None:
    if size != image_size:
        raise InputError(
            f"{path}: is {size[1]}x{size[0]} pixels, but its image {image.name} is {image_size[1]}x{image_size[0]}. "
            "Save both at one size (masks by nearest neighbour)"
        )
