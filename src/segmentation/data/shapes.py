"""Pictures made on the fly, with their truth: the default data set, so that the first run needs no download.

Disks, squares, triangles and stars lie over each other on a textured ground. Colour and texture say nothing about the
class: only outline does, so a net has to look around a pixel, and a classifier of single pixels fails.
"""

import colorsys
from math import cos, pi, sin, sqrt, tan

import numpy as np
import torch

from segmentation.data.base import SPLITS, Sample, SegmentationData
from segmentation.data.labels import Labels
from segmentation.errors import InputError

#: Okabe and Ito's colours, which colour-blind readers tell apart; the ground is dark, so that shapes stand out.
CLASSES = {
    "background": {"value": 0, "color": "#262B33"},
    "disk": {"value": 1, "color": "#56B4E9"},
    "square": {"value": 2, "color": "#E69F00"},
    "triangle": {"value": 3, "color": "#009E73"},
    "star": {"value": 4, "color": "#CC79A7"},
}

#: Class -> (tips, radius of the notches between them, where the tips lie at 1). The notch cos(pi / n) of an n-gon makes
#: its sides straight; a disk is a polygon of too many sides to tell.
OUTLINES = {1: (64, cos(pi / 64)), 2: (4, cos(pi / 4)), 3: (3, cos(pi / 3)), 4: (5, 0.48)}

SMALLEST = 48  # pixels a side: below it the shapes have too few pixels to be told apart
RADIUS = (0.085, 0.19)  # of the disk of a shape's area, as a part of the image's side
VISIBLE = 0.55  # part of a shape that stays visible, else nobody could name it
GOLDEN = 0.61803  # of a turn: hues this far apart never come close


class ShapesData(SegmentationData):
    """Generated images of disks, squares, triangles and stars; each a pure function of (seed, split, index).

    Args:
        train: images of the training split.
        val: images of the validation split.
        test: images of the test split.
        size: height and width of an image.
        seed: another seed gives other images.

    Raises:
        InputError: a count below zero, no training image, a size too small for the shapes, a negative seed.
    """

    def __init__(self, train: int = 512, val: int = 64, test: int = 128, size: int = 128, seed: int = 0) -> None:
        super().__init__(Labels.parse(CLASSES))
        for name, count, least in (("train", train, 1), ("val", val, 0), ("test", test, 0)):
            if count < least:
                raise InputError(f"data {name}={count}: give {least} or more images, e.g. {name}: 64")
        if size < SMALLEST:
            raise InputError(f"data size={size} leaves shapes of a few pixels: use {SMALLEST} or more, e.g. size: 128")
        if seed < 0:
            raise InputError(f"data seed={seed}: use 0 or more, e.g. seed: {-seed}")
        self.counts = dict(zip(SPLITS, (train, val, test), strict=True))
        self.size = size
        self.seed = seed

    def names(self, split: str) -> list[str]:
        """`train-0000`, `train-0001` and so on."""
        return [f"{split}-{index:04d}" for index in range(self.counts[split])]

    def fingerprint(self, split: str) -> str:
        """All that decides how the images of a split look."""
        return f"shapes v1 {split} count={self.counts[split]} size={self.size} seed={self.seed}"

    def load(self, split: str, index: int) -> Sample:
        """Make sample `index`: image (3, size, size) uint8, mask and instance (size, size) int64."""
        rng = np.random.default_rng([self.seed, SPLITS.index(split), index])
        image, mask, instance = draw(rng, self.size)
        return {
            "image": torch.from_numpy(image),
            "mask": torch.from_numpy(mask),
            "instance": torch.from_numpy(instance),
        }


