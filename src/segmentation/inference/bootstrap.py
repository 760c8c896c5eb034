"""IoU with confidence intervals, by a bootstrap over the tested images (Efron 1979).

scipy.stats.bootstrap would hold every resample's images in memory; here a resample is a weight for each image.
"""

import warnings
from dataclasses import dataclass

import numpy as np


@dataclass
class Estimate:
    """A value and its 95 % interval; NaN for a class without a pixel. `f"{estimate:+}"` shows the signs."""

    value: float
    low: float
    high: float

    def __format__(self, sign: str) -> str:
        if np.isnan(self.value):
            return "-"
        return f"{self.value:{sign}.3f} [{self.low:{sign}.3f}, {self.high:{sign}.3f}]"


def iou(counts: np.ndarray) -> np.ndarray:
    """IoU of each class and, last, mIoU over the classes present.

    Shape:
        (..., 3, K) counts of tp, fp and fn -> (..., K + 1)
    """
    tp = counts[..., 0, :]
    union = counts.sum(axis=-2)
    each = np.ma.divide(tp, union)  # masked where the union is empty
    mean = each.mean(axis=-1, keepdims=True)
    return np.ma.concatenate([each, mean], axis=-1).filled(np.nan)


def bootstrap(
    counts: list[np.ndarray],
    resamples: int = 2000,
    seed: int = 0,
) -> list[np.ndarray]:
    """IoUs of images drawn with replacement. All runs have the same draws, so that their differences are paired.

    Args:
        counts: (images, 3, K) of each run.
        resamples: number of times that as many images are drawn.
        seed: of the draws.

    Returns:
        (resamples, K + 1) of each run.
    """
    rng = np.random.default_rng(seed)
    images = len(counts[0])
    draws = rng.multinomial(images, np.full(images, 1 / images), resamples)  # how often each image is drawn
    return [iou(np.tensordot(draws, each, axes=1)) for each in counts]


def intervals(rows: list[str], values: np.ndarray, drawn: np.ndarray) -> dict[str, Estimate]:
    """Values of a split with the 2.5 % and 97.5 % quantiles of their resamples."""
    with warnings.catch_warnings(action="ignore", category=RuntimeWarning):  # a class may be in no resample
        low, high = np.nanpercentile(drawn, (2.5, 97.5), axis=0)
    estimates = map(
        Estimate,
        values.tolist(),
        low.tolist(),
        high.tolist(),
    )
    return dict(zip(rows, estimates, strict=True))
