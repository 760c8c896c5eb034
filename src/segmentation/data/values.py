"""Mask values: how they are written, counted, and told to a user who has not declared them."""

import math
import re
from typing import Any

import numpy as np
import yaml

from segmentation.errors import InputError

#: A mask value: an integer of an index mask, or "#RRGGBB" of a colour mask.
Value = int | str

HEX = re.compile(r"#[0-9a-fA-F]{6}")

MANY = 64  # values in the masks of a data set of which nobody says that they are classes


class UndeclaredValues(InputError):
    """A mask holds values that nobody declared.

    Args:
        message: the mask's file, the values and the YAML to add.
        counts: value -> pixels, of this mask.
        swapped: as `Labels.mended` takes it.
    """

    def __init__(self, message: str, counts: dict[Value, int], swapped: bool) -> None:
        super().__init__(message, counts, swapped)  # all of them: it travels to other processes
        self.counts, self.swapped = counts, swapped

    def __str__(self) -> str:
        return self.args[0]


def count_values(mask: np.ndarray) -> dict[Value, int]:
    """Mask value (a colour, of a mask in colour) -> its pixels."""
    values, counts = np.unique(pack_rgb(mask) if mask.ndim == 3 else mask, return_counts=True)
    found = zip(values.tolist(), counts.tolist(), strict=True)
    return {rgb_to_hex(value) if mask.ndim == 3 else value: count for value, count in found}


class ClassesMissing(InputError):
    """Nobody declared the classes.

    Args:
        counts: value -> pixels, of some masks.
    """

    def __init__(self, counts: dict[Value, int]) -> None:
        self.suggested = suggest_classes(counts)
        ordered = sorted(counts.items(), key=lambda pair: -pair[1])
        fix = f"Fix: {as_classes(self.suggested)}, with names of yours"
        if len(counts) > MANY:
            fix = (
                "JPEG and anti-aliased masks do so: save them as PNG with one value a class; or, of two classes, "
                f"{as_classes(self.suggested)} and mask_threshold: 128"
            )
        super().__init__(f"classes is not declared. The masks hold {listed(ordered)}. {fix}")


def suggest_classes(counts: dict[Value, int]) -> dict[str, Value]:
    """A declaration of all values of some masks (value -> pixels), under names to be replaced."""
    values = sorted(counts)
    if len(values) > MANY:
        return {"background": 0, "foreground": 255}
    if len(values) == 2:
        return dict(zip(("background", "foreground"), values, strict=True))
    ground = {0: "background", "#000000": "background"}
    return {ground.get(value, f"class_{str(value).lstrip('#')}"): value for value in values}


def hex_to_rgb(color: str) -> tuple[int, int, int]:
    """ "#80FF00" -> (128, 255, 0)."""
    return tuple(bytes.fromhex(color[1:]))


def rgb_to_hex(code: int) -> str:
    return f"#{code:06X}"


def one_line(value: Any) -> str:
    """YAML of one line."""
    return yaml.safe_dump(value, default_flow_style=True, sort_keys=False, allow_unicode=True, width=math.inf).strip()


def as_classes(declared: dict[str, Any]) -> str:
    return f"classes: {one_line(declared)}"


def listed(counts: list[tuple[Value, int]]) -> str:
    """The first eight values with their pixels."""
    first = ", ".join(f"{value} ({pixels:,} pixels)" for value, pixels in counts[:8])
    return first + (f" and {len(counts) - 8} more" if len(counts) > 8 else "")


def code_of(value: Value) -> int:
    return int(value[1:], 16) if isinstance(value, str) else value


def pack_rgb(mask: np.ndarray) -> np.ndarray:
    rgb = mask[..., :3].astype(np.int64)
    return rgb[..., 0] << 16 | rgb[..., 1] << 8 | rgb[..., 2]
