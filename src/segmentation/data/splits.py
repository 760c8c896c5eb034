"""Splits of a data set: random shares, folds, subsets. Groups (a patient, a video) stay in one split."""

from itertools import chain

import numpy as np

from segmentation.data.base import SPLITS, Sample, SegmentationData
from segmentation.errors import InputError, Problem


def divide(groups: list[str], shares: list[float], seed: int) -> list[list[int]]:
    """Divide samples at random, given the group of each.

    Returns:
        indices of the samples of each share, then of the rest. Only the part of a share above 0 is never empty.
    """
    left = _shuffle(groups, seed)
    parts = []
    for share in shares:
        size = max(1, round(share * len(groups))) if share else 0
        part: list[int] = []
        while left and len(part) < size:
            part += left.pop(0)
        parts.append(sorted(part))
    return [*parts, sorted(chain(*left))]


def fold(groups: list[str], count: int, seed: int) -> list[list[int]]:
    """Divide samples, given the group of each, into `count` folds of about one size. Returns the indices of each."""
    shuffled = _shuffle(groups, seed)
    if len(shuffled) < count:
        raise InputError(f"data.folds {count}: there are only {len(shuffled)} groups of samples to divide")
    folds: list[list[int]] = [[] for _ in range(count)]
    for members in sorted(shuffled, key=len, reverse=True):  # the largest first, each where there is most room
        min(folds, key=len).extend(members)
    return [sorted(members) for members in folds]


def _shuffle(groups: list[str], seed: int) -> list[list[int]]:
    """The indices of the samples of each group, in random order."""
    members: dict[str, list[int]] = {}
    for index, group in enumerate(groups):
        members.setdefault(group, []).append(index)
    found = list(members.values())
    order = np.random.default_rng(seed).permutation(len(found))
    return [found[position] for position in order]


class Subset(SegmentationData):
    """Chosen samples of another data set, as (split, index, name) for each split of this one."""

    def __init__(self, data: SegmentationData, samples: dict[str, list[tuple[str, int, str]]]) -> None:
        super().__init__(data.labels)
        self.data = data
        self.samples = samples
        self.problems = data.problems

    def names(self, split: str) -> list[str]:
        return [name for _, _, name in self.samples[split]]

    def load(self, split: str, index: int) -> Sample:
        source, position, _ = self.samples[split][index]
        return self.data.load(source, position)

    def find_problems(self) -> list[Problem]:
        return self.data.find_problems()

    def group(self, name: str) -> str:
        return self.data.group(name)

    def fingerprint(self, split: str) -> str:
        sources = [self.data.fingerprint(source) for source in SPLITS if self.data.names(source)]
        return f"{self.samples[split]} {sources}"


def cross_validation(data: SegmentationData, folds: int, number: int, seed: int) -> Subset:
    """Fold what there is to train and validate on: fold `number` is to validate, the others to train. Test stays."""
    if not 0 <= number < folds or folds < 2:
        raise InputError(f"data.fold {number} of data.folds {folds}: give two folds or more, and a fold below folds")
    pool = _samples(data, "train") + _samples(data, "val")
    groups = [data.group(name) for _, _, name in pool]
    if len({name for _, _, name in pool}) < len(pool):  # 01 of train/ and 01 of val/
        pool = [(split, index, f"{split}/{name}") for split, index, name in pool]
    chosen = fold(groups, folds, seed)
    val = chosen.pop(number)
    train = sorted(chain(*chosen))
    samples = {
        "train": [pool[i] for i in train],
        "val": [pool[i] for i in val],
        "test": _samples(data, "test"),
    }
    return Subset(data, samples)


def without(data: SegmentationData, split: str, bad: dict[int, InputError]) -> Subset:
    """Leave out the samples of a split that cannot be used."""
    samples = {each: _samples(data, each) for each in SPLITS}
    samples[split] = [sample for sample in samples[split] if sample[1] not in bad]
    return Subset(data, samples)


def _samples(data: SegmentationData, split: str) -> list[tuple[str, int, str]]:
    return [(split, index, name) for index, name in enumerate(data.names(split))]
