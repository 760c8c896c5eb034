"""Files that describe masks: tables, which describe those of many images (COCO's JSON, run lengths in a .csv), and
files of one image (labelme's JSON, YOLO's polygons).

What a table says of one image has a path, as if the table were a folder: `instances.json/a/01.jpg`. Shapes are drawn in
the file's order, a later one over an earlier one. What no shape covers is the first class.
"""

import csv
import json
import re
from collections.abc import Iterable
from contextlib import suppress
from functools import lru_cache
from itertools import count, filterfalse
from pathlib import Path, PurePath
from typing import Any, NamedTuple

import numpy as np

from segmentation.data.io import IMAGE_SUFFIXES, check_file
from segmentation.data.labels import IGNORE_INDEX, Labels
from segmentation.data.mask_values import as_yaml, name_of
from segmentation.errors import InputError, one_line

#: Suffixes of all these files.
DESCRIPTIONS = (".json", ".csv", ".txt")

#: Kaggle's run lengths: the start and the length of each run.
RUNS = re.compile(r"\s*\d+(\s+\d+)+\s*")

#: What tables of run lengths call their columns of names and of classes, in small letters without underscores.
NAME_COLUMNS = ("imageid", "image", "filename", "imageidclassid", "imagelabel")
CLASS_COLUMNS = ("classid", "class", "classname", "label", "categoryid", "category")

#: YOLO's coordinates are 1 at most, but for rounding, and for polygons that reach beyond the image.
MAX_SHARE = 2

#: A name, or a number where the file has no names.
Category = str | int

#: The category of COCO's crowds, which count nowhere.
CROWD = ""


class Shape(NamedTuple):
    """A region of an image."""

    category: Category
    region: Any  # a list of polygons, arrays of x and y in turn; COCO's run lengths, a dict; or Kaggle's, a text
    relative: bool = False  # whether x and y are shares of the sides


class Drawing(NamedTuple):
    """What is drawn in an image."""

    shapes: list[Shape]
    size: tuple[int, int] | None = None  # (H, W) of the image, where the file says it


#: Path of an image, as the file has it, or "." -> what is drawn in it.
Drawings = dict[str, Drawing]


def file_of(path: Path) -> Path:
    """The file on disk that a path leads to: of `instances.json/a/01.jpg`, the JSON file."""
    for parent in path.parents:
        if parent.is_file():
            return parent
    return path


def names_in(table: Path) -> list[str]:
    """Names of the images whose masks a table describes."""
    return list(_read(table, table.stat().st_mtime_ns))


def read_drawing(path: Path) -> Drawing:
    """What is drawn in one image.

    Raises:
        InputError: the file cannot be used.
    """
    file = file_of(path)
    check_file(file)
    drawings = _read(file, file.stat().st_mtime_ns)
    name = path.relative_to(file).as_posix()
    if name not in drawings:
        raise InputError(f"{file}: describes many masks. Fix: masks: {file.name}, with its folder")
    return drawings[name]


@lru_cache(maxsize=8)
def _read(file: Path, modified: int) -> Drawings:
    """All that is drawn in a file, as it was when it was modified last."""
    try:
        text = file.read_text(encoding="utf-8-sig")
        if file.suffix == ".csv":
            drawings = _read_runs(text)
        elif file.suffix == ".txt":
            drawings = _read_yolo(text)
        else:
            content = json.loads(text)
            drawings = _read_labelme(content) if "shapes" in content else _read_coco(content)
    except Exception as error:  # a file of another format lacks anything
        raise InputError(
            f"{file}: cannot be read ({type(error).__name__}: {one_line(error)}). It must hold polygons, as COCO, "
            "labelme and YOLO have them; or, as .csv, run lengths"
        ) from error
    return {PurePath(name.replace("\\", "/").lstrip("/")).as_posix(): drawing for name, drawing in drawings.items()}


def _read_coco(content: Any) -> Drawings:
    names = {category["id"]: category["name"] for category in content["categories"]}
    by_id = {image["id"]: Drawing([], (image["height"], image["width"])) for image in content["images"]}
    for annotation in content["annotations"]:
        number = annotation["category_id"]
        image_id = annotation["image_id"]
        which = f"annotation {annotation.get('id')} has"
        if number not in names:
            raise ValueError(f"{which} category_id {number}, which its categories do not list")
        if image_id not in by_id:
            raise ValueError(f"{which} image_id {image_id}, which its images do not list")
        if "segmentation" not in annotation:
            raise ValueError(f"{which} no segmentation; a box is no mask")
        category = CROWD if annotation.get("iscrowd") else names[number]
        region = annotation["segmentation"]
        if isinstance(region, list):  # an array takes a quarter of the memory of a list
            region = [np.array(polygon, float) for polygon in region]
        by_id[image_id].shapes.append(Shape(category, region))
    return {image["file_name"]: by_id[image["id"]] for image in content["images"]}


