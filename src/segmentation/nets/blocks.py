"""The pieces that the nets share: convolution blocks, up-sampling, initialisation."""

import math
from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Norm = Literal["batch", "group"]
Upsample = Literal["transposed", "bilinear"]


def norm_layer(kind: Norm, channels: int) -> nn.Module:
    """Batch norm, or group norm for batches too small for it. SyncBatchNorm is the trainer's.

    Groups are 8, or fewer, so that each has two channels at least: one alone has no variance on a map of 1x1.
    """
    if kind == "batch":
        return nn.BatchNorm2d(channels)
    groups = math.gcd(channels, 16) // 2
    return nn.GroupNorm(max(1, groups), channels)


class ConvNormReLU(nn.Sequential):
    """3x3 convolution, norm, ReLU: (N, in, H, W) -> (N, out, H, W). No bias: the norm has one."""

    def __init__(self, in_channels: int, out_channels: int, norm: Norm = "batch") -> None:
        super().__init__(
            nn.Conv2d(
                in_channels,
                out_channels,
                kernel_size=3,
                padding=1,
                bias=False,
            ),
            norm_layer(norm, out_channels),
            nn.ReLU(inplace=True),
        )


class DoubleConv(nn.Sequential):
    """The U-Net's step: twice 3x3 convolution, norm, ReLU."""

    def __init__(self, in_channels: int, out_channels: int, norm: Norm = "batch") -> None:
        super().__init__(
            ConvNormReLU(in_channels, out_channels, norm),
            ConvNormReLU(out_channels, out_channels, norm),
        )

    def with_upsampled(self, left: Sequence[Tensor], below: Tensor, up: "Up") -> Tensor:
        """Equals `self(torch.cat([*left, up(below)], dim=1))`; of bilinear up-sampling in less time.

        The convolution of a concatenation is the sum of its parts' convolutions. Without the concatenation nothing is
        copied or kept twice for the backward pass, and the up-sampled part can be convolved before it is up-sampled.
        """
        if up.transposed is not None:
            return self(torch.cat([*left, up(below)], dim=1))
        conv, norm, relu = self[0].children()
        channels = [x.shape[1] for x in [*left, below]]
        *of_left, of_below = conv.get_parameter("weight").split(channels, dim=1)
        if len(of_below) < 64:  # the nine taps of few channels cost more time to move than they save
            y = F.conv2d(upsample(below, 2), of_below, padding=1)
        else:
            y = conv3x3_after_upsample(below, of_below, 2)
        for x, weight in zip(left, of_left, strict=True):
            y = y + F.conv2d(x, weight, padding=1)
        return self[1](relu(norm(y)))


def upsample(x: Tensor, factor: int) -> Tensor:
    """Bilinear up-sampling by `factor`: (N, C, H, W) -> (N, C, factor * H, factor * W)."""
    if factor == 1:
        return x
    return F.interpolate(x, scale_factor=factor, mode="bilinear", align_corners=False)


def conv3x3_after_upsample(x: Tensor, weight: Tensor, factor: int) -> Tensor:
    """Equals `F.conv2d(upsample(x, factor), weight, padding=1)`, but convolves at the size of x, with far less work.

    A 3x3 convolution is a sum of nine 1x1 convolutions (taps), each shifted by (dy, dx). All steps are linear, so a 1x1
    convolution can be applied before the up-sampling, to factor^2 times fewer pixels. Shifts and bilinear up-sampling
    are separable, into rows and columns:

        conv(up(x)) = sum over dy of  shift_dy( up_y( sum over dx of  shift_dx( up_x( W[dy, dx] . x ))))

    With x (N, C, h, w) and weight (O, C, 3, 3) it is (N, O, factor * h, factor * w).
    """
    taps = weight.permute(3, 2, 0, 1).flatten(0, 2)[:, :, None, None]  # (dx dy O, C, 1, 1)
    y = F.conv2d(x, taps)  # (N, dx dy O, h, w)
    y = F.interpolate(y, scale_factor=(1.0, float(factor)), mode="bilinear")  # (N, dx dy O, h, factor w)
    left, middle, right = y.chunk(3, dim=1)
    y = F.pad(left, (1, -1)) + middle + F.pad(right, (-1, 1))  # (N, dy O, h, factor w); the zeros are the padding
    y = F.interpolate(y, scale_factor=(float(factor), 1.0), mode="bilinear")  # (N, dy O, factor h, factor w)
    above, middle, below = y.chunk(3, dim=1)
    return F.pad(above, (0, 0, 1, -1)) + middle + F.pad(below, (0, 0, -1, 1))  # (N, O, factor h, factor w)


class Up(nn.Module):
    """Twice the size: a 2x2 transposed convolution to `out_channels`, or bilinear, which keeps the channels."""

    def __init__(self, in_channels: int, out_channels: int, mode: Upsample = "transposed") -> None:
        super().__init__()
        self.out_channels = in_channels
        self.transposed = None
        if mode == "transposed":
            self.out_channels = out_channels
            self.transposed = nn.ConvTranspose2d(in_channels, out_channels, kernel_size=2, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return upsample(x, 2) if self.transposed is None else self.transposed(x)


def init_he(*parts: nn.Module) -> None:
    """He initialisation (He et al. 2015, eq. 10), which the U-Net paper asks for in section 3; norms start at 1, 0."""
    for module in nn.ModuleList(parts).modules():
        if isinstance(module, nn.Conv2d | nn.ConvTranspose2d):
            nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
            if module.bias is not None:
                nn.init.zeros_(module.bias)
