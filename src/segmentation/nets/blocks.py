"""The pieces that the nets share: convolution blocks, up-sampling, initialisation."""

import math
from typing import Literal

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


def upsample(x: Tensor, factor: int) -> Tensor:
    """Bilinear up-sampling by `factor`: (N, C, H, W) -> (N, C, factor * H, factor * W)."""
    if factor == 1:
        return x
    return F.interpolate(x, scale_factor=factor, mode="bilinear", align_corners=False)


class Up(nn.Module):
    """Twice the size: a 2x2 transposed convolution to `out_channels`, or bilinear, which keeps the channels."""

    def __init__(self, in_channels: int, out_channels: int, mode: Upsample = "transposed") -> None:
        super().__init__()
        self.out_channels = in_channels
        self.transposed: nn.Module | None = None
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
