"""Reading images and masks: what Pillow wrote comes back, and what cannot be read is named with its remedy."""

import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from segmentation.data.files import read_image, read_mask
from segmentation.errors import InputError

RNG = np.random.default_rng(0)
RGB = RNG.integers(0, 256, (7, 5, 3), dtype=np.uint8)
GRAY = RNG.integers(0, 256, (7, 5), dtype=np.uint8)
BITS = RNG.integers(0, 2, (7, 5), dtype=np.uint8)


def palette(values: np.ndarray, colors: list[int]) -> Image.Image:
    image = Image.frombytes("P", (values.shape[1], values.shape[0]), values.tobytes())
    image.putpalette(colors)
    return image


@pytest.mark.parametrize("suffix", ["png", "bmp", "tif", "tiff", "webp", "PNG"])
def test_lossless_rgb(suffix: str) -> None:
    Image.fromarray(RGB).save(f"a.{suffix}", **({"lossless": True} if suffix == "webp" else {}))
    image = read_image(Path(f"a.{suffix}"), 3)
    assert image.dtype == np.uint8
    assert (image == RGB.transpose(2, 0, 1)).all()


@pytest.mark.parametrize("suffix", ["jpg", "jpeg"])
def test_jpeg(suffix: str) -> None:
    smooth = np.add.outer(np.arange(32), np.arange(24)).astype(np.uint8)
    Image.fromarray(np.stack([smooth, smooth + 50, smooth + 100], -1)).save(f"a.{suffix}", quality=95)
    image = read_image(Path(f"a.{suffix}"), 3)
    assert image.shape == (3, 32, 24)
    assert np.abs(image.astype(int) - np.stack([smooth, smooth + 50, smooth + 100])).max() < 8


@pytest.mark.parametrize("suffix", ["png", "bmp", "tif"])
def test_gray(suffix: str) -> None:
    Image.fromarray(GRAY).save(f"a.{suffix}")
    assert (read_image(Path(f"a.{suffix}"), 1) == GRAY[None]).all()
    assert (read_mask(Path(f"a.{suffix}")) == GRAY).all()


def test_what_is_read_is_torchs_to_write() -> None:
    Image.fromarray(GRAY).save("gray.png")
    Image.fromarray(RGB).save("rgb.png")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for name, channels in (("gray.png", 1), ("rgb.png", 3)):
            image = read_image(Path(name), channels)
            assert image.flags.writeable
            assert image.flags.c_contiguous
            torch.from_numpy(image).add_(1)


@pytest.mark.parametrize("suffix", ["png", "tif"])
def test_16_bits(suffix: str) -> None:
    deep = RNG.integers(0, 65536, (7, 5), dtype=np.uint16)
    Image.fromarray(deep).save(f"a.{suffix}")
    image = read_image(Path(f"a.{suffix}"), 1)
    assert image.dtype == np.uint16
    assert (image == deep[None]).all()
    assert (read_mask(Path(f"a.{suffix}")) == deep).all()


def test_big_endian_16_bits() -> None:
    deep = RNG.integers(0, 65536, (7, 5), dtype=np.uint16)
    Image.frombytes("I;16B", (5, 7), deep.astype(">u2").tobytes()).save("a.tif")
    image = read_image(Path("a.tif"), 1)
    assert (image == deep[None]).all()
    torch.from_numpy(image)  # refuses foreign byte orders


@pytest.mark.parametrize("dtype", [np.float32, np.int32])
def test_32_bits_are_floats(dtype: type) -> None:
    deep = RNG.integers(-70000, 70000, (7, 5)).astype(dtype)
    Image.fromarray(deep).save("a.tif")
    image = read_image(Path("a.tif"), 1)
    assert image.dtype == np.float32
    assert (image == deep[None]).all()


@pytest.mark.parametrize("suffix", ["png", "bmp", "tif"])
def test_1_bit(suffix: str) -> None:
    Image.fromarray(BITS.astype(bool)).save(f"a.{suffix}")
    assert (read_mask(Path(f"a.{suffix}")) == BITS).all()
    assert read_mask(Path(f"a.{suffix}")).dtype == np.uint8
    assert read_image(Path(f"a.{suffix}"), 1).dtype == np.uint8


def test_palette_masks_hold_indices_or_colors() -> None:
    values = np.array([[0, 1], [2, 2]], np.uint8)
    palette(values, [0, 0, 0, 128, 0, 0, 0, 128, 0]).save("voc.png")
    assert (read_mask(Path("voc.png")) == values).all()
    colors = np.array([[[0, 0, 0], [128, 0, 0]], [[0, 128, 0], [0, 128, 0]]], np.uint8)
    assert (read_mask(Path("voc.png"), by_color=True) == colors).all()
    assert (read_image(Path("voc.png"), 3) == colors.transpose(2, 0, 1)).all()  # an image is what it looks like


