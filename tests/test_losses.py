"""The losses: one contract over all of them, and each against its formula, torch, or another library."""

import csv
import math
from pathlib import Path

import pytest
import segmentation_models_pytorch as smp
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torchvision.ops import sigmoid_focal_loss

from conftest import ROOT, TINY, train
from segmentation.data import IGNORE_INDEX, SplitStatistics
from segmentation.data.statistics import Record
from segmentation.errors import InputError
from segmentation.inference.evaluate import evaluate
from segmentation.losses import (
    CrossEntropy,
    Dice,
    Focal,
    Hybrid,
    Jaccard,
    Lovasz,
    MsSsim,
    SegmentationLoss,
    Tversky,
    WeightedSum,
)
from segmentation.losses.ms_ssim import BETAS, ms_ssim
from segmentation.module import SegmentationModule


def statistics(*images: list[int]) -> SplitStatistics:
    """Of images with so many pixels of each class."""
    names = [f"class{index}" for index in range(len(images[0]))]
    return SplitStatistics(names, [Record(1, sum(row), row, [0.0], [0.0], 0, 0, str(row)) for row in images])


def make(classes: int, size: tuple[int, int] = (6, 5), seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(2, classes, *size, generator=generator, requires_grad=True)
    return logits, torch.randint(0, max(2, classes), (2, *size), generator=generator)


WEIGHTS = [0.5, 2.0, 1.0, 3.0]
BOTH = [CrossEntropy(), Focal(), Focal(gamma=0.5), Dice(), Jaccard(), Tversky(0.2, 0.8), Lovasz()]
#: Losses of single pixels or of overlap, and their number of logits.
OVER_PIXELS: list[tuple[int, SegmentationLoss]] = [
    *((classes, loss) for loss in BOTH for classes in (1, 4)),
    *((1, loss) for loss in (CrossEntropy(pos_weight=3.0), Focal(alpha=0.25))),
    *((4, loss) for loss in (CrossEntropy(WEIGHTS), Focal(WEIGHTS), Dice(WEIGHTS))),
    (4, WeightedSum([CrossEntropy(WEIGHTS), Lovasz()], [1.0, 0.5])),
]
STRUCTURAL = [(classes, loss) for loss in (MsSsim(), Hybrid()) for classes in (1, 4)]


def name(row: tuple[int, SegmentationLoss]) -> str:
    return f"{type(row[1]).__name__}-{row[0]}"


@pytest.mark.parametrize(("classes", "loss"), OVER_PIXELS + STRUCTURAL, ids=map(name, OVER_PIXELS + STRUCTURAL))
class TestEveryLoss:
    """What holds for any loss."""

    def make(self, loss: SegmentationLoss, classes: int) -> tuple[Tensor, Tensor]:
        if not isinstance(loss, MsSsim | Hybrid):
            return make(classes)
        _, blocks = make(classes, (6, 7))  # structure, where there is some
        return make(classes, (24, 28))[0], blocks.repeat_interleave(4, dim=1).repeat_interleave(4, dim=2)

    def test_scalar_with_gradient(self, loss: SegmentationLoss, classes: int) -> None:
        logits, mask = self.make(loss, classes)
        value = loss(logits, mask)
        value.backward()
        assert value.shape == ()
        assert value > 0
        assert logits.grad.abs().sum() > 0

    def test_descent_leads_to_the_truth(self, loss: SegmentationLoss, classes: int) -> None:
        logits, mask = self.make(loss, classes)
        mask[0, 0] = IGNORE_INDEX
        optimizer = torch.optim.Adam([logits], lr=0.3)
        for _ in range(60):
            optimizer.zero_grad()
            loss(logits, mask).backward()
            optimizer.step()
        predicted = (logits[:, 0] > 0).long() if classes == 1 else logits.argmax(dim=1)
        assert ((predicted == mask) | (mask == IGNORE_INDEX)).float().mean() > 0.97

    def test_float32_under_autocast(self, loss: SegmentationLoss, classes: int) -> None:
        logits, mask = self.make(loss, classes)
        expected = loss(logits.bfloat16().float(), mask)
        with torch.autocast("cpu", torch.bfloat16):
            value = loss(logits.bfloat16(), mask)
        assert value.dtype == torch.float32
        assert torch.equal(value, expected)

    def test_ignored_pixels_get_no_gradient(self, loss: SegmentationLoss, classes: int) -> None:
        logits, mask = self.make(loss, classes)
        mask[..., 3:] = IGNORE_INDEX
        logits.data[..., 3:] = 1e4  # whatever the net says there
        value = loss(logits, mask)
        value.backward()
        assert value.isfinite()
        assert not logits.grad[..., 3:].any()

    def test_nothing_valid_is_zero(self, loss: SegmentationLoss, classes: int) -> None:
        logits, mask = self.make(loss, classes)
        value = loss(logits, torch.full_like(mask, IGNORE_INDEX))
        value.backward()
        assert value == 0
        assert not logits.grad.any()

    @pytest.mark.parametrize("right", [True, False])
    def test_extreme_logits(self, loss: SegmentationLoss, classes: int, right: bool) -> None:
        _, mask = self.make(loss, classes)
        sign = F.one_hot(mask, max(2, classes)).movedim(-1, 1)[:, -classes:] * 2.0 - 1
        extreme = (sign * (100 if right else -100)).requires_grad_()
        value = loss(extreme, mask)
        value.backward()
        assert value.isfinite()
        assert extreme.grad.isfinite().all()
        assert value < 1e-3 if right else value > 0.4

    def test_gradcheck(self, loss: SegmentationLoss, classes: int) -> None:
        if isinstance(loss, Lovasz | WeightedSum) and not isinstance(loss, Hybrid):
            pytest.skip("Lovasz computes in float32")
        logits, mask = self.make(loss, classes)
        if isinstance(loss, MsSsim | Hybrid):
            logits, mask = logits[:1, :, :12, :11], mask[:1, :12, :11]
        assert torch.autograd.gradcheck(lambda x: loss(x, mask), logits.detach().double().requires_grad_())


def weight_sum(loss: SegmentationLoss, logits: Tensor, mask: Tensor) -> Tensor:
    pixels = torch.bincount(mask[mask != IGNORE_INDEX], minlength=max(2, logits.shape[1]))
    return loss.weight_sum(pixels, logits.shape[1])


@pytest.mark.parametrize(("classes", "loss"), OVER_PIXELS, ids=map(name, OVER_PIXELS))
class TestPixelAndOverlapLosses:
    """What holds for a loss that is a function of pixels, wherever they lie."""

    def test_ignored_pixels_might_as_well_be_cut_out(self, loss: SegmentationLoss, classes: int) -> None:
        logits, mask = make(classes)
        whole = loss(logits[..., :3], mask[..., :3])
        mask[..., 3:] = IGNORE_INDEX
        assert loss(logits, mask).item() == pytest.approx(whole.item(), rel=1e-5)

    def test_a_pixel_of_weight_two_is_two_pixels(self, loss: SegmentationLoss, classes: int) -> None:
        """Up to the number by which a loss of pixels is divided, which pixel weights leave alone."""
        if isinstance(loss, Lovasz | WeightedSum):
            pytest.skip("Lovasz takes no weights")
        logits, mask = make(classes)
        weight = torch.ones(mask.shape)
        weight[:, :, 0] = 2
        doubled = torch.cat([logits, logits[..., :1]], dim=-1), torch.cat([mask, mask[..., :1]], dim=-1)

        def scaled(part: SegmentationLoss, x: Tensor, y: Tensor, w: Tensor | None = None) -> float:
            pixels = isinstance(part, CrossEntropy | Focal)
            return (part(x, y, w) * (weight_sum(part, x, y) if pixels else 1)).item()

        assert scaled(loss, logits, mask, weight) == pytest.approx(scaled(loss, *doubled), rel=1e-4)

    @settings(max_examples=10, deadline=None)
    @given(seed=st.integers(0, 10_000))
    def test_pixels_and_classes_have_no_order(self, loss: SegmentationLoss, classes: int, seed: int) -> None:
        logits, mask = make(classes, seed=seed)
        expected = loss(logits, mask).item()
        order = torch.randperm(mask.numel(), generator=torch.Generator().manual_seed(seed))
        shuffled = (
            logits.movedim(1, 0).flatten(1)[:, order].view(1, classes, 1, -1),
            mask.flatten()[order].view(1, 1, -1),
        )
        assert loss(*shuffled).item() == pytest.approx(expected, rel=1e-4)
        if classes > 1 and all(part.class_weights is None for part in loss.modules() if hasattr(part, "class_weights")):
            other = torch.randperm(classes, generator=torch.Generator().manual_seed(seed))
            assert loss(logits[:, other], other.argsort()[mask]).item() == pytest.approx(expected, rel=1e-4)


def logit(*p: float) -> Tensor:
    """One logit a pixel whose sigmoid is p, in a row."""
    return torch.tensor([math.log(x / (1 - x)) for x in p]).view(1, 1, 1, -1)


def row(*values: int) -> Tensor:
    return torch.tensor(values).view(1, 1, -1)


# Pixels p = 0.95 and 0.4 of the foreground, 0.3 of background; or three classes, p = 0.5, 0.3, 0.2 and 0.1, 0.8, 0.1.
BINARY = logit(0.95, 0.4, 0.3), row(1, 1, 0)
THREE = torch.tensor([[0.5, 0.3, 0.2], [0.1, 0.8, 0.1]]).log().T.reshape(1, 3, 1, 2), row(0, 1)
TP, P, N = 0.95 + 0.4, 0.95 + 0.4 + 0.3, 2
ln = math.log
# p = 0.95 counts twice, 0.4 once, and the third pixel nowhere.
PARTLY = logit(0.95, 0.4, 0.3), row(1, 1, IGNORE_INDEX), torch.tensor([[[2.0, 1.0, 5.0]]])
# p = 0.6 where all is foreground: no variance, so that SSIM is its first factor, (2xy + C) / (x^2 + y^2 + C). In
# float64, as a variance is a difference of means.
EVEN = logit(0.6).double().expand(1, 1, 11, 11), torch.ones(1, 11, 11, dtype=torch.int64)
SSIM = (2 * 0.6 + 0.01**2) / (0.6**2 + 1 + 0.01**2)
FORMULAS = {
    "binary cross-entropy": (CrossEntropy(), BINARY, -(ln(0.95) + ln(0.4) + ln(0.7)) / 3),
    "pos_weight": (CrossEntropy(pos_weight=3.0), BINARY, -(3 * ln(0.95) + 3 * ln(0.4) + ln(0.7)) / 3),
    "cross-entropy": (CrossEntropy(), THREE, -(ln(0.5) + ln(0.8)) / 2),
    "class weights": (CrossEntropy([1.0, 3.0, 9.0]), THREE, -(ln(0.5) + 3 * ln(0.8)) / 4),
    "focal factor 0.0025": (Focal(), (logit(0.95), row(1)), -0.0025 * ln(0.95)),
    "focal factor 0.36": (Focal(), (logit(0.4), row(1)), -0.36 * ln(0.4)),
    "focal": (
        Focal(alpha=0.25, gamma=2.0),
        BINARY,
        -(0.25 * 0.05**2 * ln(0.95) + 0.25 * 0.6**2 * ln(0.4) + 0.75 * 0.3**2 * ln(0.7)) / 3,
    ),
    "focal, alpha a class": (Focal([1.0, 3.0, 9.0]), THREE, -(0.5**2 * ln(0.5) + 3 * 0.2**2 * ln(0.8)) / 4),
    "dice": (Dice(), BINARY, 1 - 2 * TP / (P + N)),
    "jaccard": (Jaccard(), BINARY, 1 - TP / (P + N - TP)),
    "tversky": (Tversky(0.3, 0.7), BINARY, 1 - TP / (TP + 0.3 * (P - TP) + 0.7 * (N - TP))),
    "dice of the two classes there": (Dice(), THREE, ((1 - 2 * 0.5 / 1.6) + (1 - 2 * 0.8 / 2.1)) / 2),
    "jaccard by weights": (Jaccard([1.0, 3.0, 9.0]), THREE, ((1 - 0.5 / 1.1) + 3 * (1 - 0.8 / 1.3)) / 4),
    # Errors of class 0: 0.5 at its pixel, 0.1 at the other. Jaccard loss of {worst} = 1, so the other adds nothing.
    # Of class 1: 0.3 at the other pixel, 0.2 at its own: {other} leaves 1 - 1/2; both, 1.
    "lovasz softmax": (Lovasz(), THREE, (0.5 + (0.3 * 0.5 + 0.2 * 0.5)) / 2),
    # Errors 1 - z of the pixel at 0.4, 1 + z of the background; the first is right beyond the margin. {0.4} wrong: 1/2
    # of the Jaccard index goes; the background too: 1/3 is left.
    "lovasz hinge": (Lovasz(), BINARY, (1 - ln(0.4 / 0.6)) / 2 + (1 + ln(0.3 / 0.7)) / 6),
    "tversky of the two classes there": (Tversky(0.3, 0.7), THREE, 1 - (0.5 / 0.88 + 0.8 / 1.03) / 2),
    "cross-entropy with a weight and an ignored pixel": (CrossEntropy(), PARTLY, -(2 * ln(0.95) + ln(0.4)) / 2),
    "focal with a weight and an ignored pixel": (
        Focal(),
        PARTLY,
        -(2 * 0.05**2 * ln(0.95) + 0.6**2 * ln(0.4)) / 2,
    ),
    "dice with a weight and an ignored pixel": (Dice(), PARTLY, 1 - 2 * (2 * 0.95 + 0.4) / (2 * 0.95 + 0.4 + 3)),
    "ms-ssim of one scale": (MsSsim(), EVEN, (1 - SSIM) / 2),
    "hybrid": (Hybrid(), EVEN, -(0.4**2) * ln(0.6) + (1 - SSIM) / 2 + 0.4),
    "sum": (WeightedSum([Dice(), CrossEntropy()], [2.0, 1.0]), BINARY, 2 - 4 * TP / (P + N) - ln(0.95 * 0.4 * 0.7) / 3),
}


@pytest.mark.parametrize("case", FORMULAS)
def test_formula(case: str) -> None:
    loss, inputs, expected = FORMULAS[case]
    assert loss(*inputs).item() == pytest.approx(expected, rel=1e-5)


def test_cross_entropy_agrees_with_torch() -> None:
    logits, mask = make(4)
    mask[0, 0] = IGNORE_INDEX
    expected = F.cross_entropy(logits, mask, torch.tensor(WEIGHTS), ignore_index=IGNORE_INDEX)
    assert CrossEntropy(WEIGHTS)(logits, mask).item() == pytest.approx(expected.item(), rel=1e-6)
    assert Focal(WEIGHTS, gamma=0.0)(logits, mask).item() == pytest.approx(expected.item(), rel=1e-6)
    binary, target = logits[:, 0], (mask > 1).float()
    expected = F.binary_cross_entropy_with_logits(binary, target, pos_weight=torch.tensor(2.0))
    value = CrossEntropy(pos_weight=2.0)(logits[:, :1], target.long())
    assert value.item() == pytest.approx(expected.item(), rel=1e-6)


@pytest.mark.parametrize("gamma", [0.0, 0.5, 2.0])
def test_focal_agrees_with_torchvision(gamma: float) -> None:
    logits, mask = make(1)
    expected = sigmoid_focal_loss(logits[:, 0], mask.float(), alpha=0.25, gamma=gamma, reduction="mean")
    assert Focal(0.25, gamma)(logits, mask).item() == pytest.approx(expected.item(), rel=1e-5)


@pytest.mark.parametrize("classes", [1, 4])
def test_overlap_agrees_with_segmentation_models_pytorch(classes: int) -> None:
    logits, mask = make(classes, (16, 16))
    mask[0, 0] = IGNORE_INDEX
    mode = "binary" if classes == 1 else "multiclass"
    options = {"ignore_index": IGNORE_INDEX}
    pairs = [(Dice(), smp.losses.DiceLoss), (Lovasz(), smp.losses.LovaszLoss)]
    pairs.append((Tversky(0.3, 0.7), lambda *a, **k: smp.losses.TverskyLoss(*a, alpha=0.3, beta=0.7, **k)))
    for ours, theirs in pairs:
        # Its multiclass Tversky and Dice turn ignored pixels to zeros only for Dice: compare where both ignore.
        target = mask if isinstance(ours, Dice | Lovasz) else mask.clamp(min=0)
        target = target.unsqueeze(1) if classes == 1 and isinstance(ours, Dice | Tversky) else target
        expected = theirs(mode, **options)(logits if target.dim() == 4 or classes > 1 else logits[:, 0], target)
        mine = ours(logits, mask if isinstance(ours, Dice | Lovasz) else mask.clamp(min=0))
        assert mine.item() == pytest.approx(expected.item(), rel=1e-4), type(ours).__name__


def test_overlap_of_hard_predictions_is_one_minus_iou() -> None:
    """At the corners of the cube, Jaccard and Lovasz are the Jaccard loss itself, here of every class."""
    generator = torch.Generator().manual_seed(1)
    mask, predicted = (torch.randint(0, 4, (2, 8, 8), generator=generator) for _ in range(2))
    logits = F.one_hot(predicted, 4).movedim(-1, 1) * 200.0 - 100
    ious = [((mask == c) & (predicted == c)).sum() / ((mask == c) | (predicted == c)).sum() for c in range(4)]
    for loss in (Jaccard(), Lovasz()):
        assert loss(logits, mask).item() == pytest.approx(1 - torch.stack(ious).mean().item(), rel=1e-5)


def test_classes_absent_from_the_batch_are_left_out() -> None:
    """The mean of the losses of classes 0 and 1, each by hand from its own probabilities."""
    logits, mask = make(4, (24, 24))
    present = mask % 2  # classes 0 and 1 alone
    p = logits.softmax(dim=1)
    p, y = p[:, :2].transpose(0, 1).flatten(1), torch.stack([present == 0, present == 1]).flatten(1).float()
    tp, both = (p * y).sum(dim=1), p.sum(dim=1) + y.sum(dim=1)
    assert Dice()(logits, present).item() == pytest.approx((1 - 2 * tp / both).mean().item(), rel=1e-5)
    assert Jaccard()(logits, present).item() == pytest.approx((1 - tp / (both - tp)).mean().item(), rel=1e-5)
    theirs = smp.losses.LovaszLoss("multiclass")  # of the classes present
    assert Lovasz()(logits, present).item() == pytest.approx(theirs(logits, present).item(), rel=1e-4)
    # Images of the classes 2 and 3 may hold anything: here a channel that says more of one and less of the other.
    moved = logits.detach().clone()
    moved[:, 3] = moved[:, 2:].logsumexp(dim=1)
    moved[:, 2] = -1e4
    assert MsSsim()(moved, present).item() == pytest.approx(MsSsim()(logits, present).item(), rel=1e-5)
    for loss in (Dice(), Jaccard(), Tversky(), Lovasz(), MsSsim()):
        assert loss(logits[:, :1], torch.zeros_like(mask)) == 0


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 10_000), st.floats(0.1, 30.0))
def test_overlap_lies_between_zero_and_one(seed: int, scale: float) -> None:
    logits, mask = make(3, seed=seed)
    for loss in (Dice(), Jaccard(), Tversky(), Lovasz()):
        assert 0 <= loss(logits * scale, mask) <= 1 + 1e-6


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 10_000), st.integers(1, 5))
def test_batches_add_up_by_their_weight_sum(seed: int, cut: int) -> None:
    """What makes the loss of a split right however it is batched."""
    logits, mask = make(4, seed=seed)
    parts = [(logits[..., :cut], mask[..., :cut]), (logits[..., cut:], mask[..., cut:])]
    for loss in (CrossEntropy(), CrossEntropy(WEIGHTS), Focal(WEIGHTS)):
        total = sum((loss(*part) * weight_sum(loss, *part)).item() for part in parts)
        assert total == pytest.approx((loss(logits, mask) * weight_sum(loss, logits, mask)).item(), rel=1e-5)


