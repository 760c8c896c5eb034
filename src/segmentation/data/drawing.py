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
        try:
            region = shape.region
            if shape.relative:
                shares = np.reshape(region, (-1, 2))
                points = shares * (width, height)
                region = [points.ravel()]
            _fill(ids, region, number)
        except Exception as error:  # COCO's library raises anything
            raise InputError(
                f"{path}: shape {number} ({shape.category}) cannot be drawn. It must be polygons of three points "
                f"or more, not a box, or run lengths down the columns of {width}x{height} pixels"
            ) from error
    class_of = np.array(classes)
    index = class_of[ids]
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
    if isinstance(region, str):
        numbers = np.array(region.split(), np.int64)
        runs = numbers.reshape(-1, 2)
        runs[:, 1] += runs[:, 0]
        lengths = np.diff(
            runs.ravel() - 1,
            prepend=0,
            append=height * width,
        )
        mask = _decode(lengths, height, width)
    elif isinstance(region, list):
        # Draw in the box around the polygons: a small mask is made a hundred times faster.
        joined = np.concatenate(region)
        points = joined.reshape(-1, 2)
        first = np.floor(points.min(axis=0)).clip(min=0)
        last = np.ceil(points.max(axis=0))
        left, top = first.astype(int)
        right, bottom = last.astype(int)
        ids = ids[top:bottom, left:right]
        if not ids.size:  # beyond the image
            return
        moved = []
        for polygon in region:
            corners = polygon.reshape(-1, 2) - first
            moved.append(corners.ravel())
        parts = coco.frPyObjects(moved, *ids.shape)
        whole = coco.merge(parts)
        mask = coco.decode(whole)
    elif isinstance(region["counts"], list):
        mask = _decode(region["counts"], height, width)
    else:
        mask = coco.decode(region)
    np.copyto(ids, number, where=mask == 1)


def _decode(
    lengths: Any,
    height: int,
    width: int,
) -> np.ndarray:
    """A mask (H, W) of the lengths of its runs of 0 and 1 in turn, down the columns."""
    zero_and_one = np.arange(len(lengths)) % 2
    flat = np.repeat(zero_and_one, lengths)
    return flat.reshape(width, height).T
