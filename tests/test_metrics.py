"""The figures, against a matrix done by hand and scikit-learn."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.ndimage import binary_erosion
from scipy.spatial.distance import cdist
from sklearn.metrics import confusion_matrix, f1_score, jaccard_score, precision_recall_fscore_support
from torch import Tensor
from torchmetrics.classification import MulticlassCohenKappa, MulticlassConfusionMatrix

from segmentation.data import IGNORE_INDEX, Labels
from segmentation.metrics import (
    BoundaryIoU,
    SegmentationMetrics,
    SurfaceDistances,
    confusion_counts,
    mean_iou,
    surface_distances,
    table_rows,
)

CLASSES = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
MATRIX = np.array(
    [
        [923, 4, 21, 8, 4, 1, 5, 5, 23, 6],
        [5, 972, 2, 0, 0, 0, 0, 1, 5, 15],
        [26, 2, 892, 30, 13, 8, 17, 5, 4, 3],
        [12, 4, 32, 826, 24, 48, 30, 12, 5, 7],
        [5, 1, 28, 24, 898, 13, 14, 14, 2, 1],
        [7, 2, 28, 111, 18, 801, 13, 17, 0, 3],
        [5, 0, 16, 27, 3, 4, 943, 1, 1, 0],
        [9, 1, 14, 13, 22, 17, 3, 915, 2, 4],
        [37, 10, 4, 4, 0, 1, 2, 1, 931, 10],
        [20, 39, 3, 3, 0, 0, 2, 1, 9, 923],
    ]
)
LOSS = torch.tensor(0.5)


def labels(count: int, task: str | None = None) -> Labels:
    parsed = Labels.parse({f"class{index}": index for index in range(count)})
    return replace(parsed, task=task) if task else parsed


def update(
    metrics: SegmentationMetrics,
    preds: Tensor,
    target: Tensor,
    loss: Tensor = LOSS,
    weight_sum: Tensor | None = None,
    index: Tensor | None = None,
    **heads: list[Tensor],
) -> None:
    """Count a batch; what a test leaves out is a mean loss over the valid pixels, and no position in the split."""
    metrics.update(
        preds=preds,
        target=target,
        loss=loss,
        weight_sum=(target != IGNORE_INDEX).sum() if weight_sum is None else weight_sum,
        index=torch.full((len(preds),), -1) if index is None else index,
        **heads,
    )


def compute(metrics: SegmentationMetrics) -> dict[str, float]:
    return {key: float(value) for key, value in metrics.compute().items()}


def test_counts_under_deterministic_algorithms() -> None:
    generator = torch.Generator().manual_seed(0)
    prediction, mask = torch.randint(0, 3, (2, 4, 9, 7), generator=generator)
    mask[:, :2] = IGNORE_INDEX
    torch.use_deterministic_algorithms(True)
    try:
        found = confusion_counts(prediction, mask, 3)
    finally:
        torch.use_deterministic_algorithms(False)
    for counts, one, true in zip(found, prediction[:, 2:], mask[:, 2:], strict=True):
        assert counts.tolist() == confusion_matrix(true.flatten(), one.flatten(), labels=[0, 1, 2]).tolist()


def test_ten_classes_fed_as_pixels() -> None:
    """Every cell of the matrix as so many pixels, shuffled over images and batches, with some ignored ones between."""
    true, predicted = np.indices(MATRIX.shape)
    mask, prediction = (np.repeat(x.ravel(), MATRIX.ravel()) for x in (true, predicted))
    mask, prediction = (np.append(x, fill) for x, fill in ((mask, [IGNORE_INDEX] * 500), (prediction, [3] * 500)))
    order = np.random.default_rng(0).permutation(len(mask))
    mask, prediction = (torch.from_numpy(x[order]).view(21, 25, 20) for x in (mask, prediction))

    metrics = SegmentationMetrics(Labels.parse({name: index for index, name in enumerate(CLASSES)}))
    for start in range(0, 21, 4):
        update(metrics, prediction[start : start + 4], mask[start : start + 4])
    found = compute(metrics)

    by_hand = [MATRIX[c, c] / (MATRIX[c].sum() + MATRIX[:, c].sum() - MATRIX[c, c]) for c in range(10)]
    assert found["iou/dog"] == pytest.approx(801 / (1000 + 893 - 801), abs=1e-15)
    assert [found[f"iou/{name}"] for name in CLASSES] == pytest.approx(by_hand, abs=1e-15)
    assert found["miou"] == pytest.approx(sum(by_hand) / 10, abs=1e-15)
    assert found["pixel_accuracy"] == pytest.approx(np.trace(MATRIX) / 10000, abs=1e-15)
    assert torch.equal(metrics["classes"].confmat, torch.from_numpy(MATRIX))


@settings(max_examples=30, deadline=None)
@given(st.integers(2, 6), st.integers(0, 10_000), st.booleans())
def test_against_scikit_learn(classes: int, seed: int, ignore: bool) -> None:
    rng = np.random.default_rng(seed)
    mask, prediction = rng.integers(0, classes, (2, 4, 6, 5))
    if ignore:
        mask[rng.random(mask.shape) < 0.3] = IGNORE_INDEX
    metrics = SegmentationMetrics(labels(classes, "multiclass"))
    update(metrics, torch.from_numpy(prediction), torch.from_numpy(mask))
    found = compute(metrics)

    valid = mask != IGNORE_INDEX
    y, p = mask[valid], prediction[valid]
    every = list(range(classes))
    assert np.array_equal(metrics["classes"].confmat.numpy(), confusion_matrix(y, p, labels=every))
    present = [c for c in every if c in y or c in p]
    iou = jaccard_score(y, p, labels=present, average=None)
    assert [found[f"iou/class{c}"] for c in present] == pytest.approx(iou)
    assert [found[f"dice/class{c}"] for c in present] == pytest.approx(f1_score(y, p, labels=present, average=None))
    assert found["miou"] == pytest.approx(iou.mean())
    precision, recall, _, support = precision_recall_fscore_support(y, p, labels=present, zero_division=np.nan)
    for figure, values in {"precision": precision, "recall": recall, "support": support}.items():
        assert [found[f"{figure}/class{c}"] for c in present] == pytest.approx(values, nan_ok=True), figure
    assert found["fwiou"] == pytest.approx((iou * support).sum() / support.sum())
    per_image = [
        jaccard_score(m[m >= 0], q[m >= 0], labels=np.union1d(m[m >= 0], q[m >= 0]), average="macro")
        for m, q in zip(mask, prediction, strict=True)
        if (m >= 0).any()
    ]
    assert found["miou_per_image"] == pytest.approx(np.mean(per_image), abs=1e-11)


def test_absent_class_is_nan_and_not_averaged() -> None:
    metrics = SegmentationMetrics(labels(3))
    update(metrics, torch.tensor([[[0, 0, 1, 1]]]), torch.tensor([[[0, 1, 1, 1]]]))
    found = compute(metrics)
    assert np.isnan(found["iou/class2"])
    assert np.isnan(found["dice/class2"])
    assert found["miou"] == pytest.approx((1 / 2 + 2 / 3) / 2)


def test_class_only_predicted_counts_as_zero() -> None:
    metrics = SegmentationMetrics(labels(3))
    update(metrics, torch.tensor([[[0, 2]]]), torch.tensor([[[0, 0]]]))
    assert compute(metrics)["miou"] == pytest.approx((1 / 2 + 0) / 2)


def test_binary_has_the_foreground_only_and_miou_over_both() -> None:
    metrics = SegmentationMetrics(labels(2))
    update(metrics, torch.tensor([[[0, 1, 1, 0]]]), torch.tensor([[[0, 1, 0, 0]]]))
    found = compute(metrics)
    assert "iou/class0" not in found
    assert found["iou/class1"] == pytest.approx(1 / 2)
    assert found["miou"] == pytest.approx((1 / 2 + 2 / 3) / 2)


def test_any_grouping_gives_the_same_digits() -> None:
    """Batches of 1, 3 and 7 and their sum over three processes, to the last bit."""
    rng = torch.Generator().manual_seed(0)
    mask = torch.randint(-1, 4, (7, 9, 11), generator=rng)
    mask[mask < 0] = IGNORE_INDEX
    mask[3] = IGNORE_INDEX  # an image of which nothing counts
    prediction = torch.randint(0, 4, (7, 9, 11), generator=rng)
    index = torch.arange(7)

    def fed(order: list[int], batch: int) -> SegmentationMetrics:
        metrics = SegmentationMetrics(labels(4), heads=2, images=7, boundary=0.1, surface=True)
        for start in range(0, len(order), batch):
            chosen = order[start : start + batch]
            heads = [prediction[chosen], 3 - prediction[chosen]]
            update(metrics, prediction[chosen], mask[chosen], index=index[chosen], heads=heads)
        return metrics

    reference = fed([0, 1, 2, 3, 4, 5, 6], 7)
    others = [fed([6, 5, 4, 3, 2, 1, 0], 1), fed([0, 2, 4, 6, 1, 3, 5], 3)]
    shares = [fed([0, 3, 6], 2), fed([1, 4], 2), fed([2, 5], 1)]
    summed = SegmentationMetrics(labels(4), heads=2, images=7, boundary=0.1, surface=True)
    for share in shares:
        summed.load(share.state())
    for metrics in [*others, summed]:
        for key, value in reference.compute().items():
            assert torch.equal(value, metrics.compute()[key]), key
        assert torch.equal(metrics["classes"].table, reference["classes"].table)


def test_table_rows_and_fillers() -> None:
    metrics = SegmentationMetrics(labels(2), images=2)
    mask = torch.tensor([[[0, 1, 1]], [[IGNORE_INDEX] * 3]])
    update(metrics, torch.tensor([[[0, 1, 0]], [[1, 1, 1]]]), mask, index=torch.tensor([1, -1]))
    rows = table_rows(metrics["classes"].table, ["a", "b"], ["class0", "class1"])
    assert rows[2:] == [
        {"name": "b", "class": "class0", "tp": 1, "fp": 1, "fn": 0},
        {"name": "b", "class": "class1", "tp": 1, "fp": 0, "fn": 1},
    ]
    assert all(row["tp"] == row["fp"] == row["fn"] == 0 for row in rows[:2])
    assert compute(metrics)["miou_per_image"] == pytest.approx((1 / 2 + 1 / 2) / 2)


def test_loss_is_averaged_over_pixels() -> None:
    metrics = SegmentationMetrics(labels(2))
    update(metrics, torch.zeros(1, 1, 3).long(), torch.tensor([[[0, 0, IGNORE_INDEX]]]), torch.tensor(4.0))
    update(metrics, torch.zeros(1, 1, 4).long(), torch.zeros(1, 1, 4).long(), torch.tensor(1.0))
    assert compute(metrics)["loss"] == pytest.approx((2 * 4.0 + 4 * 1.0) / 6)


def test_any_grouping_gives_the_same_loss() -> None:
    """Of losses and masses as floats have them, given an image at a time or by batches, in any order."""
    rng = torch.Generator().manual_seed(0)
    losses, masses = 5 * torch.rand(200, generator=rng) ** 4, 3000 * torch.rand(200, generator=rng)
    mask = torch.zeros(200, 2, 2, dtype=torch.int64)

    def loss_of(order: torch.Tensor, batch: int) -> float:
        metrics = SegmentationMetrics(labels(2))
        for chosen in order.split(batch):
            update(metrics, mask[chosen], mask[chosen], losses[chosen], masses[chosen])
        return compute(metrics)["loss"]

    expected = float((losses.double() * masses.double()).sum() / masses.double().sum())
    found = {loss_of(torch.randperm(200, generator=rng), batch) for batch in (1, 1, 3, 7, 64, 200)}
    assert len(found) == 1
    assert found.pop() == pytest.approx(expected, rel=1e-7)


@pytest.mark.parametrize("loss", [float("nan"), float("inf"), 1e20])
def test_a_loss_without_bounds_is_told(loss: float) -> None:
    metrics = SegmentationMetrics(labels(2))
    mask = torch.zeros(2, 1, 4).long()
    update(metrics, mask, mask, torch.tensor([loss, 1.0]), torch.tensor([4, 4]))
    assert compute(metrics)["loss"] == pytest.approx(loss / 2, nan_ok=True)


def test_a_metric_of_torchmetrics_is_one_more_entry() -> None:
    rng = torch.Generator().manual_seed(0)
    prediction, mask = torch.randint(0, 3, (2, 4, 9, 7), generator=rng)
    mask[0, :2] = IGNORE_INDEX
    metrics = SegmentationMetrics(labels(3))
    metrics["kappa"] = MulticlassCohenKappa(3, ignore_index=IGNORE_INDEX)
    metrics["confusion"] = MulticlassConfusionMatrix(3, ignore_index=IGNORE_INDEX)
    update(metrics, prediction[:3], mask[:3])
    update(metrics, prediction[3:], mask[3:])
    found = metrics.compute()
    assert torch.equal(found["confusion"], metrics["classes"].confmat)
    assert found["kappa"] == MulticlassCohenKappa(3, ignore_index=IGNORE_INDEX)(prediction, mask)


def test_heads_are_kept_apart() -> None:
    mask = torch.tensor([[[0, 1]]])
    right, wrong = torch.tensor([[[0, 1]]]), torch.tensor([[[1, 0]]])
    metrics = SegmentationMetrics(labels(2), heads=2)
    update(metrics, right, mask, heads=[wrong, right])
    assert compute(metrics)["head1/miou"] == 0
    assert compute(metrics)["head2/miou"] == 1


def test_counts_of_each_image() -> None:
    mask = torch.tensor([[[0, 1]], [[1, 1]]])
    counts = confusion_counts(torch.tensor([[[0, 0]], [[1, 1]]]), mask, 2)
    assert counts.tolist() == [[[1, 0], [1, 0]], [[0, 0], [0, 2]]]
    assert mean_iou(counts).tolist() == pytest.approx([(1 / 2 + 0) / 2, 1.0])


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 10_000), st.sampled_from([0.02, 0.06, 0.15]))
def test_boundary_iou_against_erosion(seed: int, dilation: float) -> None:
    """The paper's own way: erode each mask d times by 3x3, with nothing outside the image; the boundary is the rest."""
    rng = np.random.default_rng(seed)
    mask, prediction = rng.integers(0, 3, (2, 2, 6, 7)).repeat(5, axis=2).repeat(5, axis=3)
    d = max(1, round(dilation * np.hypot(30, 35)))

    def boundary(of_class: np.ndarray) -> np.ndarray:
        return of_class & ~np.stack([binary_erosion(x, np.ones((3, 3)), iterations=d) for x in of_class])

    metric = BoundaryIoU(labels(3), dilation)
    metric.update(torch.from_numpy(prediction), torch.from_numpy(mask))
    for index in range(3):
        g, p = boundary(mask == index), boundary(prediction == index)
        assert metric.intersection[index] == (g & p).sum()
        assert metric.union[index] == (g | p).sum()


