"""A loss of structure: multi-scale structural similarity."""

import torch
import torch.nn.functional as F
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from segmentation.data.labels import IGNORE_INDEX
from segmentation.errors import InputError
from segmentation.losses.base import SegmentationLoss
from segmentation.losses.region import one_hot, probabilities

#: Exponents of the five scales (Wang et al. 2003).
BETAS = (0.0448, 0.2856, 0.3001, 0.2363, 0.1333)
#: The smallest sides of 1 to 5 scales: as in torchmetrics; each scale must hold the window of 11 pixels.
SIDES = (11, 22, 44, 99, 176)
#: Of the window, in pixels.
RADIUS = 5
#: (0.01 L)^2 and (0.03 L)^2 keep a quotient finite where all is even (Wang et al. 2003); values go up to L = 1.
C1 = 0.01**2
C2 = 0.03**2


class MsSsim(SegmentationLoss):
    """1 - MS-SSIM between probabilities and truth, with the classes as the channels of an image (Wang et al. 2003; as a
    loss of segmentation: Huang et al. 2020, UNet3+). Sides under 176 pixels leave out the coarsest scales, which is
    logged.

    The similarities s of the scales enter as (1 + s) / 2: a negative one has no power, and cut off at 0 no gradient.
    Ignored pixels take the target's value. Pixel weights have no meaning here and change nothing. Classes absent from
    the batch are left out, as in overlap.py, and the others count alike.
    """

    def compute(self, logits: Tensor, mask: Tensor, weight: Tensor | None) -> Tensor:
        y = one_hot(mask, logits.shape[1], logits)
        valid = (mask != IGNORE_INDEX).unsqueeze(1)
        present = y.flatten(2).any(dim=2).any(dim=0)
        if not present.any():
            return torch.where(valid, logits, 0.0).sum() * 0
        p = torch.where(valid, probabilities(logits), y)
        return 1 - ms_ssim(p[:, present], y[:, present], self.scales(mask))

    def scales(self, mask: Tensor) -> int:
        """How many scales fit into the sides of a mask."""
        side = min(mask.shape[-2:])
        number = sum(side >= limit for limit in SIDES)
        if not number:
            raise InputError(f"MS-SSIM needs sides of {SIDES[0]} pixels or more, not {side}: choose a larger data.crop")
        if number < len(SIDES):  # Python says the same warning once
            rank_zero_warn(f"MS-SSIM: {number} of 5 scales fit into sides of {side} pixels (all five need {SIDES[-1]})")
        return number


def ms_ssim(p: Tensor, y: Tensor, scales: int) -> Tensor:
    """The mean MS-SSIM of images (N, K, H, W) between 0 and 1, of so many scales, as torchmetrics has it.

    Written out, as the Gaussian window is separable: a product with a matrix for each axis. On a CPU that takes 23 ms
    with its gradient, not the 1,167 of torchmetrics' convolution with 11x11 weights, for 8x1x128x128.
    """
    betas = torch.tensor(BETAS[:scales])
    betas = betas / betas.sum()
    total = p.new_ones(len(p))
    for scale in range(scales):
        down = gaussian(p.shape[-2], p).T
        across = gaussian(p.shape[-1], p)
        mean_p = down @ p @ across
        mean_y = down @ y @ across
        var_p = (down @ (p * p) @ across - mean_p**2).clamp(min=0)
        var_y = (down @ (y * y) @ across - mean_y**2).clamp(min=0)
        covariance = down @ (p * y) @ across - mean_p * mean_y
        similarity = (2 * covariance + C2) / (var_p + var_y + C2)
        if scale == scales - 1:
            similarity = similarity * (2 * mean_p * mean_y + C1) / (mean_p**2 + mean_y**2 + C1)
        else:
            similarity = similarity[..., RADIUS:-RADIUS, RADIUS:-RADIUS]
            p = F.avg_pool2d(p, 2)
            y = F.avg_pool2d(y, 2)
        mean_similarity = similarity.flatten(1).mean(dim=1)
        total = total * ((1 + mean_similarity) / 2) ** betas[scale].item()
    return total.mean()


def gaussian(side: int, like: Tensor) -> Tensor:
    """(side, side): a line of pixels times it is the line blurred, by sigma 1.5, and reflected at its ends."""
    taps = torch.arange(-RADIUS, RADIUS + 1, dtype=like.dtype, device=like.device)
    weights = torch.softmax(-((taps / 1.5) ** 2) / 2, dim=0)
    lines = F.pad(torch.eye(side, dtype=like.dtype, device=like.device), (RADIUS, RADIUS), mode="reflect")
    return lines.unfold(1, len(weights), 1) @ weights
