"""Data set statistics: every sample of a split is read once, before the first step. This finds what is wrong with the
files, and counts what losses, normalisation and sampling need, for each sample.

It is kept in the user's cache, keyed by the file list (names, sizes, times) and the classes, and so counted once.
"""

import hashlib
import json
import os
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from functools import cached_property
from itertools import combinations
from typing import Any

import numpy as np
import torch
from platformdirs import user_cache_path
from rich.console import Console
from rich.progress import track

from segmentation.data.base import SPLITS, Sample, SegmentationData, count_pixels
from segmentation.data.labels import IGNORE_INDEX, Labels
from segmentation.data.writing import write_text
from segmentation.errors import InputError

#: Raised when what a statistics holds changes, so that old cache files are not read.
VERSION = 4


@dataclass(frozen=True)
class Record:
    """What one sample holds."""

    size: tuple[int, int]  # (H, W)
    pixels: list[int]  # of each class
    ignored: int  # pixels that count nowhere
    total: list[float]  # of each band, the sum of its pixels, scaled as `scale_of` says
    squares: list[float]  # the sum of their squares
    low: float  # the smallest number in the image, as the file has it
    high: float
    digest: str  # the same for the same pixels


@dataclass(frozen=True)
class SplitStatistics:
    """Counts over one split."""

    names: list[str]  # of the classes
    records: list[Record]  # of the samples, in the order of their names
    bad: dict[int, InputError] = field(default_factory=dict)  # index -> what is wrong with a sample not in `records`

    @cached_property
    def sizes(self) -> list[tuple[int, int]]:
        """(H, W) of every sample."""
        return [record.size for record in self.records]

    @cached_property
    def counts(self) -> np.ndarray:
        """Pixels of each class in each sample: (samples, K) int64."""
        return np.array([record.pixels for record in self.records], np.int64).reshape(-1, len(self.names))

    @property
    def pixels(self) -> list[int]:
        """Pixels of each class."""
        return self.counts.sum(axis=0).tolist()

    @property
    def shares(self) -> np.ndarray:
        """Of each class, its share of the pixels that count: (K,)."""
        return self.counts.sum(axis=0) / max(1, self.counts.sum())

    @property
    def pixels_where(self) -> list[int]:
        """For each class, the valid pixels of the samples where it occurs."""
        return (self.counts.sum(axis=1, keepdims=True) * (self.counts > 0)).sum(axis=0).tolist()

    @property
    def absent(self) -> list[str]:
        """Names of the classes without a pixel."""
        return [name for name, pixels in zip(self.names, self.pixels, strict=True) if not pixels]

    @property
    def ignored(self) -> int:
        """Pixels that count nowhere."""
        return sum(record.ignored for record in self.records)

    @property
    def mean(self) -> list[float]:
        """Of each band, the mean of all pixels, scaled as `scale_of` says."""
        return self._moments()[0].tolist()

    @property
    def std(self) -> list[float]:
        """Of each band, the standard deviation, likewise."""
        return self._moments()[1].tolist()

    def _moments(self) -> tuple[np.ndarray, np.ndarray]:
        area = sum(height * width for height, width in self.sizes)
        mean = np.sum([record.total for record in self.records], axis=0) / area
        variance = np.sum([record.squares for record in self.records], axis=0) / area - mean**2
        return mean, np.sqrt(variance.clip(min=0))


def scale_of(dtype: torch.dtype, labels: Labels | None = None) -> float:
    """What stands for 1.0 in an image: what the data set declares, else the largest integer of its type; floating-point
    images are taken as they are."""
    if labels is not None and labels.scale is not None:
        return labels.scale
    return 1.0 if dtype.is_floating_point else float(torch.iinfo(dtype).max)