@pytest.mark.parametrize(("size", "scales"), [((176, 181), 5), ((50, 77), 3), ((11, 30), 1)])
def test_ms_ssim_is_that_of_torchmetrics(size: tuple[int, int], scales: int) -> None:
    """Value and gradient, also of noise, whose structure is unlike the truth's (negative similarities)."""
    from torchmetrics.functional.image import multiscale_structural_similarity_index_measure as reference

    p = torch.rand(2, 3, *size, dtype=torch.float64, requires_grad=True)
    y = (torch.rand(2, 3, *size) > 0.7).double()
    betas = torch.tensor(BETAS[:scales], dtype=torch.float64)
    expected = reference(p, y, data_range=1.0, betas=tuple((betas / betas.sum()).tolist()), normalize="simple")
    found = ms_ssim(p, y, scales)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=0)  # torchmetrics' window is of float32 numbers
    torch.testing.assert_close(*(torch.autograd.grad(one, p)[0] for one in (found, expected)), rtol=1e-4, atol=1e-10)


def test_ms_ssim_drops_scales_on_small_sides_and_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    monkeypatch.setattr("segmentation.losses.ms_ssim.rank_zero_warn", said.append)
    for side, scales in ((11, 1), (22, 2), (44, 3), (99, 4), (176, 5)):
        logits, mask = make(1, (side, side))
        loss = MsSsim()
        assert loss.scales(mask) == scales
        assert loss.scales(mask[:, : side - 1] if scales > 1 else mask) == max(1, scales - 1)
        assert 0 < loss(logits, mask) < 1
        assert loss(mask.unsqueeze(1) * 200.0 - 100, mask).item() == pytest.approx(0, abs=1e-4)
    assert "4 of 5 scales" in said[-1]
    with pytest.raises(InputError, match="11 pixels or more"):
        MsSsim()(*make(1, (10, 40)))


