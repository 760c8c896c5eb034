"""The doctor: what a data set and a machine are like, what is wrong with them, and the YAML that fixes it."""

import math
import shutil
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import torch
import yaml
from jsonargparse import Namespace
from lightning.pytorch.cli import LightningArgumentParser

from segmentation.data import SegmentationDataModule
from segmentation.data.annotations import CategoriesMissing
from segmentation.data.base import SPLITS
from segmentation.data.datamodule import suggest_crop
from segmentation.data.labels import ClassesMissing, UndeclaredValues, Value
from segmentation.data.statistics import available_cores
from segmentation.data.writing import write_text
from segmentation.errors import InputError, Problem
from segmentation.training.cli import SegmentationCLI
from segmentation.training.parser import Parser
from segmentation.training.trainer import has_bf16
from segmentation.training.wandb_run import WandbOptions
from segmentation.visualize import evenly, sample_grid, save_png, shrink


class DoctorCLI(SegmentationCLI):
    """train.py's command line, parsed only: nothing is built."""

    usage = "python src/doctor.py [--config OVERLAY ...] [--output FOLDER] [--prefetch] [--any.option value]"
    description = (
        "Examines the data that train.py would train on with the same options, and this machine: what is there, what "
        "is wrong, and the YAML that fixes it. Exit status 2 when something would stop a run. Nothing in the data "
        "folder is written. Without classes it reads the masks and suggests some: --data.dataset FolderData "
        "--data.dataset.root DIR"
    )

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        super().add_arguments_to_parser(parser)
        parser.add_argument("--output", default="doctor", help="folder of pictures, lists, overlay")
        parser.add_argument("--prefetch", action="store_true", help="fetch the net's pretrained weights into the cache")

    def parse_arguments(
        self,
        parser: LightningArgumentParser,
        args: Any,
    ) -> None:
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
    problems: list[Problem] = []
    try:
        _examine_data(config, problems)
    except InputError as error:
        problems.append(Problem(str(error), stops=True))
    _examine_machine(config, problems)
    problems.sort(key=lambda problem: not problem.stops)
    for problem in problems:
        mark = "✗ stops a run  " if problem.stops else "! look at this "
        print(f"{mark} {problem.text}")
    if not problems:
        print("✓ nothing is wrong")
    return problems


def _examine_data(config: Namespace, problems: list[Problem]) -> None:
    """Read all data, print and write what is there. Where classes are missing, go on with those that masks suggest."""
    dataset = config.data.dataset
    bad_files_stop = config.data.on_bad_file == "error"
    config.data.on_bad_file = "skip"  # to find all that is wrong
    try:
        module = build_data(config)
    except (ClassesMissing, CategoriesMissing) as error:
        problems.append(Problem(str(error), stops=True))
        dataset.init_args.classes = error.suggested
        module = build_data(config)
    others = module.find_problems()
    bad = module.skipped()
    values = _undeclared(module)
    if values:
        problems.append(Problem(module.labels.explain_undeclared(values), bad_files_stop))
    suggested = module.labels.suggest_classes(values)
    if suggested:
        dataset.init_args.classes = suggested
        module = build_data(config)
        others = module.find_problems()
    unusable = list(module.dataset.problems)
    for statistics in module.counted.values():
        unusable += [str(error) for error in statistics.bad.values() if not isinstance(error, UndeclaredValues)]
    if unusable:
        text = f"{len(unusable)} files cannot be used, e.g. {unusable[0]}. To leave them out: data.on_bad_file: skip"
        problems.append(Problem(text, bad_files_stop))
    problems += others

    _print_data(module)
    output = Path(config.output)
    _write_grids(output, module)
    lines = [f"{message}\n" for message in bad]
    write_text(output / "bad_files.txt", "".join(lines))
    print(f"pictures   {output}/*.png; every bad file: {output}/bad_files.txt\n")
    sizes = module.counted["train"].sizes
    if sizes:
        options = {}
        for key, value in dataset.init_args.as_dict().items():
            if value is not None:
                options[key] = value
        data: dict[str, Any] = {
            "dataset": {
                "class_path": dataset.class_path,
                "init_args": options,
            },
        }
        if len(set(sizes)) > 1 or max(sizes[0]) > 512:
            data["crop"] = suggest_crop(sizes)
        overlay = yaml.safe_dump(
            {"data": data},
            sort_keys=False,
            allow_unicode=True,
            default_flow_style=None,
            width=110,
        )
        write_text(output / "overlay.yaml", overlay)
        print(f"suggested overlay: python src/train.py --config {output}/overlay.yaml\n{overlay}")


