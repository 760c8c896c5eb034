"""compare.py: runs side by side, from the files in their folders alone, with what chance could have done."""

import csv
import json
import os
from argparse import Namespace
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import yaml
from rich.console import Console
from rich.table import Column, Table
from rich.text import Text

from segmentation.callbacks import in_millions
from segmentation.errors import InputError
from segmentation.inference.bootstrap import Estimate, bootstrap, intervals, iou
from segmentation.job import JobParser, file_name, refuse_existing, start_job
from segmentation.pictures import INK, SOFT, save_png
from segmentation.run import RUNS, WandbOptions
from segmentation.writing import write_json, written_together

if TYPE_CHECKING:
    from matplotlib.figure import Figure

EXAMPLES = """examples:
  python src/compare.py unet unetpp unet3p                 names of runs, or their folders
  python src/compare.py runs/unet runs/unetpp --output comparison --wandb

Intervals are those of a bootstrap over the tested images; differences are to the first run, on the same images."""

COLORS = ("#3B7DBD", "#E07B39", "#4C9A5F", "#B5476D", "#7A63B0", "#8A7B52", "#2E9CA6", "#6E7278")
#: Of a config, what says nothing about the result.
SILENT = ("name", "wandb", "pictures")


@dataclass
class Run:
    """What a run's folder says: its place and name, summary.json, config.yaml (flat), and counts of its tested images.

    Attributes:
        images: names of the images.
        classes: names of the classes.
        counts: (images, 3, K) true positives, false positives, false negatives.
    """

    folder: Path
    name: str
    summary: dict[str, Any]
    config: dict[str, Any]
    images: list[str]
    classes: list[str]
    counts: np.ndarray


def compare(args: list[str] | None = None) -> dict[str, Any]:
    """compare.py: tables, a plot and a JSON file of two runs or more.

    Args:
        args: the command line, by default the process's own.

    Returns:
        What the JSON file holds.

    Raises:
        InputError: a run is unfinished, or the runs were not tested on the same images and classes.
    """
    start_job()
    options = _parser().parse_args(args)
    base = options.output
    plot, figures = base.with_name(f"{base.name}.png"), base.with_name(f"{base.name}.json")
    refuse_existing([plot, figures], options.overwrite)
    runs = _named([read_run(text) for text in options.runs])
    _check_same(runs)
    rows = [*runs[0].classes, "mIoU"]
    samples = dict(zip((run.name for run in runs), bootstrap([run.counts for run in runs]), strict=True))
    whole = {run.name: iou(run.counts.sum(axis=0)) for run in runs}
    values = {name: intervals(rows, whole[name], drawn) for name, drawn in samples.items()}
    first, *others = samples
    differences = {name: intervals(rows, whole[name] - whole[first], samples[name] - samples[first]) for name in others}
    changed = config_differences(runs)
    found = {
        "split": runs[0].summary.get("split"),
        "images": len(runs[0].images),
        "iou": {name: {row: vars(one) for row, one in each.items()} for name, each in values.items()},
        "difference": {name: {row: vars(one) for row, one in each.items()} for name, each in differences.items()},
        "config": changed,
        "runs": {run.name: {key: run.summary.get(key) for key in COSTS} for run in runs},
    }
    tables = _tables(runs, values, differences, changed)
    for table in tables:
        Console().print(table)
        print()
    with written_together(plot, figures) as (plot_aside, figures_aside):
        save_png(comparison_figure(values, runs), plot_aside)
        write_json(figures_aside, found)
    print(f"plot       {plot}\nfigures    {figures}")
    if options.wandb:
        _log(runs, values, plot, options)
    return found


#: Keys of summary.json, and how they are shown.
COSTS = {
    "parameters": in_millions,
    "images_per_second": lambda value: f"{value:.1f}",
    "minutes": lambda value: f"{value:.1f}",
    "epoch": lambda value: f"{value + 1}",  # the tested checkpoint's
}