def test_hybrid_is_the_sum_of_its_terms() -> None:
    logits, mask = make(4, (24, 24))
    hybrid = Hybrid()
    total = hybrid(logits, mask)
    terms = hybrid.terms
    alone = {"Focal": Focal(), "MsSsim": MsSsim(), "Jaccard": Jaccard()}
    assert terms.keys() == alone.keys()
    for key, loss in alone.items():
        assert terms[key].item() == pytest.approx(loss(logits, mask).item())
    assert total.item() == pytest.approx(sum(terms.values()).item())


def test_terms_of_one_class_are_added_up() -> None:
    logits, mask = make(4)
    loss = WeightedSum([Dice(), Dice(), WeightedSum([Dice(), CrossEntropy()], [2.0, 1.0])], [1.0, 10.0, 0.5])
    total = loss(logits, mask)
    terms = loss.terms
    assert list(terms) == ["Dice", "CrossEntropy"]
    assert terms["Dice"].item() == pytest.approx(12 * Dice()(logits, mask).item(), rel=1e-5)
    expected = 12 * Dice()(logits, mask) + 0.5 * CrossEntropy()(logits, mask)
    assert total.item() == pytest.approx(expected.item(), rel=1e-5)


def test_rules_for_class_weights() -> None:
    """Of 600, 300 and 100 pixels; class 2 occurs in one image of 500 pixels alone."""
    counted = statistics([350, 150, 0, 0], [250, 150, 100, 0])  # class 2 in images of 500 pixels

    def ratios(rule: str) -> list[float]:
        loss = CrossEntropy(class_weights=rule)
        loss.setup(counted)
        assert loss.class_weights[3] == 0  # never seen
        assert (loss.class_weights * torch.tensor(counted.pixels)).sum().item() == pytest.approx(1000)  # of mean 1
        return (loss.class_weights[:3] / loss.class_weights[0]).tolist()

    assert ratios("auto") == pytest.approx([1, 2, 6])
    assert ratios("sqrt_inverse") == pytest.approx([1, 2**0.5, 6**0.5])
    assert ratios("median") == pytest.approx([1, 0.6 / 0.3, 0.6 / 0.2])
    assert ratios("effective") == pytest.approx([1, 2, 6], rel=1e-3)  # below a million pixels
    loss = CrossEntropy(class_weights="effective")
    loss.setup(statistics([10**9, 10**8, 10**5]))
    n = 1 / (1 - (1 - 1e-6) ** 10**5)
    assert (loss.class_weights / loss.class_weights[0]).tolist() == pytest.approx([1, 1, min(n, 10)], rel=1e-3)


