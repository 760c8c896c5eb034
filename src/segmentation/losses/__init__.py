"""The losses. To add one: a file here, an import below, an overlay in configs/model, a row in tests/test_losses.py."""

from segmentation.losses.base import SegmentationLoss
from segmentation.losses.cross_entropy import CrossEntropy

__all__ = ["CrossEntropy", "SegmentationLoss"]
