"""What the values of masks mean: classes, void, strays, smeared edges, ids of instances.

Errors and the doctor take their advice from here. It decides nothing: what the user declares holds.
"""

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from itertools import chain
from typing import Any

import numpy as np
import yaml
from scipy.ndimage import distance_transform_edt, maximum_filter1d

from segmentation.errors import plural

#: A mask value: an integer of an index mask, or "#RRGGBB" of a colour mask.
Value = int | str

#: The values of a mask: value -> pixels.
Counts = Counter[Value]

FEW = 8  # values that a message lists; masks of no more were not smeared
MANY = 64  # classes in one mask at most
STRAY = 100  # pixels of a stray value in one mask at most
SMEARED = "with smeared edges, as JPEG and resizing leave them"
IDS = 5  # instances in the fullest mask at least

#: The largest integers of two types: beside class indices they mean "no class".
VOID = (255, 65535)

NO_LABELS = (
    "This is no label mask (a photo, or a JPEG?). Fix: save masks as PNG with one value per class, without smoothing; "
    "or, if the values number instances, mask_threshold: 1, instances: the same as masks"
)


class MaskValues:
    """The values of some masks, and what they mean as far as one can tell.

    Args:
        masks: the values of each mask.
        declared: class -> mask values, as far as they are declared.
        ignore: values that are declared to count nowhere.
        objects: whether masks only tell objects from the background, in any value.

    Attributes:
        options: options of FolderData that say what the values mean; empty: these are no label masks.
        reasons: why, a sentence each.
    """

    def __init__(
        self,
        masks: Sequence[Counts],
        declared: Mapping[str, list[Value]],
        ignore: Iterable[Value] = (),
        objects: bool = False,
    ) -> None:
        found = shorten(add(masks)).keys() - set(ignore)
        self.by_color = any(isinstance(value, str) for value in found)
        # A mask of colours that has none is read as gray.
        codes = [code_of(value) for value in found if isinstance(value, str) == self.by_color]
        self.codes = np.array(sorted(codes))
        values = self.values()
        rows = [[mask[value] for value in values] for mask in masks]
        self.pixels = np.array(rows, np.int64).reshape(len(masks), len(codes))
        self.ignore = list(ignore)
        self.declared = list(chain.from_iterable(declared.values()))
        self.reasons: list[str] = []
        self.options: dict = {}
        few = objects or len(declared) in (0, 2)
        groups = self.interpret(few, objects)
        if not groups:
            return
        if not (objects and declared):
            self.options["classes"] = name_groups(groups, declared)
        if self.ignore != list(ignore):
            self.options["ignore"] = self.ignore

    def __str__(self) -> str:
        """The reasons and the options, in one line."""
        fix = [as_yaml(option, value) for option, value in self.options.items()]
        last = f"Fix: {', '.join(fix)}" if fix else NO_LABELS
        return ". ".join([*self.reasons, last])

    def values(self) -> list[Any]:
        """The values that count."""
        if self.by_color:
            return [f"#{code:06X}" for code in self.codes]
        return self.codes.tolist()

    def interpret(
        self,
        few: bool,
        objects: bool,
    ) -> list[list[Value]]:
        """Find the mask values of each class, the background first; none: they stay, or these are no label masks.

        Args:
            few: whether there may be just two classes.
            objects: whether masks only tell objects from the background, in any value.
        """
        two_integers = few and not self.by_color
        if two_integers and self.are_ids():
            self.options["mask_threshold"] = 1
            self.options["instances"] = "the same as masks"
            self.reasons.append("Each mask numbers its instances")
            return [[0], [1]]
        levels = [] if objects else self.find_levels()
        if levels:
            self.reasons.append(f"These are {len(levels)} values {SMEARED}")
            return [[value] for value in levels]
        mixed = ~np.isin(self.values(), self.declared)
        pixels = self.pixels.sum(axis=0)
        if self.by_color and mixed.sum() > MANY // 2 and 10 * pixels[mixed].sum() < pixels.sum():
            self.options["mask_tolerance"] = 170  # mixtures of three are two thirds of 255 from the nearest, at most
            self.reasons.append("These look like smooth edges between the declared colours")
            return []
        strays = self.are_strays()
        if two_integers and (self.is_smeared(~strays) or self.is_averaged()):
            low, *_, high = self.values()
            self.options["mask_threshold"] = (low + high + 1) // 2
            self.reasons.append(f"These are two values {SMEARED}")
            return [[low], [high]]
        self.leave_out(strays, "Few pixels of few masks hold")
        self.leave_out(self.codes < 0, "Negative values are no class")
        highest = self.values()[-1]
        most = np.count_nonzero(self.pixels[:, self.codes > 0], axis=1).max(initial=0)
        if objects:
            if most > 1:
                self.options["mask_threshold"] = 1 if is_row(self.codes) else (highest + 1) // 2
            return [[0], [highest or 255]]
        if two_integers and most == 1 and self.are_one_foreground():
            self.reasons.append("No mask holds two values above 0, so these may be one class")
            return [[0], self.values()[1:]]
        void = np.isin(self.codes, VOID)
        indices = self.codes[~void]
        number = len(indices)
        dense = number > 1 and indices[-1] <= 2 * number
        if most > MANY or (number > MANY and not dense):
            return []
        if dense:
            self.leave_out(void, "The largest integer is no class")
        if few and len(self.codes) == 1:
            if self.by_color:
                return [["#000000"], [highest]]
            if 0 not in self.ignore:
                return [[0], [highest or 255]]
        return [[value] for value in self.values()]

    def leave_out(
        self,
        which: np.ndarray,
        reason: str,
    ) -> None:
        """Ignore values, unless fewer than two would be left.

        Args:
            which: of each value, whether to ignore it, (V,) bool.
            reason: why; the values and their pixels are added.
        """
        if not which.any() or np.count_nonzero(~which) < 2:
            return
        pixels = self.pixels.sum(axis=0).tolist()
        values = dict(zip(self.values(), pixels, strict=True))
        self.codes = self.codes[~which]
        self.pixels = self.pixels[:, ~which]
        for value in self.values():
            del values[value]
        left_out = Counter(values)
        self.ignore += left_out
        self.reasons.append(f"{reason}: {describe(left_out)}")

    def are_strays(self) -> np.ndarray:
        """Of each value, whether few pixels of few masks hold it.

        The rare ones of a row of classes, 0 to K, are no strays.

        Returns:
            (V,) bool.
        """
        limit = self.pixels.sum(axis=1, keepdims=True) / 1000
        tiny = self.pixels <= limit.clip(max=STRAY)
        few_pixels = tiny.all(axis=0)
        masks = np.count_nonzero(self.pixels, axis=0)
        few_masks = 2 * masks <= len(self.pixels)
        strays = few_pixels & few_masks
        void = np.isin(self.codes, VOID) | (self.codes < 0)
        number = np.count_nonzero(strays)
        rare_classes = is_row(self.codes[~void]) and len(strays) - number > 2
        if rare_classes or number > MANY // 2:
            return np.zeros_like(strays)
        return strays

    def find_levels(self) -> list[int]:
        """The values that nearly all pixels lie at or near, three or more, with others between; none: it is not so."""
        if self.by_color or len(self.codes) <= 2 * FEW or self.codes[0] < 0 or self.codes[-1] > 255:
            return []
        pixels = np.bincount(self.codes, self.pixels.sum(axis=0), minlength=256)
        is_level = (pixels == maximum_filter1d(pixels, MANY + 1)) & (pixels >= pixels.sum() / 100)
        distance = distance_transform_edt(~is_level)
        far = pixels[distance > MANY // 4].sum()
        commonest = pixels[distance > 4].max()  # of the values between
        if is_level.sum() < 3 or 10 * far > pixels.sum() or 2 * commonest > pixels[is_level].min():
            return []
        self.options["mask_tolerance"] = int(distance.max())  # files that were not looked at may hold any value
        return np.flatnonzero(is_level).tolist()

    def is_smeared(self, which: np.ndarray) -> bool:
        """Whether most pixels lie near two ends, and the others between: two values whose edges were smeared.

        Args:
            which: the values to look at, (V,) bool.
        """
        codes = self.codes[which]
        pixels = self.pixels.sum(axis=0)[which]
        if len(codes) <= FEW or codes[-1] > 255:  # no JPEG has these
            return False
        place = (codes - codes[0]) / max(MANY, codes[-1] - codes[0])
        above = place > 1 / 8
        at_top = pixels[place > 7 / 8].sum()
        between = pixels[above].sum() - at_top
        return bool(np.count_nonzero(above) > 3 and 4 * between < pixels.sum() and between < 2 * at_top)

    def is_averaged(self) -> bool:
        """Whether few pixels hold several values between two that are declared: edges that resizing averaged."""
        ends = [self.codes[0], self.codes[-1]]
        pixels = self.pixels.sum(axis=0)
        several = len(pixels) >= 5 and ends[1] - ends[0] >= MANY
        return several and sorted(self.declared) == ends and 2 * pixels[1:-1].sum() < min(pixels[0], pixels[-1])

    def are_ids(self) -> bool:
        """Whether each mask numbers something from 1, and not to the same number; or has ids of its own."""
        above = self.codes > 0
        held = self.pixels[:, above] > 0
        numbers = np.count_nonzero(held, axis=1)
        masks = np.count_nonzero(held, axis=0)
        single = np.mean(masks == 1) if len(masks) else 0  # share of the values that one mask alone has
        are_wide = len(masks) > FEW and self.codes[-1] > 255  # more than a JPEG holds
        if are_wide and single > 0.9:
            return True
        if len(masks) > 2 * FEW and single > 0.5 and 2 * masks.max() <= len(held):  # some class would be common
            return True
        if len(set(numbers)) < 3 or numbers.max() < IDS:
            return False
        largest = (held * self.codes[above]).max(axis=1)
        return np.array_equal(numbers, largest)

    def are_one_foreground(self) -> bool:
        """Whether the values above 0 are no class indices, and each stands beside 0 in some mask.

        That no mask holds two of them is known already.
        """
        if self.codes[0] != 0 or len(self.codes) < 3 or is_row(self.codes):
            return False
        holds_0 = self.pixels[:, 0] > 0
        return bool(self.pixels[holds_0].any(axis=0).all())


def name_groups(
    groups: list[list[Value]],
    declared: Mapping[str, list[Value]],
) -> dict:
    """Classes of mask values: those that are declared, and others under names to be replaced.

    Args:
        groups: mask values of each class; where two are declared, or none, the background first.
        declared: class -> mask values.
    """
    known = list(chain.from_iterable(declared.values()))
    classes = dict(declared)
    names = list(declared) or ["background", "foreground"]
    if len(groups) == len(names) == 2:
        if known != sorted(known, key=code_of):  # the foreground is declared first
            groups = groups[::-1]
        for name, group in zip(names, groups, strict=True):
            own = declared.get(name, [])
            classes[name] = group if set(own).isdisjoint(group) else list(dict.fromkeys(group + own))
    else:
        classes |= {name_of(group[0]): group for group in groups if group[0] not in known}
    return {name: group[0] if len(group) == 1 else group for name, group in classes.items()}


def name_of(value: Value) -> str:
    """A class name to be replaced by the user.

    Args:
        value: the mask value that means the class.
    """
    if code_of(value) == 0:
        return "background"
    return f"class_{value}".replace("#", "")


def code_of(value: Value) -> int:
    """A mask value as an integer.

    Args:
        value: an integer, which stays; or a colour, which becomes 0xRRGGBB.
    """
    if isinstance(value, str):
        return int(value[1:], 16)
    return value


def is_row(codes: np.ndarray) -> bool:
    """Whether these are all integers from 0 or 1 to the largest.

    Args:
        codes: integers, sorted.
    """
    if not len(codes) or codes[0] not in (0, 1):
        return False
    return codes[-1] - codes[0] == len(codes) - 1


def as_yaml(option: str, value: Any) -> str:
    """An option in one line of YAML.

    Args:
        option: its name.
        value: what it is set to.
    """
    text = yaml.safe_dump(
        {option: value},
        default_flow_style=True,
        sort_keys=False,
        allow_unicode=True,
        width=math.inf,
    )
    return text[1:-2]


def add(masks: Iterable[Counts]) -> Counts:
    """The values of all masks.

    Args:
        masks: the values of each mask.
    """
    total: Counts = Counter()
    for mask in masks:
        total.update(mask)
    return total


def shorten(counts: Counts) -> Counts:
    """The commonest values: a photo holds more colours than memory should."""
    return Counter(dict(counts.most_common(8 * MANY)))


def describe(counts: Counts) -> str:
    """The commonest values with their pixels, as words.

    Args:
        counts: value -> pixels.
    """
    parts = [f"{value} ({plural(pixels, 'pixel')})" for value, pixels in counts.most_common(FEW)]
    more = f" and {len(counts) - FEW} more" if len(counts) > FEW else ""
    return ", ".join(parts) + more
