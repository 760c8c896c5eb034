"""Read files that hold weights and plain values alone, of torch.save or safetensors: nothing in them can run code."""

import json
import pickle
import zipfile
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from segmentation.errors import InputError, one_line

#: The files of a model that is shared, in the names of the Hugging Face hub: weights, options, model card.
SHARED = ("model.safetensors", "config.json", "README.md")
MAX_CONFIG = 10_000_000  # bytes of config.json


def read_shared(folder: Path) -> dict:
    """The contents of a folder of share.py, in the structure of a checkpoint.

    Raises:
        InputError: a file is missing or damaged.
    """
    weights, config, _ = (folder / name for name in SHARED)
    try:
        if not config.is_file() or config.stat().st_size > MAX_CONFIG:
            raise ValueError("it is no file, or too large")
        options = json.loads(config.read_text(encoding="utf-8"))
        return {**options, "state_dict": load_file(weights)}
    except (OSError, RecursionError, SafetensorError, TypeError, ValueError) as error:
        raise InputError(f"{config}, or the weights beside it, cannot be loaded: {one_line(error)}") from error


def read_weights(path: str | Path, mapped: bool = False) -> Any:
    """The contents of a file of torch.save, on the CPU.

    Args:
        path: the file.
        mapped: leave the weights in the file until they are used. It must not be written to before.

    Raises:
        InputError: the file is cut off, holds other objects, or would unpack to more than its own size.
    """
    try:
        _check_size(Path(path))
        return torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except pickle.UnpicklingError as error:
        raise InputError(
            f"{path}: holds more than weights and plain types, or is no checkpoint; it was not loaded, as its contents "
            "could run any code"
        ) from error
    except Exception as error:  # a damaged zip, a missing key, an end too soon: many types, one remedy
        reason = f"{type(error).__name__} {one_line(error)}"
        raise InputError(f"{path}: cannot be loaded ({reason}). It is cut off, or no checkpoint") from error


def _check_size(path: Path) -> None:
    """Refuse a small file that fills the memory. torch.save compresses nothing, so the parts add up to the file."""
    if not zipfile.is_zipfile(path):  # torch.save of before 1.6 wrote no zip
        return
    packed = path.stat().st_size
    with zipfile.ZipFile(path) as archive:
        unpacked = sum(part.file_size for part in archive.infolist())
        if unpacked > packed:
            raise ValueError(f"would unpack to {unpacked / 2**20:,.1f} MiB, more than it has: torch.save packs nothing")
        # All that torch may take for the pickle: of parts of one name it reads the first, and case is nothing to it.
        pickles = [archive.read(part) for part in archive.infolist() if part.filename.lower().endswith(".pkl")]
    if any(b"\nbytearray\n" in each for each in pickles):  # the one call that torch allows whose size is a number
        raise pickle.UnpicklingError
