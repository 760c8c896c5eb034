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
from difflib import get_close_matches
from pathlib import Path, PurePath

from segmentation.data.annotations import names_in
from segmentation.data.io import IMAGE_SUFFIXES, MASK_SUFFIXES
from segmentation.errors import InputError, readable

#: Name of a sample -> its files of one kind (image, mask, instance, validity mask); of masks there may be several.
Files = dict[str, list[Path]]

#: Name of a sample -> kind -> files.
Samples = dict[str, dict[str, list[Path]]]

#: What the words of a pattern stand for in a path.
Match = dict[str, str]

#: What tools that write YOLO's labels put beside them.
NAMES_OF_CLASSES = "classes.txt"

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
    words = _words(patterns["image"])
    for pattern in patterns.values():
        if not set(words) <= set(_words(pattern)):
            raise InputError(f"{patterns['image']} and {pattern} must have the same words in braces")
    images = set()
    if "class" in words:
        classes = []
    elif "class" in _words(patterns["mask"]):
        images = {match["name"] for _, match in _match_files(patterns["image"])}
    folded = {name.casefold(): name for name in classes}
    class_of = {}
    match_of: dict[Path, Match] = {}
    problems: list[str] = []
    found: dict[str, Files] = {}
    for kind in reversed(patterns):  # the images last: {name}.png fits x_mask.png too
        matches = {}
        for file, match in _match_files(patterns[kind], images):
            if kind == "image" and file in match_of:
                continue
            is_left_out = False
            if "class" in match:
                thing = match["class"]
                if thing not in classes:
                    thing = folded.get(thing.casefold(), thing)  # as paths match their patterns
                match["class"] = thing
                is_left_out = bool(classes) and thing not in classes
                if not is_left_out or match["name"] in images:
                    class_of[file] = thing
            if not is_left_out:
                matches[file] = match
        match_of |= matches
        several = kind == "mask" and "*" in patterns[kind].stem
        found[kind] = _by_name(matches, words, several, problems)
    for kind, pattern in patterns.items():
        if folder_of(pattern).is_file():
            found[kind] = _name_by_stem(found[kind], found["image"])
    samples = {}
    for name in sorted(set.intersection(*map(set, found.values()))):
        samples[name] = {kind: found[kind][name] for kind in patterns}
    problems += _unpaired(patterns, found, match_of, classes, shared)
    return samples, class_of, [readable(problem) for problem in problems]


def _by_name(
    matches: dict[Path, Match],
    words: list[str],
    several: bool,
    problems: list[str],
) -> Files:
    """Files by the names of their samples, of which each has one, or `several`. What is left out goes to `problems`.

    Raises:
        InputError: files in several folders have one name.
    """
    named: Files = {}
    first_of: dict[tuple, Path] = {}
    for file, match in matches.items():
        name = readable("/".join(match[word] for word in words))
        first = first_of.setdefault((name, match.get("class")), file)
        if first.parent != file.parent:
            raise InputError(
                f"{file}: {first} has the same name, {name}. Name the folders that tell them apart in images and "
                "masks alike, e.g. {folder}/{name}.png, not */{name}.png"
            )
        if several or first == file:
            named.setdefault(name, []).append(file)
        else:
            problems.append(f"{file}: {first.name} has the same name but for its suffix. Keep one of them")
    return named


def _unpaired(
    patterns: dict[str, Path],
    found: dict[str, Files],
    match_of: dict[Path, Match],
    classes: list[str],
    shared: Container[str],
) -> Iterator[str]:
    """Images that lack a file of another kind, and masks that lack an image, a message each."""
    declared = "|".join(classes) or "{class}"
    pairs = [("image", kind) for kind in patterns]
    for kind, other in [*pairs, ("mask", "image")]:
        if kind in shared:
            continue
        wanted = str(patterns[other]).replace("{class}", declared)
        if any(files[0].suffix == ".txt" for files in found[other].values()):
            wanted = f"{wanted.replace('.*', '.txt')}, empty where it shows nothing"
        for name in sorted(found[kind].keys() - found[other].keys()):
            file = found[kind][name][0]
            missing = wanted
            for word, text in match_of[file].items():
                missing = missing.replace(f"{{{word}}}", text)
            yield f"{file}: this {kind} has no {other}. Fix: add {missing}, or take the {kind} away"


