"""A trained net on a device, ready to predict images as files have them."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.fabric import Fabric
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor

from segmentation.checkpoint import arguments_of, load_module, read_checkpoint
from segmentation.data.io import WrongChannels, allow_large, open_image
from segmentation.errors import InputError
from segmentation.inference.tiled import Symmetries, TiledInference
from segmentation.module import SegmentationModule
from segmentation.training.entry import JobParser

WHOLE = 2048 * 2048  # pixels up to which an image is predicted in one piece, if nothing else is asked for
TILE = 512  # side of the tiles of a larger one


def add_options(parser: JobParser) -> None:
    """The options of every job that predicts."""
    averaged = "test-time augmentation: mean over the 4 flips, or all 8 symmetries"
    choices = ("none", "flips", "all")
    parser.add_argument("--tta", nargs="?", const="flips", default="none", choices=choices, help=averaged)
    parser.add_argument("--tile", type=int, metavar="SIDE", help="predict by overlapping tiles of this side")


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
        self.checkpoint = read_checkpoint(path)
        module = load_module(SegmentationModule, self.checkpoint, str(path), with_loss=False)
        self.labels = module.labels
        try:
            self.fabric = _fabric(accelerator, precision or self.checkpoint["precision"])
        except (ValueError, RuntimeError, MisconfigurationException) as error:
            raise InputError(f"--accelerator {accelerator}: {error}") from error
        self.device = self.fabric.device
        self.whole = TiledInference(module.net, None, tta)
        self.tiled = TiledInference(module.net, TILE if tile is None else tile, tta)
        self.limit = WHOLE if tile is None else 0
        self.module = module.to(self.device).requires_grad_(False)
        if module.channels_last:
            self.module.net.to(memory_format=torch.channels_last)
        dataset = self.checkpoint["datamodule_hyper_parameters"]["dataset"]
        self.as_rgb = bool(arguments_of(dataset).get("as_rgb"))

    def read(self, path: Path) -> np.ndarray:
        """Pixels (C, H, W). Raises InputError unless the image is like those that the net was trained on."""
        try:
            image = open_image(path, self.labels.channels, self.as_rgb)
        except WrongChannels as error:
            raise InputError(
                f"{path}: has {error.found} channels, but the net was trained on {self.labels.channels}. "
                "Convert it, or train with as_rgb: true, which takes gray and RGBA pictures for RGB"
            ) from error
        if self.labels.dtype and str(image.dtype) != self.labels.dtype:
            raise InputError(
                f"{path}: is {image.dtype}, but the net was trained on {self.labels.dtype}. "
                f"Save it as {self.labels.dtype}, on the scale of the training images"
            )
        return image

    def logits(self, image: np.ndarray | Tensor) -> Tensor:
        """Logits (K, H, W) of an image (C, H, W), on the CPU; `module.classify` makes class indices of them."""
        return torch.cat([strip.cpu() for _, strip in self.strips(image)], dim=1)

    def strips(self, image: np.ndarray | Tensor) -> Iterator[tuple[int, Tensor]]:
        """Logits of an image (C, H, W), from top to bottom: the first row of a strip, and (K, h, W)."""
        averaged = self.tiled if image.shape[-2] * image.shape[-1] > self.limit else self.whole
        with torch.inference_mode(), self.fabric.autocast():
            for top, logits in averaged.strips(image, self.prepare):
                yield top, logits.float()

    def prepare(self, part: np.ndarray | Tensor) -> Tensor:
        """The net's input, of a part (N, C, h, w) of images as files have them."""
        if isinstance(part, np.ndarray):
            # A copy: torch takes no array that is read-only, of another byte order, or turned by negative strides.
            part = torch.from_numpy(np.array(part, part.dtype.newbyteorder("="), order="C"))
        return self.module.normalize(part.to(self.device))


def _fabric(accelerator: str, precision: Any) -> Fabric:
    try:
        return Fabric(accelerator=accelerator, devices=1, precision=precision)
    except ValueError:  # training's float16, on a CPU
        return Fabric(accelerator=accelerator, devices=1, precision="32-true")
