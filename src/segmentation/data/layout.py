"""Which files make up a sample: patterns of paths.

A pattern is a path, below the data set's root where it is not absolute. Words in braces stand for text that image and
mask have in common, and make up the sample's name: `{name}` across folders, any other word, like `{patient}`, within
one folder's or file's name. `*` stands for anything there, `**/` for any folders. Without `{name}` it is a folder:

    images/{split}                    parallel folders: every image below, named by its path there
    {name}.jpg, {name}_mask.png       suffixes
    {name}/{name}.png                 one folder per image
    {patient}/scans/{name}            images of one name in many folders
    {split}/{name}/masks/*            one mask per object: all of them make up the sample's mask
    {class}/{name}_mask.png           the class from a folder's name
    masks/{name}_{class}.png          one mask per class, where `{class}` stands in masks alone
    labels/{name}.txt                 files that describe masks (see `segmentation.data.annotations`)
    instances_{split}.json            a table, which describes the masks of many images
"""

import os
import re
from collections.abc import Container, Iterator
from pathlib import Path

from segmentation.data.annotations import names_by_stem, names_in
from segmentation.data.io import IMAGE_SUFFIXES, MASK_SUFFIXES
from segmentation.errors import InputError, readable

#: Name of a sample -> its files of one kind (image, mask, instance, validity mask); of masks there may be several.
Files = dict[str, list[Path]]

#: Name of a sample -> kind -> files.
Samples = dict[str, dict[str, list[Path]]]

#: What the words of a pattern stand for in a path.
Match = dict[str, str]

#: A word of a pattern.
WORD = re.compile(r"\{([^\W\d]\w*)\}")


def complete(
    root: Path,
    text: str,
    split: str,
) -> Path:
    """A pattern as a whole path, with a name and a suffix; `{split}` stands for `split`."""
    path = root / text.replace("{split}", split)
    if "{name}" not in text:
        path /= "{name}"
    suffix = path.suffix.lower()
    if suffix != ".*" and suffix not in MASK_SUFFIXES:
        path = path.with_name(f"{path.name}.*")
    return path


def folder_of(pattern: Path) -> Path:
    """The folder below which all files lie that fit a pattern, or the table."""
    folder = Path()
    for part in pattern.parts[:-1]:
        if "{" in part or "*" in part:
            break
        folder /= part
    return folder


def find_samples(
    patterns: dict[str, Path],
    classes: list[str],
    shared: Container[str] = (),
) -> tuple[Samples, dict[Path, str], list[str]]:
    """Find the samples of one split.

    Args:
        patterns: kind (image, mask, instance, validity mask) -> pattern, as `complete` gives it.
        classes: names of the declared classes, which `{class}` stands for where masks alone have it.
        shared: kinds of which other splits have files in the same folder.

    Returns:
        the samples; file -> the class that its path names, declared or not; and what is wrong with files that became no
        sample, a message each.

    Raises:
        InputError: a folder is missing; patterns do not go together; files in several folders have one name.
    """
    text = str(patterns["image"])
    words = WORD.findall(text)
    words = list(dict.fromkeys(words))
    words.sort(key="class".__ne__)  # a name begins with the class
    if "class" in words:
        classes = []
    class_of: dict[Path, str] = {}
    match_of: dict[str, Match] = {}
    problems: list[str] = []
    found: dict[str, Files] = {}
    taken: set[Path] = set()
    for kind in reversed(patterns):  # the images last: {name}.png fits x_mask.png too
        pattern = patterns[kind]
        own_words = WORD.findall(str(pattern))
        if not set(words) <= set(own_words):
            raise InputError(f"{patterns['image']} and {pattern} must have the same words in braces")
        several = kind == "mask" and "*" in pattern.stem
        found[kind] = {}
        for file, match in _match_files(pattern, classes):
            if kind == "image" and file in taken:
                continue
            parts = [match[word] for word in words]
            name = readable("/".join(parts))
            match_of[name] = match
            files = found[kind].setdefault(name, [])
            if "class" in match:
                class_of[file] = match["class"]
            if not files or class_of.get(file) != class_of.get(files[0]):
                files.append(file)
            elif file.parent != files[0].parent:
                raise InputError(
                    f"{file}: {files[0]} has the same name, {name}. Name the folders that tell them apart in images "
                    "and masks alike, e.g. {folder}/{name}.png, not */{name}.png"
                )
            elif several:
                files.append(file)
            else:
                first = files[0].name
                problems.append(f"{file}: {first} has the same name but for its suffix. Keep one of them")
        taken.update(*found[kind].values())
    for kind, pattern in patterns.items():
        if folder_of(pattern).is_file():
            table = found[kind]
            name_of = names_by_stem(table, found["image"])
            found[kind] = {}
            for entry, files in table.items():
                found[kind][name_of[entry]] = files
    samples = {}
    names = map(set, found.values())
    complete_names = set.intersection(*names)
    for name in sorted(complete_names):
        samples[name] = {kind: found[kind][name] for kind in patterns}
    if classes and "{class}" in str(patterns["mask"]):
        for file, match in _match_files(patterns["mask"], []):
            name = "/".join(match[word] for word in words)
            if readable(name) in samples:
                class_of.setdefault(file, match["class"])
    pairs = []
    if "image" not in shared:
        pairs = [("image", kind) for kind in patterns]
    if "mask" not in shared:
        pairs.append(("mask", "image"))
    declared = "|".join(classes) or "{class}"
    for kind, other in pairs:
        wanted = str(patterns[other]).replace("{class}", declared)
        problems += _report_alone(
            kind,
            found[kind],
            found[other],
            f"{other}. Fix: add {wanted}",
            match_of,
        )
    problems = [readable(problem) for problem in problems]
    return samples, class_of, problems


