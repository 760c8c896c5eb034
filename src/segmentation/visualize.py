"""Figures and tables of a run. Callers save or log what these functions return."""

import math
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image
from rich.bar import Bar
from rich.cells import cell_len
from rich.table import Column, Table
from rich.text import Text
from skimage.segmentation import find_boundaries
from torch import Tensor

from segmentation.data.labels import IGNORE_INDEX, Labels
from segmentation.data.writing import atomic_write
from segmentation.errors import readable
from segmentation.metrics import class_scores, mean_iou

if TYPE_CHECKING:  # matplotlib is slow to import: every function that needs it imports it itself
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Mask = np.ndarray | Tensor
Shown = dict[str, Any]  # a sample with its name, and where it was predicted its prediction and mIoU
WRONG = (255, 64, 72)  # in a binary task false positives
MISSED = (64, 184, 255)  # false negatives of a binary task
IGNORED = (226, 226, 226)
PANEL = 600  # pixels of a panel's longest side at most
KEPT = 2 * PANEL  # likewise of a sample that waits to be shown
NAME = 40  # letters of a name in a legend at most
TALL = 4  # rows of a grid that has its legend below too
CJK_FONTS = (  # of Linux, macOS and Windows, for letters that Matplotlib's own font does not have
    *("Noto Sans CJK SC", "Noto Sans CJK JP", "Source Han Sans SC", "WenQuanYi Zen Hei", "Droid Sans Fallback"),
    *("Hiragino Sans GB", "Apple SD Gothic Neo", "Arial Unicode MS"),
    *("Microsoft YaHei", "Yu Gothic", "Malgun Gothic"),
)
NO_FONT = (
    "pictures: no font here has all letters of the class or file names. Install one, e.g. apt install fonts-noto-cjk, "
    "and remove ~/.cache/matplotlib"
)
OVERALL = {  # metrics that are not of one class, and their names on the terminal
    "miou": "mIoU",
    "miou_per_image": "mIoU per image",
    "fwiou": "mIoU by frequency",
    "mean_boundary_iou": "boundary IoU",
    "mean_hd95": "HD95, pixels",
    "mean_assd": "ASSD, pixels",
    "pixel_accuracy": "pixel accuracy",
}


def to_rgb(image: np.ndarray | Tensor) -> np.ndarray:
    """Show an image (C, H, W) of any number of channels as (H, W, 3) uint8.

    One channel is gray, two are magenta and green, of more the first three are shown. uint8 stays as it is. Other types
    have no declared range: each channel is stretched from its 1st to its 99th percentile.
    """
    channels = np.asarray(image)
    shown = {1: [0, 0, 0], 2: [0, 1, 0]}.get(len(channels), [0, 1, 2])
    if channels.dtype != np.uint8:
        channels = np.stack([_stretch(channel) for channel in channels[:3]])
    return channels[shown].transpose(1, 2, 0)


def _stretch(channel: np.ndarray) -> np.ndarray:
    values = channel.astype(np.float32)
    finite = values[np.isfinite(values)]
    if not finite.size:
        return np.zeros(channel.shape, np.uint8)
    low, high = np.percentile(finite, (1, 99))
    if low == high:  # what differs is less than 1 % of the pixels, but all there is to see
        low = finite.min()
        high = max(finite.max(), np.nextafter(low, np.inf))
    values = np.nan_to_num(values, nan=low)
    return np.interp(values, (low, high), (0, 255)).round().astype(np.uint8)


def shrink(pixels: Tensor) -> Tensor:
    """Every n-th pixel of a large image or mask, (..., H, W), to be shown; a copy, as a view would keep them all."""
    step = math.ceil(max(pixels.shape[-2:]) / KEPT)
    return pixels[..., ::step, ::step].clone()


def panels(
    image: Tensor,
    truth: Mask,
    prediction: Mask | None,
    labels: Labels,
) -> dict[str, np.ndarray]:
    """Draw one sample as images of one size, (h, w, 3) uint8, by their headings: with a prediction its errors, without
    one the truth over the image.

    Args:
        image: (C, H, W).
        truth: class indices (H, W). IGNORE_INDEX is gray, and never an error.
        prediction: class indices (H, W).
        labels: have the classes' colours.
    """
    step = math.ceil(max(image.shape[-2:]) / PANEL)
    photo = to_rgb(image[:, ::step, ::step])
    true = np.asarray(truth)[::step, ::step]
    ignored = true == IGNORE_INDEX
    colored = labels.palette[np.where(ignored, 0, true)]
    colored[ignored] = IGNORED
    drawn = {"Image": photo, "Truth": colored}
    if prediction is None:
        drawn["Truth over image"] = photo // 2 + colored // 2
        return drawn
    predicted = np.asarray(prediction)[::step, ::step]
    wrong = (true != predicted) & ~ignored
    errors = photo // 2
    errors[:] = errors.mean(axis=2, keepdims=True)  # gray, so that what has a colour is an error
    errors[wrong] = WRONG
    if labels.task == "binary":
        errors[wrong & (true == 1)] = MISSED
    drawn["Prediction"] = labels.palette[predicted]
    drawn["Errors"] = errors
    return drawn


