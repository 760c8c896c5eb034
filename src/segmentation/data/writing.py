"""Results are written whole or not at all: nothing half-written is ever left under a final name."""

import csv
import json
import math
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any
from uuid import uuid4


@contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """A place beside `path` to write to; it gets the final name when all is written, and is removed when that fails."""
    path.parent.mkdir(parents=True, exist_ok=True)
    # A name has 255 bytes at most; these 40 letters may have 4 each.
    aside = path.with_name(f".{path.stem[:40]}.{uuid4().hex[:8]}.part{path.suffix}")
    try:
        yield aside
        aside.replace(path)
    except OSError as error:
        if error.errno and error.filename in (None, str(aside), aside):  # a library's own error may name no file
            error.filename = str(path)
        raise
    finally:
        aside.unlink(missing_ok=True)


@contextmanager
def atomic_write_all(*paths: Path) -> Iterator[list[Path]]:
    """Places to write to for files that belong together: all get their names when all are written, else none does."""
    with ExitStack() as stack:
        yield [stack.enter_context(atomic_write(path)) for path in paths]


def remove_stale(folder: Path, idle: float = 0) -> None:
    """Remove what a process has left that was killed while it wrote a file into a folder, or below.

    Args:
        idle: seconds for which nothing was written to it, where other processes may be writing files of their own.
    """
    for stale in folder.rglob(".*.part*"):
        with suppress(FileNotFoundError):  # it is finished
            if time.time() - stale.stat().st_mtime >= idle:
                stale.unlink()


def write_text(path: Path, text: str) -> None:
    with atomic_write(path) as aside:
        aside.write_text(text, encoding="utf-8")


def write_json(path: Path, figures: dict[str, Any]) -> None:
    """JSON has no NaN: an absent class is null."""

    def plain(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: plain(item) for key, item in value.items()}
        return None if isinstance(value, float) and not math.isfinite(value) else value

    write_text(path, json.dumps(plain(figures), indent=2, allow_nan=False) + "\n")


def write_csv(path: Path, rows: list[dict[str, Any]]) -> None:
    """A table with a heading; a row that lacks a column has nothing there."""
    columns = list(dict.fromkeys(key for row in rows for key in row))
    with atomic_write(path) as aside, aside.open("w", newline="", encoding="utf-8", errors="backslashreplace") as file:
        writer = csv.DictWriter(file, columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