def test_weights_over_the_cap_are_named() -> None:
    loss = CrossEntropy(class_weights="auto", max_weight=5.0)
    with pytest.warns(UserWarning, match=r"class 'class1'.*max_weight, 5"):
        loss.setup(statistics([990, 10, 500]))
    assert loss.class_weights.tolist() == pytest.approx([500 / 990, 5.0, 1.0])


def test_auto_of_binary_losses() -> None:
    loss = CrossEntropy(pos_weight="auto")
    loss.setup(statistics([900, 100]))
    assert loss.class_weights.tolist() == [1.0, pytest.approx(9.0)]  # num_neg / num_pos
    logits, mask = make(1)
    for negative in (900, 99_900):  # no cap: alpha / (1 - alpha) = pos_weight = num_neg / num_pos
        cross_entropy, focal = CrossEntropy(pos_weight="auto"), Focal(alpha="auto", gamma=0.0)
        for loss in (cross_entropy, focal):
            loss.setup(statistics([negative, 100]))
        expected = cross_entropy(logits, mask).item() * 100 / (negative + 100)
        assert focal(logits, mask).item() == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("loss", [CrossEntropy(pos_weight="auto"), Focal(alpha="auto")])
def test_auto_without_foreground_is_refused(loss: SegmentationLoss) -> None:
    with pytest.raises(InputError, match="foreground"):
        loss.setup(statistics([1000, 0]))


