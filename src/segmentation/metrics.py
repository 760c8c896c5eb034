"""Metrics of a split: IoU and its relatives, mean loss, boundary IoU, surface distances.

All states are integer counts. A metric is therefore the same to the last digit for any batch size and any number of
processes.
"""

import math
from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from lightning.fabric.utilities import move_data_to_device
from scipy.ndimage import binary_erosion, distance_transform_edt, find_objects
from torch import Tensor
from torchmetrics import Metric, MetricCollection

from segmentation.data.labels import IGNORE_INDEX, Labels

#: Fixed-point step: IoUs are summed as int64 multiples of it, so that the order of summation does not matter.
UNIT = 2.0**-40

#: The same for loss * weight_sum, for weight_sum, and for distances in pixels. An int64 holds the sum of 100,000
#: products of size LARGEST.
LOSS_UNIT = 2.0**-16
LARGEST = 2.0**30


class SegmentationMetrics(MetricCollection):
    """All metrics of a split, under their logged keys.

    To add a torchmetrics metric, add an entry to `metrics`; it is logged as `train/`, `val/` and `test/KEY`:
    `"kappa": MulticlassCohenKappa(labels.num_classes, ignore_index=IGNORE_INDEX)`.

    It must return a scalar, or a dict of scalars, and have `full_state_update = False`, so that a run can be resumed.
    `preds` and `target`, (N, H, W), are class indices, not probabilities. Pass `update` keyword arguments only: each
    metric takes those that it names.

    Args:
        labels: the classes.
        heads: number of heads of a deeply supervised net, to compute the mIoU of each; 0 for none.
        images: number of images in the split, to keep counts of each image; 0 for none.
        boundary: dilation of boundary IoU, as a share of the image's diagonal; None for no boundary IoU.
        surface: whether to measure surface distances.
    """

    def __init__(
        self,
        labels: Labels,
        heads: int = 0,
        images: int = 0,
        boundary: float | None = None,
        surface: bool = False,
    ) -> None:
        metrics: dict[str, Metric | MetricCollection] = {
            "classes": ClassMetrics(labels, heads, images),
            "loss": MeanLoss(),
        }
        if boundary:
            metrics["boundary"] = BoundaryIoU(labels, boundary)
        if surface:
            metrics["surface"] = SurfaceDistances(labels)
        super().__init__(metrics, compute_groups=False)

    @torch.inference_mode(False)
    @torch.no_grad()
    def state(self) -> dict:
        """Counts of each metric, summed over all processes, on the CPU: for a checkpoint."""
        counts = {}
        for name, metric in self.items():
            with metric.sync_context():
                counts[name] = move_data_to_device(metric.metric_state, "cpu")
        return counts

    def load(self, state: dict) -> None:
        """Add the counts of `state()`. With many processes, call it on one of them."""
        for name, metric in self.items():
            metric.merge_state(move_data_to_device(state[name], metric.device))


class CountMetric(Metric):
    """A metric whose states are summed over batches and processes."""

    full_state_update = False

    def add_count(self, name: str, *shape: int, dtype: torch.dtype = torch.int64) -> None:
        self.add_state(name, torch.zeros(shape, dtype=dtype), dist_reduce_fx="sum")


