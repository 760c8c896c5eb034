"""The classes that a data set declares: their names, the mask values or colours that stand for them, what to ignore.

Nothing is guessed from pixels. A mask value that nobody declared is an error that prints the YAML to add.
"""

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import chain
from typing import Any, Literal

import numpy as np
from PIL.ImageColor import getrgb

from segmentation.data.mask_values import Counts, MaskValues, Value, add, as_yaml, code_of, describe, shorten
from segmentation.errors import InputError

#: Class index of pixels that count nowhere: void, padding. It is the default of torch's own cross-entropy.
IGNORE_INDEX = -100

#: Index of a mask value that nobody declared; it never leaves `Labels.encode`.
UNDECLARED = -1

#: Display colours: dark gray, five of Okabe and Ito's, and from there on the colour that is farthest from those before
#: it (CIEDE2000). Colour-blind readers tell the first eight apart, and none is near the red that stands for errors.
PALETTE = (
    "30343C E69F00 56B4E9 009E73 F0E442 0072B2 A5F0E1 006900 F078F0 A51E87 "
    "785A1E 87961E 2DF04B 006969 C3C3FF 4B3CE1 8778A5 FFD2A5 7887FF B4D296 "
    "FFD2E1 692D3C 69785A 692D0F A59678 78A5A5 5A4B78 3C4B2D A55AF0 00A50F "
    "003C87 00E1FF 00E1A5 4B3C2D 690096 A57800 B4E1FF 87C300 C3B45A 1E4B5A"
)

HEX = re.compile(r"#[0-9a-fA-F]{6}")


class UndeclaredValues(InputError):
    """A mask holds values that nobody declared; `counts` are the pixels of all its values, or of the commonest 512: of
    an anti-aliased colour mask the others would fill the memory."""

    def __init__(self, message: str, counts: Counts) -> None:
        super().__init__(message)
        self.counts = shorten(counts)


def codes_of(mask: np.ndarray, source: str) -> np.ndarray:
    """A mask as integers (H, W); colours (H, W, 3 or more) become 0xRRGGBB."""
    if mask.ndim == 3:
        rgb = mask[..., :3].astype(np.int64)
        return rgb @ (1 << 16, 1 << 8, 1)
    if mask.dtype.kind == "f":
        if not np.array_equal(mask, np.rint(mask)):
            raise InputError(f"{source}: this mask holds fractions. Save masks as PNG with one integer per class")
        return mask.astype(np.int64)
    return mask


def count_values(mask: np.ndarray, source: str) -> Counts:
    """Value -> pixels."""
    values, pixels = np.unique(codes_of(mask, source), return_counts=True)
    names = values.tolist()
    if mask.ndim == 3:
        names = [f"#{value:06X}" for value in values]
    return Counter(dict(zip(names, pixels.tolist(), strict=True)))


