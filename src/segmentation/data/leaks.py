"""Leaks between splits: a metric flatters when the net has trained on what it is tested on, or on nearly that."""

import re
from collections import Counter
from itertools import combinations

import numpy as np

from segmentation.data.base import SegmentationData
from segmentation.data.statistics import SplitStatistics

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


def find_leaks(data: SegmentationData, splits: dict[str, SplitStatistics]) -> list[str]:
    """Images with a twin in another split, and groups that are in more than one.

    Args:
        data: the data set.
        splits: the statistics of its splits.

    Returns:
        a message for each.
    """
    messages = []
    for first, second in combinations(splits, 2):
        names = data.names(second)
        first_names = data.names(first)
        first_outlines = _outlines(splits[first])
        outlines = _outlines(splits[second])
        twins = _find_twins(
            dict(zip(first_names, first_outlines, strict=True)),
            dict(zip(names, outlines, strict=True)),
        )
        if twins:
            one, other = next(iter(twins.items()))
            pattern = _suggest_group(twins, names + first_names)
            fix = "Remove one of each, or let lists keep in one split what belongs together"
            if pattern:
                fix = f"Fix: group: '{pattern}' (where folders or lists give the splits, with data.folds)"
            messages.append(
                f"{second} images with a near twin in {first}: {len(twins)} of {len(names)}, e.g. {one} of {other}. "
                f"Metrics will flatter. {fix}"
            )
        groups = set(map(data.group, names))
        first_groups = set(map(data.group, first_names))
        groups &= first_groups
        torn = sorted(groups.difference(names))  # a name is its own group where nothing says otherwise
        if torn:
            messages.append(
                f"groups that are in {first} and in {second}: {len(torn)}, e.g. {torn[0]}. Metrics will flatter. "
                "Move each into one split, or let data.folds divide them"
            )
    return messages


def _outlines(statistics: SplitStatistics) -> list[np.ndarray]:
    """For each sample (256,), 1 for each bit that is set and -1 for the others; 0 for images that are all but blank."""
    outlines = []
    for record in statistics.records:
        data = bytes.fromhex(record.outline)
        packed = np.frombuffer(data, np.uint8)
        bits = np.unpackbits(packed)
        signs = 2.0 * bits - 1
        if not 1 - BLANK < bits.mean() < BLANK:
            signs[:] = 0
        outlines.append(signs)
    return outlines


def _find_twins(
    first: dict[str, np.ndarray],
    second: dict[str, np.ndarray],
) -> dict[str, str]:
    """Which images look like one of the first, or are called a copy of it, by their outlines and names.

    Returns:
        name -> name of the twin.
    """
    names = list(first)
    outlines = np.array(list(first.values()))
    stems = {}
    for name in names:
        stem = re.split(COPY, name)[0]
        stems[stem] = name
    twins = {}
    for name, outline in second.items():
        likeness = outlines @ outline
        stem = re.split(COPY, name)[0]
        if likeness.max() >= outline.size - 2 * NEAR:
            twins[name] = names[likeness.argmax()]
        elif stem in stems and {stem} != {name, stems[stem]}:
            twins[name] = stems[stem]
    return twins


def _suggest_group(twins: dict[str, str], names: list[str]) -> str | None:
    """The first of GROUPS that keeps twins together, but not all samples."""
    for pattern in GROUPS:
        group_of = {}
        for name in names:
            group_of[name] = re.sub(f"(?s){pattern}.*", r"\1", name)
        sizes = Counter(group_of.values())
        largest = max(sizes.values())
        together = all(group_of[name] == group_of[twin] for name, twin in twins.items())
        limit = LARGEST * len(names)
        if together and largest <= limit:
            return pattern
    return None
