"""What a data set declares about its masks: class names, the values (or colours) that stand for them, what to ignore.

Nothing here is ever guessed from pixels. A mask value that nobody declared is an error that prints the YAML to add.
"""

import colorsys
import math
import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np
import yaml
from PIL.ImageColor import getrgb

from segmentation.errors import InputError

#: Class index of pixels that count nowhere: void, padding. It is the default of torch's own cross-entropy.
IGNORE_INDEX = -100

#: Index of a mask value that nobody declared; it never leaves `Labels.encode`.
UNDECLARED = -1

FEW = 8  # undeclared values that may be classes; of more, the mask is none
MANY = 64  # values in the masks of a data set of which nobody says that they are classes

#: A mask value: an integer of an index mask, or "#RRGGBB" of a colour mask.
Value = int | str

HEX = re.compile(r"#[0-9a-fA-F]{6}")


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
        names = ["background" if value in (0, "#000000") else name_of(value) for value in values]
        names = ["background", "foreground"] if len(values) == 2 else names
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


@dataclass(frozen=True)
class Labels:
    """The classes of a data set, in the order of their indices."""

    task: Literal["binary", "multiclass"]  # two classes, one logit, sigmoid; or K classes, K logits, softmax
    names: list[str]
    values: list[list[Value]]  # for each class, the mask values that mean it
    colors: list[str]  # for each class, its display colour "#RRGGBB"
    ignore: list[Value]  # mask values of pixels that count nowhere
    channels: int = 3  # bands of the images
    dtype: str | None = None  # of the images, by NumPy's name; None: not declared
    scale: float | None = None  # what stands for 1.0 in an image; None: its type's largest integer, 1 for floats

    @classmethod
    def parse(cls, classes: Mapping[str, Any], ignore: Any = None, channels: int = 3) -> "Labels":
        """Read the declaration as users write it in YAML. Two classes are a binary task.

        Args:
            classes: name -> value, list of values, "#RRGGBB", or {"value": any of these, "color": "#RRGGBB"}.
            ignore: a value, a list of values, or None.
            channels: bands of the images.
        """
        if len(classes) < 2:
            raise InputError(
                f"classes declares {list(classes)}: segmentation needs at least two, "
                "e.g. classes: {background: 0, nucleus: 255}"
            )
        values: list[list[Value]] = []
        colors: list[str] = []
        for name, spec in classes.items():
            where = f"class {name!r}"
            spec = spec if isinstance(spec, Mapping) else {"value": spec}
            if unknown := sorted(set(spec) - {"value", "color"}):
                raise InputError(f"{where} has {unknown}: a class has value and color, nothing else")
            values.append(_as_values(spec.get("value"), where))
            if not values[-1]:
                raise InputError(f"{where} has no mask value: give an integer, a list of them, or a colour")
            mask_color = next((v for v in values[-1] if isinstance(v, str)), None)
            colors.append(_check_color(spec.get("color") or mask_color or _distinct_color(len(colors)), where))
        ignored = [] if ignore is None else _as_values(ignore, "ignore")
        declared = [value for group in [*values, ignored] for value in group]
        codes = [code_of(value) for value in declared]
        if twice := sorted({str(value) for value, code in zip(declared, codes, strict=True) if codes.count(code) > 1}):
            raise InputError(f"mask value {', '.join(twice)} is declared twice in classes and ignore: keep one")
        if len({isinstance(value, str) for value in declared}) > 1:
            raise InputError("classes and ignore mix integers and colours: a mask is one or the other")
        task: Literal["binary", "multiclass"] = "binary" if len(classes) == 2 else "multiclass"
        return cls(task, [str(name) for name in classes], values, colors, ignored, channels)

    @property
    def num_classes(self) -> int:
        """K, the background counted too where it is a class."""
        return len(self.names)

    @property
    def num_outputs(self) -> int:
        """Channels of the net's output: 1 for a binary task, else K."""
        return 1 if self.task == "binary" else self.num_classes

    @property
    def reported(self) -> range:
        """Indices of the classes with figures of their own: of a binary task the foreground alone."""
        return range(1 if self.task == "binary" else 0, self.num_classes)

    @property
    def background(self) -> int | None:
        """Index of the class that is nothing: a binary task's first, else the one called background; None: none is."""
        lower = [name.lower() for name in self.names]
        return 0 if self.task == "binary" else lower.index("background") if "background" in lower else None

    @property
    def by_color(self) -> bool:
        """Whether masks are colour images."""
        return isinstance(self.values[0][0], str)

    @property
    def palette(self) -> np.ndarray:
        """Display colours, (K, 3) uint8."""
        return np.array([getrgb(color) for color in self.colors], dtype=np.uint8)

    def as_dict(self) -> dict[str, Any]:
        """Plain types only: what a checkpoint keeps. `Labels(**labels.as_dict())` gives it back."""
        return asdict(self)

    def check(self) -> None:
        """Raises InputError, or ValueError, where these are no labels that `parse` could give: a file was changed."""
        described = zip(self.names, self.values, self.colors, strict=True)
        classes = {name: {"value": values, "color": color} for name, values, color in described}
        self.parse(classes, self.ignore)

    def encode(self, mask: np.ndarray, source: str) -> np.ndarray:
        """Class indices, (H, W) int64 in 0..K-1 or IGNORE_INDEX, of a mask as read from the file `source`: (H, W)
        integers, or (H, W, 3) uint8 where colours are declared.

        Raises:
            InputError: a value that is not declared; the message holds its count and the YAML that would fix it.
        """
        codes = codes_of(mask)
        if self.by_color != (mask.ndim == 3):
            counts = count_values(codes, mask.ndim == 3)
            held, declared = ("colours", "integer") if mask.ndim == 3 else ("one value a pixel", "colour")
            example = dict(zip(self.names, counts if mask.ndim == 3 else range(self.num_classes), strict=False))
            raise InputError(
                f"{source}: holds {held}: {listed(counts, commonest_first=True)}. But the classes are declared by "
                f"{declared}. Fix: {as_yaml('classes', example)}, or as they are meant"
            )
        if codes.dtype.kind == "f":
            if not np.array_equal(codes, np.rint(codes)):
                raise InputError(f"{source}: this mask holds fractions. Save masks as PNG with one integer a class")
            codes = codes.astype(np.int64)
        # Of bytes there are only 256: looking those up, not the pixels, is ten times faster.
        index = self._look_up(np.arange(256)).take(codes) if codes.dtype == np.uint8 else self._look_up(codes)
        if (index == UNDECLARED).any():
            counts = count_values(codes, self.by_color)
            raise UndeclaredValues(f"{source}: {self.complaint(counts)}", counts)
        return index

    def decode(self, index: np.ndarray) -> np.ndarray:
        """The data set's own label values of class indices: (H, W) integers, or (H, W, 3) uint8 colours."""
        if self.by_color:
            return np.array([getrgb(str(values[0])) for values in self.values], dtype=np.uint8)[index]
        first = [int(values[0]) for values in self.values]
        if index.dtype == np.uint8 and first == list(range(len(first))):
            return index  # of a large mask there is one array, not two
        smallest_type = np.result_type(np.min_scalar_type(min(first)), np.min_scalar_type(max(first)))
        return np.array(first, dtype=smallest_type)[index]

    def _look_up(self, codes: np.ndarray) -> np.ndarray:
        """Class index, IGNORE_INDEX or UNDECLARED of each code."""
        table = {code_of(value): index for index, values in enumerate(self.values) for value in values}
        table |= {code_of(value): IGNORE_INDEX for value in self.ignore}
        known, index = map(np.array, zip(*sorted(table.items()), strict=True))
        place = np.searchsorted(known, codes).clip(max=len(known) - 1)
        return np.where(known[place] == codes, index[place], UNDECLARED)

    def undeclared(self, values: Iterable[Value]) -> list[Value]:
        """Those of some mask values that nobody declared."""
        declared = {code_of(value) for group in [*self.values, self.ignore] for value in group}
        return [value for value in values if code_of(value) not in declared]

    def mended(self, values: Collection[Value]) -> dict[str, Any] | None:
        """`classes` that fit masks of these values, name -> value or list of values; None where that cannot be said:
        nothing is undeclared, or so much that it is no class.

        Two classes in other values than declared, 0 and 255 for 0 and 1, are still these two.
        """
        undeclared = self.undeclared(values)
        if not undeclared or len(undeclared) > FEW:
            return None
        codes = {code_of(value) for value in values} | {0}
        simple = not self.by_color and [len(group) for group in self.values] == [1, 1]
        if simple and codes in ({0, 1}, {0, 255}) and not codes & {code_of(value) for value in self.ignore}:
            first, second = (code_of(group[0]) for group in self.values)
            return dict(zip(self.names, sorted(codes, reverse=first > second), strict=True))
        declared = {name: v[0] if len(v) == 1 else v for name, v in zip(self.names, self.values, strict=True)}
        return declared | {name_of(value): value for value in undeclared}

    def complaint(self, counts: dict[Value, int]) -> str:
        """What to say about masks of these values, value -> pixels, of which some are not declared: with the YAML of
        `mended`, where they are few."""
        undeclared = {value: counts[value] for value in self.undeclared(counts)}
        classes = self.mended(counts)
        fix = (
            "Declare them if they are classes. Else this is not an index mask (JPEG, anti-aliased or a photo?): save "
            "masks as PNG with one value a class; or, where smeared masks tell two classes, mask_threshold: 128"
        )
        if classes:
            ignore = as_yaml("ignore", [*self.ignore, *undeclared])
            fix = f"Fix: {as_yaml('classes', classes)}, or, if they count nowhere, {ignore}"
        said = f"mask values that classes does not declare: {listed(undeclared)}, of {sum(counts.values()):,}"
        return f"{said}. {fix}"


def _as_values(declared: Any, where: str) -> list[Value]:
    values = list(declared) if isinstance(declared, (list, tuple)) else [declared]
    for value in values:
        if isinstance(value, str):
            _check_color(value, where)
        elif isinstance(value, bool) or not isinstance(value, int):
            raise InputError(
                f"{where} has the mask value {value!r}: give an integer, a list of them, or "
                '"#RRGGBB" in quotes (YAML takes a bare # for a comment)'
            )
    return values


def _check_color(color: Any, where: str) -> str:
    if not isinstance(color, str) or not HEX.fullmatch(color):
        raise InputError(f'{where} has the colour {color!r}: write it as "#RRGGBB", in quotes')
    return color.upper()


def _distinct_color(index: int) -> str:
    """Display colours for classes that declare none: dark gray first, then hues a golden angle apart."""
    if index == 0:
        return "#30343C"
    red, green, blue = colorsys.hsv_to_rgb((0.08 + (index - 1) * 0.61803) % 1, 0.62 if index % 2 else 0.8, 0.95)
    return f"#{round(red * 255):02X}{round(green * 255):02X}{round(blue * 255):02X}"