class ClassMetrics(CountMetric):
    """IoU, Dice, precision and recall of each class and their means, from one confusion matrix; mIoU of each head.

    torchmetrics' MulticlassJaccardIndex has the same matrix, but reports an absent class as 0, in float32, and in
    deterministic mode allocates pixels x K^2. This class also counts each image by itself.

    Args:
        labels: the classes.
        heads: number of heads of a deeply supervised net; 0 for none.
        images: number of images in the split, to keep counts of each image in `table`; 0 for none.

    Attributes:
        collapsed: whether the last `compute` found a single predicted class but several target classes.
    """

    confmat: Tensor
    head_confmat: Tensor
    image_miou: Tensor
    image_count: Tensor
    table: Tensor

    def __init__(self, labels: Labels, heads: int = 0, images: int = 0) -> None:
        super().__init__()
        self.labels = labels
        self.collapsed = False
        classes = labels.num_classes
        self.add_count("confmat", classes, classes)
        self.add_count("head_confmat", heads, classes, classes)
        self.add_count("image_miou")
        self.add_count("image_count")
        self.add_count("table", images, 3, classes)

    def update(
        self,
        preds: Tensor,
        target: Tensor,
        index: Tensor,
        heads: Sequence[Tensor] = (),
    ) -> None:
        """Count a batch.

        Args:
            preds: (N, H, W) class indices.
            target: (N, H, W) class indices, or IGNORE_INDEX.
            index: (N,) position of each image in its split, -1 for padding of the batch; for `table`.
            heads: (N, H, W) class indices of each head.
        """
        counts = confusion_counts(preds, target, self.labels.num_classes)
        self.confmat += counts.sum(dim=0)
        miou = mean_iou(counts)  # NaN where every pixel is ignored
        self.image_miou += (miou.nan_to_num() / UNIT).round().long().sum()
        self.image_count += miou.isfinite().sum()
        if len(self.table):
            kept = index >= 0
            rows = torch.stack(tp_fp_fn(counts), dim=1)
            self.table[index[kept]] = rows[kept]
        for number, head in enumerate(heads):
            self.head_confmat[number] += confusion_counts(head, target, self.labels.num_classes).sum(dim=0)

    def compute(self) -> dict[str, Tensor]:
        matrix = self.confmat.cpu()
        predicted = matrix.sum(dim=0).count_nonzero()
        present = matrix.sum(dim=1).count_nonzero()
        self.collapsed = bool(predicted == 1 and present > 1)

        found = class_metrics(matrix, self.labels)
        miou_sum = _float(self.image_miou.cpu()) * UNIT
        found["miou_per_image"] = miou_sum / self.image_count.cpu()
        for number, head in enumerate(self.head_confmat.cpu(), start=1):
            found[f"head{number}/miou"] = mean_iou(head)
        return found


class MeanLoss(CountMetric):
    """Mean loss over all pixels of a split."""

    loss_sum: Tensor
    weight_sum: Tensor
    unbounded: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.add_count("loss_sum")
        self.add_count("weight_sum")
        # Sum of what no integer holds: above LARGEST, infinite, NaN.
        self.add_count("unbounded", dtype=torch.float32)

    def update(self, loss: Tensor, weight_sum: Tensor) -> None:
        """Add a batch.

        Args:
            loss: mean loss of the batch, or of each image (N,).
            weight_sum: sum of the pixels' weights in each mean.
        """
        product = _float(loss) * weight_sum
        bounded = torch.where(product.abs() < LARGEST, product, 0.0)
        self.loss_sum += _in_loss_units(bounded)
        self.weight_sum += _in_loss_units(_float(weight_sum))
        self.unbounded += (product - bounded).sum()

    def compute(self) -> Tensor:
        loss_sum = _float(self.loss_sum.cpu()) * LOSS_UNIT
        weight_sum = _float(self.weight_sum.cpu()) * LOSS_UNIT
        return (loss_sum + self.unbounded.cpu()) / weight_sum


class BoundaryIoU(CountMetric):
    """Boundary IoU of each class and their mean (Cheng et al. 2021, https://arxiv.org/abs/2103.16562).

    The boundary of a class is its pixels within distance d of a pixel of another class, or of the image border.
    Boundary IoU is the IoU of the predicted and the true boundary. Ignored pixels neither count nor form a boundary.

    Args:
        labels: the classes.
        dilation: d as a share of the image's diagonal.
    """

    intersection: Tensor
    union: Tensor

    def __init__(self, labels: Labels, dilation: float = 0.02) -> None:
        super().__init__()
        self.labels = labels
        self.dilation = dilation
        self.add_count("intersection", labels.num_classes)
        self.add_count("union", labels.num_classes)

    def update(self, preds: Tensor, target: Tensor) -> None:
        """Count a batch.

        Args:
            preds: (N, H, W) class indices.
            target: (N, H, W) class indices, or IGNORE_INDEX.
        """
        d = max(1, round(self.dilation * math.hypot(*target.shape[-2:])))
        ignored = target == IGNORE_INDEX
        for index in range(self.labels.num_classes):
            predicted = _boundary(preds == index, ignored, d)
            true = _boundary(target == index, ignored, d)
            self.intersection[index] += (predicted & true).sum()
            self.union[index] += (predicted | true).sum()

    def compute(self) -> dict[str, Tensor]:
        iou = _float(self.intersection.cpu()) / self.union.cpu()
        return {
            "mean_boundary_iou": iou.nanmean(),
            **_by_class("boundary_iou", iou, self.labels),
        }


