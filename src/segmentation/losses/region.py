"""Losses of overlap: Dice, Jaccard and Tversky, which are one formula, and Lovasz.

All four look at a batch as a whole and average over classes; in a binary task the foreground is the only one. A class
without a pixel in the batch's masks has no overlap to improve and is left out; where none is left the loss is 0. So the
loss of training depends on what is batched together; that of validation is taken image by image, and does not.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from segmentation.data.labels import IGNORE_INDEX
from segmentation.losses.base import SegmentationLoss, Weights, divide


def probabilities(logits: Tensor) -> Tensor:
    """(..., K, H, W) logits -> probabilities: of the foreground for one logit, of each class for K."""
    if logits.shape[-3] == 1:
        return logits.sigmoid()
    return logits.softmax(dim=-3)


def one_hot(mask: Tensor, channels: int, like: Tensor) -> Tensor:
    """(N, H, W) class indices -> (N, K, H, W) of 0 and 1 in the type of `like`; ignored pixels are 0 throughout."""
    classes = torch.arange(channels, device=mask.device)
    if channels == 1:
        classes = classes + 1  # the foreground
    return (mask.unsqueeze(1) == classes.view(-1, 1, 1)).to(like.dtype)


class ClassLoss(SegmentationLoss):
    """The mean over classes of a loss of each class; by `class_weights` where given."""

    def mean_over_classes(self, losses: Tensor, present: Tensor, logits: Tensor) -> Tensor:
        """The mean of the losses of the present classes.

        Shape:
            losses and present (K,) -> scalar.
        """
        share = present.to(losses.dtype)
        weights = self.weights_of_classes(logits.shape[1], logits)
        if weights is not None:
            share = share * weights
        return divide((losses * share).sum(), share.sum())


class SoftOverlap(ClassLoss):
    """1 - TP / (TP + alpha FP + beta FN), of soft counts over the batch.

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
        w = w.unsqueeze(1)
        tp = (w * p * y).sum(over_pixels)
        fp = (w * p * (1 - y)).sum(over_pixels)
        fn = (w * (1 - p) * y).sum(over_pixels)
        overlap = divide(tp, tp + self.alpha * fp + self.beta * fn)
        return self.mean_over_classes(
            losses=1 - overlap,
            present=tp + fn > 0,
            logits=logits,
        )


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


class Lovasz(ClassLoss):
    """The Lovasz extension of the Jaccard loss (Berman et al. 2018): Lovasz-Softmax over the classes present for K
    logits, the Lovasz hinge for one. Pixels count by their weights in the Jaccard index.

    Written out, since segmentation-models-pytorch's, to which the tests compare it, takes no weights.
    """

    def compute(self, logits: Tensor, mask: Tensor, weight: Tensor | None) -> Tensor:
        valid = mask != IGNORE_INDEX
        x = logits.movedim(1, 0)[:, valid]  # (K, pixels)
        y = one_hot(mask, len(x), logits).movedim(1, 0)[:, valid]
        if weight is None:
            weight = torch.ones_like(logits[:, 0])
        w = weight[valid].to(logits.dtype)
        errors = (y - x.softmax(dim=0)).abs()
        if len(x) == 1:
            errors = F.relu(1 - x * (2 * y - 1))
        present = (w * y).sum(dim=1) > 0
        losses = errors[:, :0].sum(dim=1)  # zeros that have a gradient
        for c in present.nonzero().flatten().tolist():
            worst_first, order = errors[c].sort(descending=True)
            losses[c] = worst_first @ jaccard_gains(y[c][order], w[order])
        return self.mean_over_classes(losses, present, logits)


def jaccard_gains(y: Tensor, w: Tensor) -> Tensor:
    """What the Jaccard loss gains with each pixel that becomes wrong, in their order (algorithm 1).

    Args:
        y: (pixels,), 1 where the class is true.
        w: (pixels,), the weight of each.
    """
    inside = w * y
    outside = w - inside
    true = inside.sum()
    intersection = true - inside.cumsum(dim=0)
    union = true + outside.cumsum(dim=0)
    loss = 1 - intersection / union
    return loss.diff(prepend=loss.new_zeros(1))
