"""FolderData: images as files in folders; masks as files, one or more per image, or described by files.

A new file format goes into `segmentation.data.io`, a new description of masks into `segmentation.data.annotations`.
Other data is a data set of your own: subclass `SegmentationData`, as README.md ("Make it yours") shows.
"""

import os
import re
from collections.abc import Sequence
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch

from segmentation.data.annotations import DESCRIPTIONS, Category, class_indices, file_of
from segmentation.data.base import SPLITS, Sample, SegmentationData
from segmentation.data.drawing import draw
from segmentation.data.io import check_format, hide_nodata, is_turned, read_image, read_mask
from segmentation.data.labels import IGNORE_INDEX, Labels, UndeclaredValues, count_values
from segmentation.data.layout import Samples, complete, find_samples, folder_of, no_such_folder
from segmentation.data.lists import choose_samples, describe_list, read_classes
from segmentation.data.mask_values import VOID, Counts, MaskValues, Value, add, code_of, describe, shorten
from segmentation.data.splits import divide
from segmentation.errors import InputError, Problem, plural


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
        masks: folder or pattern of the masks, likewise; with `{class}` in masks alone, a mask per class: the later
            class in `classes` wins, and the first is where there is no other.
            Or what describes masks: "instances_{split}.json" is COCO's, "train.csv" has run lengths, "{name}.json" is
            labelme's, "labels/{name}.txt" YOLO's.
        instances: folder or pattern of masks that hold one id per instance (0 for none), or null; or the same as masks,
            where that describes instances.
        valid: folder or pattern of masks that are 0 where pixels are ignored (outside the field of view), or null.
        splits: what `{split}` stands for where folders or lists have other names, e.g. {val: validation}.
        lists: list files, .txt, .csv, .yaml or .json: "{split}.txt", one image name per line; or one of all, with a
            column of names and a column of splits.
        val_fraction: share to validate on, of the pool, or of train where there is no val; null: 0.2 of a pool.
        test_fraction: share of the pool to test on.
        split_seed: seed of that division.
        group: regular expression on sample names. Samples with the same match (of its first group, if it has one)
            belong together (one patient, video or slide) and always land in the same split.
        scale: pixel value that becomes 1.0, e.g. 4095 for 12 bits; null: the largest integer of the dtype.
        mask_threshold: gray level from which a mask's pixel is foreground: 128 for masks saved as JPEG, or smeared by
            resizing; 1 for masks of instances' ids.
        mask_tolerance: how far, in each channel, a mask's pixel may be from the nearest declared value or colour, whose
            class it becomes: for masks with smooth edges.
        resize_masks: bring masks of another size to that of their image, by nearest neighbour.
        as_rgb: take gray, palette, RGBA and CMYK pictures as RGB: photographs from the web come mixed.
        nodata: pixel value that means no data, as NaN does, e.g. -9999: such pixels are 0 and ignored; null: none.

    Raises:
        InputError: a folder is missing, a split is empty, no image can be read; classes are not declared, or not two
            where a mask has only two values. Single files that cannot be used are listed in `problems`.
    """

    def __init__(
        self,
        root: str,
        classes: dict[str | int, int | str | list | dict] | list | None = None,
        ignore: Value | Sequence[Value] = (),  # with null, jsonargparse would take "#000000" for a comment
        channels: int | None = None,
        images: str | None = None,
        masks: str | None = None,
        instances: str | None = None,
        valid: str | None = None,
        splits: dict[str, str] | None = None,
        lists: str | None = None,
        val_fraction: float | None = None,
        test_fraction: float = 0.0,
        split_seed: int = 0,
        group: str | None = None,
        scale: float | None = None,
        mask_threshold: int | None = None,
        mask_tolerance: int = 0,
        resize_masks: bool = False,
        as_rgb: bool = False,
        nodata: float | None = None,
    ) -> None:
        self.root = expand(root)
        if not self.root.is_dir():
            raise no_such_folder(self.root, "Set data.dataset.root to the data set's folder")
        self.group_pattern = _compile(group)
        self.mask_threshold = mask_threshold
        self.resize_masks = resize_masks
        self.as_rgb = as_rgb
        self.nodata = nodata
        called = {split: split for split in SPLITS} | (splits or {})
        prefix = "{split}/" if (self.root / called["train"]).is_dir() else ""
        patterns = {
            "image": images or f"{prefix}images",
            "mask": masks or f"{prefix}masks",
            "instance": instances,
            "validity mask": valid,
        }
        #: Kind of files -> where they are.
        self.patterns: dict[str, str] = {kind: pattern for kind, pattern in patterns.items() if pattern}
        #: Whether the path of a mask names the class of what is not 0 in it.
        self.paths_name_classes = "{class}" in self.patterns["mask"]
        declared: Any = classes
        if declared is None:
            train = complete(self.root, self.patterns["image"], called["train"])
            declared = read_classes(folder_of(train) / "_classes.csv")
        problems = self._find_files(called, lists, list(map(str, declared)))
        if val_fraction is None:
            is_pool = lists is None and "{split}" not in "".join(self.patterns.values())
            val_fraction = 0.2 if is_pool else 0.0
        self._divide(val_fraction, test_fraction, split_seed)
        self._refuse_empty(called, lists, problems)
        #: Of each split the files of its samples, so that `load` need not go through all names.
        self.samples = {split: list(files.values()) for split, files in self.files.items()}
        first = self._first_image(channels)
        labels = self._read_classes(declared, ignore)
        super().__init__(
            replace(labels, channels=len(first), dtype=str(first.dtype), scale=scale, tolerance=mask_tolerance)
        )
        self.problems = problems

    def names(self, split: str) -> list[str]:
        return list(self.files[split])

    def load(self, split: str, index: int) -> Sample:
        files = self.samples[split][index]
        path = files["image"][0]
        image = read_image(path, self.labels.channels, self.as_rgb)
        if image.dtype != self.labels.dtype:
            raise InputError(
                f"{path}: is {image.dtype}, but the first image is {self.labels.dtype}. Save all as one type"
            )
        image, hidden = hide_nodata(image, self.nodata, path)
        size = image.shape[1:]
        source = files["mask"][0]

        def read(file: Path, by_color: bool = False) -> np.ndarray:
            return self._fit(file, read_mask(file, by_color), path, size)

        if self.categories:
            index_mask, ids = [self._fit(source, mask, path, size) for mask in draw(source, self.categories, size)]
        elif self.binary_masks:
            masks = [_flatten(read(file)) for file in files["mask"]]
            index_mask, ids = self._draw_objects(files["mask"], masks)
        else:
            mask = read(source, self.labels.by_color)
            index_mask = self.labels.encode(mask, str(source))
        if "instance" in files and not self.categories:
            file = files["instance"][0]
            ids = read(file).astype(np.int64)
            if ids.ndim != 2:
                raise InputError(f"{file}: is a colour image. Save one id per instance, 0 for none")
        for file in files.get("validity mask", []):
            index_mask[_flatten(read(file)) == 0] = IGNORE_INDEX
        index_mask[hidden] = IGNORE_INDEX
        sample = Sample(image=torch.from_numpy(image), mask=torch.from_numpy(index_mask))
        if self.has_instances:
            sample["instance"] = torch.from_numpy(ids)
        return sample

    def fingerprint(self, split: str) -> str:
        stamps = []
        for files in self.files[split].values():
            for path in chain.from_iterable(files.values()):
                path = file_of(path) if self.categories else path
                stat = path.stat(follow_symlinks=path.exists())  # a link may lead nowhere
                stamps.append((str(path), stat.st_size, stat.st_mtime_ns))
        labels = self.labels
        if not self.paths_name_classes:  # no name and no colour changes what is counted
            labels = replace(labels, names=[], colors=[])
        options = (self.mask_threshold, self.patterns["mask"], self.resize_masks, self.as_rgb, self.nodata)
        return f"{labels} {options} {self.categories} {stamps}"

    def find_problems(self) -> list[Problem]:
        """Whether EXIF turns images, and not their masks; whether masks are of classes that nobody declared, or hold
        values that predicted masks cannot."""
        turned = []
        for split in self.files.values():
            for files in split.values():
                image = files["image"][0]
                if is_turned(image, unseen=True) and not is_turned(files["mask"][0]):
                    turned.append(image)
        problems = []
        if turned:
            problems.append(
                f"EXIF turns {plural(len(turned), 'image')} and not their masks, e.g. {turned[0]}. Look at the "
                "doctor's pictures: if masks lie otherwise than their images, exiftool -n -Orientation=1 FILES"
            )
        values = [code_of(group[0]) for group in self.labels.values]
        if not self.labels.by_color and (min(values) < 0 or max(values) > VOID[-1]):
            problems.append(f"PNG masks hold 0 to 65535, not {values}: predict.py will need --format palette")
        left_out = {name: file for file, name in self.class_of.items() if name not in self.labels.names}
        if left_out and "{class}" not in self.patterns["image"]:  # else all of them are read
            first = min(left_out)
            problems.append(
                f"masks of classes that nobody declared are left out: {', '.join(sorted(left_out))}, e.g. "
                f"{left_out[first]}. To take them: classes: {{..., {first}: {self.labels.num_classes}}}"
            )
        return list(map(Problem, problems))

    def group(self, name: str) -> str:
        match = self.group_pattern.search(name)
        if match is None:
            return name
        return match[1] if match.groups() else match[0]

    def _find_files(
        self,
        called: dict[str, str],
        lists: str | None,
        classes: list[str],
    ) -> list[str]:
        """Find the samples of each split. Returns what is wrong with files that became none."""
        self.class_of: dict[Path, str] = {}
        self.files: dict[str, Samples] = {split: {} for split in SPLITS}
        problems = []
        apart = [kind for kind, text in self.patterns.items() if "{split}" in text]
        shared = self.patterns.keys() - apart if apart else ()
        for split in SPLITS if lists or apart else ("train",):
            name = called[split]
            paths = {kind: complete(self.root, text, name) for kind, text in self.patterns.items()}
            deciding = paths[apart[0] if apart else "image"]
            if split != "train" and not folder_of(deciding).exists():
                continue
            samples, class_of, wrong = find_samples(paths, classes, shared)
            self.class_of |= class_of
            if lists is None:
                problems += wrong
            else:
                source = self.root / lists.replace("{split}", name)
                samples = choose_samples(source, samples, None if "{split}" in lists else name)
            self.files[split] = samples
        return problems

    def _refuse_empty(
        self,
        called: dict[str, str],
        lists: str | None,
        problems: list[str],
    ) -> None:
        """Raises InputError where there is nothing to train or to validate on, with what is wrong first."""
        for split in ("train", "val"):
            if self.files[split]:
                continue
            for path in sorted(self.root.rglob("*")):
                check_format(path)
            if problems:
                raise InputError(problems[0])
            name = called[split]
            where = (lists or " and ".join(self.patterns.values())).replace("{split}", name)
            if where == lists:  # one list of all
                where += (
                    f" (rows that say {name} in a column of its own, but it {describe_list(self.root / lists)}; or "
                    'give each split a list of its own: "{split}.txt")'
                )
            raise InputError(
                f"{self.root}: the {split} split is empty. Fill {where}, or say what it is called there, e.g. "
                "splits: {val: valid}, or keep a part of train: val_fraction: 0.2"
            )

    def _read_classes(self, declared: Any, ignore: Any) -> Labels:
        """The classes, and what kind of masks there are. Masks that files describe have categories, which get theirs.

        Raises:
            InputError: classes are not declared, or not as the masks need it.
        """
        samples = chain.from_iterable(files.values() for files in self.files.values())
        masks = list(chain.from_iterable(files["mask"] for files in samples))
        #: Category -> class index, where masks are described by files.
        self.categories: dict[Category, int] = {}
        instances = self.patterns.get("instance")
        if file_of(masks[0]).suffix in DESCRIPTIONS:
            if instances not in (None, self.patterns["mask"]):
                fix = f"name what describes the masks, {self.patterns['mask']!r}"
                raise InputError(f"instances is {instances!r}: {fix}")
            ignored = [ignore] if isinstance(ignore, int | str) else list(ignore or ())
            self.categories = class_indices(masks, declared, ignored)
            ignore = [value for value in ignored if isinstance(value, int)]
        several = len(masks) > sum(map(len, self.files.values()))
        one_mask_per_object = several and not self.paths_name_classes
        self.has_instances = one_mask_per_object or instances is not None
        #: Whether masks only tell objects from the background.
        self.binary_masks = self.mask_threshold is not None or self.paths_name_classes or one_mask_per_object
        if not declared:
            raise self._classes_missing(masks)
        labels = Labels.parse(declared, ignore)
        two_classes = labels.num_classes == 2 or self.paths_name_classes
        if self.binary_masks and (labels.by_color or not two_classes):
            raise InputError(
                "masks of objects, and mask_threshold, tell two classes apart, of integer values; declared are "
                f"{', '.join(labels.names)}. For more, name files or folders after the classes: {{class}} in masks"
            )
        return labels

    def _divide(
        self,
        val: float,
        test: float,
        seed: int,
    ) -> None:
        """Take shares of what there is to train on."""
        taken = (val and self.files["val"]) or (test and self.files["test"])
        if taken or min(val, test) < 0 or val + test >= 1:
            raise InputError(
                f"val_fraction {val} and test_fraction {test} are shares of the images, e.g. 0.2, and must leave some "
                "to train on. A split that has images of its own needs no fraction: take it away"
            )
        pool = self.files["train"]
        self.files["train"] = {}
        names = list(pool)
        parts = divide([self.group(name) for name in names], [val, test], seed)
        for split, part in zip(("val", "test", "train"), parts, strict=True):
            self.files[split] |= {names[index]: pool[names[index]] for index in part}

    def _first_image(self, channels: int | None) -> np.ndarray:
        """The first training image that can be read."""
        errors = []
        for files in self.files["train"].values():
            try:
                return read_image(files["image"][0], channels, self.as_rgb)
            except InputError as error:
                errors.append(error)
        raise errors[0]

    def _fit(
        self,
        file: Path,
        mask: np.ndarray,
        image: Path,
        size: tuple[int, ...],
    ) -> np.ndarray:
        """A mask as large as its image."""
        if mask.shape[:2] == size:
            return mask
        height, width = mask.shape[:2]
        sizes = f"{file}: is {width}x{height} pixels, but its image {image.name} is {size[1]}x{size[0]}"
        if (height - width) * (size[0] - size[1]) < 0 and is_turned(image):
            raise InputError(
                f"{sizes}. EXIF turns the image, not the mask. Fix: exiftool -n -Orientation=1 {image}, or turn the "
                "mask"
            )
        if not self.resize_masks:
            same_shape = height * size[1] == width * size[0]
            raise InputError(
                f"{sizes}. Save both at one size (masks by nearest neighbour), or, where they show the same, "
                "resize_masks: true",
                {"resize_masks": True} if same_shape else {},
            )
        rows = (2 * np.arange(size[0]) + 1) * height // (2 * size[0])
        columns = (2 * np.arange(size[1]) + 1) * width // (2 * size[1])
        return mask[np.ix_(rows, columns)]

    def _draw_objects(
        self,
        files: list[Path],
        masks: list[np.ndarray],
    ) -> tuple[np.ndarray, np.ndarray]:
        """Class indices, and a number each, of masks that only tell objects from the background."""
        first = [values[0] for values in self.labels.values]
        background = first.index(min(first))
        things = [first.index(max(first))] * len(files)
        if self.paths_name_classes:
            background = 0
            things = [self._class_index(file, mask) for file, mask in zip(files, masks, strict=True)]
        index = np.full(masks[0].shape, background)
        ids = np.zeros_like(index)
        for number in np.argsort(things, kind="stable"):
            mask = masks[number]
            is_object = mask >= (self.mask_threshold or 1)
            index[is_object] = things[number]
            ids[is_object] = number + 1
            if self.mask_threshold is None:
                self._check_two_values(mask, files[number])
                index[np.isin(mask, self.labels.ignore)] = IGNORE_INDEX
        return index, ids

    def _class_index(self, file: Path, mask: np.ndarray) -> int:
        """The class that a mask's path names; a mask without objects needs none."""
        names = self.labels.names
        name = self.class_of[file]
        if name in names:
            return names.index(name)
        if mask.any():
            raise InputError(f"{file}: {name!r} names no class. Declared: {', '.join(names)}. Rename it, or declare it")
        return 0

    def _check_two_values(self, mask: np.ndarray, file: Path) -> None:
        """In a mask that tells objects from the background, smeared edges must not count as objects unasked."""
        foreground = mask[~np.isin(mask, [0, *self.labels.ignore])]
        if foreground.size and np.ptp(foreground):
            counts = count_values(mask, str(file))
            raise UndeclaredValues(f"{file}: {self.explain([counts])[0]}", counts)

    def explain(
        self,
        masks: Sequence[Counts],
        others: Sequence[Counts] = (),
    ) -> tuple[str, dict]:
        """The message about masks that hold undeclared values, and the options that mend it.

        Args:
            masks: the values of each.
            others: of masks that hold declared values.
        """
        text, options = self.labels.explain(masks, others, self.binary_masks)
        return text, self._complete(options)

    def _classes_missing(self, files: list[Path]) -> InputError:
        """What to say where nobody declared the classes.

        Args:
            files: all masks, of which a thousand are read.

        Returns:
            the error, whose `fix` are the options that the masks suggest; or that no mask can be read.
        """
        masks: dict[Path, Counts] = {}
        errors = []
        for path in files[:: len(files) // 1000 + 1]:
            try:
                masks[path] = shorten(count_values(read_mask(path), str(path)))
            except InputError as error:
                errors.append(error)
        if not masks:
            return errors[0]
        found = MaskValues(list(masks.values()), declared={}, objects=self.binary_masks)
        if self.paths_name_classes:
            least = found.options.get("mask_threshold", 1)
            classes = {"background": 0}
            for path, mask in masks.items():
                if max(map(code_of, mask)) >= least:
                    classes.setdefault(self.class_of[path], len(classes))
            found.options["classes"] = classes
        text = f"classes is not declared. The masks hold {describe(add(masks.values()))}. {found}"
        return InputError(text, self._complete(found.options))

    def _complete(self, options: dict) -> dict:
        """Suggested options with what this folder knows: a threshold that was given, and where ids of masks lie."""
        if self.mask_threshold is not None:
            options["mask_threshold"] = self.mask_threshold
        if "instances" in options:
            options["instances"] = self.patterns["mask"]
        return options


def _compile(group: str | None) -> re.Pattern[str]:
    """The regular expression of a sample's group; without one, each sample is a group of its own."""
    try:
        return re.compile(group or "(?s).*")
    except re.error as error:
        raise InputError(f"group {group!r} is no regular expression ({error}), e.g. group: '^[^_]+'") from error


def _flatten(mask: np.ndarray) -> np.ndarray:
    """(H, W), the brightest channel of a mask that is a colour image."""
    return np.atleast_3d(mask).max(axis=2)


def expand(root: str) -> Path:
    """A folder as users write it: with ~ and environment variables."""
    expanded = os.path.expanduser(os.path.expandvars(root))
    unset = re.search(r"\$\{?(\w+)", expanded)
    if unset:
        name = unset[1]
        raise InputError(
            f"data.dataset.root is {root!r}, but the variable {name} is not set. Fix: export {name}=/path/to/your/data"
        )
    return Path(expanded)
