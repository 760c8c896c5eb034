"""Augmentation: image, mask, ids and weights move as one, what is not in the picture counts nowhere, seeds decide."""

from typing import Any

import numpy as np
import pytest
import torch
from jsonargparse import ActionConfigFile
from torch import Tensor
from torchvision import tv_tensors
from torchvision.transforms import v2

from conftest import ROOT
from segmentation.data import SegmentationDataModule
from segmentation.data.base import Sample
from segmentation.data.labels import IGNORE_INDEX
from segmentation.data.transforms import Augment, BorderWeight, IntensityJitter
from segmentation.errors import InputError
from segmentation.training.parser import Parser

HEIGHT, WIDTH = 24, 17


def coordinates(dtype: torch.dtype = torch.uint8) -> Sample:
    """Every pixel holds its own coordinates, one above zero, in the image and, packed, in each map."""
    y, x = torch.meshgrid(torch.arange(HEIGHT), torch.arange(WIDTH), indexing="ij")
    code = y * WIDTH + x
    image = torch.stack([y + 1, x + 1, torch.full_like(x, 7)]).to(dtype)
    return Sample(image=image, mask=code, instance=code + 1, weight=code + 1.5)


def check_together(sample: Sample) -> Tensor:
    """Every map says of each pixel what the image says. Returns where there is picture."""
    y, x = sample["image"][0].long() - 1, sample["image"][1].long() - 1
    inside = y >= 0
    code = y * WIDTH + x
    assert torch.equal(sample["mask"], torch.where(inside, code, IGNORE_INDEX))
    assert torch.equal(sample["instance"], torch.where(inside, code + 1, 0))
    assert torch.equal(sample["weight"], torch.where(inside, code + 1.5, 0.0))
    assert sample["mask"].dtype == sample["instance"].dtype == torch.int64
    assert sample["weight"].dtype == torch.float32
    assert all(type(value) is Tensor for value in sample.values())
    return inside


def equal(a: Sample, b: Sample) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


NEAREST = v2.InterpolationMode.NEAREST
MOVES: list[tuple[str, tuple[int, int] | None, list[v2.Transform]]] = [
    ("nothing", None, []),
    ("crop", (11, 9), []),
    ("crop that pads", (40, 9), []),
    ("flips", None, [v2.RandomHorizontalFlip(), v2.RandomVerticalFlip()]),
    ("rotation", (16, 16), [v2.RandomRotation(180, interpolation=NEAREST)]),
    ("affine", None, [v2.RandomAffine(30, (0.2, 0.2), (0.7, 1.4), 10, interpolation=NEAREST)]),
    ("resized crop", None, [v2.RandomResizedCrop((20, 20), interpolation=NEAREST, antialias=False)]),
    ("pad", None, [v2.Pad(3)]),
    ("zoom out", None, [v2.RandomZoomOut(p=1.0)]),
    ("sometimes", None, [v2.RandomApply([v2.RandomRotation(90, expand=True)], 0.5), v2.RandomCrop((9, 9))]),
]


@pytest.mark.parametrize(("crop", "transforms"), [case[1:] for case in MOVES], ids=[case[0] for case in MOVES])
@pytest.mark.parametrize("dtype", [torch.uint8, torch.uint16, torch.float32])
def test_everything_moves_together(crop: Any, transforms: list[v2.Transform], dtype: torch.dtype) -> None:
    augment = Augment(crop, transforms)
    before = coordinates(dtype)
    for seed in range(6):
        after = augment(before, seed)
        assert after["image"].dtype == dtype
        assert after["image"].is_contiguous()
        check_together(after)
    assert equal(before, coordinates(dtype))  # the data set's own tensors are left as they were


