"""The doctor: what a data set and a machine are like, what is wrong with them, and the YAML that fixes it."""

import math
import platform
import shutil
import sys
from pathlib import Path
from typing import Any

import torch
import yaml
from jsonargparse import Namespace
from lightning.pytorch.cli import LightningArgumentParser
from rich.bar import Bar
from rich.console import Console
from rich.table import Table
from rich.text import Text

from segmentation.data import SegmentationDataModule
from segmentation.data.audit import Audit, audit, suggest_overlay
from segmentation.data.labels import ClassesMissing
from segmentation.data.statistics import SplitStatistics, available_cores
from segmentation.data.writing import write_text
from segmentation.errors import ENLARGE_SHARED_MEMORY, InputError, Problem
from segmentation.training.cli import SegmentationCLI
from segmentation.training.parser import Parser
from segmentation.training.run_folder import RUNS
from segmentation.training.trainer import has_bf16
from segmentation.training.wandb_run import WandbOptions
from segmentation.visualize import evenly, sample_grid, save_png

GIB = 2**30

USAGE = "python src/doctor.py [--config OVERLAY ...] [--output FOLDER] [--prefetch] [--any.option value]"
DESCRIPTION = (
    "Examines the data that train.py would train on with the same options, and this machine: what is there, what is "
    "wrong, and the YAML that fixes it. Exit status 2 when something would stop a run. Nothing in the data folder is "
    "written. Without classes it reads the masks and suggests some: --data.dataset FolderData --data.dataset.root DIR"
)


class DoctorCLI(SegmentationCLI):
    """train.py's command line, parsed only: nothing is built."""

    usage, description = USAGE, DESCRIPTION

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        super().add_arguments_to_parser(parser)
        parser.add_argument(
            "--output",
            type=str,
            default="doctor",
            help="folder of pictures, lists, overlay",
        )
        parser.add_argument("--prefetch", action="store_true", help="fetch the net's pretrained weights into the cache")

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        self.config = parser.parse_args(args)

    def instantiate_classes(self) -> None:
        pass


def main() -> None:
    """doctor.py: exit status 2 where something would stop a run."""
    if any(problem.stops for problem in diagnose()):
        sys.exit(2)


def diagnose(args: list[str] | None = None) -> list[Problem]:
    """Print the report, and write grids of images, the list of bad files and the suggested overlay.

    Args:
        args: the command line, by default the process's own.

    Returns:
        What is wrong. What would stop a run comes first.
    """
    config = DoctorCLI(args).config
    console = Console(highlight=False)
    console.width = max(console.width, 100)
    problems: list[Problem] = []
    try:
        module, found = _examine_data(config, problems)
        _print_data(console, module, found)
        _write(
            console,
            Path(config.output),
            config,
            module,
            found,
        )
    except InputError as error:
        problems.append(Problem(str(error), stops=True))
    facts = _examine_machine(config, problems)
    facts["encoder"] = _examine_encoder(config, problems)
    console.print(Text("machine", "bold"))
    for key, value in facts.items():
        console.print(Text(f"{key:<14} {value}"), soft_wrap=True)
    console.print()
    problems.sort(key=lambda problem: not problem.stops)
    for problem in problems:
        mark = Text("✗ stops a run  ", "bold red") if problem.stops else Text("! look at this ", "bold yellow")
        console.print(mark + Text(problem.text), soft_wrap=True)
    if not problems:
        console.print(Text("✓ nothing is wrong", "bold green"))
    return problems


def _examine_data(config: Namespace, problems: list[Problem]) -> tuple[SegmentationDataModule, Audit]:
    """Read the data. Where classes are missing, the report and the overlay are those of the data with them declared."""
    module, undeclared = build_data(config)
    problems += undeclared
    found = audit(module)
    classes = module.labels.suggest_classes(found.values)
    if classes:
        problems.append(found.problems[0])
        bad = found.bad
        config.data.dataset.init_args.classes = classes
        module, _ = build_data(config)
        found = audit(module)
        found.bad = bad
    problems += found.problems
    return module, found


def build_data(config: Namespace) -> tuple[SegmentationDataModule, list[Problem]]:
    """Build the datamodule, with the classes that its masks suggest where nobody declared any."""
    parser = Parser(allow_abbrev=False)
    parser.add_lightning_class_args(SegmentationDataModule, "data")
    given = Namespace(data=config.data)
    try:
        return parser.instantiate_classes(given).data, []
    except ClassesMissing as error:
        given.data.dataset.init_args.classes = error.suggested
        return parser.instantiate_classes(given).data, [Problem(str(error), stops=True)]
    except ValueError as error:  # a library's own checks of the user's numbers
        raise InputError(f"an option cannot be used: {' '.join(str(error).split())}") from error


