"""What a data set declares about its masks: class names, the values (or colours) that stand for them, what to ignore.

Nothing here is ever guessed from pixels. A mask value that nobody declared is an error that prints the YAML to add.
"""

import colorsys
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from segmentation.errors import InputError

#: Class index of pixels that count nowhere: void, padding. It is the default of torch's own cross-entropy.
IGNORE_INDEX = -100

#: A mask value: an integer of an index mask, or "#RRGGBB" of a colour mask.
Value = int | str

HEX = re.compile(r"#[0-9a-fA-F]{6}")


@dataclass(frozen=True)
class Labels:
    """The classes of a data set, in the order of their indices.

    Args:
        task: `binary` (two classes, one logit, sigmoid) or `multiclass` (K classes, K logits, softmax).
        names: K class names.
        values: for each class, the mask values that mean it.
        colors: for each class, its display colour "#RRGGBB".
        ignore: mask values of pixels that count nowhere.
        channels: bands of the images.
    """

    task: str
    names: list[str]
    values: list[list[Value]]
    colors: list[str]
    ignore: list[Value]
    channels: int = 3

    @classmethod
    def parse(
        cls, classes: Mapping[str, Any], ignore: Any = None, channels: int = 3, task: str | None = None
    ) -> "Labels":
        """Read the declaration as users write it in YAML.

        Args:
            classes: name -> value, list of values, "#RRGGBB", or {"value": any of these, "color": "#RRGGBB"}.
            ignore: a value, a list of values, or None.
            channels: bands of the images.
            task: None means `binary` for two classes and `multiclass` for more.

        Raises:
            InputError: fewer than two classes, a value declared twice, colours mixed with integers, a bad colour.
        """
        if len(classes) < 2:
            raise InputError(
                f"classes declares {list(classes)}: segmentation needs at least two, "
                "e.g. classes: {background: 0, nucleus: 255}"
            )
        task = task or ("binary" if len(classes) == 2 else "multiclass")
        if task not in ("binary", "multiclass") or (task == "binary" and len(classes) != 2):
            raise InputError(f"task {task!r} does not fit {len(classes)} classes: binary takes two, else multiclass")
        values, colors = [], []
        for name, spec in classes.items():
            declared = spec.get("value") if isinstance(spec, Mapping) else spec
            color = spec.get("color") if isinstance(spec, Mapping) else None
            values.append(_as_values(declared, f"class {name!r}"))
            mask_color = next((v for v in values[-1] if isinstance(v, str)), None)
            colors.append(_check_color(color or mask_color or _distinct_color(len(colors)), f"class {name!r}"))
        ignored = _as_values(ignore, "ignore") if ignore is not None else []
        _check_values([*sum(values, []), *ignored])
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
    def by_color(self) -> bool:
        """Whether masks are colour images."""
        return isinstance(self.values[0][0], str)

    @property
    def palette(self) -> np.ndarray:
        """Display colours, (K, 3) uint8."""
        return np.array([hex_to_rgb(color) for color in self.colors], dtype=np.uint8)

    def as_dict(self) -> dict[str, Any]:
        """Plain types only: what a checkpoint keeps. `Labels(**labels.as_dict())` gives it back."""
        return asdict(self)

    def encode(self, mask: np.ndarray, source: str) -> np.ndarray:
        """Class indices of a mask as read from a file.

        Args:
            mask: (H, W) integers, or (H, W, 3) uint8 where colours are declared.
            source: the file's name, for the error.

        Returns:
            (H, W) int64 in 0..K-1, or IGNORE_INDEX.

        Raises:
            InputError: a value that is not declared; the message holds its count and the YAML that would fix it.
        """
        if self.by_color != (mask.ndim == 3):
            raise InputError(
                f"{source}: "
                + (
                    "the classes are declared by colour, but this mask holds one value a pixel. Declare integers: "
                    f"classes: {{{self.names[0]}: 0, {self.names[1]}: 1}}"
                    if self.by_color
                    else "this mask is a colour image, but the classes are declared by integer. Declare colours: "
                    f'classes: {{{self.names[0]}: "#000000", ...}}'
                )
            )
        codes = _pack_rgb(mask) if self.by_color else mask.astype(np.int64)
        found, inverse, counts = np.unique(codes, return_inverse=True, return_counts=True)
        table = {_code(value): index for index, values in enumerate(self.values) for value in values}
        table |= {_code(value): IGNORE_INDEX for value in self.ignore}
        unknown = [(int(v), int(n)) for v, n in zip(found, counts, strict=True) if int(v) not in table]
        if unknown:
            raise InputError(self._undeclared(source, unknown, [int(v) for v in found], codes.size))
        lookup = np.array([table[int(value)] for value in found], dtype=np.int64)
        return lookup[inverse].reshape(codes.shape)

    def decode(self, index: np.ndarray) -> np.ndarray:
        """The data set's own label values of class indices: (H, W) integers, or (H, W, 3) uint8 colours."""
        if self.by_color:
            return np.array([hex_to_rgb(str(values[0])) for values in self.values], dtype=np.uint8)[index]
        first = [int(values[0]) for values in self.values]
        return np.array(first, dtype=np.uint8 if max(first) < 256 else np.uint16)[index]

    def _undeclared(self, source: str, unknown: list[tuple[int, int]], found: list[int], pixels: int) -> str:
        show = (lambda v: f'"#{v:06X}"') if self.by_color else str
        listed = ", ".join(f"{show(v)} ({n:,} pixels)" for v, n in unknown[:8])
        more = f" and {len(unknown) - 8} more" if len(unknown) > 8 else ""
        message = f"{source}: mask values that classes does not declare: {listed}{more}, of {pixels:,}. "
        used = {_code(v) for values in self.values for v in values}
        if not self.by_color and self.num_classes == 2 and len(found) <= 2 and set(found) <= {0, 1, 255}:
            low, high = (0, max(found)) if max(found) else (0, 255)
            return message + f"Fix: classes: {{{self.names[0]}: {low}, {self.names[1]}: {high}}}"
        if len(unknown) > 8:
            return message + (
                "So many values mean that this is not an index mask (JPEG, anti-aliased or a photograph?): "
                "save masks as PNG with one value a class."
            )
        declared = {
            name: values[0] if len(values) == 1 else values
            for name, values in zip(self.names, self.values, strict=True)
        }
        names = ", ".join(f"{name}: {_yaml(value)}" for name, value in declared.items())
        extra = ", ".join(f"class_{v if not self.by_color else f'{v:06x}'}: {show(v)}" for v, _ in unknown)
        ignored = ", ".join([*(_yaml(v) for v in self.ignore), *(show(v) for v, _ in unknown)])
        assert used is not None
        return message + f"Fix: classes: {{{names}, {extra}}}, or, if they count nowhere, ignore: [{ignored}]"


