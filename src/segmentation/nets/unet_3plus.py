"""UNet3+: Huang et al., "UNet 3+: A Full-Scale Connected UNet for Medical Image Segmentation", ICASSP 2020."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from segmentation.nets.base import Heads, Inference, SegmentationNet
from segmentation.nets.blocks import ConvNormReLU, Norm, conv3x3_after_upsample, init_he, norm_layer, upsample
from segmentation.nets.encoders import Encoder


class FullScaleNode(nn.Module):
    """X_De^i, figure 2: maps of all scales, each brought to scale i and convolved, then fused.

    finer maps   max-pool -> 3x3 convolution ─┐
    same scale               3x3 convolution ─┼─ concatenate ─ norm, ReLU ─ 3x3 convolution, norm, ReLU
    coarser      up-sample -> 3x3 convolution ┘

    The paper has norm and ReLU in each branch; over the concatenation batch norm is the same function with the same
    parameters, and a training step keeps one map less. (Group norm's groups may span two branches.)

    `channels` are those of the feature maps, the finest first; the node is at index `scale` of them. Each branch has
    `width` output channels, the node `width * len(channels)`.
    """

    def __init__(self, channels: Sequence[int], scale: int, width: int, norm: Norm) -> None:
        super().__init__()
        self.scale = scale
        self.branches = nn.ModuleList()
        for branch_channels in channels:
            conv = nn.Conv2d(
                branch_channels,
                width,
                kernel_size=3,
                padding=1,
                bias=False,
            )
            self.branches.append(conv)
        total = width * len(channels)
        self.norm = norm_layer(norm, total)
        self.fuse = ConvNormReLU(total, total, norm)

    def forward(self, maps: list[Tensor]) -> Tensor:
        parts = []
        for k, conv in enumerate(self.branches):
            if k < self.scale:
                parts.append(conv(F.max_pool2d(maps[k], kernel_size=2 ** (self.scale - k))))
            elif k == self.scale:
                parts.append(conv(maps[k]))
            else:
                parts.append(conv3x3_after_upsample(maps[k], conv.get_parameter("weight"), 2 ** (k - self.scale)))
        y = self.norm(torch.cat(parts, dim=1))
        return self.fuse(F.relu(y, inplace=True))


class UNet3Plus(SegmentationNet):
    """UNet3+, figure 1c: each decoder node sees maps of all scales, finer from the encoder, coarser from the decoder.

    ```
    En1 ─┬────────────────────────────── De1 ─ head 5      H   x W         De_i sees
      En2 ─┬─────────────────────── De2 ─┘ ─ head 4        H/2 x W/2       En_1 .. En_i and
        En3 ─┬──────────────── De3 ─┘ ─ head 3             H/4 x W/4       De_i+1 .. De_4, En_5
          En4 ─┬───────── De4 ─┘ ─ head 2                  H/8 x W/8
            En5 ──────────┘ ─ head 1, presence             H/16 x W/16
    ```

    For 3 channels and 1 class at the paper's widths, beside the authors' code (ZJUGiveLab/UNet-Version):

    |                        | here       | there      | the difference                                          |
    |------------------------|------------|------------|---------------------------------------------------------|
    | one head               | 26,965,249 | 26,971,777 | 6,528 biases before a norm, which takes them away:      |
    |                        |            |            | 3,968 in the encoder and 4 x (320 + 320) in the nodes   |
    | with deep supervision  | 26,983,109 | 26,989,637 | the same; four more heads are 17,860 on both sides      |
    | and the guided module  | 26,984,134 | 26,991,687 | and 1,025 there for a second logit, "present" against   |
    |                        |            |            | "absent", which one logit with a sigmoid says as well   |

    Args:
        in_channels: channels of the image.
        num_classes: channels of the output: 1 for a binary task, K for K classes.
        widths: channels of each encoder level, the finest first; their number is the depth: 5 go down to a stride of
            16, 6 to 32. With an `encoder` only the number counts, and what the stem at full size takes of them.
        skip_channels: channels of each branch of a decoder node.
        deep_supervision: a 3x3 head at every decoder node and at the deepest map, up-sampled to the input's size.
        classification_guided: predict which classes are in the image, from the deepest map (section 2.3): dropout, 1x1
            convolution, global max-pool. At inference a class that is not there gets no pixel.
        encoder: null for the paper's, or an encoder of segmentation-models-pytorch: resnet34, tu-convnext_tiny, ...
        encoder_weights: null for random initialisation, a name such as imagenet, or a path.
        freeze_encoder: keep the encoder's weights as they are.
        norm: `batch`, or `group` where batches are very small. An `encoder` by name keeps its own.
        inference: which head predicts: `last`, `mean`, or a level.
    """

    def __init__(
        self,
        in_channels: int = 3,
        num_classes: int = 1,
        widths: Sequence[int] = (64, 128, 256, 512, 1024),
        skip_channels: int = 64,
        deep_supervision: bool = False,
        classification_guided: bool = False,
        encoder: str | None = None,
        encoder_weights: str | None = None,
        freeze_encoder: bool = False,
        norm: Norm = "batch",
        inference: Inference = "last",
    ) -> None:
        scales = len(widths)
        num_heads = scales if deep_supervision else 1
        super().__init__(in_channels, num_classes, inference, num_heads)
        self.encoder = Encoder(in_channels, widths, norm, encoder, encoder_weights, freeze_encoder)
        self.stride = self.encoder.stride
        encoder_channels = self.encoder.channels
        deepest = encoder_channels[-1]
        decoder_channels = [skip_channels * scales] * (scales - 1) + [deepest]
        self.presence = None
        if classification_guided:
            self.presence = nn.Sequential(nn.Dropout(0.5), nn.Conv2d(deepest, num_classes, kernel_size=1))
            init_he(self.presence)
        self.nodes = nn.ModuleList()
        for i in range(scales - 1):
            channels = encoder_channels[: i + 1] + decoder_channels[i + 1 :]
            self.nodes.append(FullScaleNode(channels, i, skip_channels, norm))
        self.heads = nn.ModuleList()
        for width in decoder_channels[: self.num_heads]:
            self.heads.append(nn.Conv2d(width, num_classes, kernel_size=3, padding=1))
        init_he(self.nodes, self.heads)

    def compute(self, image: Tensor, level: int | None = None) -> Heads:
        maps = self.encoder(image)  # En1 .. En5
        class_logits = None
        if self.presence is not None:
            class_logits = self.presence(maps[-1]).amax(dim=(2, 3))  # (N, K)
        wanted = self.scales_of_heads(level)
        for i in reversed(range(wanted[-1], len(self.nodes))):  # De4 .. De1; De5 is En5
            maps[i] = self.nodes[i](maps)  # of En_k for k <= i, which become De_k one by one
        logits = [upsample(self.heads[i](maps[i]), 2**i) for i in wanted]
        return Heads(tuple(logits), class_logits)
