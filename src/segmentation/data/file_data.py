"""FileData: samples whose images and masks lie in files, however these were found."""

from abc import abstractmethod
from collections import Counter
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

    Arguments are as `FolderData` has them, and `files`: split -> name -> kind -> files, and `folders_name_classes`:
    whether a sample's folder names the class of what is not 0 in its mask.

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
        image = read_image(path, self.labels.channels, self.as_rgb)
        if str(image.dtype) != self.labels.dtype:
            raise InputError(
                f"{path}: is {image.dtype}, but the first image is {self.labels.dtype}. Save all as one type"
            )

        def read(mask: Path, by_color: bool = False) -> np.ndarray:
            values = read_mask(mask, by_color)
            (height, width), (h, w) = values.shape[:2], image.shape[1:]
            if (height, width) != (h, w):
                raise InputError(
                    f"{mask}: is {width}x{height} pixels, but its image {path.name} is {w}x{h}. "
                    "Save both at one size (masks by nearest neighbour)"
                )
            return values

        masks = [read(mask, self.labels.by_color) for mask in files["mask"]]
        values = self._two_valued(masks, name, files["mask"][0]) if self.two_valued else masks[0]
        index_mask = self.labels.encode(values, str(files["mask"][0]))
        sample = Sample(image=torch.from_numpy(image), mask=torch.from_numpy(index_mask))
        ids = None
        if "instance" in files:
            ids = read(files["instance"][0]).astype(np.int64)
            if ids.ndim != 2:
                raise InputError(f"{files['instance'][0]}: is a colour image. Save one id an individual, 0 for none")
        elif self.of_objects:
            ids = np.zeros(image.shape[1:], np.int64)
            for number, mask in enumerate(masks, start=1):
                ids[mask >= (self.mask_threshold or 1)] = number
        if ids is not None:
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
        ground, thing = sorted([values[0] for values in labels.values[:2]], key=int)
        if self.folders_name_classes:
            folder = name.partition("/")[0]
            if folder not in labels.names:
                raise InputError(
                    f"{path}: its folder {folder!r} names no class. Declared: {', '.join(labels.names)}. "
                    "Rename the folder, or declare the class"
                )
            ground, thing = labels.values[0][0], labels.values[labels.names.index(folder)][0]
        values = np.maximum.reduce(masks)
        declared = np.where(values >= (self.mask_threshold or 1), thing, ground)
        return declared if self.mask_threshold else np.where(np.isin(values, labels.ignore), values, declared)

    def _mask_values(self) -> dict[Value, int]:
        """Value -> pixels, of some training masks."""
        counts: Counter[Value] = Counter()
        files = [paths["mask"][0] for paths in self.files["train"].values()]
        for path in files[:: max(1, len(files) // 20)]:
            mask = read_mask(path)
            counts.update(count_values(codes_of(mask), colors=mask.ndim == 3))
        return counts
