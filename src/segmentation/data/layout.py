"""Which files make up a sample: patterns of paths, and list files that name the samples of a split.

A pattern is a path below the data set's root with `{split}`, `{name}` (the sample's name, across folders), `{class}` (a
folder named like a class) and `*` (anything within one folder's or file's name). Without `{name}` it is a folder:

    images/{split}                    parallel folders: every image below, named by its path there
    {name}.jpg, {name}_mask.png       suffixes
    {name}/image.png                  one folder per image
    {split}/{name}/masks/*            one mask per object: all of them make up the sample's mask
    {class}/{name}_mask.png           the class from a folder's name
"""

import csv
import os
import re
from collections.abc import Iterator
from pathlib import Path

from segmentation.data.io import IMAGE_SUFFIXES
from segmentation.errors import InputError, readable

#: A sample's files of each kind (image, mask, instance), by the sample's name; masks may be one per object.
Files = dict[str, list[Path]]

PLACEHOLDERS = {"{name}": r"(?P<name>.+?)", "{class}": r"(?P<folder>[^/]+)", "*": r"[^/]*"}
PLACEHOLDER = re.compile(r"(\{name\}|\{class\}|\*)")


class Pattern:
    """One kind of files below `root`; `{split}` stands for `split`."""

    def __init__(self, root: Path, text: str, split: str) -> None:
        text = text.strip("/").replace("{split}", split)
        text = text if "{name}" in text else f"{text}/{{name}}"
        fixed = PLACEHOLDER.split(text)[0].rpartition("/")[0]
        self.folder = root / fixed
        self.text = Path(text).relative_to(fixed).as_posix()  # below the folder
        self.several = "*" in text
        regex = "".join(PLACEHOLDERS.get(part, re.escape(part)) for part in PLACEHOLDER.split(self.text))
        has_ending = Path(text).suffix.lower() in IMAGE_SUFFIXES
        # DOTALL: a name may hold a line break.
        ending, flags = ("", re.DOTALL | re.IGNORECASE) if has_ending else (r"\.[^./]+", re.DOTALL)
        self.regex = re.compile(regex + ending, flags)

    def find(self) -> dict[str, list[Path]]:
        """Image files that match, by the sample's name; the class's folder is part of a name."""
        found: dict[str, list[Path]] = {}
        for path in walk(self.folder):
            match = self.regex.fullmatch(path.relative_to(self.folder).as_posix())
            if match:
                folder = match.groupdict().get("folder")
                name = readable(f"{folder}/{match['name']}" if folder else match["name"])
                found.setdefault(name, []).append(path)
        return found

    def example(self, name: str) -> Path:
        """Where the file of a sample would be."""
        folder, _, rest = name.partition("/") if "{class}" in self.text else ("", "", name)
        path = self.folder / self.text.replace("{class}", folder).replace("{name}", rest).replace("*", "1")
        return path if path.suffix.lower() in IMAGE_SUFFIXES else path.with_name(f"{path.name}.png")


def walk(folder: Path) -> Iterator[Path]:
    """Image files below a folder, sorted, through links (a loop of links ends); nothing hidden: .ipynb_checkpoints and
    the like hold copies.

    Raises:
        InputError: a folder cannot be opened.
    """
    for place, folders, files in os.walk(folder, onerror=_refuse_folder, followlinks=True):
        here = Path(place).resolve()
        # A link to a folder that we are in would never end.
        folders[:] = sorted(n for n in folders if n[0] != "." and not here.is_relative_to(Path(place, n).resolve()))
        for name in sorted(files):
            if name[0] != "." and os.path.splitext(name)[1].lower() in IMAGE_SUFFIXES:
                yield Path(place, name)


def _refuse_folder(error: OSError) -> None:
    """os.walk would leave the folder out without a word."""
    raise InputError(
        f"{error.filename}: cannot be opened ({error.strerror}). Give yourself the right to read it"
    ) from error


def pair(patterns: dict[str, Pattern], shared: set[str]) -> tuple[dict[str, Files], list[str]]:
    """The samples that the patterns find, and what is wrong with the other files.

    Args:
        patterns: of image, mask and, where there are some, instance.
        shared: kinds whose files are those of all splits: some may belong to another split's images.

    Returns:
        name -> kind -> files, in the order of the names; and one message for each file that is left out.
    """
    found = {kind: pattern.find() for kind, pattern in patterns.items()}
    problems = []
    if patterns["image"].folder == patterns["mask"].folder:  # {name}.png fits x_mask.png too
        masks = {path for kind, files in found.items() if kind != "image" for paths in files.values() for path in paths}
        images = {name: [path for path in paths if path not in masks] for name, paths in found["image"].items()}
        found["image"] = {name: paths for name, paths in images.items() if paths}
    for kind, files in found.items():
        for name, paths in files.items():
            if len(paths) > 1 and not (kind == "mask" and patterns[kind].several):
                problems.append(f"{paths[1]}: {paths[0].name} has the same name but for its ending. Keep one of them")
                files[name] = paths[:1]
    for kind, other in (("image", "mask"), ("mask", "image"), ("image", "instance")):
        if other in found and kind not in shared:
            for name in sorted(found[kind].keys() - found[other].keys()):
                problems.append(
                    f"{found[kind][name][0]}: this {kind} has no {other}. "
                    f"Fix: add {patterns[other].example(name)}, or take the {kind} away"
                )
    names = sorted(set.intersection(*(set(files) for files in found.values())))
    samples = {name: {kind: files[name] for kind, files in found.items()} for name in names}
    return samples, [readable(problem) for problem in problems]


def read_list(path: Path, split: str) -> list[str]:
    """The names in a list file of a split: lines of text, or of a .csv file with a heading of `name` and `split`.

    Raises:
        InputError: no such column.
    """
    text = path.read_text(encoding="utf-8-sig", errors="surrogateescape")
    if path.suffix.lower() != ".csv":
        return [line.strip() for line in text.splitlines() if line.strip()]
    rows = list(csv.DictReader(text.splitlines()))
    for column in ("name", "split"):
        if not rows or rows[0].get(column) is None:
            raise InputError(f"{path}: has no column {column!r}. Its first line must be: name,split")
    return [row["name"] for row in rows if row["split"] == split]


def listed(source: Path, lines: list[str], samples: dict[str, Files], folders: list[Path]) -> dict[str, Files]:
    """The samples that a list names: as they are called, by file name, or by a path that ends so; what follows a space
    is ignored if the line as a whole is no sample.

    Raises:
        InputError: a line names no sample that has a file in each of `folders`.
    """
    chosen = {}
    for line in lines:
        paths = [Path(readable(text)) for text in (line, line.split()[0])]
        paths += [path.with_suffix("") for path in paths if path.suffix.lower() in IMAGE_SUFFIXES]
        ends = ("/".join(path.parts[first:]) for path in paths for first in range(len(path.parts)))
        name = next((end for end in ends if end in samples), None)
        if name is None:
            where = ", ".join(map(str, folders))
            raise InputError(f"{source}: lists {line}, but there is no file of that name in each of {where}")
        chosen[name] = samples[name]
    return chosen