@pytest.mark.parametrize("crop", [(8, 8), (HEIGHT, WIDTH), (30, 8), (8, 30), (30, 40), (1, 1)])
def test_crop(crop: tuple[int, int]) -> None:
    corners = set()
    for seed in range(200):
        after = Augment(crop, [])(coordinates(), seed)
        assert tuple(after["mask"].shape) == tuple(after["image"].shape[1:]) == crop
        inside = check_together(after)
        kept = min(crop[0], HEIGHT), min(crop[1], WIDTH)
        assert inside[: kept[0], : kept[1]].all()  # all the picture there is, padded below and right
        assert inside.sum() == kept[0] * kept[1]
        corners.add(tuple(after["image"][:2, 0, 0].tolist()))
    tops, lefts = zip(*corners, strict=True)
    assert (min(tops), min(lefts)) == (1, 1)
    assert (max(tops), max(lefts)) == (max(HEIGHT - crop[0], 0) + 1, max(WIDTH - crop[1], 0) + 1)  # the far edges too


def test_a_rotation_brings_in_ignored_pixels_and_no_class() -> None:
    sample = Sample(image=torch.full((3, 20, 20), 9, dtype=torch.uint8), mask=torch.ones(20, 20, dtype=torch.int64))
    after = Augment(None, [v2.RandomRotation((45, 45))])(sample, 0)
    assert after["mask"].unique().tolist() == [IGNORE_INDEX, 1]
    assert after["mask"][0, 0] == after["mask"][-1, -1] == IGNORE_INDEX
    assert (after["image"][:, after["mask"] == IGNORE_INDEX].float().mean() < 5).all()


BILINEAR = v2.InterpolationMode.BILINEAR
FILLING: dict[str, tuple[tuple[int, int] | None, list[v2.Transform]]] = {
    "affine": (None, [v2.RandomAffine(30, (0.2, 0.2), (0.5, 2.5), 10, interpolation=BILINEAR)]),
    "bicubic": (None, [v2.RandomRotation(90), v2.Resize(70, v2.InterpolationMode.BICUBIC)]),
    "rotation": ((32, 40), [v2.RandomRotation(180, interpolation=BILINEAR)]),
    "perspective": (None, [v2.RandomPerspective(0.7, p=1.0)]),
    "elastic": (None, [v2.ElasticTransform(120.0)]),
    "zoom out": (None, [v2.RandomZoomOut(p=1.0), v2.Resize((40, 40))]),
    "pad": (None, [v2.Pad(5), v2.RandomResizedCrop((33, 33))]),
    "crop with padding": (None, [v2.RandomCrop((60, 60), padding=4, pad_if_needed=True), v2.Resize(37)]),
    "one after the other": (
        (60, 30),
        [
            v2.RandomApply([v2.RandomRotation((40, 40), interpolation=BILINEAR)], 1.0),
            v2.Resize((150, 150)),
            v2.ElasticTransform(),
            v2.CenterCrop(50),
            v2.GaussianBlur(5),
            v2.RandomHorizontalFlip(),
        ],
    ),
}


@pytest.mark.parametrize("name", FILLING)
@pytest.mark.parametrize("dtype", [torch.uint8, torch.uint16, torch.float32])
def test_pixels_that_hold_some_of_the_fill_are_ignored(name: str, dtype: torch.dtype) -> None:
    """Of an image that is white all over, every pixel that counts is white, and the others are not."""
    crop, transforms = FILLING[name]
    augment = Augment(crop, transforms, zoom=(0.5, 2.0) if crop else None)
    white = {torch.uint8: 255, torch.uint16: 65535, torch.float32: 1.0}[dtype]
    sample = Sample(image=torch.full((3, 48, 48), white).to(dtype), mask=torch.zeros(48, 48, dtype=torch.int64))
    ignored = 0.0
    for seed in range(6):
        after = augment(sample, seed)
        shade = after["image"].double().mean(0) / white
        counts = after["mask"] == 0
        assert (shade[counts] > 1 - 2e-3).all()
        if name not in ("one after the other", "bicubic"):  # these blur, and overshoot
            assert torch.equal(counts, (shade - 1).abs() < 1e-3)
        ignored += (~counts).float().mean()
    assert 0 < ignored < 6


def test_reflected_pixels_have_reflected_labels() -> None:
    augment = Augment(None, [v2.Pad(5, padding_mode="reflect"), v2.RandomCrop(20, padding=3, padding_mode="edge")])
    for seed in range(4):
        assert check_together(augment(coordinates(), seed)).all()


