"""The losses: one contract over all of them, and each against its formula."""

import math

import pytest
import torch
import torch.nn.functional as F

from segmentation.data import IGNORE_INDEX, Census
from segmentation.errors import InputError
from segmentation.losses import CrossEntropy, SegmentationLoss


def census(pixels: list[int]) -> Census:
    return Census(sizes=[(1, sum(pixels))], pixels=pixels, ignored=0, mean=[0.0], std=[1.0])


LOSSES: list[SegmentationLoss] = [
    CrossEntropy(),
    CrossEntropy(class_weights=[0.5, 2.0, 1.0, 3.0]),
    CrossEntropy(pos_weight=3.0),
]


@pytest.mark.parametrize("classes", [1, 4])
@pytest.mark.parametrize("loss", LOSSES, ids=range(len(LOSSES)))
class TestEveryLoss:
    """What holds for any loss, binary (one logit) and multiclass."""

    def make(self, classes: int) -> tuple[torch.Tensor, torch.Tensor]:
        generator = torch.Generator().manual_seed(0)
        logits = torch.randn(2, classes, 6, 5, generator=generator, requires_grad=True)
        mask = torch.randint(0, max(2, classes), (2, 6, 5), generator=generator)
        return logits, mask

    def test_scalar_with_gradient(self, loss: SegmentationLoss, classes: int) -> None:
        logits, mask = self.make(classes)
        value = loss(logits, mask)
        value.backward()
        assert value.shape == ()
        assert value > 0
        assert logits.grad.abs().sum() > 0

    def test_float32_under_autocast(self, loss: SegmentationLoss, classes: int) -> None:
        logits, mask = self.make(classes)
        expected = loss(logits.bfloat16().float(), mask)
        with torch.autocast("cpu", torch.bfloat16):
            value = loss(logits.bfloat16(), mask)
        assert value.dtype == torch.float32
        assert torch.equal(value, expected)

    def test_ignored_pixels_might_as_well_be_cut_out(self, loss: SegmentationLoss, classes: int) -> None:
        logits, mask = self.make(classes)
        whole = loss(logits[..., :3], mask[..., :3])
        mask[..., 3:] = IGNORE_INDEX
        logits.data[..., 3:] = 1e4  # whatever the net says there
        value = loss(logits, mask)
        assert value.item() == pytest.approx(whole.item(), rel=1e-6)
        value.backward()
        assert not logits.grad[..., 3:].any()

    def test_nothing_valid_is_zero(self, loss: SegmentationLoss, classes: int) -> None:
        logits, mask = self.make(classes)
        value = loss(logits, torch.full_like(mask, IGNORE_INDEX))
        value.backward()
        assert value == 0
        assert not logits.grad.any()

    def test_extreme_logits(self, loss: SegmentationLoss, classes: int) -> None:
        logits, mask = self.make(classes)
        extreme = (logits.detach().sign() * 100).requires_grad_()
        value = loss(extreme, mask)
        value.backward()
        assert value.isfinite()
        assert extreme.grad.isfinite().all()

    def test_pixel_weight_is_a_factor(self, loss: SegmentationLoss, classes: int) -> None:
        logits, mask = self.make(classes)
        weight = torch.full(mask.shape, 2.5)
        assert loss(logits, mask, weight).item() == pytest.approx(2.5 * loss(logits, mask).item(), rel=1e-6)

    def test_gradcheck(self, loss: SegmentationLoss, classes: int) -> None:
        logits, mask = self.make(classes)
        assert torch.autograd.gradcheck(lambda x: loss(x, mask), logits.detach().double().requires_grad_())


def test_binary_formula() -> None:
    """-pos_weight y log p - (1 - y) log(1 - p), by hand: p = 0.75, 0.25; y = 1, 0; pos_weight = 3."""
    logits = torch.tensor([math.log(3.0), -math.log(3.0)]).view(1, 1, 1, 2)
    value = CrossEntropy(pos_weight=3.0)(logits, torch.tensor([[[1, 0]]]))
    assert value.item() == pytest.approx((3 * -math.log(0.75) - math.log(0.75)) / 2, rel=1e-6)


def test_agrees_with_torch() -> None:
    generator = torch.Generator().manual_seed(0)
    logits, mask = torch.randn(2, 4, 5, 6, generator=generator), torch.randint(0, 4, (2, 5, 6), generator=generator)
    mask[0, 0] = IGNORE_INDEX
    weights = [0.5, 2.0, 1.0, 3.0]
    expected = F.cross_entropy(logits, mask, torch.tensor(weights), ignore_index=IGNORE_INDEX)
    assert CrossEntropy(weights)(logits, mask).item() == pytest.approx(expected.item(), rel=1e-6)
    assert CrossEntropy()(logits, mask).item() == pytest.approx(F.cross_entropy(logits, mask).item(), rel=1e-6)
    binary, target = logits[:, 0], (mask > 1).float()
    expected = F.binary_cross_entropy_with_logits(binary, target, pos_weight=torch.tensor(2.0))
    value = CrossEntropy(pos_weight=2.0)(logits[:, :1], target.long())
    assert value.item() == pytest.approx(expected.item(), rel=1e-6)


def test_auto_weights_come_from_the_census() -> None:
    loss = CrossEntropy(pos_weight="auto")
    loss.setup(census([900, 100]))
    assert loss.pos_weight.item() == 9.0  # num_neg / num_pos
    loss = CrossEntropy(class_weights="auto")
    loss.setup(census([600, 300, 100, 0]))
    assert loss.class_weights.tolist() == pytest.approx([1000 / 2400, 1000 / 1200, 1000 / 400, 0.0])


def test_auto_without_census_or_foreground_says_what_to_do() -> None:
    with pytest.raises(InputError, match=r"setup\(census\)"):
        CrossEntropy(pos_weight="auto")(torch.zeros(1, 1, 2, 2), torch.zeros(1, 2, 2).long())
    with pytest.raises(InputError, match="has none"):
        CrossEntropy(pos_weight="auto").setup(census([10, 0]))


def test_auto_weights_survive_a_checkpoint() -> None:
    loss = CrossEntropy(class_weights="auto")
    loss.setup(census([5, 3, 2]))
    fresh = CrossEntropy(class_weights="auto")
    fresh.load_state_dict(loss.state_dict())
    assert torch.equal(fresh.class_weights, loss.class_weights)


def test_wrong_number_of_weights() -> None:
    with pytest.raises(InputError, match="2 numbers for 3 classes"):
        CrossEntropy([1.0, 2.0])(torch.zeros(1, 3, 2, 2), torch.zeros(1, 2, 2).long())
