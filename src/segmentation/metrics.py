"""One confusion matrix a split, and every figure derived from its integer counts.

Because counts are integers, and losses are summed as integers, a figure is the same to the last digit however images
are batched or shared by processes.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torchmetrics.classification import MulticlassJaccardIndex

from segmentation.data.labels import IGNORE_INDEX, Labels

#: mIoU of an image is kept as an integer in this unit, so that its sum over images, too, does not depend on the order.
UNIT = 2.0**-40

#: Likewise the loss of an image times its mass, and the mass. Rounding moves the loss by less than 1e-5 / mass, and 64
#: bits hold the sum of 100,000 images whose product is LARGEST.
LOSS_UNIT = 2.0**-16
LARGEST = 2.0**30


def confusion_counts(prediction: Tensor, mask: Tensor, num_classes: int) -> Tensor:
    """Confusion matrices of the images of a batch: of two (N, H, W) of class indices, IGNORE_INDEX in the mask where
    nothing counts, (N, K, K) int64; rows true, columns predicted.

    Not by `bincount`, which asks a GPU for the smallest and the largest value first: each answer holds up the step.
    """
    images, bins = len(mask), num_classes * num_classes
    image = torch.arange(images, device=mask.device).view(-1, 1, 1)
    cell = image * bins + mask * num_classes + prediction
    cell = torch.where(mask == IGNORE_INDEX, images * bins, cell)
    one = torch.ones((), dtype=torch.int32, device=mask.device).expand(cell.numel())
    counts = torch.zeros(images * bins + 1, dtype=torch.int32, device=mask.device).scatter_add_(0, cell.flatten(), one)
    return counts[:-1].view(images, num_classes, num_classes).long()


def true_false(matrix: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """True positives, false positives and false negatives of each class: (..., K, K) -> three of (..., K)."""
    tp = matrix.diagonal(dim1=-2, dim2=-1)
    return tp, matrix.sum(dim=-2) - tp, matrix.sum(dim=-1) - tp


def mean_iou(matrix: Tensor) -> Tensor:
    """Mean of tp / (tp + fp + fn) over the classes present in target or prediction, (..., K, K) -> (...)."""
    tp, fp, fn = (_float(counts) for counts in true_false(matrix))
    return (tp / (tp + fp + fn)).nanmean(dim=-1)


def figures(matrix: Tensor, labels: Labels) -> dict[str, Tensor]:
    """Every figure of a (K, K) confusion matrix, under its logged key (without the split).

    `miou` is the mean of the classes present in target or prediction; `fwiou`, frequency-weighted, counts each class by
    its pixels in the target. A binary task has keys of a class for its foreground only; `miou` and `fwiou` are over
    both classes all the same. What cannot be said is NaN: the recall of a class without a pixel, say.
    """
    tp, fp, fn = (_float(counts) for counts in true_false(matrix))
    iou, support = tp / (tp + fp + fn), tp + fn
    found = {
        "miou": iou.nanmean(),
        "fwiou": (support * iou).nansum() / support.sum(),
        "pixel_accuracy": tp.sum() / support.sum(),
    }
    found |= _by_class("iou", iou, labels)
    found |= _by_class("dice", 2 * tp / (2 * tp + fp + fn), labels)
    found |= _by_class("precision", tp / (tp + fp), labels)
    found |= _by_class("recall", tp / support, labels)
    return found | _by_class("support", support, labels)


def boundary_counts(prediction: Tensor, mask: Tensor, num_classes: int, dilation: float) -> Tensor:
    """Boundary IoU's counts over a batch (Cheng et al. 2021): intersection and union of the two boundaries of a class.

    The boundary of a class is those of its pixels within d of one that is not, d = `dilation` (the paper's: 0.02) of
    the image's diagonal; outside the image nothing is of the class. Ignored pixels count nowhere and make no boundary.
    `prediction` and `mask` are as for `confusion_counts`; (2, K) int64 comes back.
    """
    d = max(1, round(dilation * math.hypot(*mask.shape[-2:])))
    valid = mask != IGNORE_INDEX
    counts = []
    for index in range(num_classes):
        both = torch.stack([torch.where(valid, prediction, IGNORE_INDEX) == index, mask == index], dim=1)
        # Void is a part of the class next to it, in both: where truth is unknown, there is no edge.
        other = F.pad((~(both | ~valid.unsqueeze(1))).float(), (d, d, d, d), value=1.0)
        near = F.max_pool2d(F.max_pool2d(other, (2 * d + 1, 1), stride=1), (1, 2 * d + 1), stride=1) > 0
        predicted, true = (both & near).unbind(dim=1)
        counts.append(torch.stack([(predicted & true).sum(), (predicted | true).sum()]))
    return torch.stack(counts, dim=1)


class SegmentationMetrics(MulticlassJaccardIndex):
    """torchmetrics' JaccardIndex, which is a confusion matrix, plus the mIoU of each image and the mean loss.

    Args:
        labels: the classes.
        heads: number of heads of a deeply supervised net whose mIoU to keep apart; 0 for none.
        images: number of images in the split, to keep a table of counts an image; 0 for no table.
        boundary: boundary IoU's share of the diagonal; None for no boundary IoU.
    """

    confmat: Tensor
    loss_sum: Tensor
    loss_mass: Tensor
    loss_beyond: Tensor
    image_miou: Tensor
    image_count: Tensor
    heads: Tensor
    boundary: Tensor
    table: Tensor

    def __init__(self, labels: Labels, heads: int = 0, images: int = 0, boundary: float | None = None) -> None:
        super().__init__(labels.num_classes, average="none", ignore_index=IGNORE_INDEX, validate_args=False)
        self.labels, self.boundary_dilation = labels, boundary
        k, integer = labels.num_classes, torch.int64
        states = {
            "loss_sum": torch.zeros((), dtype=integer),
            "loss_mass": torch.zeros((), dtype=integer),
            "loss_beyond": torch.zeros(()),  # what no integer holds: above LARGEST, infinite, NaN
            "image_miou": torch.zeros((), dtype=integer),
            "image_count": torch.zeros((), dtype=integer),
            "heads": torch.zeros(heads, k, k, dtype=integer),
            "boundary": torch.zeros(2, k if boundary else 0, dtype=integer),
            "table": torch.zeros(images, 3, k, dtype=integer),  # each process fills the rows of its own images
        }
        for name, zeros in states.items():
            self.add_state(name, zeros, dist_reduce_fx="sum")

    def update(  # type: ignore[override]  # torchmetrics' takes the two masks alone
        self,
        prediction: Tensor,
        mask: Tensor,
        loss: Tensor,
        mass: Tensor | None = None,
        index: Tensor | None = None,
        heads: Sequence[Tensor] = (),
    ) -> None:
        """Count a batch.

        Args:
            prediction: (N, H, W) class indices.
            mask: (N, H, W) class indices, or IGNORE_INDEX.
            loss: of the batch, or of each image, (N,), averaged over the pixels.
            mass: what each average was divided by; None for the batch's number of valid pixels.
            index: (N,) position of each image in its split, -1 for a filler; for the table.
            heads: the prediction of each head, likewise (N, H, W).
        """
        counts = confusion_counts(prediction, mask, self.num_classes)
        self.confmat += counts.sum(dim=0)
        mass = counts.sum() if mass is None else mass
        weighted = _float(loss) * mass
        within = weighted.abs() < LARGEST
        self.loss_sum += _in_units(torch.where(within, weighted, 0.0))
        self.loss_mass += _in_units(_float(mass))
        self.loss_beyond += torch.where(within, 0.0, weighted).sum()
        seen = counts.sum(dim=(1, 2)) > 0
        self.image_miou += torch.where(seen, mean_iou(counts) / UNIT, 0).round().to(torch.int64).sum()
        self.image_count += seen.sum()
        if self.boundary_dilation:
            self.boundary += boundary_counts(prediction, mask, self.num_classes, self.boundary_dilation)
        if len(self.table) and index is not None:
            self.table[index[index >= 0]] = torch.stack(true_false(counts), dim=1)[index >= 0]
        for head, predicted in zip(self.heads, heads, strict=False):
            head += confusion_counts(predicted, mask, self.num_classes).sum(dim=0)

    def compute(self) -> dict[str, Tensor]:  # type: ignore[override]  # torchmetrics' is one tensor
        """Figures of the split, float64, under their logged keys (without the split). `loss` is over all its pixels."""
        state = {
            name: torch.as_tensor(value).cpu() for name, value in self.metric_state.items()
        }  # a GPU would take longer to be asked
        matrix = state["confmat"]
        loss_sum = _float(state["loss_sum"]) * LOSS_UNIT + state["loss_beyond"]
        loss_mass = _float(state["loss_mass"]) * LOSS_UNIT
        found = {"loss": loss_sum / loss_mass, **figures(matrix, self.labels)}
        found["miou_per_image"] = _float(state["image_miou"]) * UNIT / _float(state["image_count"])
        if self.boundary_dilation:
            values = _float(state["boundary"][0]) / _float(state["boundary"][1])
            found |= {"mean_boundary_iou": values.nanmean(), **_by_class("boundary_iou", values, self.labels)}
        for number, of_head in enumerate(state["heads"], start=1):
            found[f"head{number}/miou"] = mean_iou(of_head)
        predicted, true = (int((matrix.sum(dim=dim) > 0).sum()) for dim in (0, 1))
        self.collapsed = predicted == 1 and true > 1
        return found


def table_rows(table: Tensor, names: Sequence[str], classes: Sequence[str]) -> list[dict[str, Any]]:
    """Rows of `per_image.csv` (name, class, tp, fp, fn) from the (images, 3, K) counts of a split."""
    return [
        {"name": name, "class": label, "tp": tp, "fp": fp, "fn": fn}
        for name, counts in zip(names, table.tolist(), strict=True)
        for label, tp, fp, fn in zip(classes, *counts, strict=True)
    ]


def _by_class(figure: str, values: Tensor, labels: Labels) -> dict[str, Tensor]:
    return {f"{figure}/{labels.names[index]}": values[index] for index in labels.reported}


def _float(numbers: Tensor) -> Tensor:
    """float64, but on Apple's GPU, which has none."""
    return numbers.to(torch.float32 if numbers.device.type == "mps" else torch.float64)


def _in_units(values: Tensor) -> Tensor:
    """Their sum in LOSS_UNIT, each rounded to an integer first."""
    return (values / LOSS_UNIT).round().to(torch.int64).sum()
