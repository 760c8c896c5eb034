"""compare.py: runs side by side, from the files in their folders alone, with what chance could have done."""

import csv
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import yaml
from rich.console import Console
from rich.table import Table
from rich.text import Text

from segmentation.errors import InputError
from segmentation.inference.bootstrap import Estimate, bootstrap, intervals, iou
from segmentation.training.callbacks import in_millions
from segmentation.training.entry import JobParser, file_name, refuse_existing, start_job
from segmentation.training.run_folder import RUNS
from segmentation.visualize import SOFT, plot, save_png, table

if TYPE_CHECKING:
    from matplotlib.figure import Figure

#: Of a config, what says nothing about the result.
SILENT = ("name", "wandb", "pictures")
#: Keys of summary.json, and how they are named and shown.
COSTS: dict[str, tuple[str, Callable[[Any], str]]] = {
    "parameters": ("parameters", in_millions),
    "images_per_second": ("images per second", "{:.1f}".format),
    "minutes": ("minutes", "{:.1f}".format),
    "epoch": ("best epoch", lambda value: f"{value + 1}"),  # the tested checkpoint's
}
Intervals = dict[str, dict[str, Estimate]]  # run -> class -> its IoU, or a difference of it


@dataclass
class Run:
    """What a run's folder says."""

    folder: Path
    summary: dict[str, Any]
    config: dict[str, Any]  # flat
    images: list[str]
    classes: list[str]
    counts: np.ndarray  # (images, 3, K) true positives, false positives, false negatives

    @property
    def true_pixels(self) -> np.ndarray:
        """(images, K)."""
        return self.counts[:, 0] + self.counts[:, 2]


def compare(args: list[str] | None = None) -> dict[str, Any]:
    """Tables and a plot of two runs or more; what they show is returned. Raises InputError if one is unfinished, or if
    they were not tested on the same images and classes."""
    start_job()
    options = _parser().parse_args(args)
    refuse_existing([options.output], options.overwrite)
    runs = _named([read_run(text) for text in options.runs])
    _check_same(runs)
    first, *others = runs
    rows = [*runs[first].classes, "mIoU"]
    drawn = dict(zip(runs, bootstrap([run.counts for run in runs.values()]), strict=True))
    whole = {name: iou(run.counts.sum(axis=0)) for name, run in runs.items()}
    values = {name: intervals(rows, whole[name], drawn[name]) for name in runs}
    differences = {name: intervals(rows, whole[name] - whole[first], drawn[name] - drawn[first]) for name in others}
    changed = config_differences(runs)
    for shown in _tables(runs, values, differences, changed):
        Console().print(shown, end="\n\n")
    save_png(comparison_figure(values), options.output)
    print(f"plot       {options.output}")
    return {"iou": values, "difference": differences, "config": changed}


def _parser() -> JobParser:
    parser = JobParser("compare")
    add = parser.add_argument
    add("runs", metavar="RUN", nargs="+", help="a run's folder, or its name below runs/")
    text = "the plot (default: comparison.png)"
    add("--output", metavar="FILE.png", type=file_name, default=Path("comparison.png"), help=text)
    add("--overwrite", action="store_true", help="replace it")
    return parser


def read_run(text: str) -> Run:
    """A run from its folder. Raises InputError if it is none, or the run is not finished."""
    folder = next((path for path in (Path(text), RUNS / text) if (path / "config.yaml").is_file()), None)
    if folder is None:
        raise InputError(f"{text}: is no run's folder (it would hold a config.yaml). Runs are in {RUNS}/")
    try:
        summary = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
        images, classes, counts = read_counts(folder / "per_image.csv")
        config = yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8"))
        if not (isinstance(summary, dict) and isinstance(config, dict) and images):
            raise ValueError("nothing is in it")
    except FileNotFoundError as error:
        raise InputError(f"{error.filename}: is missing, so the run is not finished: train.py --resume") from error
    except (ValueError, KeyError, yaml.YAMLError) as error:
        raise InputError(f"{folder}: its summary.json, per_image.csv or config.yaml is damaged ({error})") from error
    return Run(folder, summary, _flat(config), images, classes, counts)


def read_counts(path: Path) -> tuple[list[str], list[str], np.ndarray]:
    """Names of the images and classes of a `per_image.csv`, and its counts (images, 3, K)."""
    with path.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    images, classes = (list(dict.fromkeys(row[key] for row in rows)) for key in ("name", "class"))
    counts = np.array([[int(row[key]) for key in ("tp", "fp", "fn")] for row in rows], dtype=np.int64)
    return images, classes, counts.reshape(len(images), len(classes), 3).transpose(0, 2, 1)


