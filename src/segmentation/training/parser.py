"""The parser of the command line: an error is one line, with the option or class that was most likely meant."""

import difflib
from typing import Any, NoReturn

from lightning.pytorch import Callback
from lightning.pytorch.cli import LightningArgumentParser
from lightning.pytorch.loggers import Logger
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from torchvision.transforms import v2

from segmentation.data import SegmentationData
from segmentation.errors import InputError, one_line
from segmentation.losses import SegmentationLoss
from segmentation.nets import SegmentationNet

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
    "epochs": "trainer.max_epochs",
    "gpus": "trainer.devices",
    "learning_rate": "model.optimizer.lr",
    "lr": "model.optimizer.lr",
    "pretrained": "model.net.encoder_weights",
    "seed": "seed_everything",
    "weights": "model.init_from",
    "workers": "data.num_workers",
}

#: Stands around the error of a class's options within jsonargparse's, which lists all that it has tried.
MARK = "\0"


class Parser(LightningArgumentParser):
    """LightningCLI's parser with errors of one line.

    jsonargparse makes another one for each class that the user names; its error becomes part of its parent's.
    """

    class_name = ""  # whose options these are

    def add_class_arguments(self, theclass: Any, *args: Any, **options: Any) -> Any:
        self.class_name = theclass.__name__
        return super().add_class_arguments(theclass, *args, **options)

    def parse_args(self, args: Any = None, **options: Any) -> Any:  # type: ignore[override]
        for word in args or ():
            if word.startswith("#"):
                quoted = f"'[\"{word}\"]'"
                raise InputError(f"{word}: to YAML this is a comment. Fix: a list with quotes, {quoted}")
            if word.partition("=")[0] in ("--model.net.in_channels", "--model.net.num_classes"):
                raise InputError(
                    f"{word}: follows from the data (data.dataset.channels, data.dataset.classes). Take it away"
                )
        try:
            return super().parse_args(args, **options)
        except UnicodeDecodeError as error:
            raise InputError(f"a file of --config is no UTF-8 text ({error}): save it as UTF-8") from error

    def instantiate_classes(self, *args: Any, **options: Any) -> Any:
        try:
            return super().instantiate_classes(*args, **options)
        except ValueError as error:  # a library checks the numbers that the user gave
            cause: BaseException | None = error
            while cause and not isinstance(cause, ModuleNotFoundError):  # a logger's library is missing, say
                cause = cause.__cause__
            reason = one_line(cause or error)
            raise InputError(f"an option cannot be used: {reason}") from error

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        line = " ".join(str(message).split())
        if MARK in line:
            key = line.partition(": ")[0]
            line = f"{key}: {line.split(MARK)[1]}"
        elif ex is None or isinstance(ex, KeyError):
            options = self.option_names()
            choices = "" if self.exit_on_error else f" (choices: {', '.join(options)})"
            line += renamed(line) or hint(line, options) or choices
        else:
            line += hint(line, class_names())
        if not self.exit_on_error:  # these are the options of a class
            super().error(f"{MARK}{self.class_name}: {line}{MARK}", ex)
        raise InputError(f"{line}. All options: python src/train.py --help")

    def option_names(self) -> list[str]:
        """Names of all options, in full and their last parts: YAML has these."""
        names: dict[str, None] = {}
        for key in vars(self.get_defaults(skip_validation=True).as_flat()):
            name = key.replace("init_args.", "").removesuffix(".class_path")
            last = name.rpartition(".")[2]
            if last not in NOT_FOR_USERS:
                names |= {name: None, last: None}
        return list(names)


def class_names() -> list[str]:
    """Names of all classes that an option takes."""
    found: list[type] = [*KINDS]
    for cls in found:
        found += cls.__subclasses__()  # the loop goes on over these
    return [cls.__name__ for cls in found]


def renamed(line: str) -> str:
    """The option here that a word of an error means in other projects."""
    for word in line.split():
        word = word.strip("-'\"[]{},:;").partition("=")[0]
        last = word.rpartition(".")[2].replace("-", "_")
        if last in ELSEWHERE and word != ELSEWHERE[last]:
            return f" (did you mean {ELSEWHERE[last]}?)"
    return ""


def hint(line: str, names: list[str]) -> str:
    """The name that a word of an error was most likely meant to be."""
    for word in reversed(line.split()):  # what the user typed stands last
        word = word.strip("-'\"[]{},:;").partition("=")[0]
        close = difflib.get_close_matches(word, names, n=1, cutoff=0.8)
        if close and word not in names:
            return f" (did you mean {close[0]}?)"
    return ""