def test_transparent_palette_image_has_four_bands() -> None:
    palette(np.array([[0, 1]], np.uint8), [9, 8, 7, 1, 2, 3]).save("a.png", transparency=1)
    assert read_image(Path("a.png"), 4)[:, 0].T.tolist() == [[9, 8, 7, 255], [1, 2, 3, 0]]


def test_alpha() -> None:
    rgba = np.dstack([RGB, GRAY])
    Image.fromarray(rgba).save("a.png")
    assert (read_image(Path("a.png"), 4) == rgba.transpose(2, 0, 1)).all()
    assert (read_mask(Path("a.png"), by_color=True) == RGB).all()
    Image.fromarray(np.dstack([GRAY, 255 - GRAY]), "LA").save("la.png")
    assert (read_mask(Path("la.png")) == GRAY).all()


def test_gray_mask_saved_as_rgb_is_gray() -> None:
    for bands in (3, 4):
        Image.fromarray(np.dstack([GRAY] * bands)).save("a.png")
        assert (read_mask(Path("a.png")) == GRAY).all()
    almost = np.dstack([GRAY] * 3)
    almost[3, 2, 1] ^= 1
    Image.fromarray(almost).save("a.png")
    assert read_mask(Path("a.png")).shape == (7, 5, 3)


@pytest.mark.parametrize(
    ("orientation", "undo"),
    [(3, lambda x: np.rot90(x, 2)), (6, lambda x: np.rot90(x, 1)), (8, lambda x: np.rot90(x, -1))],
)
def test_exif_orientation(orientation: int, undo: object) -> None:
    """A camera held sideways: the stored pixels are turned, the picture that a person sees is not."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(np.ascontiguousarray(undo(RGB))).save("a.png", exif=exif)
    Image.fromarray(np.ascontiguousarray(undo(GRAY))).save("m.png", exif=exif)
    assert (read_image(Path("a.png"), 3) == RGB.transpose(2, 0, 1)).all()
    assert (read_mask(Path("m.png")) == GRAY).all()


@pytest.mark.parametrize("suffix", ["png", "jpg", "bmp", "tif"])
@pytest.mark.parametrize("keep", [0.0, 0.5, 0.9])
def test_cut_off_file(suffix: str, keep: float) -> None:
    path = Path(f"a.{suffix}")
    Image.fromarray(RNG.integers(0, 256, (64, 64, 3), dtype=np.uint8)).save(path)
    path.write_bytes(path.read_bytes()[: int(keep * path.stat().st_size)])
    for read in (lambda: read_image(path, 3), lambda: read_mask(path)):
        with pytest.raises(InputError, match=rf"^a\.{suffix}: cannot be read as an image .*Copy it again or remove it"):
            read()


def test_not_an_image_and_no_file() -> None:
    Path("a.png").write_text("<html>404: not found</html>")
    with pytest.raises(InputError, match=r"^a\.png: cannot be read as an image"):
        read_image(Path("a.png"), 3)
    Path("folder.png").mkdir()
    with pytest.raises(InputError, match=r"^folder\.png: cannot be read as an image"):
        read_image(Path("folder.png"), 3)
    with pytest.raises(InputError, match=r"^gone\.png: no such file"):
        read_mask(Path("gone.png"))


@pytest.mark.parametrize(
    ("array", "channels", "bands"), [(RGB, 1, 3), (GRAY, 3, 1), (np.dstack([RGB, GRAY]), 3, 4), (RGB, 4, 3)]
)
def test_wrong_number_of_bands(array: np.ndarray, channels: int, bands: int) -> None:
    Image.fromarray(array).save("a.png")
    fix = rf"^a\.png: has {bands} bands .* but channels says {channels}\. Fix: channels: {bands}"
    with pytest.raises(InputError, match=fix):
        read_image(Path("a.png"), channels)
    assert read_image(Path("a.png"), bands).shape == (bands, 7, 5)


def test_a_stack_is_not_silently_its_first_picture() -> None:
    pictures = [Image.fromarray(GRAY + i) for i in range(3)]
    pictures[0].save("stack.tif", save_all=True, append_images=pictures[1:])
    with pytest.raises(InputError, match=r"^stack\.tif: holds 3 pictures"):
        read_image(Path("stack.tif"), 1)


def test_a_phones_picture_with_its_preview_is_one_picture() -> None:
    flat = Image.fromarray(np.full((16, 16, 3), 90, np.uint8))
    flat.save("a.jpg", format="MPO", save_all=True, append_images=[flat.resize((8, 8))])
    with Image.open("a.jpg") as image:
        assert image.n_frames == 2
    assert (read_image(Path("a.jpg"), 3) == 90).all()


def test_too_large(monkeypatch: pytest.MonkeyPatch) -> None:
    Image.fromarray(RGB).save("a.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10)
    with pytest.raises(InputError, match=r"^a\.png: .*Cut images this large into tiles"):
        read_image(Path("a.png"), 3)
