"""Pictures made on the fly, with their truth: the default data set, so that the first run needs no download.

Disks, rings, triangles and stars lie over each other on a textured ground. Colour and texture do not tell one shape
from another, only the outline does: a net has to look around a pixel, and a classifier of single pixels fails.

Lengths are in pixels and angles in radians. A change of what is drawn is a change of every figure in the README.
"""

import colorsys
from dataclasses import replace
from math import cos, hypot, pi, sin, sqrt

import numpy as np
import torch

from segmentation.data.base import SPLITS, Sample, SegmentationData
from segmentation.data.labels import Labels
from segmentation.errors import InputError

#: Colour-blind readers tell these apart, and the ground is dark, so that shapes stand out.
CLASSES = {
    "background": {"value": 0, "color": "#262B33"},
    "disk": {"value": 1, "color": "#56B4E9"},
    "ring": {"value": 2, "color": "#E69F00"},
    "triangle": {"value": 3, "color": "#009E73"},
    "star": {"value": 4, "color": "#4B3CE1"},
}

#: Class -> tips, and class -> radius of the notches between them, where the tips lie at 1; of a triangle, its sides'.
TIPS = {3: 3, 4: 5}
NOTCH = {3: cos(pi / 3), 4: 0.48}

RADIUS = (0.07, 0.125)  # of the disk of a shape's area, as a part of the image's side
VISIBLE = 0.6  # part of a shape that stays visible, else nobody could name it


class ShapesData(SegmentationData):
    """Generated images of disks, rings, triangles and stars; each a pure function of (seed, split, index).

    A sample has an image of three channels of 8 bits, a mask of five classes, and the ids of its shapes.

    Args:
        train: images of the training split.
        val: images of the validation split.
        test: images of the test split.
        size: height and width of an image; below 48, shapes have too few pixels to be told apart.
        seed: another seed gives other images.
    """

    def __init__(
        self,
        train: int = 512,
        val: int = 64,
        test: int = 128,
        size: int = 96,
        seed: int = 0,
    ) -> None:
        super().__init__(replace(Labels.parse(CLASSES), dtype="uint8"))
        if min(train, val, test, seed, size - 1) < 0 or max(train, val, test) > 1_000_000 or size > 4096:
            raise InputError(
                "data.dataset: train, val and test must be 0 to 1,000,000, size 1 to 4096 and seed 0 or more"
            )
        self.counts = {
            "train": train,
            "val": val,
            "test": test,
        }
        self.size = size
        self.seed = seed

    def names(self, split: str) -> list[str]:
        return [f"{split}-{index:04d}" for index in range(self.counts[split])]

    def fingerprint(self, split: str) -> str:
        return f"shapes v1 {split} count={self.counts[split]} size={self.size} seed={self.seed}"

    def load(self, split: str, index: int) -> Sample:
        rng = np.random.default_rng([self.seed, SPLITS.index(split), index])
        image, mask, instance = map(torch.from_numpy, draw(rng, self.size))
        return {"image": image, "mask": mask, "instance": instance}