def _read_labelme(content: Any) -> Drawings:
    shapes = []
    for shape in content["shapes"]:
        kind = shape["shape_type"]
        label = shape["label"]
        points = np.array(shape["points"], float)
        if kind == "rectangle":  # by two corners
            (left, top), (right, bottom) = points
            points = np.array([[left, top], [right, top], [right, bottom], [left, bottom]])
        elif kind != "polygon":
            raise ValueError(f"{label} is drawn as a {kind}, which is no polygon or rectangle")
        shapes.append(Shape(label, [points.ravel()]))
    return {".": Drawing(shapes, (content["imageHeight"], content["imageWidth"]))}


def _read_yolo(text: str) -> Drawings:
    shapes = []
    for line in text.splitlines():
        number, *shares = line.split()
        polygon = np.array(shares, float)
        # 0 is the background, as where Ultralytics converts masks.
        category = int(number) + 1
        if category < 1 or len(polygon) < 6 or len(polygon) % 2 or polygon.max() > MAX_SHARE:
            raise ValueError(
                f"class {number} has {len(polygon)} coordinates up to {polygon.max(initial=0):g}; the class must be 0 "
                "or more, the coordinates a polygon of three points or more, no box, as shares of the sides"
            )
        shapes.append(Shape(category, [polygon], relative=True))
    return {".": Drawing(shapes)}


def _read_runs(text: str) -> Drawings:
    drawings: Drawings = {}
    for row in csv.DictReader(text.splitlines()):
        columns = {key.lower().replace("_", ""): value for key, value in row.items()}
        name = _first_of(columns, NAME_COLUMNS) or next(iter(row.values()))
        category = _first_of(columns, CLASS_COLUMNS) or 1
        image, _, ending = name.rpartition("_")
        if PurePath(image).suffix.lower() in IMAGE_SUFFIXES:  # a.png_cat
            name = image
            category = ending
        if "." not in name:
            name = f"{name}."  # as others, it has a suffix
        drawing = drawings.setdefault(name, Drawing([]))
        with suppress(ValueError):  # a name
            category = int(category)
        for value in filter(RUNS.fullmatch, row.values()):
            drawing.shapes.append(Shape(category, value))
    return drawings


def _first_of(columns: dict[str, str], names: Iterable[str]) -> str | None:
    """The value of the first of these columns that a row has."""
    return next((columns[name] for name in names if columns.get(name)), None)


def class_indices(
    masks: Iterable[Path],
    classes: dict | None,
    ignored: list[Any],
) -> dict[Category, int]:
    """The class index of each category: of the class of its name, or of the one whose mask value is its number.

    Args:
        masks: all masks.
        classes: the classes as users declare them, or None.
        ignored: names and numbers of categories that count nowhere.

    Raises:
        InputError: a category has no class; its `fix` declares it.
    """
    found: set[Category] = set()
    empty = "nothing is drawn in the masks. Fix: draw something, or say what may be: classes: {background: 0, cat: 1}"
    for path in masks:
        try:
            drawing = read_drawing(path)
        except InputError as error:  # whoever loads it says so, if others can be read
            empty = str(error)
        else:
            found.update(shape.category for shape in drawing.shapes)
    if not found and not classes:
        raise InputError(empty)
    indices = dict.fromkeys([CROWD, *ignored], IGNORE_INDEX)
    indices |= {0: 0, "background": 0}
    if classes:
        labels = Labels.parse(classes)
        for index, values in enumerate(labels.values):
            indices |= dict.fromkeys([labels.names[index], *values], index)
        if labels.names[0] in found - {"background"}:
            raise InputError(
                f"classes begins with {labels.names[0]}, which is drawn. Fix: begin with what no shape covers: "
                "{background: 0, ...}"
            )
    missing = sorted(found - indices.keys(), key=str)
    if classes and not missing:
        return indices
    suggested = dict(classes or {"background": 0})
    free = filterfalse(indices.__contains__, count())
    for category in missing:
        if isinstance(category, int):
            suggested[name_of(category)] = category
        else:
            suggested[category] = next(free)
    drawn = ", ".join(map(str, missing))
    fix = as_yaml("classes", suggested)
    ignore = as_yaml("ignore", ignored + missing)
    raise InputError(
        f"drawn, but not declared: {drawn}. Fix: {fix}, or, what counts nowhere, {ignore}",
        {"classes": suggested},
    )
