"""Large images by tiles, the same in validation, test and every job: which are cut, where tiles lie, how they blend."""

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from segmentation.errors import InputError
from segmentation.nets.base import probabilities

WHOLE = 2048 * 1024  # pixels up to which an image goes through the net in one piece, where no tile is asked for
TILE = 512  # side of the tiles of a larger image
STRIP = 64  # rows of a strip, of which logits, classes and loss are in memory at a time


class Tiles:
    """A sliding window: the mean of a net's probabilities over overlapping tiles.

    Tiles overlap by a quarter. A Gaussian of sigma = side / 8 blends them (Isensee et al. 2021, nnU-Net), as a net
    knows least at a tile's border. They start at multiples of the net's stride, so that pooling sees the same grid as
    in the whole image.

    Args:
        stride: the net's.
        side: of the tiles, rounded up to a multiple of the stride; None: 512, and images of up to 2 megapixels are not
            cut.

    Raises:
        InputError: the tile is too small for the net.
    """

    def __init__(self, stride: int, side: int | None = None) -> None:
        least = 2 * stride
        if side is not None and side < least:
            raise InputError(f"--tile {side} is too small for this net: {least} at least, better {TILE}")
        self.stride = stride
        #: Pixels of the largest image that is not cut.
        self.whole = 0
        if side is None:
            self.whole = WHOLE
            side = TILE
        self.side = math.ceil(side / stride) * stride

    def cut(self, height: int, width: int) -> bool:
        """Whether images of this size are cut."""
        return height * width > self.whole and max(height, width) > self.side

    def strips(
        self,
        images: Any,
        predict: Callable[[Any], Sequence[Tensor]],
    ) -> Iterator[tuple[slice, Any]]:
        """Logits of images in strips, from top to bottom. Memory holds one row of tiles.

        Args:
            images: (N, C, H, W), an array or a tensor of any type and on any device.
            predict: logits of a part (N, C, h, w), those of each head, say: each (N, K, h, w).

        Returns:
            Of each strip its rows, and the logits of each head, (N, K, h, W); what is blended is float32. Images that
            are not cut are one strip.
        """
        height, width = images.shape[-2:]
        if not self.cut(height, width):
            yield slice(0, height), predict(images)
            return
        tops = self.starts(height)
        bottoms = [*tops[1:], height]
        lefts = self.starts(width)
        weights_down = self.weights(height)
        weights_across = self.weights(width)
        sums = torch.zeros(0)  # of weighted probabilities, in the rows from `top` on
        for top, bottom, down in zip(tops, bottoms, weights_down, strict=True):
            rows = slice(top, top + self.side)
            for left, across in zip(lefts, weights_across, strict=True):
                columns = slice(left, left + self.side)
                heads = predict(images[..., rows, columns])
                found = probabilities(torch.stack(list(heads)).float())
                weight = torch.outer(down[rows], across[columns]).to(found.device)
                if not len(sums):
                    sums = found.new_zeros(
                        *found.shape[:-2],
                        self.side,
                        width,
                    )
                height_here = found.shape[-2]  # less in the last row
                sums[..., :height_here, columns] += found * weight
            done = bottom - top
            for first in range(0, done, STRIP):
                last = min(first + STRIP, done)
                finished = sums[..., first:last, :]
                yield slice(top + first, top + last), to_logits(finished)
            begun = sums[..., done:, :].clone()  # in place: two of these sums may not fit into memory
            sums.zero_()
            sums[..., : self.side - done, :] = begun

    def weights(self, length: int) -> Tensor:
        """How much each pixel along a side counts in each tile, (tiles, length); over the tiles that adds up to 1."""
        starts = self.starts(length)
        bell = torch.signal.windows.gaussian(
            self.side,
            std=self.side / 8,
        )
        weights = torch.zeros(len(starts), length)
        for tile, start in zip(weights, starts, strict=True):
            inside = slice(start, start + self.side)
            tile[inside] = bell[: length - start]
        return weights / weights.sum(dim=0)

    def starts(self, length: int) -> list[int]:
        """Where tiles start along a side."""
        strides = math.ceil(length / self.stride)
        last = max(0, strides * self.stride - self.side)
        step = max(1, self.side * 3 // 4 // self.stride)
        return [
            *range(0, last, step * self.stride),
            last,
        ]


def to_logits(probability: Tensor) -> Tensor:
    """Logits of probabilities (..., K, H, W): finite, also where UNet3+'s gate has closed a class."""
    if probability.shape[-3] == 1:
        return torch.logit(probability, eps=1e-7)
    return probability.clamp_min(1e-30).log_()
