"""The contract of a loss."""

from abc import ABC, abstractmethod
from itertools import compress
from typing import Literal

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn

from segmentation.data.statistics import SplitStatistics
from segmentation.errors import InputError

#: A list of one number per class, or a rule that makes them from the statistics of the training split.
Weights = list[float] | Literal["auto", "sqrt_inverse", "median", "effective"] | None

#: Cui et al.'s beta: what a class has in pixels beyond some 1 / (1 - beta) adds little to its effective number.
BETA = 1 - 1e-6


class SegmentationLoss(nn.Module, ABC):
    """Base class of the losses: float32 under any autocast; a subclass writes `compute`.

    Args:
        class_weights: one factor per class: numbers, or a rule of `class_weights`; null for none.
        max_weight: what a rule's weights of more than two classes are capped at.

    Attributes:
        terms: what the last loss was the sum of, by name; empty for a loss of one term.
        additive: whether the losses of an image's parts, all given the whole image's `step_pixels`, add up to its own.
    """

    additive: bool = False

    def __init__(self, class_weights: Weights = None, max_weight: float = 10.0) -> None:
        super().__init__()
        self.terms: dict[str, Tensor] = {}
        self.max_weight = max_weight
        self.rule = None
        if isinstance(class_weights, str):
            self.rule = class_weights
            class_weights = []  # until `setup`
        self.class_weights: Tensor | None
        buffer = None if class_weights is None else torch.tensor(class_weights, dtype=torch.float32)
        self.register_buffer("class_weights", buffer)
        self.register_load_state_dict_pre_hook(resize_class_weights)

    @abstractmethod
    def compute(self, logits: Tensor, mask: Tensor, weight: Tensor | None) -> Tensor:
        """The loss, on float32 (or float64) logits. See `forward`."""

    def forward(
        self,
        logits: Tensor,
        mask: Tensor,
        weight: Tensor | None = None,
        step_pixels: Tensor | None = None,
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
            if logits.dtype != torch.float64:
                logits = logits.float()
            return self.compute(logits, mask, weight)

    def weight_sum(self, pixels: Tensor, channels: int) -> Tensor:
        """What the sum over pixels is divided by: losses of batches add up to the split's when weighted by it.

        Args:
            pixels: (..., K) pixels of each class.
            channels: of the logits.
        """
        return pixels.sum(dim=-1)

    def setup(self, statistics: SplitStatistics) -> None:
        """Fill in what the config leaves to the data, from the statistics of the training split."""
        if self.rule is None:
            return
        weights = class_weights(statistics, self.rule)
        if len(weights) == 2 and statistics.pixels[1] == 0:
            raise InputError("auto weights of two classes need foreground pixels, but the training split has none")
        if len(weights) > 2:
            for name in compress(statistics.names, weights > self.max_weight):
                rank_zero_warn(f"the weight of class {name!r} is capped at max_weight, {self.max_weight:g}")
            weights = weights.clamp(max=self.max_weight)
        self.class_weights = weights.float()

    def weights_of_classes(self, count: int, like: Tensor) -> Tensor | None:
        """The class weights, (count,), in the type of `like`.

        Raises:
            InputError: there are not so many: none, where no statistics has filled them.
        """
        weights = self.class_weights
        if weights is None:
            return None
        if len(weights) != count:
            raise InputError(
                f"the loss has weights for {len(weights)} classes, not {count}: give class_weights or alpha one number "
                "a class (pos_weight, and one alpha, are for two); in Python, `auto` needs a call of setup(statistics)"
            )
        return weights.to(like.dtype)


def divide(total: Tensor, divisor: Tensor) -> Tensor:
    """The quotient, which is 0 where both are 0."""
    return total / divisor.clamp(min=torch.finfo(torch.float32).tiny)


def resize_class_weights(loss, state: dict, prefix: str, *_) -> None:
    """Make room for weights of the training split, whose number only the checkpoint knows."""
    saved = state.get(f"{prefix}class_weights")
    if saved is not None and loss.class_weights is not None:
        loss.class_weights.resize_(saved.shape)


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
    present = n > 0
    if rule == "auto":
        weights = 1 / n
    elif rule == "sqrt_inverse":
        weights = n.rsqrt()
    elif rule == "median":
        frequency = n / torch.tensor(statistics.pixels_where, dtype=torch.float64)
        weights = frequency[present].quantile(0.5) / frequency
    else:
        weights = (1 - BETA) / (1 - BETA**n)
    weights = torch.where(present, weights, 0.0)
    return weights * n.sum() / (weights * n).sum()