def _named(runs: list[Run]) -> dict[str, Run]:
    """The runs by name, or by folder where names are alike."""
    alike = len({run.folder.name for run in runs}) < len(runs)
    named = {str(run.folder) if alike else run.folder.name: run for run in runs}
    if len(named) < len(runs):
        raise InputError(f"give each run once: {', '.join(str(run.folder) for run in runs)}")
    return named


def _flat(config: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(config, dict) or not config:
        return {prefix: config}
    return {k: v for key, value in config.items() for k, v in _flat(value, f"{prefix}.{key}".strip(".")).items()}


def _check_same(runs: dict[str, Run]) -> None:
    (first, one), *others = runs.items()
    for name, other in others:
        if one.classes != other.classes or one.images != other.images:
            odd = sorted({*one.classes, *one.images} ^ {*other.classes, *other.images}) or ["nothing but their order"]
            raise InputError(f"{first} and {name} were tested on other images or classes; they differ by {odd[0]}")
        differ = (one.true_pixels != other.true_pixels).any(axis=1)
        if differ.any():
            image = one.images[int(differ.argmax())]
            raise InputError(f"{first} and {name} were tested on other masks of {image}, or of another size")


def config_differences(runs: dict[str, Run]) -> dict[str, dict[str, Any]]:
    """Options that the runs do not share: option -> run -> value."""
    keys = dict.fromkeys(key for run in runs.values() for key in run.config if key.split(".")[0] not in SILENT)
    given = {key: {name: run.config.get(key) for name, run in runs.items()} for key in keys}
    return {key: each for key, each in given.items() if len(set(map(repr, each.values()))) > 1}


def _tables(
    runs: dict[str, Run], values: Intervals, differences: Intervals, changed: dict[str, dict[str, Any]]
) -> list[Table]:
    first, one = next(iter(runs.items()))
    split = f"{one.summary.get('split', 'test')}, {len(one.images):,} images"
    ious = table(f"IoU and its 95 % interval ({split})", "class", *runs)
    paired = table(f"difference to {first}, bold where sure", "class", *differences)
    for row in (*one.classes, "mIoU"):
        ious.add_row(row, *(f"{each[row]}" for each in values.values()), end_section=row == one.classes[-1])
        cells = [Text(f"{each[row]:+}", "bold" if each[row].sure else "dim") for each in differences.values()]
        paired.add_row(row, *cells, end_section=row == one.classes[-1])
    costs = table("cost", "", *runs)
    for key, (name, show) in COSTS.items():
        figures = (run.summary.get(key) for run in runs.values())
        costs.add_row(name, *("-" if value is None else show(value) for value in figures))
    options = table("config, where it differs", "option", *runs)
    for key, given in changed.items():
        options.add_row(key.replace("init_args.", ""), *(_short(key, value) for value in given.values()))
    return [ious, *([paired] if differences else []), costs, *([options] if changed else [])]


def _short(key: str, value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value)
    text = text.rpartition(".")[2] if key.endswith("class_path") else text
    return text if len(text) <= 48 else f"{text[:47]}…"


def comparison_figure(values: Intervals) -> "Figure":
    """IoU of each class, a point and an interval a run; mIoU on top."""
    classes = list(next(iter(values.values())))
    rows = [classes[-1], *classes[:-1]]
    pitch = max(0.34, 0.13 * len(values) + 0.1)
    figure, axes = plot(7.5, 1 + pitch * len(rows))
    for number, (name, each) in enumerate(values.items()):
        ys = np.arange(len(rows)) + (number - (len(values) - 1) / 2) * 0.7 / max(len(values), 2)
        found, low, high = np.array([[each[row].value, each[row].low, each[row].high] for row in rows]).T
        axes.errorbar(found, ys, xerr=(found - low, high - found), fmt="o", markersize=5, lw=1.5, label=name)
    axes.axhline(0.5, color="#D6D8DC", lw=1)
    axes.set_yticks(range(len(rows)), rows, parse_math=False)
    axes.get_yticklabels()[0].set_fontweight("bold")
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.set_xlabel("IoU, 95 % interval of a bootstrap over images", color=SOFT)
    axes.grid(axis="y", visible=False)
    axes.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=min(len(values), 4), frameon=False)
    return figure
