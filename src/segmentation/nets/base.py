"""The base class of the nets and their output type; training, metrics, pruning and export rely on nothing else."""

from abc import ABC, abstractmethod
from typing import Literal, NamedTuple, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from segmentation.errors import InputError

Inference = Literal["last", "mean", 1, 2, 3, 4, 5]

# Logit of a class that `gate` rules out. Low enough that sigmoid and softmax give exactly 0, yet finite in float16:
# minus infinity could become NaN in a mean, or in a softmax over classes that are all ruled out.
CLOSED = -1e4


class Heads(NamedTuple):
    """Output of a net for a batch. A NamedTuple because torch.export does not take dataclasses."""

    #: Raw, ungated logits, each (N, K, H, W) at the input's size, ordered so that the last predicts.
    logits: tuple[Tensor, ...]
    #: (N, K) logits of UNet3+'s classification-guided module: is class k (of one channel, the foreground) in the image?
    class_logits: Tensor | None = None


class SegmentationNet(nn.Module, ABC):
    """Base class of the nets. A subclass sets `stride` and implements `compute` (not `forward`, which pads and crops).

    Args:
        in_channels: channels of the image.
        num_classes: channels of the output: 1 for a binary task, K for K classes.
        inference: which head predicts: `last`, the `mean` of the logits, or a level (1 is the first head).
        num_heads: logits in `Heads`.

    Attributes:
        stride: height and width are padded to multiples of it before `compute`.

    Raises:
        InputError: `inference` asks for heads that the net does not have.
    """

    stride: int = 1

    def __init__(
        self,
        in_channels: int = 3,
        num_classes: int = 1,
        inference: Inference = "last",
        num_heads: int = 1,
    ) -> None:
        super().__init__()
        self.in_channels = in_channels
        self.num_classes = num_classes
        self.num_heads = num_heads
        rules = ["last"]
        if num_heads > 1:
            rules += ["mean", *range(1, num_heads + 1)]
        if inference not in rules:
            raise InputError(f"inference: {inference!r} is none of {rules}; deep_supervision: true gives more heads")
        #: Number of the head that predicts; None for the mean of all.
        self.predicting_head: int | None = num_heads
        if inference == "mean":
            self.predicting_head = None
        elif inference != "last":
            self.predicting_head = inference

    @abstractmethod
    def compute(self, image: Tensor, level: int | None = None) -> Heads:
        """The net itself, on (N, C, H, W) whose sides are multiples of `stride`. See `forward`."""

    def forward(self, image: Tensor, level: int | None = None) -> Heads:
        """Logits of every head, or with `level=k` of head k alone, computing nothing that it does not need.

        Args:
            image: (N, C, H, W), normalised; any H and W from 1 up (once exported by torch.export, with dynamic H and W,
                larger than `stride`: a map of 1x1 would be another graph).
            level: 1..num_heads, or None for all.
        """
        # By floor division, as inductor cannot compile `%` of a side that changes from batch to batch.
        stride = self.stride
        bottom, right = [(side + stride - 1) // stride * stride - side for side in image.shape[-2:]]
        # Zeros below and to the right, cut off again by negative padding: slicing would break a dynamic export.
        image = F.pad(image, (0, right, 0, bottom))
        heads = self.compute(image, level)
        cropped = [F.pad(logits, (0, -right, 0, -bottom)) for logits in heads.logits]
        return Heads(tuple(cropped), heads.class_logits)

    def scales_of_heads(self, level: int | None) -> list[int]:
        """Which heads a pass computes, the coarsest first, by their scale: scale i is at H / 2^i."""
        if level is None:
            return list(reversed(range(self.num_heads)))
        return [self.num_heads - level]

    def combine(self, heads: Heads) -> Tensor:
        """Logits that predict, (N, K, H, W), from the heads of one forward pass: the inference rule, then the gate."""
        if self.predicting_head is None:
            logits = torch.stack(heads.logits).mean(dim=0)
        elif len(heads.logits) == 1:
            logits = heads.logits[0]
        else:
            logits = heads.logits[self.predicting_head - 1]
        if heads.class_logits is not None:
            logits = gate(logits, heads.class_logits)
        return logits

    def predict(self, image: Tensor) -> Tensor:
        """Logits that predict, (N, K, H, W): a forward pass of what the inference rule needs, then `combine`."""
        heads = self(image, level=self.predicting_head)  # not `self.forward`, which `net.compile()` leaves as it is
        return self.combine(heads)

    def train(self, mode: bool = True) -> Self:
        """Keep a frozen backbone in eval mode, so that its batch norms do not update their running statistics."""
        super().train(mode)
        backbone = self.backbone
        if backbone is not None and not any(p.requires_grad for p in backbone.parameters()):
            backbone.eval()
        return self

    def prune(self, level: int) -> "SegmentationNet":
        """A smaller net whose output is head `level` of this one; only UNet++ is built so that this is possible."""
        raise InputError(f"{type(self).__name__} cannot be pruned; UNetPlusPlus with deep_supervision: true can")

    @property
    def backbone(self) -> nn.Module | None:
        """The library's encoder, which can have its own learning rate; None with the paper's encoder."""
        encoder = getattr(self, "encoder", None)
        return getattr(encoder, "body", None)

    @property
    def statistics(self) -> tuple[list[float], list[float]] | None:
        """Mean and standard deviation by which a pretrained backbone wants images normalised; None: the data's own."""
        return getattr(self.backbone, "statistics", None)


def gate(logits: Tensor, class_logits: Tensor) -> Tensor:
    """Logits in which a class that is absent from the image gets no pixel (UNet3+, section 2.3, for K classes).

    A class is present if its class logit, (N, K), is above 0. The paper multiplies probabilities by 0 or 1; on logits,
    (N, K, H, W), an absent class gets `CLOSED` instead, as a logit of 0 would mean a probability of 1/2. If all of
    several classes are predicted absent, the image is left ungated.
    """
    absent = class_logits <= 0
    if logits.shape[1] > 1:
        none_is_present = absent.all(dim=1, keepdim=True)
        absent = absent & ~none_is_present
    return logits.masked_fill(absent[:, :, None, None], CLOSED)


def probabilities(logits: Tensor) -> Tensor:
    """(..., K, H, W) logits -> probabilities: of the foreground for one logit, of each class for K."""
    if logits.shape[-3] == 1:
        return logits.sigmoid()
    return logits.softmax(dim=-3)