class SurfaceDistances(CountMetric):
    """HD95 and average symmetric surface distance (ASSD) of each class, in pixels, and their means over the classes.

    Each is a mean over the images in which the prediction or the truth has the class. Where one of them lacks it, both
    distances are the image's diagonal, the worst that is possible: Metrics Reloaded (Maier-Hein et al. 2024,
    https://doi.org/10.1038/s41592-023-02151-z) wants the worst value there, as leaving out such images would reward a
    net that finds only what is easy. A class ends at ignored pixels, in the prediction as in the truth.

    Args:
        labels: the classes.
    """

    distances: Tensor
    images: Tensor

    def __init__(self, labels: Labels) -> None:
        super().__init__()
        self.labels = labels
        self.add_count("distances", 2, labels.num_classes)
        self.add_count("images", labels.num_classes)

    def update(self, preds: Tensor, target: Tensor) -> None:
        """Count a batch.

        Args:
            preds: (N, H, W) class indices.
            target: (N, H, W) class indices, or IGNORE_INDEX.
        """
        preds = preds.where(target != IGNORE_INDEX, IGNORE_INDEX)
        for predicted, true in zip(preds.cpu().numpy(), target.cpu().numpy(), strict=True):
            for index in self.labels.reported:
                found = predicted == index
                wanted = true == index
                if found.any() or wanted.any():
                    for row, distance in enumerate(surface_distances(found, wanted)):
                        self.distances[row, index] += round(distance / LOSS_UNIT)
                    self.images[index] += 1

    def compute(self) -> dict[str, Tensor]:
        hd95, assd = _float(self.distances.cpu()) * LOSS_UNIT / self.images.cpu()
        return {
            "mean_hd95": hd95.nanmean(),
            "mean_assd": assd.nanmean(),
            **_by_class("hd95", hd95, self.labels),
            **_by_class("assd", assd, self.labels),
        }


def surface_distances(one: np.ndarray, other: np.ndarray) -> tuple[float, float]:
    """HD95 and ASSD of two masks, in pixels, as Metrics Reloaded and MONAI define them.

    A surface is the pixels beside (left, right, above, below) one outside the mask or the image. d is the distance of a
    surface pixel to the nearest one of the other surface. HD95 is the larger of the two 95th percentiles of d, ASSD the
    mean of d over the pixels of both surfaces.

    Args:
        one: (H, W) bool, True inside.
        other: likewise.
    """
    if not one.any() or not other.any():
        diagonal = math.hypot(*one.shape)
        return diagonal, diagonal
    (box,) = find_objects((one | other).astype(np.uint8))  # the rest of the image only costs time
    one_surface = one[box] & ~binary_erosion(one[box])
    other_surface = other[box] & ~binary_erosion(other[box])
    there = distance_transform_edt(~other_surface)[one_surface]
    back = distance_transform_edt(~one_surface)[other_surface]
    hd95 = max(np.percentile(there, 95), np.percentile(back, 95))
    assd = np.concatenate([there, back]).mean()
    return float(hd95), float(assd)


