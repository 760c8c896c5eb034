"""Reading images and masks: what Pillow wrote comes back, and what cannot be read is named with its remedy."""

import struct
import warnings
from pathlib import Path

import imagecodecs
import numpy as np
import pytest
import tifffile
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from segmentation.data.io import read_image, read_mask
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


def test_transparent_palette_image_is_rgb() -> None:
    palette(np.array([[0, 1]], np.uint8), [9, 8, 7, 1, 2, 3]).save("a.png", transparency=1)
    assert read_image(Path("a.png"), None)[:, 0].T.tolist() == [[9, 8, 7], [1, 2, 3]]


def test_alpha() -> None:
    rgba = np.dstack([RGB, GRAY])
    Image.fromarray(rgba).save("a.png")
    assert (read_image(Path("a.png"), 4) == rgba.transpose(2, 0, 1)).all()
    assert (read_mask(Path("a.png"), by_color=True) == RGB).all()
    Image.fromarray(np.dstack([GRAY, 255 - GRAY]), "LA").save("la.png")
    assert (read_mask(Path("la.png")) == GRAY).all()


def test_gray_mask_saved_as_rgb_is_gray() -> None:
    for channels in (3, 4):
        Image.fromarray(np.dstack([GRAY] * channels)).save("a.png")
        assert (read_mask(Path("a.png")) == GRAY).all()
    for channel in (1, 2):
        almost = np.dstack([GRAY] * 3)
        almost[3, 2, channel] ^= 1
        Image.fromarray(almost).save("a.png")
        assert (read_mask(Path("a.png")) == almost).all()


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
    ("array", "channels", "found"), [(RGB, 1, 3), (GRAY, 3, 1), (np.dstack([RGB, GRAY]), 3, 4), (RGB, 4, 3)]
)
def test_wrong_number_of_channels(array: np.ndarray, channels: int, found: int) -> None:
    Image.fromarray(array).save("a.png")
    with pytest.raises(InputError, match=rf"^a\.png: .* channels: {found}"):
        read_image(Path("a.png"), channels)
    assert read_image(Path("a.png"), found).shape == (found, 7, 5)


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


def test_tiff_of_any_channels_and_bits() -> None:
    """Written by tifffile: what Pillow cannot read, or would cut to 8 bits."""
    five = RNG.integers(0, 256, (33, 47, 5), dtype=np.uint8)
    deep = RNG.integers(0, 65536, (33, 47, 3), dtype=np.uint16)
    real = RNG.normal(size=(33, 47, 4)).astype(np.float32)
    options = {"photometric": "minisblack", "planarconfig": "contig"}
    tifffile.imwrite("five.tif", five, **options)
    tifffile.imwrite("planes.tif", five.transpose(2, 0, 1), photometric="minisblack", planarconfig="separate")
    tifffile.imwrite("pages.tif", five.transpose(2, 0, 1), photometric="minisblack")
    tifffile.imwrite("deep.tif", deep, photometric="rgb", compression="lzw")
    tifffile.imwrite("big-endian.tif", deep, photometric="rgb", byteorder=">")
    tifffile.imwrite("tiled.tif", real, tile=(16, 16), compression="zlib", **options)
    tifffile.imwrite("doubles.tif", real[..., 0].astype(np.float64))
    with tifffile.TiffWriter("pyramid.ome.tif") as file:
        file.write(deep, photometric="rgb", subifds=1)
        file.write(deep[::2, ::2], photometric="rgb", subfiletype=1)
    for name, array in (
        ("five", five),
        ("planes", five),
        ("pages", five),
        ("deep", deep),
        ("big-endian", deep),
        ("tiled", real),
        ("doubles", real[..., :1]),
        ("pyramid.ome", deep),
    ):
        image = read_image(Path(f"{name}.tif"), array.shape[2])
        assert image.dtype == array.dtype, name
        assert (image == array.transpose(2, 0, 1)).all(), name
        torch.from_numpy(image)
    with pytest.raises(InputError, match=r"^pages\.tif: holds 5 pictures.*channels: 5"):
        read_image(Path("pages.tif"), 1)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_tiff_orientation_is_pillows(orientation: int) -> None:
    """The tag of a TIFF that tifffile reads turns the pixels as Pillow turns those that it reads."""
    deep = RNG.integers(0, 65536, (6, 9, 3), dtype=np.uint16)
    tag = [(274, "H", 1, orientation, True)]
    tifffile.imwrite("deep.tif", deep, photometric="rgb", extratags=tag)
    tifffile.imwrite("flat.tif", (deep >> 8).astype(np.uint8), photometric="rgb", extratags=tag)
    assert (read_image(Path("deep.tif"), 3) >> 8 == read_image(Path("flat.tif"), 3)).all()


