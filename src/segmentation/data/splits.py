"""Splits of a data set: random shares, folds, subsets. Groups (a patient, a video) stay in one split."""

from itertools import chain

import numpy as np

from segmentation.data.base import SPLITS, Sample, SegmentationData
from segmentation.errors import InputError, Problem


def divide(
    groups: list[str],
    shares: list[float],
    seed: int,
) -> list[list[int]]:
    """Divide samples at random.

    Args:
        groups: the group of each sample.
        shares: sizes of the parts, as shares of all samples.
        seed: of the order in which the groups fill the parts.

    Returns:
        indices of the samples of each part, then of the rest. No part of a share above 0 stays empty, if the samples
        suffice.
    """
    left = _shuffle(groups, seed)
    parts = []
    for share in shares:
        part: list[int] = []
        size = max(round(share * len(groups)), int(share > 0))
        while left and len(part) < size:
            part += left.pop(0)
        parts.append(sorted(part))
    return [*parts, sorted(chain(*left))]


def fold(
    groups: list[str],
    count: int,
    seed: int,
) -> list[list[int]]:
    """Divide samples into folds of about one size.

    Args:
        groups: the group of each sample.
        count: of folds.
        seed: of the order of groups of one size.

    Returns:
        indices of the samples of each fold.

    Raises:
        InputError: there are fewer groups than folds.
    """
    shuffled = _shuffle(groups, seed)
    if len(shuffled) < count:
        raise InputError(f"data.folds {count}: there are only {len(shuffled)} groups of samples to divide")
    folds: list[list[int]] = [[] for _ in range(count)]
    for members in sorted(shuffled, key=len, reverse=True):  # the largest first
        min(folds, key=len).extend(members)
    return [sorted(members) for members in folds]


def _shuffle(groups: list[str], seed: int) -> list[list[int]]:
    """The indices of the samples of each group, in random order."""
    members: dict[str, list[int]] = {}
    for index, group in enumerate(groups):
        members.setdefault(group, []).append(index)
    found = list(members.values())
    return [found[position] for position in np.random.default_rng(seed).permutation(len(found))]


class Subset(SegmentationData):
    """Samples of another data set, at first all of them.

    Args:
        data: the other data set.

    Attributes:
        samples: for each split, the samples as (split, index, name): where it is in `data`, and its name here.
    """

    def __init__(self, data: SegmentationData) -> None:
        super().__init__(data.labels)
        self.data = data
        self.problems = data.problems
        self.samples = {}
        for split in SPLITS:
            self.samples[split] = [(split, index, name) for index, name in enumerate(data.names(split))]

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


def cross_validation(
    data: SegmentationData,
    folds: int,
    number: int,
    seed: int,
) -> Subset:
    """Fold what there is to train and validate on. The test split stays.

    Args:
        data: the data set.
        folds: how many.
        number: of the fold to validate on; the others are to train on.
        seed: of the division.

    Raises:
        InputError: there is no such fold, or there are fewer groups than folds.
    """
    if not 0 <= number < folds or folds < 2:
        raise InputError(f"data.fold {number} of data.folds {folds}: give two folds or more, and a fold below folds")
    subset = Subset(data)
    pool = subset.samples["train"] + subset.samples["val"]
    chosen = fold([data.group(name) for _, _, name in pool], folds, seed)
    if len({name for _, _, name in pool}) < len(pool):  # 01 of train/ and 01 of val/
        pool = [(split, index, f"{split}/{name}") for split, index, name in pool]
    subset.samples["val"] = [pool[index] for index in chosen.pop(number)]
    subset.samples["train"] = [pool[index] for index in sorted(chain(*chosen))]
    return subset


def without(
    data: SegmentationData,
    split: str,
    bad: dict[int, InputError],
) -> Subset:
    """Leave out the samples of a split that cannot be used.

    Args:
        data: the data set.
        split: which one.
        bad: index in the split -> why that sample cannot be used.
    """
    subset = Subset(data)
    subset.samples[split] = [sample for sample in subset.samples[split] if sample[1] not in bad]
    return subset