def build_data(config: Namespace) -> SegmentationDataModule:
    """The datamodule of a parsed command line.

    Raises:
        ClassesMissing: nobody declared the classes; the error suggests some.
        InputError: an option cannot be used.
    """
    parser = Parser(allow_abbrev=False)
    parser.add_lightning_class_args(SegmentationDataModule, "data")
    return parser.instantiate_classes(Namespace(data=config.data)).data


def _undeclared(module: SegmentationDataModule) -> Counter[Value]:
    """Count the values of the masks that hold undeclared ones.

    Returns:
        value -> pixels.
    """
    values: Counter[Value] = Counter()
    for statistics in module.counted.values():
        for error in statistics.bad.values():
            if isinstance(error, UndeclaredValues):
                values.update(error.counts)
    return values


def _print_data(module: SegmentationDataModule) -> None:
    """Print what each split holds, and how often each class occurs."""
    labels = module.labels
    found = module.counted
    print(f"{module.description}: {labels.task}, {labels.num_classes} classes")
    print(f"{labels.channels} channels of {labels.dtype or 'any type'}")
    for split, statistics in found.items():
        records = statistics.records
        line = f"{split:<6} {len(records):,} images, {len(statistics.bad)} bad"
        if records:
            sizes = sorted(statistics.sizes, key=math.prod)
            low = min(record.low for record in records)
            high = max(record.high for record in records)
            ends = [f"{width}x{height}" for height, width in (sizes[0], sizes[-1])]
            line += f"; sizes {' to '.join(dict.fromkeys(ends))}"
            line += f"; values {low:g} to {high:g}"
        print(line)
    images = (found["train"].counts > 0).sum(axis=0)
    heads = [f"{split:>8}" for split in found]
    print("\nclass                 images", *heads, " mask value")
    for index, name in enumerate(labels.names):
        shares = [f"{statistics.shares[index]:>8.2%}" for statistics in found.values()]
        print(f"{name:<20} {images[index]:>8,}", *shares, "", labels.values[index])
    print()


def _write_grids(output: Path, module: SegmentationDataModule) -> None:
    """A picture of eight samples of each split."""
    data = module.dataset
    for split in filter(data.names, SPLITS):
        names = data.names(split)
        chosen = evenly(len(names), 8)
        samples = []
        for index in chosen:
            sample = data.load(split, index)
            shown = {"name": names[index], "image": shrink(sample["image"]), "mask": shrink(sample["mask"])}
            samples.append(shown)
        grid = sample_grid(samples, module.labels, f"{split}: {len(chosen)} of {len(names):,}")
        save_png(grid, output / f"{split}.png")


def _examine_machine(config: Namespace, problems: list[Problem]) -> None:
    """Print what this machine has. What is wrong is added to `problems`."""
    try:
        wandb = WandbOptions(**config.wandb.as_dict()).resolved_mode()
    except InputError as error:
        wandb = "no key"
        problems.append(Problem(str(error), stops=True))
    devices = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    print("machine")
    print(f"torch    {torch.__version__}")
    print(f"devices  {', '.join(devices) or 'no CUDA GPU'}")
    print(f"bf16     {'yes' if has_bf16('auto') else 'no: trains in 32-true'}")
    print(f"cores    {available_cores()}")
    print(f"disk     {shutil.disk_usage('.').free / 2**30:,.1f} GiB free")
    print(f"W&B      {wandb}")
    print(f"encoder  {_find_weights(config, problems)}\n")


def _find_weights(config: Namespace, problems: list[Problem]) -> str:
    """Where the net's pretrained weights are, after they were fetched, if asked for."""
    options = config.model.net.get("init_args") or {}
    name = options.get("encoder")
    weights = options.get("encoder_weights")
    if not (name and weights):
        if config.prefetch:
            problems.append(Problem("--prefetch: the net has no pretrained encoder: set model.net.encoder_weights"))
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