ARGUMENTS: dict[str, Any] = {
    "CenterCrop": {"size": 16},
    "Compose": {"transforms": [v2.RandomVerticalFlip(1.0)]},
    "ConvertBoundingBoxFormat": {"format": "XYXY"},
    "CutMix": {"num_classes": 3},
    "FiveCrop": {"size": 16},
    "GaussianBlur": {"kernel_size": 3},
    "JPEG": {"quality": 99},
    "LinearTransformation": {"transformation_matrix": torch.eye(1728), "mean_vector": torch.zeros(1728)},
    "MixUp": {"num_classes": 3},
    "Normalize": {"mean": [0.5], "std": [0.5]},
    "Pad": {"padding": 3},
    "RandomAdjustSharpness": {"sharpness_factor": 2},
    "RandomAffine": {"degrees": 30},
    "RandomApply": {"transforms": [v2.RandomVerticalFlip(1.0)]},
    "RandomChoice": {"transforms": [v2.RandomVerticalFlip(1.0)]},
    "RandomCrop": {"size": 16},
    "RandomOrder": {"transforms": [v2.RandomVerticalFlip(1.0)]},
    "RandomPosterize": {"bits": 4},
    "RandomResize": {"min_size": 16, "max_size": 24},
    "RandomResizedCrop": {"size": 16},
    "RandomRotation": {"degrees": 30},
    "RandomShortestSize": {"min_size": 16},
    "RandomSolarize": {"threshold": 0.5},
    "Resize": {"size": 16},
    "ScaleJitter": {"target_size": (24, 24)},
    "SetClampingMode": {"clamping_mode": "hard"},
    "TenCrop": {"size": 16},
    "ToDtype": {"dtype": torch.float32},
    "UniformTemporalSubsample": {"num_samples": 3},
}
REFUSED = {
    *("AugMix", "AutoAugment", "CutMix", "FiveCrop", "Grayscale", "MixUp", "RandAugment", "RandomIoUCrop"),
    *("SanitizeBoundingBoxes", "SanitizeKeyPoints", "TenCrop", "ToPILImage", "TrivialAugmentWide"),
}
FOR_BYTES = {
    *("ColorJitter", "GaussianNoise", "JPEG", "RGB"),
    *("RandomAdjustSharpness", "RandomAutocontrast", "RandomChannelPermutation", "RandomEqualize", "RandomGrayscale"),
    *("RandomInvert", "RandomPhotometricDistort", "RandomPosterize", "RandomSolarize"),
}
FOR_FLOATS = {"ConvertImageDtype", "LinearTransformation", "Normalize", "ToDtype"}
KINDS = [name for name in dir(v2) if name[0].isupper() and name not in ("InterpolationMode", "AutoAugmentPolicy")]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", [name for name in KINDS if name not in ("Transform", "Lambda")])
@pytest.mark.parametrize("dtype", [torch.uint8, torch.uint16, torch.float32])
def test_every_transform_of_torchvision_is_right_or_refused(name: str, dtype: torch.dtype) -> None:
    """The half of the image that its class says is bright is bright; else one line says which transforms to take."""
    transform = getattr(v2, name)(**ARGUMENTS.get(name, {}))
    mask = torch.zeros(24, 24, dtype=torch.int64)
    mask[:, 12:] = 1
    bright = {torch.uint8: 200, torch.uint16: 50000, torch.float32: 37.0}[dtype]
    sample = Sample(image=(mask * bright).to(dtype).expand(3, -1, -1).contiguous(), mask=mask)
    augment = Augment(None, [transform])
    refused = {torch.uint8: FOR_FLOATS, torch.uint16: FOR_FLOATS | FOR_BYTES, torch.float32: FOR_BYTES}[dtype]
    if name in REFUSED | refused:
        with pytest.raises(InputError, match=r"^[^\n]*(With masks go|Use IntensityJitter|Remove ToDtype)[^\n]*$"):
            augment(sample, 1)
        return
    after = augment(sample, 1)
    image = after["image"].float().mean(0)
    assert after["image"].dtype == dtype
    assert len(after["image"]) == 3
    assert image.shape == after["mask"].shape
    if name not in ("Normalize", "RandomInvert", "RandomSolarize"):
        light = image > (image.max() + image.min()) / 2
        agrees = light == (after["mask"] == 1)
        assert agrees[after["mask"] != IGNORE_INDEX].float().mean() > 0.8


