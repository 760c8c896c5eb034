"""The classes that a data set declares: their names, the mask values or colours that stand for them, what to ignore.

Nothing is guessed from pixels. A mask value that nobody declared is an error that prints the YAML to add.
"""

import colorsys
import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from itertools import chain
from typing import Any, Literal

import numpy as np
import yaml
from PIL.ImageColor import getrgb

from segmentation.errors import InputError

#: Class index of pixels that count nowhere: void, padding. It is the default of torch's own cross-entropy.
IGNORE_INDEX = -100

#: Index of a mask value that nobody declared; it never leaves `Labels.encode`.
UNDECLARED = -1

FEW = 8  # with more undeclared values than this, a file is not a label mask
MANY = 64  # with more values than this, the masks of a data set are not label masks

#: A mask value: an integer of an index mask, or "#RRGGBB" of a colour mask.
Value = int | str

HEX = re.compile(r"#[0-9a-fA-F]{6}")


class UndeclaredValues(InputError):
    """A mask holds values that nobody declared; `counts` are the pixels of all its values, or of the commonest 256: of
    an anti-aliased colour mask the others would fill the memory."""

    def __init__(self, message: str, counts: Counter[Value]) -> None:
        super().__init__(message)
        self.counts = Counter(dict(counts.most_common(256)))


class ClassesMissing(InputError):
    """Nobody declared the classes; `suggested` is a declaration for masks that hold `counts`, value -> pixels."""

    def __init__(self, counts: Counter[Value]) -> None:
        self.suggested = suggest_declaration(counts)
        fix = f"{as_yaml('classes', self.suggested)}, with names of yours"
        if len(counts) > MANY:
            fix += ", and mask_threshold: 128, or save masks as PNG with one value a class: these look like JPEGs"
        super().__init__(f"classes is not declared. The masks hold {describe(counts)}. Fix: {fix}")


def suggest_declaration(counts: Counter[Value]) -> dict[str, Value]:
    """Classes for masks of these values: name -> value."""
    values = sorted(counts, key=code_of)
    if len(values) > MANY:
        values = [values[0], values[-1]]
    if len(values) == 2:
        return {"background": values[0], "foreground": values[1]}
    return {name_of(value) if code_of(value) else "background": value for value in values}


def name_of(value: Value) -> str:
    """A class name to be replaced by the user."""
    return f"class_{value}".replace("#", "")


def as_yaml(option: str, value: Any) -> str:
    """An option in one line of YAML."""
    text = yaml.safe_dump(value, default_flow_style=True, sort_keys=False, allow_unicode=True, width=math.inf)
    return f"{option}: {text.strip()}"


def describe(counts: Counter[Value]) -> str:
    """The eight commonest values with their pixels."""
    text = ", ".join(f"{value} ({pixels:,} pixels)" for value, pixels in counts.most_common(8))
    return text if len(counts) <= 8 else f"{text} and {len(counts) - 8} more"


def code_of(value: Value) -> int:
    """A colour as one integer, 0xRRGGBB; an integer as it is."""
    return int(value[1:], 16) if isinstance(value, str) else value


def codes_of(mask: np.ndarray, source: str) -> np.ndarray:
    """A mask as integers (H, W); colours (H, W, 3 or more) become 0xRRGGBB."""
    if mask.ndim == 3:
        return mask[..., :3].astype(np.int64) @ (1 << 16, 1 << 8, 1)
    if mask.dtype.kind == "f":
        if not np.array_equal(mask, np.rint(mask)):
            raise InputError(f"{source}: this mask holds fractions. Save masks as PNG with one integer a class")
        return mask.astype(np.int64)
    return mask


def count_values(mask: np.ndarray, source: str) -> Counter[Value]:
    """Value -> pixels."""
    values, pixels = np.unique(codes_of(mask, source), return_counts=True)
    names: list[Value] = values.tolist()
    if mask.ndim == 3:
        names = [f"#{value:06X}" for value in values]
    return Counter(dict(zip(names, pixels.tolist(), strict=True)))