@dataclass(frozen=True)
class Labels:
    """The classes of a data set, in the order of their indices.

    Args:
        task: `binary`: two classes, one logit, sigmoid; `multiclass`: K classes, K logits, softmax.
        names: of the classes.
        values: for each class, the mask values that mean it.
        colors: for each class, its display colour "#RRGGBB".
        ignore: mask values of pixels that count nowhere.
        channels: of the images.
        dtype: of the images, by NumPy's name; None: not declared.
        scale: what stands for 1.0 in an image; None: its type's largest integer, 1 for floats.
        tolerance: how far a mask's pixel may be, in each channel, from the nearest value that is declared.
    """

    task: Literal["binary", "multiclass"]
    names: list[str]
    values: list[list[Value]]
    colors: list[str]
    ignore: list[Value]
    channels: int = 3
    dtype: str | None = None
    scale: float | None = None
    tolerance: int = 0

    @classmethod
    def parse(
        cls,
        classes: Mapping[Any, Any] | Sequence[Any],
        ignore: Any = None,
        channels: int = 3,
    ) -> "Labels":
        """Read the declaration as users write it in YAML. Two classes are a binary task.

        Args:
            classes: name -> value, list of values, "#RRGGBB", or {"value": any of these, "color": "#RRGGBB"}.
            ignore: a value, a list of values, or None.
            channels: channels of the images.
        """
        fixed = _fix_form(classes)
        if fixed or not isinstance(classes, Mapping):
            if fixed and len(fixed) == 1:
                fixed["foreground"] = 255
            fix = as_yaml("classes", fixed)
            raise InputError(f'classes takes name: value, and a colour is "#RRGGBB". Fix: {fix}')
        if len(classes) < 2:
            raise InputError(
                f"classes declares {list(classes)}: segmentation needs at least two, "
                "e.g. classes: {background: 0, nucleus: 255}"
            )
        values = []
        colors = []
        for index, (name, given) in enumerate(classes.items()):
            where = f"class {name!r}"
            if type(name) not in (str, int):
                raise InputError(f'{where}: YAML reads on, no, null and 1.0 as values. Put the name in quotes: "no"')
            spec = given if isinstance(given, Mapping) else {"value": given}
            unknown = sorted(set(spec) - {"value", "color"})
            if unknown:
                raise InputError(f"{where} has {unknown}: a class has value and color, nothing else")
            own = _as_values(spec.get("value"), where)
            own_color = own[0] if isinstance(own[0], str) else _distinct_color(index)
            color = spec.get("color") or own_color
            values.append(own)
            colors.append(_check_color(color, where))
        ignored = [] if ignore in (None, (), []) else _as_values(ignore, "ignore")
        declared = [*chain.from_iterable(values), *ignored]
        uses = Counter(map(code_of, declared))
        for value in declared:
            if uses[code_of(value)] > 1:
                raise InputError(f"mask value {value} is declared twice in classes and ignore: keep one")
        if len(set(map(type, declared))) > 1:
            raise InputError("classes and ignore mix integers and colours: a mask is one or the other")
        return cls(
            task="binary" if len(classes) == 2 else "multiclass",
            names=list(map(str, classes)),
            values=values,
            colors=colors,
            ignore=ignored,
            channels=channels,
        )

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
        first = 1 if self.task == "binary" else 0
        return range(first, self.num_classes)

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

    def as_dict(self) -> dict:
        """Plain types only: what a checkpoint keeps. `Labels(**labels.as_dict())` gives it back."""
        return asdict(self)

    def check(self) -> None:
        """Raises InputError, or ValueError, where these are no labels that `parse` could give: a file was changed."""
        declared = zip(self.names, self.values, self.colors, strict=True)
        classes = {name: {"value": values, "color": color} for name, values, color in declared}
        self.parse(classes, self.ignore)

    def encode(self, mask: np.ndarray, source: str) -> np.ndarray:
        """Class indices, (H, W) int64 in 0..K-1 or IGNORE_INDEX, of a mask as `read_mask` gives it.

        Args:
            mask: (H, W) integers, or (H, W, 3) uint8 where colours are declared.
            source: the file, for the error.

        Raises:
            InputError: a value that is not declared; the message holds its count and the YAML that would fix it.
        """
        codes = codes_of(mask, source)
        # Of bytes look up the 256 values, not all pixels: ten times faster.
        index = self._look_up(np.arange(256))[codes] if codes.dtype == np.uint8 else self._look_up(codes)
        is_color = mask.ndim == 3
        if self.by_color != is_color or (index == UNDECLARED).any():
            counts = count_values(mask, source)
            background = self.values[0]
            others = [Counter([*background, *group]) for group in self.values]
            if add(others).keys().isdisjoint(counts):  # all masks may hold other values
                others = []
            text, _ = self.explain([counts], others)
            raise UndeclaredValues(f"{source}: {text}", counts)
        return index

    def decode(self, index: np.ndarray) -> np.ndarray:
        """The data set's own mask values of class indices: (H, W) integers, or (H, W, 3) uint8 colours."""
        if self.by_color:
            colors = _rgb(values[0] for values in self.values)
            return colors[index]
        first = [int(values[0]) for values in self.values]
        smallest_type = np.result_type(*map(np.min_scalar_type, first))
        return np.array(first, dtype=smallest_type)[index]

    def explain(
        self,
        masks: Sequence[Counts],
        others: Sequence[Counts] = (),
        objects: bool = False,
    ) -> tuple[str, dict]:
        """The message about masks that hold undeclared values, and the options of FolderData that mend it.

        Args:
            masks: the values of each.
            others: of masks that hold declared values.
            objects: whether masks only tell objects from the background, in any value.
        """
        counts = add(masks)
        pixels = counts.total()
        text = "several values in a mask that only tells objects from the background"
        if not objects:
            text = "mask values that classes does not declare"
            for value in [*chain.from_iterable(self.values), *self.ignore]:
                counts.pop(value, None)
        declared = dict(zip(self.names, self.values, strict=True))
        has_colors = any(isinstance(value, str) for value in counts)
        if self.by_color != has_colors and not objects:
            declared = {}
        found = MaskValues(
            [*masks, *others],
            declared,
            self.ignore,
            objects,
        )
        for value in found.ignore:  # the reasons list them
            counts.pop(value, None)
        if counts:
            text += f": {describe(counts)}, of {pixels:,}"
        message = f"{text}. {found}"
        if found.options and not found.reasons:
            ignore = as_yaml("ignore", [*self.ignore, *counts])
            message += f", or, if they count nowhere, {ignore}"
        return message, found.options

    def _look_up(self, codes: np.ndarray) -> np.ndarray:
        """Class index, IGNORE_INDEX or UNDECLARED of each code."""
        table = {code_of(value): IGNORE_INDEX for value in self.ignore}
        for index, values in enumerate(self.values):
            table |= {code_of(value): index for value in values}
        known, indices = np.array(sorted(table.items())).T
        if self.tolerance:
            found, place = np.unique(codes, return_inverse=True)
            distance = abs(self._channels(found)[:, None] - self._channels(known)).max(axis=2)
            is_near = distance.min(axis=1) <= self.tolerance
            nearest = indices[distance.argmin(axis=1)]
            return np.where(is_near, nearest, UNDECLARED)[place].reshape(codes.shape)
        place = np.searchsorted(known, codes).clip(max=len(known) - 1)
        return np.where(known[place] == codes, indices[place], UNDECLARED)

    def _channels(self, codes: np.ndarray) -> np.ndarray:
        """(N, 3) red, green and blue of codes; (N, 1) where they are no colours."""
        column = codes.astype(np.int64)[:, None]
        return column >> (16, 8, 0) & 255 if self.by_color else column


