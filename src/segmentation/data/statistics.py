"""Statistics of a split: every sample is read once, before the first step. This finds what is wrong with the files, and
counts what losses, normalisation and sampling need. They are kept in the user's cache, by names, sizes and times of the
files, and so counted once; but for samples that are bad, which are read each time.
"""

import hashlib
import json
import os
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import astuple, dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import torch
from PIL import Image
from platformdirs import user_cache_path
from rich.progress import track

from segmentation.data.base import SegmentationData, count_pixels
from segmentation.data.labels import IGNORE_INDEX, Labels
from segmentation.data.writing import write_text
from segmentation.errors import InputError

#: Raised when what a cache file holds changes, so that old ones are not read.
VERSION = 10

#: 256 x 255² < 2²⁴, up to which float32 holds every integer.
BLOCK = 256


@dataclass(frozen=True)
class Record:
    """What one sample holds.

    Args:
        height: of the image.
        width: of the image.
        pixels: pixels of each class; ignored ones count nowhere.
        total: of each channel, the sum of its pixels, scaled as `scale_of` says.
        squares: of each channel, the sum of their squares.
        low: the smallest number in the image, as the file has it.
        high: the largest one.
        outline: 256 bits in hexadecimal, nearly the same for images that look the same (`outline_of`).
    """

    height: int
    width: int
    pixels: list[int]
    total: list[float]
    squares: list[float]
    low: float
    high: float
    outline: str


@dataclass(frozen=True)
class SplitStatistics:
    """Counts over one split.

    Args:
        names: names of the classes.
        records: what the samples hold, in the order of their names.
        bad: index -> what is wrong with a sample that is not in `records`.
    """

    names: list[str]
    records: list[Record]
    bad: dict[int, InputError] = field(default_factory=dict)

    @cached_property
    def sizes(self) -> list[tuple[int, int]]:
        """(H, W) of every sample."""
        return [(record.height, record.width) for record in self.records]

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
        pixels = self.counts.sum(axis=0)
        return pixels / max(1, pixels.sum())

    @property
    def pixels_where(self) -> list[int]:
        """For each class, the valid pixels of the samples where it occurs: `median` class weights take them."""
        valid = self.counts.sum(axis=1)
        return (valid @ (self.counts > 0)).tolist()

    @property
    def absent(self) -> list[str]:
        """Names of the classes without a pixel."""
        return [name for name, pixels in zip(self.names, self.pixels, strict=True) if not pixels]

    @property
    def mean(self) -> list[float]:
        """Of each channel, the mean of all pixels, scaled as `scale_of` says."""
        return self._average([record.total for record in self.records]).tolist()

    @property
    def std(self) -> list[float]:
        """Of each channel, the standard deviation, likewise."""
        squares = self._average([record.squares for record in self.records])
        variance = squares - np.square(self.mean)
        rounding = 1e-12 * squares  # what may be left of a channel of one value: an alpha channel, say
        return np.sqrt(np.where(variance > rounding, variance, 0)).tolist()

    def digest(self, names: list[str]) -> str:
        """A number for what the samples hold, wherever their files are.

        Args:
            names: of the samples.
        """
        held: list[Any] = [names, self.names]
        for record in self.records:
            sums = [f"{total:.6g}" for total in record.total]  # the last digits depend on how they are added up
            held.append([record.height, record.width, record.pixels, sums])
        return hashlib.sha256(json.dumps(held).encode()).hexdigest()

    def _average(self, sums: list[list[float]]) -> np.ndarray:
        pixels = np.prod(self.sizes, axis=1).sum()
        return np.sum(sums, axis=0) / pixels


def scale_of(dtype: torch.dtype, labels: Labels | None = None) -> float:
    """What stands for 1.0 in an image: what the data set declares, else the largest integer of its type; floating-point
    images are taken as they are."""
    if labels is not None and labels.scale is not None:
        return labels.scale
    if dtype.is_floating_point:
        return 1.0
    return float(torch.iinfo(dtype).max)


