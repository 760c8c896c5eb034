"""The losses. To add one: a file here, an import below, an overlay in configs/model, a row in tests/test_losses.py."""

from segmentation.losses.base import SegmentationLoss
from segmentation.losses.cross_entropy import CrossEntropy, Focal
from segmentation.losses.overlap import Dice, Jaccard, Lovasz, Tversky
from segmentation.losses.structural import MsSsim
from segmentation.losses.sums import Hybrid, WeightedSum
