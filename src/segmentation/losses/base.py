"""The contract of a loss."""

from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import Tensor, nn

from segmentation.data.census import Census
from segmentation.data.labels import IGNORE_INDEX


class SegmentationLoss(nn.Module, ABC):
    """Base class of the losses: float32 under any autocast; a subclass writes `compute`.

    Args:
        ignore_index: class index of pixels that count nowhere.
    """

    def __init__(self, ignore_index: int = IGNORE_INDEX) -> None:
        super().__init__()
        self.ignore_index = ignore_index

    @abstractmethod
    def compute(self, logits: Tensor, mask: Tensor, weight: Tensor | None) -> Tensor:
        """The loss, on float32 (or float64) logits. See `forward`."""

    def forward(self, logits: Tensor, mask: Tensor, weight: Tensor | None = None) -> Tensor:
        """A scalar; 0 where every pixel is ignored.

        Args:
            logits: (N, K, H, W); K = 1 means a binary task: one logit, for class 1.
            mask: (N, H, W) int64 class indices, or `ignore_index`.
            weight: (N, H, W), a factor on each pixel's loss, or None.
        """
        with torch.autocast(device_type=logits.device.type, enabled=False):
            precise = logits if logits.dtype == torch.float64 else logits.float()
            return self.compute(precise, mask, weight)

    def mass(self, mask: Tensor) -> Tensor:
        """What the sum over pixels was divided by: losses of batches add up to the split's when weighted by it."""
        return (mask != self.ignore_index).sum()

    def setup(self, census: Census) -> None:
        """Fill in what the config leaves to the data (`auto`), from the census of the training split."""

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        """Take buffers that a census filled, whose shape (the number of classes) only the checkpoint knows."""
        for name, buffer in list(self.named_buffers(recurse=False)):
            saved = state_dict.get(prefix + name)
            if saved is not None and saved.shape != buffer.shape:
                self.register_buffer(name, torch.empty_like(saved, device=buffer.device))
        super()._load_from_state_dict(state_dict, prefix, *args)
