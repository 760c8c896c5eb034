"""The losses. To add one: a file here, an import below, an overlay in configs/model, a row in tests/test_losses.py."""

from segmentation.losses.base import SegmentationLoss
from segmentation.losses.combined import Hybrid, WeightedSum
from segmentation.losses.ms_ssim import MsSsim
from segmentation.losses.pixel import CrossEntropy, Focal
from segmentation.losses.region import Dice, Jaccard, Lovasz, Tversky
