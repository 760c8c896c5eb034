"""A trained net, ready to predict images of any size: tiles bound the memory, flips and rotations are averaged."""

import itertools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from lightning.fabric import Fabric
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor

from segmentation.checkpoint import arguments_of, load_module, read_checkpoint
from segmentation.data.io import WrongChannels, allow_large, hide_nodata, open_image
from segmentation.errors import InputError
from segmentation.losses.region import probabilities
from segmentation.module import SegmentationModule
from segmentation.nets import Heads, SegmentationNet
from segmentation.training.entry import JobParser

WHOLE = 2048 * 2048  # pixels up to which an image is predicted in one piece, where no tile is asked for
TILE = 512  # side of the tiles of a larger image

Symmetries = Literal["none", "flips", "all"]

#: (mirror, quarter turns): none; the four flips; the eight symmetries of the square.
SYMMETRIES = {
    "none": [(False, 0)],
    "flips": list(itertools.product((False, True), (0, 2))),
    "all": list(itertools.product((False, True), range(4))),
}


def add_options(parser: JobParser) -> None:
    """The options of every job that predicts."""
    parser.add_argument(
        "--tta",
        nargs="?",
        const="flips",
        default="none",
        choices=tuple(SYMMETRIES),
        help="test-time augmentation: mean over the 4 flips, or all 8 symmetries",
    )
    parser.add_argument(
        "--tile",
        type=int,
        metavar="SIDE",
        help="predict by overlapping tiles of this side",
    )


