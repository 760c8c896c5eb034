"""Dividing samples: by fractions, into folds, by hand. Groups (a patient, a video, a slide) are never torn apart."""

from collections.abc import Callable, Collection, Mapping, Sequence

import numpy as np

from segmentation.data.base import SPLITS, Sample, SegmentationData
from segmentation.errors import InputError


def divide(names: Sequence[str], shares: Sequence[float], group: Callable[[str], str], seed: int) -> list[list[int]]:
    """Divide samples into parts: a function of (sorted) names, shares and seed.

    Returns:
        indices of the samples of a part for each of `shares`, and of the rest. A part of a share above 0 is never
        empty, but the rest may be.
    """
    groups = _shuffled_groups(names, group, seed)
    parts: list[list[int]] = []
    for share in shares:
        wanted = max(1, round(share * len(names))) if share else 0
        part: list[int] = []
        while groups and len(part) < wanted:
            part += groups.pop(0)
        parts.append(sorted(part))
    return [*parts, sorted(index for members in groups for index in members)]


def fold(names: Sequence[str], count: int, group: Callable[[str], str], seed: int) -> list[list[int]]:
    """Divide samples into `count` folds of about one size. Returns the indices of each fold, in their order.

    Raises:
        InputError: fewer groups than folds.
    """
    groups = _shuffled_groups(names, group, seed)
    if len(groups) < count:
        raise InputError(f"data.folds {count}: there are only {len(groups)} groups of samples to divide")
    folds: list[list[int]] = [[] for _ in range(count)]
    for members in sorted(groups, key=len, reverse=True):  # the largest first, each where there is most room
        min(folds, key=len).extend(members)
    return [sorted(members) for members in folds]


def _shuffled_groups(names: Sequence[str], group: Callable[[str], str], seed: int) -> list[list[int]]:
    members: dict[str, list[int]] = {}
    for index, name in enumerate(names):
        members.setdefault(group(name), []).append(index)
    groups = list(members.values())
    return [groups[i] for i in np.random.default_rng(seed).permutation(len(groups))]


class _Selection(SegmentationData):
    """Some samples of another data set, in other splits: split -> (split, index) of each sample in `data`."""

    def __init__(self, data: SegmentationData, picks: dict[str, list[tuple[str, int]]]) -> None:
        super().__init__(data.labels)
        self.data, self.picks, self.problems = data, picks, data.problems
        self._names = {}
        for split, chosen in picks.items():
            names = [data.names(source)[index] for source, index in chosen]
            if len(set(names)) < len(names):  # samples of two splits may have one name: 01 of train/ and 01 of val/
                names = [f"{source}/{name}" for (source, _), name in zip(chosen, names, strict=True)]
            self._names[split] = names

    def names(self, split: str) -> list[str]:
        return self._names[split]

    def load(self, split: str, index: int) -> Sample:
        return self.data.load(*self.picks[split][index])

    def group(self, name: str) -> str:
        return self.data.group(name)

    def fingerprint(self, split: str) -> str:
        picks = self.picks[split]
        return repr((picks, [self.data.fingerprint(source) for source in sorted({source for source, _ in picks})]))


def cross_validation(data: SegmentationData, folds: int, number: int, seed: int) -> SegmentationData:
    """Fold `number` of `folds` to validate on, the others to train on: of what the data set has to train and validate.
    Its test split stays."""
    if folds < 2 or not 0 <= number < folds:
        raise InputError(
            f"data.fold {number} of data.folds {folds}: give two folds or more, and a fold of 0..folds - 1"
        )
    pool = [*_all(data, "train"), *_all(data, "val")]
    val = set(fold([data.names(split)[index] for split, index in pool], folds, data.group, seed)[number])
    parts = {
        "train": [sample for index, sample in enumerate(pool) if index not in val],
        "val": [sample for index, sample in enumerate(pool) if index in val],
    }
    return _Selection(data, parts | {"test": _all(data, "test")})


def without(data: SegmentationData, bad: Mapping[str, Collection[int]]) -> SegmentationData:
    """A data set without its bad samples: split -> indices."""
    return _Selection(data, {s: [(s, i) for s, i in _all(data, s) if i not in bad.get(s, ())] for s in SPLITS})


def _all(data: SegmentationData, split: str) -> list[tuple[str, int]]:
    return [(split, index) for index in range(len(data.names(split)))]