def _parser() -> JobParser:
    parser = JobParser("compare", "Compare finished runs: IoU per class with intervals, config, speed.", EXAMPLES)
    parser.add_argument("runs", metavar="RUN", nargs="+", help="a run's folder, or its name below runs/")
    parser.add_argument(
        "--output",
        metavar="BASE",
        type=file_name,
        default=Path("comparison"),
        help="BASE.png and BASE.json (default: comparison)",
    )
    parser.add_argument("--wandb", action="store_true", help="log table and plot to W&B, in the first run's project")
    parser.add_argument("--overwrite", action="store_true", help="replace these files")
    return parser


def read_run(text: str) -> Run:
    """A run from its folder.

    Raises:
        InputError: it is no run's folder, or the run is not finished.
    """
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
    return Run(folder.resolve(), folder.resolve().name, summary, _flat(config), images, classes, counts)


def read_counts(path: Path) -> tuple[list[str], list[str], np.ndarray]:
    """Names of the images and classes of a `per_image.csv`, and its counts (images, 3, K)."""
    with path.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    images, classes = (list(dict.fromkeys(row[key] for row in rows)) for key in ("name", "class"))
    counts = np.array([[int(row[key]) for key in ("tp", "fp", "fn")] for row in rows], dtype=np.int64)
    return images, classes, counts.reshape(len(images), len(classes), 3).transpose(0, 2, 1)


def _named(runs: list[Run]) -> list[Run]:
    """The runs, named by as much of their paths as tells them apart.

    Raises:
        InputError: one is given twice.
    """
    if len({run.folder for run in runs}) < len(runs):
        raise InputError(f"give each run once: {', '.join(str(run.folder) for run in runs)}")
    depth = 1
    while len({run.folder.parts[-depth:] for run in runs}) < len(runs):
        depth += 1
    return [replace(run, name="/".join(run.folder.parts[-depth:])) for run in runs]


