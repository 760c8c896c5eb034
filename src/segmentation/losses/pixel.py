"""Per-pixel losses: cross-entropy and the focal loss, weighted against imbalance."""

from abc import abstractmethod
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from segmentation.data.labels import IGNORE_INDEX
from segmentation.data.statistics import SplitStatistics
from segmentation.errors import InputError
from segmentation.losses.base import SegmentationLoss, Weights, divide


class PixelLoss(SegmentationLoss):
    """Weighted mean over valid pixels of f(p_t), where p_t is the predicted probability of the pixel's true class y.

    The sum of f(p_t) * w[y] is divided by the number of valid pixels (one logit), or by the sum of w[y] over them (K
    logits). A subclass defines f in `of_pixel`.
    """

    additive = True

    @abstractmethod
    def of_pixel(self, log_p: Tensor) -> Tensor:
        """f, given the logarithm of p_t."""

    def pixel_weights(self, logits: Tensor) -> Tensor | None:
        """w: of background and foreground, (2,), for one logit; of each class, (K,), for K; None for 1 throughout."""
        return self.weights_of_classes(max(2, logits.shape[1]), logits)

    def weight_sum(self, pixels: Tensor, channels: int) -> Tensor:
        if channels > 1 and self.class_weights is not None:
            pixels = pixels * self.class_weights
        return pixels.sum(dim=-1)

    def forward(
        self,
        logits: Tensor,
        mask: Tensor,
        weight: Tensor | None = None,
        step_pixels: Tensor | None = None,
    ) -> Tensor:
        total = super().forward(logits, mask, weight)
        if step_pixels is None:
            valid = mask[mask != IGNORE_INDEX]
            step_pixels = torch.bincount(valid, minlength=max(2, logits.shape[1]))
        return divide(total, self.weight_sum(step_pixels, logits.shape[1]))

    def compute(self, logits: Tensor, mask: Tensor, weight: Tensor | None) -> Tensor:
        """The sum over the pixels; `forward` divides it."""
        valid = mask != IGNORE_INDEX
        class_weights = self.pixel_weights(logits)
        if logits.shape[1] == 1:
            log_p = F.logsigmoid(torch.where(mask == 1, logits[:, 0], -logits[:, 0]))
        else:
            log_p = -F.cross_entropy(logits, mask, ignore_index=IGNORE_INDEX, reduction="none")
        loss = torch.where(valid, self.of_pixel(log_p), 0.0)
        if class_weights is not None:
            loss = loss * class_weights[mask * valid]  # ignored pixels look up class 0; their loss is 0 anyway
        if weight is not None:
            loss = loss * weight
        return loss.sum()


class CrossEntropy(PixelLoss):
    """Cross-entropy of each pixel, averaged.

    One logit (binary): `-pos_weight * y log p - (1 - y) log(1 - p)`, p = sigmoid(logit), averaged over valid pixels; as
    `torch.nn.functional.binary_cross_entropy_with_logits`. K logits: `-w[y] log p[y]`, p = softmax(logits), divided by
    the sum of w[y] over valid pixels; as `torch.nn.functional.cross_entropy`.

    Args:
        class_weights: one factor per class, or `auto` (inverse), `sqrt_inverse`, `median` or `effective`, made from the
            training split's pixels as `class_weights` in losses/base.py says; null for none.
        pos_weight: of two classes: the weight of the second, the first has 1; or `auto`: num_neg / num_pos of the
            training split.
        max_weight: what weights of more than two classes, made from the data, are capped at.
    """

    def __init__(
        self,
        class_weights: Weights = None,
        pos_weight: float | Literal["auto"] | None = None,
        max_weight: float = 10.0,
    ) -> None:
        if class_weights is not None and pos_weight is not None:
            raise InputError("the loss has class_weights and pos_weight: give one of them")
        if pos_weight == "auto":
            class_weights = "auto"
        elif pos_weight is not None:
            class_weights = [1.0, pos_weight]
        super().__init__(class_weights, max_weight)
        self.auto_pos_weight = pos_weight == "auto"

    def setup(self, statistics: SplitStatistics) -> None:
        super().setup(statistics)
        if self.auto_pos_weight and self.class_weights is not None:
            if len(self.class_weights) != 2:
                raise InputError(
                    f"model.loss.pos_weight is for two classes, not {len(statistics.names)}: use class_weights"
                )
            self.class_weights = self.class_weights / self.class_weights[0]

    def of_pixel(self, log_p: Tensor) -> Tensor:
        return -log_p


class Focal(PixelLoss):
    """Focal loss (Lin et al. 2017): cross-entropy times (1 - p_t)^gamma, which is 0.0025 at p_t = 0.95 and 0.36 at 0.4
    for gamma = 2, so that well-classified pixels contribute little. gamma = 0 is weighted cross-entropy.

    One logit: `-alpha (1-p)^gamma y log p - (1-alpha) p^gamma (1-y) log(1-p)`, averaged over valid pixels; as
    `torchvision.ops.sigmoid_focal_loss`. K logits: `-alpha[y] (1-p[y])^gamma log p[y]`, divided by the sum of alpha[y].

    Args:
        alpha: one logit: weight of the foreground, while that of the background is 1 - alpha. K logits: one weight a
            class. Or a rule, as `class_weights` of `CrossEntropy`: `auto` gives one logit num_neg / (num_neg +
            num_pos). null for none.
        gamma: 0 or more.
        max_weight: what the weights of more than two classes, made from the data, are capped at.
    """

    def __init__(self, alpha: float | Weights = None, gamma: float = 2.0, max_weight: float = 10.0) -> None:
        if isinstance(alpha, int | float):
            if not 0 < alpha < 1:
                raise InputError(f"Focal: alpha {alpha} must be between 0 and 1, or a list of one number per class")
            alpha = [1 - alpha, alpha]
        super().__init__(alpha, max_weight)
        self.gamma = gamma

    def of_pixel(self, log_p: Tensor) -> Tensor:
        # expm1: 1 - p without cancellation. The floor keeps the power's gradient finite at p = 1.
        floor = torch.finfo(log_p.dtype).eps
        wrong = -torch.expm1(log_p)
        return -log_p * wrong.clamp(min=floor) ** self.gamma

    def pixel_weights(self, logits: Tensor) -> Tensor | None:
        weights = super().pixel_weights(logits)
        if weights is not None and logits.shape[1] == 1:
            weights = weights / weights.sum()
        return weights
