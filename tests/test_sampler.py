"""Which samples make up which batch: permutations, ranks that together equal one process, and resuming in mid-epoch."""

from collections import Counter
from itertools import islice
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import Dataset

from segmentation.data.sampler import Index, TrainBatches, TrainLoader, derive_seed, eval_batches

sizes_of_batches = st.integers(1, 7)
worlds = st.integers(1, 5)


def epoch_of(sampler: TrainBatches, epoch: int, start: int = 0) -> list[list[Index]]:
    sampler.place = epoch, start
    return list(islice(sampler, sampler.epoch_length - start))


@pytest.mark.parametrize(("length", "batch"), [(12, 4), (12, 1), (13, 4), (7, 7)])
def test_each_epoch_is_another_permutation(length: int, batch: int) -> None:
    sampler = TrainBatches(length, batch, seed=3)
    orders = []
    for epoch in range(3):
        batches = epoch_of(sampler, epoch)
        assert len(batches) == len(sampler) == length // batch
        assert all(len(b) == batch for b in batches)
        assert {i.epoch for b in batches for i in b} == {epoch}
        assert not any(i.filler for b in batches for i in b)
        orders.append([i.index for b in batches for i in b])
        assert len(set(orders[-1])) == length // batch * batch  # none twice
        assert set(orders[-1]) <= set(range(length))
        assert orders[-1] != sorted(orders[-1])
    assert orders[0] != orders[1] != orders[2] != orders[0]
    assert [i.index for b in epoch_of(TrainBatches(length, batch, 3), 1) for i in b] == orders[1]
    assert [i.index for b in epoch_of(TrainBatches(length, batch, 4), 1) for i in b] != orders[1]


def test_samples_left_over_come_in_other_epochs() -> None:
    sampler = TrainBatches(13, 4, seed=0)
    seen = Counter(i.index for epoch in range(30) for b in epoch_of(sampler, epoch) for i in b)
    assert set(seen) == set(range(13))


def test_global_generator_has_no_say_and_is_left_alone() -> None:
    torch.manual_seed(1)
    state = torch.get_rng_state()
    first = epoch_of(TrainBatches(9, 2, seed=0), 0)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(2)
    assert epoch_of(TrainBatches(9, 2, seed=0), 0) == first


