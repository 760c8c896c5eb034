"""The doctor: what a data set and a machine are like, what is wrong with them, and the YAML that mends it."""

import sys
from pathlib import Path
from typing import Any

import numpy as np
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
from segmentation.data.writing import write_text
from segmentation.errors import InputError, Problem
from segmentation.training.cli import SegmentationCLI
from segmentation.training.loggers import WandbOptions
from segmentation.training.machine import examine_machine
from segmentation.training.parser import Parser
from segmentation.visualize import sample_grid, save_png

USAGE = "python src/doctor.py [--config OVERLAY ...] [--output FOLDER] [--prefetch] [--any.option value]"
DESCRIPTION = (
    "Examines the data that train.py would train on with the same options, and this machine: what is there, what is "
    "wrong, and the YAML that mends it. Exit status 2 when something would stop a run. Nothing in the data folder is "
    "written. Without classes it reads the masks and suggests some: --data.dataset FolderData --data.dataset.root DIR"
)


class DoctorCLI(SegmentationCLI):
    """train.py's command line, parsed only: nothing is built."""

    usage, description = USAGE, DESCRIPTION

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        super().add_arguments_to_parser(parser)
        parser.add_argument("--output", type=str, default="doctor", help="folder of pictures, lists, overlay")
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
    """doctor.py: print the report, write the pictures, the list of bad files and the suggested overlay.

    Args:
        args: the command line, by default the process's own.

    Returns:
        what is wrong, what would stop a run first.
    """
    config = DoctorCLI(args).config
    console = Console(highlight=False)
    console.width = max(console.width, 100)
    examined, problems = _examine_data(config)
    problems += _prefetch(config) if config.prefetch else []
    wandb = WandbOptions(**config.wandb.as_dict())
    facts, of_machine = examine_machine(config.data.num_workers, wandb, config.model.net.as_dict())
    problems = sorted([*problems, *of_machine], key=lambda problem: not problem.stops)

    if examined:
        _print_data(console, *examined)
    console.print(Text("machine", "bold"))
    for key, value in facts.items():
        console.print(Text(f"{key:<14} {value}"), soft_wrap=True)
    console.print()
    for problem in problems:
        mark = Text("✗ stops a run  ", "bold red") if problem.stops else Text("! look at this ", "bold yellow")
        console.print(mark + Text(problem.text), soft_wrap=True)
    if not problems:
        console.print(Text("✓ nothing is wrong", "bold green"))
    if examined:
        _write(console, Path(config.output), config, *examined)
    return problems


def _examine_data(config: Namespace) -> tuple[tuple[SegmentationDataModule, Audit] | None, list[Problem]]:
    """The data, where it can be built, with the classes that were found to be missing; and what is wrong with it."""
    problems: list[Problem] = []
    try:
        module, problems = build_data(config)
        found = audit(module)
        classes = module.labels.suggest_classes(found.values)
        if classes:  # say what the data is like once they are declared
            problems += found.problems[:1]
            config.data.dataset.init_args.classes = classes
            module, bad = build_data(config)[0], found.bad
            found = audit(module)
            found.bad = bad
        return (module, found), problems + found.problems
    except InputError as error:
        return None, [*problems, Problem(str(error), stops=True)]


def build_data(config: Namespace) -> tuple[SegmentationDataModule, list[Problem]]:
    """The datamodule alone; with classes that the masks suggest, where nobody declared any."""
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


def _prefetch(config: Namespace) -> list[Problem]:
    options = config.model.net.init_args
    name, weights = options.get("encoder"), options.get("encoder_weights")
    if not (name and weights):
        return [Problem("--prefetch: the net has no pretrained encoder: set model.net.encoder and encoder_weights")]
    from segmentation.nets.pretrained import library_encoder

    try:
        library_encoder(name, 3, 5, weights)
    except InputError as error:
        return [Problem(str(error), stops=True)]
    return []


def _print_data(console: Console, module: SegmentationDataModule, found: Audit) -> None:
    labels, source = module.labels, module.source
    where = f" in {source.root}" if hasattr(source, "root") else ""
    console.print(Text(f"{type(source).__name__}{where}: {labels.task}, {labels.num_classes} classes", "bold"))
    table = Table("split", "images", "bad", "sizes", "bands", "type", "values", box=None, pad_edge=False)
    for split, statistics in found.statistics_of_splits.items():
        low = min((record.low for record in statistics.records), default=0)
        high = max((record.high for record in statistics.records), default=0)
        bad = Text(str(len(statistics.bad)), "red" if statistics.bad else "")
        images, sizes = f"{len(statistics.records):,}", _sizes(statistics.sizes)
        table.add_row(split, images, bad, sizes, str(labels.channels), labels.dtype or "", f"{low:g} to {high:g}")
    console.print(table)
    console.print()
    splits, train = list(found.statistics_of_splits), found.statistics_of_splits["train"]
    table = Table("class", "mask value", *(f"{s} pixels" for s in splits), "", "images", box=None, pad_edge=False)
    blank = [""] * len(splits)
    for index, (name, color) in enumerate(zip(labels.names, labels.colors, strict=True)):
        table.add_row(
            Text.assemble(("■ ", color), name),
            ", ".join(map(str, labels.values[index])),
            *(f"{statistics.shares[index]:.2%}" for statistics in found.statistics_of_splits.values()),
            Bar(1, 0, float(train.shares[index]), width=24, color="cyan"),
            f"{int((train.counts[:, index] > 0).sum()):,}",
        )
    if labels.ignore:
        share = train.ignored / max(1, sum(train.pixels) + train.ignored)
        table.add_row("ignored", ", ".join(map(str, labels.ignore)), f"{share:.2%} of all", *blank, "")
    console.print(table)
    console.print()


def _sizes(sizes: list[tuple[int, int]]) -> str:
    """Width x height, of the smallest and the largest."""
    different = sorted(set(sizes), key=lambda size: size[0] * size[1])
    ends = [f"{width}x{height}" for height, width in (different[:1] + different[-1:])]
    return ends[0] if len(different) == 1 else f"{len(different)}: {' to '.join(ends)}" if different else "-"


def _write(console: Console, output: Path, config: Namespace, module: SegmentationDataModule, found: Audit) -> None:
    """Contact sheets, the list of bad files, the suggested overlay."""
    output.mkdir(parents=True, exist_ok=True)
    data = found.usable
    for split in filter(data.names, found.statistics_of_splits):
        names = data.names(split)
        chosen = np.unique(np.linspace(0, len(names) - 1, 8).round().astype(int)).tolist()
        samples = [data.load(split, index) for index in chosen]
        images, masks = [sample["image"] for sample in samples], [sample["mask"] for sample in samples]
        title = f"{split}: {len(chosen)} of {len(names):,}"
        sheet = sample_grid([*images], [*masks], None, module.labels, [names[index] for index in chosen], title)
        save_png(sheet, output / f"{split}.png")
    write_text(output / "bad_files.txt", "".join(f"{text}\n" for text in found.bad))
    console.print(f"\npictures   {output}/*.png; every bad file: {output}/bad_files.txt")
    if found.statistics_of_splits["train"].records:
        suggested = suggest_overlay(module, config.data.dataset.as_dict(), found)
        style: dict[str, Any] = {"sort_keys": False, "allow_unicode": True, "default_flow_style": None, "width": 110}
        overlay = yaml.safe_dump(suggested, **style)
        write_text(output / "overlay.yaml", overlay)
        console.print(Text(f"\nsuggested overlay: python src/train.py --config {output}/overlay.yaml", "bold"))
        console.print(Text(overlay))
