"""FolderData: images and masks as files in folders, one mask file or more per image.

A new file format goes into `segmentation.data.io`. Masks that are not files (RLE in a CSV, say) need a data set of your
own: subclass `SegmentationData`, as README.md ("Make it yours") shows.
"""

import os
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from itertools import chain
from pathlib import Path

import numpy as np
import torch

from segmentation.data.base import SPLITS, Sample, SegmentationData
from segmentation.data.io import read_image, read_mask
from segmentation.data.labels import ClassesMissing, Labels, Value, count_values
from segmentation.data.layout import Layout
from segmentation.data.splits import divide
from segmentation.errors import InputError


class FolderData(SegmentationData):
    """Images and masks in parallel folders, paired by name: `images/a/01.jpg` and `masks/a/01.png`; or in any layout
    that patterns of paths can say (see `segmentation.data.layout`).

    The splits come from folders (`images: "{split}/images"`), from list files (`lists: "{split}.txt"`), or from a
    fraction of one pool of images. A data set without `test` is tested on its validation split.

    Args:
        root: the data set's folder; environment variables and ~ are expanded.
        classes: name -> mask value, list of values, "#RRGGBB", or {value: ..., color: "#RRGGBB" to display it}.
        ignore: mask value, or list of values, of pixels that loss and metrics ignore (void).
        channels: channels of the images; null: those of the first image.
        images: folder of the images below root, or a pattern of their paths, with `{split}` where each split has its
            own. By default `{split}/images` where root/train exists, else `images`.
        masks: folder or pattern of the masks, likewise.
        instances: folder or pattern of masks that hold one id an instance (0 for none), or null.
        splits: what `{split}` stands for where folders or lists have other names, e.g. {val: validation}.
        lists: list files below root: "{split}.txt", one image name a line; or one "all.csv" with columns `name` and
            `split`.
        val_fraction: share to validate on, of the pool, or of train where there is no val; null: 0.2 of a pool.
        test_fraction: share of the pool to test on.
        split_seed: seed of that division.
        group: regular expression on sample names. Samples with the same match (of its first group, if it has one)
            belong together (one patient, video or slide) and always land in the same split.
        scale: pixel value that becomes 1.0, e.g. 4095 for 12 bits; null: the largest integer of the dtype.
        mask_threshold: gray level from which a mask's pixel is foreground: for masks saved as JPEG.
        as_rgb: take gray, palette, RGBA and CMYK pictures as RGB: photographs from the web come mixed.

    Raises:
        InputError: a folder is missing, a split is empty, no image can be read; classes are not declared, or not two
            where a mask has only two values. Single files that cannot be used are listed in `problems`.
    """

    def __init__(
        self,
        root: str,
        classes: dict[str, int | str | list | dict] | None = None,
        ignore: Value | Sequence[Value] = (),
        channels: int | None = None,
        images: str | None = None,
        masks: str | None = None,
        instances: str | None = None,
        splits: dict[str, str] | None = None,
        lists: str | None = None,
        val_fraction: float | None = None,
        test_fraction: float = 0.0,
        split_seed: int = 0,
        group: str | None = None,
        scale: float | None = None,
        mask_threshold: int | None = None,
        as_rgb: bool = False,
    ) -> None:
        self.root = expand(root)
        if not self.root.is_dir():
            raise InputError(f"{self.root}: no such folder. Set data.dataset.root to the data set's folder")
        try:
            self.group_pattern = re.compile(group) if group else None
        except re.error as error:
            raise InputError(f"group {group!r} is no regular expression ({error}), e.g. group: '^[^_]+'") from error
        called = {split: split for split in SPLITS} | (splits or {})
        prefix = "{split}/" if (self.root / called["train"]).is_dir() else ""
        patterns = {"image": images or f"{prefix}images", "mask": masks or f"{prefix}masks"}
        if instances:
            patterns["instance"] = instances
        self.layout = Layout(self.root, patterns, called, lists)
        self.mask_threshold = mask_threshold
        self.as_rgb = as_rgb
        #: Whether a sample's folder names the class of what is not 0 in its mask.
        self.folders_name_classes = "{class}" in patterns["image"]
        self.files, problems = self.layout.find()
        self._divide(val_fraction, test_fraction, split_seed)
        for split in ("train", "val"):
            if not self.files.get(split):
                reason = f"{problems[0]} (nothing is left in the {split} split)" if problems else self._fix(split)
                raise InputError(reason)
        first = self._first_image(channels)
        if classes is None:
            raise ClassesMissing(self._mask_values())
        super().__init__(replace(Labels.parse(classes, ignore, len(first)), dtype=str(first.dtype), scale=scale))
        self.problems = problems
        self.one_mask_per_object = False
        for samples in self.files.values():
            if any(len(files["mask"]) > 1 for files in samples.values()):
                self.one_mask_per_object = True
        #: Whether masks only tell objects from the background.
        self.binary_masks = mask_threshold is not None or self.folders_name_classes or self.one_mask_per_object
        two_classes = self.labels.num_classes == 2 or self.folders_name_classes
        if self.binary_masks and (self.labels.by_color or not two_classes):
            raise InputError(
                "masks of objects, and mask_threshold, tell two classes apart, of integer values; declared are "
                f"{', '.join(self.labels.names)}. For more, name folders after the classes: {{class}} in images, masks"
            )

    def names(self, split: str) -> list[str]:
        return list(self.files.get(split, {}))

    def load(self, split: str, index: int) -> Sample:
        name = self.names(split)[index]
        files = self.files[split][name]
        path = files["image"][0]
        image = read_image(path, self.labels.channels, self.as_rgb)
        if str(image.dtype) != self.labels.dtype:
            raise InputError(
                f"{path}: is {image.dtype}, but the first image is {self.labels.dtype}. Save all as one type"
            )
        masks = [read_mask(mask, self.labels.by_color) for mask in files["mask"]]
        ids = [read_mask(file).astype(np.int64) for file in files.get("instance", [])]
        for file, pixels in zip(files["mask"] + files.get("instance", []), masks + ids, strict=True):
            _check_size(file, pixels, path, image)
        values = np.maximum.reduce(masks)
        if self.binary_masks:
            values = self._declared(values, name)
        index_mask = self.labels.encode(values, str(files["mask"][0]))
        if self.one_mask_per_object and not ids:
            ids = [np.zeros(index_mask.shape, np.int64)]
            for number, mask in enumerate(masks, start=1):
                ids[0][mask >= (self.mask_threshold or 1)] = number
        sample = Sample(image=torch.from_numpy(image), mask=torch.from_numpy(index_mask))
        if ids:
            if ids[0].ndim != 2:
                raise InputError(f"{files['instance'][0]}: is a colour image. Save one id an instance, 0 for none")
            sample["instance"] = torch.from_numpy(ids[0])
        return sample

    def fingerprint(self, split: str) -> str:
        stamps = []
        for files in self.files[split].values():
            for path in chain.from_iterable(files.values()):
                stat = path.stat() if path.exists() else path.lstat()  # a link may lead nowhere
                stamps.append((str(path), stat.st_size, stat.st_mtime_ns))
        labels = self.labels
        if not self.folders_name_classes:  # no name and no colour changes what is counted
            labels = replace(labels, names=[], colors=[])
        return repr((labels, self.mask_threshold, self.folders_name_classes, self.as_rgb, stamps))

    def group(self, name: str) -> str:
        match = self.group_pattern.search(name) if self.group_pattern else None
        if match is None:
            return name
        return match[1] if match.groups() else match[0]

    def _divide(self, val: float | None, test: float, seed: int) -> None:
        """Take fractions of what there is to train on, for splits that are not given."""
        if (val is not None and self.files.get("val")) or (test and self.files.get("test")):
            raise InputError(f"{self.root}: has such a split of its own: take the fraction away")
        if val is None and not self.layout.has_splits:
            val = 0.2
        if val is None or not self.files.get("train"):
            return
        if not 0 < val < 1 or not 0 <= test < 1 or val + test >= 1:
            raise InputError(f"val_fraction {val} and test_fraction {test} must be shares that leave some to train on")
        pool = list(self.files["train"].items())
        parts = divide([self.group(name) for name, _ in pool], [val, test], seed)
        for split, part in zip(("val", "test", "train"), parts, strict=True):
            if part or split == "train":
                self.files[split] = dict(pool[index] for index in part)

    def _fix(self, split: str) -> str:
        """The message about an empty split."""
        empty = f"{self.root}: the {split} split is empty."
        if self.layout.lists:
            return f"{empty} List its images in {self.layout.lists[split]}, one name a line"
        if not self.layout.has_splits:
            return f"{empty} It takes two images or more, and a val_fraction that leaves some to train on"
        folders = " and ".join(str(pattern.folder) for pattern in self.layout.folders[split].values())
        return (
            f"{empty} Put its files into {folders}, or say what the folders are called, e.g. splits: {{val: valid}}, "
            "or keep a part of train: val_fraction: 0.2"
        )

    def _first_image(self, channels: int | None) -> np.ndarray:
        """The first training image that can be read."""
        errors = []
        for files in self.files["train"].values():
            try:
                return read_image(files["image"][0], channels, self.as_rgb)
            except InputError as error:
                errors.append(error)
        raise errors[0]

    def _declared(self, values: np.ndarray, name: str) -> np.ndarray:
        """A binary mask in declared values: background, and the class of the objects (or of the folder)."""
        labels = self.labels
        first = [int(values[0]) for values in labels.values]
        background, foreground = min(first), max(first)
        if self.folders_name_classes:
            folder = name.partition("/")[0]
            if folder not in labels.names:
                raise InputError(
                    f"{self.root}: the folder {folder!r} names no class. Declared: {', '.join(labels.names)}. "
                    "Rename the folder, or declare the class"
                )
            background, foreground = first[0], first[labels.names.index(folder)]
        declared = np.where(values >= (self.mask_threshold or 1), foreground, background)
        if self.mask_threshold is None:
            declared = np.where(np.isin(values, labels.ignore), values, declared)
        return declared

    def _mask_values(self) -> Counter[Value]:
        """Value -> pixels, of about twenty training masks."""
        counts: Counter[Value] = Counter()
        files = [files["mask"][0] for files in self.files["train"].values()]
        for path in files[:: max(1, len(files) // 20)]:
            counts += count_values(read_mask(path), str(path))
        return counts


def _check_size(file: Path, pixels: np.ndarray, path: Path, image: np.ndarray) -> None:
    height, width = pixels.shape[:2]
    h, w = image.shape[1:]
    if (height, width) != (h, w):
        raise InputError(
            f"{file}: is {width}x{height} pixels, but its image {path.name} is {w}x{h}. "
            "Save both at one size (masks by nearest neighbour)"
        )


def expand(root: str) -> Path:
    """A folder as users write it: with ~ and environment variables."""
    expanded = os.path.expanduser(os.path.expandvars(root))
    unset = re.search(r"\$\{?(\w+)", expanded)
    if unset:
        name = unset[1]
        raise InputError(f"root is {root!r}, but the variable {name} is not set. Fix: export {name}=/path/to/your/data")
    return Path(expanded)
