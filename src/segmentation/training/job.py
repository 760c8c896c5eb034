"""What the jobs after training share: a short command line, and results that are written whole or not at all."""

import argparse
import ast
import logging
import os
import sys
import warnings
from pathlib import Path
from typing import NoReturn

from segmentation.errors import InputError
from segmentation.training.memory import keep_freed_memory
from segmentation.training.preemption import watch_processes

#: Warnings meant for Lightning's developers, or of what a user can do nothing about.
SMALL_TALK = (
    ".*LeafSpec.*is deprecated.*",
    '.*install "ipywidgets" for Jupyter support.*',  # a notebook without them has no bar, and needs none
    ".*`srun` command is available.*",  # on every login node
    ".*does not have many workers.*",
    ".*your dataloader is not resumable.*",  # it is: see TrainLoader
    ".*sync_dist=True.*",
    ".*is already saved during checkpointing.*",
    r"\s*Unable to serialize instance.*",  # train.py refuses it, in a line
    ".*removed from hparams because it cannot be pickled.*",  # of jobs, which have no optimizer
    ".*is smaller than the logging interval.*",
    ".*Checkpoint directory .* exists and is not empty.*",
    ".*Experiment logs directory .* exists and is not empty.*",
)


class JobParser(argparse.ArgumentParser):
    """argparse, whose help is the text on top of a script, and whose errors are one line and exit status 2.

    Args:
        script: name of the file in src/.
    """

    def __init__(self, script: str) -> None:
        source = (Path(__file__).parents[2] / f"{script}.py").read_text(encoding="utf-8")
        description, _, examples = (ast.get_docstring(ast.parse(source)) or "").partition("\n\n")
        form = argparse.RawDescriptionHelpFormatter
        super().__init__(
            f"python src/{script}.py", None, description, examples, formatter_class=form, allow_abbrev=False
        )

    def error(self, message: str) -> NoReturn:
        raise InputError(f"{message}. See --help")

    def add_checkpoint(self) -> None:
        """The options of every job that opens a checkpoint with its data."""
        self.add_argument("checkpoint", metavar="CHECKPOINT", help="a .ckpt file of train.py, with the data's config")
        self.add_argument("--data", metavar="OVERLAY", help="YAML whose data section replaces the checkpoint's")
        self.add_argument("--overwrite", action="store_true", help="replace results that are there")


def start_job() -> None:
    """What every job does first: find classes of the user's own where the command is typed, and silence small talk."""
    sys.path.append(os.getcwd())
    keep_freed_memory()
    watch_processes()
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")  # a log in latin-1 has no box characters
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    logging.getLogger("lightning.fabric").setLevel(logging.WARNING)
    logging.getLogger().addFilter(_of_use)
    for message in SMALL_TALK:
        warnings.filterwarnings("ignore", message)


def _of_use(record: logging.LogRecord) -> bool:
    """W&B warns, in the root logger, of images of unequal sizes, which a data set may well have."""
    return "Images sizes do not match" not in record.getMessage()


def file_name(text: str) -> Path:
    """The type of an option that names a file to be written, or the beginning of its name."""
    if Path(text).name in ("", ".."):
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
        raise InputError(f"{', '.join(there)}: there already; give another --output, or add --overwrite")


def check_folder(folder: Path) -> None:
    """Raises InputError if a folder to write to can be none, as a file is in its place or in that of one above it."""
    file = next((path for path in (folder, *folder.parents) if path.exists() and not path.is_dir()), None)
    if file:
        raise InputError(f"{file} is a file: the results need a folder there")