def _report_alone(
    kind: str,
    files: Files,
    others: Files,
    fix: str,
    match_of: dict[str, Match],
) -> list[str]:
    """A message for each file of a kind without its other; the fix has words to be filled."""
    problems = []
    for name in sorted(files.keys() - others.keys()):
        filled = fix
        for word, text in match_of[name].items():
            filled = filled.replace(f"{{{word}}}", text)
        file = files[name][0]
        problems.append(f"{file}: this {kind} has no {filled}, or take the {kind} away")
    return problems


def _match_files(
    pattern: Path,
    classes: list[str],
) -> Iterator[tuple[Path, Match]]:
    """Files that fit a pattern, each with what its words stand for.

    Raises:
        InputError: their folder is missing, or cannot be opened.
    """
    folder = folder_of(pattern)
    if not folder.exists():
        raise InputError(f"{folder}: no such folder. Set data.dataset.root, or the folder names images and masks")
    stands_for = {"name": ".+"}
    if classes:
        names = map(re.escape, classes)
        stands_for["class"] = "|".join(names)
    text = pattern.as_posix()
    regex = re.escape(text)
    regex = regex.replace(r"\*\*/", "(.*/)?")
    regex = regex.replace(r"\*", "[^/]*")
    for word in WORD.findall(str(pattern)):
        escaped = rf"\{{{word}\}}"
        group = stands_for.get(word, "[^/]+")
        regex = regex.replace(escaped, f"(?P<{word}>{group})", 1)
        regex = regex.replace(escaped, f"(?P={word})")
    flags = re.DOTALL | re.IGNORECASE  # a name may hold a line break
    fits = re.compile(regex, flags)
    suffixes = IMAGE_SUFFIXES | {pattern.suffix.lower()}
    pictures = list(walk(folder, suffixes))
    for file in pictures or walk(folder, MASK_SUFFIXES):
        path = file.as_posix()
        match = fits.fullmatch(path)
        if match:
            yield file, match.groupdict()


def walk(
    folder: Path,
    suffixes: Container[str] = IMAGE_SUFFIXES,
) -> Iterator[Path]:
    """Image files, or those of other suffixes, below a folder, sorted. Of a table, all that it describes.

    Links are followed, and a loop of links ends. Hidden folders are left out: .ipynb_checkpoints holds copies.

    Raises:
        InputError: a folder cannot be opened.
    """
    if folder.is_file():
        yield from map(folder.joinpath, names_in(folder))
        return
    tree = os.walk(
        folder,
        onerror=_refuse_folder,
        followlinks=True,
    )
    for place, folders, files in tree:
        here = Path(place).resolve()
        for name in sorted(folders):
            folders.remove(name)
            target = Path(place, name).resolve()
            is_loop = here.is_relative_to(target)  # a link to a folder that we are in
            if not name.startswith(".") and not is_loop:
                folders.append(name)
        for name in sorted(files):
            path = Path(place, name)
            if not name.startswith(".") and path.suffix.lower() in suffixes:
                yield path


def _refuse_folder(error: OSError) -> None:
    """os.walk would leave the folder out without a word."""
    raise InputError(f"{error.filename}: cannot be opened ({error.strerror}). Allow yourself to read it") from error