@dataclass(frozen=True)
class Labels:
    """The classes of a data set, in the order of their indices."""

    task: Literal["binary", "multiclass"]  # two classes, one logit, sigmoid; or K classes, K logits, softmax
    names: list[str]
    values: list[list[Value]]  # for each class, the mask values that mean it
    colors: list[str]  # for each class, its display colour "#RRGGBB"
    ignore: list[Value]  # mask values of pixels that count nowhere
    channels: int = 3  # of the images
    dtype: str | None = None  # of the images, by NumPy's name; None: not declared
    scale: float | None = None  # what stands for 1.0 in an image; None: its type's largest integer, 1 for floats
    tolerance: int = 0  # how far a mask's pixel may be, in each channel, from the nearest value that is declared

    @classmethod
    def parse(cls, classes: Mapping[str, Any], ignore: Any = None, channels: int = 3) -> "Labels":
        """Read the declaration as users write it in YAML. Two classes are a binary task.

        Args:
            classes: name -> value, list of values, "#RRGGBB", or {"value": any of these, "color": "#RRGGBB"}.
            ignore: a value, a list of values, or None.
            channels: channels of the images.
        """
        if len(classes) < 2:
            raise InputError(
                f"classes declares {list(classes)}: segmentation needs at least two, "
                "e.g. classes: {background: 0, nucleus: 255}"
            )
        values: list[list[Value]] = []
        colors: list[str] = []
        for index, (name, given) in enumerate(classes.items()):
            where = f"class {name!r}"
            if type(name) not in (str, int):
                raise InputError(f'{where}: YAML reads on, no, null and 1.0 as values. Put the name in quotes: "no"')
            spec = given if isinstance(given, Mapping) else {"value": given}
            unknown = sorted(set(spec) - {"value", "color"})
            if unknown:
                raise InputError(f"{where} has {unknown}: a class has value and color, nothing else")
            own = _as_values(spec.get("value"), where)
            color = own[0] if isinstance(own[0], str) else _distinct_color(index)
            values.append(own)
            colors.append(_check_color(spec.get("color") or color, where))
        ignored = [] if ignore in (None, (), []) else _as_values(ignore, "ignore")
        declared = [*chain.from_iterable(values), *ignored]
        uses = Counter(map(code_of, declared))
        for value in declared:
            if uses[code_of(value)] > 1:
                raise InputError(f"mask value {value} is declared twice in classes and ignore: keep one")
        if len(set(map(type, declared))) > 1:
            raise InputError("classes and ignore mix integers and colours: a mask is one or the other")
        task: Literal["binary", "multiclass"] = "binary" if len(classes) == 2 else "multiclass"
        return cls(task, [str(name) for name in classes], values, colors, ignored, channels)

    @property
    def num_classes(self) -> int:
        """K, the background included where it is a class."""
        return len(self.names)

    @property
    def num_outputs(self) -> int:
        """Channels of the net's output: 1 for a binary task, else K."""
        return 1 if self.task == "binary" else self.num_classes

    @property
    def reported(self) -> range:
        """Indices of the classes with metrics of their own: of a binary task the foreground alone."""
        return range(1 if self.task == "binary" else 0, self.num_classes)

    @property
    def background(self) -> int | None:
        """Index of the background: a binary task's first class, else the one of this name; None: there is none."""
        if self.task == "binary":
            return 0
        lower = [name.lower() for name in self.names]
        return lower.index("background") if "background" in lower else None

    @property
    def by_color(self) -> bool:
        """Whether masks are colour images."""
        return isinstance(self.values[0][0], str)

    @property
    def palette(self) -> np.ndarray:
        """Display colours, (K, 3) uint8."""
        return _rgb(self.colors)

    def as_dict(self) -> dict[str, Any]:
        """Plain types only: what a checkpoint keeps. `Labels(**labels.as_dict())` gives it back."""
        return asdict(self)

    def check(self) -> None:
        """Raises InputError, or ValueError, where these are no labels that `parse` could give: a file was changed."""
        described = zip(self.names, self.values, self.colors, strict=True)
        classes = {name: {"value": values, "color": color} for name, values, color in described}
        self.parse(classes, self.ignore)

    def encode(self, mask: np.ndarray, source: str) -> np.ndarray:
        """Class indices, (H, W) int64 in 0..K-1 or IGNORE_INDEX, of a mask as `read_mask` gives it.

        Args:
            mask: (H, W) integers, or (H, W, 3) uint8 where colours are declared.
            source: the file, for the error.

        Raises:
            InputError: a value that is not declared; the message holds its count and the YAML that would fix it.
        """
        if self.by_color != (mask.ndim == 3):
            held = "one value a pixel" if self.by_color else "colours"
            counts = count_values(mask, source)
            raise InputError(
                f"{source}: holds {held}, which classes does not declare: {describe(counts)}. "
                f"Fix: {as_yaml('classes', suggest_declaration(counts))}, with names of yours"
            )
        codes = codes_of(mask, source)
        if self.tolerance:
            codes = self._nearest(codes)
        # Of bytes look up the 256 values, not all pixels: ten times faster.
        index = self._look_up(np.arange(256)).take(codes) if codes.dtype == np.uint8 else self._look_up(codes)
        if (index == UNDECLARED).any():
            counts = count_values(mask, source)
            raise UndeclaredValues(f"{source}: {self.explain_undeclared(counts)}", counts)
        return index

    def decode(self, index: np.ndarray) -> np.ndarray:
        """The data set's own mask values of class indices: (H, W) integers, or (H, W, 3) uint8 colours."""
        if self.by_color:
            return _rgb([values[0] for values in self.values])[index]
        first = [int(values[0]) for values in self.values]
        smallest_type = np.result_type(np.min_scalar_type(min(first)), np.min_scalar_type(max(first)))
        return np.array(first, dtype=smallest_type)[index]

    def suggest_classes(self, values: Iterable[Value]) -> dict[str, Any] | None:
        """`classes` that fit masks of these values, name -> value or list of values.

        Two classes in other values than declared, 0 and 255 for 0 and 1, are still these two.

        Returns:
            None where nothing is undeclared, or so much that it is not a class.
        """
        codes = {0, *map(code_of, values)}
        undeclared = self.undeclared(values)
        if not undeclared or len(undeclared) > FEW:
            return None
        simple = not self.by_color and [len(group) for group in self.values] == [1, 1]
        if simple and codes in ({0, 1}, {0, 255}) and codes.isdisjoint(self.ignore):
            descending = int(self.values[0][0]) > int(self.values[1][0])
            return dict(zip(self.names, sorted(codes, reverse=descending), strict=True))
        classes: dict[str, Any] = {}
        for name, group in zip(self.names, self.values, strict=True):
            classes[name] = group[0] if len(group) == 1 else group
        return classes | {name_of(value): value for value in undeclared}

    def explain_undeclared(self, counts: Counter[Value]) -> str:
        """The message about masks of these values, value -> pixels, of which some are not declared; with the YAML of
        `suggest_classes`."""
        undeclared = self.undeclared(counts)
        classes = self.suggest_classes(counts)
        if classes:
            ignore = as_yaml("ignore", [*self.ignore, *undeclared])
            fix = f"Fix: {as_yaml('classes', classes)}, or, if they count nowhere, {ignore}"
        else:
            fix = (
                "Declare them if they are classes. Else this is not a label mask (JPEG, anti-aliased or a photo?): "
                "save masks as PNG with one value a class; or, for two classes, set mask_threshold: 128"
            )
        found = describe(Counter({value: counts[value] for value in undeclared}))
        return f"mask values that classes does not declare: {found}, of {counts.total():,}. {fix}"

    def undeclared(self, values: Iterable[Value]) -> list[Value]:
        """Those of some mask values that nobody declared."""
        table = self._table()
        return [value for value in values if code_of(value) not in table]

    def _table(self) -> dict[int, int]:
        """Code of a mask value -> class index or IGNORE_INDEX."""
        table = {code_of(value): IGNORE_INDEX for value in self.ignore}
        for index, values in enumerate(self.values):
            table |= {code_of(value): index for value in values}
        return table

    def _look_up(self, codes: np.ndarray) -> np.ndarray:
        """Class index, IGNORE_INDEX or UNDECLARED of each code."""
        table = self._table()
        known = sorted(table)
        index = np.array([table[code] for code in known])
        place = np.searchsorted(known, codes).clip(max=len(known) - 1)
        return np.where(np.take(known, place) == codes, index[place], UNDECLARED)

    def _nearest(self, codes: np.ndarray) -> np.ndarray:
        """Codes, where they are near enough, in their stead those of the nearest declared values."""
        known = np.array(list(self._table()))
        found, place = np.unique(codes, return_inverse=True)
        apart = self._channels(found)[:, None] - self._channels(known)
        distance = abs(apart).max(axis=2)
        is_near = distance.min(axis=1) <= self.tolerance
        nearest = known[distance.argmin(axis=1)]
        return np.where(is_near, nearest, found)[place].reshape(codes.shape)

    def _channels(self, codes: np.ndarray) -> np.ndarray:
        """(N, 3) red, green and blue of codes; (N, 1) where they are no colours."""
        column = codes.astype(np.int64)[:, None]
        return column >> (16, 8, 0) & 255 if self.by_color else column


def _as_values(declared: Any, where: str) -> list[Value]:
    values = list(declared) if isinstance(declared, (list, tuple)) else [declared]
    for value in values or [None]:
        if isinstance(value, str):
            _check_color(value, where)
        elif type(value) is not int:
            raise InputError(
                f"{where} has the mask value {value!r}: give an integer, a list of them, or "
                '"#RRGGBB" in quotes (YAML takes a bare # for a comment)'
            )
    return values


def _check_color(color: Any, where: str) -> str:
    if not isinstance(color, str) or not HEX.fullmatch(color):
        raise InputError(f'{where} has the colour {color!r}: write it as "#RRGGBB", in quotes')
    return color.upper()


def _rgb(colors: Iterable[Any]) -> np.ndarray:
    return np.array([getrgb(color) for color in colors], dtype=np.uint8)


def _distinct_color(index: int) -> str:
    """Display colours for classes that declare none: dark gray first, then hues a golden angle apart."""
    if index == 0:
        return "#30343C"
    hue = 0.08 + (index - 1) * 0.61803
    color = colorsys.hsv_to_rgb(hue % 1, 0.62 if index % 2 else 0.8, 0.95)
    return "#" + bytes(round(255 * part) for part in color).hex().upper()