def compute_statistics(data: SegmentationData, split: str) -> SplitStatistics:
    """Count the pixels of a split, or take the counts from the cache.

    Args:
        data: the data set.
        split: `train`, `val` or `test`.

    Returns:
        the statistics; samples that cannot be used are left out, and named.
    """
    labels = data.labels
    names = data.names(split)
    counted = f"{VERSION} {split} {labels.values} {labels.ignore} {data.fingerprint(split)}"
    key = hashlib.sha256(counted.encode()).hexdigest()
    folder = user_cache_path("unet-family-template") / "statistics"
    path = folder / f"{key[:32]}.json"
    found: list[Any] = [None] * len(names)  # a Record each, or what is wrong with the sample
    with suppress(OSError, ValueError, TypeError):  # no cache, or a damaged one
        rows = json.loads(path.read_text())
        if len(rows) == len(names):
            found = [row and Record(*row) for row in rows]
    missing = [index for index, record in enumerate(found) if not record]
    if missing:
        for index, record in zip(missing, _read(data, split, missing), strict=True):
            found[index] = record
        # What is bad is read again: a disk that was away for a moment must not be remembered.
        rows = [isinstance(record, Record) and astuple(record) for record in found]
        with suppress(OSError):  # a cache that cannot be written only costs time
            write_text(path, json.dumps(rows))
    records = [record for record in found if isinstance(record, Record)]
    bad = {index: error for index, error in enumerate(found) if not isinstance(error, Record)}
    return SplitStatistics(labels.names, records, bad)


def _read(data: SegmentationData, split: str, indices: list[int]) -> Iterator[Record | InputError]:
    """Examine samples of a split, in several threads and with a progress bar."""
    names = data.names(split)

    def read(index: int) -> Record | InputError:
        try:
            return examine(data, split, index, names[index])
        except InputError as error:
            error.__cause__ = error.__context__ = None  # frames of these errors hold images
            return error.with_traceback(None)

    pool = ThreadPoolExecutor(available_cores())
    try:
        yield from track(
            pool.map(read, indices),
            f"Reading {split} once",
            total=len(indices),
            transient=True,
            disable=not sys.stdout.isatty(),
        )
    finally:
        pool.shutdown(cancel_futures=True)  # after Ctrl-C the others are not read


def available_cores() -> int:
    """Cores that this process may use, where the system says it (Linux)."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def examine(
    data: SegmentationData,
    split: str,
    index: int,
    name: str,
) -> Record:
    """Read a sample and count its pixels.

    Args:
        data: the data set.
        split: `train`, `val` or `test`.
        index: the sample's place in the split.
        name: the sample's name, for errors.

    Raises:
        InputError: it does not hold to the contract of a data set (`FolderData` does); or its image is not finite.
    """
    labels = data.labels
    sample = data.load(split, index)
    image = sample["image"]
    mask = sample["mask"]
    where = f"{split} sample {name}"
    shape = (labels.channels, *mask.shape)
    if mask.ndim != 2 or image.shape != shape:
        raise InputError(f"{where}: image {tuple(image.shape)} of mask {tuple(mask.shape)} must be {shape}")
    pixels = count_pixels(mask.long(), labels.num_classes)
    if mask.dtype != torch.int64 or pixels.sum() < mask.numel():
        last = labels.num_classes - 1
        raise InputError(f"{where}: the mask must be int64 in 0..{last}, or {IGNORE_INDEX} to ignore")
    values = image.numpy()
    sums, low, high = _sum_up(values)
    if not np.isfinite(sums).all():
        raise InputError(f"{where}: the image holds NaN or infinite values. Replace them")
    total, squares = sums.T
    scale = scale_of(image.dtype, labels)
    return Record(
        height=shape[1],
        width=shape[2],
        pixels=pixels[:-1].tolist(),
        total=(total / scale).tolist(),
        squares=(squares / scale**2).tolist(),
        low=float(low),
        high=float(high),
        outline=outline_of(values),
    )


def outline_of(image: np.ndarray) -> str:
    """A difference hash: whether each of 16 x 16 cells of an image (C, H, W) is brighter than the one left of it."""
    step = max(1, min(image.shape[1:]) // 64)
    gray = image[:, ::step, ::step].sum(axis=0, dtype=np.float32)
    cells = np.asarray(Image.fromarray(gray).resize((17, 16), Image.Resampling.BOX))
    bits = np.diff(cells) > 0
    return np.packbits(bits).tobytes().hex()


def _sum_up(image: np.ndarray) -> tuple[np.ndarray, Any, Any]:
    """Of each channel the sum of its pixels and of their squares, (C, 2); the smallest number, and the largest."""
    # Of BLOCK bytes float32 holds the sum of squares exactly, in half the memory. BLAS starts no threads for so few.
    dtype = np.float32 if image.dtype == np.uint8 else np.float64
    size = image[0].size
    pixels = np.zeros(size + -size % BLOCK, dtype)
    blocks = pixels.reshape(-1, BLOCK)
    ones = np.ones(BLOCK, dtype)
    sums = []
    for channel in image:
        pixels[:size] = channel.ravel()
        sums.append((np.vecdot(blocks, ones), np.vecdot(blocks, blocks)))
    return np.array(sums).sum(axis=2, dtype=np.float64), image.min(), image.max()
