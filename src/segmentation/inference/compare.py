"""compare.py: finished runs side by side, from the files in their folders."""

import csv
import json
from dataclasses import astuple, dataclass
from difflib import unified_diff
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from rich.console import Console

from segmentation.errors import InputError
from segmentation.inference.bootstrap import Estimate, bootstrap, intervals, iou
from segmentation.training.job import JobParser, file_name, refuse_existing, start_job
from segmentation.training.run_folder import RUNS
from segmentation.visualize import SOFT, plot, save_png, table

if TYPE_CHECKING:
    from matplotlib.figure import Figure

#: Keys of summary.json to show beside each other.
COSTS = ("parameters", "images_per_second", "minutes", "epoch")


@dataclass
class Run:
    """What a run's folder holds."""

    costs: dict[str, Any]
    config: list[str]  # lines
    images: list[str]
    classes: list[str]
    counts: np.ndarray  # (images, 3, K) true positives, false positives, false negatives

    def truth(self) -> dict[str, Any]:
        """What two runs must have in common to be compared: classes, and their true pixels in each image."""
        pixels = self.counts[:, 0] + self.counts[:, 2]
        return {"the classes": self.classes, **dict(zip(self.images, pixels.tolist(), strict=True))}


def compare(args: list[str] | None = None) -> dict[str, Any]:
    """Print tables of the runs and the differences of their configs, and save a plot; return IoUs and differences.

    Raises:
        InputError: a run is not finished, or runs were tested on different images, classes or masks.
    """
    start_job()
    parser = JobParser("compare")
    parser.add_argument("runs", metavar="RUN", nargs="+", help="a run's folder, or its name below runs/")
    parser.add_argument(
        "--output",
        metavar="FILE.png",
        type=file_name,
        default=Path("comparison.png"),
        help="the plot (default: comparison.png)",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace it")
    options = parser.parse_args(args)
    refuse_existing([options.output], options.overwrite)

    runs = {str(Path(text)): read_run(text) for text in options.runs}
    first, *others = runs
    for other in others:
        _check_same(first, other, runs)
    rows = [*runs[first].classes, "mIoU"]
    values = [iou(run.counts.sum(axis=0)) for run in runs.values()]
    drawn = bootstrap([run.counts for run in runs.values()])
    ious = {}
    differences = {}
    for name, value, resampled in zip(runs, values, drawn, strict=True):
        ious[name] = intervals(rows, value, resampled)
        if name != first:
            differences[name] = intervals(rows, value - values[0], resampled - drawn[0])

    _print_table(f"IoU and its 95 % interval, {len(runs[first].images):,} images", ious)
    if differences:
        _print_table(f"difference to {first}", differences)
    _print_table("cost", {name: run.costs for name, run in runs.items()})
    for other in others:
        print("\n".join(unified_diff(runs[first].config, runs[other].config, first, other, lineterm="")))
    save_png(comparison_figure(ious), options.output)
    print(f"plot       {options.output}")
    return {"iou": ious, "difference": differences}


def read_run(text: str) -> Run:
    """Read a run's folder, given as a path or a name below runs/. Raises InputError if the run is not finished."""
    folder = Path(text)
    if not (folder / "config.yaml").is_file():
        folder = RUNS / text
    if not (folder / "config.yaml").is_file():
        raise InputError(f"{text}: is no run's folder (it would hold a config.yaml). Runs are in {RUNS}/")
    try:
        summary = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
        config = (folder / "config.yaml").read_text(encoding="utf-8").splitlines()
        images, classes, counts = read_counts(folder / "per_image.csv")
        costs = {key: summary.get(key) for key in COSTS}
        return Run(costs, config, images, classes, counts)
    except FileNotFoundError as error:
        raise InputError(f"{error.filename}: is missing, the run is not finished: train.py --resume") from error
    except (AttributeError, LookupError, ValueError) as error:
        raise InputError(f"{folder}: its summary.json or per_image.csv is damaged ({error})") from error


def read_counts(path: Path) -> tuple[list[str], list[str], np.ndarray]:
    """Names of the images and classes of a `per_image.csv`, and its counts (images, 3, K)."""
    with path.open(newline="", encoding="utf-8") as file:
        _, *rows = csv.reader(file)
    table = np.array(rows)
    images = list(dict.fromkeys(table[:, 0].tolist()))
    classes = list(dict.fromkeys(table[:, 1].tolist()))
    counts = table[:, 2:].astype(np.int64).reshape(len(images), len(classes), 3)
    return images, classes, counts.transpose(0, 2, 1)


def comparison_figure(ious: dict[str, dict[str, Estimate]]) -> "Figure":
    """IoU of each class and mIoU, a point and an interval for each run."""
    rows = list(next(iter(ious.values())))
    figure, axes = plot(7.5, 1 + (0.25 + 0.13 * len(ious)) * len(rows))
    for number, (name, each) in enumerate(ious.items()):
        value, low, high = np.array([astuple(estimate) for estimate in each.values()]).T
        y = np.arange(len(rows)) + 0.6 * (number + 0.5) / len(ious) - 0.3
        axes.errorbar(value, y, xerr=(value - low, high - value), fmt="o", markersize=5, label=name)
    axes.set_yticks(range(len(rows)), rows, parse_math=False)
    axes.invert_yaxis()
    axes.set_xlabel("IoU, 95 % interval of a bootstrap over images", color=SOFT)
    axes.grid(axis="y", visible=False)
    axes.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=4, frameon=False)
    return figure


def _check_same(first: str, other: str, runs: dict[str, Run]) -> None:
    one = runs[first].truth()
    two = runs[other].truth()
    different = [name for name in one | two if one.get(name) != two.get(name)]
    if different or list(one) != list(two):
        raise InputError(f"{first} and {other} were tested on different images, classes or masks: {different[:3]}")


def _print_table(title: str, columns: dict[str, dict[str, Any]]) -> None:
    shown = table(title, "", *columns)
    for row in next(iter(columns.values())):
        shown.add_row(row, *[_cell(column[row]) for column in columns.values()])
    Console(markup=False).print(shown, end="\n\n")


def _cell(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else f"{value}"
