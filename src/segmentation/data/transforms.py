"""Augmentation of a training sample: a random crop, then transforms of torchvision.transforms.v2 or of our own."""

import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from scipy.ndimage import distance_transform_edt, find_objects
from skimage.segmentation import relabel_sequential
from torch import Tensor
from torchvision import tv_tensors
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as F

from segmentation.data.labels import IGNORE_INDEX
from segmentation.errors import InputError, one_line

#: A sample: image, mask, and the instance ids and weights that there are.
Tensors = dict[str, Tensor]

#: Where torchvision has its transforms of colour: they know bytes of one or three channels, and clamp floats to 0..1.
COLOR = v2.ColorJitter.__module__

#: Said where a transform cannot take an image with its mask.
FOR_MASKS = (
    "With masks go flips, crops, Pad, Resize, ScaleJitter, RandomRotation, RandomAffine, RandomPerspective, "
    "ElasticTransform, RandomZoomOut; and, for the image alone, ColorJitter, GaussianBlur, RandomErasing, "
    "IntensityJitter and the like"
)

#: What interpolation may add or take where all is picture: less than a third of a gray level.
ROUNDING = 1e-3


class Coverage(tv_tensors.TVTensor):
    """How much of each pixel is picture, and not what a transform filled in: (1, H, W), 1 where all of it is.

    Transforms move and blur it as they do the image, with the image's interpolation, and fill it with 0. Those of
    colour leave it as it is.
    """


def _change(
    function: Callable[..., Tensor],
    coverage: Coverage,
    *args,
    fill=None,
    **options,
) -> Coverage:
    """Do to coverage what a function of torchvision does to images; but fill with 0, whatever the image's `fill` is."""
    changed = function(coverage.as_subclass(Tensor), *args, **options)
    return changed.as_subclass(Coverage)


#: Functions of torchvision.transforms.v2.functional that move pixels, or mix them.
MIX = (
    "affine",
    "center_crop",
    "crop",
    "elastic",
    "gaussian_blur",
    "horizontal_flip",
    "pad",
    "perspective",
    "resize",
    "resized_crop",
    "rotate",
    "vertical_flip",
)
for name in MIX:
    F.register_kernel(name, Coverage)(partial(_change, getattr(F, f"{name}_image")))


