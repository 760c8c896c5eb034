"""UNet++: Zhou, Siddiquee, Tajbakhsh, Liang, "UNet++: A Nested U-Net Architecture for Medical Image Segmentation",
DLMIA 2018, and "UNet++: Redesigning Skip Connections to Exploit Multiscale Features", IEEE TMI 2019."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from segmentation.errors import InputError
from segmentation.nets.base import Heads, Inference, SegmentationNet
from segmentation.nets.blocks import DoubleConv, Norm, Up, Upsample, init_he
from segmentation.nets.encoders import Encoder


class Node(nn.Module):
    """X(i, j): two convolutions over all nodes to its left in row i and the up-sampled node below it (eq. 1)."""

    def __init__(self, left: int, below: int, width: int, upsample: Upsample, norm: Norm) -> None:
        super().__init__()
        self.up = Up(below, width, upsample)
        self.conv = DoubleConv(left + self.up.out_channels, width, norm)

    def forward(self, left: list[Tensor], below: Tensor) -> Tensor:
        return self.conv.with_upsampled(left, below, self.up)


class UNetPlusPlus(SegmentationNet):
    r"""UNet++, figure 1a: a triangle of nodes; the encoder is its left edge, the heads sit on its upper edge.

    ```
              head 1  head 2  head 3  head 4
                |       |       |       |
    X00 ───── X01 ─── X02 ─── X03 ─── X04      H    x W       X(i,j) sees X(i,0) .. X(i,j-1),
      \      /   \   /   \   /   \   /                        all of its row to the left,
      X10 ───── X11 ─── X12 ─── X13            H/2  x W/2     and X(i+1,j-1), up-sampled
        \      /   \   /   \   /
        X20 ───── X21 ─── X22                  H/4  x W/4
          \      /   \   /
          X30 ───── X31                        H/8  x W/8
            \      /
            X40                                H/16 x W/16
    ```

    Head L depends only on nodes with i + j <= L, so the net can be pruned to level L (`prune`).

    9,159,780 parameters for 3 channels, 1 class and four heads at the paper's widths. The usual PyTorch form has 3,648
    more, 9,163,428: a bias in each convolution before a batch norm, which takes it away again. The authors' Keras net
    has 9,041,601: one channel, one head, 2x2 transposed convolutions (`upsample: transposed`), biases, no norms.

    Args:
        in_channels: channels of the image.
        num_classes: channels of the output: 1 for a binary task, K for K classes.
        widths: channels of each row, the finest first; their number is the size of the triangle: 5 go down to a stride
            of 16, 6 to 32. With an `encoder` they are those of the nodes it does not give, and the last only counts.
        deep_supervision: a head on each of X(0,1), X(0,2), ..., not only on the last.
        encoder: null for the paper's, or an encoder of segmentation-models-pytorch: resnet34, tu-convnext_tiny, ...
        encoder_weights: null for random initialisation, a name such as imagenet, or a path.
        freeze_encoder: keep the encoder's weights as they are.
        full_size_skip: false, with an `encoder`: no X(0,0), as in segmentation-models-pytorch. Then each X(0,j) sees
            X(1,j-1) alone, and only those with a head are there.
        upsample: `bilinear` (the usual PyTorch form) or `transposed` (the authors' 2x2).
        norm: `batch`, or `group` where batches are very small. An `encoder` by name keeps its own.
        inference: which head predicts: `last`, the `mean` (the paper's accurate mode), or a level (its fast mode).
        pad_to: pad height and width to multiples of it and of the net's own stride. `prune` passes on the full net's.
    """

    def __init__(
        self,
        in_channels: int = 3,
        num_classes: int = 1,
        widths: Sequence[int] = (32, 64, 128, 256, 512),
        deep_supervision: bool = False,
        encoder: str | None = None,
        encoder_weights: str | None = None,
        freeze_encoder: bool = False,
        full_size_skip: bool = True,
        upsample: Upsample = "bilinear",
        norm: Norm = "batch",
        inference: Inference = "last",
        pad_to: int | None = None,
    ) -> None:
        depth = len(widths) - 1
        super().__init__(in_channels, num_classes, inference, num_heads=depth if deep_supervision else 1)
        self.depth = depth
        self.widths = list(widths)
        self.init_args = {
            "in_channels": in_channels,
            "num_classes": num_classes,
            "encoder": encoder,
            "freeze_encoder": freeze_encoder,
            "full_size_skip": full_size_skip,
            "upsample": upsample,
            "norm": norm,
        }
        self.encoder = Encoder(in_channels, widths, norm, encoder, encoder_weights, freeze_encoder, full_size_skip)
        self.stride = math.lcm(pad_to or 1, self.encoder.stride)
        self.first_row = 0 if full_size_skip else 1  # of the dense rows
        channels = [[first] for first in self.encoder.channels]  # channels[i][j] of X(i, j)
        self.nodes = nn.ModuleDict()
        for j in range(1, depth + 1):
            for i in range(self.first_row, depth - j + 1):
                self.nodes[f"{i}_{j}"] = Node(sum(channels[i]), channels[i + 1][j - 1], widths[i], upsample, norm)
                channels[i].append(widths[i])
        self.heads = nn.ModuleDict()
        for j in range(1 if deep_supervision else depth, depth + 1):
            if not full_size_skip:
                self.nodes[f"0_{j}"] = Node(0, channels[1][j - 1], widths[0], upsample, norm)
            self.heads[str(j)] = nn.Conv2d(widths[0], num_classes, kernel_size=1)
        init_he(self.nodes, self.heads)

    def compute(self, image: Tensor, level: int | None = None) -> Heads:
        depth = level if level and self.num_heads > 1 else self.depth
        x = [[first] for first in self.encoder(image, depth + 1)]  # x[i][j] is X(i, j), at H / 2^i x W / 2^i
        for j in range(1, depth + 1):  # column by column, so that each comes after those that it sees
            for i in range(self.first_row, depth - j + 1):
                node = self.nodes[f"{i}_{j}"]
                x[i].append(node(left=x[i], below=x[i + 1][j - 1]))
        logits = []
        for j in [depth] if level else map(int, self.heads):
            y = self.nodes[f"0_{j}"](left=[], below=x[1][j - 1]) if self.first_row else x[0][j]
            logits.append(self.heads[str(j)](y))
        return Heads(tuple(logits))

    def prune(self, level: int) -> "UNetPlusPlus":
        """The net that head `level` needs, with its own copy of the weights: its output equals that head's.

        At the paper's widths level 2 has 5.7 % of the parameters.

        Raises:
            InputError: there is no such head, for instance because the net was trained without deep supervision.
        """
        with torch.inference_mode(False):  # so that it can be trained on, wherever it was made
            pruned = type(self)(**self.pruned_arguments(level))
            state = self.state_dict()
            copies = {key: state[key].clone() for key in pruned.state_dict()}
            pruned.load_state_dict(copies, assign=True)  # of the same device, type and memory format
        return pruned.train(self.training)

    def pruned_arguments(self, level: int) -> dict:
        """What the pruned net is built with, for a checkpoint or a YAML file. Raises as `prune` does."""
        if self.num_heads == 1 or not 1 <= level <= self.num_heads:
            raise InputError(
                f"level {level} is no head of this net, which has 1 to {self.num_heads}. "
                "A net has a head at every level if it was trained with deep_supervision: true"
            )
        return self.init_args | {"widths": self.widths[: level + 1], "pad_to": self.stride}