def compute_statistics(data: SegmentationData, split: str, skip: bool = False) -> SplitStatistics:
    """The statistics of a split, from the cache or counted. With `skip`, bad samples are left out, and named in `bad`.

    Raises:
        InputError: some samples cannot be used (unless `skip`); the first one's message, with the number of the others.
    """
    key = hashlib.sha256(f"{VERSION}|{split}|{data.fingerprint(split)}".encode()).hexdigest()[:32]
    path = user_cache_path("unet-family-template") / "statistics" / f"{key}.json"
    with suppress(OSError, ValueError, TypeError, KeyError, AttributeError):  # no cache, or a damaged one
        cached = json.loads(path.read_text())
        if cached.pop("digest") == _digest(cached):
            records = [Record(**record | {"size": tuple(record["size"])}) for record in cached["records"]]
            return SplitStatistics(cached["names"], records)
    statistics = count(data, split)
    first, others = next(iter(statistics.bad.values()), ""), len(statistics.bad) - 1
    if statistics.bad and not skip:
        more = f" ({others} more of {len(data.names(split))} {split} samples have problems too)" if others else ""
        raise InputError(f"{first}{more}")
    if not statistics.records:
        raise InputError(f"none of the {len(statistics.bad)} {split} samples can be used. {first}")
    if not statistics.bad:  # a disk that was away for a moment must not be remembered
        with suppress(OSError):  # a cache that cannot be written only costs time
            found = {"names": statistics.names, "records": [asdict(record) for record in statistics.records]}
            write_text(path, json.dumps({**found, "digest": _digest(found)}))
    return statistics


def _digest(found: dict[str, Any]) -> str:
    """By which a cache file that is damaged, though it is JSON, is known."""
    return hashlib.sha256(json.dumps(found).encode()).hexdigest()


def count(data: SegmentationData, split: str) -> SplitStatistics:
    """Read every sample of a split, in several threads and with a progress bar."""
    names = data.names(split)

    def read(index: int) -> Record | InputError:
        try:
            return examine(data.load(split, index), data.labels, f"{split} sample {names[index]}")
        except InputError as error:
            return error

    with ThreadPoolExecutor(available_cores()) as pool:
        found = pool.map(read, range(len(names)))
        hidden = not Console().is_terminal
        read_ones = list(track(found, f"Reading {split} once", len(names), transient=True, disable=hidden))
    records = [each for each in read_ones if isinstance(each, Record)]
    bad = {index: each for index, each in enumerate(read_ones) if isinstance(each, InputError)}
    return SplitStatistics(data.labels.names, records, bad)


def available_cores() -> int:
    """Cores that this process may use, where the system says it (Linux)."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def examine(sample: Sample, labels: Labels, name: str) -> Record:
    """The record of a sample.

    Raises:
        InputError: it does not hold to the contract of a data set (`FolderData` does); or its image is not finite.
    """
    _check_sample(sample, labels, name)
    image, mask, classes = sample["image"], sample["mask"], labels.num_classes
    *pixels, ignored = count_pixels(mask, classes)
    numbers, scale = image.numpy(), scale_of(image.dtype, labels)
    bands = numbers.reshape(len(numbers), -1).astype(np.float64)
    return Record(
        size=(mask.shape[0], mask.shape[1]),
        pixels=[int(number) for number in pixels],
        ignored=int(ignored),
        total=(bands.sum(axis=1) / scale).tolist(),
        squares=(np.einsum("ij,ij->i", bands, bands) / scale**2).tolist(),
        low=float(numbers.min()),
        high=float(numbers.max()),
        digest=hashlib.blake2b(numbers.tobytes() + repr(numbers.shape).encode(), digest_size=8).hexdigest(),
    )


def find_leaks(data: SegmentationData, statistics_of_splits: dict[str, SplitStatistics]) -> list[str]:
    """Images, and groups of images, that are in more than one split, a message each pair of splits: figures of a split
    flatter when the net has trained on it."""
    messages = []
    for first, second in combinations([split for split in SPLITS if split in statistics_of_splits], 2):
        known = {
            record.digest: name
            for record, name in zip(statistics_of_splits[first].records, data.names(first), strict=True)
        }
        pairs = zip(statistics_of_splits[second].records, data.names(second), strict=True)
        same = [(known[record.digest], name) for record, name in pairs if record.digest in known]
        if same:
            messages.append(
                f"{len(same)} of the {second} images are also in {first}, pixel by pixel ({first} {same[0][0]} is "
                f"{second} {same[0][1]}): figures will flatter. Remove one of each"
            )
        groups = sorted({data.group(n) for n in data.names(first)} & {data.group(n) for n in data.names(second)})
        if groups and set(groups) - set(data.names(second)):
            messages.append(
                f"{len(groups)} groups are in {first} and in {second} ({', '.join(groups[:3])}): figures will flatter. "
                "Move each into one split, or let data.folds divide them"
            )
    return messages


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
