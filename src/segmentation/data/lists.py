"""Lists that data sets ship: which sample is of which split, which mask value is which class."""

import csv
import os
from pathlib import Path
from typing import Any

import yaml

from segmentation.data.io import IMAGE_SUFFIXES
from segmentation.data.layout import Samples
from segmentation.errors import InputError, readable

#: What a column of splits is called; a cell of another column may say "train" too.
SPLIT_COLUMNS = ("split", "set", "subset", "fold", "phase")


def read_rows(source: Path) -> list[list[str]]:
    """Rows of a table: its cells; of a text: the line and its words.

    Args:
        source: a file, .csv and .tsv with commas, semicolons or tabs; where there is none, it has no rows.
    """
    if not source.is_file():
        return []
    text = source.read_text(encoding="utf-8-sig", errors="surrogateescape")
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    if source.suffix.lower() in (".csv", ".tsv"):
        return list(csv.reader(lines, delimiter=max(",;\t", key=text.count), skipinitialspace=True))
    return [[line, *line.replace(";", " ").split()] for line in lines]


def choose_samples(
    source: Path,
    samples: Samples,
    split: str | None,
) -> Samples:
    """The samples that a list names.

    Args:
        source: a text or a table; or YAML or JSON, with a list for each split.
        samples: all that there are.
        split: what the split is called in a list of all; None: the list is of this split alone.

    Raises:
        InputError: a row names no sample; it is no YAML.
    """
    if source.suffix.lower() in (".yaml", ".yml", ".json"):
        rows = [[str(entry)] for entry in _read_lists(source).get(split) or []]
    else:
        rows = read_rows(source)
        if split is not None:
            place = _split_column(rows)
            rows = [row for row in rows if split.lower() in map(str.lower, row[place])]
    chosen = {}
    for number, row in enumerate(rows):
        by_length = sorted(row, key=len, reverse=True)  # a path rather than a number
        names = [_find_name(cell, samples) for cell in by_length]
        name = next(filter(None, names), None)
        if name:
            chosen[name] = samples[name]
        elif number or source.suffix.lower() != ".csv":  # whose first row may be a header
            raise InputError(f"{source}: lists {by_length[0]}, but no image of that name has all it needs")
    return chosen


def _split_column(rows: list[list[str]]) -> slice:
    """The cells of a row that may say its split: one, where a header names it, or all."""
    header = [cell.lower() for cell in rows[0]] if rows else []
    for name in SPLIT_COLUMNS:
        if name in header:
            return slice(header.index(name), header.index(name) + 1)
    return slice(None)


def describe_list(source: Path) -> str:
    """What a list of all samples has: the columns of a table, or the lists of a YAML file."""
    if source.suffix.lower() in (".yaml", ".yml", ".json"):
        return f"has the lists {', '.join(map(str, _read_lists(source)))}"
    rows = read_rows(source)
    return f"has the columns {', '.join(rows[0])}" if rows else "has no rows"


def _read_lists(source: Path) -> dict[Any, Any]:
    """What a YAML or JSON file lists of each split."""
    try:
        return dict(yaml.safe_load(source.read_bytes()))
    except (OSError, yaml.YAMLError, TypeError, ValueError) as error:
        raise InputError(f"{source}: is no YAML that has a list of names for each split") from error


def _find_name(entry: str, samples: Samples) -> str | None:
    """The sample of an entry: its name, its file, or a path that ends so."""
    name = readable(entry)
    while name:
        stem, suffix = os.path.splitext(name)
        if name in samples:
            return name
        if stem in samples and suffix.lower() in IMAGE_SUFFIXES:
            return stem
        _, _, name = name.partition("/")
    return None


def read_classes(source: Path) -> dict[str, int]:
    """The classes of Roboflow's `_classes.csv`, a value and a name in each row; none where there is no such file."""
    return {row[1]: int(row[0]) for row in read_rows(source) if row[0].isdecimal()}
