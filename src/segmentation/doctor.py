"""The doctor: what a data set and a machine are like, what is wrong with them, and the YAML that fixes it."""

import math
import shutil
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import torch
import yaml
from jsonargparse import Namespace
from lightning.pytorch.cli import LightningArgumentParser
from rich.console import Console

from segmentation.data import FolderData, SegmentationDataModule
from segmentation.data.base import SPLITS
from segmentation.data.datamodule import suggest_crop
from segmentation.data.labels import UndeclaredValues
from segmentation.data.mask_values import Counts
from segmentation.data.statistics import available_cores
from segmentation.data.writing import write_text
from segmentation.errors import InputError, Problem, plural
from segmentation.training.cli import SegmentationCLI
from segmentation.training.page import write_page
from segmentation.training.parser import Parser
from segmentation.training.trainer import has_bf16
from segmentation.training.wandb_run import WandbOptions
from segmentation.visualize import Shown, evenly, sample_grid, save_png, shrink, table


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
        parser.add_argument(
            "--output",
            default="doctor",
            help="folder of pictures, lists, overlay",
        )
        parser.add_argument(
            "--prefetch",
            action="store_true",
            help="fetch the net's pretrained weights into the cache",
        )

    def parse_arguments(
        self,
        parser: LightningArgumentParser,
        args,
    ) -> None:
        self.config = parser.parse_args(args)

    def instantiate_classes(self) -> None:
        pass


def main() -> None:
    """doctor.py: exit status 2 where something would stop a run."""
    if any(problem.stops for problem in diagnose()):
        sys.exit(2)


def diagnose(args: list[str] | None = None) -> list[Problem]:
    """Print the report, and write it as a page, grids of images, the list of bad files and the suggested overlay.

    Args:
        args: the command line, by default the process's own.

    Returns:
        What is wrong. What would stop a run comes first.
    """
    cli = DoctorCLI(args)
    problems: list[Problem] = []
    output = Path(cli.config.output)
    page = output / "report.html"
    for name in ("overlay.yaml", "bad_files.txt", "train.png", "val.png", "test.png", page.name):
        (output / name).unlink(missing_ok=True)  # of an earlier call
    sections = {"title": "The doctor's report"}
    try:
        sections |= _examine_data(cli, problems)
    except InputError as error:
        problems.append(Problem(str(error), stops=True))
    _examine_machine(cli.config, problems)
    problems.sort(key=lambda problem: not problem.stops)
    for problem in problems:
        mark = "✗ stops a run  " if problem.stops else "! look at this "
        print(f"{mark} {problem.text}")
    if not problems:
        print("✓ nothing is wrong")
    write_page(page, problems=problems, **sections)
    print(f"page       {page}")
    return problems


def _examine_data(cli: DoctorCLI, problems: list[Problem]) -> dict:
    """Read all data. Where options would mend what is wrong, set them and read again; then print and write the rest.

    Returns:
        The sections of the page.
    """
    data = cli.config.data
    given = data.on_bad_file
    data.on_bad_file = "skip"  # to find all that is wrong
    tried = []
    bad: list[str] = []
    while True:
        try:
            module = build_data(cli.config)
        except InputError as error:
            if not error.fix or error.fix in tried:
                raise
            text = str(error)
            fix = error.fix
            stops = True
        else:
            others = list(module.find_problems())
            text, fix = _find_fix(module)
            stops = given == "error"
            bad = bad or module.skipped()
        if text and fix not in tried:
            problems.append(Problem(text, stops))
        if not fix or fix in tried:
            break
        tried.append(fix)
        data.dataset.init_args.update(Namespace(fix))

    unusable = list(module.dataset.problems)
    unusable += [str(error) for error in module.errors() if not isinstance(error, UndeclaredValues)]
    if unusable and any(statistics.records for statistics in module.counted.values()):
        count = plural(len(unusable), "file")
        text = f"{count} cannot be used, e.g. {unusable[0]}. To leave such files out: data.on_bad_file: skip"
        problems.append(Problem(text, given == "error"))
    problems += others
    if not module.skipped():
        data.on_bad_file = given
    sections = _print_data(module)
    output = Path(cli.config.output)
    samples = _write_grids(output, module)
    bad_files = output / "bad_files.txt"
    write_text(bad_files, "".join(f"{message}\n" for message in bad))
    print(f"bad files  {len(bad):,}, listed in {bad_files}\n")
    return {
        **sections,
        "samples": samples,
        "options": _write_overlay(cli, module, others),
    }


def _write_overlay(cli: DoctorCLI, module: SegmentationDataModule, others: list[Problem]) -> str:
    """Write the YAML that trains on this data, and return it; "" where something stops a run that no option mends.

    Args:
        cli: the command line with the options that mend what was found.
        module: the data.
        others: what was found beside bad files and mask values.
    """
    data = cli.config.data
    path = Path(cli.config.output, "overlay.yaml")
    sizes = module.counted["train"].sizes
    needs_crop = len(set(sizes)) > 1 or max(map(max, sizes), default=0) > 512
    if needs_crop and data.crop is None:
        data.crop = suggest_crop(sizes)
        others = list(build_data(cli.config).find_problems())
    if any(problem.stops for problem in others):
        print("no overlay: these options do not mend what stops a run\n")
        return ""
    given_options = cli.parser.dump(cli.config, skip_default=True)
    section = yaml.safe_load(given_options).get("data", {})
    options = section.get("dataset", {}).get("init_args", {})
    if options.get("ignore") == []:  # YAML's form of the default, an empty tuple
        options.pop("ignore")
    overlay = yaml.safe_dump(
        {"data": section},
        sort_keys=False,
        allow_unicode=True,
        default_flow_style=None,
        width=110,
    )
    write_text(path, overlay)
    print(f"suggested overlay: python src/train.py --config {path}\n{overlay}")
    return overlay


