"""The data that a checkpoint was trained on, or an overlay's in its place, for the jobs that measure."""

import argparse
import json
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from jsonargparse import ActionConfigFile, Namespace
from lightning.pytorch import Trainer
from lightning.pytorch.utilities import rank_zero_only

from segmentation.checkpoint import blame, build, find_class, load_module, read_checkpoint
from segmentation.data import Labels, SegmentationData, SegmentationDataModule
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
    trainer: dict[str, Any]  # options of the trainer


def open_trained(job: str, options: argparse.Namespace, rest: list[str], split: str | None = None) -> Trained:
    """A checkpoint with its data, or that of an overlay (`options.data`), on which options of data and trainer from the
    command line (`rest`) count. `split` is the one to be tested; None: the data set's own. Raises InputError if there
    is no such split, or the data set is not like the one that was trained on."""
    check_meeting_place()
    checkpoint = read_checkpoint(options.checkpoint)
    module = load_module(SegmentationModule, checkpoint, options.checkpoint, with_loss=job == "eval")
    parser, config = _configure(job, checkpoint, options, rest)
    try:
        chosen = parser.instantiate_classes(config).data
        if not isinstance(chosen.get("dataset"), SegmentationData):
            saved = checkpoint["datamodule_hyper_parameters"]["dataset"]
            with blame(options.checkpoint):
                chosen.dataset = build(saved, SegmentationData, dict(chosen.get("dataset", {})))
        data = SegmentationDataModule(**chosen)
        data.test_split = split or data.test_split
        if not data.dataset.names(data.test_split):
            raise InputError(f"there is no {data.test_split} split in this data set: choose another --split")
        if not _alike(module.labels, data.labels):
            raise InputError(
                f"{options.checkpoint} was trained on {_described(module.labels)}, but this data has "
                f"{_described(data.labels)}"
            )
        rank_zero_only(data.check)([data.test_split])
    except InputError as error:
        if options.data:
            raise
        raise InputError(f"{error} (the data is as in training; --data OVERLAY gives another)") from error
    fixed = {"use_distributed_sampler": False, "enable_model_summary": False, "enable_checkpointing": False}
    return Trained(module, data, {**config.trainer, **fixed, "logger": False})


def _configure(
    job: str, checkpoint: dict[str, Any], options: argparse.Namespace, rest: list[str]
) -> tuple[Parser, Namespace]:
    """Options of data and trainer: of the checkpoint, then the overlay, then the command line. Of the checkpoint's data
    set there is nothing in them: the parser would import whatever class, function or module its arguments name."""
    parser = Parser(usage=f"python src/{job}.py CHECKPOINT [--any.option value]", allow_abbrev=False)
    parser.add_argument("--config", action=ActionConfigFile)
    typed: dict[str, Any] = {"fail_untyped": False, "instantiate": False, "sub_configs": True}
    parser.add_class_arguments(SegmentationDataModule, "data", skip={"dataset"}, **typed)
    parser.add_class_arguments(Trainer, "trainer", skip=OURS | {"callbacks", "enable_checkpointing"}, **typed)
    saved = checkpoint["datamodule_hyper_parameters"]
    section, overlay = {}, options.data
    if overlay:
        try:
            section = dict(yaml.safe_load(Path(overlay).read_text(encoding="utf-8"))["data"])
        except (OSError, yaml.YAMLError, KeyError, TypeError, ValueError) as error:
            raise InputError(
                f"{overlay}: is no overlay with a data section, like configs/data/*.yaml: {error}"
            ) from error
    words = {word.partition("=")[0] for word in rest}
    if "dataset" in section or words & {"--data.dataset", "--data.dataset.class_path"}:
        parser.add_subclass_arguments(SegmentationData, "data.dataset", fail_untyped=False)
    else:
        with blame(options.checkpoint):
            own = find_class(saved["dataset"]["class_path"], SegmentationData)
        parser.add_class_arguments(own, "data.dataset", **typed)
        parser.require_nothing()
    kept = {key: saved[key] for key in KEPT if saved.get(key) is not None}
    layers = ({"data": kept, "trainer": {"devices": 1, "precision": checkpoint["precision"]}}, {"data": section})
    args = [word for layer in layers for word in ("--config", json.dumps(layer))]
    return parser, parser.parse_args([*args, *rest], defaults=False)


def _alike(trained: Labels, given: Labels) -> bool:
    same = ("names", "channels", "scale", *(["dtype"] if trained.dtype else []))
    return all(getattr(trained, what) == getattr(given, what) for what in same)


def _described(labels: Labels) -> str:
    pixels = f"{labels.channels} bands ({labels.dtype or 'any type'}, scale {labels.scale})"
    return f"images of {pixels} and the classes {', '.join(labels.names)}"
