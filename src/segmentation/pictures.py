"""The images, tables and plots a run logs. Pure functions: what they return is saved or logged by the caller."""

import math
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from rich.bar import Bar
from rich.table import Column, Table
from rich.text import Text
from skimage.segmentation import find_boundaries
from torch import Tensor

from segmentation.data.labels import IGNORE_INDEX, Labels
from segmentation.writing import written_whole

if TYPE_CHECKING:  # matplotlib is slow to import: every function that needs it imports it itself
    from matplotlib.figure import Figure

Mask = np.ndarray | Tensor
CELL, GAP, MARGIN = 300, 10, 28  # pixels of a contact sheet: longest side of a panel, between panels, around them
INK, SOFT, LINE = "#1C1E22", "#6E7278", "#D6D8DC"
WRONG, MISSED = (255, 64, 72), (64, 184, 255)  # errors; in a binary task false positives and false negatives
HATCH = np.where(np.add.outer(np.arange(CELL), np.arange(CELL))[..., None] % 8 < 2, np.uint8(168), np.uint8(226))
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


def panels(image: Tensor, truth: Mask, prediction: Mask, labels: Labels) -> list[Image.Image]:
    """One sample as four pictures of one size, the longest side CELL: image, truth, prediction, errors.

    `image` is (C, H, W), `truth` and `prediction` are (H, W) class indices; IGNORE_INDEX in the truth is hatched gray,
    and never an error. Raises ValueError when the three differ in size.
    """
    photo, (truth, prediction) = _fit(image, truth, prediction)
    counted = truth != IGNORE_INDEX
    # Stretched before it is dimmed, or a faint micrograph would be black. Errors are not in the predicted class's
    # colour: that one stands right beside, and a dull class colour would not show.
    errors = (_gray(photo) * 0.4 + 16).astype(np.uint8)
    wrong = counted & (truth != prediction)
    errors = np.where(wrong[..., None], np.array(WRONG, np.uint8), errors)
    if labels.task == "binary":
        errors[wrong & (prediction == 0)] = MISSED
    return [photo, *(Image.fromarray(rgb) for rgb in (_colored(truth, labels), labels.palette[prediction], errors))]


def truth_panels(image: Tensor, truth: Mask, labels: Labels) -> list[Image.Image]:
    """One sample as three pictures: image, truth, and the truth laid over the gray image, where it should fit."""
    photo, (truth,) = _fit(image, truth)
    colored = _colored(truth, labels)
    return [photo, Image.fromarray(colored), Image.fromarray((0.5 * _gray(photo) + 0.5 * colored).astype(np.uint8))]


def overlay(image: Tensor, mask: Mask, labels: Labels) -> np.ndarray:
    """An image (C, H, W) with its mask (H, W) laid over, (H, W, 3) uint8: what is not background in its class's colour,
    with an outline, so that the image's own colours do not hide it."""
    rgb, index = to_rgb(image).astype(np.float32), _array(mask).astype(np.int64)
    share = np.where(index == labels.background, 0, np.where(find_boundaries(index), 1, 0.4))[..., None]
    return (rgb * (1 - share) + labels.palette[index] * share).astype(np.uint8)


def _fit(image: Tensor, *masks: Mask) -> tuple[Image.Image, list[np.ndarray]]:
    """An image and its masks at one size, the longest side CELL."""
    height, width = image.shape[-2:]
    if any(mask.shape != (height, width) for mask in masks):
        raise ValueError(f"image {(height, width)}, masks {[tuple(mask.shape) for mask in masks]}: sizes differ")
    scale = CELL / max(height, width)
    size = max(1, round(width * scale)), max(1, round(height * scale))
    nearest = Image.Resampling.NEAREST  # masks must never blend two classes
    # Of a tiny image one wants to see every pixel; others look better smooth.
    photo = Image.fromarray(to_rgb(image)).resize(size, nearest if scale > 4 else None)
    pictures = [Image.fromarray(_array(mask).astype(np.int32)) for mask in masks]
    return photo, [np.asarray(picture.resize(size, nearest)) for picture in pictures]


def _gray(photo: Image.Image) -> np.ndarray:
    """(H, W, 1) uint8, over the whole range."""
    return _stretch(np.asarray(photo.convert("L")))[..., None]


def _colored(truth: np.ndarray, labels: Labels) -> np.ndarray:
    counted = truth != IGNORE_INDEX
    hatch = HATCH[: truth.shape[0], : truth.shape[1]]
    return np.where(counted[..., None], labels.palette[np.where(counted, truth, 0)], hatch)


