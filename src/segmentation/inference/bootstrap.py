"""IoU of a run and what chance could have done to it: a bootstrap over the tested images."""

import warnings
from dataclasses import dataclass

import numpy as np

RESAMPLES = 2000


@dataclass
class Estimate:
    """A figure and its 95 % interval; NaN where no pixel is of the class. Formatted with `+`, its signs are shown."""

    value: float
    low: float
    high: float

    def __format__(self, sign: str) -> str:
        interval = f"{self.value:{sign}.3f} [{self.low:{sign}.3f}, {self.high:{sign}.3f}]"
        return "-" if np.isnan(self.value) else interval

    def __str__(self) -> str:
        return format(self)

    @property
    def sure(self) -> bool:
        """Whether the interval of a difference leaves zero out."""
        return self.low > 0 or self.high < 0


def iou(counts: np.ndarray) -> np.ndarray:
    """IoU of each class, and their mean over the classes there are: (..., 3, K) counts -> (..., K + 1)."""
    tp, union = counts[..., 0, :].astype(np.float64), counts.sum(axis=-2)
    with np.errstate(invalid="ignore"):
        each = tp / union
    mean = np.nan_to_num(each).sum(axis=-1) / np.maximum((union > 0).sum(axis=-1), 1)
    return np.concatenate([each, mean[..., None]], axis=-1)


def bootstrap(counts: list[np.ndarray], resamples: int = RESAMPLES, seed: int = 0) -> list[np.ndarray]:
    """IoUs (resamples, K + 1) of as many images drawn with replacement (Efron 1979), for each run's counts
    (images, 3, K). The draws are the same in all runs, so that differences are paired."""
    size = len(counts[0])
    times = np.random.default_rng(seed).multinomial(size, np.full(size, 1 / size), resamples)  # each image is drawn
    return [iou(np.tensordot(times, each, axes=1)) for each in counts]


def intervals(rows: list[str], values: np.ndarray, drawn: np.ndarray) -> dict[str, Estimate]:
    """Of each row 2.5 % and 97.5 % of the resamples that have the class."""
    with warnings.catch_warnings(action="ignore", category=RuntimeWarning):  # of a class that none has
        low, high = np.nanpercentile(drawn, (2.5, 97.5), axis=0)
    return {row: Estimate(*map(float, found)) for row, *found in zip(rows, values, low, high, strict=True)}
