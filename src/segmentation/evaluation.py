"""Test a checkpoint again, from the file alone."""

import argparse
import sys
import tempfile
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import ActionConfigFile, Namespace
from lightning.pytorch import Trainer
from lightning.pytorch.utilities import rank_zero_only

from segmentation.callbacks import Progress
from segmentation.checkpoint import load_module, read_checkpoint
from segmentation.cli import OURS, start_job
from segmentation.data import Labels, SegmentationDataModule
from segmentation.errors import InputError
from segmentation.metrics import table_rows
from segmentation.parser import Parser
from segmentation.report import print_table
from segmentation.run import write_csv, write_json


def evaluate(args: list[str] | None = None) -> dict[str, float]:
    """eval.py: load a checkpoint, test it on its own data or on an overlay's, print the table of IoU per class.

    Args:
        args: the command line, by default the process's own.

    Returns:
        The figures, under their logged keys without the split.
    """
    start_job()
    options, rest = _arguments(args)
    checkpoint = read_checkpoint(options.checkpoint)
    module = load_module(checkpoint, options.checkpoint)
    config = _configure(checkpoint, options.data, rest)
    data: SegmentationDataModule = config.data
    _check_labels(module.labels, data.labels, options.checkpoint)
    data.test_split = options.split or data.test_split
    if not data.dataset.names(data.test_split):
        raise InputError(f"there is no {data.test_split} split in this data set: choose another --split")
    if rank_zero_only.rank == 0:
        data.check([data.test_split])
    trainer = Trainer(**config.trainer, logger=False, enable_checkpointing=False, callbacks=[Progress()])
    trainer.test(module, datamodule=data, verbose=False)
    found = {key: float(value) for key, value in trainer.callback_metrics.items()}
    metrics = {key.removeprefix("test/"): value for key, value in found.items()}
    if trainer.is_global_zero:
        print_table(found, module.labels, data.test_split, module.test_counts[0])
        if options.output:
            output, names = Path(options.output), data.dataset.names(data.test_split)
            write_json(output, {"split": data.test_split, "metrics": metrics})
            counts = output.with_name(f"{output.stem}_per_image.csv")
            write_csv(counts, table_rows(module.test_counts[1], names, module.labels.names))
            print(f"figures    {output}, and counts of each image in {counts}")
    return metrics


def _arguments(args: list[str] | None) -> tuple[argparse.Namespace, list[str]]:
    parser = argparse.ArgumentParser(
        prog="python src/eval.py",
        allow_abbrev=False,
        description="Test a checkpoint: training's own test figures again, to the last digit.",
        epilog="Any option of data and trainer, as in train.py: --data.eval_batch_size 1 --trainer.devices 2",
    )
    parser.add_argument("checkpoint", metavar="CHECKPOINT", help="a .ckpt file of train.py; it holds the data's config")
    parser.add_argument("--data", metavar="OVERLAY", help="YAML whose data section replaces the checkpoint's")
    parser.add_argument("--split", choices=("train", "val", "test"), help="default: what training tested")
    parser.add_argument("--output", metavar="FILE.json", help="write the figures there, and FILE_per_image.csv")
    parser.error = _refuse
    words = sys.argv[1:] if args is None else args
    first = next((i for i, word in enumerate(words) if word.endswith(".ckpt")), 0)  # wherever it stands
    return parser.parse_known_args(words[first : first + 1] + words[:first] + words[first + 1 :])


def _refuse(message: str) -> None:
    raise InputError(f"{message}. See --help")


def _configure(checkpoint: dict[str, Any], overlay: str | None, rest: list[str]) -> Namespace:
    """The datamodule, built, and the trainer's options: of the checkpoint, then the overlay, then the command line."""
    parser = Parser(usage="python src/eval.py CHECKPOINT [--any.option value]", allow_abbrev=False)
    parser.add_argument("--config", action=ActionConfigFile)
    parser.add_lightning_class_args(SegmentationDataModule, "data")
    skip = OURS | {"callbacks", "enable_checkpointing"}
    parser.add_class_arguments(Trainer, "trainer", fail_untyped=False, instantiate=False, sub_configs=True, skip=skip)
    saved = {key: value for key, value in checkpoint["datamodule_hyper_parameters"].items() if key != "_instantiator"}
    layers: list[dict[str, Any]] = [{"data": saved, "trainer": {"devices": 1, "precision": checkpoint["precision"]}}]
    if overlay:
        layers.append({"data": _data_section(Path(overlay))})
    with tempfile.TemporaryDirectory() as folder:
        args = []
        for number, layer in enumerate(layers):
            path = Path(folder) / f"{number}.yaml"
            path.write_text(yaml.safe_dump(layer, sort_keys=False), encoding="utf-8")
            args += ["--config", str(path)]
        config = parser.parse_args([*args, *rest])
    built = parser.instantiate_classes(config)
    built.trainer = {**config.trainer, "use_distributed_sampler": False, "enable_model_summary": False}
    return built


def _data_section(path: Path) -> dict[str, Any]:
    try:
        section = yaml.safe_load(path.read_text(encoding="utf-8")).get("data")
    except (OSError, yaml.YAMLError, AttributeError) as error:
        raise InputError(f"{path}: cannot be read as an overlay ({error})") from error
    if not section:
        raise InputError(f"{path}: has no data section; give an overlay like those in configs/data")
    return section


def _check_labels(trained: Labels, given: Labels, source: str) -> None:
    for what in ("names", "channels", "dtype", "scale"):
        if getattr(trained, what) != getattr(given, what) and (what != "dtype" or trained.dtype):
            raise InputError(
                f"{source} was trained on images of {trained.channels} bands ({trained.dtype or 'any type'}, "
                f"scale {trained.scale}) and the classes {', '.join(trained.names)}, but this data has "
                f"{given.channels} ({given.dtype}, scale {given.scale}) and {', '.join(given.names)}"
            )