def hex_to_rgb(color: str) -> tuple[int, int, int]:
    """ "#80FF00" -> (128, 255, 0)."""
    return int(color[1:3], 16), int(color[3:5], 16), int(color[5:7], 16)


def _yaml(value: Value | list[Value]) -> str:
    if isinstance(value, list):
        return "[" + ", ".join(_yaml(v) for v in value) + "]"
    return f'"{value}"' if isinstance(value, str) else str(value)


def _as_values(declared: Any, where: str) -> list[Value]:
    values = list(declared) if isinstance(declared, (list, tuple)) else [declared]
    if not values:
        raise InputError(f"{where} has an empty list of mask values: give at least one")
    for value in values:
        if isinstance(value, str):
            _check_color(value, where)
        elif isinstance(value, bool) or not isinstance(value, int):
            raise InputError(f'{where} has the mask value {value!r}: give an integer, a list of them, or "#RRGGBB"')
    return values


def _check_color(color: str, where: str) -> str:
    if not isinstance(color, str) or not HEX.fullmatch(color):
        raise InputError(f'{where} has the colour {color!r}: write it as "#RRGGBB", in quotes')
    return color.upper()


def _check_values(values: list[Value]) -> None:
    codes = [_code(value) for value in values]
    twice = sorted({_yaml(value) for value, code in zip(values, codes, strict=True) if codes.count(code) > 1})
    if twice:
        raise InputError(f"mask value {', '.join(twice)} is declared twice in classes and ignore: keep one")
    if len({isinstance(value, str) for value in values}) > 1:
        raise InputError("classes and ignore mix integers and colours: a mask is one or the other")


def _code(value: Value) -> int:
    if isinstance(value, str):
        red, green, blue = hex_to_rgb(value)
        return red << 16 | green << 8 | blue
    return value


def _pack_rgb(mask: np.ndarray) -> np.ndarray:
    rgb = mask[..., :3].astype(np.int64)
    return rgb[..., 0] << 16 | rgb[..., 1] << 8 | rgb[..., 2]


def _distinct_color(index: int) -> str:
    """Display colours for classes that declare none: dark gray first, then hues a golden angle apart."""
    if index == 0:
        return "#30343C"
    red, green, blue = colorsys.hsv_to_rgb((0.08 + (index - 1) * 0.61803) % 1, 0.62 if index % 2 else 0.8, 0.95)
    return f"#{round(red * 255):02X}{round(green * 255):02X}{round(blue * 255):02X}"