def mask_overlay(image: np.ndarray | Tensor, mask: Mask, labels: Labels) -> np.ndarray:
    """Lay a mask (H, W) over its image (C, H, W): (H, W, 3) uint8. Classes but the background are tinted and outlined,
    as the image may have their colours."""
    index = np.asarray(mask)
    opacity = np.where(find_boundaries(index), 1, 0.4)
    opacity[index == labels.background] = 0
    photo = to_rgb(image)
    tint = opacity[..., None] * (labels.palette[index] - photo.astype(float))
    return (photo + tint).astype(np.uint8)


WARNED: set[str] = set()  # what `style` has warned of


@contextmanager
def style() -> Iterator[None]:
    """Draw in Matplotlib's own style, whatever the user's is, with fonts for all letters that the machine has."""
    import matplotlib.style
    from matplotlib.font_manager import get_font_names

    installed = get_font_names()
    fonts = [name for name in CJK_FONTS if name in installed]
    options = {
        "font.family": ["DejaVu Sans", *fonts],
        "text.parse_math": False,  # a name may hold a dollar
    }
    with warnings.catch_warnings(record=True) as caught, matplotlib.style.context(["default", options]):
        yield
    for warning in caught:
        text = str(warning.message)
        if "missing from font" in text:
            text = NO_FONT
        if text not in WARNED:
            WARNED.add(text)
            warnings.warn(text, warning.category, stacklevel=2)


