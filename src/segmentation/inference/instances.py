"""Instances: objects of a class told apart, and the metrics that say how well."""

import numpy as np
import torch
from lightning.pytorch import Callback
from scipy.ndimage import distance_transform_edt, gaussian_filter
from skimage.measure import label as components
from skimage.metrics import contingency_table
from skimage.morphology import h_maxima
from skimage.segmentation import relabel_sequential, watershed
from torch import Tensor

from segmentation.data.labels import IGNORE_INDEX, Labels
from segmentation.metrics import UNIT, CountMetric

#: IoU above which an instance counts as found: 0.5, 0.55, ..., 0.95, as in COCO and the Data Science Bowl 2018.
THRESHOLDS = np.linspace(0.5, 0.95, 10).round(2)
SMALLEST = 12  # pixels of an instance; less is noise
SMOOTHING = 1.5  # sigma, in pixels, for distances: a ragged edge must not split an object
SADDLE = 0.75  # pixels by which two maxima of the distance must rise above their saddle to be two instances


def separate(index: np.ndarray, labels: Labels, by: str = "watershed") -> np.ndarray:
    """Instances of every class but the background, by marker-controlled watershed (Meyer and Beucher 1990).

    Markers are the maxima of the smoothed distance to the edge of the class; they grow downhill until they meet, where
    the class is narrowest.

    Args:
        index: (H, W) class indices.
        labels: the classes.
        by: `watershed`; or `components`, the baseline: connected pixels of a class are one instance.

    Returns:
        (H, W) int32, 0 for none, 1, 2, ... an instance.
    """
    ids = np.zeros(index.shape, np.int32)
    for k in instance_classes(labels):
        inside = index == k
        if by == "components":
            found = components(inside, connectivity=1)
        else:
            distance = gaussian_filter(distance_transform_edt(inside), SMOOTHING)
            markers = components(h_maxima(distance, SADDLE) * inside)
            found = watershed(-distance, markers, mask=inside)
        area = np.bincount(found.ravel())
        found[area[found] < SMALLEST] = 0
        first = int(ids.max()) + 1
        ids += relabel_sequential(found, offset=first)[0]
    return ids


def instance_classes(labels: Labels) -> list[int]:
    """Classes that have instances: all but the background."""
    classes = range(labels.num_classes)
    return [k for k in classes if k != labels.background]


class InstanceMetrics(CountMetric):
    """Average precision and panoptic quality of counts over all images, exact on any number of processes.

    AP at a threshold t is tp / (tp + fp + fn); an instance is found if its IoU with a true one of its class is above t
    (Caicedo et al. 2019, Data Science Bowl; our instances have no scores to rank). `ap` is its mean over THRESHOLDS.
    Panoptic quality is the sum of the IoUs above 0.5 / (tp + fp / 2 + fn / 2) (Kirillov et al. 2019, eq. 1).
    """

    counts: Tensor  # (K, 13): predicted, true, sum of IoUs in UNIT, and those matched at each of THRESHOLDS

    def __init__(self, labels: Labels) -> None:
        super().__init__()
        self.names = labels.names
        self.classes = instance_classes(labels)
        self.add_count("counts", labels.num_classes, 3 + len(THRESHOLDS))

    def update(
        self,
        found: np.ndarray,
        index: np.ndarray,
        truth: np.ndarray,
        mask: np.ndarray,
    ) -> None:
        """Count an image.

        Pixels of one id in several classes are as many instances, as in COCO's panoptic format.

        Args:
            found: (H, W) ids of the predicted instances, 0 for none.
            index: (H, W) predicted class indices.
            truth: (H, W) ids of the true instances, 0 for none.
            mask: (H, W) true class indices; pixels of IGNORE_INDEX do not count.
        """
        found = found * (mask != IGNORE_INDEX)
        for k in self.classes:
            predicted = found * (index == k)
            true = truth * (mask == k)
            predicted_area = np.bincount(predicted.ravel())
            true_area = np.bincount(true.ravel())
            pairs = contingency_table(true, predicted)[1:, 1:].tocoo()
            union = true_area[pairs.row + 1] + predicted_area[pairs.col + 1] - pairs.data
            iou = pairs.data / union
            iou = iou[iou > 0.5]  # at most one for each instance
            counts = [
                np.count_nonzero(predicted_area[1:]),
                np.count_nonzero(true_area[1:]),
                np.rint(iou / UNIT).sum(),
            ]
            for threshold in THRESHOLDS:
                counts.append(np.count_nonzero(iou > threshold))
            self.counts[k] += torch.tensor(counts, dtype=torch.int64)

    def compute(self) -> dict[str, float]:
        """`ap50`, `ap75`, `ap`, `pq`, `sq` and `rq`, of each class and their means over the classes."""
        predicted, true, iou, *matched = self.counts.T.double()
        iou = iou * UNIT
        total = predicted + true
        tp = torch.stack(matched)
        ap = tp / (total - tp)
        by_class = {
            "ap50": ap[0],
            "ap75": ap[5],
            "ap": ap.mean(dim=0),
            "pq": iou / (total / 2),
            "sq": iou / tp[0],
            "rq": tp[0] / (total / 2),
        }
        metrics = {}
        for name, values in by_class.items():
            metrics[f"instances/{name}"] = float(values[self.classes].nanmean())
            for k in self.classes:
                metrics[f"instances/{name}/{self.names[k]}"] = float(values[k])
        metrics["instances/true"] = int(true.sum())
        metrics["instances/found"] = int(predicted.sum())
        return metrics


class InstanceScores(Callback):
    """Separates the instances of every tested image, `by` watershed or components, and counts them."""

    def __init__(self, labels: Labels, by: str) -> None:
        self.labels = labels
        self.by = by
        self.metrics = InstanceMetrics(labels)

    def on_test_batch_end(
        self,
        trainer,
        pl_module,
        outputs,
        batch,
        *others,
    ) -> None:
        predictions = outputs["prediction"].cpu().numpy()
        truths = batch["instance"].cpu().numpy()
        masks = batch["mask"].cpu().numpy()
        for index, truth, mask in zip(predictions, truths, masks, strict=True):  # of a filler nothing counts
            found = separate(index, self.labels, self.by)
            self.metrics.update(found, index, truth, mask)
