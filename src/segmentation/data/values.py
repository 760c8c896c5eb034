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
    """A mask holds values that nobody declared; `counts` are the pixels of all that it holds."""

    def __init__(self, message: str, counts: dict[Value, int] | None = None) -> None:
        super().__init__(message)
        self.counts = counts or {}


class ClassesMissing(InputError):
    """Nobody declared the classes of masks that hold `counts`, value -> pixels; `suggested` is a declaration."""

    def __init__(self, counts: dict[Value, int]) -> None:
        values, fix = sorted(counts, key=code_of), ", with names of yours"
        if len(values) > MANY:
            values = [values[0], values[-1]]
            fix = " and mask_threshold: 128, or save masks as PNG with one value a class: these are smeared, like JPEGs"
        names = ["background", "foreground"] if len(values) == 2 else [name_of(value) for value in values]
        self.suggested = dict(zip(names, values, strict=True))
        found = listed(counts, commonest_first=True)
        declaration = as_yaml("classes", self.suggested)
        super().__init__(f"classes is not declared. The masks hold {found}. Fix: {declaration}{fix}")


def name_of(value: Value) -> str:
    """A class name to be replaced."""
    return f"class_{str(value).lstrip('#')}"


def as_yaml(option: str, value: Any) -> str:
    """An option in one line of YAML."""
    text = yaml.safe_dump(value, default_flow_style=True, sort_keys=False, allow_unicode=True, width=math.inf)
    return f"{option}: {text.strip()}"


def listed(counts: dict[Value, int], commonest_first: bool = False) -> str:
    """Eight values with their pixels."""
    pairs = sorted(counts.items(), key=lambda pair: -pair[1]) if commonest_first else list(counts.items())
    first = ", ".join(f"{value} ({pixels:,} pixels)" for value, pixels in pairs[:8])
    return first + (f" and {len(pairs) - 8} more" if len(pairs) > 8 else "")


def code_of(value: Value) -> int:
    """A colour as one integer, 0xRRGGBB; an integer as it is."""
    return int(value[1:], 16) if isinstance(value, str) else value


def codes_of(mask: np.ndarray) -> np.ndarray:
    """(H, W, 3 or more) uint8 colours as (H, W) integers, 0xRRGGBB; (H, W) integers as they are."""
    return mask if mask.ndim == 2 else mask[..., :3].astype(np.int64) @ (1 << 16, 1 << 8, 1)


def count_values(codes: np.ndarray, colors: bool) -> dict[Value, int]:
    """Value -> pixels, of codes of colours or of integers; in the order of the values."""
    values, counts = np.unique(codes, return_counts=True)
    found = zip(values.tolist(), counts.tolist(), strict=True)
    return {f"#{value:06X}" if colors else value: count for value, count in found}
