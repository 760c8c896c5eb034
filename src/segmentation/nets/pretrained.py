"""Encoders of segmentation-models-pytorch, with weights from a file or from the Hugging Face hub.

The library takes seconds to import, so this module is imported where it is used.
"""

from difflib import get_close_matches
from pathlib import Path
from typing import Any

import timm
from huggingface_hub import hf_hub_download
from safetensors import SafetensorError
from safetensors.torch import load_file
from segmentation_models_pytorch.encoders import encoders, get_encoder
from torch import nn

from segmentation.errors import InputError
from segmentation.nets.weights import read_weights

IMAGENET_MEAN = [0.485, 0.456, 0.406]
IMAGENET_STD = [0.229, 0.224, 0.225]


def library_encoder(name: str, in_channels: int, depth: int, weights: str | None) -> nn.Module:
    """An encoder of segmentation-models-pytorch that gives maps at strides 1, 2, ..., 2^depth or deeper.

    Args:
        name: `resnet34`, or `tu-` and a name of timm's, `tu-convnext_tiny`.
        in_channels: channels of the image; the first convolution of pretrained weights is adapted to them.
        depth: 1..5; some encoders want 3 at least.
        weights: null for random ones; a file (.safetensors, .pth); or a name: `imagenet` or another that the library
            has for this encoder (for `tu-` any name stands for the one that timm has), of the Hugging Face hub.

    Raises:
        InputError: there is no such encoder, no such weights, or no way to fetch them; says what to do.
    """
    check_encoder_name(name)
    of_timm = name.startswith("tu-")
    try:
        encoder = get_encoder(name, in_channels if of_timm or weights is None else 3, depth, weights=None)
    except (AttributeError, RuntimeError, TypeError, ValueError) as error:
        raise InputError(f"encoder: {name} does not give maps at strides 2, 4, 8, ... ({error})") from error
    encoder.statistics = None
    if weights is None:
        return encoder
    file = weights_file(name, weights)
    state = read_tensors(file)
    try:
        if of_timm:  # it adapts weights of many layouts itself
            source = {"file": str(file)}
            encoder = get_encoder(name, in_channels, depth, weights=True, pretrained_cfg_overlay=source)
        else:
            encoder.load_state_dict(state)
            encoder.set_in_channels(in_channels, pretrained=True)
    except (AttributeError, KeyError, RuntimeError, TypeError, ValueError) as error:
        reason = " ".join(str(error).split())[:300]
        raise InputError(f"encoder_weights: {file} is not for {name}: {reason}") from error
    encoder.statistics = image_statistics(name, weights) if in_channels == 3 else None
    return encoder


def check_encoder_name(name: str) -> None:
    """Raise InputError, with the names that are nearest, if there is no such encoder."""
    if name in encoders:
        return
    if name.startswith("tu-") and timm.is_model(name.removeprefix("tu-").split(".")[0]):
        return
    names = [*encoders, *(f"tu-{model}" for model in timm.list_models())]
    close = get_close_matches(name, names, n=3)
    hint = f"did you mean {' or '.join(close)}?" if close else "see segmentation-models-pytorch's list of encoders"
    raise InputError(f"encoder: there is no {name}; {hint}")


def weights_file(name: str, weights: str, download: bool = True) -> Path:
    """The file of an encoder's weights: the one that `weights` names, or the Hugging Face hub's, from its cache.

    Raises:
        InputError: there is no such file or name, or it is not in the cache and was not downloaded.
    """
    given = Path(weights).expanduser()
    if given.suffix in (".safetensors", ".pth", ".pt", ".bin"):
        if not given.is_file():
            raise InputError(f"encoder_weights: there is no file {given}")
        return given
    config = pretrained_config(name, weights)
    if not config.get("repo_id"):
        choices = "" if name.startswith("tu-") else f"{', '.join(encoders[name]['pretrained_settings'])}, "
        raise InputError(f"encoder_weights: {name} has no {weights}; choose {choices}a file, or null")
    try:
        file = hf_hub_download(
            config["repo_id"],
            "model.safetensors",
            revision=config.get("revision"),
            local_files_only=not download,
        )
    except Exception as error:  # each library on the way has its own errors for "no network"
        raise InputError(
            f"encoder_weights: {weights} of {name} are not on this machine, and were not fetched "
            f"({type(error).__name__}). Where there is internet, run src/doctor.py with your options and --prefetch; "
            f"or give encoder_weights the file, of https://huggingface.co/{config['repo_id']}"
        ) from error
    return Path(file)


def read_tensors(file: Path) -> Any:
    """What a file of weights holds: tensors by name. No other objects are read, which could run code."""
    try:
        return load_file(file) if file.suffix == ".safetensors" else read_weights(file)
    except (InputError, SafetensorError) as error:
        raise InputError(f"encoder_weights: {file} cannot be used: {error}. Give a file of tensors alone") from error


def pretrained_config(name: str, weights: str) -> dict[str, Any]:
    """What the library knows of weights by name: repository, revision, and mean, std, input_range of their images."""
    if not name.startswith("tu-"):
        return encoders[name]["pretrained_settings"].get(weights, {})
    config = timm.get_pretrained_cfg(name.removeprefix("tu-"))
    return {"repo_id": config.hf_hub_id, "mean": config.mean, "std": config.std} if config else {}


def image_statistics(name: str, weights: str) -> tuple[list[float], list[float]]:
    """Mean and standard deviation, in 0..1, of the images that an encoder was pretrained on."""
    config = pretrained_config(name, weights)
    if not config and not name.startswith("tu-"):  # a file: as the library's first weights
        config = next(iter(encoders[name]["pretrained_settings"].values()), {})
    top = max(config.get("input_range") or [1])  # 255 for some
    mean = [value / top for value in config.get("mean") or IMAGENET_MEAN]
    std = [value / top for value in config.get("std") or IMAGENET_STD]
    return mean, std
