"""Statistics of a split: every sample is read once, before the first step. This finds what is wrong with the files, and
counts what losses, normalisation and sampling need. They are kept in the user's cache, by names, sizes and times of the
files, and so counted once.
"""

import hashlib
import json
import os
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from functools import cached_property
from itertools import combinations

import numpy as np
import torch
from platformdirs import user_cache_path
from rich.console import Console
from rich.progress import track

from segmentation.data.base import Sample, SegmentationData, count_pixels
from segmentation.data.labels import IGNORE_INDEX, Labels
from segmentation.data.writing import write_text
from segmentation.errors import InputError

#: Raised when what a cache file holds changes, so that old ones are not read.
VERSION = 5


@dataclass(frozen=True)
class Record:
    """What one sample holds."""

    size: tuple[int, int]  # (H, W)
    pixels: list[int]  # of each class
    ignored: int  # pixels that count nowhere
    total: list[float]  # of each channel, the sum of its pixels, scaled as `scale_of` says
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

    @property
    def digests(self) -> list[str]:
        """The same for samples of the same pixels."""
        return [record.digest for record in self.records]

    @cached_property
    def counts(self) -> np.ndarray:
        """Pixels of each class in each sample: (samples, K) int64."""
        counts = np.array([record.pixels for record in self.records], np.int64)
        return counts.reshape(-1, len(self.names))

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
        valid = self.counts.sum(axis=1)
        return (valid @ (self.counts > 0)).tolist()

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
        """Of each channel, the mean of all pixels, scaled as `scale_of` says."""
        return self._average("total").tolist()

    @property
    def std(self) -> list[float]:
        """Of each channel, the standard deviation, likewise."""
        variance = self._average("squares") - self._average("total") ** 2
        return np.sqrt(variance.clip(min=0)).tolist()

    def _average(self, sums: str) -> np.ndarray:
        pixels = np.prod(self.sizes, axis=1).sum()
        return np.sum([getattr(record, sums) for record in self.records], axis=0) / pixels


def scale_of(dtype: torch.dtype, labels: Labels | None = None) -> float:
    """What stands for 1.0 in an image: what the data set declares, else the largest integer of its type; floating-point
    images are taken as they are."""
    if labels is not None and labels.scale is not None:
        return labels.scale
    return 1.0 if dtype.is_floating_point else float(torch.iinfo(dtype).max)


def compute_statistics(data: SegmentationData, split: str) -> SplitStatistics:
    """The statistics of a split, from the cache or counted. Samples that cannot be used are left out, and named."""
    names = data.labels.names
    key = hashlib.sha256(f"{VERSION} {split} {names} {data.fingerprint(split)}".encode())
    path = user_cache_path("unet-family-template") / "statistics" / f"{key.hexdigest()[:32]}.json"
    with suppress(OSError, ValueError):  # no cache, or a damaged one
        digest, text = path.read_text().split("\n", maxsplit=1)
        if digest == _digest(text):
            records = [Record(**{**fields, "size": tuple(fields["size"])}) for fields in json.loads(text)]
            return SplitStatistics(names, records)
    statistics = _count(data, split)
    if not statistics.bad:  # a disk that was away for a moment must not be remembered
        text = json.dumps([asdict(record) for record in statistics.records])
        with suppress(OSError):  # a cache that cannot be written only costs time
            write_text(path, f"{_digest(text)}\n{text}")
    return statistics


def _digest(text: str) -> str:
    """By which a damaged cache file is known."""
    return hashlib.sha256(text.encode()).hexdigest()


def _count(data: SegmentationData, split: str) -> SplitStatistics:
    """Read every sample of a split, in several threads and with a progress bar."""
    names = data.names(split)
    records = []
    bad = {}

    def read(index: int) -> Record | InputError:
        try:
            return examine(data.load(split, index), data.labels, f"{split} sample {names[index]}")
        except InputError as error:
            return error

    with ThreadPoolExecutor(available_cores()) as pool:
        results = track(
            pool.map(read, range(len(names))),
            f"Reading {split} once",
            len(names),
            transient=True,
            disable=not Console().is_terminal,
        )
        for index, result in enumerate(results):
            if isinstance(result, Record):
                records.append(result)
            else:
                bad[index] = result
    return SplitStatistics(data.labels.names, records, bad)


def available_cores() -> int:
    """Cores that this process may use, where the system says it (Linux)."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def examine(sample: Sample, labels: Labels, name: str) -> Record:
    """The record of a sample.

    Raises:
        InputError: it does not hold to the contract of a data set (`FolderData` does); or its image is not finite.
    """
    image = sample["image"]
    mask = sample["mask"]
    shape = (labels.channels, *mask.shape)
    if mask.ndim != 2 or image.shape != shape:
        raise InputError(f"{name}: image {tuple(image.shape)} of mask {tuple(mask.shape)} must be {shape}")
    known = (mask >= 0) & (mask < labels.num_classes) | (mask == IGNORE_INDEX)
    if mask.dtype != torch.int64 or not known.all():
        raise InputError(f"{name}: the mask must be int64 in 0..{labels.num_classes - 1}, or {IGNORE_INDEX} to ignore")
    if not np.isfinite(image.numpy()).all():
        raise InputError(f"{name}: the image holds NaN or infinite values. Replace them")
    *pixels, ignored = count_pixels(mask, labels.num_classes).tolist()
    array = image.numpy()
    values = array.reshape(len(array), -1).astype(np.float64)
    scale = scale_of(image.dtype, labels)
    return Record(
        size=(mask.shape[0], mask.shape[1]),
        pixels=pixels,
        ignored=ignored,
        total=(values.sum(axis=1) / scale).tolist(),
        squares=(np.einsum("ij,ij->i", values, values) / scale**2).tolist(),
        low=float(array.min()),
        high=float(array.max()),
        digest=hashlib.blake2b(array.tobytes() + repr(array.shape).encode(), digest_size=8).hexdigest(),
    )


def find_leaks(data: SegmentationData, splits: dict[str, SplitStatistics]) -> list[str]:
    """Images, and groups of images, that are in more than one split: a metric flatters when the net has trained on it.

    Returns:
        a message for each.
    """
    messages = []
    for first, second in combinations(splits, 2):
        names = data.names(first)
        others = data.names(second)
        known = dict(zip(splits[first].digests, names, strict=True))
        found = zip(splits[second].digests, others, strict=True)
        same = [f"{first} {known[digest]} is {second} {name}" for digest, name in found if digest in known]
        if same:
            messages.append(
                f"{len(same)} of the {second} images are also in {first}, pixel by pixel ({same[0]}): metrics will "
                "flatter. Remove one of each"
            )
        groups = set(map(data.group, names)) & set(map(data.group, others))
        torn = sorted(groups.difference(others))
        if torn:
            messages.append(
                f"{len(torn)} groups are in {first} and in {second} ({', '.join(torn[:3])}): metrics will flatter. "
                "Move each into one split, or let data.folds divide them"
            )
    return messages
