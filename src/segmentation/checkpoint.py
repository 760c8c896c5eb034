"""Load a trained model from one file, or from a folder of share.py, for every job.

Nothing in them can run code: they hold weights and plain values, and a class that they name is built only if it is
one of this project, of a notebook, or of the user's own file.
"""

import ast
import importlib
import json
import sys
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from enum import EnumType
from importlib.util import find_spec
from inspect import signature
from pathlib import Path
from shlex import quote
from types import NoneType, UnionType
from typing import Any, Literal, TypeVar, Union, get_args, get_origin
from zipfile import is_zipfile

import torch
from jsonargparse import ArgumentParser
from lightning.pytorch import LightningModule
from lightning.pytorch.utilities import rank_zero_only
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from segmentation.data import Labels
from segmentation.errors import InputError, one_line
from segmentation.losses import SegmentationLoss
from segmentation.nets import SegmentationNet
from segmentation.nets.weights import SHARED, read_shared, read_weights

Module = TypeVar("Module", bound=LightningModule)

#: What a checkpoint, or a section of it, holds by name.
Values = dict[str, Any]

#: Types of arguments that jsonargparse reads without importing anything.
PLAIN = (str, int, float, bool, NoneType, Path, Ellipsis)
CONTAINERS = (list, tuple, dict, Sequence, Mapping, Union, UnionType)

#: Arguments that would download something, and the value that prevents it.
DOWNLOADS = {"encoder_weights": None, "download": False}

#: Options of the module that a trained net needs. The others are for training.
KEPT = ("head_weights", "threshold", "boundary_iou", "surface_distances", "channels_last")

PRECISIONS = (
    "32-true",
    "64-true",
    "16-true",
    "bf16-true",
    "16-mixed",
    "bf16-mixed",
    "transformer-engine",
    "transformer-engine-float16",
)

#: Options of more parts than this (a comma is one) are an attack: nested references to one list can unfold to billions.
MAX_VALUES = 80_000
MAX_LENGTH = 10_000_000

#: How the name of a model on the Hugging Face hub begins.
HUB = "hf://"


def weights_of(path: str | Path) -> Path:
    """The file that holds a checkpoint's weights.

    Args:
        path: a .ckpt file; a folder of share.py; or `hf://user/name`, perhaps with `@revision`, of the Hugging Face
            hub, from which it is fetched unless it is in the library's cache.

    Raises:
        InputError: the hub does not have it, or cannot be reached.
    """
    if str(path).startswith(HUB):
        from huggingface_hub import snapshot_download

        name, _, revision = str(path).removeprefix(HUB).partition("@")
        try:
            path = snapshot_download(name, revision=revision or None, allow_patterns=list(SHARED))
        except Exception as error:  # each library on the way has its own errors for "no network"
            reason = f"{type(error).__name__} {one_line(error)}"
            raise InputError(
                f"{path}: was not fetched ({reason}). Is the name right? For a private one: hf auth login"
            ) from error
    path = Path(path)
    return path / SHARED[0] if path.is_dir() else path


def results_of(path: str) -> Path:
    """Where results go unless told: beside the checkpoint, under its name; of one on the hub, in this folder."""
    if path.startswith(HUB):
        path = path.rpartition("/")[2].partition("@")[0]
    return Path(path).with_suffix("")


def read_checkpoint(path: str | Path, mapped: bool = False) -> Values:
    """Read a checkpoint of train.py, or what share.py made of one, to the CPU.

    Args:
        path: as `weights_of` takes it.
        mapped: as in `read_weights`; what training kept for itself is then never read.

    Raises:
        InputError: it is missing, cut off, of another project, or holds more than weights and plain values.
    """
    file = weights_of(path)
    if not file.is_file():
        raise InputError(
            f"{path}: no such checkpoint. Give a file, e.g. runs/NAME/checkpoints/best.ckpt, or a folder of share.py"
        )
    if file.name == SHARED[0]:
        checkpoint = read_shared(file.parent)
    elif is_zipfile(file):
        checkpoint = read_weights(path, mapped)
    else:
        raise InputError(f"{path}: is cut off, or no checkpoint")
    try:
        hparams = checkpoint["hyper_parameters"]
        data = checkpoint["datamodule_hyper_parameters"]
        precision = checkpoint["precision"]
        _check_plain([hparams, data, precision, checkpoint.get("calibration"), checkpoint.get("evaluation")])
        arguments_of(data["dataset"])
        _check_weights(checkpoint["state_dict"], file.stat().st_size)
    except (AttributeError, LookupError, RecursionError, TypeError, ValueError) as error:
        raise InputError(f"{path}: is not a checkpoint of this project's train.py") from error
    if precision not in PRECISIONS:
        raise InputError(f"{path}: its precision is {precision!r}, none of {', '.join(PRECISIONS)}")
    return checkpoint


