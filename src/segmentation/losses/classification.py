"""The loss of UNet3+'s classification-guided module: which classes are in an image?"""

import torch
import torch.nn.functional as F
from torch import Tensor

from segmentation.data.labels import IGNORE_INDEX


def class_presence(mask: Tensor, channels: int) -> Tensor:
    """Which classes are in an image: (N, H, W) class indices -> (N, K) of 0 and 1; one channel means the foreground."""
    bins = max(2, channels)
    index = torch.where(mask == IGNORE_INDEX, bins, mask).flatten(1)
    present = torch.zeros(len(mask), bins + 1, device=mask.device).scatter_(1, index, 1.0)
    return present[:, 1:2] if channels == 1 else present[:, :channels]


def presence_loss(presence: Tensor, mask: Tensor) -> Tensor:
    """Binary cross-entropy of (N, K) presence logits, over the images that have a pixel that is not ignored."""
    target = class_presence(mask, presence.shape[1])
    known = (mask != IGNORE_INDEX).flatten(1).any(dim=1, keepdim=True).expand_as(target).float()
    loss = F.binary_cross_entropy_with_logits(presence, target, weight=known, reduction="sum")
    return loss / known.sum().clamp(min=1)
