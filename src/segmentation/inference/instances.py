"""Instances on top of classes: individuals of a class told apart, and the figures that say how well."""

from typing import Any

import numpy as np
import torch
from lightning.pytorch import Callback
from scipy.ndimage import distance_transform_edt, gaussian_filter
from skimage.measure import label as components
from skimage.morphology import h_maxima
from skimage.segmentation import relabel_sequential, watershed
from torch import Tensor
from torchmetrics import Metric

from segmentation.data.labels import IGNORE_INDEX, Labels
from segmentation.errors import InputError
from segmentation.metrics import UNIT

#: IoU from which an individual counts as found: 0.5, 0.55, ..., 0.95, as COCO and the Data Science Bowl 2018 have it.
THRESHOLDS = tuple(round(0.5 + 0.05 * step, 2) for step in range(10))
SMALLEST = 12  # pixels of an individual; less is noise
CALM = 1.5  # sigma, in pixels, by which distances are smoothed: a ragged edge must not make two of one
SADDLE = 0.75  # pixels by which two maxima of the distance must stand out from their saddle to be two individuals


def separate(index: np.ndarray, labels: Labels, by: str = "watershed") -> np.ndarray:
    """Individuals of an image's classes, by marker-controlled watershed (Meyer and Beucher 1990): markers are the
    maxima of the distance to the edge of the class, smoothed, and grow downhill until they meet, where the class is
    narrowest. A net that has learnt the gaps (`BorderWeight`) leaves little to part. By `components`, what is to be
    beaten, connected pixels of a class are one individual.

    (H, W) class indices -> (H, W) int32, 0 for none, 1, 2, ... an individual.
    """
    ids = np.zeros(index.shape, np.int32)
    for k in _things(labels):
        inside = index == k
        if by == "components":
            found = components(inside, connectivity=1)
        else:
            distance = gaussian_filter(distance_transform_edt(inside), CALM)
            found = watershed(-distance, components(h_maxima(distance, SADDLE) * inside), mask=inside)
        found[np.bincount(found.ravel())[found] < SMALLEST] = 0
        ids += relabel_sequential(found, offset=int(ids.max(initial=0)) + 1)[0]
    return ids


def _things(labels: Labels) -> list[int]:
    """Classes that have individuals: all but the background."""
    return [k for k in range(labels.num_classes) if k != labels.background]


def _class_of(ids: np.ndarray, index: np.ndarray, labels: Labels) -> np.ndarray:
    """The class of each individual 1, 2, ..., by most of its pixels; -1 for what has none."""
    kinds, most = _things(labels), int(ids.max(initial=0))
    votes = np.stack([np.bincount(ids[index == k], minlength=most + 1)[1:] for k in kinds])
    return np.where(votes.any(axis=0), np.array(kinds)[votes.argmax(axis=0)], -1)


class InstanceMetrics(Metric):
    """Average precision and panoptic quality, of counts over all images, exact on any number of processes.

    AP at a threshold t is tp / (tp + fp + fn), an individual found if its IoU with one of the truth, of its class, is
    above t (Caicedo et al. 2019, Data Science Bowl; our individuals have no scores to rank). `ap` is its mean over
    THRESHOLDS. Panoptic quality: the sum of the IoUs above 0.5 / (tp + fp / 2 + fn / 2) (Kirillov et al. 2019, eq. 1).
    """

    full_state_update = False
    predicted: Tensor
    true: Tensor
    iou: Tensor
    matched: Tensor

    def __init__(self, labels: Labels) -> None:
        super().__init__()
        self.labels = labels
        zeros = torch.zeros(labels.num_classes, dtype=torch.int64)
        for state in ("predicted", "true", "iou"):
            self.add_state(state, zeros.clone(), dist_reduce_fx="sum")
        self.add_state("matched", zeros.repeat(len(THRESHOLDS), 1), dist_reduce_fx="sum")

    def update(self, found: np.ndarray, index: np.ndarray, truth: np.ndarray, mask: np.ndarray) -> None:
        """Count an image, (H, W): ids and class indices predicted, ids and class indices of the truth, whose pixels of
        IGNORE_INDEX do not count."""
        # Numbered without gaps: the table of their overlaps has a row and a column for each.
        found, truth = (relabel_sequential(np.where(mask == IGNORE_INDEX, 0, ids))[0] for ids in (found, truth))
        kinds, true_kinds = _class_of(found, index, self.labels), _class_of(truth, mask, self.labels)
        shape = len(true_kinds) + 1, len(kinds) + 1
        both = np.bincount((truth * shape[1] + found).ravel(), minlength=shape[0] * shape[1]).reshape(shape)
        union = both.sum(1, keepdims=True) + both.sum(0, keepdims=True) - both
        iou = (both / np.maximum(union, 1))[1:, 1:] * (true_kinds[:, None] == kinds)
        for k in _things(self.labels):
            best = iou[true_kinds == k]
            best = best[best > 0.5]  # at most one for each individual: above a half there is no room for two
            self.predicted[k] += int((kinds == k).sum())
            self.true[k] += int((true_kinds == k).sum())
            self.iou[k] += int(np.round(best / UNIT).astype(np.int64).sum())
            self.matched[:, k] += torch.from_numpy((best > np.array(THRESHOLDS)[:, None]).sum(axis=1))

    def compute(self) -> dict[str, float]:
        """Figures: `ap50`, `ap75`, `ap`, `pq`, `sq`, `rq`: means over classes, and by class where there are several."""
        predicted, true = self.predicted.double(), self.true.double()
        ap = self.matched / (predicted + true - self.matched)
        tp, half, iou = self.matched[0], (predicted + true) / 2, self.iou * UNIT
        of_class = {
            "ap50": ap[0],
            "ap75": ap[THRESHOLDS.index(0.75)],
            "ap": ap.mean(dim=0),
            "pq": iou / half,
            "sq": iou / tp,
            "rq": tp / half,
        }
        kinds = _things(self.labels)
        figures = {f"instances/{key}": float(values[kinds].nanmean()) for key, values in of_class.items()}
        for k in kinds if len(kinds) > 1 else ():
            figures |= {
                f"instances/{key}/{self.labels.names[k]}": float(of_class[key][k]) for key in ("ap50", "ap", "pq")
            }
        return figures | {"instances/true": int(true.sum()), "instances/found": int(predicted.sum())}


class InstanceScores(Callback):
    """Tells individuals apart in every tested image, `by` watershed or components, and counts."""

    def __init__(self, labels: Labels, by: str) -> None:
        self.labels, self.by = labels, by
        self.metrics = InstanceMetrics(labels)

    def on_test_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, *others: Any) -> None:
        if "instance" not in batch:
            raise InputError("--instances needs a truth: give the data set its `instances` (ids, 0 for none)")
        tensors = (pl_module.classify(outputs["logits"]), batch["instance"], batch["mask"])
        images = zip(*(x.cpu().numpy() for x in tensors), strict=True)
        for number, (index, truth, mask) in zip(batch["index"].tolist(), images, strict=True):
            if number >= 0:  # else a filler
                self.metrics.update(separate(index, self.labels, self.by), index, truth, mask)
