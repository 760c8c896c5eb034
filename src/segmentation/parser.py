"""The command line's parser: errors are one line that lists the choices, and help starts with what matters."""

import difflib
import inspect
import re
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

#: What the data decides; nobody gives it on the command line.
LINKED = {"in_channels", "num_classes", "optimizer", "params", "model.labels"}
INTERNAL = {"help", "print_config", "print_shtab"}


def _load(text: str) -> Any:
    """YAML, but for a colour by itself: jsonargparse reads each string again, and to YAML "#808080" is a comment."""
    return text if HEX.fullmatch(text) else _load_yaml(text)


_load_yaml = get_loader("yaml")
set_loader("yaml", _load, (yaml.YAMLError,))


class Parser(LightningArgumentParser):
    """LightningCLI's parser, with our words for what can go wrong."""

    typed: tuple[str, ...] = ()  # of the class: the parsers of nested options ask for it too

    def parse_args(self, args: Any = None, *others: Any, **options: Any) -> Any:
        Parser.typed = tuple(str(word).partition("=")[0].lstrip("-") for word in args or ())
        try:
            return super().parse_args(args, *others, **options)
        except UnicodeDecodeError as error:
            raise InputError(f"a file of --config is no UTF-8 text ({error}): save it as UTF-8") from error

    def instantiate_classes(self, *args: Any, **options: Any) -> Any:
        try:
            return super().instantiate_classes(*args, **options)
        except ValueError as error:  # a library's own checks of the user's numbers
            raise InputError(f"an option cannot be used: {' '.join(str(error).split())}") from error

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        raise InputError(self.explain(str(message)))

    def explain(self, message: str) -> str:
        """jsonargparse's message in one line, with the choices where a class or an option is misspelt."""
        if nested := re.search(r"no (?:class|option) '.*\. .*", message):
            return nested.group()  # from the parser of a nested option: these are our words already
        key = re.search(r'Parser key "([\w.]+)"', message)
        name = re.search(r"Expected a dot import path string: (\S+)", message)
        if key and name:
            return _unknown_class(key.group(1), name.group(1))
        if option := re.search(r"(?:unrecognized arguments: --|accept option '|Option ')([\w.+-]+)", message):
            group = re.search(r"Group '([\w.]+)'", message)
            return self._unknown_option(f"{group.group(1)}.{option.group(1)}" if group else option.group(1))
        message = re.sub(r'^Parser key "([\w.]+)":', r"\1:", message)
        return " ".join(re.sub(r"<class '([\w.]+)'>", r"\1", message).split())

    def _unknown_option(self, name: str) -> str:
        options = {action.dest for action in self._actions if action.dest not in LINKED | INTERNAL}
        for key, base in CLASS_OPTIONS.items():
            options |= {f"{key}.{option}" for cls in _kinds(base) for option in inspect.signature(cls).parameters}
        options = {option for option in options if option.rpartition(".")[2] not in LINKED}
        # A nested option's error names only its last part; the whole was typed, or stands in a YAML file.
        name = next((word for word in self.typed if word.endswith(f".{name}")), name).replace(".init_args", "")
        matches = {option: option if "." in name else option.rpartition(".")[2] for option in options}
        cutoff = 0.5 if "." in name else 0.75  # a short name is like one of hundreds
        close = difflib.get_close_matches(name, matches.values(), n=1, cutoff=cutoff)
        likely = min((option for option, short in matches.items() if short in close), key=len, default="")
        group = likely.rpartition(".")[0] or name.rpartition(".")[0]
        choices = sorted(option for option in options if option.rpartition(".")[0] == group)
        listed = f"{_choose(likely, choices)}. " if choices else ""
        return f"no option {name!r}. {listed}All of them: python src/train.py --help"


def _unknown_class(option: str, name: str) -> str:
    base = next((CLASS_OPTIONS[key] for key in CLASS_OPTIONS if option.startswith(key)), None)
    choices = sorted({cls.__name__ for cls in _kinds(base)}) if base else []
    return f"{option}: no class {name!r}. {_choose(name, choices)}, or the import path of your own (my_file.MyClass)"


def _choose(likely: str, choices: list[str]) -> str:
    close = difflib.get_close_matches(likely, choices, n=1)
    return (f"Did you mean {close[0]}? " if close else "") + f"Choices: {', '.join(choices)}"


def _kinds(base: type[Any]) -> Iterator[type[Any]]:
    """The concrete classes below `base` that a user may name."""
    for cls in base.__subclasses__():
        if not inspect.isabstract(cls) and not cls.__name__.startswith("_"):
            yield cls
        yield from _kinds(cls)