def _check_plain(values: Any) -> None:
    """Raise unless the values are numbers and texts, in lists and dicts: what JSON can hold."""
    length = 0
    for number, text in enumerate(json.JSONEncoder().iterencode(values)):
        length += len(text)  # a long text may be referred to many times
        if number > MAX_VALUES or length > MAX_LENGTH:
            raise ValueError("too many values")


def _check_weights(weights: Values, size: int) -> None:
    """Raise unless the weights are dense tensors that together take little more than the `size` bytes of their file.

    An expanded one would fill the memory, and so would one that is there many times.
    """
    total = 0
    for name, weight in weights.items():
        dense = isinstance(weight, Tensor) and weight.layout is torch.strided and not weight.is_quantized
        if not dense or weight.device.type != "cpu":
            raise ValueError(f"{name} is no weight")
        total += weight.nbytes
    if total > 4 * size:  # not 1: the file holds weights once that layers share
        raise ValueError("they are larger than the file")


@contextmanager
def blame(source: str) -> Iterator[None]:
    """Turn every error into an InputError that names the checkpoint.

    Classes of users raise errors of any type.

    Args:
        source: the checkpoint.
    """
    try:
        yield
    except InputError as error:
        raise InputError(f"{source}: {error}") from error
    except Exception as error:
        kind = type(error).__name__
        raise InputError(
            f"{source}: cannot be built again ({kind}: {one_line(error)}). Are its classes as they were?"
        ) from error


def load_module(
    module_class: type[Module],
    checkpoint: Values,
    source: str,
    with_loss: bool = True,
) -> Module:
    """Build the trained module, in eval mode, from what `read_checkpoint` returned.

    Args:
        module_class: SegmentationModule.
        checkpoint: contents of the file.
        source: name of the file, for errors.
        with_loss: whether to build the loss too.
    """
    hparams = checkpoint["hyper_parameters"]
    state = checkpoint["state_dict"]
    with blame(source), warnings.catch_warnings():
        # Lightning warns that net and loss are both modules and hyper-parameters.
        warnings.simplefilter("ignore", UserWarning)
        labels = _call(Labels, hparams["labels"])
        labels.check()
        arguments = {key: hparams[key] for key in KEPT if key in hparams}
        arguments["labels"] = labels.as_dict()
        _check_net(hparams["net"], state)
        arguments["net"] = build(hparams["net"], SegmentationNet)
        if not with_loss:
            state = {key: weight for key, weight in state.items() if not key.startswith("loss.")}
        elif hparams["loss"]:
            arguments["loss"] = build(hparams["loss"], SegmentationLoss)
        module = _call(module_class, arguments)
        # Lightning keeps a copy of its arguments: of the net's weights, too.
        module.save_hyperparameters({"labels": arguments["labels"]}, ignore=["net", "loss"], logger=False)
        module.load_state_dict(state)
        if checkpoint.get("calibration"):
            module.set_calibration(checkpoint["calibration"])
    return module.eval()


