"""One split on its way into batches: reading, augmenting, collating; and unpacking on the device."""

import os
import signal
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from multiprocessing import parent_process
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.utils.data import Dataset, default_collate

from segmentation.data.base import SegmentationData, count_pixels
from segmentation.data.labels import IGNORE_INDEX
from segmentation.data.sampler import Index, derive_seed
from segmentation.data.transforms import Augment
from segmentation.errors import InputError

#: A sample, or a batch of samples, as `unpack` describes it.
Batch = dict[str, Any]

#: Types that travel in less.
COMPACT = {"mask": torch.int16, "instance": torch.int32}


class RareCrops(NamedTuple):
    """Training crops that are to hold a rare class: a share of all crops, the classes, the samples that have one."""

    share: float
    classes: list[int]
    samples: list[int]


@dataclass(eq=False)
class SplitDataset(Dataset):
    """One split for a DataLoader: reads, augments and names the samples that a sampler asks for by `Index`.

    Args:
        data: the data set.
        split: `train`, `val` or `test`.
        augment: what happens to each sample, or None.
        seed: with an index's epoch it decides what the augmentation draws.
        rare: crops that are to hold a rare class; for them, a sample without one is replaced by another.
        cache: keep all samples in memory, read now; worker processes share it where they are forked (Linux).
    """

    data: SegmentationData
    split: str
    augment: Augment | None = None
    seed: int = 0
    rare: RareCrops | None = None
    cache: bool = False

    def __post_init__(self) -> None:
        self.names = self.data.names(self.split)
        self.cached = []
        if self.cache:
            with ThreadPoolExecutor() as pool:
                self.cached = list(pool.map(self._read, range(len(self))))

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, key: Index | int) -> Batch:
        index, epoch, filler = key if isinstance(key, Index) else Index(key)
        focus = []
        if self.rare:
            rng = np.random.default_rng([self.seed, epoch, index])
            if rng.random() < self.rare.share:
                focus = self.rare.classes
                if index not in self.rare.samples:
                    index = int(rng.choice(self.rare.samples))
        sample = dict(self.cached[index] if self.cached else self._read(index))
        size = tuple(sample["mask"].shape)
        sample["mask"] = sample["mask"].long()
        if filler:
            sample["mask"].fill_(IGNORE_INDEX)
        if self.augment:
            sample = self.augment(sample, derive_seed(self.seed, epoch, index), focus)
        return {
            **sample,
            "name": self.names[index],
            "size": size,
            "index": -1 if filler else index,
            "pixels": count_pixels(sample["mask"], self.data.labels.num_classes)[:-1],
        }

    def _read(self, index: int) -> Batch:
        try:
            sample = self.data.load(self.split, index)
        except InputError as error:  # without its class, which torch cannot build again outside a worker
            raise InputError(str(error)) from error
        return {**sample, "mask": sample["mask"].short()}


def end_with_parent(worker: int) -> None:
    """Let a worker end by its parent's SIGTERM or death only, on Linux.

    A scheduler signals all processes of a job, and a worker that ended by that would take the run with it, unsaved.
    torch notes the parent's id only after the worker's start, and so misses a death before.
    """
    parent = parent_process()
    if parent is None or not hasattr(signal, "sigtimedwait"):  # Linux has it
        return
    signals = {signal.SIGTERM, signal.SIGUSR1}
    signal.pthread_sigmask(signal.SIG_BLOCK, signals)

    def listen() -> None:
        while parent.is_alive():
            received = signal.sigtimedwait(signals, 1)
            if received and received.si_pid == parent.pid:
                break
        os._exit(0)

    threading.Thread(target=listen, daemon=True).start()


def collate(items: list[Batch]) -> Batch:
    """A batch as it travels from a worker to the device: class indices in two bytes, ids in four, and no tensor for
    what is tiny, as each one costs a connection between the processes (`python benchmarks/loading.py`)."""
    sizes = {item["name"]: tuple(item["mask"].shape) for item in items}
    if len(set(sizes.values())) > 1:
        raise InputError(
            f"images of one batch have unequal sizes: {sizes}. If the files have changed since the run began, start it "
            "again with --resume; else take the transform away from data.augment that changes sizes"
        )
    batch = {}
    for key, first in items[0].items():
        values: Any = [item[key] for item in items]
        if isinstance(first, torch.Tensor):
            values = default_collate([value.to(COMPACT.get(key, value.dtype)) for value in values])
        elif key != "name":
            values = np.array(values)
        batch[key] = values
    return batch


def unpack(batch: Batch) -> Batch:
    """A batch as the module gets it.

    Returns:
        {"image": (N, C, H, W), "mask": (N, H, W) int64, "size": (N, 2) original H and W, "index": (N,) position in the
        split or -1 for a filler, "pixels": (N, K) of each class, "name": N names}; "step_pixels", (K,), in training, as
        `TrainLoader` says; and "instance" and "weight", (N, H, W), where the data set has them. All on the device, but
        size, index and pixels: what is not pinned holds up a step on its way there.
    """
    unpacked = {}
    for key, value in batch.items():
        if isinstance(value, np.ndarray):
            value = torch.from_numpy(value)
        unpacked[key] = value.long() if key in COMPACT else value
    return unpacked
