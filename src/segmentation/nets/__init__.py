"""The nets, by hand.

To add one: a file here, an import below, an overlay in configs/model, a row in tests/test_nets.py.
"""

from segmentation.nets.base import Heads, SegmentationNet
from segmentation.nets.smp import SmpNet
from segmentation.nets.unet import UNet
from segmentation.nets.unet_3plus import UNet3Plus
from segmentation.nets.unet_plus_plus import UNetPlusPlus
