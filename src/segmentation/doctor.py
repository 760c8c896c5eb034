"""The doctor: what a data set and a machine are like, what is wrong with them, and the YAML that fixes it."""

import math
import platform
import shutil
import sys
from collections import Counter
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
from segmentation.data.base import SPLITS
from segmentation.data.datamodule import suggest_crop
from segmentation.data.labels import ClassesMissing, UndeclaredValues, Value
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
        parser.add_argument("--output", default="doctor", help="folder of pictures, lists, overlay")
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
    console = Console(highlight=False, markup=False)
    console.width = max(console.width, 100)
    problems: list[Problem] = []
    try:
        _examine_data(config, console, problems)
    except InputError as error:
        problems.append(Problem(str(error), stops=True))
    facts = _examine_machine(config, problems)
    facts["encoder"] = _examine_encoder(config, problems)
    console.print("machine", style="bold")
    for key, value in facts.items():
        console.print(f"{key:<14} {value}", soft_wrap=True)
    console.print()
    problems.sort(key=lambda problem: not problem.stops)
    for problem in problems:
        if problem.stops:
            console.print(f"✗ stops a run   {problem.text}", style="red", soft_wrap=True)
        else:
            console.print(f"! look at this  {problem.text}", style="yellow", soft_wrap=True)
    if not problems:
        console.print("✓ nothing is wrong", style="green")
    return problems


def _examine_data(config: Namespace, console: Console, problems: list[Problem]) -> None:
    """Read all data, print and write what is there. Where classes are missing, go on with those that masks suggest."""
    options = config.data.dataset.init_args
    try:
        module = build_data(config)
    except ClassesMissing as error:
        problems.append(Problem(str(error), stops=True))
        options.classes = error.suggested
        module = build_data(config)
    found = module.read()
    bad = module.skipped()
    values = _undeclared(found)
    if values:
        problems.append(Problem(module.labels.explain_undeclared(values), not module.skip))
    suggested = module.labels.suggest_classes(values)
    if suggested:
        options.classes = suggested
        module = build_data(config)
        found = module.read()
    unusable = module.skipped()
    if unusable:
        text = f"{len(unusable)} files cannot be used, e.g. {unusable[0]}. To leave them out: data.on_bad_file: skip"
        problems.append(Problem(text, not module.skip))

    _print_data(console, module, found)
    output = Path(config.output)
    _write_grids(output, module)
    write_text(output / "bad_files.txt", "".join(f"{message}\n" for message in bad))
    console.print(f"pictures   {output}/*.png; every bad file: {output}/bad_files.txt\n")
    if found["train"].records:
        overlay = yaml.safe_dump(
            _suggest_overlay(config.data.dataset.as_dict(), module, found["train"]),
            sort_keys=False,
            allow_unicode=True,
            default_flow_style=None,
            width=110,
        )
        write_text(output / "overlay.yaml", overlay)
        console.print(f"suggested overlay: python src/train.py --config {output}/overlay.yaml", style="bold")
        console.print(overlay)
    problems += module.find_problems(found)


def build_data(config: Namespace) -> SegmentationDataModule:
    """The datamodule of a parsed command line."""
    parser = Parser(allow_abbrev=False)
    parser.add_lightning_class_args(SegmentationDataModule, "data")
    try:
        return parser.instantiate_classes(Namespace(data=config.data)).data
    except ValueError as error:  # a library's own checks of the user's numbers
        raise InputError(f"an option cannot be used: {' '.join(str(error).split())}") from error


def _undeclared(found: dict[str, SplitStatistics]) -> Counter[Value]:
    """Value -> pixels, of the masks that hold undeclared values."""
    values: Counter[Value] = Counter()
    for statistics in found.values():
        for error in statistics.bad.values():
            if isinstance(error, UndeclaredValues):
                values.update(error.counts)
    return values