def _print_data(console: Console, module: SegmentationDataModule, found: Audit) -> None:
    labels = module.labels
    splits = found.statistics_of_splits
    title = f"{module.description}: {labels.task}, {labels.num_classes} classes"
    console.print(Text(title, "bold"))
    console.print(f"{labels.channels} channels of {labels.dtype or 'any type'}")
    for split, statistics in splits.items():
        count = f"{len(statistics.records):,} images, {len(statistics.bad)} bad"
        console.print(f"{split:<6} {count}; sizes {_sizes(statistics)}; values {_range(statistics)}")
    console.print()
    shares = [f"{split} pixels" for split in splits]
    table = Table(
        "class",
        "mask value",
        *shares,
        "",
        "images",
        box=None,
        pad_edge=False,
    )
    train = splits["train"]
    images = (train.counts > 0).sum(axis=0)
    for index, name in enumerate(labels.names):
        table.add_row(
            Text.assemble(("■ ", labels.colors[index]), name),
            ", ".join(map(str, labels.values[index])),
            *(f"{statistics.shares[index]:.2%}" for statistics in splits.values()),
            Bar(
                1,
                0,
                float(train.shares[index]),
                width=24,
                color="cyan",
            ),
            f"{images[index]:,}",
        )
    if labels.ignore:
        share = train.ignored / max(1, sum(train.pixels) + train.ignored)
        table.add_row("ignored", ", ".join(map(str, labels.ignore)), f"{share:.2%} of all")
    console.print(table)
    console.print()


def _range(statistics: SplitStatistics) -> str:
    low = min((record.low for record in statistics.records), default=0)
    high = max((record.high for record in statistics.records), default=0)
    return f"{low:g} to {high:g}"


def _sizes(statistics: SplitStatistics) -> str:
    """Width x height of the smallest and the largest image."""
    sizes = sorted(set(statistics.sizes), key=math.prod)
    shown = [f"{width}x{height}" for height, width in sizes]
    return " to ".join(shown[:1] + shown[1:][-1:])


def _write(console: Console, output: Path, config: Namespace, module: SegmentationDataModule, found: Audit) -> None:
    """Write a grid of images for each split, the list of bad files, and the suggested overlay."""
    data = found.usable
    for split in filter(data.names, found.statistics_of_splits):
        names = data.names(split)
        chosen = evenly(len(names), 8)
        samples = [{**data.load(split, index), "name": names[index]} for index in chosen]
        grid = sample_grid(samples, module.labels, f"{split}: {len(chosen)} of {len(names):,}")
        save_png(grid, output / f"{split}.png")
    write_text(output / "bad_files.txt", "".join(f"{text}\n" for text in found.bad))
    console.print(f"pictures   {output}/*.png; every bad file: {output}/bad_files.txt\n")
    if found.statistics_of_splits["train"].records:
        suggested = suggest_overlay(module, config.data.dataset.as_dict(), found)
        overlay = yaml.safe_dump(
            suggested,
            sort_keys=False,
            allow_unicode=True,
            default_flow_style=None,
            width=110,
        )
        write_text(output / "overlay.yaml", overlay)
        console.print(Text(f"suggested overlay: python src/train.py --config {output}/overlay.yaml", "bold"))
        console.print(Text(overlay))


def _examine_machine(config: Namespace, problems: list[Problem]) -> dict[str, str]:
    """Facts, by name. What is wrong is added to `problems`."""
    free = shutil.disk_usage(RUNS if RUNS.is_dir() else Path()).free
    if free < GIB:
        problems.append(Problem(f"only {free / GIB:.2f} GiB of disk are free for {RUNS}/: checkpoints may not fit"))
    facts = {
        "python": f"{platform.python_version()}, torch {torch.__version__}",
        "devices": _devices(),
        "bf16": "yes" if has_bf16("auto") else "no: trains in 32-true",
        "cores": str(available_cores()),
        "disk": f"{free / GIB:,.1f} GiB free for {RUNS}/",
    }
    shared = Path("/dev/shm")
    if shared.is_dir():
        size = shutil.disk_usage(shared).total
        facts["shared memory"] = f"{size / GIB:,.1f} GiB"
        if size < GIB and config.data.num_workers != 0:
            problems.append(
                Problem(
                    f"shared memory, through which workers hand over batches, is {size / 2**20:.0f} MiB. "
                    f"{ENLARGE_SHARED_MEMORY}"
                )
            )
    try:
        facts["W&B"] = WandbOptions(**config.wandb.as_dict()).resolved_mode()
    except InputError as error:
        facts["W&B"] = "no key"
        problems.append(Problem(str(error), stops=True))
    return facts


def _devices() -> str:
    if torch.cuda.is_available():
        devices = [torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())]
        return ", ".join(f"{device.name} ({device.total_memory / GIB:.0f} GiB)" for device in devices)
    return "Apple GPU (mps)" if torch.backends.mps.is_available() else "no GPU: trains on the CPU"


def _examine_encoder(config: Namespace, problems: list[Problem]) -> str:
    """Where the net's pretrained weights are, after they were fetched, if asked for."""
    options = config.model.net.get("init_args") or {}
    name = options.get("encoder")
    weights = options.get("encoder_weights")
    if not (name and weights):
        if config.prefetch:
            problems.append(Problem("--prefetch needs model.net.encoder and model.net.encoder_weights"))
        return "not pretrained"
    from segmentation.nets.pretrained import library_encoder, weights_file

    try:
        if config.prefetch:
            library_encoder(name, 3, 5, weights)
        file = weights_file(name, weights, download=False)
    except InputError as error:
        problems.append(Problem(str(error), stops=config.prefetch))
        return f"{name}, {weights}: not here"
    return f"{name}, {weights}: {file}"
