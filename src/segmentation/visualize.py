"""Figures and tables of a run. Callers save or log what these functions return."""

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

Mask = np.ndarray | Tensor
INK = "#1C1E22"
SOFT = "#6E7278"
WRONG = (255, 64, 72)  # in a binary task false positives
MISSED = (64, 184, 255)  # false negatives of a binary task
IGNORED = (226, 226, 226)
PANEL = 600  # pixels of a panel's longest side at most
LEGEND_LIMIT = 30  # with more classes, the legend lists only those in the grid
OVERALL = {  # metrics that are not of one class, and their names on the terminal
    "miou": "mIoU",
    "miou_per_image": "mIoU per image",
    "fwiou": "mIoU by frequency",
    "mean_boundary_iou": "boundary IoU",
    "pixel_accuracy": "pixel accuracy",
}


def to_rgb(image: Tensor) -> np.ndarray:
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
    finite = channel[np.isfinite(channel)]
    if not finite.size:
        return np.zeros(channel.shape, np.uint8)
    low, high = np.percentile(finite.astype(np.float32), (1, 99))
    if low == high:  # what differs is less than 1 % of the pixels, but all there is to see
        low = float(finite.min())
        high = float(finite.max())
    stretched = (np.nan_to_num(channel.astype(np.float32), nan=low) - low) / (high - low or 1)
    return np.round(stretched.clip(0, 1) * 255).astype(np.uint8)


def panels(image: Tensor, truth: Mask, prediction: Mask | None, labels: Labels) -> list[np.ndarray]:
    """Draw one sample as images of one size, (h, w, 3) uint8: image, truth, prediction, errors; without a prediction
    image, truth, truth over the gray image.

    Args:
        image: (C, H, W).
        truth: class indices (H, W). IGNORE_INDEX is gray, and never an error.
        prediction: class indices (H, W).
        labels: have the classes' colours.
    """
    masks = [truth] if prediction is None else [truth, prediction]
    if any(mask.shape != image.shape[-2:] for mask in masks):
        raise ValueError(f"sizes differ: {[image.shape, *(mask.shape for mask in masks)]}")
    step = math.ceil(max(image.shape[-2:]) / PANEL)
    photo = to_rgb(image[:, ::step, ::step])
    gray = _stretch(photo.mean(axis=-1, keepdims=True))
    true = np.asarray(truth)[::step, ::step]
    ignored = true == IGNORE_INDEX
    colored = labels.palette[np.where(ignored, 0, true)]
    colored[ignored] = IGNORED
    if prediction is None:
        return [photo, colored, (0.5 * gray + 0.5 * colored).astype(np.uint8)]
    predicted = np.asarray(prediction)[::step, ::step]
    wrong = (true != predicted) & ~ignored
    errors = np.repeat((gray * 0.4 + 16).astype(np.uint8), 3, axis=-1)
    errors[wrong] = WRONG
    if labels.task == "binary":
        errors[wrong & (true == 1)] = MISSED
    return [photo, colored, labels.palette[predicted], errors]


def overlay(image: Tensor, mask: Mask, labels: Labels) -> np.ndarray:
    """Lay a mask (H, W) over its image (C, H, W): (H, W, 3) uint8. Classes but the background are tinted and outlined,
    as the image may have their colours."""
    index = np.asarray(mask)
    opacity = np.where(find_boundaries(index), 1, 0.4)
    opacity[index == labels.background] = 0
    opacity = opacity[..., None]
    return (to_rgb(image) * (1 - opacity) + labels.palette[index] * opacity).astype(np.uint8)