def test_boundary_iou_has_no_edge_at_ignored_pixels() -> None:
    mask = torch.zeros(1, 20, 20, dtype=torch.int64)
    mask[..., 10:] = IGNORE_INDEX
    prediction = torch.randint(0, 2, (1, 20, 20))
    prediction[..., :10] = 0
    metrics = SegmentationMetrics(labels(2), boundary=0.1)
    update(metrics, prediction, mask)
    counts = metrics.state()["boundary"]
    assert counts["intersection"][0] == counts["union"][0] == 10 * 20 - 14 * 7  # three sides, 3 pixels wide
    assert compute(metrics)["mean_boundary_iou"] == 1
    assert "boundary_iou/class0" not in compute(metrics)


def surface_points(mask: np.ndarray) -> np.ndarray:
    """Pixels inside with a neighbour outside the mask or the image, one by one."""
    inside = set(map(tuple, np.argwhere(mask)))
    return np.array([(y, x) for y, x in inside if {(y - 1, x), (y + 1, x), (y, x - 1), (y, x + 1)} - inside])


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10_000), st.booleans(), st.sampled_from([1, 4]))
def test_surface_distances_against_all_pairs_of_points(seed: int, ignore: bool, side: int) -> None:
    rng = np.random.default_rng(seed)
    mask, prediction = rng.integers(0, 3, (2, 2, 5, 6)).repeat(side, axis=2).repeat(side, axis=3)
    if ignore:
        mask[rng.random(mask.shape) < 0.2] = IGNORE_INDEX
    metric = SurfaceDistances(labels(3))
    metric.update(torch.from_numpy(prediction), torch.from_numpy(mask))
    found = metric.compute()

    for index in range(3):
        hd95, assd = [], []
        for predicted, true in zip(prediction, mask, strict=True):
            one, other = predicted == index, true == index
            one &= true != IGNORE_INDEX
            if one.any() and other.any():
                pairs = cdist(surface_points(one), surface_points(other))
                there, back = pairs.min(axis=1), pairs.min(axis=0)
                hd95.append(max(np.percentile(there, 95), np.percentile(back, 95)))
                assd.append((there.sum() + back.sum()) / (len(there) + len(back)))
            elif one.any() or other.any():
                hd95.append(np.hypot(5 * side, 6 * side))
                assd.append(np.hypot(5 * side, 6 * side))
        expected = [np.mean(hd95), np.mean(assd)] if hd95 else [np.nan, np.nan]
        assert [found[f"hd95/class{index}"], found[f"assd/class{index}"]] == pytest.approx(
            expected, abs=1e-4, nan_ok=True
        )


