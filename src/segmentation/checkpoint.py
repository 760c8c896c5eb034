"""Load a trained model from one file, for every job but train. Nothing in the file can run code: it holds weights and
plain values alone, and of the classes that it names only ours and the user's own are built."""

import ast
import importlib
import sys
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from enum import EnumType
from importlib.util import find_spec
from inspect import signature
from pathlib import Path
from types import MappingProxyType, NoneType, UnionType
from typing import TYPE_CHECKING, Any, Literal, Union, get_args, get_origin
from zipfile import is_zipfile

import torch
from jsonargparse import ArgumentParser
from lightning.pytorch.utilities import rank_zero_only
from torch import Tensor

from segmentation.data import Labels
from segmentation.errors import InputError
from segmentation.losses import SegmentationLoss
from segmentation.nets import SegmentationNet
from segmentation.nets.weights import read_weights

if TYPE_CHECKING:
    from segmentation.module import SegmentationModule

#: Types of arguments whose values jsonargparse reads without looking for a class, a function or a module.
PLAIN = (str, int, float, bool, NoneType, Path, Ellipsis)
CONTAINERS = (list, tuple, dict, Sequence, Mapping, Union, UnionType)

#: Arguments that fetch something from the network, and the value by which a job fetches nothing.
FETCHING = {"encoder_weights": None, "download": False}

#: Options of the module that change what a trained net says; the rest is for training.
KEPT = ("head_weights", "threshold", "boundary_iou", "channels_last")

PRECISIONS = (
    *("32-true", "64-true", "16-true", "bf16-true", "16-mixed", "bf16-mixed"),
    *("transformer-engine", "transformer-engine-float16"),
)
MOST_VALUES = 100_000  # of the hyper-parameters; a list that holds itself twice, and so on, has billions


def read_checkpoint(path: str | Path) -> dict[str, Any]:
    """The contents of a checkpoint, on the CPU. Raises InputError if there is no such file, or it is cut off, of
    another project, or holds more than weights and plain types."""
    if Path(path).is_dir():
        inside = next(filter(Path.is_file, (Path(path, "best.ckpt"), Path(path, "checkpoints/best.ckpt"))), None)
        raise InputError(f"{path}: is a folder, no checkpoint" + (f". Did you mean {inside}?" if inside else ""))
    if not Path(path).is_file():
        raise InputError(f"{path}: no such checkpoint")
    if not is_zipfile(path):
        raise InputError(f"{path}: is cut off, or no checkpoint")
    checkpoint = read_weights(path)
    size = Path(path).stat().st_size
    try:  # what the jobs need of it
        hparams, data = checkpoint["hyper_parameters"], checkpoint["datamodule_hyper_parameters"]
        _ = hparams["labels"]["names"], hparams["net"]["class_path"], data["dataset"]["class_path"]
        _ = hparams["loss"], arguments_of(hparams["net"]), arguments_of(data["dataset"])
        weights = checkpoint["state_dict"].items()
        usable = all(isinstance(key, str) and _is_weight(value, size) for key, value in weights)
        precision = checkpoint["precision"]
    except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
        raise InputError(f"{path}: is not a checkpoint of this project's train.py") from error
    if not usable or not _is_data([hparams, data, precision]):
        raise InputError(f"{path}: its hyper-parameters or weights are not those of this project's train.py")
    if precision not in PRECISIONS:
        raise InputError(f"{path}: its precision is {precision!r}, none of {', '.join(PRECISIONS)}")
    return checkpoint


def _is_weight(value: Any, size: int) -> bool:
    """Whether this is a tensor whose numbers are in a file of `size` bytes: an expanded one would fill the memory."""
    dense = isinstance(value, Tensor) and value.layout is torch.strided and not value.is_quantized
    return dense and value.device.type == "cpu" and value.nbytes <= size


def _is_data(values: list[Any]) -> bool:
    """Whether these are numbers and texts, in lists and mappings, and not too many."""
    todo, count = values, 0
    while todo and count < MOST_VALUES:
        value = todo.pop()
        inside = [*value, *value.values()] if isinstance(value, dict) else value
        if isinstance(inside, list):
            todo += inside
            count += len(inside)
        elif not isinstance(value, str | int | float | NoneType):
            return False
    return count < MOST_VALUES


@contextmanager
def blame(source: str) -> Iterator[None]:
    """One line that names the checkpoint, for whatever comes of what it holds: a class of the user's own has errors of
    its own."""
    try:
        yield
    except InputError as error:
        raise InputError(f"{source}: {error}") from error
    except Exception as error:
        reason = f"{type(error).__name__} {' '.join(str(error).split())[:300]}"
        raise InputError(f"{source}: cannot be built again ({reason}). Are its classes as they were?") from error