def sample_grid(
    images: Sequence[Tensor],
    truths: Sequence[Mask],
    predictions: Sequence[Mask] | None,
    labels: Labels,
    names: Sequence[str],
    title: str = "",
    scores: Sequence[float] | None = None,
) -> Image.Image:
    """Draw samples as rows of `panels`, with a legend. Samples may differ in size.

    Args:
        images: one entry a sample, as are all lists.
        truths: see `panels`.
        predictions: None shows the truth over the image in their place.
        labels: names and colours for the legend.
        names: shown above the rows.
        title: shown above all.
        scores: mIoU of the samples, NaN if undefined.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    if not images:
        raise ValueError("a grid needs at least one sample")
    headings = ["Image", "Truth", "Truth over image"]
    if predictions is not None:
        headings = ["Image", "Truth", "Prediction", "Errors"]
    samples = zip(images, truths, predictions or repeat(None, len(images)), strict=True)
    rows = [panels(*sample, labels) for sample in samples]
    legend = _legend([*truths, *(predictions or [])], labels, predictions is not None)

    # Sizes in inches: panels are at most 3 x 3.
    heights = [3 * min(1.0, max(0.1, row[0].shape[0] / row[0].shape[1])) for row in rows]
    entries = 2 * len(headings) - 2  # of the legend, a line
    height = 0.9 + sum(heights) + 0.25 * len(rows) + 0.22 * math.ceil(len(legend) / entries)
    figure = Figure(
        (3.1 * len(headings), height),
        dpi=110,
        facecolor="white",
        layout="constrained",
    )
    figure.suptitle(
        title,
        x=0.01,
        ha="left",
        size=13,
        weight="bold",
        color=INK,
        parse_math=False,
    )
    grid = figure.subplots(
        len(rows),
        len(headings),
        squeeze=False,
        height_ratios=heights,
    )
    for axes, row, name in zip(grid, rows, names, strict=True):
        for cell, panel in zip(axes, row, strict=True):
            cell.imshow(panel, interpolation="nearest")  # masks must never blend two classes
            cell.axis("off")
        # Names differ at their ends.
        axes[0].set_title(
            readable(name)[-40:],
            loc="left",
            size=9,
            color=SOFT,
            parse_math=False,
        )
    for axes, score in zip(grid, scores or [math.nan] * len(rows), strict=True):
        if not math.isnan(score):
            axes[-1].set_title(
                f"mIoU {score:.2f}",
                loc="right",
                size=9,
                color=INK,
            )
    for cell, heading in zip(grid[0], headings, strict=True):
        cell.annotate(
            heading,
            (0, 1),
            (0, 20),
            "axes fraction",
            "offset points",
            weight="bold",
            color=INK,
        )
    drawn_legend = figure.legend(
        handles=legend,
        loc="outside lower left",
        ncols=entries,
        frameon=False,
    )
    for text in drawn_legend.get_texts():
        text.set_parse_math(False)
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return Image.fromarray(np.asarray(canvas.buffer_rgba())[..., :3])


def _legend(masks: list[Mask], labels: Labels, errors: bool) -> list[Any]:
    from matplotlib.patches import Patch

    present = set().union(*(np.unique(mask).tolist() for mask in masks))
    colors = {}
    for index, name in enumerate(labels.names):
        if labels.num_classes <= LEGEND_LIMIT or index in present:
            colors[name] = labels.palette[index]
    if IGNORE_INDEX in present:
        colors["ignored"] = IGNORED
    if errors and labels.task == "binary":
        colors[f"false {labels.names[1]}"] = WRONG
        colors[f"missed {labels.names[1]}"] = MISSED
    elif errors:
        colors["wrong class"] = WRONG
    return [Patch(color=np.divide(color, 255), label=name[:24]) for name, color in colors.items()]


def plot(width: float, height: float) -> tuple["Figure", "Axes"]:
    """Make an empty plot, in inches, in the style of all plots."""
    from matplotlib.figure import Figure

    figure = Figure((width, height), dpi=144, facecolor="white")
    axes = figure.subplots()
    axes.tick_params(length=0, labelcolor=INK)
    axes.spines[:].set_visible(False)
    axes.grid(color="#ECEDEF")
    axes.set_axisbelow(True)
    return figure, axes


def confusion_figure(matrix: Tensor | np.ndarray, labels: Labels) -> "Figure":
    """Plot which share of each true class (rows) was predicted as which class (columns). An absent class is gray.

    Args:
        matrix: counts of pixels, (K, K).
        labels: K classes.
    """
    from matplotlib.colors import PowerNorm

    counts = np.asarray(matrix, dtype=np.float64)
    size = labels.num_classes
    if counts.shape != (size, size):
        raise ValueError(f"a confusion matrix of {size} classes is {size}x{size}, not {counts.shape}")
    intersection = counts.diagonal()
    union = counts.sum(0) + counts.sum(1) - intersection
    with np.errstate(invalid="ignore"):  # 0 / 0 is NaN: an absent class has no share
        shares = 100 * counts / counts.sum(1, keepdims=True)

    cell = 0.6
    font = 9
    if size > 20:  # too many for percentages
        cell = 0.15
        font = 7
    figure, axes = plot(1.5 + cell * size, 1.5 + cell * size)
    axes.set_facecolor("#E9EAEC")  # shines through where there is no share
    # Rare confusions matter: the square root keeps them from fading into white.
    axes.imshow(
        shares,
        cmap="Blues",
        norm=PowerNorm(0.5, 0, 100),
        interpolation="nearest",
    )
    axes.grid(visible=False)
    axes.set_xticks(
        range(size),
        labels.names,
        fontsize=font,
        rotation=90,
        parse_math=False,
    )
    axes.set_yticks(
        range(size),
        labels.names,
        fontsize=font,
        parse_math=False,
    )
    axes.set_xlabel("predicted", color=SOFT)
    axes.set_ylabel("true", color=SOFT)
    for (row, column), share in np.ndenumerate(shares):
        if size <= 20 and share >= 0.05:  # what rounds to nothing stays empty, as does NaN
            color = "w" if share > 35 else INK
            axes.text(
                column,
                row,
                f"{share:.1f}",
                ha="center",
                va="center",
                fontsize=font,
                color=color,
            )
    title = "No pixels counted"
    if union.any():
        present = union > 0
        miou = (intersection[present] / union[present]).mean()
        title = f"mIoU {miou:.3f}  ·  % of the true class"
    axes.set_title(
        title,
        loc="left",
        fontsize=font + 2,
        weight="bold",
        color=INK,
    )
    return figure


def table(title: str, first: str, *others: str) -> Table:
    """Make an empty table for the terminal, its numbers aligned to the right."""
    columns = [Column(heading, justify="right", overflow="fold") for heading in others]
    return Table(
        Column(first, no_wrap=True),
        *columns,
        title=Text(title),
        title_justify="left",
    )


def evenly(length: int, most: int) -> list[int]:
    """Evenly spaced indices of a list, at most so many."""
    return np.linspace(0, length - 1, min(most, length)).round().astype(int).tolist()


def iou_table(metrics: dict[str, float], labels: Labels, split: str, pixels: list[int]) -> Table:
    """Make the table of a split's metrics, class by class, for the terminal.

    Args:
        metrics: by their logged keys, without the split. An undefined one is shown as "-", an IoU of NaN as "absent".
        labels: the classes.
        split: for the title.
        pixels: of each class in the truth, shown as shares.
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
    for index, name in enumerate(labels.names):
        iou = metrics.get(f"iou/{name}", 0)
        cells = [_number(metrics, f"{metric}/{name}") for metric in ("iou", "dice", "precision", "recall")]
        if math.isnan(iou):
            cells[0] = "absent"
        shown.add_row(
            Text.assemble(("■ ", labels.colors[index]), name),
            *cells,
            f"{pixels[index] / max(1, sum(pixels)):.2%}",
            Bar(1, 0, np.nan_to_num(iou), width=10, color="cyan"),
        )
    shown.add_section()
    for key, name in OVERALL.items():
        if key in metrics:
            shown.add_row(Text(name, "bold"), _number(metrics, key))
    return shown


def _number(metrics: dict[str, float], key: str) -> str:
    return f"{metrics.get(key, math.nan):.4f}".replace("nan", "-")


def save_png(picture: "Image.Image | Figure", path: Path, **options: Any) -> None:
    """Save a picture, replacing what is there."""
    with atomic_write(path) as aside:
        if isinstance(picture, Image.Image):
            picture.save(aside, format="png", **options)
        else:
            picture.savefig(aside, format="png", bbox_inches="tight")
