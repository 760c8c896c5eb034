"""The loss of UNet3+'s classification-guided module: which classes are in an image?"""

import torch.nn.functional as F
from torch import Tensor

from segmentation.data.labels import IGNORE_INDEX
from segmentation.losses.base import divide
from segmentation.losses.region import one_hot


def presence_loss(class_logits: Tensor, mask: Tensor) -> Tensor:
    """Binary cross-entropy of (N, K) class logits, averaged over the images that have a pixel that is not ignored.

    A class is present in an image where its mask, (N, H, W), has a pixel of it; one logit means the foreground.
    """
    class_logits = class_logits.float()
    present = one_hot(mask, class_logits.shape[1], class_logits).amax(dim=(2, 3))
    losses = F.binary_cross_entropy_with_logits(class_logits, present, reduction="none")
    losses = losses.mean(dim=1)
    known = (mask != IGNORE_INDEX).flatten(1).any(dim=1)
    return divide((losses * known).sum(), known.sum())
