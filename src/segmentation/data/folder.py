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
        prefix = "{split}/" if (self.root / "train").is_dir() else ""
        folders = {"image": images or f"{prefix}images", "mask": masks or f"{prefix}masks", "instance": instances}
        self.folders = {kind: pattern for kind, pattern in folders.items() if pattern}
        if lists:
            splits = {split: self._listed(self.root / lists.format(split=split), split) for split in SPLITS}
        elif "{split}" in self.folders["image"]:
            splits = {split: self._pairs(split) for split in SPLITS}
        else:
            splits = _divide(self._pairs(""), val_fraction, test_fraction, split_seed)
        self.files: dict[str, dict[str, dict[str, Path]]] = splits
        for split in ("train", "val"):
            if not splits[split]:
                raise InputError(f"{self.root}: the {split} split is empty. {self._where(split)}")

    def names(self, split: str) -> list[str]:
        return list(self.files[split])

    def load(self, split: str, index: int) -> Sample:
        files = self.files[split][self.names(split)[index]]
        image = torch.from_numpy(read_image(files["image"], self.labels.channels))
        values = read_mask(files["mask"], self.labels.by_color)
        _check_size(files["mask"], values.shape[:2], files["image"], tuple(image.shape[1:]))
        sample = Sample(image=image, mask=torch.from_numpy(self.labels.encode(values, str(files["mask"]))))
        if "instance" in files:
            ids = read_mask(files["instance"]).astype(np.int64)
            _check_size(files["instance"], ids.shape[:2], files["image"], tuple(image.shape[1:]))
            sample["instance"] = torch.from_numpy(ids)
        return sample

    def fingerprint(self, split: str) -> str:
        stats = [(str(path), path.stat()) for files in self.files[split].values() for path in files.values()]
        return repr((self.labels, [(path, stat.st_size, stat.st_mtime_ns) for path, stat in stats]))

    def _where(self, split: str) -> str:
        if "{split}" in self.folders["image"]:
            return f"Put images into {self.root / self.folders['image'].format(split=split)} and masks beside them"
        return "Give val_fraction a share of the images that leaves at least one in each split, or list files by lists"

    def _pairs(self, split: str) -> dict[str, dict[str, Path]]:
        """Every image of a split with its mask; {} where a split has no folder (the root must exist)."""
        if not self.root.is_dir():
            raise InputError(f"{self.root}: no such folder. Set data.dataset.root to the data set's folder")
        folders = {kind: self.root / pattern.format(split=split) for kind, pattern in self.folders.items()}
        if split in ("val", "test") and not folders["image"].exists():
            return {}
        found = {kind: _scan(folder) for kind, folder in folders.items()}
        for kind, other in (("image", "mask"), ("mask", "image"), ("image", "instance")):
            if other in found:
                _check_partners(found[kind], found[other], kind, other, folders[other])
        return {name: {kind: files[name] for kind, files in found.items()} for name in sorted(found["image"])}

    def _listed(self, path: Path, split: str) -> dict[str, dict[str, Path]]:
        if not path.is_file():
            if split == "test":
                return {}
            raise InputError(f"{path}: no such list file. It holds one image name a line")
        folders = {kind: self.root / pattern.format(split=split) for kind, pattern in self.folders.items()}
        found = {kind: _scan(folder) for kind, folder in folders.items()}
        lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
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
        if path.suffix.lower() not in IMAGE_SUFFIXES or path.name.startswith("."):
            continue
        name = _name(path.relative_to(folder))
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
            f"Fix: put {Path(alone[0]).name}.png into {folder}, or take the {kind} away"
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