def draw(rng: np.random.Generator, size: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Paint one picture: a ground, then shapes over each other, each with a shadow, then light and noise.

    A shape that would lie mostly outside, or would hide too much of an earlier one, is left out, so that every shape
    in the picture can be recognised.

    Args:
        rng: decides everything.
        size: height and width.

    Returns:
        image (3, size, size) uint8, class indices and instance ids, both (size, size) int64.
    """
    xy = np.mgrid[:size, :size][::-1].astype(np.float32)
    hue = rng.random()
    image = texture(
        rng,
        xy,
        hue,
        size,
    )
    instance = np.zeros((size, size), np.int64)
    classes = [0]  # of each instance; 0 is the ground
    needed = [0.0]  # pixels of each instance that stay visible
    for _ in range(rng.integers(9, 19)):
        kind = int(rng.integers(1, len(CLASSES)))
        radius = size * rng.uniform(*RADIUS)
        center = rng.uniform(0, size, 2)
        # Work in a box around the shape: `reach` holds the triangle's tips, at 1.56 radii, and some shadow.
        reach = int(1.75 * radius) + 3
        columns, rows = [slice(max(0, middle - reach), middle + reach) for middle in center.astype(int)]
        offset = xy[:, rows, columns] - center.astype(np.float32).reshape(2, 1, 1)
        uv = rotate(offset, angle=rng.uniform(0, 2 * pi))
        distance = outline(uv, kind, radius)

        candidate = instance.copy()
        candidate[rows, columns][distance < 0] = len(classes)
        least = [*needed, VISIBLE * (pi * radius**2)]
        visible = np.bincount(candidate.ravel(), minlength=len(least))
        if (visible < least).any():
            continue  # it would lie mostly outside, or hide too much of an earlier shape
        instance = candidate
        needed = least
        classes.append(kind)

        patch = image[:, rows, columns]
        shadow = np.exp(-np.maximum(distance, 0) / (0.02 * size))  # it parts shapes that overlap
        patch *= 1 - 0.45 * shadow
        fill = texture(
            rng,
            uv,
            hue + rng.uniform(0.2, 0.8),  # never the ground's own
            size,
        )
        edge = np.clip(0.5 - distance, 0, 1)  # soft, as a camera gives it
        patch += edge * (fill - patch)  # a view: it paints the image

    image *= 0.75 + 0.5 * cloud(rng, xy / size, waves=2)  # light falls unevenly
    image += rng.uniform(0.01, 0.05) * rng.standard_normal(image.shape, dtype=np.float32)
    mask = np.array(classes)[instance]
    return (np.clip(image, 0, 1) * 255).astype(np.uint8), mask, instance


def outline(
    uv: np.ndarray,
    kind: int,
    radius: float,
) -> np.ndarray:
    """The outline of a shape whose area is that of a disk.

    A triangle and a star are the same formula: tips at one radius, and notches between them at another; of a triangle
    these lie on its sides.

    Args:
        uv: (2, H, W) coordinates about the shape's centre, along its own axes.
        kind: the class.
        radius: of the disk.

    Returns:
        (H, W) distance in pixels to the lines of the sides, negative inside.
    """
    u, v = uv
    r = np.hypot(u, v)
    if kind == 1:
        return r - radius
    if kind == 2:
        return np.abs(r - radius) - radius / 4  # from 3/4 to 5/4: pi (25 - 9) / 16 is pi again
    notch = NOTCH[kind]
    step = pi / TIPS[kind]
    tip = radius * sqrt(step / (notch * sin(step)))
    # All sides are mirror images of one, from a tip at angle 0 to a notch at `step`: fold the plane onto it.
    angle = np.abs((np.arctan2(v, u) + step) % (2 * step) - step)
    dx = notch * cos(step) - 1
    dy = notch * sin(step)
    length = hypot(dx, dy)
    normal_x = dy / length
    normal_y = -dx / length
    along = normal_x * np.cos(angle) + normal_y * np.sin(angle)
    return r * along - normal_x * tip


def rotate(xy: np.ndarray, angle: float) -> np.ndarray:
    """Coordinates in axes turned by an angle.

    Args:
        xy: (2, H, W).
        angle: in radians.

    Returns:
        (2, H, W) likewise.
    """
    x, y = xy
    c = cos(angle)
    s = sin(angle)
    return np.stack([c * x + s * y, c * y - s * x])


def texture(
    rng: np.random.Generator,
    uv: np.ndarray,
    hue: float,
    size: int,
) -> np.ndarray:
    """A pattern in two tones of one hue: gradient, stripes, checks, dots or clouds.

    The ground and all shapes have one, of any kind and direction, so that it tells no class from another.

    Args:
        rng: decides the pattern, its direction and its tones.
        uv: (2, H, W) coordinates in pixels.
        hue: from 0 to 1, and round again.
        size: of the image; waves are a part of it.

    Returns:
        (3, H, W) float32 in 0..1.
    """
    uv = rotate(uv, angle=rng.uniform(0, pi))
    u, v = uv
    wave = 2 * pi / (size * rng.uniform(0.05, 0.12))
    stripes = np.sin(u * wave)
    across = np.sin(v * wave)
    match rng.integers(5):
        case 0:
            mix = 0.5 + 0.5 * np.sin(u * (wave / 6))
        case 1:
            mix = 0.5 + np.clip(2 * stripes, -0.5, 0.5)
        case 2:
            mix = 0.5 + np.clip(4 * stripes * across, -0.5, 0.5)
        case 3:
            mix = np.clip(2 * (stripes + across) - 1, 0, 1)
        case _:
            mix = cloud(rng, uv / size, waves=8)

    light = rng.uniform(0.35, 0.75)
    first = colorsys.hls_to_rgb(
        hue % 1,
        light - 0.05,
        rng.uniform(0.4, 0.8),
    )
    second = colorsys.hls_to_rgb(
        (hue + 0.05) % 1,
        light + 0.06,
        rng.uniform(0.4, 0.8),
    )
    dark, bright = np.array([first, second], np.float32)[..., None, None]
    return dark + (bright - dark) * mix


def cloud(
    rng: np.random.Generator,
    uv: np.ndarray,
    waves: int,
) -> np.ndarray:
    """Smooth noise: a few plane waves of random direction and phase, bent by each other.

    Args:
        rng: decides frequencies, directions and phases.
        uv: (2, H, W) coordinates, from 0 to 1 over the image.
        waves: over the image, at most.

    Returns:
        (H, W) in 0..1.
    """
    total = np.zeros_like(uv[0])
    for _ in range(4):
        frequency = waves * rng.uniform(0.5, 1)
        a, b = rotate(uv, angle=rng.uniform(0, 2 * pi))
        wave = 2 * pi * (frequency * a + rng.random())
        bend = np.sin(2 * pi * frequency * b)
        total += np.sin(wave + bend)
    return 0.5 + total / 8
