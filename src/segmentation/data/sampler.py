"""Which samples make up which batch, in which process: the whole order is a function of (seed, epoch) alone.

A sampler hands out `Index`, which carries the epoch to the worker (a persistent worker never sees an attribute that
changes in the main process), so that what a sample looks like is a function of (seed, epoch, index).
"""

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import count
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.utils.data import DataLoader, Sampler


def derive_seed(*parts: int) -> int:
    """A seed that is a function of all of `parts` (non-negative integers), the same on every machine."""
    return int(np.random.SeedSequence(parts).generate_state(1, np.uint64)[0]) >> 1


class Index(NamedTuple):
    """What a sampler asks of a data set: sample `index` as it looks in `epoch`; a filler counts nowhere."""

    index: int  # type: ignore[assignment]  # hides the method of tuples, which nobody needs here
    epoch: int = 0
    filler: bool = False


@dataclass(eq=False)
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
        place: epoch and batch from which the next iteration goes on.
    """

    length: int
    batch_size: int
    seed: int
    rank: int = 0
    world_size: int = 1
    shuffle: bool = True
    limit: int | float = 1.0
    accumulate: int = 1
    place: tuple[int, int] = (0, 0)

    def __len__(self) -> int:
        steps = max(1, self.length // (self.batch_size * self.world_size * self.accumulate))
        return steps * self.accumulate

    @property
    def epoch_length(self) -> int:
        """Batches of an epoch."""
        if isinstance(self.limit, int):
            return min(len(self), self.limit)
        return max(1, int(len(self) * self.limit))

    def __iter__(self) -> Iterator[list[Index]]:
        first_epoch, start = self.place
        samples = self.batch_size * self.world_size  # of all processes' batches
        for epoch in count(first_epoch):
            number = epoch if self.shuffle else 0
            order = list(range(self.length))
            if self.shuffle:
                generator = torch.Generator().manual_seed(derive_seed(self.seed, epoch))
                order = torch.randperm(self.length, generator=generator).tolist()
            for batch in range(start, self.epoch_length):
                first = batch * samples + self.rank * self.batch_size
                positions = range(first, first + self.batch_size)
                yield [Index(order[position % self.length], number) for position in positions]
            start = 0


def eval_batches(
    sizes: Sequence[tuple[int, int]],
    batch_size: int,
    rank: int = 0,
    world_size: int = 1,
) -> list[list[Index]]:
    """One process's batches of images of one size, at most `batch_size` each. Over all processes each sample comes
    once, and all have the same number of batches, as DDP's collectives demand: fillers make up for what is missing.
    """
    groups = defaultdict(list)
    for index, size in enumerate(sizes):
        groups[size].append(Index(index))
    batches = []
    for group in groups.values():
        for first in range(0, len(group), batch_size):
            batches.append(group[first : first + batch_size])
    batches += [[Index(0, filler=True)]] * (-len(batches) % world_size)
    return batches[rank::world_size]


class TrainLoader(DataLoader):
    """A DataLoader over `TrainBatches`, an epoch at a time. Its workers read on into the next epoch while one ends.

    Each batch gets `step_pixels`, (K,) float32: the pixels of each class in the batches of its optimizer step, averaged
    over these batches. It is what a mean over the pixels of the whole step divides by.

    Args:
        progress: says where training is, each time that an epoch begins: the epoch, the next batch in it, and the
            batches of an optimizer step. A resumed run needs no other state.
    """

    batch_sampler: TrainBatches

    def __init__(
        self,
        *args,
        progress: Callable[[], tuple[int, int, int]],
        **kwargs,
    ) -> None:
        super().__init__(*args, **kwargs)
        self.progress = progress
        self.batches: Iterator[Any] = iter(())
        self.following = (-1, 0)  # epoch and batch that `batches` gives next

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]  # a generator over what DataLoader gives
        epoch, batch, accumulate = self.progress()
        if self.following != (epoch, batch):
            self.batch_sampler.place = (epoch, batch)
            self.batches = super().__iter__()
        length = self.batch_sampler.epoch_length
        for first in range(batch, length, accumulate):
            step = [next(self.batches) for _ in range(accumulate)]
            batch = first + accumulate
            self.following = (epoch, batch) if batch < length else (epoch + 1, 0)
            pixels = np.mean([each["pixels"].sum(axis=0) for each in step], axis=0)
            for each in step:
                yield {**each, "step_pixels": torch.from_numpy(pixels).float()}
