"""The pieces that the nets share: convolution blocks, up-sampling, initialisation, gradient checkpointing."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint

Norm = Literal["batch", "group"]
Upsample = Literal["transposed", "bilinear"]


def norm_layer(kind: Norm, channels: int) -> nn.Module:
    """Batch norm, or group norm for batches too small for it. SyncBatchNorm is the trainer's.

    Groups are 8, or fewer, so that each has two channels at least: one alone has no variance on a map of 1x1.
    """
    if kind == "batch":
        return nn.BatchNorm2d(channels)
    return nn.GroupNorm(next((groups for groups in (8, 4, 2) if channels % (2 * groups) == 0), 1), channels)


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


def upsample(x: Tensor, factor: int) -> Tensor:
    """Bilinear up-sampling by `factor`: (N, C, H, W) -> (N, C, factor * H, factor * W)."""
    return x if factor == 1 else F.interpolate(x, scale_factor=factor, mode="bilinear", align_corners=False)


class Up(nn.Module):
    """Twice the size: a 2x2 transposed convolution to `out_channels`, or bilinear, which keeps the channels."""

    def __init__(self, in_channels: int, out_channels: int, mode: Upsample = "transposed") -> None:
        super().__init__()
        self.out_channels = out_channels if mode == "transposed" else in_channels
        self.transposed = (
            nn.ConvTranspose2d(in_channels, out_channels, kernel_size=2, stride=2) if mode == "transposed" else None
        )

    def forward(self, x: Tensor) -> Tensor:
        return upsample(x, 2) if self.transposed is None else self.transposed(x)


def init_he(*parts: nn.Module) -> None:
    """He initialisation (He et al. 2015, eq. 10), which the U-Net paper asks for in section 3; norms start at 1, 0."""
    for module in (module for part in parts for module in part.modules()):
        if isinstance(module, nn.Conv2d | nn.ConvTranspose2d):
            nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
            if module.bias is not None:
                nn.init.zeros_(module.bias)


def run(block: nn.Module, *inputs: Tensor, checkpointing: bool = False) -> Tensor:
    """`block(*inputs)`; with `checkpointing` only the inputs are kept, and the backward pass computes the rest again.

    Gradients and batch-norm statistics are those of the plain run.
    """
    if not (checkpointing and torch.is_grad_enabled()):
        return block(*inputs)
    options: dict[str, Any] = {"use_reentrant": False, "preserve_rng_state": False}  # nothing random in these blocks
    if not torch.compiler.is_compiling():  # a compiled graph updates each statistic once by itself
        options["context_fn"] = lambda: (nullcontext(), statistics_kept(block))
    return checkpoint(block, *inputs, **options)


@contextmanager
def statistics_kept(block: nn.Module) -> Iterator[None]:
    """While `block` runs a second time on the same batch, its batch norms must not count that batch a second time."""
    norms = [module for module in block.modules() if isinstance(module, _BatchNorm)]
    before = [(norm.momentum, norm.num_batches_tracked) for norm in norms]
    for norm, (_, count) in zip(norms, before, strict=True):
        norm.momentum, norm.num_batches_tracked = 0.0, count if count is None else count.clone()
    try:
        yield
    finally:
        for norm, (momentum, count) in zip(norms, before, strict=True):
            norm.momentum, norm.num_batches_tracked = momentum, count
