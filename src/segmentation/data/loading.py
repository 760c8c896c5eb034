"""One split on its way into batches: reading, augmenting, collating; and unpacking on the device."""

import os
import signal
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.utils.data import Dataset, default_collate

from segmentation.data.base import Sample, SegmentationData, count_pixels
from segmentation.data.labels import IGNORE_INDEX
from segmentation.data.sampler import Index, derive_seed
from segmentation.data.transforms import Augment
from segmentation.errors import InputError

#: What of a sample is so small that it travels without a tensor.
TINY = ("size", "index", "pixels")


class RareCrops(NamedTuple):
    """Training crops that are to hold a rare class: a share of all crops, the classes, the samples that have one."""

    share: float
    classes: list[int]
    samples: list[int]


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

    def __init__(
        self,
        data: SegmentationData,
        split: str,
        augment: Augment | None = None,
        seed: int = 0,
        rare: RareCrops | None = None,
        cache: bool = False,
    ) -> None:
        self.data, self.split, self.augment, self.seed, self.rare = data, split, augment, seed, rare
        self.names = data.names(split)
        self.kept: list[Sample] = []
        if cache:
            with ThreadPoolExecutor() as pool:
                self.kept = list(pool.map(self._load, range(len(self.names))))
            for sample in self.kept:
                sample["mask"] = sample["mask"].short()  # class indices in two bytes

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, key: Index | int) -> dict[str, Any]:
        index, epoch, filler = key if isinstance(key, Index) else Index(key)
        focus: list[int] = []
        if self.rare is not None:
            rng = np.random.default_rng([self.seed, epoch, index])
            if rng.random() < self.rare.share:
                focus = self.rare.classes
                index = index if index in self.rare.samples else int(rng.choice(self.rare.samples))
        sample = self._load(index)
        size = tuple(sample["mask"].shape)
        if self.augment is not None:
            sample = self.augment(sample, derive_seed(self.seed, epoch, index), focus)
        item: dict[str, Any] = {**sample, "name": self.names[index], "size": size, "index": index}
        if filler:
            item |= {"mask": torch.full_like(item["mask"], IGNORE_INDEX), "index": -1}
        item["pixels"] = count_pixels(item["mask"], self.data.labels.num_classes)[:-1].numpy()
        return item

    def _load(self, index: int) -> Sample:
        try:
            sample = (self.kept[index] if self.kept else self.data.load(self.split, index)).copy()
        except InputError as error:  # without its class, which torch cannot build again outside a worker
            raise InputError(str(error)) from error
        sample["mask"] = sample["mask"].long()
        return sample


def ignore_preemption(worker: int) -> None:
    """A scheduler signals all processes of a job, and a worker that died of it would take the run with it, unsaved. So
    a worker ends by SIGTERM only when its own parent, who is done with it, has sent it."""
    if not hasattr(signal, "sigwaitinfo"):  # Linux has it
        return
    numbers = {signal.SIGTERM, signal.SIGUSR1}
    signal.pthread_sigmask(signal.SIG_BLOCK, numbers)

    def listen() -> None:
        while signal.sigwaitinfo(numbers).si_pid != os.getppid():
            pass
        os._exit(0)

    threading.Thread(target=listen, daemon=True).start()


def collate(items: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """A batch as it travels from a worker to the device: class indices in two bytes, ids in four, and no tensor for
    what is tiny, as each one costs a connection between the processes (`python benchmarks/loading.py`)."""
    batch: dict[str, Any] = {key: [item[key] for item in items] for key in items[0]}
    tiny = {key: np.array(batch[key]) for key in TINY}
    compact = {"mask": torch.int16, "instance": torch.int32}
    shapes = [tuple(mask.shape) for mask in batch["mask"]]
    if len(set(shapes)) > 1:
        found = ", ".join(f"{name} {w}x{h}" for name, (h, w) in zip(batch["name"], shapes, strict=True))
        raise InputError(
            f"images of one batch have unequal sizes: {found}. If the files have changed since the run began, start it "
            "again with --resume; else take the transform away from data.augment that changes sizes"
        )
    for key in batch.keys() - {"name", *TINY}:
        batch[key] = default_collate([x.to(compact.get(key, x.dtype)) for x in batch[key]])
    return batch | tiny


def unpack(batch: dict[str, Any]) -> dict[str, Any]:
    """A batch as the module gets it.

    Returns:
        {"image": (N, C, H, W), "mask": (N, H, W) int64, "size": (N, 2) original H and W, "index": (N,) position in the
        split or -1 for a filler, "pixels": (N, K) of each class, "name": N names}; "step_pixels", (K,), in training, as
        `TrainLoader` says; and "instance" and "weight", (N, H, W), where the data set has them. All on the device, but
        size, index and pixels: what is not pinned holds up a step on its way there.
    """
    whole = {key: batch[key].long() for key in batch.keys() & {"mask", "instance"}}
    tiny = {key: torch.as_tensor(batch[key]) for key in TINY}
    return {**batch, **whole, **tiny}
