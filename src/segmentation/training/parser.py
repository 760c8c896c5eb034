"""The parser of the command line: an error is one line, with the option or class that was most likely meant."""

import difflib
import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from itertools import chain
from types import NoneType, UnionType
from typing import Any, Literal, NoReturn, Union, get_args, get_origin

from lightning.pytorch import Callback
from lightning.pytorch.cli import LightningArgumentParser
from lightning.pytorch.loggers import Logger
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from torchvision.transforms import v2

from segmentation import data, losses, nets
from segmentation.data import SegmentationData
from segmentation.errors import InputError, one_line
from segmentation.losses import SegmentationLoss
from segmentation.nets import SegmentationNet
from segmentation.schedulers import PLATEAU, PLATEAU_FIX

#: Options take classes of these kinds.
KINDS = (
    SegmentationData,
    SegmentationNet,
    SegmentationLoss,
    v2.Transform,
    Optimizer,
    LRScheduler,
    Callback,
    Logger,
)

#: Options that follow from the data, or that the module fills in.
NOT_FOR_USERS = {"in_channels", "num_classes", "optimizer", "params"}

#: What other projects call an option -> what it is called here.
ELSEWHERE = {
    "amp": "trainer.precision",
    "backbone": "model.net.encoder",
    "batch": "data.batch_size",
    "batch_size": "data.batch_size",
    "cpu": "trainer.accelerator",
    "device": "trainer.accelerator",
    "epochs": "trainer.max_epochs",
    "gpu": "trainer.accelerator",
    "gpus": "trainer.devices",
    "learning_rate": "model.optimizer.lr",
    "lr": "model.optimizer.lr",
    "pretrained": "model.net.encoder_weights",
    "root": "data.dataset.root",
    "seed": "seed_everything",
    "weights": "model.init_from",
    "workers": "data.num_workers",
}

#: What the parser of YAML says -> what to look at.
YAML_FIXES = {
    "cannot start any token": "YAML is indented by spaces, never by tabs",
    "mapping values are not allowed": "A colon needs a space after it; options of a section begin in one column",
    "did not find expected key": "Options of a section begin in one column",
    "did not find expected ','": "A bracket or a quote is open",
}

#: Types, as YAML has their values.
WORDS = {
    NoneType: "null",
    bool: "true or false",
    dict: "a mapping",
    float: "a number",
    int: "a whole number",
    list: "[...]",
    str: "a text",
}

#: Stands around the error of a class's options within jsonargparse's, which lists all that it has tried.
MARK = "\0"


class Parser(LightningArgumentParser):
    """LightningCLI's parser with errors of one line.

    jsonargparse makes another one for each class that the user names; its error becomes part of its parent's.
    """

    file = ""  # of --config, that is being read

    def __init__(self, *args, **options) -> None:
        self.classes: dict[str, type] = {}  # whose options these are; before a dot, or "" where all are of one class
        super().__init__(*args, **options)

    def add_class_arguments(self, theclass, nested_key: str | None = None, *args, **options) -> Any:
        self.classes[nested_key or ""] = theclass
        return super().add_class_arguments(theclass, nested_key, *args, **options)

    def parse_args(self, args=None, **options) -> Any:  # type: ignore[override]
        for word in args or ():
            if word.startswith("#"):
                quoted = f"'[\"{word}\"]'"
                raise InputError(f"{word}: to YAML this is a comment. Fix: a list with quotes, {quoted}")
            if word.partition("=")[0] in ("--model.net.in_channels", "--model.net.num_classes"):
                raise InputError(
                    f"{word}: follows from the data (data.dataset.channels, data.dataset.classes). Take it away"
                )
        return super().parse_args(args, **options)

    def parse_path(self, cfg_path, *args, **options) -> Any:
        self.file = f"{cfg_path}: "
        try:
            config = super().parse_path(cfg_path, *args, **options)
            with suppress(TypeError):  # values are checked later, when all files are merged
                self.validate(config, skip_required=True)
            return config
        except UnicodeDecodeError as error:
            raise InputError(f"{self.file}is no UTF-8 text ({error}): save it as UTF-8") from error
        except KeyError as error:
            self.error(str(error), error)
        finally:
            self.file = ""

    def instantiate_classes(self, *args, **options) -> Any:
        try:
            return super().instantiate_classes(*args, **options)
        except ValueError as error:  # a library checks the numbers that the user gave
            cause: BaseException | None = error
            while cause and not isinstance(cause, ModuleNotFoundError | InputError):  # a logger's library, say
                cause = cause.__cause__ or cause.__context__
            if isinstance(cause, InputError):
                raise cause from error
            raise InputError(f"an option cannot be used: {one_line(cause or error)}") from error

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        lines = str(message).splitlines()
        key = lines[0].split('"')[1] if lines[0].startswith("Parser key") else ""
        if MARK in message:
            line = key + message.split(MARK)[1]
        elif message.startswith("Unexpected config"):
            line = "holds no options. Write e.g. trainer: {max_epochs: 50}, or leave it out"
        elif key:
            line = self.wrong_value(key, lines[-1])
        else:
            line = " ".join(message.split()).rstrip(".").replace('in "<unicode string>", ', "at ")
            if ex is None or isinstance(ex, KeyError):
                line += self.meant(line)
            fixes = [fix for said, fix in YAML_FIXES.items() if said in line]
            line = ". ".join([line, *fixes])
        if not self.exit_on_error:  # these are the options of a class
            start = "." if key else f": {self.classes[''].__name__}: "
            super().error(f"{MARK}{start}{line}{MARK}", ex)
        raise InputError(f"{self.file}{line}. All options: python src/train.py --help")

    def meant(self, line: str) -> str:
        """The option that an error was most likely about, in brackets; of a class, else all that it has."""
        options = self.option_names()
        if self.exit_on_error:
            return hint(line, options | ELSEWHERE)
        owner = owner_of(self.classes[""], line)
        guess = hint(line, {**options, "class_path": "class_path", "init_args": "init_args"})
        if not guess and not owner:
            guess = hint(line, ELSEWHERE)
        return guess or f" (choices: {', '.join(options)}{owner})"

    def wrong_value(self, key: str, reason: str) -> str:
        """What an option takes, where it was given something else.

        Args:
            key: the option.
            reason: the last line of jsonargparse's error, which ends with ": " and the value.
        """
        if PLATEAU in reason:
            return f"{key}: two classes are called {PLATEAU}{PLATEAU_FIX}"
        reason = reason.strip(" -").removeprefix(f'Parser key "{key}": ')
        if reason.startswith("Unable to load config"):
            example = next(name for name in self.option_names() if name.startswith(f"{key}."))
            return f"{key} is a section: name an option of it, e.g. --{example}, or a YAML file that holds it"
        if "implicit class_path" in reason:
            return f"{key}: write class_path: NAME, and its options below init_args"
        given = reason.partition(": ")[2]
        group, _, name = key.rpartition(".")
        parameter = inspect.signature(self.classes.get(group, object)).parameters.get(name)
        if parameter is None or not given:
            return f"{key}: {reason}"
        choices = in_words(parameter.annotation)
        if key == "trainer.logger":  # `cli.name_run` refuses true and false
            choices.remove(WORDS[bool])
        line = f"{key} cannot be {given}: it takes {' or '.join(choices)}"
        default = self.get_defaults(skip_validation=True).get(key)
        if ":" in given and WORDS[dict] in choices:
            line += ", in quotes and with a space after each colon: '{a: 0, b: 255}'"
        elif "," in given and "..." in line:
            line += f", e.g. [{given}]"
        elif type(default) in (int, float):
            line += f", e.g. {default}"
        return line + hint(given, {name: name for name in [*choices, *class_names()]})

    def option_names(self) -> dict[str, str]:
        """The full name of each option by that name, and by its last part, which YAML has."""
        names = {}
        for key in vars(self.get_defaults(skip_validation=True).as_flat()):
            name = key.replace("init_args.", "").removesuffix(".class_path")
            last = name.rpartition(".")[2]
            if last not in NOT_FOR_USERS:
                names[name] = name
                names.setdefault(last, name)
        return names


