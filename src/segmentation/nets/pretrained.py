"""Encoders of segmentation-models-pytorch with their weights: from a file, from a known folder, or fetched once.

The library takes seconds to import, so this module is imported where it is used.
"""

from difflib import get_close_matches
from pathlib import Path
from typing import Any

import timm
import torch
from huggingface_hub import hf_hub_download, hf_hub_url, try_to_load_from_cache
from safetensors import SafetensorError
from safetensors.torch import load_file
from segmentation_models_pytorch.encoders import encoders, get_encoder
from torch import nn

from segmentation.errors import InputError
from segmentation.nets.weights import read_weights

#: What weights are called in a repository of the Hugging Face hub.
FILE = "model.safetensors"

#: Mean and standard deviation of ImageNet's bands, in 0..1.
IMAGENET = ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])


def library_encoder(name: str, in_channels: int, depth: int, weights: str | None) -> nn.Module:
    """An encoder of segmentation-models-pytorch that gives maps at strides 1, 2, ..., 2^depth or deeper.

    Args:
        name: `resnet34`, or `tu-` and a name of timm's, `tu-convnext_tiny`.
        in_channels: bands of the image; the first convolution of pretrained weights is adapted to them.
        depth: 1..5; some encoders want 3 at least.
        weights: null for random ones; a file (.safetensors, .pth); or a name: `imagenet` or another that the library
            has for this encoder (for `tu-` any name stands for the one that timm has). Weights by name are looked for
            in the folder `place` says, then fetched from the Hugging Face hub, or its cache.

    Raises:
        InputError: there is no such encoder, no such weights, or no way to fetch them; says what to do.
    """
    check_name(name)
    of_timm = name.startswith("tu-")
    encoder = _built(name, in_channels if of_timm or weights is None else 3, depth)
    if weights is not None:
        file = cached(name, weights) or _fetched(name, weights)
        state = _read(file)
        try:
            if of_timm:  # it knows how to fit weights to the bands
                source = {"file": str(file)}
                encoder = get_encoder(name, in_channels, depth, weights=True, pretrained_cfg_overlay=source)
            else:
                encoder.load_state_dict(state)
                encoder.set_in_channels(in_channels, pretrained=True)
        except (AttributeError, KeyError, RuntimeError, TypeError, ValueError) as error:
            reason = " ".join(str(error).split())[:300]
            raise InputError(f"encoder_weights: {file} is not for {name}: {reason}") from error
    #: Mean and standard deviation of the images it was pretrained on, as it wants ours; None for random weights.
    encoder.statistics = None
    if weights is not None and in_channels == 3:
        settings = {} if name.startswith("tu-") else encoders[name]["pretrained_settings"]
        known = _known(name, weights) or next(iter(settings.values()), {})
        top = max(known.get("input_range") or [1])  # of some, 0..255
        mean, std = known.get("mean") or IMAGENET[0], known.get("std") or IMAGENET[1]
        encoder.statistics = [float(value) / top for value in mean], [float(value) / top for value in std]
    return encoder


def _read(file: Path) -> Any:
    """What a file of weights holds: tensors by name. No other objects are read, which could run code."""
    try:
        return load_file(file) if file.suffix == ".safetensors" else read_weights(file)
    except (InputError, SafetensorError) as error:
        raise InputError(f"encoder_weights: {file} cannot be used: {error}. Give a file of tensors alone") from error


def check_name(name: str) -> None:
    """Raise InputError, with the names that are nearest, if there is no such encoder."""
    if name in encoders or (name.startswith("tu-") and timm.is_model(name.removeprefix("tu-").split(".")[0])):
        return
    close = get_close_matches(name, [*encoders, *(f"tu-{model}" for model in timm.list_models())], n=3)
    hint = f"did you mean {' or '.join(close)}?" if close else "see segmentation-models-pytorch's list of encoders"
    raise InputError(f"encoder: there is no {name}; {hint}")


def place(name: str, weights: str) -> Path:
    """Where weights by name are looked for first: torch's folder for downloads (see TORCH_HOME)."""
    return Path(torch.hub.get_dir()) / "checkpoints" / f"{name}.{weights}.safetensors"


def cached(name: str, weights: str) -> Path | None:
    """The file of weights, if it is here: the one that they name, or in `place`, or in the Hugging Face hub's cache."""
    given, placed = Path(weights).expanduser(), place(name, weights)
    if given.suffix in (".safetensors", ".pth", ".pt", ".bin"):
        if not given.is_file():
            raise InputError(f"encoder_weights: there is no file {given}")
        return given
    if placed.is_file():
        return placed
    known = _known(name, weights)
    found = known.get("repo_id") and try_to_load_from_cache(known["repo_id"], FILE, revision=known.get("revision"))
    return Path(found) if isinstance(found, str) else None


def _known(name: str, weights: str) -> dict[str, Any]:
    """What the library knows of weights by name, where it has such: repo_id (the Hugging Face hub's repository) and
    revision; mean, std and input_range of their images."""
    if not name.startswith("tu-"):
        return encoders[name]["pretrained_settings"].get(weights, {})
    config = timm.get_pretrained_cfg(name.removeprefix("tu-"))
    return {"repo_id": config.hf_hub_id, "mean": config.mean, "std": config.std} if config else {}


def _fetched(name: str, weights: str) -> Path:
    """The file of weights by name, fetched."""
    known = _known(name, weights)
    source: dict[str, Any] = {"repo_id": known.get("repo_id"), "filename": FILE, "revision": known.get("revision")}
    if not source["repo_id"]:
        choices = "" if name.startswith("tu-") else f"{', '.join(encoders[name]['pretrained_settings'])}, "
        raise InputError(f"encoder_weights: {name} has no {weights}; choose {choices}a file, or null")
    try:
        return Path(hf_hub_download(**source))
    except Exception as error:  # each library on the way has its own errors for "no network"
        raise InputError(
            f"encoder_weights: {weights} for {name} could not be fetched ({type(error).__name__}). Where there is "
            f"internet, download {hf_hub_url(**source)} and put it here as {place(name, weights)}, or name the file in "
            "encoder_weights"
        ) from error


def _built(name: str, in_channels: int, depth: int) -> Any:
    try:
        return get_encoder(name, in_channels, depth, weights=None)
    except (AttributeError, RuntimeError, TypeError, ValueError) as error:
        raise InputError(f"encoder: {name} does not give maps at strides 2, 4, 8, ... ({error})") from error