def test_what_cannot_be_used_is_said() -> None:
    with pytest.raises(InputError, match=r"setup\(statistics\)"):
        CrossEntropy(pos_weight="auto")(torch.zeros(1, 1, 2, 2), torch.zeros(1, 2, 2).long())
    with pytest.raises(InputError, match="has none"):
        CrossEntropy(pos_weight="auto").setup(statistics([10, 0]))
    with pytest.raises(InputError, match="weights for 2 classes, not 3"):
        CrossEntropy([1.0, 2.0])(torch.zeros(1, 3, 2, 2), torch.zeros(1, 2, 2).long())
    with pytest.raises(InputError, match="weights for 3 classes, not 2"):
        CrossEntropy([1.0, 2.0, 3.0])(torch.zeros(1, 1, 2, 2), torch.zeros(1, 2, 2).long())
    with pytest.raises(InputError, match="give one of them"):
        CrossEntropy([1.0, 2.0], pos_weight=2.0)
    with pytest.raises(InputError, match="Lovasz takes no class_weights"):
        Lovasz(WEIGHTS)(*make(4))
    with pytest.raises(InputError, match="1 weights for 2 losses"):
        WeightedSum([Dice(), Jaccard()], [1.0])
    with pytest.raises(InputError, match="pos_weight is for two classes, not 3"):
        CrossEntropy(pos_weight="auto").setup(statistics([1, 2, 3]))
    with pytest.raises(InputError, match="pos_weight, and one alpha, are for two"):
        CrossEntropy(pos_weight=2.0)(torch.zeros(1, 3, 2, 2), torch.zeros(1, 2, 2).long())
    for alpha, classes, said in ((0.25, 4, "for 2 classes, not 4"), ([1.0], 1, "for 1 classes, not 2")):
        with pytest.raises(InputError, match=said):
            Focal(alpha)(torch.zeros(1, classes, 2, 2), torch.zeros(1, 2, 2).long())