def build_data(config: Namespace) -> SegmentationDataModule:
    """The datamodule of a parsed command line.

    Raises:
        InputError: an option cannot be used, or nobody declared the classes.
    """
    parser = Parser(allow_abbrev=False)
    parser.add_lightning_class_args(SegmentationDataModule, "data")
    return parser.instantiate_classes(Namespace(data=config.data)).data


def _find_fix(module: SegmentationDataModule) -> tuple[str, dict]:
    """What is wrong with samples that options of the data set would mend, and these options."""
    errors = module.errors()
    wrong = [error.counts for error in errors if isinstance(error, UndeclaredValues)]
    dataset = module.hparams["dataset"]
    text = ""
    if wrong and isinstance(dataset, FolderData):
        text, fix = dataset.explain(wrong, _known_values(module))
        if fix:
            return text, fix
    fixable = [error for error in errors if error.fix]
    if fixable:
        return f"{fixable[0]} ({plural(len(fixable), 'file')})", fixable[0].fix
    return text, {}


def _known_values(module: SegmentationDataModule) -> list[Counts]:
    """The values of each mask that can be used: the first one of each class."""
    first = [values[0] for values in module.labels.values]
    masks = np.concatenate([statistics.counts for statistics in module.counted.values()])
    return [+Counter(dict(zip(first, pixels, strict=True))) for pixels in masks.tolist()]


def _print_data(module: SegmentationDataModule) -> dict:
    """Print what each split holds, and how often each class occurs; return it as sections of the page."""
    labels = module.labels
    found = module.counted
    lines = [
        f"{module.description}: {labels.task}, {labels.num_classes} classes",
        f"{plural(labels.channels, 'channel')} of {labels.dtype or 'any type'}",
    ]
    for split, statistics in found.items():
        records = statistics.records
        line = f"{split:<6} {plural(len(records), 'image')}, {len(statistics.bad)} bad"
        if records:
            sizes = sorted(statistics.sizes, key=math.prod)
            ends = [f"{width}x{height}" for height, width in dict.fromkeys([sizes[0], sizes[-1]])]
            low = min(record.low for record in records)
            high = max(record.high for record in records)
            line += f"; sizes {' to '.join(ends)}; values {low:g} to {high:g}"
        lines.append(line)
    print(*lines, sep="\n")
    images = (found["train"].counts > 0).sum(axis=0)
    columns = {"images": [f"{count:,}" for count in images]}
    for split, statistics in found.items():
        columns[split] = [f"{share:.2%}" for share in statistics.shares]
    columns["mask value"] = [str(values) for values in labels.values]
    shown = table("", "class", *columns)
    for name, *cells in zip(labels.names, *columns.values(), strict=True):
        shown.add_row(name, *cells)
    Console(markup=False).print(shown)
    return {"lines": lines, "labels": labels, "columns": columns}


def _write_grids(output: Path, module: SegmentationDataModule) -> list[Shown]:
    """A picture of eight samples of each split. Returns two of each."""
    data = module.dataset
    chosen = []
    for split in filter(data.names, SPLITS):
        names = data.names(split)
        samples = []
        for index in evenly(len(names), 8):
            sample = data.load(split, index)
            shown = {"name": names[index], "image": shrink(sample["image"]), "mask": shrink(sample["mask"])}
            samples.append(shown)
        chosen += samples[:2]
        grid = sample_grid(samples, module.labels, f"{split}: {len(samples)} of {len(names):,}")
        path = output / f"{split}.png"
        save_png(grid, path)
        print(f"pictures   {path}")
    return chosen


def _examine_machine(config: Namespace, problems: list[Problem]) -> None:
    """Print what this machine has. What is wrong is added to `problems`."""
    try:
        wandb = WandbOptions(**config.wandb.as_dict()).resolved_mode()
    except InputError as error:
        wandb = "no key"
        problems.append(Problem(str(error), stops=True))
    devices = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    free = shutil.disk_usage(".").free / 2**30
    print("machine")
    print(f"torch    {torch.__version__}")
    print(f"devices  {', '.join(devices) or 'no CUDA GPU'}")
    print(f"bf16     {'yes' if has_bf16('auto') else 'no: trains in 32-true'}")
    print(f"cores    {available_cores()}")
    print(f"disk     {free:,.1f} GiB free")
    print(f"W&B      {wandb}")
    print(f"encoder  {_find_weights(config, problems)}\n")


def _find_weights(config: Namespace, problems: list[Problem]) -> str:
    """Where the net's pretrained weights are, after they were fetched, if asked for."""
    options = config.model.net.get("init_args") or {}
    name = options.get("encoder")
    weights = options.get("encoder_weights")
    if not (name and weights):
        return "not pretrained: model.net.encoder_weights is not set"
    from segmentation.nets.pretrained import library_encoder, weights_file

    try:
        if config.prefetch:
            library_encoder(name, 3, 5, weights)
        file = weights_file(name, weights, download=False)
    except InputError as error:
        problems.append(Problem(str(error), stops=config.prefetch))
        return f"{name}, {weights}: not here"
    return f"{name}, {weights}: {file}"
