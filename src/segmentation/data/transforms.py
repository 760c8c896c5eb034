"""What happens to a training sample before it is batched: a random crop, then torchvision's joint transforms."""

import math
from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from scipy.ndimage import distance_transform_edt, find_objects
from torch import Tensor
from torchvision import tv_tensors
from torchvision.transforms import v2

from segmentation.data.base import Sample
from segmentation.data.labels import IGNORE_INDEX
from segmentation.errors import InputError


class Augment:
    """A random crop and a list of transforms, on image, mask, instance ids and weights together.

    torchvision fills what a rotation or a crop brings in with 0, for masks too, where 0 would be a class. So within the
    transforms class indices are shifted by one and 0 means ignored: any transform, with its defaults, is then right.

    Args:
        crop: (height, width), or None for the whole image. Smaller images are padded: ignored pixels below and right.
        transforms: torchvision.transforms.v2 transforms, applied in their order. They must keep the image's dtype.

    Raises:
        InputError: a transform whose `fill` would be a class; or, when called, one that changes the image's dtype.
    """

    def __init__(self, crop: tuple[int, int] | None, transforms: Sequence[v2.Transform]) -> None:
        self.crop = crop
        self.transforms = list(transforms)
        for transform in self.transforms:
            fill = getattr(transform, "fill", None)
            if fill is not None and not isinstance(fill, dict) and any(torch.as_tensor(fill).flatten()):
                raise InputError(
                    f"data.augment: {type(transform).__name__} would fill masks with {fill} too. Remove fill: "
                    "what it brings in is black in the image and ignored in the mask"
                )

    def __call__(self, sample: Sample, seed: int) -> Sample:
        """A new sample; the same for the same seed. The generator of the caller is left as it was."""
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)  # torch.manual_seed would seed the GPU's generator too
            maps = {name: value for name, value in sample.items() if name != "image"}
            maps["mask"] = torch.where(sample["mask"] == IGNORE_INDEX, 0, sample["mask"] + 1)
            image, maps = self._crop(sample["image"], maps)
            if self.transforms:
                inputs = {name: tv_tensors.Mask(value) for name, value in maps.items()}
                inputs["image"] = tv_tensors.Image(image)
                for transform in self.transforms:
                    inputs = transform(inputs)
                outputs = {name: value.as_subclass(Tensor) for name, value in inputs.items()}
                augmented = outputs.pop("image")
                if augmented.dtype != image.dtype:
                    raise InputError(
                        f"data.augment turns {image.dtype} images into {augmented.dtype}. Remove ToDtype, "
                        "Normalize and the like: scaling and normalising happen on the device"
                    )
                image, maps = augmented, outputs
            mask = torch.where(maps["mask"] == 0, IGNORE_INDEX, maps["mask"] - 1)
        return Sample(**{**maps, "image": image.contiguous(), "mask": mask})

    def _crop(self, image: Tensor, maps: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        if self.crop is None:
            return image, maps
        height, width = self.crop
        top = int(torch.randint(max(image.shape[-2] - height, 0) + 1, ()))
        left = int(torch.randint(max(image.shape[-1] - width, 0) + 1, ()))

        def cut(x: Tensor) -> Tensor:
            x = x[..., top : top + height, left : left + width]
            return F.pad(x, (0, width - x.shape[-1], 0, height - x.shape[-2]))

        return cut(image), {name: cut(value) for name, value in maps.items()}


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
