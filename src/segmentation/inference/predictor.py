"""Trained nets, ready to predict images of any size; those of an ensemble, flips and rotations are averaged."""

import itertools
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from lightning.fabric import Fabric
from lightning.fabric.utilities.exceptions import MisconfigurationException
from PIL import Image
from torch import Tensor, nn

from segmentation.checkpoint import arguments_of, load_module, read_checkpoint
from segmentation.data.io import allow_large, hide_nodata, open_image
from segmentation.errors import InputError
from segmentation.module import SegmentationModule
from segmentation.nets import Heads, SegmentationNet
from segmentation.nets.base import probabilities
from segmentation.nets.tiles import Tiles, to_logits
from segmentation.training.entry import JobParser

Symmetries = Literal["none", "flips", "all"]

#: (mirror, quarter turns): none; the four flips; the eight symmetries of the square.
SYMMETRIES = {
    "none": [(False, 0)],
    "flips": list(itertools.product((False, True), (0, 2))),
    "all": list(itertools.product((False, True), range(4))),
}


#: What the nets of an ensemble must share, by the names in `Labels`.
SHARED = ("task", "names", "values", "channels", "dtype", "scale")


def add_options(parser: JobParser) -> None:
    """The options of every job that predicts."""
    parser.add_argument(
        "--ensemble",
        action="extend",
        nargs="+",
        default=[],
        metavar="CHECKPOINT",
        help="more checkpoints: all nets' probabilities are averaged, the rest is as CHECKPOINT has it; type it last",
    )
    parser.add_argument(
        "--from-disk",
        action="store_true",
        help="of an ensemble, memory holds one net at a time: each is read anew for every image or tile",
    )
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


class MeanOverSymmetries(SegmentationNet):
    """A net that predicts by test-time augmentation: the mean of another net's probabilities over flips and rotations.
    Its one head holds their logarithm (for one channel, the logit), so that it can replace the other net in every job.

    Args:
        net: the net.
        symmetries: which flips and rotations to average over.
    """

    def __init__(self, net: SegmentationNet, symmetries: Symmetries) -> None:
        super().__init__(net.in_channels, net.num_classes)
        self.net = net
        self.symmetries = SYMMETRIES[symmetries]

    def compute(self, image: Tensor, level: int | None = None) -> Heads:
        total = torch.zeros(())
        for mirror, turns in self.symmetries:
            turned = image.flip(-1) if mirror else image
            logits = self.net.predict(turned.rot90(turns, (-2, -1)))
            found = probabilities(logits.float()).rot90(-turns, (-2, -1))
            total = total + (found.flip(-1) if mirror else found)
        return Heads((to_logits(total / len(self.symmetries)),))


class NetOnDisk(SegmentationNet):
    """A trained net whose weights are read anew for each image or tile, and let go after it: the memory of several such
    nets is that of one.

    Args:
        net: the net.
        path: its checkpoint.
    """

    def __init__(self, net: SegmentationNet, path: str | Path) -> None:
        super().__init__(net.in_channels, net.num_classes)
        self.stride = net.stride
        self.net = net
        self.path = path
        self.release()

    def compute(self, image: Tensor, level: int | None = None) -> Heads:
        saved = read_checkpoint(self.path, mapped=True)["state_dict"]
        for name, weight in self.net.named_parameters():
            weight.data = saved[f"net.{name}"].to(weight)
        logits = self.net.predict(image)
        self.release()
        return Heads((logits,))

    def release(self) -> None:
        """Free the weights."""
        for weight in self.net.parameters():
            weight.data = weight.new_empty(0)


class MeanOverNets(SegmentationNet):
    """An ensemble: the mean of several trained nets' probabilities. Its one head holds their logarithm, as above.

    It takes images that are scaled to 0..1. Each net normalises them as in its own training, and pads them itself.

    Args:
        modules: the nets with their normalisation.
    """

    means: Tensor
    stds: Tensor

    def __init__(self, modules: Sequence[SegmentationModule]) -> None:
        first = modules[0].net
        super().__init__(first.in_channels, first.num_classes)
        self.nets: Any = nn.ModuleList(module.net for module in modules)
        self.register_buffer("means", torch.stack([module.mean for module in modules]))
        self.register_buffer("stds", torch.stack([module.std for module in modules]))

    def compute(self, image: Tensor, level: int | None = None) -> Heads:
        total = torch.zeros(())
        for net, mean, std in zip(self.nets, self.means, self.stds, strict=True):
            normalized = (image - mean.view(-1, 1, 1)) / std.view(-1, 1, 1)
            logits = net.predict(normalized)
            total = total + probabilities(logits.float())
        return Heads((to_logits(total / len(self.nets)),))


def adapt(
    module: SegmentationModule,
    paths: Sequence[str | Path],
    tile: int | None,
    tta: Symmetries,
    from_disk: bool = False,
) -> None:
    """Let a module predict by tiles of a side, by test-time augmentation, and together with other nets.

    Args:
        module: a trained module.
        paths: its checkpoint; then those of the other nets of an ensemble: losses and metrics are then those of the
            mean probabilities, and tiles lie on a grid that fits all nets.
        tile: side of the tiles; None: as in training's own test.
        tta: symmetries to average over; losses and metrics likewise.
        from_disk: read each net of an ensemble anew for every image or tile.

    Raises:
        InputError: the tile is too small for the nets; or another net has other classes, channels or types of image.
    """
    first, *others = paths
    if from_disk and not others:
        raise InputError("--from-disk belongs to --ensemble: of one net it saves no memory")
    if from_disk:
        module.net = NetOnDisk(module.net, first)
    modules = [module]
    for path in others:
        other = load_module(SegmentationModule, read_checkpoint(path, mapped=True), str(path), with_loss=False)
        differ = [name for name in SHARED if getattr(other.labels, name) != getattr(module.labels, name)]
        if differ:
            raise InputError(
                f"{path}: was trained with other {' and '.join(differ)} than the first checkpoint. An ensemble takes "
                "checkpoints of one data set"
            )
        if from_disk:
            other.net = NetOnDisk(other.net, path)
        modules.append(other)
    if others and any(each.calibration for each in modules):
        raise InputError("a checkpoint of eval.py --calibrate is calibrated alone: give --ensemble the one before it")
    strides = [each.net.stride for each in modules]
    module.tiles = Tiles(math.lcm(*strides), tile)
    if others:
        module.net = MeanOverNets(modules)
        module.mean.zero_()  # the nets normalise
        module.std.fill_(1)
        module.head_weights = [1.0]
    if tta != "none":
        module.net = MeanOverSymmetries(module.net, tta)
        module.head_weights = [1.0]


