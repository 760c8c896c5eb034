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
    """The contents of a checkpoint of this project, on the CPU.

    Raises:
        InputError: no such file, cut off, of another project, or holding more than weights and plain types.
    """
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
    except Exception as error:  # a damaged zip, an unpickling error, a refused class: many types, one remedy
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise InputError(
            f"{path}: cannot be loaded as a checkpoint ({reason[:160]}). It is cut off, or not one of this project's"
        ) from error
    if not _is_ours(checkpoint):
        raise InputError(f"{path}: is not a checkpoint of this project's train.py")
    return checkpoint


def _is_ours(checkpoint: Any) -> bool:
    def has(found: Any, **kinds: type) -> bool:
        return isinstance(found, dict) and all(isinstance(found.get(key), kind) for key, kind in kinds.items())

    return (
        has(checkpoint, hyper_parameters=dict, state_dict=dict, datamodule_hyper_parameters=dict, precision=str)
        and has(checkpoint["hyper_parameters"], labels=dict, net=dict)
        and has(checkpoint["datamodule_hyper_parameters"], dataset=dict)
    )


def load_module(checkpoint: dict[str, Any], source: str) -> "SegmentationModule":
    """The trained module of `read_checkpoint`, in eval mode.

    Args:
        checkpoint: its contents.
        source: the file's name, for the error.
    """
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
            f"{source}: its net, {hparams['net'].get('class_path')}, cannot be built again: {reason}. "
            "Is its class importable, and unchanged since training?"
        ) from error
    return module.eval()


def warm_start(module: "SegmentationModule", path: str) -> None:
    """Take the weights of another run's net that fit this one by name and shape, and say what did not.

    Raises:
        InputError: nothing fits.
    """
    saved = {k.removeprefix("net."): v for k, v in read_checkpoint(path)["state_dict"].items() if k.startswith("net.")}
    own = module.net.state_dict()
    fits = {key: value for key, value in saved.items() if key in own and own[key].shape == value.shape}
    if not fits:
        raise InputError(f"model.init_from {path}: none of its weights fits {type(module.net).__name__}")
    module.net.load_state_dict(fits, strict=False)
    fresh = [f"{key} {tuple(value.shape)}" for key, value in own.items() if key not in fits]
    unused = [f"{key} {tuple(value.shape)}" for key, value in saved.items() if key not in fits]
    if rank_zero_only.rank == 0:
        print(f"start     {path}: took {len(fits)} of {len(own)} tensors")
        for what, names in (("afresh, as nothing fits", fresh), ("left behind", unused)):
            if names:
                print(f"          {what}: {', '.join(names[:6])}{' ...' if len(names) > 6 else ''}")