class TiledInference(SegmentationNet):
    """A net that predicts by sliding window and test-time augmentation: the mean of another net's probabilities over
    overlapping tiles and symmetries. Its one head holds their logarithm (for one channel, the logit), so that it can
    replace the other net in every job.

    Tiles overlap by a quarter. A Gaussian of sigma = tile / 8 blends them (Isensee et al. 2021, nnU-Net), as a net
    knows least at a tile's border. They start at multiples of the net's stride, so that pooling sees the same grid as
    in the whole image.

    Args:
        net: the net.
        tile: side of the tiles, rounded up to a multiple of the net's stride; None: 512, and images of up to 4
            megapixels are predicted whole.
        symmetries: which flips and rotations to average over.

    Raises:
        InputError: the tile is too small for the net.
    """

    def __init__(
        self,
        net: SegmentationNet,
        tile: int | None = None,
        symmetries: Symmetries = "none",
    ) -> None:
        super().__init__(net.in_channels, net.num_classes)
        if tile is not None and tile < 2 * net.stride:
            raise InputError(f"--tile {tile} is too small for this net: {2 * net.stride} at least, better {TILE}")
        self.net = net
        self.symmetries = SYMMETRIES[symmetries]
        self.whole = WHOLE if tile is None else 0
        self.tile = -(-(tile or TILE) // net.stride) * net.stride

    def compute(self, image: Tensor, level: int | None = None) -> Heads:
        logits = [torch.cat(list(self.strips(one, self.average)), dim=1) for one in image]
        return Heads((torch.stack(logits),))

    def strips(
        self,
        image: np.ndarray | Tensor,
        average: Callable[[Any], Tensor],
    ) -> Iterator[Tensor]:
        """Logits of an image (C, H, W) in strips (K, h, W), from top to bottom. Memory holds one row of tiles.

        Args:
            image: pixels, of any type and on any device.
            average: `self.average` of a part (1, C, h, w) of the image, once it is the net's input.
        """
        height, width = image.shape[-2:]
        if height * width <= self.whole or max(height, width) <= self.tile:
            yield average(image[None])[0]
            return
        device = next(self.parameters()).device
        bell = torch.signal.windows.gaussian(
            self.tile,
            std=self.tile / 8,
            device=device,
        )
        # Weighted sums of probabilities and, as the last channel, of weights.
        sums = torch.zeros(self.num_classes + 1, 0, width, device=device)
        for top, next_top in itertools.pairwise([*self.starts(height), height]):
            # Below what the row of tiles above has left, zeros for this one.
            rows = min(self.tile, height - top)
            sums = F.pad(sums, (0, 0, 0, rows - sums.shape[1]))
            for left in self.starts(width):
                right = min(width, left + self.tile)
                tile = image[None, :, top : top + rows, left:right]
                found = probabilities(average(tile)[0])
                weight = bell[:rows, None] * bell[: right - left]
                sums[:-1, :, left:right] += found * weight
                sums[-1, :, left:right] += weight
            done = next_top - top
            yield to_logits(sums[:-1, :done] / sums[-1, :done])
            sums = sums[:, done:]

    def average(self, x: Tensor) -> Tensor:
        """Logits (N, K, H, W), float32, of the net's input (N, C, H, W): of the mean over the symmetries."""
        if len(self.symmetries) == 1:
            return self.net.predict(x).float()
        total = torch.zeros(())
        for mirror, turns in self.symmetries:
            turned = x.flip(-1) if mirror else x
            logits = self.net.predict(turned.rot90(turns, (-2, -1)))
            found = probabilities(logits.float()).rot90(-turns, (-2, -1))
            total = total + (found.flip(-1) if mirror else found)
        return to_logits(total / len(self.symmetries))

    def starts(self, length: int) -> list[int]:
        """Where tiles start along a side."""
        stride = self.net.stride
        padded = -(-length // stride) * stride
        last = max(0, padded - self.tile)
        step = max(stride, self.tile * 3 // 4 // stride * stride)
        return [
            *range(0, last, step),
            last,
        ]


def to_logits(probability: Tensor) -> Tensor:
    """Logits of probabilities (..., K, H, W): finite, also where UNet3+'s gate has closed a class."""
    if probability.shape[-3] == 1:
        return torch.logit(probability, eps=1e-7)
    return probability.clamp_min(1e-30).log()


class Predictor:
    """The module of a checkpoint, in eval mode, with its normalisation, on a device.

    Args:
        path: the checkpoint.
        accelerator: as Lightning names it: auto, cpu, gpu, mps.
        precision: likewise; None: that of training. Where the device cannot, 32-true.
        tile: side of tiles; None: images of more than 4 megapixels are cut into tiles of 512.
        tta: symmetries to average over.
    """

    def __init__(
        self,
        path: str | Path,
        accelerator: str = "auto",
        precision: str | None = None,
        tile: int | None = None,
        tta: Symmetries = "none",
    ) -> None:
        allow_large()
        checkpoint = read_checkpoint(path)
        module = load_module(SegmentationModule, checkpoint, str(path), with_loss=False)
        dataset = checkpoint["datamodule_hyper_parameters"]["dataset"]
        self.as_rgb = arguments_of(dataset).get("as_rgb", False)
        self.nodata = arguments_of(dataset).get("nodata")
        self.labels = module.labels
        self.fabric = make_fabric(accelerator, precision or checkpoint["precision"])
        self.device = self.fabric.device
        self.net = TiledInference(module.net, tile, tta)
        self.module = module.to(self.device).requires_grad_(False)
        if module.channels_last:
            self.module.net.to(memory_format=torch.channels_last)

    def read(self, path: Path) -> np.ndarray:
        """Pixels (C, H, W). Raises InputError unless the image is like those that the net was trained on."""
        channels = self.labels.channels
        dtype = self.labels.dtype
        try:
            image = open_image(path, channels, self.as_rgb)
        except WrongChannels as error:
            raise InputError(
                f"{path}: has {error.found} channels, but the net was trained on {channels}. Convert it, or train with "
                "as_rgb: true, which takes gray and RGBA images for RGB"
            ) from error
        if dtype and image.dtype != dtype:
            raise InputError(
                f"{path}: is {image.dtype}, but the net was trained on {dtype}. Save it as {dtype}, on the scale of "
                "the training images"
            )
        return hide_nodata(image, self.nodata, path)[0]

    def logits(self, image: np.ndarray | Tensor) -> Tensor:
        """Logits (K, H, W) of an image (C, H, W), on the CPU; `module.classify` makes class indices of them."""
        return torch.cat([strip.cpu() for strip in self.strips(image)], dim=1)

    @torch.inference_mode()  # left at each yield: the caller's own code must not run in it
    def strips(self, image: np.ndarray | Tensor) -> Iterator[Tensor]:
        """Logits of an image (C, H, W) in strips (K, h, W), from top to bottom."""
        yield from self.net.strips(image, self.average)

    def average(self, part: np.ndarray | Tensor) -> Tensor:
        """Logits (N, K, h, w) of a part (N, C, h, w) of an image as its file has it."""
        if isinstance(part, np.ndarray):
            # A copy: torch takes no array that is read-only, of another byte order, or with negative strides.
            part = torch.from_numpy(
                np.array(
                    part,
                    part.dtype.newbyteorder("="),
                    order="C",
                )
            )
        with self.fabric.autocast():
            return self.net.average(self.module.normalize(part.to(self.device)))


def make_fabric(accelerator: str, precision: Any) -> Fabric:
    """Lightning's Fabric on one device, in 32-true where that has no such precision: a CPU has no float16.

    Raises:
        InputError: there is no such accelerator here.
    """
    for choice in (precision, "32-true"):
        try:
            return Fabric(accelerator=accelerator, devices=1, precision=choice)
        except (ValueError, RuntimeError, MisconfigurationException) as error:
            reason = str(error)
    raise InputError(f"--accelerator {accelerator}: {reason}")
