"""The census: every sample of a split is read once, before the first step. It finds what is wrong with the files, and
counts what losses and normalisation need: pixels per class, image sizes, mean and deviation of each band.

It is kept in the user's cache, keyed by the file list (names, sizes, times) and the classes, and so counted once.
"""

import hashlib
import json
import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from platformdirs import user_cache_path
from rich.progress import track
from torch import Tensor

from segmentation.data.base import Sample, SegmentationData
from segmentation.data.labels import IGNORE_INDEX, Labels
from segmentation.errors import InputError

#: Raised when what a census holds changes, so that old cache files are not read.
VERSION = 2


@dataclass(frozen=True)
class Census:
    """Counts over one split.

    Args:
        sizes: (H, W) of every sample, in the order of its names.
        names: of the classes.
        pixels: for each class, its number of pixels.
        pixels_where: for each class, the number of valid pixels of the samples where it occurs.
        ignored: pixels that count nowhere.
        mean: for each band, the mean of all pixels, scaled as `scale_of` says.
        std: for each band, the standard deviation, likewise.
    """

    sizes: list[tuple[int, int]]
    names: list[str]
    pixels: list[int]
    pixels_where: list[int]
    ignored: int
    mean: list[float]
    std: list[float]


def scale_of(dtype: torch.dtype) -> float:
    """What stands for 1.0 in an image: the largest integer of its type; floating-point images are taken as they are."""
    return 1.0 if dtype.is_floating_point else float(torch.iinfo(dtype).max)


def take_census(data: SegmentationData, split: str) -> Census:
    """The census of a split, from the cache or counted with a progress bar.

    Raises:
        InputError: some samples cannot be used; the message is the first one's, with the number of the others.
    """
    key = hashlib.sha256(f"{VERSION}|{split}|{data.fingerprint(split)}".encode()).hexdigest()[:32]
    path = user_cache_path("unet-family-template") / "census" / f"{key}.json"
    try:
        cached = json.loads(path.read_text())
        return Census(**cached | {"sizes": [tuple(size) for size in cached["sizes"]]})
    except (OSError, ValueError, TypeError, KeyError):
        census = _count(data, split)
        _keep(path, json.dumps(asdict(census)))
        return census


def _count(data: SegmentationData, split: str) -> Census:
    names = data.names(split)
    classes = data.labels.num_classes
    sizes: list[tuple[int, int]] = []
    errors: list[InputError] = []
    pixels = torch.zeros(classes + 1, dtype=torch.int64)
    pixels_where = torch.zeros(classes, dtype=torch.int64)
    moments = torch.zeros(2, data.labels.channels, dtype=torch.float64)

    def read(index: int) -> tuple[tuple[int, int], Tensor, Tensor] | InputError:
        try:
            sample = data.load(split, index)
            _check_sample(sample, data.labels, f"{split} sample {names[index]}")
        except InputError as error:
            return error
        mask = sample["mask"]
        counts = torch.bincount(mask.where(mask != IGNORE_INDEX, classes).flatten(), minlength=classes + 1)
        bands = sample["image"].flatten(1).to(torch.float64) / scale_of(sample["image"].dtype)
        return tuple(mask.shape), counts, torch.stack([bands.sum(1), bands.square().sum(1)])

    with ThreadPoolExecutor(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else None) as pool:
        results = pool.map(read, range(len(names)))
        for result in track(results, f"Reading {split} once", total=len(names), transient=True):
            if isinstance(result, InputError):
                errors.append(result)
            else:
                sizes.append(result[0])
                pixels += result[1]
                pixels_where += result[1][:-1].sum() * (result[1][:-1] > 0)
                moments += result[2]
    if errors:
        more = f" ({len(errors) - 1} more of {len(names)} {split} samples have problems too)" if errors[1:] else ""
        raise InputError(f"{errors[0]}{more}")
    total = sum(height * width for height, width in sizes)
    mean = moments[0] / total
    std = (moments[1] / total - mean.square()).clamp(min=0).sqrt()
    counts = pixels[:-1].tolist(), pixels_where.tolist(), int(pixels[-1])
    return Census(sizes, list(data.labels.names), *counts, mean.tolist(), std.tolist())


def _check_sample(sample: Sample, labels: Labels, name: str) -> None:
    """What a data set of the user's own must hold to; `FolderData` does."""
    image, mask = sample["image"], sample["mask"]
    if image.ndim != 3 or image.shape[0] != labels.channels or mask.shape != image.shape[1:]:
        raise InputError(
            f"{name}: image {tuple(image.shape)} and mask {tuple(mask.shape)} must be "
            f"({labels.channels}, H, W) and (H, W)"
        )
    if mask.dtype != torch.int64 or not ((mask >= 0) & (mask < labels.num_classes) | (mask == IGNORE_INDEX)).all():
        raise InputError(f"{name}: the mask must be int64 in 0..{labels.num_classes - 1}, or {IGNORE_INDEX} to ignore")
    if image.is_floating_point() and not image.isfinite().all():
        raise InputError(f"{name}: the image holds NaN or infinite values. Replace them")


def _keep(path: Path, text: str) -> None:
    """Write aside and rename; a cache that cannot be written only costs time."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        aside = path.with_suffix(f".{os.getpid()}")
        aside.write_text(text)
        aside.replace(path)
    except OSError:
        pass