def test_ignored_pixels_stay_ignored() -> None:
    mask = torch.tensor([[0, 1], [IGNORE_INDEX, 2]])
    after = Augment(None, [v2.RandomHorizontalFlip(1.0)])(Sample(image=torch.zeros(3, 2, 2), mask=mask), 0)
    assert after["mask"].tolist() == [[1, 0], [2, IGNORE_INDEX]]


def test_masks_are_never_interpolated_nor_coloured() -> None:
    mask = torch.zeros(32, 32, dtype=torch.int64)
    mask[8:20, 5:30] = 4
    image = torch.randint(0, 255, (3, 32, 32), dtype=torch.uint8)
    transforms = [
        v2.RandomRotation(40, interpolation=v2.InterpolationMode.BILINEAR),
        v2.RandomResizedCrop(24),
        v2.ElasticTransform(),
        v2.ColorJitter(0.5, 0.5, 0.5, 0.1),
        v2.GaussianBlur(5),
    ]
    for seed in range(5):
        after = Augment(None, transforms)(Sample(image=image, mask=mask), seed)
        assert set(after["mask"].unique().tolist()) <= {IGNORE_INDEX, 0, 4}
        assert not torch.equal(after["image"], image[:, :24, :24])


def test_the_seed_alone_decides() -> None:
    augment = Augment((10, 10), [v2.RandomHorizontalFlip(), v2.RandomRotation(30), v2.ColorJitter(0.5)])
    torch.manual_seed(1)
    first = augment(coordinates(), 5)
    torch.manual_seed(2)
    torch.rand(3)
    assert equal(augment(coordinates(), 5), first)
    results = [augment(coordinates(), seed)["image"].numpy().tobytes() for seed in range(20)]
    assert len(set(results)) == 20


def test_global_generators_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    def touched(*_: Any) -> None:
        raise AssertionError("the GPU's generator was seeded")

    monkeypatch.setattr(torch.cuda, "manual_seed_all", touched)
    torch.default_generator.manual_seed(3)
    expected = torch.rand(4)
    torch.default_generator.manual_seed(3)
    Augment((8, 8), [v2.RandomRotation(30)])(coordinates(), 99)
    assert torch.equal(torch.rand(4), expected)


@pytest.mark.parametrize(
    "transform", [v2.ToDtype(torch.float32, scale=True), v2.ToDtype({tv_tensors.Image: torch.float32, "others": None})]
)
def test_a_transform_that_changes_the_type_is_refused(transform: v2.Transform) -> None:
    with pytest.raises(InputError, match=r"turns torch\.uint8 images into torch\.float32.*Remove ToDtype"):
        Augment(None, [v2.RandomHorizontalFlip(), transform])(coordinates(), 0)


@pytest.mark.parametrize("fill", [255, 1.0, 1, {tv_tensors.Image: [124, 116, 104], "others": 0}, {tv_tensors.Image: 1}])
def test_what_a_transform_fills_in_is_ignored_whatever_it_is(fill: Any) -> None:
    sample = Sample(image=torch.full((3, 20, 20), 9, dtype=torch.uint8), mask=torch.ones(20, 20, dtype=torch.int64))
    for transform in (
        v2.RandomRotation((45, 45), fill=fill),
        v2.RandomApply([v2.RandomAffine((45, 45), fill=fill, interpolation=BILINEAR)], 1.0),
        v2.Pad(3, fill=fill),
    ):
        after = Augment(None, [transform])(sample, 0)
        assert after["mask"][0, 0] == IGNORE_INDEX
        assert after["mask"].unique().tolist() == [IGNORE_INDEX, 1]
        assert after["image"][:, after["mask"] == 1].unique().tolist() == [9]


