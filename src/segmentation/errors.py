"""Errors that the user can mend: one line that names what is wrong and the fix."""

import unicodedata
from dataclasses import dataclass

ENLARGE_SHARED_MEMORY = "Fix: docker run --shm-size 8g, or --data.num_workers 0"


class InputError(Exception):
    """A file, an option or a name that the user gave cannot be used. The message names it and the fix, in one line.

    Args:
        message: the line.
        fix: options of the data set that would mend it.
    """

    def __init__(self, message: str, fix: dict | None = None) -> None:
        super().__init__(message)
        self.fix = fix or {}

    def __str__(self) -> str:
        return readable(super().__str__())


@dataclass(frozen=True)
class Problem:
    """What the doctor found wrong.

    Args:
        text: one line, with the fix.
        stops: whether it stops a run.
    """

    text: str
    stops: bool = False


def plural(count: int, noun: str) -> str:
    """A number with its noun: 1 file, 2 files."""
    return f"{count:,} {noun}" if count == 1 else f"{count:,} {noun}s"


def readable(text: str) -> str:
    """Escape control characters and bytes that are no UTF-8: file names may hold both. Compose letters with their
    accents, which macOS takes apart."""
    text = text.encode("utf-8", errors="backslashreplace").decode()
    text = unicodedata.normalize("NFC", text)
    letters = [repr(letter)[1:-1] if unicodedata.category(letter) == "Cc" else letter for letter in text]
    return "".join(letters)


def one_line(error: object) -> str:
    """A library's error as one line, of 300 letters at most."""
    return " ".join(str(error).split())[:300]
