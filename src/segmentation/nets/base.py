"""The contract that every net obeys, so that module, metrics, pruning and export know one thing only."""

from abc import ABC, abstractmethod
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Inference = Literal["last", "mean", 1, 2, 3, 4, 5]


class Heads(NamedTuple):
    """What a net says about a batch. A NamedTuple because dataclasses fail torch.export.

    Attributes:
        logits: raw, ungated logits, each (N, K, H, W) at the input's size, ordered so that the last predicts.
        presence: (N, K) logits of UNet3+'s classification-guided module, else None.
    """

    logits: tuple[Tensor, ...]
    presence: Tensor | None = None


class SegmentationNet(nn.Module, ABC):
    """Base class of the nets. A subclass sets `stride` and `num_heads` and writes `compute`; padding is done here.

    Args:
        in_channels: bands of the image.
        num_classes: channels of the output: 1 for a binary task, K for K classes.
        inference: which head predicts: `last`, the `mean` of the logits, or a level (1 is the first head).

    Attributes:
        stride: sides of what `compute` gets are multiples of it.
        num_heads: logits in `Heads`.
    """

    stride: int
    num_heads: int = 1

    def __init__(self, in_channels: int = 3, num_classes: int = 1, inference: Inference = "last") -> None:
        super().__init__()
        self.in_channels = in_channels
        self.num_classes = num_classes
        self.inference: Inference = inference

    @abstractmethod
    def compute(self, image: Tensor, level: int | None = None) -> Heads:
        """The net itself, on (N, C, H, W) whose sides are multiples of `stride`. See `forward`."""

    def forward(self, image: Tensor, level: int | None = None) -> Heads:
        """Logits of every head, or with `level=k` of head k alone, computing nothing that it does not need.

        Args:
            image: (N, C, H, W), normalised; any H and W from 1 up.
            level: 1..num_heads, or None for all.
        """
        height, width = image.shape[-2:]
        bottom, right = -height % self.stride, -width % self.stride
        # Zeros below and to the right, cut off again by negative padding: slicing would break a dynamic export.
        heads = self.compute(F.pad(image, (0, right, 0, bottom)), level)
        return Heads(tuple(F.pad(logits, (0, -right, 0, -bottom)) for logits in heads.logits), heads.presence)

    def combine(self, heads: Heads) -> Tensor:
        """Logits that predict, (N, K, H, W), from the heads of one forward pass, by the inference rule."""
        if self.inference == "mean":
            return torch.stack(heads.logits).mean(dim=0)
        if self.inference == "last" or len(heads.logits) == 1:
            return heads.logits[-1]
        return heads.logits[self.inference - 1]

    def predict(self, image: Tensor) -> Tensor:
        """Logits that predict, (N, K, H, W): a forward pass of what the inference rule needs, then `combine`."""
        level = {"last": self.num_heads, "mean": None}.get(self.inference, self.inference)
        return self.combine(self.forward(image, level=level))
