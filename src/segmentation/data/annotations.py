"""Files that describe masks: tables, which describe those of many images (COCO's JSON, run lengths in a .csv), and
files of one image (labelme's JSON, YOLO's polygons).

What a table says of one image has a path, as if the table were a folder: `instances.json/a/01.jpg`. Shapes are drawn in
the file's order, a later one over an earlier one. A polygon covers the pixels whose centres it holds; COCO's library
draws it. What no shape covers is the first class.
"""

import csv
import json
import re
from collections.abc import Iterable
from contextlib import suppress
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from segmentation.data.io import check_file
from segmentation.data.labels import IGNORE_INDEX, Labels, as_yaml, name_of
from segmentation.errors import InputError

CROWD = ""  # the category of COCO's crowds, which count nowhere

#: Suffixes of all these files.
DESCRIPTIONS = (".json", ".csv", ".txt")

#: Kaggle's run lengths: the start and the length of each run.
RUNS = re.compile(r"\s*\d+(\s+\d+)+\s*")

Category = str | int


class Shape(NamedTuple):
    """A region of an image."""

    category: Category
    region: Any  # as in COCO, polygons or run lengths; a text: Kaggle's; an array: points in shares of the sides


class Drawing(NamedTuple):
    """What is drawn in an image."""

    shapes: list[Shape]
    size: tuple[int, int] | None = None  # (H, W) of the image, where the file says it


class CategoriesMissing(InputError):
    """Something is drawn that is no class; `suggested` are classes that declare it."""

    def __init__(self, missing: set[Category], classes: dict[str, Any]) -> None:
        names = sorted(missing, key=str)
        self.suggested = dict(classes)
        for category in names:
            is_number = isinstance(category, int)
            name = name_of(category) if is_number else str(category)
            self.suggested[name] = category if is_number else len(self.suggested)
        fix = as_yaml("classes", self.suggested)
        ignore = as_yaml("ignore", names)
        super().__init__(f"classes does not declare all that is drawn. Fix: {fix}, or, if it counts nowhere, {ignore}")


def file_of(path: Path) -> Path:
    """The file on disk that a path leads to: of `instances.json/a/01.jpg`, the JSON file."""
    return next((parent for parent in path.parents if parent.is_file()), path)


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
    name = str(path.relative_to(file))
    if name not in drawings:
        raise InputError(f"{file}: describes many masks. Fix: masks: {file.name}, with its folder")
    return drawings[name]


@lru_cache(maxsize=8)
def _read(file: Path, modified: int) -> dict[str, Drawing]:
    """Name of an image, as the file has it, or "." -> what is drawn in it."""
    try:
        text = file.read_text(encoding="utf-8-sig")
        if file.suffix == ".csv":
            return _read_runs(text)
        if file.suffix == ".txt":
            return _read_yolo(text)
        content = json.loads(text)
        return _read_labelme(content) if "shapes" in content else _read_coco(content)
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        reason = f"{type(error).__name__}: {error}"
        raise InputError(f"{file}: cannot be read ({reason}). Export polygons as COCO, labelme or YOLO") from error


def _read_coco(content: Any) -> dict[str, Drawing]:
    categories = {category["id"]: category["name"] for category in content["categories"]}
    drawings = {}
    for image in content["images"]:
        size = (image["height"], image["width"])
        drawings[image["id"]] = Drawing([], size)
    for annotation in content["annotations"]:
        category = categories[annotation["category_id"]]
        if annotation.get("iscrowd"):
            category = CROWD
        shape = Shape(category, annotation["segmentation"])
        drawings[annotation["image_id"]].shapes.append(shape)
    return {image["file_name"]: drawings[image["id"]] for image in content["images"]}


def _read_labelme(content: Any) -> dict[str, Drawing]:
    shapes = []
    for shape in content["shapes"]:
        kind = shape["shape_type"]
        if kind != "polygon":
            raise ValueError(f"a {kind} is no polygon")
        points = np.ravel(shape["points"])
        shapes.append(Shape(shape["label"], [points.tolist()]))
    size = (content["imageHeight"], content["imageWidth"])
    return {".": Drawing(shapes, size)}


