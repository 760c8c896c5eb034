"""FolderData: images and masks in folders of files, which is what most people have."""

import os
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from segmentation.data.base import SPLITS, Sample, SegmentationData
from segmentation.data.io import read_image, read_mask
from segmentation.data.labels import ClassesMissing, Labels, Value, codes_of, count_values
from segmentation.data.layout import Files, Pattern, listed, pair, read_list
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
        ignore: mask value, or list of values, of pixels that count nowhere (void); null: none.
        channels: bands of the images; null: those of the first image.
        images: folder of the images below root, or a pattern of their paths, with `{split}` where each split has its
            own. By default `{split}/images` where root/train exists, else `images`.
        masks: folder or pattern of the masks, likewise.
        instances: folder or pattern of masks that hold one id an individual (0 for none), or null.
        splits: what `{split}` stands for where folders or lists have other names, e.g. {val: validation}.
        lists: list files below root: "{split}.txt", one image name a line; or one "all.csv" with columns `name` and
            `split`.
        val_fraction: share to validate on, of the pool, or of train where there is no val; null: 0.2 of a pool.
        test_fraction: share of the pool to test on.
        split_seed: seed of that division.
        group: regular expression; samples whose names it finds the same text in (its first group, if it has one) are
            of one patient, video or slide, and never divided.
        scale: what stands for 1.0 in an image, e.g. 4095 for 12 bits; null: the largest integer of its type.
        mask_threshold: gray level from which a mask's pixel is foreground: for masks saved as JPEG.
        as_rgb: take gray, palette, RGBA and CMYK pictures as RGB: photographs from the web come mixed.

    Raises:
        InputError: a folder is missing, a split is empty, no image can be read; classes are not declared, or not two
            where a mask has only two values. Single files that cannot be used are listed in `problems`.
    """

    def __init__(
        self,
        root: str,
        classes: dict[str, Value | list[Value] | dict[str, Value | list[Value]]] | None = None,
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
            self.group_pattern = re.compile(group or "")
        except re.error as error:
            raise InputError(f"group {group!r} is no regular expression ({error}), e.g. group: '^[^_]+'") from error
        self.called = {split: (splits or {}).get(split, split) for split in SPLITS}
        prefix = "{split}/" if (self.root / self.called["train"]).is_dir() else ""
        patterns = {"image": images or f"{prefix}images", "mask": masks or f"{prefix}masks", "instance": instances}
        self.patterns = {kind: pattern for kind, pattern in patterns.items() if pattern}
        self.lists, self.mask_threshold, self.as_rgb = lists, mask_threshold, as_rgb
        #: Whether images of each split have a folder of their own.
        self.apart = "{split}" in self.patterns["image"]
        #: Whether a sample's folder names the class of what is not 0 in its mask.
        self.folders_name_classes = "{class}" in self.patterns["image"]
        self._check_options()
        self.files, problems = self._find()
        self._divide(val_fraction, test_fraction, split_seed)
        for split in ("train", "val"):
            if not self.files.get(split):
                remedy = f"{problems[0]} (nothing is left in the {split} split)" if problems else self._remedy(split)
                raise InputError(remedy)
        first = self._first_image(channels)
        if classes is None:
            raise ClassesMissing(self._mask_values())
        super().__init__(replace(Labels.parse(classes, ignore, len(first)), dtype=str(first.dtype), scale=scale))
        self.problems = problems
        self.of_objects = any(len(files["mask"]) > 1 for split in self.files.values() for files in split.values())
        self.two_valued = mask_threshold is not None or self.folders_name_classes or self.of_objects
        plain = self.labels.num_classes == 2 or self.folders_name_classes
        if self.two_valued and (self.labels.by_color or not plain):
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
        values = self._two_valued(np.maximum.reduce(masks), name) if self.two_valued else masks[0]
        index_mask = self.labels.encode(values, str(files["mask"][0]))
        sample = Sample(image=torch.from_numpy(image), mask=torch.from_numpy(index_mask))
        if "instance" in files:
            ids = read(files["instance"][0]).astype(np.int64)
            if ids.ndim != 2:
                raise InputError(f"{files['instance'][0]}: is a colour image. Save one id an individual, 0 for none")
            sample["instance"] = torch.from_numpy(ids)
        elif self.of_objects:
            ids = np.zeros(image.shape[1:], np.int64)
            for number, mask in enumerate(masks, start=1):
                ids[mask >= (self.mask_threshold or 1)] = number
            sample["instance"] = torch.from_numpy(ids)
        return sample

    def fingerprint(self, split: str) -> str:
        paths = [p for files in self.files[split].values() for paths in files.values() for p in paths]
        options = (self.labels, self.mask_threshold, self.folders_name_classes, self.as_rgb)
        return repr((options, [_stamp(path) for path in paths]))

    def group(self, name: str) -> str:
        match = self.group_pattern.search(name) if self.group_pattern.pattern else None
        return match[min(1, self.group_pattern.groups)] if match else name

    def _check_options(self) -> None:
        if self.lists and "{split}" not in self.lists and not self.lists.endswith(".csv"):
            raise InputError(f'lists is {self.lists!r}: each split needs a list of its own, e.g. "{{split}}.txt"')
        if not self.apart and not self.lists and any("{split}" in pattern for pattern in self.patterns.values()):
            raise InputError(f"{self.patterns}: {{split}} stands in other folders, but not in that of the images")
        if len({"{class}" in pattern for pattern in self.patterns.values()}) > 1:
            raise InputError(f"{self.patterns}: {{class}} must stand in all of them, or in none")

    def _find(self) -> tuple[dict[str, dict[str, Files]], list[str]]:
        """The samples of each split, and what is wrong with files; all are `train` where nothing tells the splits."""
        found: dict[str, dict[str, Files]] = {}
        problems: list[str] = []
        for split in SPLITS if self.apart or self.lists else ("train",):
            patterns = self._patterns(split)
            if split != "train" and not patterns["image"].folder.exists():
                continue
            for pattern in patterns.values():
                if not pattern.folder.is_dir():
                    raise InputError(
                        f"{pattern.folder}: no such folder. Set data.dataset.root, or the folder names images and masks"
                    )
            # Masks that all splits share may belong to another split's images.
            shared = {kind for kind, text in self.patterns.items() if self.apart and "{split}" not in text}
            samples, wrong = pair(patterns, shared)
            if self.lists:
                path = self._list(split)
                if not path.is_file():
                    continue
                lines = read_list(path, self.called[split])
                samples, wrong = listed(path, lines, samples, [p.folder for p in patterns.values()]), []
            found[split] = samples
            problems += wrong
        return found, problems

    def _patterns(self, split: str) -> dict[str, Pattern]:
        return {kind: Pattern(self.root, text, self.called[split]) for kind, text in self.patterns.items()}

    def _list(self, split: str) -> Path:
        return self.root / str(self.lists).replace("{split}", self.called[split])

    def _divide(self, val: float | None, test: float, seed: int) -> None:
        """Take fractions of what there is to train on, for splits that are not given."""
        given = [split for split in ("val", "test") if self.files.get(split)]
        if ("val" in given and val is not None) or ("test" in given and test):
            raise InputError(f"{self.root}: has a split {' and '.join(given)} of its own: take the fraction away")
        if not (given or self.apart or self.lists) and val is None:
            val = 0.2
        pool = self.files.get("train")
        if not pool or val is None:
            return
        if not 0 < val < 1 or not 0 <= test < 1 or val + test >= 1:
            raise InputError(f"val_fraction {val} and test_fraction {test} must be shares that leave some to train on")
        names = list(pool)
        shares = {"val": val, "test": test} if test else {"val": val}
        parts = divide(names, list(shares.values()), self.group, seed)
        for split, indices in zip([*shares, "train"], parts, strict=True):
            self.files[split] = {names[i]: pool[names[i]] for i in indices}

    def _remedy(self, split: str) -> str:
        """What to do about an empty split."""
        empty = f"{self.root}: the {split} split is empty."
        if self.lists:
            return f"{empty} List its images in {self._list(split)}, one name a line"
        if not self.apart:
            return f"{empty} It takes two images or more, and a val_fraction that leaves some to train on"
        folders = {kind: pattern.folder for kind, pattern in self._patterns(split).items()}
        fraction = ", or keep a part of train: val_fraction: 0.2" if split == "val" else ""
        return (
            f"{empty} Put images into {folders['image']} and their masks into {folders['mask']}, or say what the "
            f"folders are called, e.g. splits: {{val: valid}}{fraction}"
        )

    def _first_image(self, channels: int | None) -> np.ndarray:
        """The first training image that can be read."""
        errors = []
        for files in list(self.files["train"].values())[:20]:
            try:
                return read_image(files["image"][0], channels, self.as_rgb)
            except InputError as error:
                errors.append(error)
        raise errors[0]

    def _two_valued(self, values: np.ndarray, name: str) -> np.ndarray:
        """Declared values of a mask that only tells an object from the ground."""
        labels = self.labels
        ground, thing = sorted([values[0] for values in labels.values[:2]], key=int)
        if self.folders_name_classes:
            folder = name.partition("/")[0]
            if folder not in labels.names:
                raise InputError(
                    f"{self.root}: the folder {folder!r} names no class. Declared: {', '.join(labels.names)}. "
                    "Rename the folder, or declare the class"
                )
            ground, thing = labels.values[0][0], labels.values[labels.names.index(folder)][0]
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


def _stamp(path: Path) -> tuple[str, int, int]:
    """What changes when a file does. (A link that leads nowhere has none; the statistics names it.)"""
    try:
        stat = path.stat()
    except OSError:
        return str(path), 0, 0
    return str(path), stat.st_size, stat.st_mtime_ns


def expand(root: str) -> Path:
    """A folder as users write it: with ~ and environment variables."""
    expanded = os.path.expanduser(os.path.expandvars(root))
    if unset := re.search(r"\$\{?(\w+)", expanded):
        name = unset.group(1)
        raise InputError(f"root is {root!r}, but the variable {name} is not set. Fix: export {name}=/path/to/your/data")
    return Path(expanded)
