"""The command line's parser: an error is one line, with the choices where a class or an option is misspelt."""

import difflib
import inspect
from collections.abc import Iterator
from typing import Any, NoReturn

import yaml
from jsonargparse import get_loader, set_loader
from lightning.pytorch import Callback
from lightning.pytorch.cli import LightningArgumentParser
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from torchvision.transforms import v2

from segmentation.data import SegmentationData
from segmentation.data.labels import HEX
from segmentation.errors import InputError
from segmentation.losses import SegmentationLoss
from segmentation.nets import SegmentationNet

#: Options whose value is a class, and the class that it must be a kind of.
CLASS_OPTIONS: dict[str, type] = {
    "data.dataset": SegmentationData,
    "data.augment": v2.Transform,
    "model.net": SegmentationNet,
    "model.loss": SegmentationLoss,
    "losses": SegmentationLoss,  # of a sum
    "model.optimizer": Optimizer,
    "model.schedule": LRScheduler,
    "trainer.callbacks": Callback,
}

#: Arguments that no user gives: the data set or the module does.
LINKED = {"in_channels", "num_classes", "optimizer", "params", "__default_config__"}

#: Stands around our message within jsonargparse's, which tells all that was tried.
MARK = "\0"


def _load(text: str) -> Any:
    """YAML, but for a colour by itself: jsonargparse reads each string again, and to YAML "#808080" is a comment."""
    return text if HEX.fullmatch(text) else _load_yaml(text)


_load_yaml = get_loader("yaml")
set_loader("yaml", _load, (yaml.YAMLError,))


class Parser(LightningArgumentParser):
    """LightningCLI's parser, with our words for what can go wrong.

    jsonargparse makes another one for each class that the user names; its error becomes part of its parent's.

    Attributes:
        of_class: the class whose arguments this parser was made for.
    """

    of_class: type = object

    def parse_args(self, *args: Any, **options: Any) -> Any:
        try:
            return super().parse_args(*args, **options)
        except UnicodeDecodeError as error:
            raise InputError(f"a file of --config is no UTF-8 text ({error}): save it as UTF-8") from error

    def add_class_arguments(self, theclass: Any, nested_key: str | None = None, *args: Any, **options: Any) -> Any:
        if nested_key is None:
            self.of_class = theclass
        return super().add_class_arguments(theclass, nested_key, *args, **options)

    def instantiate_classes(self, *args: Any, **options: Any) -> Any:
        try:
            return super().instantiate_classes(*args, **options)
        except ValueError as error:  # a library's own checks of the user's numbers
            raise InputError(f"an option cannot be used: {' '.join(str(error).split())}") from error

    def require_nothing(self) -> None:
        """Let every option be left out: what is not given is known from elsewhere."""
        for action in self._actions:
            action.required = False

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        message = " ".join(str(message).split()).replace("Parser key ", "")
        if MARK in message:
            message = message.split(MARK)[1]
        elif ex is None or isinstance(ex, KeyError):
            message = self._explain_option(message)
        else:
            message = self._place() + _explain_class(message)
        if not self.exit_on_error:
            super().error(f"{MARK}{message}{MARK}", ex)
        raise InputError(message)

    def _place(self) -> str:
        return "" if self.exit_on_error else f"{_option_of(self.of_class)} ({self.of_class.__name__}): "

    def _explain_option(self, message: str) -> str:
        """A message about an option that there is not, with those there are and the other classes that have it."""
        option = _option_of(self.of_class)
        keys = self.get_defaults(skip_validation=True).keys()
        options = {}
        for key in keys:
            name = key.replace("init_args.", "").removesuffix(".class_path")
            last = name.rpartition(".")[2]
            if last not in LINKED:
                options[last] = f"{option}.{name}".strip(".")
        words = _words(message)
        _, close = _closest(words, [*options])
        group = options[close].rpartition(".")[0] if close else option
        choices = [each for each in options.values() if each.rpartition(".")[0] == group]
        heads = {word.partition(".")[0] for word in words}
        kinds = _kinds(CLASS_OPTIONS[option]) if option else ()
        others = [cls.__name__ for cls in kinds if heads & inspect.signature(cls).parameters.keys()]
        owners = f" It belongs to {', '.join(sorted(set(others)))}." if others else ""
        listed = _listed(options.get(close, close), choices)
        return f"{self._place()}{message}.{owners} {listed}. All: python src/train.py --help"


def _explain_class(message: str) -> str:
    """A message about an option whose value is a class, with the classes there are; any other as it is."""
    option = next((option for option in CLASS_OPTIONS if f'"{option}":' in message), None)
    if option is None:
        return message
    kinds = list(_kinds(CLASS_OPTIONS[option]))
    names = [cls.__name__ for cls in kinds]
    choices = [cls.__name__ if names.count(cls.__name__) == 1 else f"{cls.__module__}.{cls.__name__}" for cls in kinds]
    word, close = _closest([word for word in _words(message) if word not in choices], choices)
    problem = f"{option}: no class {word!r}" if close else message
    return f"{problem}. {_listed(close, choices)}, or the import path of your own (my_file.MyClass)"


def _words(message: str) -> list[str]:
    return [word.strip("[]{}',-") for word in message.split()]


def _closest(words: list[str], choices: list[str]) -> tuple[str, str]:
    """A word that is a choice misspelt, and that choice; or nothing."""
    for word in reversed(words):  # what the user gave stands at the end
        close = difflib.get_close_matches(word.rpartition(".")[2], choices, n=1, cutoff=0.8)
        if close:
            return word, close[0]
    return "", ""


def _listed(likely: str, choices: list[str]) -> str:
    return (f"Did you mean {likely}? " if likely else "") + f"Choices: {', '.join(sorted(set(choices)))}"


def _option_of(cls: type) -> str:
    """The option whose value `cls` can be."""
    return next((option for option, base in CLASS_OPTIONS.items() if issubclass(cls, base)), "")


def _kinds(base: type[Any]) -> Iterator[type[Any]]:
    """The concrete classes below `base` that a user may name."""
    for cls in base.__subclasses__():
        if not inspect.isabstract(cls) and not cls.__name__.startswith("_"):
            yield cls
        yield from _kinds(cls)