class Augment:
    """A random crop and a list of transforms, on image, mask, instance ids and weights together.

    Pixels that a transform fills in are ignored, and those that interpolation mixes with them: a map of `Coverage` goes
    the image's way. A transform of yours that moves pixels by other means than torchvision's must set the mask to
    IGNORE_INDEX where it fills in. Images of 16 bits are 32-bit integers there, which torchvision can turn.

    Args:
        crop: (height, width), or None for the whole image. Smaller images are padded: ignored pixels below and right.
        transforms: torchvision.transforms.v2 transforms, applied in their order. They must keep the image's dtype.
        zoom: smallest and largest enlargement of a crop: a window of crop / zoom is scaled to the crop's size.

    Raises:
        InputError: a zoom without a crop; or, when called, a transform that cannot take these images or their masks, or
            changes the image's dtype or channels.
    """

    def __init__(
        self,
        crop: tuple[int, ...] | None,
        transforms: Sequence[v2.Transform],
        zoom: Sequence[float] | None = None,
    ) -> None:
        self.crop = crop
        self.transforms = list(transforms)
        self.zoom = zoom
        if zoom and not (crop and len(zoom) == 2 and 0 < zoom[0] <= zoom[1]):
            raise InputError(f"data.zoom {zoom} needs data.crop, and two factors, e.g. [0.5, 2.0]")

    def __call__(
        self,
        sample: Any,
        seed: int,
        focus: Sequence[int] = (),
    ) -> Any:
        """Augment a sample. The generator of the caller is left as it was.

        Args:
            sample: image (C, H, W), mask (H, W), and the instance ids and weights that there are, (H, W).
            seed: decides all that is random.
            focus: classes of which the crop holds a pixel, where the sample has one.

        Returns:
            a new sample, in which the mask is IGNORE_INDEX where a crop or a transform left the image.
        """
        sample = {**sample, "coverage": torch.ones(1, *sample["mask"].shape)}
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)  # torch.manual_seed would seed the GPU's generator too
            if self.crop:
                sample = self._random_crop(sample, self.crop, focus)
            if self.transforms:
                sample = self._transform(sample)
        coverage = sample.pop("coverage")[0]
        is_picture = (coverage - 1).abs() < ROUNDING
        sample["mask"] = sample["mask"].where(is_picture, IGNORE_INDEX)
        sample["image"] = sample["image"].contiguous()
        return sample

    def _random_crop(
        self,
        sample: Tensors,
        size: tuple[int, ...],
        focus: Sequence[int],
    ) -> Tensors:
        """Cut a random window out of image and maps, and scale it to `size`."""
        height, width = size
        if self.zoom:
            smallest, largest = self.zoom
            factor = smallest * (largest / smallest) ** torch.rand(()).item()
            height = max(1, round(height / factor))
            width = max(1, round(width / factor))
        mask = sample["mask"]
        held = None
        if focus:
            pixels = torch.isin(mask, torch.tensor(focus)).nonzero()
            if len(pixels):
                held = pixels[torch.randint(len(pixels), ())].tolist()
        starts = []
        for axis, window in enumerate((height, width)):
            first = 0
            last = max(mask.shape[axis] - window, 0)
            if held:  # a window that begins at first..last holds this pixel
                first = min(max(held[axis] - window + 1, 0), last)
                last = min(held[axis], last)
            starts.append(int(torch.randint(first, last + 1, ())))
        cropped = {}
        for name, value in sample.items():
            smooth = name in ("image", "coverage")
            window = F.resized_crop(
                value.view(-1, *mask.shape),
                *starts,
                height=height,
                width=width,
                size=list(size),
                interpolation=v2.InterpolationMode.BILINEAR if smooth else v2.InterpolationMode.NEAREST_EXACT,
            )
            cropped[name] = window.view(*value.shape[:-2], *size)
        return cropped

    def _transform(self, sample: Tensors) -> Tensors:
        """Apply the transforms to the image, and to the maps as masks."""
        image = sample["image"]
        dtype = image.dtype
        takes_color = dtype == torch.uint8 and len(image) in (1, 3)
        for transform in _nested(self):
            kind = type(transform)
            clips = getattr(transform, "clip", False)  # GaussianNoise
            if not takes_color and (kind.__module__ == COLOR or kind is v2.JPEG or clips):
                raise InputError(
                    f"data.augment: {kind.__name__} is for 8-bit images of one or three channels. Use "
                    "IntensityJitter, which takes any"
                )
        inputs = {name: tv_tensors.Mask(value) for name, value in sample.items()}
        inputs["image"] = tv_tensors.Image(image.int() if dtype == torch.uint16 else image)
        inputs["coverage"] = Coverage(sample["coverage"])
        try:
            for transform in self.transforms:
                inputs = transform(inputs)
            outputs = {name: value.as_subclass(Tensor) for name, value in inputs.items()}
        except (AttributeError, RuntimeError, TypeError, ValueError) as error:
            raise InputError(
                f"data.augment cannot take a {dtype} image of {tuple(image.shape)}: {one_line(error).rstrip('.')}. "
                f"{FOR_MASKS}"
            ) from error
        changed = outputs["image"]
        if dtype == torch.uint16 and changed.dtype == torch.int32:
            changed = changed.clamp(0, 65535).to(dtype)
        if changed.dtype != dtype or len(changed) != len(image):
            raise InputError(
                f"data.augment turns {dtype} images into {changed.dtype}, {len(image)} channels into {len(changed)}. "
                "Remove ToDtype, Normalize, Grayscale and the like: scaling and normalising happen on the device"
            )
        return {**outputs, "image": changed}


