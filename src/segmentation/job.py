"""What the jobs after training share: a short command line, and results that are written whole or not at all."""

import argparse
import logging
import os
import sys
import warnings
from collections.abc import Callable
from pathlib import Path

from segmentation.errors import InputError
from segmentation.memory import keep_freed_memory


class JobParser(argparse.ArgumentParser):
    """argparse, whose errors are one line and exit status 2, like those of every job.

    Args:
        script: name of the file in src/.
        description: what the job does.
        epilog: examples; printed as they stand.
    """

    def __init__(self, script: str, description: str, epilog: str) -> None:
        form = argparse.RawDescriptionHelpFormatter
        super().__init__(f"python src/{script}.py", None, description, epilog, formatter_class=form, allow_abbrev=False)

    def error(self, message: str) -> None:
        alone = " With no value, it must not stand before a path." if "--tta: invalid choice" in message else ""
        raise InputError(f"{message}.{alone} See --help")

    def add_checkpoint(self) -> None:
        """The options of every job that opens a checkpoint with its data."""
        self.add_argument(
            "checkpoint", metavar="CHECKPOINT", help="a .ckpt file of train.py; it holds the data's config"
        )
        self.add_argument("--data", metavar="OVERLAY", help="YAML whose data section replaces the checkpoint's")
        self.add_argument("--overwrite", action="store_true", help="replace results that are there")

    def parse_with_others(self, args: list[str] | None) -> tuple[argparse.Namespace, list[str]]:
        """The job's own options, wherever the checkpoint stands, and those of data and trainer."""
        words = sys.argv[1:] if args is None else args
        first = next((i for i, word in enumerate(words) if word.endswith(".ckpt")), 0)
        return self.parse_known_args(words[first : first + 1] + words[:first] + words[first + 1 :])


def start_job() -> None:
    """What every job does first: find classes of the user's own where the command is typed; and silence what a user can
    do nothing about, Lightning's small talk and warnings meant for its developers."""
    sys.path.append(os.getcwd())
    keep_freed_memory()
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")  # a log in latin-1 has no box characters
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    logging.getLogger("lightning.fabric").setLevel(logging.WARNING)
    logging.getLogger().addFilter(_of_use)
    for message in (
        ".*LeafSpec.*is deprecated.*",
        '.*install "ipywidgets" for Jupyter support.*',  # a notebook without them has no bar, and needs none
        ".*`srun` command is available.*",  # on every login node
        ".*does not have many workers.*",
        ".*sync_dist=True.*",
        ".*is already saved during checkpointing.*",
        ".*is smaller than the logging interval.*",
        ".*Checkpoint directory .* exists and is not empty.*",
        ".*Experiment logs directory .* exists and is not empty.*",
    ):
        warnings.filterwarnings("ignore", message)


def _of_use(record: logging.LogRecord) -> bool:
    """W&B warns, in the root logger, of images of unequal sizes, which a data set may well have."""
    return "Images sizes do not match" not in record.getMessage()


def number(kind: type[int] | type[float], least: float) -> Callable[[str], float]:
    """The type of an option that is a number of at least `least`."""

    def parse(text: str) -> float:
        try:
            value = kind(text)
        except ValueError:
            value = float("nan")
        if not least <= value < float("inf"):
            what = "a whole number" if kind is int else "a number"
            raise argparse.ArgumentTypeError(f"{text} is not {what} of at least {least}")
        return value

    return parse


def file_name(text: str) -> Path:
    """The type of an option that names a file to be written, or the beginning of its name."""
    if not Path(text).name or Path(text).name == "..":
        raise argparse.ArgumentTypeError(f"{text!r} is a folder: give the name of a file in it")
    return Path(text)


def refuse_existing(paths: list[Path], overwrite: bool) -> None:
    """Raises InputError, before any work is done, for a result that is there already, unless told to overwrite, and
    for one that cannot be written."""
    for path in paths:
        check_folder(path.parent)
        if path.is_dir():
            raise InputError(f"{path} is a folder: give the name of a file")
    there = [str(path) for path in paths if path.exists()]
    if there and not overwrite:
        verb = "exists" if len(there) == 1 else "exist"
        raise InputError(f"{', '.join(there[:3])} {verb}: give another --output, or add --overwrite")


def check_folder(folder: Path) -> None:
    """Raises InputError if a folder to write to can be none, as a file is in its place or in that of one above it."""
    file = next((path for path in (folder, *folder.parents) if path.exists() and not path.is_dir()), None)
    if file:
        raise InputError(f"{file} is a file: the results need a folder there")
