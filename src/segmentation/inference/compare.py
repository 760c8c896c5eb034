"""compare.py: finished runs side by side, from the files in their folders."""

import csv
import json
from argparse import Namespace
from dataclasses import astuple, dataclass
from difflib import unified_diff
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from rich.console import Console

from segmentation.errors import InputError, plural
from segmentation.inference.bootstrap import Estimate, bootstrap, intervals, iou
from segmentation.training.entry import JobParser, file_name, refuse_existing, start_job
from segmentation.training.run_folder import RUNS
from segmentation.visualize import plot, save_png, style, table

if TYPE_CHECKING:
    from matplotlib.figure import Figure

#: Keys of summary.json to show beside each other.
COSTS = ("parameters", "images_per_second", "minutes", "epoch")


@dataclass
class Run:
    """What a run's folder holds.

    Its config and its costs are only shown; what is compared are the counts of each tested image and class.
    """

    costs: dict  # some entries of summary.json
    config: list[str]  # lines
    images: list[str]
    classes: list[str]
    counts: np.ndarray  # (images, 3, K) true positives, false positives, false negatives

    def truth(self) -> tuple[Any, ...]:
        """What two runs must share to be compared: images, classes, true pixels of each class in each image."""
        pixels = self.counts[:, [0, 2]].sum(axis=1)  # tp + fn
        return self.images, self.classes, pixels.tolist()


def compare(args: list[str] | None = None) -> dict:
    """Print tables of the runs and the differences of their configs, and save a plot; return IoUs and differences.

    Raises:
        InputError: a run is not finished, or runs were tested on different images, classes or masks.
    """
    start_job()
    options = parse(args)
    refuse_existing([options.output] if options.output else [], options.overwrite)
    output = options.output or Path("comparison.png")

    runs = {str(Path(text)): read_run(text) for text in options.runs}
    first, *others = runs
    for other in others:
        if runs[other].truth() != runs[first].truth():
            raise InputError(
                f"{first} and {other} were not tested on the same images, classes and masks: see their per_image.csv"
            )

    rows = [*runs[first].classes, "mIoU"]
    values = [iou(run.counts.sum(axis=0)) for run in runs.values()]
    drawn = bootstrap([run.counts for run in runs.values()])
    ious = {}
    differences = {}
    for name, value, resampled in zip(runs, values, drawn, strict=True):
        ious[name] = intervals(rows, value, resampled)
        if name != first:
            differences[name] = intervals(
                rows,
                value - values[0],
                resampled - drawn[0],
            )

    print_table(f"IoU and its 95 % interval, {plural(len(runs[first].images), 'image')}", ious)
    if differences:
        print_table(f"difference to {first}", differences)
    print_table("cost", {name: run.costs for name, run in runs.items()})
    for other in others:
        changed = unified_diff(
            runs[first].config,
            runs[other].config,
            fromfile=first,
            tofile=other,
            lineterm="",
        )
        print("\n".join(changed))
    save_png(comparison_figure(ious), output)
    print(f"plot       {output}")
    return {"iou": ious, "difference": differences}


def parse(args: list[str] | None) -> Namespace:
    parser = JobParser("compare")
    parser.add_argument(
        "runs",
        metavar="RUN",
        nargs="+",
        help="a run's folder, or its name below runs/",
    )
    parser.add_argument(
        "--output",
        metavar="FILE.png",
        type=file_name,
        help="the plot (default: comparison.png, which the next call replaces)",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace it")
    return parser.parse_args(args)


def read_run(text: str) -> Run:
    """Read a run's folder, given as a path or a name below runs/.

    Raises:
        InputError: there is no such run, it is not finished, or one of its files is damaged.
    """
    folder = Path(text)
    if not (folder / "config.yaml").is_file():
        folder = RUNS / text
    try:
        config = (folder / "config.yaml").read_text(encoding="utf-8")
        summary = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
        images, classes, counts = read_counts(folder / "per_image.csv")
        return Run(
            costs={key: summary.get(key) for key in COSTS},
            config=config.splitlines(),
            images=images,
            classes=classes,
            counts=counts,
        )
    except FileNotFoundError as error:
        raise InputError(
            f"{error.filename}: is missing. Name a finished run; an unfinished one goes on with train.py --resume"
        ) from error
    except (AttributeError, LookupError, ValueError) as error:
        raise InputError(f"{folder}: its summary.json or per_image.csv is damaged ({error})") from error


def read_counts(path: Path) -> tuple[list[str], list[str], np.ndarray]:
    """Read a `per_image.csv`, which has a row for each image and class.

    Args:
        path: the file.

    Returns:
        Names of the images, names of the classes, and counts (images, 3, K) of tp, fp and fn.
    """
    with path.open(newline="", encoding="utf-8") as file:
        _, *rows = csv.reader(file)
    table = np.array(rows)
    classes = table[table[:, 0] == table[0, 0], 1].tolist()  # of the first image
    table = table.reshape(-1, len(classes), 5)
    counts = table[..., 2:].astype(np.int64)
    return table[:, 0, 0].tolist(), classes, counts.transpose(0, 2, 1)


@style()
def comparison_figure(ious: dict[str, dict[str, Estimate]]) -> "Figure":
    """Plot IoU of each class and mIoU: one row per class, in it a point and an interval for each run.

    Args:
        ious: of each run, by its name: of each class, by its name, and last of `mIoU`.
    """
    rows = list(next(iter(ious.values())))
    row_height = 0.25 + 0.13 * len(ious)
    figure, axes = plot(7.5, 1 + row_height * len(rows))
    shifts = np.linspace(-0.2, 0.2, len(ious))  # of the runs' points within a row
    for shift, (name, each) in zip(shifts, ious.items(), strict=True):
        value, low, high = np.transpose([astuple(estimate) for estimate in each.values()])
        axes.errorbar(
            value,
            np.arange(len(rows)) + shift,
            xerr=(value - low, high - value),
            fmt="o",
            markersize=5,
            label=name,
        )
    axes.set_yticks(range(len(rows)), rows)
    axes.invert_yaxis()
    axes.set_xlabel("IoU, 95 % interval of a bootstrap over images")
    axes.grid(axis="y", visible=False)
    axes.legend(
        loc="lower left",
        bbox_to_anchor=(0, 1),
        ncols=4,
        frameon=False,
    )
    return figure


def print_table(title: str, columns: dict[str, dict]) -> None:
    """Print a table.

    Args:
        title: above it.
        columns: by their headings: texts and numbers, by the headings of the rows.
    """
    shown = table(title, "", *columns)
    for row in next(iter(columns.values())):
        values = [column[row] for column in columns.values()]
        shown.add_row(row, *(f"{value:.4g}" if isinstance(value, float) else f"{value}" for value in values))
    Console(markup=False).print(shown, end="\n\n")
