"""UNet: Ronneberger, Fischer, Brox, "U-Net: Convolutional Networks for Biomedical Image Segmentation", MICCAI 2015."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from segmentation.nets.base import Heads, Inference, SegmentationNet
from segmentation.nets.blocks import DoubleConv, Norm, Up, Upsample, init_he, upsample
from segmentation.nets.encoders import build_encoder


class UNet(SegmentationNet):
    """The U-Net of figure 1, with padded convolutions and batch norm.

    ```
    x0 ─────────────────────────────── cat ─ y0 ─ head      H   x W
     └ x1 ───────────────────── cat ─ y1 ┘                  H/2 x W/2
        └ x2 ─────────── cat ─ y2 ┘                         H/4 x W/4
           └ x3 ─ cat ─ y3 ┘                                H/8 x W/8
              └ x4 ┘                                        H/16 x W/16
    ```

    31,037,633 parameters for 3 bands and 1 class at the paper's widths with transposed convolutions. The paper's own
    net, 1 band and 2 classes, has 31,030,658: biases in place of norms, and unpadded, so that 572 pixels give 388.

    Args:
        in_channels: bands of the image.
        num_classes: channels of the output: 1 for a binary task, K for K classes.
        widths: channels of each level, the finest first; their number is the depth: 5 go down to a stride of 16, 6 to
            32. With an `encoder` they are the stem's and the decoder's, and the last only counts as a level.
        deep_supervision: a 1x1 head at every decoder level, up-sampled to the input's size, the coarsest first.
        encoder: null for the paper's, or a name that segmentation-models-pytorch knows: resnet34, tu-convnext_tiny.
        encoder_weights: null for random ones, a name such as imagenet, or a file.
        freeze_encoder: keep the encoder's weights as they are.
        upsample: `transposed` (the paper's 2x2 up-convolution) or `bilinear`.
        norm: `batch`, or `group` where batches are very small. An `encoder` by name keeps its own.
        inference: which head predicts: `last`, `mean`, or a level.
    """

    def __init__(
        self,
        in_channels: int = 3,
        num_classes: int = 1,
        widths: Sequence[int] = (64, 128, 256, 512, 1024),
        deep_supervision: bool = False,
        encoder: str | None = None,
        encoder_weights: str | None = None,
        freeze_encoder: bool = False,
        upsample: Upsample = "transposed",
        norm: Norm = "batch",
        inference: Inference = "last",
    ) -> None:
        depth = len(widths) - 1
        heads = depth if deep_supervision else 1
        super().__init__(in_channels, num_classes, inference, num_heads=heads)
        self.encoder = build_encoder(in_channels, widths, norm, encoder, encoder_weights, freeze_encoder)
        self.stride = self.encoder.stride

        skips = self.encoder.channels[:-1]
        below = [*widths[1:-1], self.encoder.channels[-1]]  # what comes up to each level
        ups = [Up(b, w, upsample) for b, w in zip(below, widths, strict=False)]
        sizes = zip(skips, ups, widths, strict=False)
        self.up = nn.ModuleList(ups)
        self.fuse = nn.ModuleList(DoubleConv(skip + up.out_channels, width, norm) for skip, up, width in sizes)
        self.heads = nn.ModuleList(nn.Conv2d(width, num_classes, kernel_size=1) for width in widths[:heads])
        init_he(self.up, self.fuse, self.heads)

    def compute(self, image: Tensor, level: int | None = None) -> Heads:
        *skips, y = self.encoder(image)  # x0 .. x3, x4
        logits = []
        for i in reversed(range(len(skips))):
            y = self.fuse[i](torch.cat([skips[i], self.up[i](y)], dim=1))
            this = self.num_heads - i  # the finest decoder level, i = 0, is the last head
            if i < self.num_heads and level in (None, this):
                logits.append(upsample(self.heads[i](y), 2**i))
            if level == this:
                break
        return Heads(tuple(logits))
