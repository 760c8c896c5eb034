"""A loss of structure: multi-scale structural similarity."""

from functools import lru_cache

import numpy as np
import torch
import torch.nn.functional as F
from lightning.pytorch.utilities import rank_zero_warn
from scipy.ndimage import gaussian_filter1d
from torch import Tensor

from segmentation.data.labels import IGNORE_INDEX
from segmentation.errors import InputError
from segmentation.losses.base import SegmentationLoss
from segmentation.losses.region import one_hot
from segmentation.nets.base import probabilities

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
    """1 - MS-SSIM between probabilities and truth.

    MS-SSIM is of Wang et al. 2003, and a loss of segmentation since Huang et al. 2020 (UNet3+). The classes are the
    channels of an image. Sides under 176 pixels leave out the coarsest scales, and a warning says so.

    The similarities s of the scales enter as (1 + s) / 2: a negative one has no power, and cut off at 0 no gradient.
    Ignored pixels take the target's value. Pixel weights have no meaning here and change nothing. Classes absent from
    the batch are left out, as in region.py, and the others count alike.
    """

    def compute(self, logits: Tensor, mask: Tensor, weight: Tensor | None) -> Tensor:
        y = one_hot(mask, logits.shape[1], logits)  # (N, K, H, W)
        valid = (mask != IGNORE_INDEX).unsqueeze(1)
        present = y.amax(dim=(0, 2, 3)) > 0
        if not present.any():
            return (logits * 0).sum()
        p = torch.where(valid, probabilities(logits), y)
        p = p[:, present]
        y = y[:, present]
        return 1 - ms_ssim(p, y, self.scales(mask))

    def scales(self, mask: Tensor) -> int:
        """How many scales fit into the sides of a mask (N, H, W).

        Raises:
            InputError: none does.
        """
        side = min(mask.shape[-2:])
        scales = sum(limit <= side for limit in SIDES)
        if not scales:
            raise InputError(f"MS-SSIM needs sides of {SIDES[0]} pixels or more, not {side}: choose a larger data.crop")
        if scales < len(SIDES):  # Python says the same warning once
            rank_zero_warn(
                f"MS-SSIM: {scales} of 5 scales fit into sides of {side} pixels (all five need {SIDES[-1]})",
            )
        return scales


def ms_ssim(p: Tensor, y: Tensor, scales: int) -> Tensor:
    """The mean MS-SSIM of images, as torchmetrics has it.

    Args:
        p: (N, K, H, W), between 0 and 1.
        y: (N, K, H, W), between 0 and 1.
        scales: how many of the five scales count.

    Written out, as the Gaussian window is separable: a product with a matrix for each axis. On a CPU that takes 23 ms
    with its gradient, not the 1,167 of torchmetrics' convolution with 11x11 weights, for 8x1x128x128.
    """
    betas = BETAS[:scales]
    inside = slice(RADIUS, -RADIUS)
    total = p.new_ones(len(p))
    for scale, beta in enumerate(betas, start=1):
        structure, luminance = ssim(p, y)
        similarity = structure * luminance
        if scale < scales:
            similarity = structure[..., inside, inside]
        similarity = similarity.mean(dim=(1, 2, 3))
        similarity = (1 + similarity) / 2
        total = total * similarity ** (beta / sum(betas))
        # The next scale sees the images at half the size.
        p = F.avg_pool2d(p, kernel_size=2)
        y = F.avg_pool2d(y, kernel_size=2)
    return total.mean()


def ssim(p: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """The two factors of SSIM (Wang et al. 2004, eq. 13): contrast and structure, and luminance.

    Shape:
        (N, K, H, W) -> two of (N, K, H, W)
    """
    down = gaussian(p.shape[-2]).T.to(p)
    across = gaussian(p.shape[-1]).to(p)
    products = torch.stack(
        [
            p,
            y,
            p * p,
            y * y,
            p * y,
        ]
    )
    mean_p, mean_y, mean_pp, mean_yy, mean_py = down @ products @ across
    square_p = mean_p * mean_p
    square_y = mean_y * mean_y
    var_p = (mean_pp - square_p).clamp(min=0)
    var_y = (mean_yy - square_y).clamp(min=0)
    product = mean_p * mean_y
    covariance = mean_py - product
    structure = (2 * covariance + C2) / (var_p + var_y + C2)
    luminance = (2 * product + C1) / (square_p + square_y + C1)
    return structure, luminance


@lru_cache
def gaussian(side: int) -> Tensor:
    """The matrix (side, side) that blurs a line of pixels, reflected at its ends, by sigma 1.5."""
    lines = gaussian_filter1d(np.eye(side), sigma=1.5, mode="mirror", radius=RADIUS)
    return torch.from_numpy(lines)
