"""Which samples make up which batch, in which process: the whole order is a function of (seed, epoch) alone.

A sampler hands out `Index`, which carries the epoch to the worker (a persistent worker never sees an attribute that
changes in the main process), so that what a sample looks like is a function of (seed, epoch, index).
"""

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from itertools import count
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.utils.data import DataLoader, Sampler


def derive_seed(*parts: int) -> int:
    """A seed that is a function of all of `parts` (non-negative integers), the same on every machine."""
    return int(np.random.SeedSequence(parts).generate_state(1, np.uint64)[0] >> 1)


class Index(NamedTuple):
    """What a sampler asks of a data set: sample `index` as it looks in `epoch`; a filler counts nowhere."""

    index: int  # type: ignore[assignment]  # hides the method of tuples, which nobody needs here
    epoch: int = 0
    filler: bool = False


class TrainBatches(Sampler[list[Index]]):
    """Batches of one process over permutations of the samples, one an epoch; epoch after epoch, without end, so that
    workers read the next epoch's while this one ends.

    An epoch is a whole number of optimizer steps. Step i of N processes that accumulate M batches holds the samples
    that step i of one process with an N x M times larger batch would hold. Samples that do not fill a step wait for
    another epoch's permutation; a split smaller than a step is repeated to fill it.

    Args:
        length: number of samples.
        batch_size: samples of one process's batch.
        seed: seed of the permutations.
        rank: this process.
        world_size: number of processes.
        shuffle: False keeps the order of the data set, in epoch 0 for ever (to overfit a batch).
        limit: batches that count as a whole epoch (Trainer's `limit_train_batches`), a number or a share.
        accumulate: batches of an optimizer step.

    Attributes:
        epoch_length: batches of an epoch.
        place: epoch and batch from which the next iteration goes on.
    """

    def __init__(
        self,
        length: int,
        batch_size: int,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
        shuffle: bool = True,
        limit: int | float = 1.0,
        accumulate: int = 1,
    ) -> None:
        self.length = length
        self.batch_size = batch_size
        self.seed = seed
        self.shuffle = shuffle
        self.rank = rank
        self.world_size = world_size
        self.accumulate = accumulate
        self.epoch_length = min(len(self), limit) if isinstance(limit, int) else max(1, int(len(self) * limit))
        self.place = 0, 0

    def __len__(self) -> int:
        steps = max(1, self.length // (self.batch_size * self.world_size * self.accumulate))
        return steps * self.accumulate

    def __iter__(self) -> Iterator[list[Index]]:
        first_epoch, start = self.place
        step = self.batch_size * self.world_size
        for epoch in count(first_epoch):
            number = epoch if self.shuffle else 0
            order = list(range(self.length))
            if self.shuffle:
                generator = torch.Generator().manual_seed(derive_seed(self.seed, epoch))
                order = torch.randperm(self.length, generator=generator).tolist()
            for batch in range(start, self.epoch_length):
                first = batch * step + self.rank * self.batch_size
                yield [Index(order[i % self.length], number) for i in range(first, first + self.batch_size)]
            start = 0


class EvalBatches(Sampler[list[Index]]):
    """Batches of images of one size, at most `batch_size` each, each sample exactly once over all processes.

    All processes get the same number of batches, as DDP's collectives demand: fillers make up for what is missing.
    """

    def __init__(self, sizes: Sequence[tuple[int, int]], batch_size: int, rank: int = 0, world_size: int = 1) -> None:
        groups: dict[tuple[int, int], list[int]] = defaultdict(list)
        for index, size in enumerate(sizes):
            groups[size].append(index)
        batches = [
            [Index(index) for index in group[first : first + batch_size]]
            for group in groups.values()
            for first in range(0, len(group), batch_size)
        ]
        batches += [[Index(0, filler=True)]] * (-len(batches) % world_size)
        self.batches = batches[rank::world_size]

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[list[Index]]:
        return iter(self.batches)


class Progress(NamedTuple):
    """Where training is: the epoch, the next batch in it, and the batches of an optimizer step."""

    epoch: int
    batch: int
    accumulate: int = 1


class TrainLoader(DataLoader):
    """A DataLoader over `TrainBatches`, an epoch at a time. Its workers read on into the next epoch while one ends.

    Each batch gets `step_pixels`, (K,) float32: the pixels of each class in the batches of its optimizer step, averaged
    over these batches. It is what a mean over the pixels of the whole step divides by.

    Args:
        progress: says where to go on from, each time that an epoch begins: a resumed run needs no other state.
    """

    batch_sampler: TrainBatches

    def __init__(self, *args: Any, progress: Callable[[], Progress], **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.progress = progress
        self.batches: Iterator[Any] | None = None
        self.following = 0, 0  # epoch and batch that `batches` gives next

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]  # a generator over what DataLoader gives
        epoch, batch, accumulate = self.progress()
        workers_ended = self.batches is not self._iterator
        if self.batches is None or workers_ended or self.following != (epoch, batch):
            self.batch_sampler.place = epoch, batch
            self.batches = super().__iter__()
        while batch < self.batch_sampler.epoch_length:
            step = [next(self.batches) for _ in range(accumulate)]
            batch += accumulate
            ends = batch >= self.batch_sampler.epoch_length
            self.following = (epoch + 1, 0) if ends else (epoch, batch)
            pixels = np.sum([each["pixels"].sum(axis=0) for each in step], axis=0) / accumulate
            for each in step:
                yield {**each, "step_pixels": torch.from_numpy(pixels).float()}