def test_16_bit_colour_png_keeps_its_bits() -> None:
    for channels in (3, 4):
        deep = RNG.integers(0, 65535, (7, 5, channels), dtype=np.uint16)
        Path("a.png").write_bytes(imagecodecs.png_encode(deep))
        image = read_image(Path("a.png"), channels)
        assert image.dtype == np.uint16
        assert (image == deep.transpose(2, 0, 1)).all()


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.float32, np.float64, np.int64, bool, ">f4"])
def test_npy(dtype: type) -> None:
    array = RNG.integers(0, 2, (7, 5, 3)).astype(dtype)
    for name, stored in (("hwc", array), ("chw", array.transpose(2, 0, 1))):
        np.save(f"{name}.npy", stored)
        for channels in (3, None):
            image = read_image(Path(f"{name}.npy"), channels)
            assert image.dtype == {np.uint8: np.uint8, bool: np.uint8, np.uint16: np.uint16}.get(dtype, np.float32)
            assert (image == array.transpose(2, 0, 1)).all()
            torch.from_numpy(image)
    np.save("gray.npy", array[..., 0])
    assert (read_mask(Path("gray.npy")) == array[..., 0]).all()
    assert read_image(Path("gray.npy"), None).shape == (1, 7, 5)


def test_npy_that_is_no_image() -> None:
    np.save("a.npy", np.array({"x": 1}, dtype=object), allow_pickle=True)
    with pytest.raises(InputError, match=r"^a\.npy: cannot be read"):  # a pickle is never loaded
        read_image(Path("a.npy"), 3)
    for array in (np.zeros(3), np.zeros((2, 2, 2, 2)), np.zeros((0, 4)), np.zeros((4, 4), complex)):
        np.save("a.npy", array)
        with pytest.raises(InputError, match=r"^a\.npy: is .* not \(H, W\)"):
            read_image(Path("a.npy"), 3)
    np.save("a.npy", np.zeros((10, 10), np.uint8))
    Path("a.npy").write_bytes(Path("a.npy").read_bytes().replace(b"(10, 10)", b"(9**9,1)"))  # a header that lies
    with pytest.raises(InputError, match=r"^a\.npy: cannot be read"):
        read_image(Path("a.npy"), 3)


def test_gif_and_cmyk() -> None:
    flat = Image.fromarray(np.full((8, 6, 3), (200, 30, 90), np.uint8))
    flat.save("a.gif")
    assert np.abs(read_image(Path("a.gif"), 3)[:, 0, 0].astype(int) - (200, 30, 90)).max() < 3
    for name in ("a.jpg", "a.tif"):
        flat.convert("CMYK").save(name)
        found = read_image(Path(name), 3)[:, 0, 0].astype(int)
        assert np.abs(found - (200, 30, 90)).max() < 8
    flat.save("moving.gif", save_all=True, append_images=[Image.new("RGB", (6, 8))])
    with pytest.raises(InputError, match=r"^moving\.gif: holds 2 pictures"):
        read_image(Path("moving.gif"), 3)


