"""The loss of UNet3+'s classification-guided module: which classes are in an image?"""

import torch
import torch.nn.functional as F
from torch import Tensor

from segmentation.data.labels import IGNORE_INDEX
from segmentation.losses.region import one_hot


def class_presence(mask: Tensor, channels: int) -> Tensor:
    """Which classes are in an image: (N, H, W) class indices -> (N, K) of 0 and 1; one channel means the foreground."""
    return one_hot(mask, channels, torch.empty(0)).amax(dim=(2, 3))


def presence_loss(class_logits: Tensor, mask: Tensor) -> Tensor:
    """Binary cross-entropy of (N, K) class logits, over the images that have a pixel that is not ignored."""
    known = (mask != IGNORE_INDEX).flatten(1).any(dim=1)
    if not known.any():
        return class_logits.sum() * 0
    target = class_presence(mask, class_logits.shape[1])
    return F.binary_cross_entropy_with_logits(class_logits[known], target[known])
