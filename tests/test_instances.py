"""Individuals told apart, and the figures that say how well, against other people's code."""

import numpy as np
import pytest
import torch
from scipy.optimize import linear_sum_assignment
from torchmetrics.detection import PanopticQuality

from segmentation.data.labels import IGNORE_INDEX, Labels
from segmentation.inference.instances import THRESHOLDS, InstanceMetrics, separate

TWO = Labels.parse({"background": 0, "nucleus": 255})
MANY = Labels.parse({"background": 0, "cat": 1, "dog": 2})


def discs(*centers: tuple[int, int], radius: int = 10) -> np.ndarray:
    """Ids of discs on 64x64; a later one lies over an earlier one."""
    rows, columns = np.mgrid[:64, :64]
    ids = np.zeros((64, 64), np.int64)
    for number, (row, column) in enumerate(centers, start=1):
        ids[(rows - row) ** 2 + (columns - column) ** 2 <= radius**2] = number
    return ids


def figures(labels: Labels, *images: tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]) -> dict[str, float]:
    metrics = InstanceMetrics(labels)
    for image in images:
        metrics.update(*image)
    return metrics.compute()


def test_watershed_parts_touching_discs_and_components_do_not() -> None:
    truth = discs((30, 20), (30, 38))
    index = (truth > 0).astype(np.int64)
    assert separate(index, TWO, "components").max() == 1
    found = separate(index, TWO)
    assert found.max() == 2
    assert ((found > 0) == (truth > 0)).all()
    assert figures(TWO, (found, index, truth, index))["instances/ap75"] == 1


def test_noise_is_no_individual() -> None:
    index = np.zeros((64, 64), np.int64)
    index[5:7, 5:7] = 1
    assert separate(index, TWO).max() == 0
    assert separate(index * 0, TWO).max() == 0


def test_touching_classes_are_apart() -> None:
    index = np.zeros((64, 64), np.int64)
    index[10:30, 10:30], index[10:30, 30:50] = 1, 2
    found = separate(index, MANY)
    assert len(np.unique(found[index > 0])) == 2
    assert len(np.unique(found[index == 1])) == 1


def random_image(rng: np.random.Generator, labels: Labels) -> tuple[np.ndarray, ...]:
    """Truth, and a prediction that is near it: discs moved, lost and added; some of another class."""
    centers = [tuple(rng.integers(8, 56, 2)) for _ in range(5)]
    truth = discs(*centers, radius=7)
    moved = [tuple(np.array(c) + rng.integers(-3, 4, 2)) for c in centers[: rng.integers(2, 6)]]
    found = discs(*moved, tuple(rng.integers(8, 56, 2)), radius=7)
    classes = np.arange(6) % (labels.num_classes - 1) + 1
    mask = np.where(truth > 0, classes[truth % 6], 0)
    index = np.where(found > 0, classes[found % 6], 0)
    return found, index, truth, mask


@pytest.mark.parametrize("labels", [TWO, MANY])
def test_panoptic_quality_is_that_of_torchmetrics(labels: Labels) -> None:
    rng = np.random.default_rng(0)
    images = [random_image(rng, labels) for _ in range(12)]
    kinds = set(range(1, labels.num_classes))
    oracle = PanopticQuality(things=kinds, stuffs={0}, return_per_class=True, return_sq_and_rq=True)
    for found, index, truth, mask in images:
        pair = (np.stack([classes, ids], axis=-1)[None] for classes, ids in ((index, found), (mask, truth)))
        oracle.update(*map(torch.from_numpy, pair))
    means = oracle.compute()[:-1].mean(dim=0)  # things come first, in order
    got = figures(labels, *images)
    assert [got[f"instances/{key}"] for key in ("pq", "sq", "rq")] == pytest.approx(means.tolist())


def test_average_precision_is_that_of_an_optimal_matching() -> None:
    rng = np.random.default_rng(1)
    images = [random_image(rng, TWO) for _ in range(12)]
    expected = []
    for threshold in THRESHOLDS:
        tp = total = 0
        for found, _, truth, _ in images:
            sets = [[ids == k for k in np.unique(ids) if k] for ids in (truth, found)]
            iou = np.array([[(a & b).sum() / (a | b).sum() for b in sets[1]] for a in sets[0]])
            rows, columns = linear_sum_assignment(-(iou > threshold).astype(float))
            matched = int((iou[rows, columns] > threshold).sum())
            tp, total = tp + matched, total + len(sets[0]) + len(sets[1]) - matched
        expected.append(tp / total)
    got = figures(TWO, *images)
    assert got["instances/ap"] == pytest.approx(np.mean(expected))
    assert got["instances/ap50"] == pytest.approx(expected[0])
    assert got["instances/ap75"] == pytest.approx(expected[5])
    assert 0 < expected[5] < expected[0] < 1


def test_what_is_ignored_does_not_count() -> None:
    truth = discs((20, 20), (44, 44))
    mask = np.where(truth > 0, 1, 0)
    found = discs((20, 20))
    mask[32:] = IGNORE_INDEX
    got = figures(TWO, (found, (found > 0).astype(int), truth, mask))
    assert (got["instances/ap"], got["instances/true"]) == (1, 1)


def test_counts_of_processes_add_up() -> None:
    rng = np.random.default_rng(2)
    images = [random_image(rng, MANY) for _ in range(6)]
    whole, parts = InstanceMetrics(MANY), [InstanceMetrics(MANY), InstanceMetrics(MANY)]
    for number, image in enumerate(images):
        whole.update(*image)
        parts[number % 2].update(*image)
    for state in ("predicted", "true", "iou", "matched"):
        setattr(parts[0], state, getattr(parts[0], state) + getattr(parts[1], state))
    assert parts[0].compute() == whole.compute()


def test_specks_are_no_individuals_by_components_either() -> None:
    index = np.zeros((64, 64), np.int64)
    index[5:7, 5:7] = 1
    index[20:40, 20:40] = 1
    assert separate(index, TWO, "components").max() == 1


def test_what_lies_in_ignored_pixels_is_neither_missed_nor_found() -> None:
    truth = discs((15, 15), (45, 45))
    index = (truth > 0).astype(np.int64)
    mask = np.where(truth == 2, IGNORE_INDEX, index)
    found = figures(TWO, (truth, index, truth, mask))
    assert (found["instances/true"], found["instances/found"]) == (1, 1)
    assert found["instances/ap"] == 1


def test_an_individual_of_another_class_is_not_the_one() -> None:
    ids = discs((30, 30))
    true, predicted = (ids > 0) * 1, (ids > 0) * 2
    found = figures(MANY, (ids, predicted, ids, true))
    assert (found["instances/true"], found["instances/found"]) == (1, 1)
    assert found["instances/ap50/cat"] == found["instances/ap50/dog"] == 0
