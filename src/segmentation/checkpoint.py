"""Load a trained model from one file, for every job but train. Nothing in the file can run code (`weights_only`)."""

import argparse
import pickle
import warnings
from copy import deepcopy
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch.cli import instantiate_module
from lightning.pytorch.utilities import rank_zero_only

from segmentation.errors import InputError

if TYPE_CHECKING:
    from segmentation.module import SegmentationModule


def read_checkpoint(path: str | Path) -> dict[str, Any]:
    """The contents of a checkpoint, on the CPU. Raises InputError if there is no such file, or it is cut off, of
    another project, or holds more than weights and plain types."""
    if Path(path).is_dir():
        inside = next(filter(Path.is_file, (Path(path, "best.ckpt"), Path(path, "checkpoints/best.ckpt"))), None)
        raise InputError(f"{path}: is a folder, no checkpoint" + (f". Did you mean {inside}?" if inside else ""))
    if not Path(path).is_file():
        raise InputError(f"{path}: no such checkpoint")
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise InputError(
            f"{path}: holds more than weights and plain types, or is no checkpoint; it was not loaded, as its contents "
            "could run any code"
        ) from error
    except Exception as error:  # a damaged zip, a missing key, an end too soon: many types, one remedy
        reason = f"{type(error).__name__} {' '.join(str(error).split())[:160]}"
        raise InputError(f"{path}: cannot be loaded ({reason}). It is cut off, or no checkpoint") from error
    try:  # what the jobs need of it
        hparams, data = checkpoint["hyper_parameters"], checkpoint["datamodule_hyper_parameters"]
        _ = hparams["labels"]["names"], hparams["net"]["class_path"], data["dataset"]["class_path"]
        _ = checkpoint["state_dict"], checkpoint["precision"]
    except (KeyError, TypeError) as error:
        raise InputError(f"{path}: is not a checkpoint of this project's train.py") from error
    return checkpoint


def load_module(checkpoint: dict[str, Any], source: str) -> "SegmentationModule":
    """The trained module of `read_checkpoint`, in eval mode; `source` is the file's name, for the error."""
    from segmentation.module import SegmentationModule

    hparams = deepcopy({key: value for key, value in checkpoint["hyper_parameters"].items() if key != "_instantiator"})
    hparams["compile"] = False
    try:
        with warnings.catch_warnings():  # net and loss are hyper-parameters here, and given as modules
            warnings.filterwarnings("ignore", ".*is already saved during checkpointing.*")
            module = instantiate_module(SegmentationModule, hparams)
        module.load_state_dict(checkpoint["state_dict"])
    except (argparse.ArgumentError, ImportError, ValueError, RuntimeError, TypeError) as error:
        reason = " ".join(str(error).split())
        raise InputError(
            f"{source}: its net, {hparams['net']['class_path']}, cannot be built again: {reason}. "
            "Is its class importable, and unchanged since training?"
        ) from error
    return module.eval()


def warm_start(module: "SegmentationModule", path: str) -> None:
    """Take the weights of another run's net that fit by name and shape, and say what did not. Raises InputError if
    nothing fits."""
    saved = {k.removeprefix("net."): v for k, v in read_checkpoint(path)["state_dict"].items() if k.startswith("net.")}
    own = module.net.state_dict()
    fits = {key: value for key, value in saved.items() if key in own and own[key].shape == value.shape}
    if not fits:
        raise InputError(f"model.init_from {path}: none of its weights fits {type(module.net).__name__}")
    module.net.load_state_dict(fits, strict=False)
    say = rank_zero_only(print)
    say(f"start     {path}: took {len(fits)} of {len(own)} tensors")
    for what, tensors in (("afresh, as nothing fits", own), ("left behind", saved)):
        names = [f"{key} {tuple(value.shape)}" for key, value in tensors.items() if key not in fits]
        if names:
            say(f"          {what}: {', '.join(names[:6])}{' ...' if len(names) > 6 else ''}")
