"""The README's pictures, from run folders, which their checkpoints' data must lie where it lay:

python docs/pictures.py predictions docs/predictions.png runs/first:0,2
python docs/pictures.py predictions docs/predictions_real.png "runs/one:3,7:384x288:A title" runs/two:0:384x288
python docs/pictures.py logged docs/logged.png runs/first

docs/report.png is the head of a page, by any browser without a window:

python src/eval.py weights/nuclei-unet3plus --output nuclei.json
chromium --headless=new --hide-scrollbars --window-size=1120,935 --screenshot=docs/report.png $PWD/nuclei_report.html

The others predict images of the tested split, the first two those of these numbers, whole or cut from their middle,
width by height; mIoU is that of what is shown. The plot of docs/levels.png is prune.py's.
"""

import argparse
import csv
import sys
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import torch
from matplotlib.axes import Axes
from PIL import Image

sys.path.insert(0, str(Path(__file__).parents[1] / "src"))
from segmentation.inference.source import open_trained
from segmentation.metrics import confusion_counts, mean_iou
from segmentation.module import SegmentationModule
from segmentation.training.trainer import has_bf16
from segmentation.visualize import sample_grid

INK, SOFT = "#262B33", "#6E7278"
TRAIN_VAL = ("#3B7DBD", "#E07B39")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("predictions", "logged"))
    parser.add_argument("output", type=Path)
    parser.add_argument("runs", nargs="+", metavar="RUN")
    args = parser.parse_args()
    if args.what == "predictions":
        stacked([grid(*run.split(":", 3)) for run in args.runs]).save(args.output, optimize=True)
    else:
        logged(Path(args.runs[0])).savefig(args.output, dpi=110, bbox_inches="tight")


def grid(run: str, numbers: str, size: str = "", title: str = "") -> Image.Image:
    """A grid of some images of a run's tested split."""
    checkpoint = f"{run}/checkpoints/best.ckpt"
    module, data, *_ = open_trained("eval", argparse.Namespace(checkpoint=checkpoint, data=None), [])
    samples = []
    for index in map(int, numbers.split(",")):
        sample = data.dataset.load(data.test_split, index)
        with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16, enabled=has_bf16("cpu")):
            predicted = module.classify(module(sample["image"][None]))[0]
        window = middle(sample["mask"].shape, size)
        truth = sample["mask"][window]
        counts = confusion_counts(predicted[window][None], truth[None], module.labels.num_classes)
        samples.append(
            {
                "image": sample["image"][:, *window],
                "mask": truth,
                "prediction": predicted[window],
                "name": data.dataset.names(data.test_split)[index],
                "miou": float(mean_iou(counts)),
            }
        )
    return sample_grid(samples, module.labels, title)


def middle(shape: tuple[int, ...], size: str) -> tuple[slice, slice]:
    """Rows and columns of a window of `size`, width x height, in the middle of an image; all of it for no size."""
    width, height = map(int, size.split("x")) if size else (shape[1], shape[0])
    top, left = max(0, (shape[0] - height) // 2), max(0, (shape[1] - width) // 2)
    return slice(top, top + height), slice(left, left + width)


def stacked(grids: list[Image.Image]) -> Image.Image:
    whole = Image.new("RGB", (max(one.width for one in grids), sum(one.height for one in grids)), "white")
    top = 0
    for one in grids:
        whole.paste(one, (0, top))
        top += one.height
    return whole


def logged(run: Path) -> plt.Figure:
    """What a run logs: its curves, a grid of tested images, its confusion matrix."""
    with (run / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    labels = SegmentationModule.load_from_checkpoint(run / "checkpoints/best.ckpt").labels
    images = np.asarray(grid(str(run), "0,25", title="test/images"))
    matrix = plt.imread(run / "pictures/confusion.png")
    ratios = [picture.shape[1] / picture.shape[0] for picture in (images, matrix)]
    width = 13
    figure = plt.figure(figsize=(width, 2.7 + width / sum(ratios)), layout="constrained")
    curves, pictures = figure.subfigures(2, 1, height_ratios=[2.7, width / sum(ratios)])
    loss, miou, classes, rate = curves.subplots(1, 4)
    draw(loss, "train/loss, val/loss", rows, {"train/loss": "train", "val/loss": "val"}, TRAIN_VAL)
    draw(miou, "train/miou, val/miou", rows, {"train/miou": "train", "val/miou": "val"}, TRAIN_VAL)
    shown = [labels.names[index] for index in labels.reported]
    colors = [labels.colors[index] for index in labels.reported]
    draw(classes, "val/iou/<class>", rows, {f"val/iou/{name}": name for name in shown}, colors)
    key = next(key for key in rows[0] if key.startswith("lr-"))
    draw(rate, key, rows, {key: ""}, TRAIN_VAL)
    left, right = pictures.subplots(1, 2, width_ratios=ratios)
    left.imshow(images)
    right.imshow(matrix)
    for axes in (left, right):
        axes.axis("off")
    return figure


def draw(axes: Axes, title: str, rows: list[dict[str, str]], keys: dict[str, str], colors: tuple | list) -> None:
    for (key, label), color in zip(keys.items(), colors, strict=False):
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
    main()
