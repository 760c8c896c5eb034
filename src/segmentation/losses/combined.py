"""Sums of losses, each term logged under its own name."""

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from segmentation.data.statistics import SplitStatistics
from segmentation.errors import InputError
from segmentation.losses.base import SegmentationLoss, Weights
from segmentation.losses.ms_ssim import MsSsim
from segmentation.losses.pixel import Focal
from segmentation.losses.region import Jaccard


class WeightedSum(SegmentationLoss):
    """The sum of factor times loss.

    Args:
        losses: any losses, by class name.
        weights: one factor per loss; null for 1 each.

    Raises:
        InputError: not as many weights as losses, or no loss.
    """

    def __init__(self, losses: list[SegmentationLoss], weights: list[float] | None = None) -> None:
        super().__init__()
        if weights is None:
            weights = [1.0] * len(losses)
        if not losses or len(weights) != len(losses):
            raise InputError(f"WeightedSum: {len(weights)} weights for {len(losses)} losses; give one a loss")
        self.losses: Iterable[SegmentationLoss] = nn.ModuleList(losses)  # type: ignore[assignment]  # of one class
        self.weights = list(weights)
        self.additive = all(loss.additive for loss in losses)

    def setup(self, statistics: SplitStatistics) -> None:
        for loss in self.losses:
            loss.setup(statistics)

    def forward(
        self,
        logits: Tensor,
        mask: Tensor,
        weight: Tensor | None = None,
        step_pixels: Tensor | None = None,
    ) -> Tensor:
        """The sum. `terms` then holds its terms: those of one class added up, those of a sum within it one by one."""
        losses = []
        self.terms = {}
        for factor, loss in zip(self.weights, self.losses, strict=True):
            value = loss(logits, mask, weight, step_pixels)
            losses.append(factor * value)
            terms = loss.terms or {type(loss).__name__: value.detach()}
            for name, term in terms.items():
                self.terms[name] = self.terms.get(name, 0) + factor * term
        return torch.stack(losses).sum()

    def compute(self, logits: Tensor, mask: Tensor, weight: Tensor | None) -> Tensor:
        return self(logits, mask, weight)


class Hybrid(WeightedSum):
    """UNet3+'s hybrid of pixel, patch and map: focal + MS-SSIM + IoU (Huang et al. 2020, section 2.2).

    Args:
        alpha: the focal loss's.
        gamma: the focal loss's.
    """

    def __init__(self, alpha: float | Weights = None, gamma: float = 2.0) -> None:
        super().__init__([Focal(alpha, gamma), MsSsim(), Jaccard()])