def test_border_weight_is_equation_2_of_the_paper() -> None:
    """Against distances to every pixel of every object, by hand."""
    rng = np.random.default_rng(0)
    ids = np.zeros((40, 50), np.int64)
    for number, (y, x) in enumerate(rng.integers(2, 34, (5, 2)), start=1):
        ids[y : y + rng.integers(3, 7), x : x + rng.integers(3, 7)] = number * 10
    yx = np.stack(np.indices(ids.shape), axis=-1).astype(float)
    far = [
        np.linalg.norm(yx[:, :, None] - yx[ids == number], axis=-1).min(axis=2) for number in np.unique(ids) if number
    ]
    d1, d2 = np.sort(far, axis=0)[:2]
    expected = 1 + 10 * np.exp(-((d1 + d2) ** 2) / (2 * 5**2)) * (ids == 0)
    sample = {"image": torch.zeros(3, 40, 50), "mask": torch.zeros(40, 50), "instance": torch.from_numpy(ids)}
    assert BorderWeight()(sample)["weight"].numpy() == pytest.approx(expected, abs=1e-4)
    assert expected.max() > 5


@pytest.mark.parametrize("ids", [0, 3])
def test_border_weight_of_none_or_one_object_is_one(ids: int) -> None:
    sample = Sample(
        image=torch.zeros(3, 8, 8, dtype=torch.uint8),
        mask=torch.zeros(8, 8, dtype=torch.int64),
        instance=torch.full((8, 8), ids),
    )
    weight = Augment((6, 6), [v2.RandomHorizontalFlip(1.0), BorderWeight()])(sample, 0)["weight"]
    assert weight.dtype == torch.float32
    assert torch.equal(weight, torch.ones(6, 6))


def test_border_weight_without_instances_says_what_to_do() -> None:
    sample = Sample(image=torch.zeros(3, 8, 8, dtype=torch.uint8), mask=torch.zeros(8, 8, dtype=torch.int64))
    with pytest.raises(InputError, match="`instances`"):
        Augment(None, [BorderWeight()])(sample, 0)


@pytest.mark.parametrize("preset", ["none", "light", "strong"])
@pytest.mark.parametrize("dtype", [torch.uint8, torch.uint16, torch.float32])
@pytest.mark.parametrize("bands", [1, 2, 3, 4, 7])
def test_presets_take_any_image(preset: str, dtype: torch.dtype, bands: int) -> None:
    """Each preset in configs/, built as the command line builds it, moves image, mask, ids and weights together."""
    parser = Parser()
    parser.add_argument("--config", action=ActionConfigFile)
    parser.add_lightning_class_args(SegmentationDataModule, "data")
    overlay = str(ROOT / f"configs/data/augment_{preset}.yaml")
    built = parser.instantiate_classes(parser.parse_args(["--config", overlay, "--data.dataset", "ShapesData"]))
    augment = Augment((40, 40), built.data.augment.transforms)
    top = {torch.uint8: 255, torch.uint16: 65535, torch.float32: 3.0}[dtype]
    where = torch.zeros(48, 56, dtype=torch.int64)
    where[10:30, 16:40] = 1
    image = (where.float() * 0.8 * top).to(dtype).expand(bands, -1, -1).contiguous()
    sample = Sample(image=image, mask=where, instance=where * 7, weight=where * 2.0)
    for seed in range(8):
        out = augment(sample, seed)
        assert (out["image"].dtype, out["image"].shape) == (dtype, (bands, 40, 40))
        valid = out["mask"] != IGNORE_INDEX
        assert torch.equal(out["instance"][valid] == 7, out["mask"][valid] == 1)
        assert torch.equal(out["weight"][valid] == 2, out["mask"][valid] == 1)
        bright = out["image"].float().mean(0)
        inside, outside = bright[out["mask"] == 1], bright[valid & (out["mask"] == 0)]
        if len(inside) and len(outside):  # the image has moved as the mask has
            assert inside.median() > outside.median()
    if preset == "none":
        assert torch.equal(augment(sample, 0)["image"].float().unique(), image.float().unique())


@pytest.mark.parametrize(("dtype", "bands"), [(torch.float32, 3), (torch.uint16, 1), (torch.uint8, 5)])
@pytest.mark.parametrize("wrapped", [False, True])
def test_torchvisions_colours_are_refused_with_the_reason(dtype: torch.dtype, bands: int, wrapped: bool) -> None:
    jitter = v2.ColorJitter(0.3)
    augment = Augment(None, [v2.RandomApply([jitter]) if wrapped else jitter])
    sample = Sample(image=torch.ones(bands, 8, 8).to(dtype), mask=torch.zeros(8, 8, dtype=torch.int64))
    with pytest.raises(InputError, match=r"ColorJitter is for 8-bit images of one or three channels.*IntensityJitter"):
        augment(sample, 0)