@settings(max_examples=60, deadline=None)
@given(length=st.integers(1, 40), batch=sizes_of_batches, world=worlds, epoch=st.integers(0, 3), shuffle=st.booleans())
def test_ranks_together_are_one_process_with_a_bigger_batch(
    length: int, batch: int, world: int, epoch: int, shuffle: bool
) -> None:
    """Also where the split is smaller than one batch: each step is full, on every rank."""
    one = epoch_of(TrainBatches(length, batch * world, 5, shuffle=shuffle), epoch)
    ranks = [epoch_of(TrainBatches(length, batch, 5, rank, world, shuffle), epoch) for rank in range(world)]
    assert [sum(step, []) for step in zip(*ranks, strict=True)] == one  # noqa: RUF017
    assert len(one) == max(1, length // (batch * world))


def test_a_split_smaller_than_a_batch_is_repeated_evenly() -> None:
    (batch,) = epoch_of(TrainBatches(3, 8, seed=0), 0)
    counts = Counter(i.index for i in batch)
    assert len(batch) == 8
    assert sorted(counts.values()) == [2, 3, 3]


@pytest.mark.parametrize("start", [0, 1, 3, 4])
def test_start_in_mid_epoch(start: int) -> None:
    sampler = TrainBatches(13, 3, seed=0, rank=0)
    assert epoch_of(sampler, 2, start) == epoch_of(sampler, 2)[start:]


def test_unshuffled_order_is_the_data_sets_in_every_epoch() -> None:
    sampler = TrainBatches(5, 2, seed=0, shuffle=False)
    assert epoch_of(sampler, 4) == epoch_of(sampler, 0) == [[Index(0), Index(1)], [Index(2), Index(3)]]


@settings(max_examples=100, deadline=None)
@given(
    sizes=st.lists(st.sampled_from([(4, 4), (4, 6), (6, 4), (8, 8)]), min_size=1, max_size=25),
    batch=sizes_of_batches,
    world=worlds,
)
def test_eval_batches(sizes: list[tuple[int, int]], batch: int, world: int) -> None:
    ranks = [eval_batches(sizes, batch, rank, world) for rank in range(world)]
    assert len({len(rank) for rank in ranks}) == 1  # DDP's collectives demand it
    batches = [b for rank in ranks for b in rank]
    for b in batches:
        assert 1 <= len(b) <= batch
        assert len({sizes[i.index] for i in b}) == 1
        assert len({i.filler for i in b}) == 1
    real = [i.index for b in batches for i in b if not i.filler]
    assert sorted(real) == list(range(len(sizes)))
    assert sum(i.filler for b in batches for i in b) < world  # no more than it takes


def test_derived_seeds_differ_and_stay() -> None:
    seeds = {derive_seed(seed, epoch, index) for seed in range(3) for epoch in range(10) for index in range(50)}
    assert len(seeds) == 1500
    assert derive_seed(0, 1) != derive_seed(1, 0)
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert derive_seed(7, 2, 3) == derive_seed(7, 2, 3)


class Echo(Dataset):
    """Gives back what it was asked for, and pixels of two classes."""

    def __getitem__(self, key: Index) -> tuple[int, int]:
        return key.index, key.epoch


def gather(items: list[tuple[int, int]]) -> dict[str, Any]:
    return {"seen": items, "pixels": np.array([[index, 1] for index, _ in items])}


def loader(workers: int, done: int = 0, limit: int | None = None, accumulate: int = 1) -> TrainLoader:
    """A loader of a run that has done so many batches; `seen` says how many it has done since."""
    sampler = TrainBatches(11, 2, seed=1, limit=limit or 1.0, accumulate=accumulate)
    count = {"batches": done}

    def progress() -> tuple[int, int, int]:
        return *divmod(count["batches"], sampler.epoch_length), accumulate

    options: dict[str, Any] = {"num_workers": workers, "persistent_workers": workers > 0, "collate_fn": gather}
    made = TrainLoader(Echo(), batch_sampler=sampler, progress=progress, **options)
    made.count = count  # type: ignore[attr-defined]
    return made


def take(source: TrainLoader, batches: int) -> list[list[tuple[int, int]]]:
    """Epoch by epoch, as a trainer does."""
    seen: list[Any] = []
    while len(seen) < batches:
        for batch in source:
            seen.append(batch["seen"])
            source.count["batches"] += 1  # type: ignore[attr-defined]
            if len(seen) == batches:
                break
    return seen


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("limit", [None, 3])
def test_a_resumed_loader_goes_on_with_the_very_next_batch(workers: int, limit: int | None) -> None:
    sampler = TrainBatches(11, 2, seed=1)
    expected = [[(i.index, i.epoch) for i in b] for epoch in range(3) for b in epoch_of(sampler, epoch)[:limit]]
    length = limit or 5
    assert take(loader(workers, limit=limit), 3 * length) == expected
    for stop in (1, 2, length, length + 2) if not workers else (2, length):
        before = take(loader(workers, limit=limit), stop)
        assert before + take(loader(workers, stop, limit), 3 * length - stop) == expected


@pytest.mark.parametrize("workers", [0, 2])
def test_a_loader_goes_where_the_progress_is_set(workers: int) -> None:
    """As a LearningRateFinder sets it back, after steps that do not count."""
    source = loader(workers)
    begun = take(source, 7)
    source.count["batches"] = 0  # type: ignore[attr-defined]
    assert take(source, 7) == begun


def test_a_step_knows_the_pixels_of_its_accumulated_batches() -> None:
    source = loader(0, accumulate=2)
    assert source.batch_sampler.epoch_length == len(source) == 4
    batches = list(source)
    for first in (0, 2):
        pair = batches[first : first + 2]
        expected = sum(float(index) for batch in pair for index, _ in batch["seen"]) / 2
        assert [batch["step_pixels"].tolist() for batch in pair] == [[expected, 2.0]] * 2


def test_accumulated_batches_are_a_larger_batch() -> None:
    """Whole steps, also where the split is smaller than one."""
    for length in (13, 5):
        one = epoch_of(TrainBatches(length, 8, 5), 1)
        parts = epoch_of(TrainBatches(length, 2, 5, accumulate=4), 1)
        steps = [sum(parts[first : first + 4], []) for first in range(0, len(parts), 4)]  # noqa: RUF017
        assert steps == one


def test_workers_read_the_next_epoch_while_one_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    source, asked = loader(2), []
    order = TrainBatches.__iter__
    monkeypatch.setattr(TrainBatches, "__iter__", lambda self: (asked.append(b[0].epoch) or b for b in order(self)))
    take(source, 5)
    assert asked.count(1) > 0  # handed out already
    asked.clear()
    assert [epoch for batch in take(source, 5) for _, epoch in batch] == [1] * 10
    assert 0 not in asked