def _nested(parent: Any) -> Iterator[v2.Transform]:
    """All transforms of a list.

    Yields:
        each, and those within RandomApply, RandomChoice and the like.
    """
    for transform in getattr(parent, "transforms", ()):
        yield transform
        yield from _nested(transform)


class IntensityJitter(v2.Transform):
    """Random contrast and brightness, for any number of channels and any type of image, floats included.

    Pixels are moved about the image's own mean m, by its own standard deviation s: `m + c (x - m) + b s`, with c drawn
    from 1 - contrast .. 1 + contrast and b from -brightness .. brightness, plus one more b from -bands .. bands for
    each channel. Integers are rounded, and stay within their range. m and s are of every fourth row and column.

    Args:
        brightness: largest shift of all channels.
        contrast: largest change of contrast.
        bands: largest shift of each channel by itself.
    """

    def __init__(
        self,
        brightness: float = 0.3,
        contrast: float = 0.3,
        bands: float = 0.0,
    ) -> None:
        super().__init__()
        self.brightness = brightness
        self.contrast = contrast
        self.bands = bands

    def forward(self, sample: Tensors) -> Tensors:
        image = sample["image"].as_subclass(Tensor)
        some = image[..., ::4, ::4].float()
        mean = some.mean()
        std = some.std(correction=0)
        c = 1 + self.contrast * _symmetric(())
        b = self.brightness * _symmetric(()) + self.bands * _symmetric((len(image), 1, 1))
        x = image * c + (mean * (1 - c) + std * b)
        if not image.is_floating_point():
            x = x.round().clamp(0, 255 if image.dtype == torch.uint8 else 65535)  # 16 bits are int32 here
        return {**sample, "image": tv_tensors.Image(x.to(image.dtype))}


def _symmetric(shape: tuple[int, ...]) -> Tensor:
    """Random numbers from -1 to 1."""
    return 2 * torch.rand(shape) - 1


class BorderWeight(v2.Transform):
    """Makes `batch["weight"]` by equation 2 of Ronneberger et al. 2015, so that a net learns the gaps between objects
    that touch: `1 + w0 exp(-(d1 + d2)^2 / (2 sigma^2))` on pixels of no object, d1 and d2 their distances to the
    nearest and the second nearest one; 1 on objects. (The paper's w_c balances classes: the loss's `class_weights`.)

    Put it last in `data.augment`, for distances as they are trained on. It needs instance ids: `FolderData`'s
    `instances`, or `ShapesData`. A weight that the data set has is multiplied. Validation is not weighted.

    Args:
        w0: the largest weight, where two objects touch a gap of no width, less 1.
        sigma: pixels.

    Raises:
        InputError: when called, for a sample without instance ids.
    """

    def __init__(
        self,
        w0: float = 10.0,
        sigma: float = 5.0,
    ) -> None:
        super().__init__()
        self.w0 = w0
        self.sigma = sigma

    def forward(self, sample: Tensors) -> Tensors:
        if "instance" not in sample:
            raise InputError("data.augment: BorderWeight needs the data set's `instances`. Give them, or remove it")
        ids, _, _ = relabel_sequential(sample["instance"].numpy())
        distances = np.full((2, *ids.shape), np.inf, np.float32)  # to the nearest object and to the second nearest
        reach = math.ceil(5 * self.sigma)  # beyond, the exponential is under 4e-6
        for number, (rows, columns) in enumerate(find_objects(ids), start=1):
            top = max(0, rows.start - reach)
            left = max(0, columns.start - reach)
            box = np.s_[top : rows.stop + reach, left : columns.stop + reach]
            distance = distance_transform_edt(ids[box] != number)
            distances[:, *box] = np.sort([*distances[:, *box], distance], axis=0)[:2]
        both = distances.sum(axis=0)
        border = self.w0 * np.exp(-(both**2) / (2 * self.sigma**2))
        weight = 1 + border * (ids == 0)
        weight = torch.from_numpy(weight.astype(np.float32)) * sample.get("weight", 1.0)
        return {**sample, "weight": tv_tensors.Mask(weight)}
