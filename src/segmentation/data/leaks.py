"""Leaks between splits: a metric flatters when the net has trained on what it is tested on, or on nearly that."""

import re
from collections import Counter
from collections.abc import Iterator
from itertools import combinations

import numpy as np

from segmentation.data.base import SegmentationData
from segmentation.data.statistics import SplitStatistics
from segmentation.errors import Problem

#: Bits of 256 in which the outlines of twins differ at most. Unrelated images differ in 44 or more (CamVid, ISBI 2012,
#: nuclei), successive frames of a video in 10 to 30, an image that is saved as JPEG again in 3 to 20.
NEAR = 25

#: Share of bits that are set, or not, from which an outline says nothing: the image is all but blank.
BLANK = 0.85

#: What augmentation adds to a name.
COPY = r"[-_. ](?:aug(?:mented)?|[hv]?flip(?:ped)?|rot(?:ate|ated)?|mirror(?:ed)?|copy|rf)(?![a-z])"

#: What the names of a group may have in common, from much to little: regular expressions for `group`.
GROUPS = (
    f"^(.+?){COPY}",
    r"^(.+)[-_./ ]",
    r"^(.*\D)\d",
    r"^(.+?)[-_./ ]",
    r"^(\D*\d+)",
)

#: Share of the samples that the largest group may hold.
LARGEST = 0.8


def find_leaks(data: SegmentationData, splits: dict[str, SplitStatistics]) -> Iterator[Problem]:
    """Images with a twin in another split, and groups that are in more than one.

    Args:
        data: the data set.
        splits: the statistics of its splits.

    Yields:
        what is wrong between two splits.
    """
    known = [split for split, statistics in splits.items() if statistics.records]
    for first, second in combinations(known, 2):
        names = data.names(second)
        first_names = data.names(first)
        twins = _find_twins(
            first_names,
            names,
            _outlines(splits[first]),
            _outlines(splits[second]),
        )
        if twins:
            one, other = next(iter(twins.items()))
            pattern = _suggest_group(twins, names + first_names)
            if any(name == twin for name, twin in twins.items()):  # no group tells them apart
                fix = "Images of one name are in both: take them out of one list or folder"
            elif pattern:
                fix = f"Fix: group: '{pattern}' (where folders or lists give the splits, with data.folds)"
            else:
                fix = "Remove one of each, or let lists keep in one split what belongs together"
            yield Problem(
                f"{second} images with a near twin in {first}: {len(twins)} of {len(names)}, e.g. {one} of {other}. "
                f"Metrics will flatter. {fix}"
            )
        torn = set(map(data.group, names)) & set(map(data.group, first_names))
        torn -= set(names)  # a name is its own group where nothing says otherwise
        if torn:
            yield Problem(
                f"groups that are in {first} and in {second}: {len(torn)}, e.g. {min(torn)}. Metrics will flatter. "
                "Move each into one split, or let data.folds divide them"
            )


def _outlines(statistics: SplitStatistics) -> np.ndarray:
    """For each sample 256 numbers, 1 for a bit that is set, -1 for another; 0 for an image that is all but blank."""
    outlines = bytes.fromhex("".join(record.outline for record in statistics.records))
    bits = np.unpackbits(np.frombuffer(outlines, np.uint8)).reshape(len(statistics.records), -1)
    is_picture = abs(bits.mean(axis=1, keepdims=True) - 0.5) < BLANK - 0.5
    return (2.0 * bits - 1) * is_picture


def _find_twins(
    first_names: list[str],
    names: list[str],
    first_outlines: np.ndarray,
    outlines: np.ndarray,
) -> dict[str, str]:
    """For each image that looks like one of the first, or is called a copy of it: its name -> the other's."""

    def stem(name: str) -> str:
        return re.split(COPY, name)[0]

    originals = {stem(name): name for name in first_names}
    twins = {}
    for name, outline in zip(names, outlines, strict=True):
        mirrored = -outline.reshape(16, 16)[:, ::-1].ravel()  # what grew brighter to the right grows darker
        likeness = np.maximum(first_outlines @ outline, first_outlines @ mirrored)
        original = originals.get(stem(name))
        if likeness.max() >= outline.size - 2 * NEAR:
            twins[name] = first_names[likeness.argmax()]
        elif original and {name, original} != {stem(name)}:
            twins[name] = original
    return twins


def _suggest_group(twins: dict[str, str], names: list[str]) -> str | None:
    """The first of GROUPS that keeps twins together, but not all samples."""
    for pattern in GROUPS:
        group_of = {name: re.sub(f"(?s){pattern}.*", r"\1", name) for name in names}
        largest = max(Counter(group_of.values()).values())
        together = all(group_of[name] == group_of[twin] for name, twin in twins.items())
        if together and largest <= LARGEST * len(names):
            return pattern
    return None
