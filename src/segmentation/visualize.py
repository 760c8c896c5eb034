"""The images, tables and plots a run logs. Pure functions: what they return is saved or logged by the caller."""

import math
from collections.abc import Sequence
from itertools import repeat
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image
from rich.bar import Bar
from rich.table import Column, Table
from rich.text import Text
from skimage.segmentation import find_boundaries
from torch import Tensor

from segmentation.data.labels import IGNORE_INDEX, Labels
from segmentation.data.writing import atomic_write
from segmentation.errors import readable

if TYPE_CHECKING:  # matplotlib is slow to import: every function that needs it imports it itself
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

Mask = np.ndarray | Tensor
INK, SOFT = "#1C1E22", "#6E7278"
WRONG, MISSED = (255, 64, 72), (64, 184, 255)  # errors; in a binary task false positives and false negatives
IGNORED = (226, 226, 226)
PANEL = 600  # pixels of a panel's longest side at most
LEGEND_LIMIT = 30  # of more classes, the legend lists only those that the sheet shows
WHOLES = {  # figures that are not of one class, and how the terminal names them
    "miou": "mIoU",
    "miou_per_image": "mIoU per image",
    "fwiou": "mIoU by frequency",
    "mean_boundary_iou": "boundary IoU",
    "pixel_accuracy": "pixel accuracy",
}


def to_rgb(image: Tensor) -> np.ndarray:
    """An image (C, H, W) of any number of bands as (H, W, 3) uint8, for display.

    One band is gray; two are magenta and green; of more than three, the first three are shown. uint8 is shown as it is;
    uint16 and floats are stretched, each band from its 1st to its 99th percentile, as nothing declares their range.
    """
    bands = image.detach().cpu().numpy()
    picked = {1: [0, 0, 0], 2: [0, 1, 0]}.get(len(bands), [0, 1, 2])
    if bands.dtype != np.uint8:
        bands = np.stack([_stretch(band) for band in bands[:3]])
    return np.ascontiguousarray(bands[picked].transpose(1, 2, 0))


