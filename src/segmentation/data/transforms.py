"""What happens to a training sample before it is batched: a random crop, then torchvision's joint transforms."""

import math
from collections.abc import Iterator, Sequence
from typing import cast

import numpy as np
import torch
import torch.nn.functional as F
from scipy.ndimage import distance_transform_edt, find_objects
from torch import Tensor
from torchvision import tv_tensors
from torchvision.transforms import v2
from torchvision.transforms.v2.functional import resize_image

from segmentation.data.base import Sample
from segmentation.data.labels import IGNORE_INDEX
from segmentation.errors import InputError

#: Where torchvision has its transforms of colour: they know bytes of one or three bands, and clamp floats to 0..1.
COLOR = v2.ColorJitter.__module__


class Augment:
    """A random crop and a list of transforms, on image, mask, instance ids and weights together.

    torchvision fills what a rotation or a crop brings in with 0, for masks too, where 0 would be a class. So within the
    transforms class indices are shifted by one and 0 means ignored: any transform, with its defaults, is then right.
    Images of 16 bits are 32-bit integers there, which torchvision can turn.

    Args:
        crop: (height, width), or None for the whole image. Smaller images are padded: ignored pixels below and right.
        transforms: torchvision.transforms.v2 transforms, applied in their order. They must keep the image's dtype.
        zoom: smallest and largest enlargement of a crop: a window of crop / zoom is scaled to the crop's size.

    Raises:
        InputError: a transform whose `fill` would be a class, a zoom without a crop; or, when called, a transform that
            changes the image's dtype, or one of colour for images that it cannot take.
    """

    def __init__(
        self, crop: tuple[int, int] | None, transforms: Sequence[v2.Transform], zoom: Sequence[float] | None = None
    ) -> None:
        self.crop, self.zoom, self.transforms = crop, zoom, list(transforms)
        if zoom is not None and (crop is None or len(zoom) != 2 or not 0 < zoom[0] <= zoom[1]):
            raise InputError(f"data.zoom {list(zoom)} needs data.crop, and two factors, e.g. [0.5, 2.0]")
        for transform in _flat(self.transforms):
            fill = getattr(transform, "fill", None)
            if fill is not None and not isinstance(fill, dict) and any(torch.as_tensor(fill).flatten()):
                raise InputError(
                    f"data.augment: {type(transform).__name__} would fill masks with {fill} too. Remove fill: "
                    "what it brings in is black in the image and ignored in the mask"
                )

    def __call__(self, sample: Sample, seed: int, focus: Sequence[int] = ()) -> Sample:
        """A new sample, a function of the seed; the generator of the caller is left as it was. With `focus` the crop
        holds a pixel of these classes, where the sample has one."""
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)  # torch.manual_seed would seed the GPU's generator too
            parts = self._crop(sample, focus)
            if self.transforms:
                parts = self._transform(parts)
        mask = parts["mask"] - 1
        mask.masked_fill_(mask < 0, IGNORE_INDEX)
        return cast(Sample, parts | {"image": parts["image"].contiguous(), "mask": mask})

    def _crop(self, sample: Sample, focus: Sequence[int]) -> dict[str, Tensor]:
        """The random window, scaled to the crop's size; class indices are one higher, and 0 is ignored."""
        mask = sample["mask"]
        height, width = self.crop or mask.shape
        if self.zoom:
            low, high = map(math.log, self.zoom)
            factor = math.exp(low + (high - low) * float(torch.rand(())))
            height, width = max(1, round(height / factor)), max(1, round(width / factor))
        spots = torch.isin(mask, torch.tensor(focus)).nonzero() if focus else ()
        spot = spots[int(torch.randint(len(spots), ()))].tolist() if len(spots) else (None, None)
        top = left = 0
        if self.crop:
            top, left = _place(mask.shape[0], height, spot[0]), _place(mask.shape[1], width, spot[1])
        parts: dict[str, Tensor] = {}
        for name, value in cast(dict[str, Tensor], sample).items():
            x = value[..., top : top + height, left : left + width]
            x = (x + 1).clamp_(min=0) if name == "mask" else x
            missing = width - x.shape[-1], height - x.shape[-2]
            parts[name] = F.pad(x, (0, missing[0], 0, missing[1])) if any(missing) else x
        if self.crop and (height, width) != self.crop:
            size, exact = list(self.crop), v2.InterpolationMode.NEAREST_EXACT
            image = resize_image(parts.pop("image"), size)
            parts = {name: resize_image(x[None], size, exact)[0] for name, x in parts.items()} | {"image": image}
        return parts

    def _transform(self, parts: dict[str, Tensor]) -> dict[str, Tensor]:
        image = parts["image"]
        color = next((type(t).__name__ for t in _flat(self.transforms) if type(t).__module__ == COLOR), None)
        if color and (image.dtype != torch.uint8 or len(image) not in (1, 3)):
            raise InputError(
                f"data.augment: {color} is for 8-bit images of one or three bands, these are {image.dtype} of "
                f"{len(image)}. Use IntensityJitter, which takes any"
            )
        deep = image.dtype == torch.uint16
        inputs = {name: tv_tensors.Mask(value) for name, value in parts.items()}
        inputs["image"] = tv_tensors.Image(image.int() if deep else image)
        for transform in self.transforms:
            inputs = transform(inputs)
        outputs = {name: value.as_subclass(Tensor) for name, value in inputs.items()}
        if deep and outputs["image"].dtype == torch.int32:
            outputs["image"] = outputs["image"].clamp(0, 65535).to(torch.uint16)
        if outputs["image"].dtype != image.dtype:
            raise InputError(
                f"data.augment turns {image.dtype} images into {outputs['image'].dtype}. Remove ToDtype, "
                "Normalize and the like: scaling and normalising happen on the device"
            )
        return outputs