def test_intensity_jitter_is_its_formula() -> None:
    image = torch.rand(5, 9, 9, generator=torch.Generator().manual_seed(1)) * 40 - 7  # no range is assumed
    torch.manual_seed(3)
    out = IntensityJitter(brightness=0.4, contrast=0.3, bands=0.2)({"image": image})["image"]
    torch.manual_seed(3)
    c, b, each = 1 + 0.3 * (2 * torch.rand(()) - 1), 2 * torch.rand(()) - 1, 2 * torch.rand(5, 1, 1) - 1
    m, s = image[:, ::4, ::4].mean(), image[:, ::4, ::4].std(correction=0)
    torch.testing.assert_close(out.as_subclass(torch.Tensor), m + c * (image - m) + (0.4 * b + 0.2 * each) * s)


def test_intensity_jitter_rounds_integers_and_keeps_their_range() -> None:
    image = torch.arange(256, dtype=torch.uint8).reshape(1, 16, 16)
    torch.manual_seed(5)
    out = IntensityJitter(brightness=0.5, contrast=0.3)({"image": image})["image"]
    torch.manual_seed(5)
    exact = IntensityJitter(brightness=0.5, contrast=0.3)({"image": image.float()})["image"]
    assert out.dtype == torch.uint8
    assert torch.equal(out.float(), exact.round().clamp(0, 255))


def test_a_crop_about_a_pixel_holds_it_wherever_it_may() -> None:
    mask = torch.zeros(20, 20, dtype=torch.int64)
    mask[9, 11] = 1
    sample = Sample(image=torch.zeros(1, 20, 20), mask=mask)
    found = [Augment((3, 4), [])(sample, seed, focus=[1])["mask"].nonzero().tolist() for seed in range(300)]
    assert all(len(pixels) == 1 for pixels in found)
    assert {tuple(pixels[0]) for pixels in found} == {(row, column) for row in range(3) for column in range(4)}


def test_zoom_never_mixes_classes() -> None:
    mask = torch.randint(0, 2, (32, 32), generator=torch.Generator().manual_seed(0)) * 6
    sample = Sample(image=torch.zeros(1, 32, 32), mask=mask, instance=mask * 5)
    for seed in range(10):
        after = Augment((24, 24), [], zoom=(0.9, 1.9))(sample, seed)
        assert set(after["mask"].unique().tolist()) <= {0, 6, IGNORE_INDEX}
        assert set(after["instance"].unique().tolist()) <= {0, 30}


def test_zoom_scales_image_and_mask_alike() -> None:
    """A disk of known size: after a zoom of exactly 2 (or 1/2) its area is 4 times (or a quarter) what it was."""
    y, x = torch.meshgrid(torch.arange(128), torch.arange(128), indexing="ij")
    mask = (((y - 64) ** 2 + (x - 64) ** 2) < 15**2).long()
    sample = Sample(image=(mask * 200).to(torch.uint8)[None], mask=mask)
    area = int(mask.sum())
    for factor in (0.5, 1.0, 2.0):
        augment = Augment((64, 64), [], zoom=(factor, factor))
        seen = []
        for seed in range(30):
            out = augment(sample, seed, focus=[1])
            assert out["image"].shape == (1, 64, 64)
            assert ((out["image"][0] > 100) == (out["mask"] == 1)).float().mean() > 0.97
            seen.append(int((out["mask"] == 1).sum()))
        assert min(seen) > 0  # focus: each crop holds the class
        if factor < 2:  # so that a crop can hold all of it
            assert max(seen) == pytest.approx(area * factor**2, rel=0.05)
    for zoom, crop in (((0.5, 2.0), None), ((0.0, 2.0), (8, 8)), ((2.0, 1.0), (8, 8))):
        with pytest.raises(InputError, match=r"data\.zoom .* needs data\.crop"):
            Augment(crop, [], zoom=zoom)
