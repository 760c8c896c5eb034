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
from collections.abc import Container, Iterator
from itertools import chain, takewhile
from pathlib import Path

from segmentation.data.base import SPLITS
from segmentation.data.io import IMAGE_SUFFIXES
from segmentation.errors import InputError, readable

#: Files of one kind (image, mask, instance) by the sample's name; masks may be one per object.
Files = dict[str, list[Path]]

#: A split's samples: name -> kind -> files.
Samples = dict[str, dict[str, list[Path]]]


class Pattern:
    """Where the files of one kind lie, in one split.

    Args:
        root: folder of the data set.
        text: the pattern; `{split}` stands for `split`.
        split: the split's name on disk.
        several: whether a sample may have several such files.

    Attributes:
        folder: all files lie below it.
        example: path of the file of a sample, with `{name}`.
    """

    def __init__(self, root: Path, text: str, split: str, several: bool) -> None:
        path = Path(text.strip("/").replace("{split}", split))
        if "{name}" not in text:
            path = path / "{name}"
        fixed = takewhile(lambda part: "{" not in part and "*" not in part, path.parts[:-1])
        self.root = root
        self.several = several
        self.folder = root.joinpath(*fixed)
        self.example = path.as_posix().replace("{class}/{name}", "{name}").replace("*", "1")
        regex = re.escape(path.as_posix()).replace(r"\*", "[^/]*").replace(r"\{class\}", "([^/]+)")
        regex = regex.replace(r"\{name\}", "(?P<name>.+?)", 1).replace(r"\{name\}", "(?P=name)")
        if path.suffix.lower() not in IMAGE_SUFFIXES:
            regex += r"\.[^./]+"
            self.example += ".png"
        self.regex = re.compile(regex, re.DOTALL | re.IGNORECASE)  # a name may hold a line break

    def find(self, problems: list[str], taken: Container[Path] = ()) -> Files:
        """Image files that match and are not `taken`; files that are one too many go to `problems`."""
        found: Files = {}
        for path in walk(self.folder):
            match = self.regex.fullmatch(path.relative_to(self.root).as_posix())
            if match and path not in taken:
                files = found.setdefault(readable("/".join(match.groups())), [])
                if files and not self.several:
                    problems.append(f"{path}: {files[0].name} has the same name but for its suffix. Keep one of them")
                else:
                    files.append(path)
        return found


class Layout:
    """Finds the samples of each split of a data set.

    Args:
        root: folder of the data set.
        patterns: kind (image, mask, instance) -> pattern.
        called: split -> what stands for `{split}`.
        lists: list files below root, with `{split}`; or one .csv file; or None.

    Attributes:
        folders: split -> kind -> where its files lie.
        lists: split -> its list file; empty where there are none.
        has_splits: whether folders or lists say which sample is of which split; else all are of `train`.

    Raises:
        InputError: the patterns do not go together.
    """

    def __init__(self, root: Path, patterns: dict[str, str], called: dict[str, str], lists: str | None) -> None:
        images_are_apart = "{split}" in patterns["image"]
        if lists and "{split}" not in lists and not lists.endswith(".csv"):
            raise InputError(f'lists is {lists!r}: each split needs a list of its own, e.g. "{{split}}.txt"')
        if "{split}" in "".join(patterns.values()) and not (lists or images_are_apart):
            raise InputError(f"{patterns}: {{split}} stands in other folders, but not in that of the images")
        self.root = root
        self.called = called
        self.has_splits = images_are_apart or lists is not None
        self.masks_are_shared = images_are_apart and "{split}" not in patterns["mask"]
        self.lists: dict[str, Path] = {}
        self.folders: dict[str, dict[str, Pattern]] = {}
        for split, name in called.items():
            self.folders[split] = {}
            for kind, text in patterns.items():
                several = kind == "mask" and "*" in text
                self.folders[split][kind] = Pattern(root, text, name, several)
            if lists:
                self.lists[split] = root / lists.replace("{split}", name)

    def find(self) -> tuple[dict[str, Samples], list[str]]:
        """The samples of each split, and what is wrong with the files that became none."""
        found: dict[str, Samples] = {}
        problems: list[str] = []
        for split in SPLITS if self.has_splits else ("train",):
            patterns = self.folders[split]
            if split != "train" and not patterns["image"].folder.exists():
                continue
            for pattern in patterns.values():
                if not pattern.folder.is_dir():
                    raise InputError(
                        f"{pattern.folder}: no such folder. Set data.dataset.root, or the folder names images and masks"
                    )
            samples, wrong = self._pair(patterns)
            if not self.lists:
                found[split] = samples
                problems += wrong
            elif self.lists[split].is_file():
                found[split] = _choose(self.lists[split], self.called[split], samples, patterns)
        return found, [readable(problem) for problem in problems]

    def _pair(self, patterns: dict[str, Pattern]) -> tuple[Samples, list[str]]:
        problems: list[str] = []
        found = {kind: pattern.find(problems) for kind, pattern in patterns.items() if kind != "image"}
        masks = set(chain.from_iterable(found["mask"].values()))
        found["image"] = patterns["image"].find(problems, masks)  # {name}.png fits x_mask.png too
        pairs = [("image", kind) for kind in patterns if kind != "image"]
        if not self.masks_are_shared:  # else a mask may be that of another split's image
            pairs.append(("mask", "image"))
        for kind, other in pairs:
            for name in sorted(found[kind].keys() - found[other].keys()):
                wanted = self.root / patterns[other].example.replace("{name}", name)
                problems.append(
                    f"{found[kind][name][0]}: this {kind} has no {other}. Fix: add {wanted}, or take the {kind} away"
                )
        names = sorted(set.intersection(*map(set, found.values())))
        return {name: {kind: files[name] for kind, files in found.items()} for name in names}, problems


