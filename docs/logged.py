"""The README's picture of what a run logs, from its run folder:

python src/train.py --name logged
python docs/logged.py runs/logged docs/logged.png
"""

import csv
import sys
from pathlib import Path

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from PIL import Image

INK, SOFT = "#262B33", "#6E7278"
COLORS = ("#3B7DBD", "#E07B39", "#4C9A5F", "#B5476D", "#7A63B0", "#8A7B52")


def main(run: Path, output: Path) -> None:
    with (run / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    figure = plt.figure(figsize=(12, 6), dpi=110, layout="constrained")
    curves, pictures = figure.subfigures(2, 1, height_ratios=[1, 1.15])
    loss, miou, classes, rate = curves.subplots(1, 4)
    draw(loss, "loss", rows, {"train/loss": "train", "val/loss": "val"})
    draw(miou, "mIoU", rows, {"train/miou": "train", "val/miou": "val"})
    names = [key for key in rows[0] if key.startswith("val/iou/")]
    draw(classes, "IoU of each class, val", rows, {key: key.removeprefix("val/iou/") for key in names})
    draw(rate, "learning rate", rows, {next(key for key in rows[0] if key.startswith("lr-")): ""})
    left, right = pictures.subplots(1, 2, width_ratios=[2.2, 1])
    sheet = Image.open(sorted((run / "pictures").glob("epoch-*.png"))[-1])
    left.imshow(sheet.crop((0, 0, sheet.width, int(sheet.width * 0.345))))
    right.imshow(Image.open(run / "pictures/confusion.png"))
    for axes, title in ((left, "the same validation images, every few epochs"), (right, "confusion matrix, test")):
        axes.set_title(title, loc="left", fontsize=10, color=INK)
        axes.axis("off")
    figure.savefig(output)


def draw(axes: Axes, title: str, rows: list[dict[str, str]], keys: dict[str, str]) -> None:
    for (key, label), color in zip(keys.items(), COLORS, strict=False):
        points = [(int(row["step"]), float(row[key])) for row in rows if row.get(key)]
        axes.plot(*zip(*points, strict=True), color=color, label=label, linewidth=1.8)
    axes.set_title(title, loc="left", fontsize=10, color=INK)
    axes.set_xlabel("step", color=SOFT)
    axes.tick_params(colors=SOFT, labelsize=8)
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_ylim(bottom=0)
    if any(keys.values()):
        axes.legend(frameon=False, fontsize=8)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