def panels(image: Tensor, truth: Mask, prediction: Mask | None, labels: Labels) -> list[np.ndarray]:
    """One sample as pictures of one size, (h, w, 3) uint8: image, truth, prediction, errors; without a prediction
    image, truth, and the truth laid over the gray image, where it should fit.

    `image` is (C, H, W), `truth` and `prediction` are (H, W) class indices; IGNORE_INDEX in the truth is gray, and
    never an error. Raises ValueError when they differ in size.
    """
    shapes = {tuple(image.shape[-2:]), *(tuple(mask.shape) for mask in (truth, prediction) if mask is not None)}
    if len(shapes) > 1:
        raise ValueError(f"sizes differ: {shapes}")
    step = -(-max(image.shape[-2:]) // PANEL)
    photo, true = to_rgb(image[:, ::step, ::step]), _array(truth)[::step, ::step].astype(np.int64)
    counted = true != IGNORE_INDEX
    # Stretched before it is dimmed, or a faint micrograph would be black.
    gray = _stretch(photo.mean(axis=-1, keepdims=True))
    colored = np.where(counted[..., None], labels.palette[np.where(counted, true, 0)], np.array(IGNORED, np.uint8))
    if prediction is None:
        return [photo, colored, (0.5 * gray + 0.5 * colored).astype(np.uint8)]
    predicted = _array(prediction)[::step, ::step].astype(np.int64)
    # Errors are not in the predicted class's colour: that one stands right beside, and a dull one would not show.
    errors = np.repeat((gray * 0.4 + 16).astype(np.uint8), 3, axis=-1)
    errors[counted & (true != predicted)] = WRONG
    if labels.task == "binary":
        errors[counted & (true > predicted)] = MISSED
    return [photo, colored, labels.palette[predicted], errors]


def overlay(image: Tensor, mask: Mask, labels: Labels) -> np.ndarray:
    """An image (C, H, W) with its mask (H, W) laid over, (H, W, 3) uint8: what is not background in its class's colour,
    with an outline, so that the image's own colours do not hide it."""
    rgb, index = to_rgb(image).astype(np.float32), _array(mask).astype(np.int64)
    share = np.where(index == labels.background, 0, np.where(find_boundaries(index), 1, 0.4))[..., None]
    return (rgb * (1 - share) + labels.palette[index] * share).astype(np.uint8)


def sample_grid(
    images: Sequence[Tensor],
    truths: Sequence[Mask],
    predictions: Sequence[Mask] | None,
    labels: Labels,
    names: Sequence[str],
    title: str = "",
    scores: Sequence[float] | None = None,
) -> Image.Image:
    """Samples as rows of `panels`, with a legend. Each list has one entry a sample; samples may differ in size.
    `scores` are their mIoU, NaN is shown as "-". Raises ValueError for no samples, or lists of different lengths."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    if not images:
        raise ValueError("a contact sheet needs at least one sample")
    rows = [
        panels(*each, labels) for each in zip(images, truths, predictions or repeat(None, len(images)), strict=True)
    ]
    shown = [f"mIoU {score:.2f}".replace("nan", "-") for score in scores or ()] or [""] * len(rows)
    headings = ["Image", "Truth", *(["Truth over image"] if predictions is None else ["Prediction", "Errors"])]
    legend = _legend([*truths, *(predictions or [])], labels, errors=predictions is not None)

    # Sizes in inches: panels are at most 3 x 3; a name stands above each row.
    heights = [3 * min(1.0, max(0.1, row[0].shape[0] / row[0].shape[1])) for row in rows]
    columns, name_line, entries = len(headings), 0.3, 2 * len(headings) - 2  # of the legend, a line
    top, bottom = 0.9 if title else 0.6, 0.3 + 0.22 * math.ceil(len(legend) / entries)
    width, height = 3.1 * columns, top + sum(heights) + name_line * (len(rows) - 1) + bottom
    places = {"left": 0.1 / width, "right": 1 - 0.1 / width, "top": 1 - top / height, "bottom": bottom / height}
    places |= {"wspace": 0.03, "hspace": name_line * len(rows) / sum(heights)}
    figure = Figure((width, height), dpi=110, facecolor="white", layout="none")  # type: ignore[arg-type]  # it is one
    figure.text(0.1 / width, 1 - 0.3 / height, title, size=13, weight="bold", color=INK, parse_math=False)
    grid = figure.subplots(len(rows), columns, squeeze=False, height_ratios=heights, gridspec_kw=places)
    for axes, row, name, score in zip(grid, rows, names, shown, strict=True):
        for each, panel in zip(axes, row, strict=True):
            each.imshow(panel, interpolation="nearest")  # masks must never blend two classes
            each.axis("off")
        shown_name = readable(name)[-60:]  # names differ at their ends
        axes[0].set_title(shown_name, loc="left", size=9, color=SOFT, parse_math=False)
        axes[-1].set_title(score, loc="right", size=9, color=INK)
    for each, heading in zip(grid[0], headings, strict=True):
        each.annotate(heading, (0, 1), (0, 20), "axes fraction", "offset points", weight="bold", color=INK)
    for text in figure.legend(handles=legend, loc="lower left", ncols=entries, frameon=False).get_texts():
        text.set_parse_math(False)
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return Image.fromarray(np.asarray(canvas.buffer_rgba())[..., :3])


def _legend(masks: list[Mask], labels: Labels, errors: bool) -> list["Patch"]:
    from matplotlib.patches import Patch

    shown = set().union(*(np.unique(_array(mask)).tolist() for mask in masks))
    listed = [i for i in range(labels.num_classes) if labels.num_classes <= LEGEND_LIMIT or i in shown]
    entries = [(labels.names[i], labels.palette[i]) for i in listed]
    entries += [("ignored", IGNORED)] if IGNORE_INDEX in shown else []
    if errors:
        found, missed = (f"{what} {labels.names[-1]}" for what in ("false", "missed"))  # binary: of the foreground
        entries += [(found, WRONG), (missed, MISSED)] if labels.task == "binary" else [("wrong class", WRONG)]
    return [Patch(color=np.divide(color, 255), label=name[:24]) for name, color in entries]


def plot(width: float, height: float) -> tuple["Figure", "Axes"]:
    """An empty plot, in inches, in the one style of them all."""
    from matplotlib.figure import Figure

    figure = Figure((width, height), dpi=144, facecolor="white")
    axes = figure.subplots()
    axes.tick_params(length=0, labelcolor=INK)
    axes.spines[:].set_visible(False)
    axes.grid(color="#ECEDEF")
    axes.set_axisbelow(True)
    return figure, axes


def confusion_figure(matrix: Tensor | np.ndarray, labels: Labels) -> "Figure":
    """A confusion matrix, (K, K) counts, rows true, columns predicted: what share of each true class was predicted as
    what. A class that does not occur is grayed out. Up to 20 classes have percentages in their cells. Raises ValueError
    when the matrix does not fit the labels."""
    from matplotlib.colors import PowerNorm

    counts, count = _array(matrix).astype(np.float64), labels.num_classes
    if counts.shape != (count, count):
        raise ValueError(f"a confusion matrix of {count} classes is {count}x{count}, not {counts.shape}")
    union = counts.sum(0) + counts.sum(1) - counts.diagonal()
    with np.errstate(invalid="ignore"):  # 0 / 0 is NaN, which is what absent means
        iou, shares = counts.diagonal() / union, 100 * counts / counts.sum(1, keepdims=True)

    cell, font = (1.0, 10) if count <= 4 else (0.44, 9) if count <= 20 else (0.15, 7)
    figure, axes = plot(1.5 + cell * count, 1.5 + cell * count)
    axes.set_facecolor("#E9EAEC")  # shines through where there is no share
    # Rare confusions are what one looks for: the square root keeps them from fading into white.
    axes.imshow(shares, cmap="Blues", norm=PowerNorm(0.5, 0, 100), interpolation="nearest")
    axes.grid(visible=False)
    axes.set_xticks(range(count), labels.names, fontsize=font, rotation=90 if count > 4 else 0, parse_math=False)
    axes.set_yticks(range(count), labels.names, fontsize=font, parse_math=False)
    axes.set_xlabel("predicted", color=SOFT)
    axes.set_ylabel("true", color=SOFT)
    for (row, column), share in np.ndenumerate(shares if count <= 20 else np.empty((0, 0))):
        text = f"{share:.{1 if count <= 4 else 0}f}"
        if float(text) > 0:  # NaN and what rounds to nothing stay empty
            axes.text(column, row, text, ha="center", va="center", fontsize=font, color="w" if share > 35 else INK)
    title = f"mIoU {iou[union > 0].mean():.3f}  ·  % of the true class" if union.any() else "No pixels counted"
    axes.set_title(title, loc="left", fontsize=font + 2, weight="bold", color=INK)
    return figure


def table(title: str, first: str, *others: str) -> Table:
    """A table for the terminal, its figures aligned."""
    columns = [Column(heading, justify="right", overflow="fold") for heading in others]
    return Table(Column(first, no_wrap=True), *columns, title=Text(title), title_justify="left")


def evenly(length: int, most: int) -> list[int]:
    """Evenly spaced indices of a list, at most so many."""
    return np.linspace(0, length - 1, min(most, length)).round().astype(int).tolist()


def iou_table(metrics: dict[str, float], labels: Labels, split: str, pixels: list[int] | None = None) -> Table:
    """The figures of a split, class by class, for the terminal.

    `metrics` has the flat keys that are logged; a missing one (a binary task's background) is shown as "-", an IoU of
    NaN as "absent". `pixels` of each class in the truth are shown as shares; None leaves their column out.
    """
    headings = ["IoU", "Dice", "prec.", "recall", *(["pixels"] if pixels is not None else [])]
    shown = table(f"{split}: IoU by class", "class", *headings)
    for index, (name, color) in enumerate(zip(labels.names, labels.colors, strict=True)):
        iou, *others = (metrics.get(f"{split}/{figure}/{name}") for figure in ("iou", "dice", "precision", "recall"))
        share = [] if pixels is None else [f"{pixels[index] / max(1, sum(pixels)):.2%}"]
        bar = Bar(1, 0, 0 if iou is None or math.isnan(iou) else iou, width=10, color="cyan")
        cells = (_number(value, "-") for value in others)
        shown.add_row(Text.assemble(("■ ", color), name), _number(iou, "absent"), *cells, *share, bar)
    shown.add_section()
    for key, name in WHOLES.items():
        if f"{split}/{key}" in metrics:
            shown.add_row(Text(name, "bold"), _number(metrics[f"{split}/{key}"], "absent"))
    return shown


def save_png(picture: "Image.Image | Figure", path: Path, **options: Any) -> None:
    """Save a picture, replacing what is there."""
    with atomic_write(path) as aside:
        if isinstance(picture, Image.Image):
            picture.save(aside, format="png", **options)
        else:
            picture.savefig(aside, format="png", bbox_inches="tight")


def _array(values: Mask) -> np.ndarray:
    return values.detach().cpu().numpy() if isinstance(values, Tensor) else np.asarray(values)


def _stretch(band: np.ndarray) -> np.ndarray:
    finite = band[np.isfinite(band)].astype(np.float32)
    low, high = np.percentile(finite, (1, 99)) if finite.size else (0, 1)
    if low == high and finite.size:  # what differs is less than 1 % of the pixels, but all there is to see
        low, high = finite.min(), finite.max()
    stretched = (np.nan_to_num(band.astype(np.float32), nan=low) - low) / (high - low or 1)
    return np.round(stretched.clip(0, 1) * 255).astype(np.uint8)


def _number(value: float | None, undefined: str) -> str:
    return "-" if value is None else undefined if math.isnan(value) else f"{value:.4f}"
