"""The nets, by hand. To add one: a file here, an import below, an overlay in configs/model, a row in tests/test_nets.py."""

from segmentation.nets.base import Heads, SegmentationNet
from segmentation.nets.unet import UNet

__all__ = ["Heads", "SegmentationNet", "UNet"]
