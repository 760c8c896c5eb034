"""FolderData: images and masks in folders of files, which is what most people have."""

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from segmentation.data.base import SPLITS, Sample, SegmentationData
from segmentation.data.files import IMAGE_SUFFIXES, read_image, read_mask
from segmentation.data.labels import Labels, Value
from segmentation.errors import InputError


class FolderData(SegmentationData):
    """Images and masks in parallel folders, paired by name: `images/a/01.jpg` and `masks/a/01.png`.

    The splits come from folders (`images: "{split}/images"`), from list files (`lists: "{split}.txt"`), or from a
    fraction of one pool of images. A data set without `test` is tested on its validation split.

    Args:
        root: the data set's folder; environment variables and ~ are expanded.
        classes: name -> mask value, list of values, "#RRGGBB", or {value: ..., color: "#RRGGBB" to display it}.
        ignore: mask value, or list of values, of pixels that count nowhere (void).
        channels: bands of the images.
        task: `binary` (one logit) or `multiclass`; by default two classes are binary.
        images: folder of the images below root, with `{split}` where each split has its own. By default
            `{split}/images` where root/train exists, else `images`.
        masks: folder of the masks, likewise.
        instances: folder of masks that hold one id an individual (0 for none), or null.
        lists: list files below root, e.g. "{split}.txt": one image name a line, with or without its ending.
        val_fraction: share of the pool to validate on, where neither folders nor lists give the splits.
        test_fraction: share of the pool to test on.
        split_seed: seed of that division.

    Raises:
        InputError: a folder is missing, a file has no partner, a split is empty; the message says which.
    """

    def __init__(
        self,
        root: str,
        classes: dict[str, int | str | list[Value] | dict[str, Any]],
        ignore: Value | list[Value] | None = None,
        channels: int = 3,
        task: Literal["binary", "multiclass"] | None = None,
        images: str | None = None,
        masks: str | None = None,
        instances: str | None = None,
        lists: str | None = None,
        val_fraction: float = 0.2,
        test_fraction: float = 0.0,
        split_seed: int = 0,
    ) -> None:
        super().__init__(Labels.parse(classes, ignore, channels, task))
        self.root = _expand(root)
        if not self.root.is_dir():
            raise InputError(f"{self.root}: no such folder. Set data.dataset.root to the data set's folder")
        prefix = "{split}/" if (self.root / "train").is_dir() else ""
        folders = {"image": images or f"{prefix}images", "mask": masks or f"{prefix}masks", "instance": instances}
        self.folders = {kind: pattern for kind, pattern in folders.items() if pattern}
        self.lists = lists
        if lists and "{split}" not in lists:
            raise InputError(f'lists is {lists!r}: each split needs a list of its own, e.g. lists: "{{split}}.txt"')
        if lists:
            splits = {split: self._listed(split) for split in SPLITS}
        elif "{split}" in self.folders["image"]:
            splits = {split: self._pairs(split) for split in SPLITS}
        elif any("{split}" in pattern for pattern in self.folders.values()):
            raise InputError(f"{self.folders}: {{split}} stands in other folders, but not in that of the images")
        else:
            splits = _divide(self._pairs(""), val_fraction, test_fraction, split_seed)
        self.files: dict[str, dict[str, dict[str, Path]]] = splits
        self._names = {split: list(pairs) for split, pairs in self.files.items()}
        for split in ("train", "val"):
            if not splits[split]:
                raise InputError(f"{self.root}: the {split} split is empty. {self._where(split)}")

    def names(self, split: str) -> list[str]:
        return self._names[split]

    def load(self, split: str, index: int) -> Sample:
        files = self.files[split][self._names[split][index]]
        image = torch.from_numpy(read_image(files["image"], self.labels.channels))
        values = read_mask(files["mask"], self.labels.by_color)
        _check_size(files["mask"], values.shape[:2], files["image"], tuple(image.shape[1:]))
        sample = Sample(image=image, mask=torch.from_numpy(self.labels.encode(values, str(files["mask"]))))
        if "instance" in files:
            ids = read_mask(files["instance"])
            if ids.ndim != 2:
                raise InputError(f"{files['instance']}: is a colour image. Save one id an individual, 0 for none")
            _check_size(files["instance"], ids.shape, files["image"], tuple(image.shape[1:]))
            sample["instance"] = torch.from_numpy(ids.astype(np.int64))
        return sample

    def fingerprint(self, split: str) -> str:
        stats = [(str(path), path.stat()) for files in self.files[split].values() for path in files.values()]
        return repr((self.labels, [(path, stat.st_size, stat.st_mtime_ns) for path, stat in stats]))

    def _where(self, split: str) -> str:
        if self.lists:
            return f"List its images in {self._path(self.lists, split)}, one name a line"
        if "{split}" in self.folders["image"]:
            folders = self._folders(split)
            return f"Put images into {folders['image']} and their masks into {folders['mask']}"
        return "It takes two images or more, and a val_fraction that leaves some to train on"

    def _path(self, pattern: str, split: str) -> Path:
        return self.root / pattern.replace("{split}", split)

    def _folders(self, split: str) -> dict[str, Path]:
        return {kind: self._path(pattern, split) for kind, pattern in self.folders.items()}

    def _pairs(self, split: str) -> dict[str, dict[str, Path]]:
        """Every image of a split with its mask; {} where a split has no folder."""
        folders = self._folders(split)
        if split in ("val", "test") and not folders["image"].exists():
            return {}
        found = {kind: _scan(folder) for kind, folder in folders.items()}
        for kind, other in (("image", "mask"), ("mask", "image"), ("image", "instance")):
            # Masks that all splits share may belong to another split's images.
            shared = "{split}" in self.folders["image"] and "{split}" not in self.folders[kind]
            if other in found and not shared:
                _check_partners(found[kind], found[other], kind, other, folders[other])
        return {name: {kind: files[name] for kind, files in found.items()} for name in sorted(found["image"])}

    def _listed(self, split: str) -> dict[str, dict[str, Path]]:
        path = self._path(self.lists, split)
        if not path.is_file():
            if split == "test":
                return {}
            raise InputError(f"{path}: no such list file. It holds one image name a line")
        folders = self._folders(split)
        found = {kind: _scan(folder) for kind, folder in folders.items()}
        lines = [line.strip() for line in path.read_text(encoding="utf-8-sig").splitlines() if line.strip()]
        pairs: dict[str, dict[str, Path]] = {}
        for line in lines:
            name = line if line in found["image"] else _name(Path(line))
            for kind, files in found.items():
                if name not in files:
                    raise InputError(f"{path}: lists {line}, but {folders[kind]} has no file of that name")
            pairs[name] = {kind: files[name] for kind, files in found.items()}
        return pairs


