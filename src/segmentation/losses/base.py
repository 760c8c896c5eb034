"""The contract of a loss."""

from abc import ABC, abstractmethod
from typing import Any, Literal

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn

from segmentation.data.census import Census
from segmentation.data.labels import IGNORE_INDEX
from segmentation.errors import InputError

#: A list of one number a class, or a rule that makes them from the census of the training split.
Weights = list[float] | Literal["auto", "inverse", "sqrt_inverse", "median", "effective"] | None

#: Cui et al.'s beta: what a class has in pixels beyond some 1 / (1 - beta) adds little to its effective number.
BETA = 1 - 1e-6


class SegmentationLoss(nn.Module, ABC):
    """Base class of the losses: float32 under any autocast; a subclass writes `compute`.

    Args:
        class_weights: for K logits, one factor a class: numbers, or a rule of `class_weights`; null for none.
        max_weight: what a rule's weights are capped at.
    """

    def __init__(self, class_weights: Weights = None, max_weight: float = 10.0) -> None:
        super().__init__()
        self.max_weight = max_weight
        self.rule = class_weights if isinstance(class_weights, str) else None
        self.class_weights: Tensor | None
        self.register_buffer("class_weights", as_buffer(class_weights))

    @abstractmethod
    def compute(self, logits: Tensor, mask: Tensor, weight: Tensor | None) -> Tensor:
        """The loss, on float32 (or float64) logits. See `forward`."""

    def forward(self, logits: Tensor, mask: Tensor, weight: Tensor | None = None) -> Tensor:
        """A scalar; 0 where every pixel is ignored.

        Args:
            logits: (N, K, H, W); K = 1 means a binary task: one logit, for class 1.
            mask: (N, H, W) int64 class indices, or IGNORE_INDEX.
            weight: (N, H, W), a factor on each pixel's share in the loss, or None.
        """
        with torch.autocast(device_type=logits.device.type, enabled=False):
            precise = logits if logits.dtype == torch.float64 else logits.float()
            return self.compute(precise, mask, weight)

    def terms(self, logits: Tensor, mask: Tensor, weight: Tensor | None = None) -> dict[str, Tensor]:
        """What `forward` is the sum of, by name; nothing for a loss of one term."""
        return {}

    def mass(self, logits: Tensor, mask: Tensor) -> Tensor:
        """What the sum over pixels was divided by: losses of batches add up to the split's when weighted by it."""
        return (mask != IGNORE_INDEX).sum()

    def setup(self, census: Census) -> None:
        """Fill in what the config leaves to the data, from the census of the training split."""
        if self.rule is not None:
            weights = class_weights(census, self.rule)
            for name, value in zip(census.names, weights.tolist(), strict=True):
                if value > self.max_weight:
                    rank_zero_warn(
                        f"class {name!r} is so rare that its weight would be {value:.1f}: capped at the loss's "
                        f"max_weight, {self.max_weight:g}"
                    )
            self.class_weights = weights.clamp(max=self.max_weight).float()

    def weights_of_classes(self, logits: Tensor, name: str = "class_weights") -> Tensor | None:
        """The class weights, (K,), in the logits' type; InputError if there are not K, or no census has filled them."""
        weights = filled(self.class_weights, name, logits)
        if weights is not None and len(weights) != logits.shape[1]:
            hint = " (a binary task has one logit: class_weights: null, and pos_weight or alpha where there is one)"
            said = f"{name} of the loss: {len(weights)} numbers for {logits.shape[1]} logits"
            raise InputError(said + hint * (logits.shape[1] == 1))
        return weights

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        """Take buffers that a census filled, whose shape (the number of classes) only the checkpoint knows."""
        for name, buffer in list(self.named_buffers(recurse=False)):
            saved = state_dict.get(prefix + name)
            if saved is not None and saved.shape != buffer.shape:
                self.register_buffer(name, torch.empty_like(saved, device=buffer.device))
        super()._load_from_state_dict(state_dict, prefix, *args)


def class_weights(census: Census, rule: str) -> Tensor:
    """One weight a class, (K,) float64, of mean 1 over the pixels of the training split; 0 for a class without pixels.

    With n_c the pixels of class c and N those of all images where it occurs:

    - `inverse`, or `auto`: 1 / n_c; every class has the same share in the loss. What is rare may drown the rest.
    - `sqrt_inverse`: 1 / sqrt(n_c), half way to it.
    - `median`: median(f) / f_c, f_c = n_c / N (Badrinarayanan et al. 2017, SegNet).
    - `effective`: (1 - beta) / (1 - beta^n_c), beta = 1 - 1e-6 (Cui et al. 2019): as `inverse` below a million pixels,
      and equal far above it.
    """
    n = torch.tensor(census.pixels, dtype=torch.float64)
    there = n > 0
    if rule in ("auto", "inverse"):
        weights = 1 / n
    elif rule == "sqrt_inverse":
        weights = n.rsqrt()
    elif rule == "median":
        frequency = n / torch.tensor(census.pixels_where, dtype=torch.float64)
        weights = frequency[there].quantile(0.5) / frequency
    else:
        weights = (1 - BETA) / (1 - BETA**n)
    weights = torch.where(there, weights, 0.0)
    return weights * n.sum() / (weights * n).sum()


def as_buffer(value: list[float] | float | str | None) -> Tensor | None:
    """Numbers as a tensor; an empty one stands for what no census has filled yet."""
    if value is None:
        return None
    return torch.empty(0) if isinstance(value, str) else torch.tensor(value, dtype=torch.float32)


def filled(weights: Tensor | None, name: str, like: Tensor) -> Tensor | None:
    """A buffer, in the type of `like`; InputError if it still waits for a census."""
    if weights is None:
        return None
    if not weights.numel():
        raise InputError(f"{name}: auto is counted from the training split: call setup(census) first, or give numbers")
    return weights.to(like.dtype)
