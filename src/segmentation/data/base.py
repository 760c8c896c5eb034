"""The contract of a data set: what it declares, which samples it has, and how one is read."""

from abc import ABC, abstractmethod
from typing import NotRequired, TypedDict

import numpy as np
from PIL import Image
from torch import Tensor

from segmentation.data.labels import IGNORE_INDEX, Labels
from segmentation.errors import Problem

SPLITS = ("train", "val", "test")

#: Classes up to which a look at the mask for each is faster than a histogram.
FEW = 4


class Sample(TypedDict):
    """One image with its truth, as a data set gives it."""

    image: Tensor  # (C, H, W), uint8, uint16 or float32, as the file has it; scaling happens on the device
    mask: Tensor  # (H, W) int64, class indices, IGNORE_INDEX where nothing counts
    instance: NotRequired[Tensor]  # (H, W) int64, 0 for none, one id per individual
    weight: NotRequired[Tensor]  # (H, W) float32, a factor on each pixel's loss


def count_pixels(mask: Tensor, num_classes: int) -> np.ndarray:
    """Pixels of each class in a mask, and then those that are ignored: (K + 1,) int64. Other values count nowhere."""
    indices = mask.numpy()
    if num_classes <= FEW:
        values = [*range(num_classes), IGNORE_INDEX]
        return np.array([np.count_nonzero(indices == value) for value in values])
    last = IGNORE_INDEX % 256
    if indices.min() >= IGNORE_INDEX and max(num_classes, indices.max() + 1) <= last:
        small = indices.astype(np.uint8)  # of which Pillow makes a histogram much faster than NumPy
        counts = np.array(Image.fromarray(small).histogram())
        return np.append(counts[:num_classes], counts[last])
    ignored = np.count_nonzero(indices == IGNORE_INDEX)
    small = np.minimum(indices.view(np.uint64), num_classes)  # in which what is below 0 is huge
    counts = np.bincount(small.view(np.int64).ravel(), minlength=num_classes)
    return np.append(counts[:num_classes], ignored)


class SegmentationData(ABC):
    """A data set in splits. Subclass it, in any importable file, to bring your own; three methods are enough.

    Args:
        labels: classes, mask values, colours and channels; the net's output and the metrics follow from it.

    Attributes:
        problems: what is wrong with files that became no sample (an image without a mask), a message each.
    """

    def __init__(self, labels: Labels) -> None:
        self.labels = labels
        self.problems: list[str] = []

    @abstractmethod
    def names(self, split: str) -> list[str]:
        """Names of the samples of `train`, `val` or `test`, in a fixed order; empty where there is no such split."""

    @abstractmethod
    def load(self, split: str, index: int) -> Sample:
        """Read sample `index` of `names(split)`. It must not draw random numbers from a shared
        generator, and several threads may call it at once.

        Raises:
            InputError: the sample cannot be used; the message names the file and the fix.
        """

    @abstractmethod
    def fingerprint(self, split: str) -> str:
        """A text that changes when the samples of a split do (names, sizes, times): statistics are cached by it."""

    def find_problems(self) -> list[Problem]:
        """What to look at in the files of samples, beyond what `load` refuses. By default nothing."""
        return []

    def group(self, name: str) -> str:
        """What must not be torn apart between splits: the patient, video or slide that a sample is of."""
        return name
