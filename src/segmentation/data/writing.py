"""Results are written whole or not at all: no half-written file ever has a final name."""

import csv
import json
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from itertools import chain
from pathlib import Path
from uuid import uuid4


@contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """A path beside `path` to write to: renamed to `path` when all is written, removed on an error."""
    path.parent.mkdir(parents=True, exist_ok=True)
    # A file name has 255 bytes at most, and these 40 letters may have 4 each.
    aside = path.with_name(f".{path.stem[:40]}.{uuid4().hex[:8]}.part{path.suffix}")
    try:
        yield aside
        aside.replace(path)
    except OSError as error:
        if error.errno and error.filename in (None, str(aside), aside):
            error.filename = str(path)  # the name that the user knows
        raise
    finally:
        aside.unlink(missing_ok=True)


@contextmanager
def atomic_write_all(*paths: Path) -> Iterator[list[Path]]:
    """`atomic_write` of files that belong together: all get their names when all are written, else none does."""
    with ExitStack() as stack:
        yield [stack.enter_context(atomic_write(path)) for path in paths]


def remove_stale(folder: Path, idle: float = 0) -> None:
    """Remove what a killed process has left of its writing in a folder and below.

    Args:
        idle: seconds without a change, where other processes may be writing.
    """
    for stale in folder.rglob(".*.part*"):
        with suppress(FileNotFoundError):  # another process has finished it
            if time.time() - stale.stat().st_mtime >= idle:
                stale.unlink()


def write_text(path: Path, text: str) -> None:
    with atomic_write(path) as aside:
        aside.write_text(text, encoding="utf-8")


def write_json(path: Path, metrics: dict) -> None:
    """JSON has no NaN: the metric of an absent class is null."""
    without_nan = json.loads(json.dumps(metrics), parse_constant=lambda constant: None)
    write_text(path, json.dumps(without_nan, indent=2) + "\n")


def write_csv(path: Path, rows: list[dict]) -> None:
    """A table with a header; a value that a row lacks is empty."""
    with atomic_write(path) as aside, aside.open("w", newline="", encoding="utf-8", errors="backslashreplace") as file:
        writer = csv.DictWriter(file, dict.fromkeys(chain.from_iterable(rows)), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
