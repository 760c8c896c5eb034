"""A loss of structure: multi-scale structural similarity."""

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor
from torchmetrics.functional.image import multiscale_structural_similarity_index_measure as ms_ssim

from segmentation.data.labels import IGNORE_INDEX
from segmentation.errors import InputError
from segmentation.losses.base import SegmentationLoss
from segmentation.losses.overlap import one_hot, probabilities

#: Exponents of the five scales (Wang et al. 2003).
BETAS = (0.0448, 0.2856, 0.3001, 0.2363, 0.1333)
#: The smallest sides of 1 to 5 scales: torchmetrics' limits, and the window of 11 pixels that each scale must hold.
SIDES = (11, 22, 44, 99, 176)


class MsSsim(SegmentationLoss):
    """1 - MS-SSIM between probabilities and truth, with the classes as the channels of an image (Wang et al. 2003; as a
    loss of segmentation: Huang et al. 2020, UNet3+). Sides under 176 pixels leave out the coarsest scales, which is
    logged.

    The similarities s of the scales enter as (1 + s) / 2: a negative one has no power, and cut off at 0 no gradient.
    Ignored pixels take the target's value. Pixel weights have no meaning here and change nothing. Classes absent from
    the batch are left out, as in overlap.py, and the others count alike.
    """

    def __init__(self) -> None:
        super().__init__()
        self.said: set[int] = set()

    def compute(self, logits: Tensor, mask: Tensor, weight: Tensor | None) -> Tensor:
        y = one_hot(mask, logits.shape[1], logits)
        valid = (mask != IGNORE_INDEX).unsqueeze(1)
        present = y.flatten(2).any(dim=2).any(dim=0)
        if not present.any():
            return torch.where(valid, logits, 0.0).sum() * 0
        p = torch.where(valid, probabilities(logits), y)
        betas = torch.tensor(BETAS[: self.scales(mask)])
        exponents = tuple((betas / betas.sum()).tolist())
        return 1 - ms_ssim(p[:, present], y[:, present], data_range=1.0, betas=exponents, normalize="simple")

    def scales(self, mask: Tensor) -> int:
        """How many scales fit into the sides of a mask."""
        side = min(mask.shape[-2:])
        number = sum(side >= limit for limit in SIDES)
        if not number:
            raise InputError(f"MS-SSIM needs sides of {SIDES[0]} pixels or more, not {side}: choose a larger data.crop")
        if number < len(SIDES) and number not in self.said:
            self.said.add(number)
            rank_zero_warn(f"MS-SSIM: {number} of 5 scales fit into sides of {side} pixels (all five need {SIDES[-1]})")
        return number
