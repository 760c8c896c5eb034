"""What happens to a training sample before it is batched: a random crop, then torchvision's joint transforms."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
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
                maps = {name: outputs[name] for name in maps}
                if outputs["image"].dtype != image.dtype:
                    raise InputError(
                        f"data.augment turns {image.dtype} images into {outputs['image'].dtype}. Remove ToDtype, "
                        "Normalize and the like: scaling and normalising happen on the device"
                    )
                image = outputs["image"]
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