def walk(folder: Path) -> Iterator[Path]:
    """Image files below a folder, sorted, through links (a loop of links ends); nothing hidden: .ipynb_checkpoints and
    the like hold copies.

    Raises:
        InputError: a folder cannot be opened.
    """
    for place, folders, files in os.walk(folder, onerror=_refuse_folder, followlinks=True):
        here = Path(place).resolve()
        for name in sorted(folders):
            folders.remove(name)
            # A link to a folder that we are in would never end.
            if not name.startswith(".") and not here.is_relative_to(Path(place, name).resolve()):
                folders.append(name)
        for name in sorted(files):
            if not name.startswith(".") and Path(name).suffix.lower() in IMAGE_SUFFIXES:
                yield Path(place, name)


def _refuse_folder(error: OSError) -> None:
    """os.walk would leave the folder out without a word."""
    raise InputError(f"{error.filename}: cannot be opened ({error.strerror}). Allow yourself to read it") from error


def _choose(source: Path, split: str, samples: Samples, patterns: dict[str, Pattern]) -> Samples:
    """The samples that a list file names for a split: one a line, or rows of a .csv file.

    Raises:
        InputError: a line names no sample; a .csv file lacks a column.
    """
    lines = source.read_text(encoding="utf-8-sig", errors="surrogateescape").splitlines()
    if source.suffix.lower() == ".csv":
        rows = csv.DictReader(lines)
        if not {"name", "split"} <= set(rows.fieldnames or []):
            raise InputError(f"{source}: its first line must name the columns, e.g. name,split")
        lines = [row["name"] for row in rows if row["split"] == split]
    chosen = {}
    for line in filter(None, map(str.strip, lines)):
        name = next((name for name in _possible_names(line) if name in samples), None)
        if name is None:
            folders = ", ".join(str(pattern.folder) for pattern in patterns.values())
            raise InputError(f"{source}: lists {line}, but there is no file of that name in each of {folders}")
        chosen[name] = samples[name]
    return chosen


def _possible_names(line: str) -> Iterator[str]:
    """What a line of a list may call a sample: its name, its file, or a path that ends so; columns may follow."""
    first_word = re.split(r"[\s;]", line)[0]
    for text in (line, first_word):
        parts = Path(readable(text)).parts
        for first in range(len(parts)):
            name = "/".join(parts[first:])
            yield name
            stem, suffix = os.path.splitext(name)
            if suffix.lower() in IMAGE_SUFFIXES:
                yield stem
