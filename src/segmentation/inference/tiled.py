"""Predict by parts: overlapping tiles, so that memory is bounded, and symmetries, so that chance averages out."""

import sys
from collections.abc import Callable, Iterator
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from segmentation.errors import InputError
from segmentation.losses.region import probabilities
from segmentation.nets import Heads, SegmentationNet

Symmetries = Literal["none", "flips", "all"]

#: (mirror, quarter turns): none; the four flips; the eight symmetries of the square.
SYMMETRIES: dict[str, list[tuple[bool, int]]] = {
    "none": [(False, 0)],
    "flips": [(False, 0), (True, 0), (False, 2), (True, 2)],
    "all": [(mirror, turns) for mirror in (False, True) for turns in range(4)],
}


class TiledInference(SegmentationNet):
    """A net that predicts the mean of another net's probabilities, over tiles and symmetries; its one head is their
    logarithm (the logit, of one channel), so that it takes the other's place in every job.

    Tiles overlap by a quarter and are blended by a Gaussian of sigma = tile / 8 (Isensee et al. 2021, nnU-Net), as a
    net knows least at a tile's border. They start at multiples of the net's stride: pooling sees the grid that it
    would see in the whole image.

    Args:
        net: the net.
        tile: side of the tiles, rounded up to a multiple of the net's stride; None: images are predicted whole.
        symmetries: which flips and rotations to average over.
    """

    def __init__(self, net: SegmentationNet, tile: int | None = None, symmetries: Symmetries = "none") -> None:
        super().__init__(net.in_channels, net.num_classes)
        if tile is not None and tile < 2 * net.stride:
            raise InputError(f"--tile {tile} is too small for this net: {2 * net.stride} at least, better 512")
        self.net, self.symmetries = net, SYMMETRIES[symmetries]
        self.tile = -(-tile // net.stride) * net.stride if tile is not None else sys.maxsize

    def compute(self, image: Tensor, level: int | None = None) -> Heads:
        return Heads((torch.stack([torch.cat([part for _, part in self.strips(one)], dim=1) for one in image]),))

    def strips(
        self, image: np.ndarray | Tensor, prepare: Callable[[Any], Tensor] = lambda x: x
    ) -> Iterator[tuple[int, Tensor]]:
        """Logits of an image (C, H, W) on any device, from top to bottom: the first row of a strip, and (K, h, W). Of a
        large one no more is kept than a row of tiles. `prepare` makes (N, C, h, w) of it the net's input."""
        height, width = image.shape[-2:]
        if max(height, width) <= self.tile:
            x = prepare(image[None])
            yield 0, (self.net.predict(x) if len(self.symmetries) == 1 else _log(self.probabilities(x)))[0]
            return
        tops, lefts = self.starts(height), self.starts(width)
        device = next(self.parameters()).device
        total, mass = (torch.zeros(channels, 0, width, device=device) for channels in (self.num_classes, 1))
        for top, following in zip(tops, [*tops[1:], height], strict=True):
            # What the row of tiles above has left for this one, and room below it.
            room = (0, 0, 0, min(self.tile, height - top) - total.shape[1])
            total, mass = F.pad(total, room), F.pad(mass, room)
            for left in lefts:
                part = self.probabilities(prepare(image[None, :, top : top + self.tile, left : left + self.tile]))[0]
                columns, weight = slice(left, left + part.shape[-1]), self.window(*part.shape[-2:]).to(device)
                total[..., columns] += part * weight
                mass[..., columns] += weight
            done = following - top
            yield top, _log(total[:, :done] / mass[:, :done])
            total, mass = total[:, done:], mass[:, done:]

    def probabilities(self, x: Tensor) -> Tensor:
        """Mean over the symmetries, float32: (N, C, H, W) -> (N, K, H, W), by sigmoid for one channel, else softmax."""
        total = torch.zeros(())
        for mirror, turns in self.symmetries:
            logits = self.net.predict(torch.rot90(x.flip(-1) if mirror else x, turns, (-2, -1))).float()
            found = torch.rot90(probabilities(logits), -turns, (-2, -1))
            total = total + (found.flip(-1) if mirror else found)
        return total / len(self.symmetries)

    def starts(self, length: int) -> list[int]:
        """Where tiles start along a side."""
        stride = self.net.stride
        last = max(0, -(-length // stride) * stride - self.tile)
        return [*range(0, last, max(stride, self.tile * 3 // 4 // stride * stride)), last]

    def window(self, height: int, width: int) -> Tensor:
        """Weights of a tile, (h, w): its Gaussian, cut as the tile is by the image's lower or right border."""
        bell = torch.signal.windows.gaussian(self.tile, std=self.tile / 8)
        return bell[:height, None] * bell[:width]


def _log(probability: Tensor) -> Tensor:
    """Logits that have these probabilities, (K, ...): finite, where a gate has closed a class."""
    return torch.logit(probability, eps=1e-7) if probability.shape[-3] == 1 else probability.clamp_min(1e-30).log()
