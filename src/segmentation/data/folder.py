"""FolderData: images and masks in folders of files, which is what most people have."""

import os
import re
from pathlib import Path
from typing import Any, Literal

from segmentation.data.base import SPLITS
from segmentation.data.file_data import FileData
from segmentation.data.layout import Files, Pattern, listed, pair, read_list
from segmentation.data.splits import divide
from segmentation.data.values import Value
from segmentation.errors import InputError

#: Names that people give their validation folders.
VAL_FOLDERS = ("valid", "validation", "dev")


class FolderData(FileData):
    """Images and masks in parallel folders, paired by name: `images/a/01.jpg` and `masks/a/01.png`; or in any layout
    that patterns of paths can say (see `segmentation.data.layout`).

    The splits come from folders (`images: "{split}/images"`), from list files (`lists: "{split}.txt"`), or from a
    fraction of one pool of images. A data set without `test` is tested on its validation split.

    Args:
        root: the data set's folder; environment variables and ~ are expanded.
        classes: name -> mask value, list of values, "#RRGGBB", or {value: ..., color: "#RRGGBB" to display it}.
        ignore: mask value, or list of values, of pixels that count nowhere (void).
        channels: bands of the images; null: those of the first image.
        task: `binary` (one logit) or `multiclass`; by default two classes are binary.
        images: folder of the images below root, or a pattern of their paths, with `{split}` where each split has its
            own. By default `{split}/images` where root/train exists, else `images`.
        masks: folder or pattern of the masks, likewise.
        instances: folder or pattern of masks that hold one id an individual (0 for none), or null.
        splits: what `{split}` stands for where folders or lists have other names, e.g. {val: validation}.
        lists: list files below root: "{split}.txt", one image name a line; "{split}.csv" with a column `name`; or one
            "all.csv" with columns `name` and `split`.
        val_fraction: share to validate on, of the pool, or of train where there is no val; null: 0.2 of a pool.
        test_fraction: share of the pool to test on.
        split_seed: seed of that division.
        group: regular expression; samples whose names it finds the same text in (its first group, if it has one) are
            of one patient, video or slide, and never divided.
        scale: what stands for 1.0 in an image, e.g. 4095 for 12 bits; null: the largest integer of its type.
        mask_threshold: gray level from which a mask's pixel is foreground: for masks saved as JPEG.
        as_rgb: take gray, palette, RGBA and CMYK pictures as RGB: photographs from the web come mixed.

    Raises:
        InputError: a folder is missing, a split is empty; the message says which. Single files that cannot be used are
            listed in `problems`.
    """

    def __init__(
        self,
        root: str,
        classes: dict[str, int | str | list[Value] | dict[str, Any]] | None = None,
        ignore: Value | list[Value] | None = None,
        channels: int | None = None,
        task: Literal["binary", "multiclass"] | None = None,
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
        self.lists = lists
        #: Whether images of each split have a folder of their own.
        self.apart = "{split}" in self.patterns["image"]
        self._check_options()
        found, problems = self._find()
        given = [split for split in ("val", "test") if found.get(split)]
        if ("val" in given and val_fraction is not None) or ("test" in given and test_fraction):
            raise InputError(f"{self.root}: has a split {' and '.join(given)} of its own: take the fraction away")
        if not (given or self.apart or lists) and val_fraction is None:
            val_fraction = 0.2
        if found["train"] and "val" not in given and val_fraction is not None:
            found |= self._divide(found["train"], val_fraction, test_fraction, split_seed)
        for split in ("train", "val"):
            if not found.get(split):
                if problems:
                    raise InputError(f"{problems[0]} (nothing is left in the {split} split)")
                raise InputError(f"{self.root}: the {split} split is empty. {self._where(split)}")
        by_folder = "{class}" in self.patterns["image"]
        super().__init__(classes, ignore, channels, task, found, scale, mask_threshold, by_folder, as_rgb)
        self.problems = problems

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
                samples, wrong = self._listed(self.lists, split, samples, patterns), []
            found[split] = samples
            problems += wrong
        return found, problems

    def _patterns(self, split: str) -> dict[str, Pattern]:
        return {kind: Pattern(self.root, text, self.called[split]) for kind, text in self.patterns.items()}

    def _listed(
        self, lists: str, split: str, samples: dict[str, Files], patterns: dict[str, Pattern]
    ) -> dict[str, Files]:
        path = self.root / lists.replace("{split}", self.called[split])
        if path.is_file():
            lines = read_list(path, self.called[split], shared="{split}" not in lists)
            return listed(path, lines, samples, [pattern.folder for pattern in patterns.values()])
        if split != "test":
            raise InputError(f"{path}: no such list file. It holds one image name a line")
        return {}

    def _divide(self, pool: dict[str, Files], val: float, test: float, seed: int) -> dict[str, dict[str, Files]]:
        if not 0 < val < 1 or not 0 <= test < 1 or val + test >= 1:
            raise InputError(f"val_fraction {val} and test_fraction {test} must be shares that leave some to train on")
        names = list(pool)
        shares = {"val": val, "test": test} if test else {"val": val}
        parts = divide(names, list(shares.values()), self.group, seed)
        chosen = zip([*shares, "train"], parts, strict=True)
        return {split: {names[i]: pool[names[i]] for i in indices} for split, indices in chosen}

    def _where(self, split: str) -> str:
        """What to do about an empty split."""
        if self.lists:
            return f"List its images in {self.root / self.lists.replace('{split}', split)}, one name a line"
        if not self.apart:
            return "It takes two images or more, and a val_fraction that leaves some to train on"
        other = next((name for name in VAL_FOLDERS if split == "val" and (self.root / name).is_dir()), None)
        if other:
            return f"Fix: splits: {{val: {other}}}"
        folders = {kind: pattern.folder for kind, pattern in self._patterns(split).items()}
        fraction = ", or keep a part of train: val_fraction: 0.2" if split == "val" else ""
        return f"Put images into {folders['image']} and their masks into {folders['mask']}{fraction}"


def expand(root: str) -> Path:
    """A folder as users write it: with ~ and environment variables."""
    expanded = os.path.expanduser(os.path.expandvars(root))
    if unset := re.search(r"\$\{?(\w+)", expanded):
        name = unset.group(1)
        raise InputError(f"root is {root!r}, but the variable {name} is not set. Fix: export {name}=/path/to/your/data")
    return Path(expanded)