def _fix_form(classes: Any) -> dict | None:
    """Classes as they should have been written: of a list of names, of {value: name}, of colours as [R, G, B]."""
    if isinstance(classes, (list, tuple)):
        return {str(name): index for index, name in enumerate(classes)}
    fixed: dict = {}
    wrong = False
    for name, value in classes.items():
        is_triple = isinstance(value, (list, tuple)) and len(value) == 3
        if re.fullmatch(r"-?\d+", str(name)) and isinstance(value, str) and not HEX.fullmatch(value):
            fixed[value] = int(name)
            wrong = True
        elif is_triple and all(part in range(256) for part in value):
            fixed[name] = "#{:02X}{:02X}{:02X}".format(*value)
            wrong = wrong or len(set(value)) < 3  # a value is declared once, a colour may have it twice
        else:
            fixed[name] = value
    return fixed if wrong else None


def _as_values(declared: Any, where: str) -> list[Value]:
    """Mask values; colours in capitals."""
    values = [declared]
    if isinstance(declared, (list, tuple)):
        values = list(declared)
    for index, value in enumerate(values or [None]):
        if isinstance(value, str):
            values[index] = _check_color(value, where)
        elif type(value) is not int:
            raise InputError(
                f"{where} has the mask value {value!r}: give an integer, a list of them, or "
                '"#RRGGBB" in quotes (YAML takes a bare # for a comment)'
            )
    return values


def _check_color(color: Any, where: str) -> str:
    if not isinstance(color, str) or not HEX.fullmatch(color):
        raise InputError(
            f'{where} has the colour {color!r}: write it as "#RRGGBB", in quotes (a mask value: a whole number)'
        )
    return color.upper()


def _rgb(colors: Iterable[Any]) -> np.ndarray:
    return np.array([getrgb(color) for color in colors], dtype=np.uint8)


def _distinct_color(index: int) -> str:
    """Display colours for classes that declare none; after those of PALETTE hues a golden angle apart, none red."""
    colors = PALETTE.split()
    if index < len(colors):
        return f"#{colors[index]}"
    hue = 36 + 270 * (index * 0.61803 % 1)
    saturation = 62 if index % 2 else 80
    return "#{:02X}{:02X}{:02X}".format(*getrgb(f"hsv({hue},{saturation}%,95%)"))