def _expand(root: str) -> Path:
    expanded = os.path.expanduser(os.path.expandvars(root))
    unset = re.search(r"\$\{?(\w+)", expanded)
    if unset:
        name = unset.group(1)
        raise InputError(f"root is {root!r}, but the variable {name} is not set. Fix: export {name}=/path/to/your/data")
    return Path(expanded)


def _name(path: Path) -> str:
    """A sample's name: its path without a known ending. Other dots belong to the name."""
    return path.with_suffix("").as_posix() if path.suffix.lower() in IMAGE_SUFFIXES else path.as_posix()


def _scan(folder: Path) -> dict[str, Path]:
    """Image files below a folder, by name."""
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder. Set data.dataset.root, or the folder names images and masks")
    files: dict[str, Path] = {}
    for path in sorted(folder.rglob("*")):
        below = path.relative_to(folder)
        if path.suffix.lower() not in IMAGE_SUFFIXES or any(part.startswith(".") for part in below.parts):
            continue  # .ipynb_checkpoints and the like hold copies
        name = _name(below)
        if name in files:
            raise InputError(f"{path}: {files[name].name} has the same name but for its ending. Keep one of them")
        files[name] = path
    return files


def _check_partners(files: Mapping[str, Path], others: Mapping[str, Path], kind: str, other: str, folder: Path) -> None:
    alone = sorted(set(files) - set(others))
    if alone:
        more = f" (and {len(alone) - 1} more)" if len(alone) > 1 else ""
        raise InputError(
            f"{files[alone[0]]}: this {kind} has no {other}{more}. "
            f"Fix: add {folder / alone[0]}.png, or take the {kind} away"
        )


def _check_size(path: Path, size: tuple[int, ...], image: Path, image_size: tuple[int, ...]) -> None:
    if size != image_size:
        raise InputError(
            f"{path}: is {size[1]}x{size[0]} pixels, but its image {image.name} is {image_size[1]}x{image_size[0]}. "
            "Save both at one size (masks by nearest neighbour)"
        )


def _divide(
    pairs: dict[str, dict[str, Path]], val_fraction: float, test_fraction: float, seed: int
) -> dict[str, dict[str, dict[str, Path]]]:
    """Divide one pool into train, val and test: a function of the sorted names, the fractions and the seed."""
    if not 0 < val_fraction < 1 or not 0 <= test_fraction < 1 or val_fraction + test_fraction >= 1:
        raise InputError(
            f"val_fraction {val_fraction} and test_fraction {test_fraction} must be shares that leave some to train on"
        )
    names = list(pairs)
    order = [names[i] for i in np.random.default_rng(seed).permutation(len(names))]
    val = max(1, round(val_fraction * len(names))) if names else 0
    test = max(1, round(test_fraction * len(names))) if test_fraction else 0
    parts = {"val": order[:val], "test": order[val : val + test], "train": order[val + test :]}
    return {split: {name: pairs[name] for name in sorted(parts[split])} for split in SPLITS}
