"""The pieces that the nets share: convolution blocks, up-sampling, initialisation."""

from typing import Literal

import torch.nn.functional as F
from torch import Tensor, nn

Norm = Literal["batch", "group"]
Upsample = Literal["transposed", "bilinear"]


def norm_layer(kind: Norm, channels: int) -> nn.Module:
    """Batch norm, or group norm (at most 8 groups) for batches too small for it. SyncBatchNorm is the trainer's."""
    if kind == "batch":
        return nn.BatchNorm2d(channels)
    return nn.GroupNorm(next(groups for groups in (8, 4, 2, 1) if channels % groups == 0), channels)


class ConvNormReLU(nn.Sequential):
    """3x3 convolution, norm, ReLU: (N, in, H, W) -> (N, out, H, W). No bias: the norm has one."""

    def __init__(self, in_channels: int, out_channels: int, norm: Norm = "batch") -> None:
        super().__init__(
            nn.Conv2d(in_channels, out_channels, kernel_size=3, padding=1, bias=False),
            norm_layer(norm, out_channels),
            nn.ReLU(inplace=True),
        )


class DoubleConv(nn.Sequential):
    """The U-Net's step: twice 3x3 convolution, norm, ReLU."""

    def __init__(self, in_channels: int, out_channels: int, norm: Norm = "batch") -> None:
        super().__init__(ConvNormReLU(in_channels, out_channels, norm), ConvNormReLU(out_channels, out_channels, norm))


class Up(nn.Module):
    """Twice the size: a 2x2 transposed convolution to `out_channels`, or bilinear, which keeps the channels."""

    def __init__(self, in_channels: int, out_channels: int, mode: Upsample = "transposed") -> None:
        super().__init__()
        self.out_channels = out_channels if mode == "transposed" else in_channels
        self.transposed = (
            nn.ConvTranspose2d(in_channels, out_channels, kernel_size=2, stride=2) if mode == "transposed" else None
        )

    def forward(self, x: Tensor) -> Tensor:
        if self.transposed is not None:
            return self.transposed(x)
        return F.interpolate(x, scale_factor=2, mode="bilinear", align_corners=False)


def init_he(net: nn.Module) -> None:
    """He initialisation (He et al. 2015, eq. 10), which the U-Net paper asks for in section 3; norms start at 1, 0."""
    for module in net.modules():
        if isinstance(module, nn.Conv2d | nn.ConvTranspose2d):
            nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
            if module.bias is not None:
                nn.init.zeros_(module.bias)
