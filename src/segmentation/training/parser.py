"""The parser of the command line: an error is one line, with the option or class that was most likely meant."""

import difflib
from typing import Any, NoReturn

from lightning.pytorch import Callback
from lightning.pytorch.cli import LightningArgumentParser
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from torchvision.transforms import v2

from segmentation.data import SegmentationData
from segmentation.errors import InputError
from segmentation.losses import SegmentationLoss
from segmentation.nets import SegmentationNet

#: Options take classes of these kinds.
KINDS = (SegmentationData, SegmentationNet, SegmentationLoss, v2.Transform, Optimizer, LRScheduler, Callback)

HINT = "did you mean"


class Parser(LightningArgumentParser):
    """LightningCLI's parser with errors of one line.

    jsonargparse makes another one for each class that the user names; its error becomes part of its parent's.
    """

    needs_required = True

    def require_nothing(self) -> None:
        """Let every option be left out."""
        self.needs_required = False

    def validate(self, *args: Any, skip_required: bool = False, **options: Any) -> None:
        super().validate(*args, skip_required=skip_required or not self.needs_required, **options)

    def parse_args(self, args: Any = None, **options: Any) -> Any:  # type: ignore[override]
        for word in args or ():
            if word.startswith("#"):
                raise InputError(f"{word}: to YAML this is a comment. Fix: a list with quotes, '[\"{word}\"]'")
        try:
            return super().parse_args(args, **options)
        except UnicodeDecodeError as error:
            raise InputError(f"a file of --config is no UTF-8 text ({error}): save it as UTF-8") from error

    def instantiate_classes(self, *args: Any, **options: Any) -> Any:
        try:
            return super().instantiate_classes(*args, **options)
        except ValueError as error:  # a library checks the numbers that the user gave
            raise InputError(f"an option cannot be used: {' '.join(str(error).split())}") from error

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        line = " ".join(str(message).split())
        if HINT not in line:
            line += self.hint(line, ex is None or isinstance(ex, KeyError))
        if not self.exit_on_error:
            super().error(line, ex)
        raise InputError(f"{line}. All options: python src/train.py --help")

    def hint(self, line: str, of_option: bool) -> str:
        """The option of this parser, or the class, that a word of an error was most likely meant to be."""
        names = self.option_names() if of_option else class_names()
        for word in line.split():
            word = word.strip("-'\"[]{},:;").partition("=")[0]
            close = difflib.get_close_matches(word, names, n=1, cutoff=0.85)
            if close and word not in names:
                # YAML has last parts alone; the error may name the group that they are in.
                full = [name for name in names if name.endswith(f".{close[0]}") and name.rpartition(".")[0] in line]
                return f" ({HINT} {[*full, close[0]][0]}?)"
        return f" (choices: {', '.join(names)})" if of_option and not self.exit_on_error else ""

    def option_names(self) -> list[str]:
        """Names of all options, in full and their last parts: YAML has these."""
        names: dict[str, None] = {}
        for key in vars(self.get_defaults(skip_validation=True).as_flat()):
            name = key.replace("init_args.", "").removesuffix(".class_path")
            names |= {name: None, name.rpartition(".")[2]: None}
        return list(names)


def class_names() -> set[str]:
    """Names of the classes that options take."""
    classes: list[Any] = [*KINDS]
    for kind in classes:
        classes += kind.__subclasses__()  # the loop goes on over these
    return {cls.__name__ for cls in classes}