def in_words(kind) -> list[str]:
    """What a type hint takes, as YAML has it: one of these."""
    parts = get_args(kind)
    origin = get_origin(kind) or kind
    if origin is Literal:
        return [str(part) for part in parts]
    if origin in (Union, UnionType):
        choices = chain.from_iterable(map(in_words, parts))
        return list(dict.fromkeys(choices))
    if origin is Callable:  # a class, whose first argument comes from elsewhere
        return in_words(parts[-1])
    if parts and origin in (list, Sequence, Iterable):
        each = ", ".join(in_words(parts[0]))
        return [f"[{each}, ...]"]
    if origin in (SegmentationData, SegmentationNet, SegmentationLoss):
        everything = [*vars(data).values(), *vars(losses).values(), *vars(nets).values()]
        public = filter(inspect.isclass, everything)
        names = [each.__name__ for each in public if issubclass(each, origin) and each is not origin]
        return [", ".join(names), "a class of your own by its import path"]
    name = getattr(origin, "__name__", str(origin))
    article = "an" if name.startswith(("A", "E", "I", "O", "LR")) else "a"
    return [WORDS.get(origin) or f"{article} {name}"]


def subclasses(*kinds: type) -> list[type]:
    """The classes, and all that are derived from them."""
    found = [*kinds]
    for cls in found:
        found += cls.__subclasses__()  # the loop goes on over these
    return found


def class_names() -> list[str]:
    """Names of all classes that an option takes."""
    return [cls.__name__ for cls in subclasses(*KINDS) if not cls.__module__.startswith("segmentation.training")]


def owner_of(cls: type, line: str) -> str:
    """Which other classes of the same kind have the option of an error."""
    for kind in KINDS:
        if issubclass(cls, kind):
            for word in typed(line):
                names = [each.__name__ for each in subclasses(kind) if word in inspect.signature(each).parameters]
                if names:
                    return f"; {word} is an option of {', '.join(names)}"
    return ""


def typed(line: str) -> list[str]:
    """The words of an error that may be names, the last first: what the user typed stands last. Of a.b also b and a."""
    words = [word.strip("-'\"[]{},:;").partition("=")[0] for word in reversed(line.split())]
    for word in [*words]:
        if "." in word:
            words += [word.rpartition(".")[2], word.partition(".")[0]]
    return words


def hint(line: str, names: Mapping[str, str]) -> str:
    """The name that a word of an error was most likely meant to be.

    Args:
        line: the error.
        names: what may be typed -> the name to propose.
    """
    by_letters = {typed_as.lower(): name for typed_as, name in names.items()}
    for word in typed(line):
        if line.startswith("unrecognized") and word.endswith((".yaml", ".yml")):
            return f" (did you mean --config {word}?)"
        letters = word.lower().replace("+", "plus")  # UNet++
        close = difflib.get_close_matches(letters, by_letters, n=1, cutoff=0.82)
        if close and by_letters[close[0]] != word:
            return f" (did you mean {by_letters[close[0]]}?)"
    return ""