def _words(pattern: Path) -> list[str]:
    """The words in braces of a pattern, each once."""
    return list(dict.fromkeys(WORD.findall(str(pattern))))


def _name_by_stem(entries: Files, images: Files) -> Files:
    """What a table describes, by the image's name: the table's, or that of the same stem, whatever the folders.

    Raises:
        InputError: two entries are one image's.
    """
    by_stem = {PurePath(name).name: name for name in images}
    renamed: Files = {}
    for entry, files in entries.items():
        name = entry
        if entry not in images:
            name = by_stem.get(PurePath(entry).name, entry)
        if name in renamed:
            raise InputError(
                f"{files[0]} and {renamed[name][0]} may both be {name}. "
                "Fix: images: a folder above, so that names differ"
            )
        renamed[name] = files
    return renamed


def _match_files(pattern: Path, names: Container[str] = ()) -> Iterator[tuple[Path, Match]]:
    """Files that fit a pattern, each with what its words stand for; `{name}` for one of `names`, where it can.

    Raises:
        InputError: their folder is missing, or cannot be opened.
    """
    folder = folder_of(pattern)
    if not folder.exists():
        raise no_such_folder(
            folder, "Set data.dataset.root, or data.dataset.images and data.dataset.masks to the names of your folders"
        )
    regex = re.escape(pattern.as_posix()).replace(r"\*\*/", "(.*/)?").replace(r"\*", "[^/]*")
    for word in _words(pattern):
        escaped = rf"\{{{word}\}}"
        group = ".+" if word == "name" else "[^/]+"
        regex = regex.replace(escaped, f"(?P<{word}>{group})", 1)
        regex = regex.replace(escaped, f"(?P={word})")
    pictures = list(walk(folder, IMAGE_SUFFIXES | {pattern.suffix.lower()}))
    for file in pictures or walk(folder, MASK_SUFFIXES):
        match = _match(regex, file.as_posix())
        if not match:
            continue
        name = match["name"]
        shorter = None
        while names and name and not shorter:  # 0_red_car.png is 0 and red_car, not 0_red and car
            if name in names:
                shorter = _match(regex.replace("(?P<name>.+)", f"(?P<name>{re.escape(name)})"), file.as_posix())
            name = name[:-1]
        yield file, shorter or match


def _match(regex: str, path: str) -> Match | None:
    match = re.fullmatch(regex, path, re.DOTALL | re.IGNORECASE)
    return match.groupdict() if match else None


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
    for place, folders, files in os.walk(folder, onerror=_refuse_folder, followlinks=True):
        folders[:] = [name for name in sorted(folders) if not _is_left_out(Path(place, name))]
        for name in sorted(files):
            path = Path(place, name)
            is_other = name.startswith(".") or name == NAMES_OF_CLASSES
            if not is_other and path.suffix.lower() in suffixes:
                yield path


def _is_left_out(folder: Path) -> bool:
    """Whether a folder is hidden, or a link to one that it lies in."""
    return folder.name.startswith(".") or folder.parent.resolve().is_relative_to(folder.resolve())


def no_such_folder(folder: Path, fix: str) -> InputError:
    """The error of a missing folder, with the folders that lie where it should, those of the likest names first."""
    place = folder.parent
    while not place.is_dir():
        place = place.parent
    name = folder.relative_to(place).parts[0]
    names = [entry.name for entry in place.iterdir() if entry.is_dir() and not entry.name.startswith(".")]
    there = ", ".join(get_close_matches(name, names, n=6, cutoff=0))
    where = "this folder" if place == Path() else place
    holds = f", but {where} holds {there}" if there else ""
    return InputError(f"{folder}: no such folder{holds}. {fix}")


def _refuse_folder(error: OSError) -> None:
    """os.walk would leave the folder out without a word."""
    raise InputError(f"{error.filename}: cannot be opened ({error.strerror}). Allow yourself to read it") from error