class Prediction(NamedTuple):
    """What a net makes of an image.

    Attributes:
        mask: (H, W) in the data set's own values; (H, W, 3) where its masks are colours.
        probabilities: of the classes, (K, H, W) float32; of two classes (1, H, W), those of the second.
        names: of the classes.
    """

    mask: np.ndarray
    probabilities: np.ndarray
    names: list[str]


class Predictor:
    """The module of a checkpoint, or the ensemble of several, in eval mode, with its normalisation, on a device.

    `Predictor("runs/NAME/checkpoints/best.ckpt")("photo.jpg").mask` is what predict.py writes.

    Args:
        path: the checkpoint; or a list of them, whose probabilities are averaged, the rest being as the first has it.
        accelerator: as Lightning names it: auto, cpu, gpu, mps.
        precision: likewise; None: that of training. Where the device cannot, 32-true.
        tile: side of tiles; None: images of more than 2 megapixels are cut into tiles of 512.
        tta: symmetries to average over.
        from_disk: whether memory holds one net at a time of several: each is read anew for every image or tile.
    """

    def __init__(
        self,
        path: str | Path | Sequence[str | Path],
        accelerator: str = "auto",
        precision: str | None = None,
        tile: int | None = None,
        tta: Symmetries = "none",
        from_disk: bool = False,
    ) -> None:
        allow_large()
        paths = [path] if isinstance(path, str | Path) else path
        first = paths[0]
        checkpoint = read_checkpoint(first, mapped=True)
        module = load_module(SegmentationModule, checkpoint, str(first), with_loss=False)
        dataset = arguments_of(checkpoint["datamodule_hyper_parameters"]["dataset"])
        self.as_rgb = dataset.get("as_rgb") is True
        self.nodata = dataset.get("nodata")
        if not isinstance(self.nodata, int | float | None):
            raise InputError(f"{first}: its nodata is {self.nodata!r}, no number")
        self.labels = module.labels
        self.fabric = make_fabric(accelerator, precision or checkpoint["precision"])
        self.device = self.fabric.device
        adapt(module, paths, tile, tta, from_disk)
        self.module = module.to(self.device).requires_grad_(False)
        if module.channels_last:
            self.module.net.to(memory_format=torch.channels_last)

    def __call__(self, image: str | Path | Image.Image | np.ndarray) -> Prediction:
        """Predict one image.

        Args:
            image: a file, a Pillow image, or an array (H, W) or (H, W, C), of the type that the net was trained on.

        Raises:
            InputError: the file cannot be read; the image is unlike those that the net was trained on.
        """
        if isinstance(image, str):
            image = Path(image)
        logits = self.logits(self.read(image))
        mask = self.module.classify(logits).numpy()
        return Prediction(
            self.labels.decode(mask),
            probabilities(self.module.calibrated(logits)).numpy(),
            self.labels.names,
        )

    def read(self, source: Path | Image.Image | np.ndarray) -> np.ndarray:
        """Pixels (C, H, W). Raises InputError unless the image is like those that the net was trained on."""
        dtype = self.labels.dtype
        name = source if isinstance(source, Path) else "the image (H, W, C)"
        image = open_image(source, self.labels.channels, self.as_rgb)
        if dtype and image.dtype != dtype:
            raise InputError(
                f"{name}: is {image.dtype}, but the net was trained on {dtype}. Save it as {dtype}, on the scale of "
                "the training images"
            )
        return hide_nodata(image, self.nodata, name)[0]

    def logits(self, image: np.ndarray | Tensor) -> Tensor:
        """Logits (K, H, W) of an image (C, H, W), on the CPU; `module.classify` makes class indices of them."""
        return torch.cat([strip.cpu() for strip in self.strips(image)], dim=1)

    @torch.inference_mode()  # left at each yield: the caller's own code must not run in it
    def strips(self, image: np.ndarray | Tensor) -> Iterator[Tensor]:
        """Logits of an image (C, H, W) in strips (K, h, W), from top to bottom."""
        for _, (logits,) in self.module.tiles.strips(image[None], self.predict):
            yield logits[0]

    def predict(self, part: np.ndarray | Tensor) -> list[Tensor]:
        """Logits (N, K, h, w) of a part (N, C, h, w) of images as files have them; of one head alone."""
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
            return [self.module(part.to(self.device)).float()]


def make_fabric(accelerator: str, precision: Any) -> Fabric:
    """Lightning's Fabric on one device, in 32-true where that has no such precision: a CPU has no float16.

    Raises:
        InputError: there is no such accelerator here.
    """
    for choice in (precision, "32-true"):
        try:
            return Fabric(accelerator=accelerator, devices=1, precision=choice)
        except (ValueError, RuntimeError, ImportError, MisconfigurationException) as error:
            reason = str(error)
    raise InputError(f"--accelerator {accelerator}: {reason} Fix: --accelerator auto, or cpu")
