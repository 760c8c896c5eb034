"""What the jobs after training share: a short command line, and results that are written whole or not at all."""

import argparse
import logging
import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
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
        raise InputError(f"{message}. See --help")


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


def refuse_existing(paths: list[Path], overwrite: bool) -> None:
    """Raises InputError, before any work is done, for a result that is there already, unless told to overwrite."""
    there = [str(path) for path in paths if path.exists()]
    if there and not overwrite:
        raise InputError(f"{', '.join(there[:3])} exists: give another --output, or add --overwrite")


@contextmanager
def written_whole(path: Path) -> Iterator[Path]:
    """A place beside `path` to write to; it gets the final name when all is written, and is removed when that fails."""
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.stem[:100]}.{os.getpid()}.part{path.suffix}")
    try:
        yield aside
        aside.replace(path)
    except OSError as error:
        error.filename = error.filename or str(path)  # a library's own error may name no file
        raise
    finally:
        aside.unlink(missing_ok=True)