def draw(rng: np.random.Generator, size: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Paint one picture.

    Returns:
        image (3, size, size) uint8, class indices (size, size) int64, instance ids (size, size) int64.
    """
    y, x = np.mgrid[:size, :size].astype(np.float32)
    hue = rng.random()
    image = texture(rng, x, y, hue, size)
    instance = np.zeros((size, size), np.int64)
    classes, areas = [0], [0]
    for _ in range(rng.integers(5, 11)):
        kind = int(rng.integers(1, len(CLASSES)))
        radius = size * rng.uniform(*RADIUS)
        cx, cy = rng.uniform(0.04 * size, 0.96 * size, 2)
        # Work in a box around the shape: `reach` holds its tips (1.6 radii for the triangle) and its shadow.
        reach = int(1.75 * radius) + 3
        top, left = max(0, int(cy) - reach), max(0, int(cx) - reach)
        box = (slice(top, int(cy) + reach), slice(left, int(cx) + reach))
        u, v = rotate(x[box] - cx, y[box] - cy, rng.uniform(0, 2 * pi))
        distance = outline(u, v, kind, radius)

        inside = distance < 0
        after = instance.copy()
        after[box][inside] = len(areas)
        seen = np.bincount(after.ravel(), minlength=len(areas) + 1)[1:]
        if (seen < VISIBLE * np.array([*areas[1:], pi * radius**2])).any():
            continue  # it would lie mostly outside, or hide an earlier shape
        instance = after
        classes.append(kind)
        areas.append(pi * radius**2)

        patch = image[:, box[0], box[1]]
        patch *= 1 - 0.45 * np.exp(-np.maximum(distance, 0) / (0.02 * size))  # a shadow parts shapes that overlap
        cover = np.clip(0.5 - distance, 0, 1)  # anti-aliased: a hard edge would give the mask away
        fill = texture(rng, u, v, hue + GOLDEN * len(areas), size)
        patch += cover * (fill - patch)
    image *= 0.75 + 0.5 * cloud(rng, x / size, y / size, 2)  # light falls unevenly
    image += rng.uniform(0.01, 0.05) * rng.standard_normal(image.shape, dtype=np.float32)
    return (np.clip(image, 0, 1) * 255).astype(np.uint8), np.array(classes)[instance], instance


def outline(u: np.ndarray, v: np.ndarray, kind: int, radius: float) -> np.ndarray:
    """Distance in pixels to the nearest side's line, negative inside, of a shape as large as a disk of `radius`."""
    tips, notch = OUTLINES[kind]
    tip = radius * sqrt(pi / (tips * notch * sin(pi / tips)))
    # All sides are mirror images of one, from a tip at angle 0 to a notch at pi / tips: fold the plane onto it.
    angle = np.abs((np.arctan2(v, u) + pi / tips) % (2 * pi / tips) - pi / tips)
    across, along = np.cos(angle), np.sin(angle)
    # The side's normal: perpendicular to (notch point - tip).
    dx, dy = notch * cos(pi / tips) - 1, notch * sin(pi / tips)
    nx, ny = dy / np.hypot(dx, dy), -dx / np.hypot(dx, dy)
    return np.hypot(u, v) * (nx * across + ny * along) - nx * tip


def rotate(x: np.ndarray, y: np.ndarray, angle: float) -> tuple[np.ndarray, np.ndarray]:
    """Coordinates in axes turned by `angle`."""
    c, s = cos(angle), sin(angle)
    return c * x + s * y, c * y - s * x


def texture(rng: np.random.Generator, u: np.ndarray, v: np.ndarray, hue: float, size: int) -> np.ndarray:
    """A pattern in two tones of one hue, (3, H, W) float32 in 0..1: gradient, stripes, checks, dots or clouds."""
    u, v = rotate(u, v, rng.uniform(0, pi))
    wave = 2 * pi / (size * rng.uniform(0.05, 0.12))
    match rng.integers(5):
        case 0:
            mix = 0.5 + 0.5 * np.sin(u * (wave / 6))
        case 1:
            mix = 0.5 + np.clip(2 * np.sin(u * wave), -0.5, 0.5)
        case 2:
            mix = 0.5 + np.clip(4 * np.sin(u * wave) * np.sin(v * wave), -0.5, 0.5)
        case 3:
            mix = np.clip(2 * (np.sin(u * wave) + np.sin(v * wave)) - 1, 0, 1)
        case _:
            mix = cloud(rng, u / size, v / size, 8)
    light = rng.uniform(0.35, 0.75)
    tones = [
        colorsys.hls_to_rgb((hue + shift) % 1, light + shade, rng.uniform(0.3, 0.8))
        for shift, shade in ((0, -0.1), (0.06, 0.12))
    ]
    first, second = np.array(tones, np.float32)[..., None, None]
    return first + (second - first) * mix


def cloud(rng: np.random.Generator, u: np.ndarray, v: np.ndarray, waves: int) -> np.ndarray:
    """Smooth noise in 0..1, (H, W): a few plane waves of random direction and phase, bent by each other."""
    total = np.zeros_like(u)
    for frequency in rng.uniform(0.5, 1, 4) * waves:
        a, b = rotate(u, v, rng.uniform(0, 2 * pi))
        total += np.sin(2 * pi * (frequency * a + rng.random()) + np.sin(2 * pi * frequency * b))
    return 0.5 + total / 8
