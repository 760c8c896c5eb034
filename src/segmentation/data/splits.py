"""Dividing samples: by fractions, into folds, by hand. Groups (a patient, a video, a slide) are never torn apart."""

from collections.abc import Callable, Sequence

import numpy as np

from segmentation.data.base import Sample, SegmentationData
from segmentation.errors import InputError


def divide(names: Sequence[str], shares: Sequence[float], group: Callable[[str], str], seed: int) -> list[list[int]]:
    """Divide samples into parts: a function of names, shares and seed, whatever the order of the groups on disk.

    Args:
        names: of the samples, sorted.
        shares: of each part but the last, which takes the rest.
        group: a name's group; a group is in one part as a whole.
        seed: of the order in which groups are taken.

    Returns:
        for each part the indices of its samples, in their order. A part of a share above 0 is never empty, but the
        rest may be.
    """
    groups = _groups(names, group)
    order = [groups[i] for i in np.random.default_rng(seed).permutation(len(groups))]
    parts: list[list[int]] = []
    for share in shares:
        wanted = max(1, round(share * len(names))) if share else 0
        part: list[int] = []
        while order and len(part) < wanted:
            part += order.pop(0)
        parts.append(sorted(part))
    return [*parts, sorted(index for members in order for index in members)]


def fold(names: Sequence[str], count: int, group: Callable[[str], str], seed: int) -> list[list[int]]:
    """Divide samples into `count` folds of about one size. Returns the indices of each fold, in their order.

    Raises:
        InputError: fewer groups than folds.
    """
    groups = _groups(names, group)
    if len(groups) < count:
        raise InputError(f"data.folds {count}: there are only {len(groups)} groups of samples to divide")
    order = [groups[i] for i in np.random.default_rng(seed).permutation(len(groups))]
    folds: list[list[int]] = [[] for _ in range(count)]
    for members in sorted(order, key=len, reverse=True):  # the largest first, each where there is most room
        min(folds, key=len).extend(members)
    return [sorted(members) for members in folds]


def _groups(names: Sequence[str], group: Callable[[str], str]) -> list[list[int]]:
    members: dict[str, list[int]] = {}
    for index, name in enumerate(names):
        members.setdefault(group(name), []).append(index)
    return list(members.values())


class _Selection(SegmentationData):
    """Some samples of another data set, in other splits.

    Args:
        data: the data set.
        picks: split -> (split, index) of each sample in `data`.
    """

    def __init__(self, data: SegmentationData, picks: dict[str, list[tuple[str, int]]]) -> None:
        super().__init__(data.labels)
        self.data, self.picks, self.problems = data, picks, data.problems
        plain = {split: [data.names(s)[i] for s, i in chosen] for split, chosen in picks.items()}
        # Samples of two splits may have one name: 01 of train/ and 01 of val/.
        self._names = {
            split: names if len(set(names)) == len(names) else [f"{s}/{data.names(s)[i]}" for s, i in picks[split]]
            for split, names in plain.items()
        }

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
    if not folds >= 2 or not 0 <= number < folds:
        raise InputError(
            f"data.fold {number} of data.folds {folds}: give two folds or more, and a fold of 0..folds - 1"
        )
    pool = [(split, index) for split in ("train", "val") for index in range(len(data.names(split)))]
    parts = fold([data.names(split)[index] for split, index in pool], folds, data.group, seed)
    val = set(parts[number])
    return _Selection(
        data,
        {
            "train": [sample for index, sample in enumerate(pool) if index not in val],
            "val": [pool[index] for index in parts[number]],
            "test": [("test", index) for index in range(len(data.names("test")))],
        },
    )


def without(data: SegmentationData, bad: dict[str, set[int]]) -> SegmentationData:
    """A data set without its bad samples: split -> indices."""
    splits = ("train", "val", "test")
    return _Selection(
        data,
        {s: [(s, i) for i in range(len(data.names(s))) if i not in bad.get(s, set())] for s in splits},
    )
