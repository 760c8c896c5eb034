"""Open a checkpoint with the data that it was trained on, or with an overlay's, for the jobs that measure."""

import argparse
import json
import os
from difflib import get_close_matches
from inspect import signature
from pathlib import Path
from typing import Any, NamedTuple, get_type_hints

import yaml
from jsonargparse import ActionConfigFile, Namespace
from lightning.pytorch import Trainer
from lightning.pytorch.utilities import rank_zero_only

from segmentation.checkpoint import blame, build, find_class, load_module, read_checkpoint
from segmentation.data import SegmentationData, SegmentationDataModule
from segmentation.errors import InputError
from segmentation.module import SegmentationModule
from segmentation.training.cli import OURS
from segmentation.training.parser import Parser
from segmentation.training.preemption import check_meeting_place

#: Options of the data that a job takes from a checkpoint. The others are for training.
KEPT = ("batch_size", "eval_batch_size", "num_workers", "cache", "folds", "fold", "on_bad_file", "seed")


class Trained(NamedTuple):
    """What a job measures with."""

    module: SegmentationModule  # in eval mode
    data: SegmentationDataModule  # checked; its `test_split` is the one to be tested
    trainer: dict  # options of the trainer
    card: dict | None  # what the model card of share.py was made of


def open_trained(
    job: str,
    options: argparse.Namespace,
    rest: list[str],
    split: str | None = None,
) -> Trained:
    """A checkpoint with its data.

    Args:
        job: the script's name; only eval needs the loss.
        options: `checkpoint`, and `data`, an overlay whose data section replaces the checkpoint's.
        rest: options of data and trainer from the command line, which count most.
        split: the one to be tested; None: the data set's own.

    Raises:
        InputError: there is no such split, or the data set is not like the one that was trained on.
    """
    check_meeting_place()
    path = options.checkpoint
    checkpoint = read_checkpoint(path)
    module = load_module(SegmentationModule, checkpoint, path, with_loss=job == "eval")
    parser, config = configure(job, checkpoint, options, rest)
    try:
        chosen = parser.instantiate_classes(config).data
        if not isinstance(chosen.get("dataset"), SegmentationData):
            saved = checkpoint["datamodule_hyper_parameters"]["dataset"]
            with blame(path):
                chosen.dataset = build(saved, SegmentationData, dict(chosen.get("dataset", {})))
        data = SegmentationDataModule(**chosen)
        data.test_split = split or data.test_split
        if not data.dataset.names(data.test_split):
            raise InputError(f"there is no {data.test_split} split in this data set: choose another --split")
        trained = module.labels
        given = data.labels
        expected = (trained.names, trained.channels, trained.scale, trained.dtype or given.dtype)
        found = (given.names, given.channels, given.scale, given.dtype)
        if found != expected:
            raise InputError(
                f"{path} was trained on the classes, channels, scale and dtype {expected}; this data has {found}"
            )
        rank_zero_only(data.check)([data.test_split])
    except InputError as error:
        if options.data:
            raise
        raise InputError(f"{error} (the data is as in training; --data OVERLAY gives another)") from error
    trainer = {
        **config.trainer,
        "use_distributed_sampler": False,
        "enable_model_summary": False,
        "enable_checkpointing": False,
        "logger": False,
    }
    return Trained(module, data, trainer, checkpoint.get("evaluation"))


def read_section(overlay: str | None) -> dict:
    """The data section of an overlay."""
    if not overlay:
        return {}
    try:
        return dict(yaml.safe_load(Path(overlay).read_text(encoding="utf-8"))["data"])
    except (OSError, yaml.YAMLError, KeyError, TypeError, ValueError) as error:
        raise InputError(f"{overlay}: is no overlay with a data section, like configs/data/*.yaml: {error}") from error


def configure(job: str, checkpoint: dict, options: argparse.Namespace, rest: list[str]) -> tuple[Parser, Namespace]:
    """Options of data and trainer: those of the checkpoint, then the overlay's, then the command line's.

    The parser gets nothing of the checkpoint's data set: it would import any class or function named there.
    """
    saved = checkpoint["datamodule_hyper_parameters"]
    section = read_section(options.data)
    parser = Parser(usage=f"python src/{job}.py CHECKPOINT [--any.option value]", allow_abbrev=False)
    parser.add_argument("--config", action=ActionConfigFile)
    typed = {
        "fail_untyped": False,
        "instantiate": False,
        "sub_configs": True,
    }
    parser.add_class_arguments(
        SegmentationDataModule,
        "data",
        skip={"dataset"},
        **typed,
    )
    parser.add_class_arguments(Trainer, "trainer", skip=OURS | {"callbacks"}, **typed)
    words = {word.partition("=")[0] for word in rest}
    for word in words:
        if word.startswith("--") and "." not in word and word != "--config":
            close = get_close_matches(word[2:].replace("-", "_"), vars(options), n=1)
            meant = "".join(f" (did you mean --{name.replace('_', '-')}?)" for name in close)
            raise InputError(f"unrecognized option {word}{meant}. All options: python src/{job}.py --help")
    if "dataset" in section or words & {"--data.dataset", "--data.dataset.class_path"}:
        parser.add_subclass_arguments(SegmentationData, "data.dataset", fail_untyped=False)
    else:
        with blame(options.checkpoint):
            own = find_class(saved["dataset"]["class_path"], SegmentationData)
            types = get_type_hints(own.__init__)
        # None is required, as the checkpoint has them all.
        for name in signature(own).parameters:
            parser.add_argument(f"--data.dataset.{name}", type=types.get(name, Any))
    kept = {key: saved[key] for key in KEPT if saved.get(key) is not None}
    workers = kept.get("num_workers")
    if isinstance(workers, int):
        kept["num_workers"] = min(workers, os.cpu_count() or 1)  # of the machine that trained
    config = {
        "data": {**kept, **section},
        "trainer": {"devices": 1, "precision": checkpoint["precision"]},
    }
    return parser, parser.parse_args(["--config", json.dumps(config), *rest], defaults=False)