def _flat(transforms: Sequence[v2.Transform]) -> Iterator[v2.Transform]:
    """The transforms, and those within RandomApply, RandomChoice and the like."""
    for transform in transforms:
        yield transform
        yield from _flat(getattr(transform, "transforms", ()))


def _place(length: int, window: int, spot: int | None) -> int:
    """A random start of a window within a side; one that holds `spot`, if there is one."""
    low, high = 0, max(length - window, 0)
    if spot is not None:
        low, high = max(low, min(spot - window + 1, high)), min(high, spot)
    return low + int(torch.randint(high - low + 1, ()))


class IntensityJitter(v2.Transform):
    """Random contrast and brightness, for any number of bands and any type of image, floats included.

    Pixels are moved about the image's own mean m, by its own standard deviation s: `m + c (x - m) + b s`, with c drawn
    from 1 - contrast .. 1 + contrast and b from -brightness .. brightness, plus one more b from -bands .. bands for
    each band. Integers are rounded, and stay within their range. m and s are taken from every fourth row and column.

    Args:
        brightness: largest shift of all bands.
        contrast: largest change of contrast.
        bands: largest shift of each band by itself.
    """

    def __init__(self, brightness: float = 0.3, contrast: float = 0.3, bands: float = 0.0) -> None:
        super().__init__()
        self.brightness, self.contrast, self.bands = brightness, contrast, bands

    def forward(self, sample: dict[str, Tensor]) -> dict[str, Tensor]:
        image = sample["image"].as_subclass(Tensor)
        some = image[..., ::4, ::4].float()
        mean, std = some.mean(), some.std(correction=0)
        factor = 1 + self.contrast * (2 * torch.rand(()) - 1)
        shift = std * (self.brightness * (2 * torch.rand(()) - 1) + self.bands * (2 * torch.rand(len(image), 1, 1) - 1))
        x = image.to(torch.float32, copy=True).mul_(factor).add_(mean * (1 - factor) + shift)
        if not image.is_floating_point():
            x = x.round_().clamp_(0, 255 if image.dtype == torch.uint8 else 65535)
        return {**sample, "image": tv_tensors.Image(x.to(image.dtype))}


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

    def __init__(self, w0: float = 10.0, sigma: float = 5.0) -> None:
        super().__init__()
        self.w0, self.sigma = w0, sigma

    def forward(self, sample: dict[str, Tensor]) -> dict[str, Tensor]:
        if "instance" not in sample:
            raise InputError(
                "data.augment: BorderWeight needs instance ids: give the data set its `instances`, or remove it"
            )
        ids = np.unique(sample["instance"].numpy(), return_inverse=True)[1].reshape(sample["instance"].shape)
        ids = ids + int(sample["instance"].min() > 0)  # 0 is no object, if there is such a pixel
        first, second = (np.full(ids.shape, np.inf, np.float32) for _ in range(2))
        reach = math.ceil(5 * self.sigma)  # beyond, the exponential is under 4e-6
        for number, (rows, columns) in enumerate(find_objects(ids), start=1):
            box = tuple(slice(max(0, side.start - reach), side.stop + reach) for side in (rows, columns))
            distance = distance_transform_edt(ids[box] != number).astype(np.float32)
            second[box] = np.minimum(second[box], np.maximum(first[box], distance))
            first[box] = np.minimum(first[box], distance)
        weight = 1 + self.w0 * np.exp(-np.square(first + second) / (2 * self.sigma**2)) * (ids == 0)
        own = sample.get("weight", 1.0)
        return {**sample, "weight": tv_tensors.Mask(own * torch.from_numpy(weight.astype(np.float32)))}
