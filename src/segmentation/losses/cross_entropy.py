"""Pixel-wise cross-entropy, binary and multiclass, weighted against imbalance."""

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from segmentation.data.census import Census
from segmentation.data.labels import IGNORE_INDEX
from segmentation.errors import InputError
from segmentation.losses.base import SegmentationLoss


class CrossEntropy(SegmentationLoss):
    """Cross-entropy of each pixel, averaged.

    One logit (binary): `-pos_weight * y log p - (1 - y) log(1 - p)`, p = sigmoid(logit), averaged over valid pixels; as
    `torch.nn.functional.binary_cross_entropy_with_logits`. K logits: `-w[y] log p[y]`, p = softmax(logits), divided by
    the sum of w[y] over valid pixels; as `torch.nn.functional.cross_entropy`.

    Args:
        class_weights: for K logits: one factor a class, or `auto`: inverse frequency, n / (K n_c), from the pixels of
            the training split; a class without pixels gets 0.
        pos_weight: for one logit: factor on the foreground, or `auto`: num_neg / num_pos of the training split.
        ignore_index: class index of pixels that count nowhere.
    """

    def __init__(
        self,
        class_weights: list[float] | Literal["auto"] | None = None,
        pos_weight: float | Literal["auto"] | None = None,
        ignore_index: int = IGNORE_INDEX,
    ) -> None:
        super().__init__(ignore_index)
        self.auto_class_weights = class_weights == "auto"
        self.auto_pos_weight = pos_weight == "auto"
        self.class_weights: Tensor | None
        self.pos_weight: Tensor | None
        # An empty buffer is an `auto` that no census has filled yet.
        self.register_buffer("class_weights", _tensor(class_weights))
        self.register_buffer("pos_weight", _tensor(pos_weight))

    def setup(self, census: Census) -> None:
        pixels = torch.tensor(census.pixels, dtype=torch.float64)
        if self.auto_class_weights:
            weights = torch.where(pixels > 0, pixels.sum() / (len(pixels) * pixels.clamp(min=1)), 0.0)
            self.class_weights = weights.float()
        if self.auto_pos_weight:
            if not pixels[1]:
                raise InputError("pos_weight: auto needs foreground pixels, but the training split has none")
            self.pos_weight = (pixels[0] / pixels[1]).float()

    def mass(self, mask: Tensor) -> Tensor:
        valid = mask != self.ignore_index
        if self.class_weights is None:
            return valid.sum()
        return (self.class_weights[mask * valid] * valid).sum()

    def compute(self, logits: Tensor, mask: Tensor, weight: Tensor | None) -> Tensor:
        valid = mask != self.ignore_index
        if logits.shape[1] == 1:
            pos_weight = _filled(self.pos_weight, "pos_weight", logits)
            target = (mask * valid).to(logits.dtype)
            loss = F.binary_cross_entropy_with_logits(logits[:, 0], target, pos_weight=pos_weight, reduction="none")
        else:
            class_weights = _filled(self.class_weights, "class_weights", logits)
            if class_weights is not None and len(class_weights) != logits.shape[1]:
                raise InputError(f"class_weights holds {len(class_weights)} numbers for {logits.shape[1]} classes")
            loss = F.cross_entropy(logits, mask, class_weights, ignore_index=self.ignore_index, reduction="none")
        loss = loss * valid if weight is None else loss * valid * weight
        return loss.sum() / self.mass(mask).to(loss.dtype).clamp(min=torch.finfo(loss.dtype).tiny)


def _tensor(value: list[float] | float | str | None) -> Tensor | None:
    if value is None:
        return None
    return torch.empty(0) if value == "auto" else torch.tensor(value, dtype=torch.float32)


def _filled(weights: Tensor | None, name: str, like: Tensor) -> Tensor | None:
    if weights is None:
        return None
    if not weights.numel():
        raise InputError(f"{name}: auto is counted from the training split: call setup(census) first, or give numbers")
    return weights.to(like.dtype)