@style()
def sample_grid(
    samples: Sequence[Shown],
    labels: Labels,
    title: str = "",
) -> Image.Image:
    """Draw samples as rows of `panels`, with a legend of the classes in them.

    Args:
        samples: each with `image`, `mask` and `name`; where there are predictions, also with `prediction`, and `miou`
            for its mIoU. They may differ in size.
        labels: names and colours of the classes.
        title: shown above all.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    rows = [panels(sample["image"], sample["mask"], sample.get("prediction"), labels) for sample in samples]
    ratios = [np.divide(*sample["mask"].shape) for sample in samples]
    heights = 3 * np.clip(ratios, 0.1, 1)  # in inches: a panel is at most 3 x 3
    columns = len(rows[0])
    colors = legend_colors(samples, labels)
    legend = [Patch(color=np.divide(color, 255), label=shorten(name)) for name, color in colors.items()]
    longest = max(cell_len(shorten(name)) for name in colors)
    entries = max(1, int(3.1 * columns / (0.7 + 0.09 * longest)))  # of the legend, a line
    places: list[Any] = ["outside upper left"]
    if len(rows) >= TALL:
        places.append("outside lower left")
    legend_height = len(places) * 0.22 * math.ceil(len(legend) / entries)
    total = sum(heights) + 0.25 * len(rows) + legend_height + 0.8
    figure = Figure((3.1 * columns, total), dpi=110, layout="constrained")
    grid = figure.subplots(
        len(rows),
        columns,
        squeeze=False,
        height_ratios=heights,
    )
    for axes, row, sample in zip(grid, rows, samples, strict=True):
        for cell, (heading, panel) in zip(axes, row.items(), strict=True):
            cell.imshow(panel, interpolation="nearest")  # masks must never blend two classes
            cell.axis("off")
            cell.set_title(heading, loc="left", size=9)
        axes[0].set_title(shorten(readable(sample["name"])), loc="left", size=9)
        if not math.isnan(sample.get("miou", math.nan)):
            axes[-1].set_title(f"mIoU {sample['miou']:.2f}", loc="right", size=9)
    for place in places:
        figure.legend(
            handles=legend,
            loc=place,
            ncols=entries,
            frameon=False,
            title=title if place == places[0] else None,
            title_fontproperties={"weight": "bold", "size": "large"},
            alignment="left",
        )
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return Image.fromarray(np.asarray(canvas.buffer_rgba())[..., :3])


def shorten(name: str) -> str:
    """A long name without its middle: names differ at their beginnings or ends."""
    if len(name) <= NAME:
        return name
    return f"{name[: NAME // 2]}…{name[-NAME // 2 :]}"


def legend_colors(samples: Sequence[Shown], labels: Labels) -> dict:
    """Name -> colour of the classes that are shown, and of errors."""
    present = set()
    for sample in samples:
        present.update(np.unique(sample["mask"]).tolist())
        present.update(np.unique(sample.get("prediction", [])).tolist())
    colors: dict = {name: labels.palette[index] for index, name in enumerate(labels.names) if index in present}
    if IGNORE_INDEX in present:
        colors["ignored"] = IGNORED
    if "prediction" in samples[0]:
        if labels.task == "binary":
            colors[f"false {labels.names[1]}"] = WRONG
            colors[f"missed {labels.names[1]}"] = MISSED
        else:
            colors["wrong class"] = WRONG
    return colors


def plot(width: float, height: float) -> tuple["Figure", "Axes"]:
    """Make an empty plot, in inches, in the look of all plots. Call it, and draw, within `style`."""
    from matplotlib.figure import Figure

    figure = Figure((width, height), dpi=144)
    axes = figure.subplots()
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    axes.grid(color="#ECEDEF")
    axes.set_axisbelow(True)
    return figure, axes


@style()
def confusion_figure(matrix: Tensor | np.ndarray, labels: Labels) -> "Figure":
    """Plot which share of each true class (rows) was predicted as which class (columns). An absent class is gray.

    Args:
        matrix: counts of pixels, (K, K).
        labels: K classes.
    """
    counts = torch.as_tensor(matrix).double()
    shares = 100 * counts / counts.sum(dim=1, keepdim=True)  # of an absent class NaN
    size = labels.num_classes
    has_text = size <= 20
    side = 1.5 + size * (0.6 if has_text else 0.15)
    figure, axes = plot(side, side)
    axes.set_facecolor("#E9EAEC")  # shines through where there is no share
    # Rare confusions matter: the square root keeps them from fading into white.
    axes.imshow(
        shares.sqrt(),
        cmap="Blues",
        vmin=0,
        vmax=10,
        interpolation="nearest",
    )
    axes.grid(visible=False)
    names = list(map(shorten, labels.names))
    axes.set_xticks(range(size), names, rotation=90)
    axes.set_yticks(range(size), names)
    axes.set_xlabel("predicted")
    axes.set_ylabel("true")
    axes.set_title(f"mIoU {mean_iou(counts):.3f}  ·  % of the true class", loc="left")
    if has_text:
        for row, column in (shares >= 0.05).nonzero().tolist():  # what rounds to nothing stays empty, as does NaN
            share = shares[row, column]
            axes.text(
                column,
                row,
                f"{share:.1f}",
                ha="center",
                va="center",
                color="white" if share > 35 else "black",
            )
    return figure


def table(title: str, first: str, *others: str) -> Table:
    """Make an empty table for the terminal, its numbers aligned to the right."""
    columns = [Column(heading, justify="right", overflow="fold") for heading in others]
    return Table(
        Column(first, overflow="fold"),
        *columns,
        title=Text(title),
        title_justify="left",
    )


def evenly(length: int, most: int) -> list[int]:
    """Evenly spaced indices of a list, at most so many."""
    return np.linspace(0, length - 1, min(most, length), dtype=int).tolist()


def iou_table(metrics: dict[str, float], labels: Labels, split: str, matrix: Tensor) -> Table:
    """Make the table of a test's metrics, class by class, for the terminal.

    Args:
        metrics: those of no class, by their logged keys. One that is undefined is shown as "-".
        labels: the classes.
        split: for the title; that of validation may be tested.
        matrix: the confusion matrix, for the metrics of each class.
    """

    shown = table(
        f"{split}: IoU by class",
        "class",
        "IoU",
        "Dice",
        "prec.",
        "recall",
        "pixels",
    )
    *columns, support = class_scores(matrix).values()
    iou = columns[0]
    for index, name in enumerate(labels.names):
        shown.add_row(
            Text.assemble(("■ ", labels.colors[index]), name),
            *(_number(float(column[index])) for column in columns),
            f"{support[index] / support.sum().clamp(min=1):.2%}",
            Bar(
                1,
                0,
                iou[index].nan_to_num().item(),
                width=10,
                color="cyan",
            ),
        )
    shown.add_section()
    for key, name in OVERALL.items():
        if f"test/{key}" in metrics:
            shown.add_row(Text(name, "bold"), _number(metrics[f"test/{key}"]))
    return shown


def _number(value: float) -> str:
    return "-" if math.isnan(value) else f"{value:.4f}"


@style()
def save_png(picture: "Image.Image | Figure", path: Path) -> None:
    """Save a picture, replacing what is there."""
    with atomic_write(path) as aside:
        if isinstance(picture, Image.Image):
            picture.save(aside, format="png")
        else:
            picture.savefig(aside, format="png", bbox_inches="tight")
