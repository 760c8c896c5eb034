"""Losses of overlap: Dice, Jaccard and Tversky, which are one formula, and Lovasz.

All four look at a batch as a whole and average over classes; in a binary task the foreground is the only one. A class
without a pixel in the batch's masks has no overlap to improve and is left out; where none is left the loss is 0. So the
loss of training depends on what is batched together; that of validation is taken image by image, and does not.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from segmentation.data.labels import IGNORE_INDEX
from segmentation.losses.base import SegmentationLoss, Weights


def probabilities(logits: Tensor) -> Tensor:
    """(..., K, H, W) logits -> probabilities: of the foreground for one logit, of each class for K."""
    return logits.sigmoid() if logits.shape[-3] == 1 else logits.softmax(dim=-3)


def one_hot(mask: Tensor, channels: int, like: Tensor) -> Tensor:
    """(N, H, W) class indices -> (N, K, H, W) of 0 and 1 in the type of `like`; ignored pixels are 0 throughout."""
    first = 1 if channels == 1 else 0
    classes = torch.arange(first, first + channels, device=mask.device).view(1, -1, 1, 1)
    return (mask.unsqueeze(1) == classes).to(like.dtype)


class ClassLoss(SegmentationLoss):
    """The mean over classes of a loss of each class; by `class_weights` where given."""

    def mean_over_classes(self, losses: Tensor, present: Tensor, logits: Tensor) -> Tensor:
        """(..., K) losses and whether each counts -> scalar."""
        weights = self.weights_of_classes(logits.shape[1], logits)
        share = present.to(losses.dtype)
        if weights is not None:
            share = share * weights
        return (losses * share).sum() / share.sum().clamp(min=torch.finfo(losses.dtype).tiny)


class SoftOverlap(ClassLoss):
    """1 - TP / (TP + alpha FP + beta FN), of soft counts over the batch: TP = sum of w p y, FP = sum of w p (1 - y) and
    FN = sum of w (1 - p) y, with the probability p of the class, y = 1 on its pixels, and the pixel's weight w.
    """

    alpha: float
    beta: float

    def compute(self, logits: Tensor, mask: Tensor, weight: Tensor | None) -> Tensor:
        valid = (mask != IGNORE_INDEX).unsqueeze(1)
        w = valid.to(logits.dtype)
        if weight is not None:
            w = w * weight.unsqueeze(1)
        p = probabilities(logits)
        y = one_hot(mask, logits.shape[1], logits)
        tp = (w * p * y).sum(dim=(0, 2, 3))
        fp = (w * p * (1 - y)).sum(dim=(0, 2, 3))
        fn = (w * (1 - p) * y).sum(dim=(0, 2, 3))
        present = tp + fn > 0
        overlap = tp / torch.where(present, tp + self.alpha * fp + self.beta * fn, 1.0)
        return self.mean_over_classes(1 - overlap, present, logits)


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
        self, alpha: float = 0.3, beta: float = 0.7, class_weights: Weights = None, max_weight: float = 10.0
    ) -> None:
        super().__init__(class_weights, max_weight)
        self.alpha, self.beta = alpha, beta


class Lovasz(ClassLoss):
    """The Lovasz extension of the Jaccard loss (Berman et al. 2018): Lovasz-Softmax over the classes present for K
    logits, the Lovasz hinge for one. Pixels count by their weights in the Jaccard index.

    Written out, since segmentation-models-pytorch's, to which the tests compare it, takes no weights.
    """

    def compute(self, logits: Tensor, mask: Tensor, weight: Tensor | None) -> Tensor:
        valid = mask != IGNORE_INDEX
        w = torch.ones_like(mask) if weight is None else weight
        w = w[valid].to(logits.dtype)
        x = logits.movedim(1, 0)[:, valid]  # (K, pixels)
        y = one_hot(mask, len(x), logits).movedim(1, 0)[:, valid]
        errors = F.relu(1 - x * (2 * y - 1)) if len(x) == 1 else (y - x.softmax(dim=0)).abs()
        present = (w * y).sum(dim=1) > 0
        losses = errors[:, :0].sum(dim=1)  # zeros that have a gradient
        for c in present.nonzero().flatten().tolist():
            worst_first = errors[c].argsort(descending=True)
            losses[c] = errors[c][worst_first] @ jaccard_gains(y[c][worst_first], w[worst_first])
        return self.mean_over_classes(losses, present, logits)


def jaccard_gains(y: Tensor, w: Tensor) -> Tensor:
    """What the Jaccard loss gains with each pixel, (pixels,), that becomes wrong, in their order (algorithm 1)."""
    true = (w * y).sum()
    intersection = true - (w * y).cumsum(dim=0)
    union = true + (w * (1 - y)).cumsum(dim=0)
    loss = 1 - intersection / union
    return loss.diff(prepend=loss.new_zeros(1))
