"""Instances on top of classes: individuals of a class told apart, and the figures that say how well."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from scipy.ndimage import distance_transform_edt, gaussian_filter
from skimage.measure import label as components
from skimage.morphology import h_maxima
from skimage.segmentation import relabel_sequential, watershed
from torchmetrics import Metric

from segmentation.data.labels import IGNORE_INDEX, Labels
from segmentation.errors import InputError
from segmentation.metrics import UNIT

#: IoU from which an individual counts as found: 0.5, 0.55, ..., 0.95, as COCO and the Data Science Bowl 2018 have it.
THRESHOLDS = tuple(round(0.5 + 0.05 * step, 2) for step in range(10))
SMALLEST = 12  # pixels of an individual; less is noise
CALM = 1.5  # sigma, in pixels, by which distances are smoothed: a ragged edge must not make two of one
SADDLE = 0.75  # pixels by which two maxima of the distance must stand out from their saddle to be two individuals


def things(labels: Labels) -> list[int]:
    """Classes that have individuals: all but the background."""
    return [k for k in range(labels.num_classes) if k != labels.background]


def separate(index: np.ndarray, labels: Labels, by: str = "watershed") -> np.ndarray:
    """Individuals of an image's classes, by marker-controlled watershed (Meyer and Beucher 1990): markers are the
    maxima of the distance to the edge of the class, smoothed, and grow downhill until they meet, where the class is
    narrowest. A net that has learnt the gaps (`BorderWeight`) leaves little to part.

    Args:
        index: (H, W) class indices.
        labels: the classes.
        by: `watershed`, or `components`: connected pixels of a class are one individual (what is to be beaten).

    Returns:
        (H, W) int32, 0 for none, 1, 2, ... an individual.
    """
    ids = np.zeros(index.shape, np.int32)
    for k in things(labels):
        inside = index == k
        if by == "components":
            found = components(inside, connectivity=1)
        else:
            distance = gaussian_filter(distance_transform_edt(inside), CALM)
            found = watershed(-distance, components(h_maxima(distance, SADDLE) * inside), mask=inside)
        sizes = np.bincount(found.ravel())
        sizes[0] = 0
        keep = np.flatnonzero(sizes >= SMALLEST)
        number = np.zeros(len(sizes), np.int32)
        number[keep] = np.arange(1, len(keep) + 1) + ids.max()
        ids = np.where(inside, number[found], ids)
    return ids


def class_of(ids: np.ndarray, index: np.ndarray, labels: Labels) -> np.ndarray:
    """The class of each individual, by most of its pixels: (max id + 1,) class indices, -1 for what has none."""
    found = np.full(int(ids.max(initial=0)) + 1, -1)
    votes = np.stack([np.bincount(ids[index == k], minlength=len(found)) for k in things(labels)])
    voted = votes.max(axis=0) > 0
    voted[0] = False
    found[voted] = np.array(things(labels))[votes.argmax(axis=0)[voted]]
    return found


class InstanceMetrics(Metric):
    """Average precision and panoptic quality, of counts over all images, exact on any number of processes.

    AP at a threshold t is tp / (tp + fp + fn), an individual found if its IoU with one of the truth, of its class, is
    above t (Caicedo et al. 2019, Data Science Bowl; our individuals have no scores to rank). `ap` is its mean over
    THRESHOLDS. Panoptic quality is the sum of the IoUs above 0.5 / (tp + fp / 2 + fn / 2) (Kirillov
    et al. 2019, eq. 1).

    Args:
        labels: the classes.
    """

    full_state_update = False

    def __init__(self, labels: Labels) -> None:
        super().__init__()
        self.labels = labels
        zeros = torch.zeros(labels.num_classes, dtype=torch.int64)
        for state in ("predicted", "true", "iou"):
            self.add_state(state, zeros.clone(), dist_reduce_fx="sum")
        self.add_state("matched", zeros.repeat(len(THRESHOLDS), 1), dist_reduce_fx="sum")

    def update(self, found: np.ndarray, index: np.ndarray, truth: np.ndarray, mask: np.ndarray) -> None:
        """Count an image; all are (H, W).

        Args:
            found: ids of the individuals predicted.
            index: class indices predicted.
            truth: ids of the individuals of the truth.
            mask: its class indices; where they are IGNORE_INDEX, nothing counts.
        """
        valid = mask != IGNORE_INDEX
        # Numbered without gaps: the table of their overlaps has a row and a column for each.
        found, truth = (relabel_sequential(np.where(valid, ids, 0))[0] for ids in (found, truth))
        kinds, true_kinds = class_of(found, index, self.labels), class_of(truth, mask, self.labels)
        columns = len(kinds)
        both = np.bincount((truth * columns + found).ravel(), minlength=len(true_kinds) * columns).reshape(-1, columns)
        union = both.sum(1, keepdims=True) + both.sum(0, keepdims=True) - both
        iou = np.where(true_kinds[:, None] == kinds[None], both / np.maximum(union, 1), 0.0)[1:, 1:]
        for k in things(self.labels):
            of_class = iou[true_kinds[1:] == k]
            self.predicted[k] += int((kinds == k).sum())
            self.true[k] += int((true_kinds == k).sum())
            best = of_class[of_class > 0.5]  # at most one for each individual: above a half there is no room for two
            self.iou[k] += int(np.round(best / UNIT).astype(np.int64).sum())
            for row, threshold in enumerate(THRESHOLDS):
                self.matched[row, k] += int((best > threshold).sum())

    def compute(self) -> dict[str, float]:
        """Figures: `ap50`, `ap75`, `ap`, `pq`, `sq`, `rq`: means over classes, and by class where there are several."""
        predicted, true = self.predicted.double(), self.true.double()
        ap = self.matched / (predicted + true - self.matched)
        pq = self.iou * UNIT / ((predicted + true) / 2)
        tp = self.matched[0]
        of_class = {
            "ap50": ap[0],
            "ap75": ap[THRESHOLDS.index(0.75)],
            "ap": ap.mean(dim=0),
            "pq": pq,
            "sq": self.iou * UNIT / tp,
            "rq": tp / ((predicted + true) / 2),
        }
        kinds = things(self.labels)
        figures = {f"instances/{key}": float(values[kinds].nanmean()) for key, values in of_class.items()}
        if len(kinds) > 1:
            for key in ("ap50", "ap", "pq"):
                names = [(k, self.labels.names[k]) for k in kinds]
                figures |= {f"instances/{key}/{name}": float(of_class[key][k]) for k, name in names}
        return figures | {"instances/true": int(true.sum()), "instances/found": int(predicted.sum())}


class InstanceScores(Callback):
    """Tells individuals apart in every tested image, and counts.

    Args:
        labels: the classes.
        by: as `separate` has it.
    """

    def __init__(self, labels: Labels, by: str) -> None:
        self.labels, self.by = labels, by
        self.metrics = InstanceMetrics(labels)

    def on_test_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: dict[str, Any], *others: Any
    ) -> None:
        if "instance" not in batch:
            raise InputError("--instances needs a truth: give the data set its `instances` (ids, 0 for none)")
        indices, truths, masks = (
            x.cpu().numpy() for x in (pl_module.classify(outputs["logits"]), batch["instance"], batch["mask"])
        )
        numbers: Sequence[int] = batch["index"].tolist()
        for number, index, truth, mask in zip(numbers, indices, truths, masks, strict=True):
            if number >= 0:  # else a filler
                self.metrics.update(separate(index, self.labels, self.by), index, truth, mask)