class NumbersInMemory(TorchFunctionMode):
    """Under `torch.device("meta")`, keep in memory what mit encoders read back as numbers."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if function is torch.linspace:
            kwargs["device"] = "cpu"
        return function(*args, **kwargs)


def _check_net(section: Values, state: Values) -> None:
    """Load the weights into a net without memory. Options may say any width, and torch raises where shapes differ."""
    if not section["class_path"].startswith(f"{__package__}."):
        return  # a net of the user's own may compute with values while it is built
    with torch.device("meta"), NumbersInMemory():
        net = build(section, SegmentationNet)
    weights = {key.removeprefix("net."): weight for key, weight in state.items() if key.startswith("net.")}
    net.load_state_dict(weights, assign=True)


def build(section: Values, base: type, given: Values | None = None) -> Any:
    """Build the net, loss or data set of a checkpoint's section, without downloads.

    Args:
        section: `class_path`, `init_args` and `dict_kwargs`, as jsonargparse writes them.
        base: class that it must be a subclass of.
        given: arguments of the user, which win.
    """
    arguments = {name: _built(value, base) for name, value in arguments_of(section).items()}
    for name, value in DOWNLOADS.items():
        if name in arguments:
            arguments[name] = value
    cls = find_class(section["class_path"], base)
    return _call(cls, arguments | (given or {}))


def arguments_of(section: Values) -> Values:
    """The arguments in a section of a checkpoint."""
    return {**(section.get("init_args") or {}), **(section.get("dict_kwargs") or {})}


def _built(value: Any, base: type) -> Any:
    """An argument with its own sections built.

    A sum of losses has them.
    """
    if isinstance(value, list):
        return [_built(each, base) for each in value]
    if isinstance(value, dict) and "class_path" in value:
        return build(value, base)
    return value


def find_class(path: str, base: type) -> Any:
    """The class that a checkpoint names.

    Anyone may have written the name. So an import is allowed only of a file that lies in the working directory, is what
    Python imports by this name, and defines the class.

    Raises:
        InputError: the path names anything else, or no subclass of `base`.
    """
    package = base.__module__.rpartition(".")[0]
    module, _, name = path.rpartition(".")
    found = None
    if f"{module}.".startswith(f"{package}.") or module == "__main__":
        found = sys.modules.get(module)
    elif _is_own(module, name):
        found = importlib.import_module(module)
    cls = getattr(found, "__dict__", {}).get(name)
    if not isinstance(cls, type) or not issubclass(cls, base):
        raise InputError(
            f"{path!r} is no {base.__name__} of {package} or of a .py file in {Path.cwd()}, and a checkpoint may name "
            "nothing else, as that could run code. Is it your own? Run the command in the folder of its file"
        )
    return cls


def _is_own(module: str, name: str) -> bool:
    """Whether a file in the working directory is this module, and has a class statement for `name`."""
    file = Path.cwd() / f"{module}.py"
    spec = find_spec(module) if module.isidentifier() else None
    if spec is None or spec.origin != str(file):
        return False
    tree = ast.parse(file.read_bytes())
    classes = [node.name for node in ast.walk(tree) if isinstance(node, ast.ClassDef)]
    return name in classes


def _call(cls: Any, arguments: Values) -> Any:
    """`cls(**arguments)`, where jsonargparse checks and converts values of plain types, as on the command line.

    A checkpoint holds a tuple as a list, and a path as a text. Texts are read as JSON: a short one in YAML may refer to
    its own parts so often that it fills the memory.
    """
    parser = ArgumentParser(exit_on_error=False, add_help=False, parser_mode="json")
    plain = {}
    for name, parameter in signature(cls).parameters.items():
        if name in arguments and _is_plain(parameter.annotation):
            parser.add_argument(f"--{name}", type=parameter.annotation)
            plain[name] = arguments[name]
    checked = parser.parse_object(plain)
    return cls(**(arguments | checked.as_dict()))


def _is_plain(annotation: Any) -> bool:
    """Whether jsonargparse reads a value of this type without importing anything."""
    origin = get_origin(annotation)
    if origin in CONTAINERS:
        return all(map(_is_plain, get_args(annotation)))
    return annotation in PLAIN or origin is Literal or isinstance(annotation, EnumType)


def warm_start(net: nn.Module, path: str) -> None:
    """Load the weights of another run's net that fit by name and shape. Raises InputError as `fitting_weights` does."""
    own = net.state_dict()
    fitting = fitting_weights(net, path)
    net.load_state_dict(fitting, strict=False)
    new = ", ".join(name for name in own if name not in fitting) or "none"
    rank_zero_only(print)(f"start     {path}: took {len(fitting)} of {len(own)} tensors; newly initialised: {new}")


def fitting_weights(net: nn.Module, path: str) -> dict[str, Tensor]:
    """The weights of a checkpoint that fit a net by name and shape.

    Raises:
        InputError: less than half of the net's tensors are there; the message holds the options of the other net.
    """
    checkpoint = read_checkpoint(path)
    saved = checkpoint["state_dict"]
    own = net.state_dict()
    fitting = {}
    for name, weight in own.items():
        given = saved.get(f"net.{name}")
        if given is not None and given.shape == weight.shape:
            fitting[name] = given
    if 2 * len(fitting) < len(own):
        options = net_options(checkpoint)
        raise InputError(
            f"model.init_from {path}: it has only {len(fitting)} of the {len(own)} tensors of this net. Fix: give the "
            f"net the options of the other: {one_line(options)}"
        )
    return fitting


def net_options(checkpoint: Values) -> str:
    """The options of train.py that give a checkpoint's net, where they differ from the defaults of its class."""
    section = checkpoint["hyper_parameters"]["net"]
    cls = find_class(section["class_path"], SegmentationNet)
    parameters = signature(cls).parameters
    words = [f"--model.net {cls.__name__}"]
    for option, value in arguments_of(section).items():
        default = parameters[option].default if option in parameters else None
        follows_from_data = option in ("in_channels", "num_classes")
        if not follows_from_data and json.dumps(value) != json.dumps(default):
            words.append(f"--model.net.{option} {quote(json.dumps(value))}")
    return " ".join(words)
