"""What the user reads when something that they gave cannot be used: one line that names it and the fix."""

import unicodedata
from dataclasses import dataclass


class InputError(Exception):
    """Something the user gave (a file, an option, a name) cannot be used. The message names it and says the fix, in one
    line."""

    def __str__(self) -> str:
        return readable(super().__str__())


def readable(text: str) -> str:
    """Text with what is no UTF-8, as names of files may be, and with line breaks and other control characters written
    as escapes: such a name is one line, and any file or figure can hold it."""
    plain = text.encode("utf-8", errors="backslashreplace").decode()
    return "".join(repr(letter)[1:-1] if unicodedata.category(letter) == "Cc" else letter for letter in plain)


@dataclass(frozen=True)
class Problem:
    """Something wrong, with its remedy in the text.

    Args:
        text: one line.
        stops: whether it would stop a run; else it only spoils one.
    """

    text: str
    stops: bool = False


ENLARGE_SHARED_MEMORY = "Fix: docker run --shm-size 8g, or --data.num_workers 0"