def contact_sheet(
    images: Sequence[Tensor],
    truths: Sequence[Mask],
    predictions: Sequence[Mask] | None,
    labels: Labels,
    names: Sequence[str],
    title: str = "",
    scores: Sequence[float] | None = None,
) -> Image.Image:
    """Samples as rows of image, truth, prediction and errors, with a legend; without predictions, as rows of image,
    truth and truth laid over the image. Each list has one entry a sample, as `panels` takes them; samples may differ in
    size. `scores` are their mIoU, NaN is shown as "-". Raises ValueError for no samples, lists of different lengths, a
    mask that does not fit its image.
    """
    if not images:
        raise ValueError("a contact sheet needs at least one sample")
    if predictions is None:
        rows = [truth_panels(*sample, labels) for sample in zip(images, truths, strict=True)]
        headings = ["Image", "Truth", "Truth over image"]
    else:
        rows = [panels(*sample, labels) for sample in zip(images, truths, predictions, strict=True)]
        headings = ["Image", "Truth", "Prediction", "Errors"]
    column = max(160, *(row[0].width for row in rows))  # narrow columns would have no room for headings and names
    lefts = [MARGIN + index * (column + GAP) for index in range(len(headings))]
    width, top = lefts[-1] + column + MARGIN, MARGIN + (44 if title else 0)
    legend = _legend([*truths, *(predictions or [])], labels, width - 2 * MARGIN, errors=predictions is not None)
    height = top + 24 + sum(row[0].height + 40 for row in rows) + 18 + legend.height + MARGIN

    sheet = Image.new("RGB", (width, height), "white")
    draw, small, bold, large = ImageDraw.Draw(sheet), _font(14), _font(16, bold=True), _font(22, bold=True)
    draw.text((MARGIN, MARGIN + 20), _shorten(title, large, width - 2 * MARGIN), INK, large, anchor="ls")
    for left, heading in zip(lefts, headings, strict=True):
        draw.text((left, top + 16), heading, INK, bold, anchor="ls")
    y = top + 52  # of the panels
    shown = [f"mIoU {score:.2f}".replace("nan", "-") for score in scores or ()] or [""] * len(rows)
    for row, name, score in zip(rows, names, shown, strict=True):
        draw.text((MARGIN, y - 8), _shorten(name, small, lefts[-1] - MARGIN - 2 * GAP), SOFT, small, anchor="ls")
        draw.text((lefts[-1], y - 8), score, INK, small, anchor="ls")
        for left, panel in zip(lefts, row, strict=True):
            draw.rectangle((left - 1, y - 1, left + panel.width, y + panel.height), outline=LINE)
            sheet.paste(panel, (left, y))
        y += row[0].height + 40
    sheet.paste(legend, (MARGIN, y - 10))
    return sheet


def confusion_figure(matrix: Tensor | np.ndarray, labels: Labels) -> "Figure":
    """A confusion matrix, (K, K) counts, rows true, columns predicted: what share of each true class was predicted as
    what, and the IoU of each class. A class with neither is grayed out and named absent. Up to 20 classes have
    percentages in their cells. Raises ValueError when the matrix does not fit the labels."""
    from matplotlib.colors import PowerNorm
    from matplotlib.figure import Figure

    counts, count = _array(matrix).astype(np.float64), labels.num_classes
    if counts.shape != (count, count):
        raise ValueError(f"a confusion matrix of {count} classes is {count}x{count}, not {counts.shape}")
    union = counts.sum(0) + counts.sum(1) - counts.diagonal()
    with np.errstate(invalid="ignore"):  # 0 / 0 is NaN, which is what absent means
        iou, shares = counts.diagonal() / union, 100 * counts / counts.sum(1, keepdims=True)
    shares[:, union == 0] = np.nan

    # Sizes in inches. Axes are placed by hand: automatic layout takes seconds for 150 labels, and bends the squares.
    cell, font = (1.0, 10) if count <= 4 else (0.44, 9) if count <= 20 else (0.15, 7)
    names = [_shorten(name, _font(font), 14 * font) for name in labels.names]
    side, label = cell * count, max(_font(font).getlength(name) for name in names) / 72 + 0.1
    left, bottom, rotation = 0.4 + label, 0.45 + (0.2 if label < cell else label), 0 if label < cell else 90
    width, height = left + side + 1.4, bottom + side + 0.7
    figure = Figure(figsize=(width, height), dpi=144, facecolor="white", layout="none")  # type: ignore[arg-type]  # "none" is one of them
    axes = figure.add_axes((left / width, bottom / height, side / width, side / height))
    bars = figure.add_axes(((left + side + 0.15) / width, bottom / height, 0.7 / width, side / height))
    axes.set_facecolor("#E9EAEC")  # shines through where there is no share
    # Rare confusions are what one looks for: the square root keeps them from fading into white.
    axes.imshow(shares, cmap="Blues", norm=PowerNorm(0.5, 0, 100), interpolation="nearest")
    axes.grid(visible=False)  # whatever a user's style says
    axes.set_xticks(range(count), names, fontsize=font, rotation=rotation, parse_math=False)
    axes.set_yticks(range(count), names, fontsize=font, parse_math=False)
    axes.set_xlabel("predicted", fontsize=font + 1, color=SOFT)
    axes.set_ylabel("true", fontsize=font + 1, color=SOFT)
    for (row, column), share in np.ndenumerate(shares if count <= 20 else np.empty((0, 0))):
        text = f"{share:.{1 if count <= 4 else 0}f}"
        if float(text) > 0:  # NaN and what rounds to nothing stay empty
            axes.text(column, row, text, ha="center", va="center", fontsize=font, color="w" if share > 35 else INK)
    bars.barh(range(count), np.nan_to_num(iou), height=0.7, color="#3B7DBD")
    bars.set(xlim=(0, 1), ylim=(count - 0.5, -0.5))
    bars.axis("off")
    bars.set_title("IoU", fontsize=font + 1, loc="left", color=SOFT, pad=4)
    for index, value in enumerate(iou):
        text, x = ("absent", 0) if np.isnan(value) else (f"{value:.2f}", value + 0.06)
        bars.text(x, index, text, va="center", fontsize=font, color=INK)
    axes.tick_params(length=0, labelcolor=INK)
    axes.spines[:].set_visible(False)
    title = f"mIoU {iou[union > 0].mean():.3f}  ·  % of the true class" if union.any() else "No pixels counted"
    figure.text(0.16 / width, 1 - 0.28 / height, title, fontsize=font + 2, weight="bold", color=INK, va="center")
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
    with written_whole(path) as aside:
        (picture.save if isinstance(picture, Image.Image) else picture.savefig)(aside, format="png", **options)