def _read_yolo(text: str) -> dict[str, Drawing]:
    shapes = []
    for line in text.splitlines():
        number, *points = line.split()
        polygon = np.array(points, float).reshape(-1, 2)
        # 0 is the background, as where Ultralytics converts masks.
        shapes.append(Shape(int(number) + 1, polygon))
    return {".": Drawing(shapes)}


def _read_runs(text: str) -> dict[str, Drawing]:
    drawings: dict[str, Drawing] = {}
    for row in csv.DictReader(text.splitlines()):
        name, *values = row.values()
        if "." not in name:
            name = f"{name}."  # as other names, it has a suffix
        drawing = drawings.setdefault(name, Drawing([]))
        category = row.get("ClassId") or row.get("class") or "1"
        for value in filter(RUNS.fullmatch, values):
            shape = Shape(int(category) if category.isdigit() else category, value)
            drawing.shapes.append(shape)
    return drawings


def class_indices(
    masks: Iterable[Path],
    classes: dict[str, Any] | None,
    ignored: Iterable[Any],
) -> dict[Category, int]:
    """The class index of each category: of the class of its name, or of the one whose mask value is its number.

    Args:
        masks: all masks.
        classes: the classes as users declare them, or None.
        ignored: names and numbers of categories that count nowhere.

    Raises:
        CategoriesMissing: a category has no class.
    """
    indices: dict[Category, int] = dict.fromkeys([CROWD, *ignored], IGNORE_INDEX)
    if classes:
        labels = Labels.parse(classes)
        for index, values in enumerate(labels.values):
            indices |= dict.fromkeys([labels.names[index], *values], index)
    found: set[Category] = set()
    for path in masks:
        with suppress(InputError):  # whoever loads it says so
            found.update(shape.category for shape in read_drawing(path).shapes)
    missing = found - indices.keys()
    if missing or not classes:
        raise CategoriesMissing(missing, classes or {"background": 0})
    return indices


def draw(
    path: Path,
    indices: dict[Category, int],
    size: tuple[int, ...],
) -> tuple[np.ndarray, np.ndarray]:
    """Class indices and instance ids, each (H, W) int64.

    Args:
        path: of what is drawn in one image.
        indices: class index of each category.
        size: (H, W) of the image, where the file does not say it.

    Raises:
        InputError: a shape cannot be drawn.
    """
    drawing = read_drawing(path)
    height, width = drawing.size or size
    ids = np.zeros((height, width), np.int64, order="F")  # as COCO's masks are
    classes = [0]
    for number, shape in enumerate(drawing.shapes, start=1):
        classes.append(indices[shape.category])
        try:
            mask = _mask_of(shape.region, height, width)
        except Exception as error:  # COCO's library raises anything
            raise InputError(
                f"{path}: shape {number} ({shape.category}) cannot be drawn ({error}). Make it run lengths, or a "
                "polygon of three points or more, not a box"
            ) from error
        np.copyto(ids, number, where=mask == 1)
    index = np.array(classes)[ids]
    ids[index == IGNORE_INDEX] = 0
    return np.ascontiguousarray(index), np.ascontiguousarray(ids)


def _mask_of(region: Any, height: int, width: int) -> np.ndarray:
    """1 where a region is: (H, W)."""
    from pycocotools.coco import COCO  # most data sets do without

    if isinstance(region, str):
        runs = np.array(region.split(), np.int64).reshape(-1, 2)
        runs[:, 1] += runs[:, 0]
        lengths = np.diff(runs.ravel() - 1, prepend=0, append=height * width)
        return _decode(lengths, height, width)
    if isinstance(region, dict) and isinstance(region["counts"], list):
        return _decode(region["counts"], height, width)
    if isinstance(region, np.ndarray):
        pixels = region * (width, height)
        region = pixels.reshape(1, -1).tolist()
    coco = COCO()
    coco.imgs[0] = {"height": height, "width": width}
    return coco.annToMask({"image_id": 0, "segmentation": region})


def _decode(lengths: Any, height: int, width: int) -> np.ndarray:
    """A mask (H, W) of the lengths of its runs of 0 and 1 in turn, down the columns."""
    flat = np.repeat(np.arange(len(lengths)) % 2, lengths)
    return flat.reshape(width, height).T
