"""Masks of shapes, by COCO's own library: a polygon covers the pixels whose centres it holds."""

from pathlib import Path
from typing import Any

import numpy as np

from segmentation.data.annotations import Category, read_drawing
from segmentation.data.labels import IGNORE_INDEX
from segmentation.errors import InputError


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
    ids = np.zeros((height, width), np.int64)
    classes = [0]
    for number, shape in enumerate(drawing.shapes, start=1):
        classes.append(indices[shape.category])
        region = shape.region
        try:
            if shape.relative:
                region = [polygon * np.resize((width, height), len(polygon)) for polygon in region]
            _fill(ids, region, number)
        except Exception as error:  # COCO's library raises anything
            raise InputError(
                f"{path}: shape {number} ({shape.category}) cannot be drawn. It must be polygons of three points "
                f"or more, not a box, or run lengths down the columns of {width}x{height} pixels"
            ) from error
    index = np.array(classes)[ids]
    ids[index == IGNORE_INDEX] = 0
    return index, ids


def _fill(
    ids: np.ndarray,
    region: Any,
    number: int,
) -> None:
    """Write a number where a region is: into `ids` (H, W)."""
    from pycocotools import mask as coco  # most data sets do without

    height, width = ids.shape
    if isinstance(region, list):
        # Draw in the box around the polygons: a small mask is made a hundred times faster.
        points = np.concatenate(region).reshape(-1, 2)
        left, top = np.floor(points.min(axis=0)).clip(min=0).astype(int)
        right, bottom = np.ceil(points.max(axis=0)).astype(int)
        ids = ids[top:bottom, left:right]
        if not ids.size:  # beyond the image
            return
        moved = [polygon - np.resize((left, top), len(polygon)) for polygon in region]
        parts = coco.frPyObjects(moved, *ids.shape)
        region = coco.merge(parts)
    elif isinstance(region, str):
        numbers = np.array(region.split(), np.int64)
        runs = numbers.reshape(-1, 2)
        runs[:, 1] += runs[:, 0]
        lengths = np.diff(
            runs.ravel() - 1,
            prepend=0,
            append=height * width,
        )
        region = {"counts": lengths.tolist(), "size": [height, width]}
    if isinstance(region["counts"], list):
        if sum(region["counts"]) != ids.size:  # the library would draw what there is
            raise ValueError("the run lengths are those of another size")
        region = coco.frPyObjects(region, height, width)
    np.copyto(ids, number, where=coco.decode(region) == 1)