def _array(values: Mask) -> np.ndarray:
    return values.detach().cpu().numpy() if isinstance(values, Tensor) else np.asarray(values)


def _stretch(band: np.ndarray) -> np.ndarray:
    finite = band[np.isfinite(band)].astype(np.float32)
    low, high = np.percentile(finite, (1, 99)) if finite.size else (0, 1)
    if low == high and finite.size:  # what differs is less than 1 % of the pixels, but all there is to see
        low, high = finite.min(), finite.max()
    stretched = (np.nan_to_num(band.astype(np.float32), nan=low) - low) / (high - low or 1)
    return np.round(stretched.clip(0, 1) * 255).astype(np.uint8)


def _legend(masks: list[Mask], labels: Labels, width: int, errors: bool) -> Image.Image:
    shown, font, swatch = set().union(*(np.unique(_array(mask)).tolist() for mask in masks)), _font(14), 14
    listed = [i for i in range(labels.num_classes) if labels.num_classes <= LEGEND_LIMIT or i in shown]
    entries = [(_shorten(labels.names[i], font, 210), labels.palette[i]) for i in listed]
    entries += [("ignored", HATCH[:swatch, :swatch])] if IGNORE_INDEX in shown else []
    if errors:
        found, missed = (f"{what} {labels.names[-1]}" for what in ("false", "missed"))  # binary: of the foreground
        entries += [(found, WRONG), (missed, MISSED)] if labels.task == "binary" else [("wrong class", WRONG)]
    pitch = math.ceil(max(font.getlength(name) for name, _ in entries)) + swatch + 30
    columns = max(1, (width + 22) // pitch)
    legend = Image.new("RGB", (width, 24 * math.ceil(len(entries) / columns)), "white")
    draw = ImageDraw.Draw(legend)
    for index, (name, color) in enumerate(entries):
        x, y = index % columns * pitch, index // columns * 24 + 5
        square = np.zeros((swatch, swatch, 3), np.uint8) + np.uint8(color)  # a colour, or the hatch
        legend.paste(Image.fromarray(square), (x, y))
        draw.rectangle((x - 1, y - 1, x + swatch, y + swatch), outline=LINE)
        draw.text((x + swatch + 8, y + swatch // 2), name, INK, font, anchor="lm")
    return legend


@cache
def _font(size: int, bold: bool = False) -> ImageFont.FreeTypeFont:
    import matplotlib  # its font file is on every machine, unlike the system's

    name = f"DejaVuSans{'-Bold' if bold else ''}.ttf"
    return ImageFont.truetype(Path(matplotlib.get_data_path(), "fonts", "ttf", name), size)


def _shorten(text: str, font: ImageFont.FreeTypeFont, width: float) -> str:
    """Cut in the middle: file names differ at their ends."""
    cuts = (f"{text[: keep // 2]}…{text[len(text) - (keep + 1) // 2 :]}" for keep in range(len(text) - 1, 1, -1))
    return next((short for short in (text, *cuts) if font.getlength(short) <= width), "…")


def _number(value: float | None, undefined: str) -> str:
    return "-" if value is None else undefined if math.isnan(value) else f"{value:.4f}"
