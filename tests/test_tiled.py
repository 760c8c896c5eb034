"""Tiles and symmetries: where nothing is lost they change nothing, and else they are the mean they say."""

import itertools

import pytest
import torch
from torch import Tensor, nn

from segmentation.errors import InputError
from segmentation.inference.predictor import MeanOverSymmetries
from segmentation.nets import Heads, SegmentationNet, UNet
from segmentation.nets.tiles import Tiles


class Local(SegmentationNet):
    """A net of stride 4 that sees no farther than `REACH` pixels: a pooled and an unpooled path of 3x3 convolutions."""

    REACH = 4 + 2
    stride = 4

    def __init__(self, classes: int) -> None:
        super().__init__(3, classes)
        torch.manual_seed(0)
        self.fine, self.coarse = nn.Conv2d(3, classes, 3, padding=1), nn.Conv2d(3, classes, 1)

    def compute(self, image: Tensor, level: int | None = None) -> Heads:
        pooled = nn.functional.max_pool2d(image, 4)
        return Heads((self.fine(image) + nn.functional.interpolate(self.coarse(pooled), scale_factor=4.0),))


def tiled(net: SegmentationNet, image: Tensor, tile: int | None) -> Tensor:
    """Logits of images, by tiles."""
    strips = Tiles(net.stride, tile).strips(image, lambda part: [net.predict(part)])
    return torch.cat([logits for _, (logits,) in strips], dim=-2)


def chances(logits: Tensor) -> Tensor:
    return logits.sigmoid() if logits.shape[1] == 1 else logits.softmax(dim=1)


@pytest.mark.parametrize("classes", [1, 3])
@pytest.mark.parametrize("size", [(50, 93), (32, 200), (33, 33)])
def test_tiles_equal_the_whole_away_from_their_borders(classes: int, size: tuple[int, int]) -> None:
    net = Local(classes).eval()
    tiles = Tiles(net.stride, 32)
    image = torch.randn(2, 3, *size)
    whole, found = chances(net.predict(image)), chances(tiled(net, image, 32))
    far = torch.ones(size, dtype=torch.bool)  # from the edges of tiles that are not the image's own
    for side, length in enumerate(size):
        for start in tiles.starts(length):
            for edge in (start, start + tiles.side):
                if 0 < edge < length:
                    far.narrow(side, max(0, edge - net.REACH), min(2 * net.REACH, length - edge + net.REACH)).fill_(
                        False
                    )
    assert far.float().mean() > 0.1
    torch.testing.assert_close(found[..., far], whole[..., far], rtol=1e-5, atol=1e-6)


def test_a_net_that_sees_one_pixel_is_the_same_everywhere() -> None:
    net = Local(3).eval()
    nn.init.zeros_(net.coarse.weight)
    net.fine.weight.data[..., [0, 0, 0, 1, 1, 2, 2, 2], [0, 1, 2, 0, 2, 0, 1, 2]] = 0
    image = torch.randn(1, 3, 75, 131)
    torch.testing.assert_close(chances(tiled(net, image, 16)), chances(net.predict(image)))


def test_tiles_lie_on_the_grid_of_the_net_and_cover_the_image() -> None:
    tiles = Tiles(4, 30)
    assert tiles.side == 32
    for length in range(1, 200):
        starts = tiles.starts(length)
        assert starts[0] == 0
        assert all(start % 4 == 0 for start in starts)
        assert starts[-1] + 32 >= length
        assert all(0 < b - a <= 24 for a, b in itertools.pairwise(starts))


class Ramp(SegmentationNet):
    """Says where in its input a pixel is: the probability is its distance from the left, and from the top."""

    stride = 4

    def __init__(self) -> None:
        super().__init__(3, 1)
        self.place = nn.Parameter(torch.zeros(()))  # of the net's device

    def compute(self, image: Tensor, level: int | None = None) -> Heads:
        rows, columns = (torch.arange(side) + 0.5 for side in image.shape[-2:])
        return Heads((torch.logit(rows[:, None] * columns / rows.numel() / columns.numel())[None, None],))


def test_a_tile_counts_by_a_gaussian_about_its_middle() -> None:
    """Of sigma = tile / 8: what a net says of a tile's border, where it sees least, hardly counts."""
    found = chances(tiled(Ramp(), torch.zeros(1, 3, 56, 56), 32))[0, 0]
    place = torch.arange(56) + 0.5  # tiles begin at 0 and at 24
    says, weights = [], []
    for start in (0, 24):
        inside = (place > start) & (place < start + 32)
        says.append((place - start) / 32)
        weights.append(torch.where(inside, torch.exp(-(((place - start - 16) / 4) ** 2) / 2), 0.0))
    one = (says[0] * weights[0] + says[1] * weights[1]) / (weights[0] + weights[1])
    torch.testing.assert_close(found, one[:, None] * one, rtol=1e-4, atol=1e-5)
    assert one[24:32].diff().min() < -0.1  # from one tile's word to the other's


def test_strips_are_rows_of_tiles() -> None:
    """No more of the answer is held than a row of tiles."""
    net = Local(2).eval()
    strips = list(Tiles(4, 32).strips(torch.randn(1, 3, 150, 70), lambda part: net(part).logits))
    assert [logits.shape[-2] for _, (logits,) in strips] == [rows.stop - rows.start for rows, _ in strips]
    assert all(rows.stop - rows.start <= 32 for rows, _ in strips)
    assert sum(rows.stop - rows.start for rows, _ in strips) == 150


@pytest.mark.parametrize("tile", [None, 32])
def test_all_symmetries_commute_with_turning_the_image(tile: int | None) -> None:
    net = MeanOverSymmetries(Local(3).eval(), "all")
    net.stride = 4
    image = torch.randn(1, 3, 56, 56)  # on which the tiles lie alike from either end
    found = chances(tiled(net, image, tile))
    torch.testing.assert_close(chances(tiled(net, image.rot90(1, (2, 3)), tile)), found.rot90(1, (2, 3)))
    torch.testing.assert_close(chances(tiled(net, image.flip(2), tile)), found.flip(2))


@pytest.mark.parametrize("classes", [1, 3])
def test_flips_are_the_mean_of_four(classes: int) -> None:
    net = UNet(num_classes=classes, widths=(4, 8)).eval()
    image = torch.randn(1, 3, 31, 45)
    flips = ((), (2,), (3,), (2, 3))
    expected = torch.stack([chances(net.predict(image.flip(d))).flip(d) for d in flips]).mean(dim=0)
    torch.testing.assert_close(chances(MeanOverSymmetries(net, "flips").predict(image)), expected)


def test_without_either_the_logits_are_the_nets() -> None:
    net = UNet(num_classes=3, widths=(4, 8)).eval()
    image = torch.randn(1, 3, 31, 45)
    assert torch.equal(tiled(net, image, None), net.predict(image))


def test_a_tile_must_hold_something() -> None:
    with pytest.raises(InputError, match="32 at least"):
        Tiles(UNet().stride, 16)
