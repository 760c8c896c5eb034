"""UNet: Ronneberger, Fischer, Brox, "U-Net: Convolutional Networks for Biomedical Image Segmentation", MICCAI 2015."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from segmentation.nets.base import Heads, Inference, SegmentationNet
from segmentation.nets.blocks import DoubleConv, Norm, Up, Upsample, init_he


class UNet(SegmentationNet):
    """The U-Net of figure 1, with padded convolutions and batch norm.

    ```
    x0 ─────────────────────────────── cat ─ y0 ─ head      H   x W
     └ x1 ───────────────────── cat ─ y1 ┘                  H/2 x W/2
        └ x2 ─────────── cat ─ y2 ┘                         H/4 x W/4
           └ x3 ─ cat ─ y3 ┘                                H/8 x W/8
              └ x4 ┘                                        H/16 x W/16
    ```

    31,037,633 parameters for 3 bands and 1 class at the paper's widths with transposed convolutions.

    Args:
        in_channels: bands of the image.
        num_classes: channels of the output: 1 for a binary task, K for K classes.
        widths: channels of each level, the finest first; one level more halves the smallest map once more.
        upsample: `transposed` (the paper's 2x2 up-convolution) or `bilinear`.
        norm: `batch`, or `group` where batches are very small.
        deep_supervision: a 1x1 head at every decoder level, up-sampled to the input's size, the coarsest first.
        inference: which head predicts: `last`, `mean`, or a level.
    """

    def __init__(
        self,
        in_channels: int = 3,
        num_classes: int = 1,
        widths: Sequence[int] = (64, 128, 256, 512, 1024),
        upsample: Upsample = "transposed",
        norm: Norm = "batch",
        deep_supervision: bool = False,
        inference: Inference = "last",
    ) -> None:
        super().__init__(in_channels, num_classes, inference)
        self.stride = 2 ** (len(widths) - 1)
        self.num_heads = len(widths) - 1 if deep_supervision else 1
        pairs = list(zip(widths, widths[1:], strict=False))

        self.stem = DoubleConv(in_channels, widths[0], norm)
        self.down = nn.ModuleList(DoubleConv(fine, coarse, norm) for fine, coarse in pairs)
        self.up = nn.ModuleList(Up(coarse, fine, upsample) for fine, coarse in pairs)
        self.fuse = nn.ModuleList(
            DoubleConv(fine + up.out_channels, fine, norm) for (fine, _), up in zip(pairs, self.up, strict=True)
        )
        self.heads = nn.ModuleList(nn.Conv2d(width, num_classes, kernel_size=1) for width in widths[: self.num_heads])
        init_he(self)

    def compute(self, image: Tensor, level: int | None = None) -> Heads:
        skips = [self.stem(image)]  # (N, widths[i], H / 2^i, W / 2^i)
        for down in self.down:
            skips.append(down(F.max_pool2d(skips[-1], kernel_size=2)))

        y = skips.pop()
        logits = []
        for i in reversed(range(len(skips))):
            y = self.fuse[i](torch.cat([skips[i], self.up[i](y)], dim=1))
            this = self.num_heads - i  # the finest decoder level, i = 0, is the last head
            if i < self.num_heads and level in (None, this):
                logits.append(
                    self.heads[i](y) if i == 0 else F.interpolate(self.heads[i](y), scale_factor=2**i, mode="bilinear")
                )
            if level == this:
                break
        return Heads(tuple(logits))