def test_bmp_of_16_bits_a_pixel_is_rgb() -> None:
    """Five bits of red and blue, six of green: not 16 bits a band."""
    pixels = np.array([[0xF800, 0x07E0], [0x001F, 0xFFFF]], "<u2")  # red, green; blue, white
    info = struct.pack("<IiiHHIIiiII", 40, 2, -2, 1, 16, 3, 8, 0, 0, 0, 0)
    masks = struct.pack("<III", 0xF800, 0x07E0, 0x001F)
    head = struct.pack("<2sIHHI", b"BM", 74, 0, 0, 66)
    Path("a.bmp").write_bytes(head + info + masks + pixels.tobytes())
    expected = [[[255, 0], [0, 255]], [[0, 255], [0, 255]], [[0, 0], [255, 255]]]
    assert read_image(Path("a.bmp"), 3).tolist() == expected


def test_an_opaque_alpha_channel_is_dropped() -> None:
    Image.fromarray(np.dstack([RGB, np.full_like(GRAY, 255)])).save("a.png")
    for channels in (None, 3):
        assert (read_image(Path("a.png"), channels) == RGB.transpose(2, 0, 1)).all()
    assert read_image(Path("a.png"), 4).shape == (4, 7, 5)
    half = np.dstack([RGB, np.where(GRAY > 128, 255, GRAY)])
    Image.fromarray(half).save("a.png")
    assert read_image(Path("a.png"), None).shape == (4, 7, 5)
    with pytest.raises(InputError, match="channels: 4"):
        read_image(Path("a.png"), 3)


def test_as_rgb() -> None:
    """Pictures of the web, mixed."""
    Image.fromarray(GRAY).save("gray.png")
    Image.fromarray(np.dstack([RGB, GRAY])).save("rgba.png")
    palette(GRAY // 128, [9, 8, 7, 1, 2, 3]).save("palette.gif")
    Image.fromarray(RGB).convert("CMYK").save("cmyk.tif")
    for name in ("gray.png", "rgba.png", "palette.gif", "cmyk.tif"):
        assert read_image(Path(name), 3, as_rgb=True).shape == (3, 7, 5)
    assert (read_image(Path("gray.png"), 3, as_rgb=True) == GRAY).all()
    assert (read_image(Path("rgba.png"), 3, as_rgb=True) == RGB.transpose(2, 0, 1)).all()
    deep = GRAY.astype(np.uint16) * 257 + 1
    Image.fromarray(deep).save("deep.png")
    assert (read_image(Path("deep.png"), 3, as_rgb=True) == deep).all()
    tifffile.imwrite("five.tif", np.dstack([RGB, GRAY, GRAY]), photometric="minisblack", planarconfig="contig")
    with pytest.raises(InputError, match=r"five\.tif.*channels: 5"):  # which three of them?
        read_image(Path("five.tif"), 3, as_rgb=True)


@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.sampled_from([np.uint8, np.uint16, np.float32]),
    st.integers(1, 40),
    st.integers(1, 40),
    st.integers(1, 6),
    st.sampled_from(["npy", "tif"]),
    st.integers(0, 999),
)
def test_what_was_written_is_read(
    place: Path, dtype: type, height: int, width: int, channels: int, suffix: str, seed: int
) -> None:
    """Any shape and type, through a writer that is not ours."""
    array = np.random.default_rng(seed).integers(0, 256, (height, width, channels)).astype(dtype)
    path = place / f"a.{suffix}"
    if suffix == "npy":
        np.save(path, array)
        if height == channels != width:  # (C, H, W) and (H, W, C) look alike: documented, and read as (C, H, W)
            return
    else:
        tifffile.imwrite(path, array, photometric="minisblack", planarconfig="contig" if channels > 1 else None)
    image = read_image(path, channels)
    assert image.dtype == dtype
    assert (image == array.transpose(2, 0, 1)).all()
