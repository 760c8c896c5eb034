"""UNet: Ronneberger, Fischer, Brox, "U-Net: Convolutional Networks for Biomedical Image Segmentation", MICCAI 2015."""

from collections.abc import Sequence

from torch import Tensor, nn

from segmentation.nets.base import Heads, Inference, SegmentationNet
from segmentation.nets.blocks import DoubleConv, Norm, Up, Upsample, init_he, upsample
from segmentation.nets.encoders import Encoder


class UNet(SegmentationNet):
    """The U-Net of figure 1, with padded convolutions and batch norm.

    ```
    x0 ─────────────────────────────── cat ─ y0 ─ head      H   x W
     └ x1 ───────────────────── cat ─ y1 ┘                  H/2 x W/2
        └ x2 ─────────── cat ─ y2 ┘                         H/4 x W/4
           └ x3 ─ cat ─ y3 ┘                                H/8 x W/8
              └ x4 ┘                                        H/16 x W/16
    ```

    31,037,633 parameters for 3 channels and 1 class at the paper's widths with transposed convolutions. The paper's own
    net (1 channel, 2 classes) has 31,030,658: conv biases, no norms. It does not pad: 572x572 pixels give 388x388.

    Args:
        in_channels: channels of the image.
        num_classes: channels of the output: 1 for a binary task, K for K classes.
        widths: channels of each level, full resolution first. Their number sets the depth: 5 levels reach stride 16, 6
            reach 32. With a named `encoder` they apply to the stem and the decoder; the last only adds a level.
        deep_supervision: add a 1x1 head at every decoder level, up-sampled to the input size; head 1 is the coarsest.
        encoder: null for the paper's, or an encoder of segmentation-models-pytorch: resnet34, tu-convnext_tiny, ...
        encoder_weights: null for random initialisation, a name such as imagenet, or a path.
        freeze_encoder: keep the encoder's weights as they are.
        full_size_skip: false, with an `encoder`: no x0, as in segmentation-models-pytorch; y0 sees y1 alone.
        upsample: `transposed` (the paper's 2x2 up-convolution) or `bilinear`.
        norm: `batch`, or `group` where batches are very small. An `encoder` by name keeps its own.
        inference: the head to predict from: `last`, the `mean` of all, or a number (1: the coarsest).
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
        full_size_skip: bool = True,
        upsample: Upsample = "transposed",
        norm: Norm = "batch",
        inference: Inference = "last",
    ) -> None:
        depth = len(widths) - 1
        super().__init__(in_channels, num_classes, inference, num_heads=depth if deep_supervision else 1)
        # The left side of figure 1: two 3x3 convolutions at each level, max-pooling between the levels.
        self.encoder = Encoder(in_channels, widths, norm, encoder, encoder_weights, freeze_encoder, full_size_skip)
        self.stride = self.encoder.stride
        # The right side, the finest level first.
        self.up = nn.ModuleList()
        self.fuse = nn.ModuleList()
        self.heads = nn.ModuleList()
        channels = self.encoder.channels  # of x0 .. x4
        for i in range(depth):
            below = widths[i + 1] if i + 1 < depth else channels[depth]  # from decoder level i + 1, or from x4
            up = Up(below, widths[i], upsample)
            self.up.append(up)
            self.fuse.append(DoubleConv(channels[i] + up.out_channels, widths[i], norm))
        for i in range(self.num_heads):
            self.heads.append(nn.Conv2d(widths[i], num_classes, kernel_size=1))
        init_he(self.up, self.fuse, self.heads)

    def compute(self, image: Tensor, level: int | None = None) -> Heads:
        x = self.encoder(image)  # x0 .. x4
        wanted = self.scales_of_heads(level)
        logits = []
        y = x[-1]
        for i in reversed(range(wanted[-1], len(self.up))):  # y3 .. y0
            skip = [x[i]] if self.encoder.channels[i] else []
            # Up-conv 2x2, concatenated with the skip (the figure's "copy and crop"); then twice conv 3x3, norm, ReLU.
            y = self.fuse[i].with_upsampled(skip, y, self.up[i])  # type: ignore[operator]  # a DoubleConv
            if i in wanted:
                head = self.heads[i](y)  # conv 1x1
                logits.append(upsample(head, 2**i))
        return Heads(tuple(logits))
