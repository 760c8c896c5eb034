"""Losses of overlap: Dice, Jaccard and Tversky, which are one formula, and Lovasz.

All four look at a batch as a whole and average over classes; in a binary task the foreground is the only one. A class
without a pixel in the batch's masks has no overlap to improve and is left out; where none is left the loss is 0. So the
loss of training depends on what is batched together; that of validation is taken image by image, and does not.
"""

import torch
from torch import Tensor

from segmentation.data.labels import IGNORE_INDEX
from segmentation.errors import InputError
from segmentation.losses.base import SegmentationLoss, Weights, divide
from segmentation.nets.base import probabilities


def one_hot(mask: Tensor, channels: int, like: Tensor) -> Tensor:
    """(N, H, W) class indices -> (N, K, H, W) of 0 and 1 in the type of `like`; ignored pixels are 0 throughout."""
    classes = torch.arange(channels, device=mask.device)
    if channels == 1:
        classes = classes + 1  # the foreground
    return (mask.unsqueeze(1) == classes.view(-1, 1, 1)).to(like.dtype)


class SoftOverlap(SegmentationLoss):
    """1 - TP / (TP + alpha FP + beta FN), of soft counts over the batch; the mean over classes, by `class_weights`.

    TP = sum of w p y, FP = sum of w p (1 - y) and FN = sum of w (1 - p) y, with the probability p of the class, y = 1
    on its pixels and 0 elsewhere, and the pixel's weight w.
    """

    alpha: float
    beta: float

    def compute(self, logits: Tensor, mask: Tensor, weight: Tensor | None) -> Tensor:
        w = (mask != IGNORE_INDEX).to(logits.dtype)
        if weight is not None:
            w = w * weight
        p = probabilities(logits)
        y = one_hot(mask, logits.shape[1], logits)
        over_pixels = (0, 2, 3)
        p = p * w.unsqueeze(1)
        tp = (p * y).sum(over_pixels)
        fp = p.sum(over_pixels) - tp
        true = (w.unsqueeze(1) * y).sum(over_pixels)
        fn = true - tp
        overlap = divide(tp, tp + self.alpha * fp + self.beta * fn)
        share = (true > 0).to(logits.dtype)  # of each class in the mean
        weights = self.weights_of_classes(len(share), logits)
        if weights is not None:
            share = share * weights
        return divide(((1 - overlap) * share).sum(), share.sum())


class Dice(SoftOverlap):
    """Dice loss, 1 - 2 TP / (2 TP + FP + FN). Milletari et al. 2016 square the counts below the line."""

    alpha = beta = 0.5


class Jaccard(SoftOverlap):
    """Jaccard or IoU loss, 1 - TP / (TP + FP + FN) (Rahman and Wang 2016)."""

    alpha = beta = 1.0


class Tversky(SoftOverlap):
    """Tversky loss, 1 - TP / (TP + alpha FP + beta FN) (Salehi et al. 2017): beta > alpha asks for recall.

    Args:
        alpha: of false positives.
        beta: of false negatives.
        class_weights: for K logits: factors in the mean over classes, as those of `CrossEntropy`.
        max_weight: what weights made from the data are capped at.
    """

    def __init__(
        self,
        alpha: float = 0.3,
        beta: float = 0.7,
        class_weights: Weights = None,
        max_weight: float = 10.0,
    ) -> None:
        super().__init__(class_weights, max_weight)
        self.alpha = alpha
        self.beta = beta


class Lovasz(SegmentationLoss):
    """The Lovasz extension of the Jaccard loss (Berman et al. 2018), as segmentation-models-pytorch has it.

    Lovasz-Softmax over the classes present for K logits, the Lovasz hinge for one. Weights of pixels change nothing.

    Raises:
        InputError: it has `class_weights`.
    """

    def compute(self, logits: Tensor, mask: Tensor, weight: Tensor | None) -> Tensor:
        from segmentation_models_pytorch.losses import LovaszLoss  # takes seconds to import

        if self.class_weights is not None:
            raise InputError("Lovasz takes no class_weights: take Jaccard, or leave them out")
        classes = logits.shape[1]
        if not one_hot(mask, classes, logits).any():
            return (logits * 0).sum()
        loss = LovaszLoss("binary" if classes == 1 else "multiclass", ignore_index=IGNORE_INDEX)
        return loss(logits.float(), mask)
