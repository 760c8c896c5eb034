"""Predict by parts: overlapping tiles, so that memory is bounded, and symmetries, so that chance averages out."""

from collections.abc import Callable, Iterator
from typing import Literal

import torch
from torch import Tensor

from segmentation.errors import InputError
from segmentation.losses.overlap import probabilities
from segmentation.nets import Heads, SegmentationNet

Symmetries = Literal["none", "flips", "all"]

#: (mirror, quarter turns): none; the four flips; the eight symmetries of the square.
SYMMETRIES: dict[str, list[tuple[bool, int]]] = {
    "none": [(False, 0)],
    "flips": [(False, 0), (True, 0), (False, 2), (True, 2)],
    "all": [(mirror, turns) for mirror in (False, True) for turns in range(4)],
}


class Averaged(SegmentationNet):
    """A net that predicts the mean of another net's probabilities, over tiles and symmetries; its one head is their
    logarithm (the logit, of one channel), so that it takes the other's place in every job.

    Tiles overlap by a quarter and are blended by a Gaussian of sigma = tile / 8 (Isensee et al. 2021, nnU-Net), as a
    net knows least at a tile's border. They start at multiples of the net's stride: pooling sees the grid that it
    would see in the whole image.

    Args:
        net: the net.
        tile: side of the tiles, rounded up to a multiple of the net's stride; None: images are predicted whole.
        symmetries: which flips and rotations to average over.
        batch_size: tiles of one forward pass.
    """

    def __init__(
        self, net: SegmentationNet, tile: int | None = None, symmetries: Symmetries = "none", batch_size: int = 1
    ) -> None:
        super().__init__(net.in_channels, net.num_classes)
        if tile is not None and tile < 2 * net.stride:
            raise InputError(f"--tile {tile} is too small for this net: {2 * net.stride} at least, better 512")
        self.net, self.symmetries, self.batch_size = net, SYMMETRIES[symmetries], batch_size
        self.tile = None if tile is None else -(-tile // net.stride) * net.stride

    def compute(self, image: Tensor, level: int | None = None) -> Heads:
        return Heads((torch.stack([torch.cat([part for _, part in self.strips(one)], dim=1) for one in image]),))

    def strips(self, image: Tensor, prepare: Callable[[Tensor], Tensor] = lambda x: x) -> Iterator[tuple[int, Tensor]]:
        """Logits of an image from top to bottom. Of a large one no more is kept than a row of tiles.

        Args:
            image: (C, H, W), on any device.
            prepare: what makes (N, C, h, w) of it the net's input.

        Yields:
            The first row of a strip, and its logits (K, h, W).
        """
        height, width = image.shape[-2:]
        if self.tile is None or max(height, width) <= self.tile:
            logits = self.net.predict(prepare(image[None]))
            yield 0, (logits if len(self.symmetries) == 1 else _log(self.probabilities(prepare(image[None]))))[0]
            return
        tops, lefts = self.starts(height), self.starts(width)
        total = mass = torch.zeros(())
        for number, top in enumerate(tops):
            rows = min(self.tile, height - top)
            if number:  # what the row of tiles above has left for this one
                kept = total[:, top - tops[number - 1] :], mass[:, top - tops[number - 1] :]
            total = mass = None
            for left, part in self.row(image, top, lefts, prepare):
                if total is None:
                    total = part.new_zeros(len(part), rows, width)
                    mass = part.new_zeros(1, rows, width)
                    if number:
                        total[:, : kept[0].shape[1]] += kept[0]
                        mass[:, : kept[1].shape[1]] += kept[1]
                weight = self.window(part.shape[-2:]).to(part)
                total[..., left : left + part.shape[-1]] += part * weight
                mass[..., left : left + part.shape[-1]] += weight
            done = (tops[number + 1] if number + 1 < len(tops) else height) - top
            yield top, _log(total[:, :done] / mass[:, :done])

    def row(
        self, image: Tensor, top: int, lefts: list[int], prepare: Callable[[Tensor], Tensor]
    ) -> Iterator[tuple[int, Tensor]]:
        """Left column and probabilities (K, h, w) of the tiles of one row. The last may be narrower than the others."""
        step = self.batch_size
        groups = [lefts[:-1][i : i + step] for i in range(0, len(lefts) - 1, step)] + [lefts[-1:]]
        for group in groups:
            tiles = [image[:, top : top + self.tile, left : left + self.tile] for left in group]
            yield from zip(group, self.probabilities(prepare(torch.stack(tiles))), strict=True)

    def probabilities(self, x: Tensor) -> Tensor:
        """Mean over the symmetries, float32: (N, C, H, W) -> (N, K, H, W), by sigmoid for one channel, else softmax."""
        total = None
        for mirror, turns in self.symmetries:
            logits = self.net.predict(torch.rot90(x.flip(-1) if mirror else x, turns, (-2, -1))).float()
            found = torch.rot90(probabilities(logits), -turns, (-2, -1))
            found = found.flip(-1) if mirror else found
            total = found if total is None else total + found
        return total / len(self.symmetries)

    def starts(self, length: int) -> list[int]:
        """Where tiles start along a side."""
        stride = self.net.stride
        last = max(0, -(-length // stride) * stride - self.tile)
        step = max(stride, self.tile * 3 // 4 // stride * stride)
        return [*range(0, last, step), last]

    def window(self, size: tuple[int, int]) -> Tensor:
        """Weights of a tile, (h, w): its Gaussian, cut as the tile is by the image's lower or right border."""
        place = torch.arange(self.tile, dtype=torch.float32) - (self.tile - 1) / 2
        bell = torch.exp(-0.5 * (place / (self.tile / 8)) ** 2)
        return bell[: size[0], None] * bell[None, : size[1]]


def _log(probability: Tensor) -> Tensor:
    """Logits that have these probabilities, (K, ...): finite, where a gate has closed a class."""
    if probability.shape[-3] == 1:
        return torch.logit(probability, eps=1e-7)
    return probability.clamp_min(1e-30).log()