@pytest.mark.parametrize("shift", [0, 1, 3, 8])
def test_surface_distances_of_what_is_moved(shift: int) -> None:
    """All of a line is `shift` away. Of a square of side 20 the outer edge is, and the sum of all distances is
    20 k (outer edge) + k (k - 1) (above and below) + 19 k - k^2 (inner edge) = 38 k, over 76 pixels."""
    line, square = np.zeros((2, 30, 40), bool)
    line[:, 5] = True
    square[5:25, 5:25] = True
    assert surface_distances(line, np.roll(line, shift, axis=1)) == (shift, shift)
    assert surface_distances(square, np.roll(square, shift, axis=1)) == (shift, pytest.approx(shift / 2))


def test_a_class_that_is_missed_is_as_far_as_can_be() -> None:
    mask, prediction = torch.zeros(2, 3, 30, 40, dtype=torch.int64)
    mask[:2, 5:9, 5:9] = 1  # found in the first, missed in the second; neither has it in the third
    prediction[0] = mask[0]
    metrics = SegmentationMetrics(labels(2), surface=True)
    update(metrics, prediction, mask)
    found = compute(metrics)
    assert found["hd95/class1"] == found["assd/class1"] == found["mean_hd95"] == found["mean_assd"] == 50 / 2
    assert "hd95/class0" not in found


def test_a_collapse_to_one_class_is_noticed() -> None:
    metrics = SegmentationMetrics(labels(3))
    update(metrics, torch.tensor([[[1, 1]]]), torch.tensor([[[0, 1]]]))
    metrics.compute()
    assert metrics["classes"].collapsed
    update(metrics, torch.tensor([[[0, 1]]]), torch.tensor([[[0, 1]]]))
    metrics.compute()
    assert not metrics["classes"].collapsed