def _print_data(console: Console, module: SegmentationDataModule, found: dict[str, SplitStatistics]) -> None:
    labels = module.labels
    console.print(f"{module.description}: {labels.task}, {labels.num_classes} classes", style="bold")
    console.print(f"{labels.channels} channels of {labels.dtype or 'any type'}")
    table = Table("class", "mask value", box=None, pad_edge=False)
    for split, statistics in found.items():
        table.add_column(f"{split} pixels")
        sizes = sorted(set(statistics.sizes), key=math.prod)
        smallest_and_largest = dict.fromkeys(sizes[:1] + sizes[-1:])
        shown = " to ".join(f"{width}x{height}" for height, width in smallest_and_largest)
        low = min((record.low for record in statistics.records), default=0)
        high = max((record.high for record in statistics.records), default=0)
        count = f"{len(statistics.records):,} images, {len(statistics.bad)} bad"
        console.print(f"{split:<6} {count}; sizes {shown}; values {low:g} to {high:g}")
    console.print()
    table.add_column()
    table.add_column("images")
    train = found["train"]
    images = (train.counts > 0).sum(axis=0)
    for index, name in enumerate(labels.names):
        table.add_row(
            Text.assemble(("■ ", labels.colors[index]), name),
            ", ".join(map(str, labels.values[index])),
            *(f"{statistics.shares[index]:.2%}" for statistics in found.values()),
            Bar(1, 0, float(train.shares[index]), width=24, color="cyan"),
            f"{images[index]:,}",
        )
    if labels.ignore:
        share = train.ignored / max(1, sum(train.pixels) + train.ignored)
        table.add_row("ignored", ", ".join(map(str, labels.ignore)), f"{share:.2%} of all")
    console.print(table)
    console.print()


def _write_grids(output: Path, module: SegmentationDataModule) -> None:
    """A picture of eight samples of each split."""
    data = module.dataset
    for split in filter(data.names, SPLITS):
        names = data.names(split)
        chosen = evenly(len(names), 8)
        samples = [data.load(split, index) for index in chosen]
        grid = sample_grid(
            images=[sample["image"] for sample in samples],
            truths=[sample["mask"] for sample in samples],
            predictions=None,
            labels=module.labels,
            names=[names[index] for index in chosen],
            title=f"{split}: {len(chosen)} of {len(names):,}",
        )
        save_png(grid, output / f"{split}.png")


def _suggest_overlay(dataset: dict[str, Any], module: SegmentationDataModule, train: SplitStatistics) -> dict[str, Any]:
    """An overlay to train on this data: `dataset` (`class_path` and `init_args`) as given, and crop and loss that suit
    its statistics."""
    options = {key: value for key, value in dataset["init_args"].items() if value is not None}
    data: dict[str, Any] = {"dataset": {**dataset, "init_args": options}}
    unequal = len(set(train.sizes)) > 1
    if unequal:
        data["eval_batch_size"] = 1
    if unequal or max(train.sizes[0]) > 512:
        data["crop"] = suggest_crop(train.sizes)
    loss: dict[str, Any] = {"class_path": "CrossEntropy"}
    rarest = train.shares[train.shares > 0].min(initial=1.0)
    if rarest < 0.5 / module.labels.num_classes:  # every class counts alike in an overlap loss, however rare
        if module.labels.task == "multiclass":
            loss["init_args"] = {"class_weights": "sqrt_inverse"}
        losses = {"losses": [loss, {"class_path": "Dice"}], "weights": [1.0, 1.0]}
        loss = {"class_path": "WeightedSum", "init_args": losses}
    return {"data": data, "model": {"loss": loss}}


def _examine_machine(config: Namespace, problems: list[Problem]) -> dict[str, str]:
    """Facts, by name. What is wrong is added to `problems`."""
    free = shutil.disk_usage(RUNS if RUNS.is_dir() else Path()).free
    if free < GIB:
        problems.append(Problem(f"only {free / GIB:.2f} GiB of disk are free for {RUNS}/: checkpoints may not fit"))
    devices = "no GPU: trains on the CPU"
    if torch.cuda.is_available():
        found = [torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())]
        devices = ", ".join(f"{device.name} ({device.total_memory / GIB:.0f} GiB)" for device in found)
    elif torch.backends.mps.is_available():
        devices = "Apple GPU (mps)"
    facts = {
        "python": f"{platform.python_version()}, torch {torch.__version__}",
        "devices": devices,
        "bf16": "yes" if has_bf16("auto") else "no: trains in 32-true",
        "cores": str(available_cores()),
        "disk": f"{free / GIB:,.1f} GiB free for {RUNS}/",
    }
    shared = Path("/dev/shm")
    if shared.is_dir():
        size = shutil.disk_usage(shared).total
        facts["shared memory"] = f"{size / GIB:,.1f} GiB"
        if size < GIB and config.data.num_workers != 0:
            text = f"shared memory, through which workers hand over batches, is {size / 2**20:.0f} MiB"
            problems.append(Problem(f"{text}. {ENLARGE_SHARED_MEMORY}"))
    try:
        facts["W&B"] = WandbOptions(**config.wandb.as_dict()).resolved_mode()
    except InputError as error:
        facts["W&B"] = "no key"
        problems.append(Problem(str(error), stops=True))
    return facts


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
