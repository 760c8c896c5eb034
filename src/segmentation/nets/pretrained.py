"""Encoders of segmentation-models-pytorch, with weights from a file or from the Hugging Face hub.

The library takes seconds to import, so this module is imported where it is used.
"""

from difflib import get_close_matches
from pathlib import Path

import timm
from huggingface_hub import hf_hub_download
from safetensors import SafetensorError
from safetensors.torch import load_file
from segmentation_models_pytorch.encoders import encoders, get_encoder
from torch import nn

from segmentation.errors import InputError, one_line
from segmentation.nets.weights import read_weights

IMAGENET_MEAN = [0.485, 0.456, 0.406]
IMAGENET_STD = [0.229, 0.224, 0.225]

#: What the libraries raise for an encoder or a file that does not fit.
ERRORS = (AttributeError, InputError, KeyError, RuntimeError, SafetensorError, TypeError, ValueError)


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
    options: dict = {"in_channels": in_channels, "depth": depth}
    problem = f"encoder: {name} does not give maps at strides 2, 4, 8, ..."
    if weights is not None:
        file = weights_file(name, weights)
        problem = f"encoder_weights: {file} is not for {name}"
        if of_timm:  # it adapts weights of many layouts by itself
            options |= {"weights": True, "pretrained_cfg_overlay": {"file": str(file)}}
        else:
            options["in_channels"] = 3
    try:
        if weights is not None:  # before timm reads it: other objects than tensors could run code
            state = load_file(file) if file.suffix == ".safetensors" else read_weights(file)
        encoder = get_encoder(name, **options)
        if weights is not None and not of_timm:
            encoder.load_state_dict(state)
            encoder.set_in_channels(in_channels)
    except ERRORS as error:
        raise InputError(f"{problem}: {one_line(error)}") from error
    encoder.statistics = None
    if weights is not None and in_channels == 3:  # mean and standard deviation of the images it was pretrained on
        config = pretrained_config(name, weights)
        encoder.statistics = config.get("mean", IMAGENET_MEAN), config.get("std", IMAGENET_STD)
    return encoder


def check_encoder_name(name: str) -> None:
    """Raise InputError, with the names that are nearest, if there is no such encoder."""
    if name in encoders or (name.startswith("tu-") and timm.is_model(name.removeprefix("tu-").split(".")[0])):
        return
    names = [*encoders, *(f"tu-{model}" for model in timm.list_models())]
    close = get_close_matches(name, names, n=3)
    raise InputError(f"encoder: segmentation-models-pytorch has no {name}; near to it: {', '.join(close) or 'none'}")


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
    repository = config.get("repo_id")
    if not repository:
        known = encoders.get(name, {}).get("pretrained_settings", {})
        raise InputError(f"encoder_weights: {name} has no {weights}; choose {', '.join([*known, 'a file, or null'])}")
    try:
        file = hf_hub_download(
            repository,
            "model.safetensors",
            revision=config.get("revision"),
            local_files_only=not download,
        )
    except Exception as error:  # each library on the way has its own errors for "no network"
        raise InputError(
            f"encoder_weights: {weights} of {name} are not on this machine, and were not fetched "
            f"({type(error).__name__}). Where there is internet, run src/doctor.py with your options and --prefetch; "
            f"or give encoder_weights the file, of https://huggingface.co/{repository}"
        ) from error
    return Path(file)


def pretrained_config(name: str, weights: str) -> dict:
    """What the library knows of weights by name: repository, revision, and mean and std of their images."""
    if not name.startswith("tu-"):
        return encoders[name]["pretrained_settings"].get(weights, {})
    config = timm.get_pretrained_cfg(name.removeprefix("tu-"))
    return {"repo_id": config.hf_hub_id, "mean": config.mean, "std": config.std} if config else {}