def _flat(config: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(config, dict) or not config:
        return {prefix: config}
    return {k: v for key, value in config.items() for k, v in _flat(value, f"{prefix}.{key}".strip(".")).items()}


def _check_same(runs: list[Run]) -> None:
    first = runs[0]
    for run in runs[1:]:
        for what in ("classes", "images"):
            own, other = getattr(first, what), getattr(run, what)
            if own != other:
                odd = next(iter(set(own) ^ set(other)), "their order")
                raise InputError(
                    f"{first.name} and {run.name} were not tested on the same {what} ({len(own)} and {len(other)}; "
                    f"{odd} is not in both), so their figures cannot be compared"
                )
        true, own_true = (one.counts[:, 0] + one.counts[:, 2] for one in (run, first))
        if (true != own_true).any():
            name = first.images[int((true != own_true).any(axis=1).argmax())]
            raise InputError(f"{first.name} and {run.name} were tested on other masks of {name}, or of another size")


def config_differences(runs: list[Run]) -> dict[str, dict[str, Any]]:
    """Options that the runs do not share: option -> run -> value."""
    keys = [key for run in runs for key in run.config if key.split(".")[0] not in SILENT]
    return {
        key: {run.name: run.config.get(key) for run in runs}
        for key in dict.fromkeys(keys)
        if len({repr(run.config.get(key)) for run in runs}) > 1
    }


def _tables(runs: list[Run], values: dict, differences: dict, changed: dict) -> list[Table]:
    first, names = runs[0], [run.name for run in runs]
    split = f"{first.summary.get('split', 'test')}, {len(first.images):,} images"

    def table(title: str, *columns: str) -> Table:
        head = Column(columns[0], no_wrap=True)
        rest = [Column(column, justify="right", overflow="fold") for column in columns[1:]]
        return Table(head, *rest, title=title, title_justify="left")

    ious = table(f"IoU and its 95 % interval ({split})", "class", *names)
    for row in values[first.name]:
        if row == "mIoU":
            ious.add_section()
        ious.add_row(row, *(str(values[name][row]) for name in names))
    paired = table(f"difference to {first.name}, bold where sure", "class", *names[1:])
    for row in values[first.name]:
        if row == "mIoU":
            paired.add_section()
        cells = (differences[name][row] for name in names[1:])
        paired.add_row(row, *(Text(one.signed(), "bold" if one.sure else "dim") for one in cells))
    costs = table("cost", "", *names)
    for key, show in COSTS.items():
        found = (run.summary.get(key) for run in runs)
        name = {"epoch": "best epoch"}.get(key, key.replace("_", " "))
        costs.add_row(name, *("-" if value is None else show(value) for value in found))
    options = table("config, where it differs", "option", *names)
    for key, each in changed.items():
        options.add_row(key.replace("init_args.", ""), *(_short(key, each[name]) for name in names))
    return [ious, *([paired] if differences else []), costs, *([options] if changed else [])]


def _short(key: str, value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value)
    text = text.rpartition(".")[2] if key.endswith("class_path") else text
    return text if len(text) <= 48 else f"{text[:47]}…"


def comparison_figure(values: dict[str, dict[str, Estimate]], runs: list[Run]) -> "Figure":
    """IoU of each class, a point and an interval a run; mIoU on top."""
    from matplotlib.figure import Figure

    rows = ["mIoU", *runs[0].classes]
    pitch = max(0.34, 0.13 * len(runs) + 0.1)
    figure = Figure(figsize=(7.5, 1.3 + pitch * len(rows)), dpi=144, facecolor="white", layout="constrained")
    axes = figure.subplots()
    for number, run in enumerate(runs):
        color = COLORS[number % len(COLORS)]
        shift = (number - (len(runs) - 1) / 2) * 0.7 / max(len(runs), 2)
        there = [(place + shift, values[run.name][row]) for place, row in enumerate(rows)]
        there = [(y, one) for y, one in there if not np.isnan(one.value)]
        ys, shown = [y for y, _ in there], [one for _, one in there]
        axes.hlines(ys, [one.low for one in shown], [one.high for one in shown], color=color, lw=2, alpha=0.55)
        axes.scatter([one.value for one in shown], ys, color=color, s=26, zorder=3, label=run.name)
    axes.axhline(0.5, color="#D6D8DC", lw=1)
    axes.set_yticks(range(len(rows)), rows, parse_math=False)
    axes.get_yticklabels()[0].set_fontweight("bold")
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.set_xlabel("IoU, 95 % interval of a bootstrap over images", color=SOFT)
    axes.grid(axis="x", color="#ECEDEF")
    axes.set_axisbelow(True)
    axes.tick_params(length=0, labelcolor=INK)
    axes.spines[:].set_visible(False)
    columns = min(len(runs), 4)
    figure.legend(*axes.get_legend_handles_labels(), loc="outside upper left", ncols=columns, frameon=False)
    return figure


def _log(runs: list[Run], values: dict[str, dict[str, Estimate]], plot: Path, options: Namespace) -> None:
    """The table and the plot in a W&B run of their own."""
    import wandb

    config = runs[0].config
    mode = WandbOptions(mode=config.get("wandb.mode") or "auto").resolved_mode()
    if mode == "disabled":
        print("W&B        is disabled (wandb.mode, WANDB_MODE): nothing was logged")
        return
    os.environ.setdefault("WANDB_SILENT", "true")
    project, entity = config.get("wandb.project"), config.get("wandb.entity")
    name = f"compare {' '.join(run.name for run in runs)}"[:100]
    with wandb.init(project=project, entity=entity, name=name, job_type="compare", mode=mode, dir=".") as logged:
        rows = [[run.name, row, one.value, one.low, one.high] for run in runs for row, one in values[run.name].items()]
        table = wandb.Table(["run", "class", "iou", "low", "high"], rows)
        logged.log({"compare/iou": table, "compare/plot": wandb.Image(str(plot))})
        where = logged.url or f"offline; upload by: wandb sync {Path(logged.dir).parent}"
    print(f"W&B        {where}")