def confusion_counts(preds: Tensor, target: Tensor, num_classes: int) -> Tensor:
    """Confusion matrix of each image of a batch.

    Args:
        preds: (N, H, W) class indices.
        target: (N, H, W) class indices; pixels of IGNORE_INDEX do not count.
        num_classes: number of classes K.

    Returns:
        (N, K, K) int64, rows true, columns predicted.
    """
    cells = num_classes * num_classes
    cell = target * num_classes + preds
    cell = torch.where(target == IGNORE_INDEX, cells, cell).flatten(start_dim=1)
    # Not bincount: on a GPU it waits for the smallest and the largest value.
    counts = cell.new_zeros(len(cell), cells + 1)
    counts.scatter_add_(1, cell, cell.new_ones(1).expand_as(cell))
    return counts[:, :cells].view(-1, num_classes, num_classes)


def tp_fp_fn(matrix: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """True positives, false positives and false negatives of each class.

    Shape:
        (..., K, K) -> three of (..., K)
    """
    tp = matrix.diagonal(dim1=-2, dim2=-1)
    fp = matrix.sum(dim=-2) - tp
    fn = matrix.sum(dim=-1) - tp
    return tp, fp, fn


def mean_iou(matrix: Tensor) -> Tensor:
    """Mean IoU over the classes present in target or prediction.

    Shape:
        (..., K, K) -> (...)
    """
    tp, fp, fn = tp_fp_fn(matrix)
    return (_float(tp) / (tp + fp + fn)).nanmean(dim=-1)


def class_metrics(matrix: Tensor, labels: Labels) -> dict[str, Tensor]:
    """Metrics of a confusion matrix (K, K), in float64, by logged key (without the split).

    `miou` is the mean over the classes present in target or prediction, `fwiou` weighs each class by its pixels in the
    target. A binary task has keys of a class for its foreground only; `miou` and `fwiou` are over both classes. A
    metric without a pixel to compute it from is NaN.
    """
    scores = class_scores(matrix)
    iou = scores["iou"]
    support = scores["support"]
    found = {
        "miou": iou.nanmean(),
        "fwiou": (support * iou).nansum() / support.sum(),
        "pixel_accuracy": _float(matrix).trace() / support.sum(),
    }
    for metric, values in scores.items():
        found |= _by_class(metric, values, labels)
    return found


def class_scores(matrix: Tensor) -> dict[str, Tensor]:
    """IoU, Dice, precision, recall and support of each class, in float64, NaN without a pixel to compute it from.

    Shape:
        (K, K) -> (K,) each
    """
    tp, fp, fn = tp_fp_fn(_float(matrix))
    support = tp + fn
    return {
        "iou": tp / (support + fp),
        "dice": 2 * tp / (2 * tp + fp + fn),
        "precision": tp / (tp + fp),
        "recall": tp / support,
        "support": support,
    }


def table_rows(
    table: Tensor,
    names: Sequence[str],
    classes: Sequence[str],
) -> list[dict]:
    """Rows of `per_image.csv` (name, class, tp, fp, fn) from the counts (images, 3, K) of a split."""
    rows = []
    for name, counts in zip(names, table.tolist(), strict=True):
        for label, tp, fp, fn in zip(classes, *counts, strict=True):
            rows.append({"name": name, "class": label, "tp": tp, "fp": fp, "fn": fn})
    return rows


def _boundary(inside: Tensor, ignored: Tensor, d: int) -> Tensor:
    """Valid pixels inside (N, H, W) within distance d of a valid one outside."""
    outside = ~(inside | ignored)
    outside = F.pad(outside.float(), (d, d, d, d), value=1.0)
    side = 2 * d + 1
    near = F.max_pool2d(outside, (side, 1), stride=1)
    near = F.max_pool2d(near, (1, side), stride=1)
    return inside & (near > 0) & ~ignored


def _by_class(metric: str, values: Tensor, labels: Labels) -> dict[str, Tensor]:
    return {f"{metric}/{labels.names[index]}": values[index] for index in labels.reported}


def _float(numbers: Tensor) -> Tensor:
    """float64, except on Apple's GPU, which has none."""
    if numbers.device.type == "mps":
        return numbers.float()
    return numbers.double()


def _in_loss_units(values: Tensor) -> Tensor:
    """Their sum as an integer, in LOSS_UNIT."""
    return (values / LOSS_UNIT).round().long().sum()
