"""The contract of a loss."""

from abc import ABC, abstractmethod
from typing import Any, Literal

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn

from segmentation.data.labels import IGNORE_INDEX
from segmentation.data.statistics import SplitStatistics
from segmentation.errors import InputError

#: A list of one number a class, or a rule that makes them from the statistics of the training split.
Weights = list[float] | Literal["auto", "sqrt_inverse", "median", "effective"] | None

#: Cui et al.'s beta: what a class has in pixels beyond some 1 / (1 - beta) adds little to its effective number.
BETA = 1 - 1e-6


class SegmentationLoss(nn.Module, ABC):
    """Base class of the losses: float32 under any autocast; a subclass writes `compute`.

    Args:
        class_weights: one factor a class: numbers, or a rule of `class_weights`; null for none.
        max_weight: what a rule's weights of more than two classes are capped at.
    """

    def __init__(self, class_weights: Weights = None, max_weight: float = 10.0) -> None:
        super().__init__()
        self.max_weight = max_weight
        self.rule: str | None = class_weights if isinstance(class_weights, str) else None
        self.class_weights: Tensor | None  # an empty one is what no statistics has filled yet
        numbers = [] if isinstance(class_weights, str) else class_weights
        self.register_buffer("class_weights", None if numbers is None else torch.tensor(numbers, dtype=torch.float32))

    @abstractmethod
    def compute(self, logits: Tensor, mask: Tensor, weight: Tensor | None) -> Tensor:
        """The loss, on float32 (or float64) logits. See `forward`."""

    def forward(
        self, logits: Tensor, mask: Tensor, weight: Tensor | None = None, step_pixels: Tensor | None = None
    ) -> Tensor:
        """A scalar; 0 where every pixel is ignored.

        Args:
            logits: (N, K, H, W); K = 1 means a binary task: one logit, for class 1.
            mask: (N, H, W) int64 class indices, or IGNORE_INDEX.
            weight: (N, H, W), a factor on each pixel's share in the loss, or None.
            step_pixels: (K,) pixels of each class in a batch of this optimizer step, averaged over its accumulated
                batches and all processes; None: the step is this batch alone. A mean over pixels divides by their
                number, so that the mean of the batches' losses is the loss of one large batch.
        """
        with torch.autocast(device_type=logits.device.type, enabled=False):
            precise = logits if logits.dtype == torch.float64 else logits.float()
            loss = self.compute(precise, mask, weight)
            return loss if step_pixels is None else loss * self.share(precise, mask, step_pixels)

    def terms(
        self, logits: Tensor, mask: Tensor, weight: Tensor | None = None, step_pixels: Tensor | None = None
    ) -> dict[str, Tensor]:
        """What `forward` is the sum of, by name; nothing for a loss of one term."""
        return {}

    def mass(self, logits: Tensor, mask: Tensor) -> Tensor:
        """What the sum over pixels was divided by: losses of batches add up to the split's when weighted by it."""
        return (mask != IGNORE_INDEX).sum()

    def step_weight_sum(self, logits: Tensor, step_pixels: Tensor) -> Tensor:
        """The mean of `mass` over the batches of a step."""
        return step_pixels.sum()

    def share(self, logits: Tensor, mask: Tensor, step_pixels: Tensor) -> Tensor | float:
        """How much this batch counts among those of its step: 1 for a loss that is no mean over pixels."""
        return 1.0

    def setup(self, statistics: SplitStatistics) -> None:
        """Fill in what the config leaves to the data, from the statistics of the training split."""
        if self.rule is None:
            return
        two = len(statistics.pixels) == 2
        if two and not statistics.pixels[1]:
            raise InputError("auto weights of two classes need foreground pixels, but the training split has none")
        weights, cap = class_weights(statistics, self.rule), float("inf") if two else self.max_weight
        for name, value in zip(statistics.names, weights.tolist(), strict=True):
            if value > cap:
                rank_zero_warn(
                    f"class {name!r} is so rare that its weight would be {value:.1f}: capped at the loss's "
                    f"max_weight, {cap:g}"
                )
        self.class_weights = weights.clamp(max=cap).float()

    def weights_of_classes(self, count: int, like: Tensor) -> Tensor | None:
        """The class weights, (count,), in the type of `like`.

        Raises:
            InputError: no statistics has filled them, or there are not so many.
        """
        weights = self.class_weights
        if weights is None:
            return None
        if not weights.numel():
            raise InputError("auto weights need the training split's counts: call setup(statistics), or give numbers")
        if len(weights) != count:
            raise InputError(
                f"the loss has weights for {len(weights)} classes, not {count}: give class_weights or alpha one number "
                "a class (pos_weight, and one alpha, are for two)"
            )
        return weights.to(like.dtype)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        """Take weights that a statistics filled, whose number only the checkpoint knows."""
        saved = state_dict.get(f"{prefix}class_weights")
        if saved is not None and self.class_weights is not None:
            self.class_weights = torch.empty_like(saved, device=self.class_weights.device)
        super()._load_from_state_dict(state_dict, prefix, *args)


def class_weights(statistics: SplitStatistics, rule: str) -> Tensor:
    """One weight a class, (K,) float64, of mean 1 over the pixels of the training split; 0 for a class without pixels.

    With n_c the pixels of class c and N those of all images where it occurs:

    - `auto`: 1 / n_c; every class has the same share in the loss. What is rare may drown the rest.
    - `sqrt_inverse`: 1 / sqrt(n_c), half way to it.
    - `median`: median(f) / f_c, f_c = n_c / N (Badrinarayanan et al. 2017, SegNet).
    - `effective`: (1 - beta) / (1 - beta^n_c), beta = 1 - 1e-6 (Cui et al. 2019): as `auto` below a million pixels,
      and equal far above it.
    """
    n = torch.tensor(statistics.pixels, dtype=torch.float64)
    there = n > 0
    if rule == "auto":
        weights = 1 / n
    elif rule == "sqrt_inverse":
        weights = n.rsqrt()
    elif rule == "median":
        frequency = n / torch.tensor(statistics.pixels_where, dtype=torch.float64)
        weights = frequency[there].quantile(0.5) / frequency
    else:
        weights = (1 - BETA) / (1 - BETA**n)
    weights = torch.where(there, weights, 0.0)
    return weights * n.sum() / (weights * n).sum()