def load_module(
    module_class: type["SegmentationModule"], checkpoint: dict[str, Any], source: str, with_loss: bool = True
) -> "SegmentationModule":
    """The trained module of `read_checkpoint`, in eval mode: its net, labels and, unless told otherwise, loss.
    `source` is the file's name, for the error."""
    hparams, state = checkpoint["hyper_parameters"], checkpoint["state_dict"]
    options = {key: hparams[key] for key in KEPT if key in hparams}
    with blame(source), warnings.catch_warnings():
        # Net and loss are hyper-parameters here, and given as modules.
        warnings.filterwarnings("ignore", ".*(is already saved during checkpointing|removed from hparams).*")
        labels = _call(Labels, hparams["labels"])
        labels.check()
        net = build(hparams["net"], SegmentationNet)
        loss = build(hparams["loss"], SegmentationLoss) if with_loss and hparams["loss"] else None
        module = _call(module_class, {**options, "labels": labels.as_dict(), "net": net, "loss": loss})
        if not with_loss:
            state = {key: value for key, value in state.items() if not key.startswith("loss.")}
        module.load_state_dict(state)
    return module.eval()


def build(section: dict[str, Any], base: type, given: Mapping[str, Any] = MappingProxyType({})) -> Any:
    """The net, loss or data set that a section of a checkpoint describes. Arguments that are `given` come from the
    user, and count more. Raises InputError if the section names a class that it may not name."""
    cls = find_class(section["class_path"], base)
    arguments = {name: FETCHING.get(name, value) for name, value in arguments_of(section).items()}
    return _call(cls, {**{name: _built(value, base) for name, value in arguments.items()}, **given})


def arguments_of(section: dict[str, Any]) -> dict[str, Any]:
    """The arguments in a section of a checkpoint."""
    return {**(section.get("init_args") or {}), **(section.get("dict_kwargs") or {})}


def _built(value: Any, base: type) -> Any:
    """An argument, with what it holds of sections built: the terms of a sum of losses."""
    if isinstance(value, list):
        return [_built(each, base) for each in value]
    return build(value, base) if isinstance(value, dict) and "class_path" in value else value


def find_class(path: str, base: type) -> Any:
    """The class that a checkpoint names: one of ours, of a notebook, or of the user's own file, which is imported.

    Nothing else is, as the text may come from anyone: the own file must lie in the folder where the command is typed,
    be the one that Python would import by this name, and define a class of that name.

    Raises:
        InputError: it names anything else, or no subclass of `base`.
    """
    package = base.__module__.rpartition(".")[0]
    module, _, name = path.rpartition(".")
    if f"{module}.".startswith(f"{package}.") or module == "__main__":
        found = sys.modules.get(module)
    else:
        found = importlib.import_module(module) if _is_own(module, name) else None
    cls = vars(found).get(name) if found else None
    if not isinstance(cls, type) or not issubclass(cls, base):
        raise InputError(
            f"{path!r} is no {base.__name__} of {package} or of a .py file in {Path.cwd()}, and a checkpoint may name "
            "nothing else, as that could run code. Is it your own? Run the command in the folder of its file"
        )
    return cls


def _is_own(module: str, name: str) -> bool:
    """Whether a file in this folder is this module, and has a class statement for `name`."""
    file = Path.cwd() / f"{module}.py"
    spec = find_spec(module) if module.isidentifier() else None
    if spec is None or spec.origin != str(file):
        return False
    statements = ast.walk(ast.parse(file.read_bytes()))
    return any(isinstance(statement, ast.ClassDef) and statement.name == name for statement in statements)


def _call(cls: Any, arguments: dict[str, Any]) -> Any:
    """`cls(**arguments)`, where values of plain types are checked, and read as on the command line: a tuple or a path
    is a list or a text in a checkpoint. What could be a class or function to jsonargparse stays as it is."""
    types = {name: parameter.annotation for name, parameter in signature(cls).parameters.items()}
    parser = ArgumentParser(exit_on_error=False, add_help=False)
    plain = {name: value for name, value in arguments.items() if _is_plain(types.get(name))}
    for name in plain:
        parser.add_argument(f"--{name}", type=types[name])
    return cls(**{**arguments, **parser.parse_object(plain).as_dict()})


def _is_plain(annotation: Any) -> bool:
    if get_origin(annotation) in CONTAINERS:
        return all(map(_is_plain, get_args(annotation)))
    return annotation in PLAIN or get_origin(annotation) is Literal or isinstance(annotation, EnumType)


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