@pytest.mark.parametrize("loss", [CrossEntropy, Focal, Dice])
def test_auto_weights_survive_a_checkpoint(loss: type[SegmentationLoss]) -> None:
    trained, fresh = (WeightedSum([loss("auto")]) for _ in range(2))
    trained.setup(statistics([5, 3, 2]))
    fresh.load_state_dict(trained.state_dict())
    assert torch.equal(fresh.losses[0].class_weights, trained.losses[0].class_weights)
    trained, fresh = (CrossEntropy(pos_weight="auto") for _ in range(2))
    trained.setup(statistics([5, 3]))
    fresh.load_state_dict(trained.state_dict())
    assert fresh.class_weights[1].item() == pytest.approx(5 / 3)


def test_terms_are_logged_by_name_and_head() -> None:
    overlay = ["--config", str(ROOT / "configs/model/lovasz.yaml"), "--trainer.max_epochs", "1"]
    overlay += ["--trainer.log_every_n_steps", "1"]
    for name, extra in (
        ("one", []),
        ("heads", ["--model.net.widths", "[4,8,8]", "--model.net.deep_supervision", "true"]),
    ):
        train(*TINY, *overlay, *extra, "--name", name)
        with (Path("runs") / name / "metrics.csv").open() as file:
            columns = set(csv.DictReader(file).fieldnames)
        terms = {"CrossEntropy", "Lovasz"}
        heads = {f"head{k}/{term}" for k in (1, 2) for term in {*terms, "loss"}}
        assert {f"train/{term}" for term in (terms if name == "one" else heads)} <= columns


def test_a_sum_with_auto_weights_is_rebuilt_from_its_checkpoint() -> None:
    Path("sum.yaml").write_text(
        "model: {loss: {class_path: WeightedSum, init_args: {losses: ["
        "{class_path: CrossEntropy, init_args: {class_weights: auto}}, {class_path: Dice}]}}}"
    )
    cli = train(*TINY, "--config", "sum.yaml", "--name", "run", "--trainer.max_epochs", "1")
    path = Path("runs/run/checkpoints/best.ckpt")
    module = SegmentationModule.load_from_checkpoint(path)
    assert torch.equal(module.loss.losses[0].class_weights, cli.model.loss.losses[0].class_weights.cpu())
    # and its loss, image by image, does not depend on the batches
    one, four = (evaluate([str(path), "--data.eval_batch_size", size, "--data.num_workers", "0"]) for size in "14")
    assert one["loss"] == pytest.approx(four["loss"], rel=1e-5)
