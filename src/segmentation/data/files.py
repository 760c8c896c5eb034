"""Read an image or a mask from a file. Decoding is Pillow's, and tifffile's or imagecodecs' for what Pillow would lose
(more than four bands, 16 bits in colour). Every failure names the file and the remedy."""

import logging
import math
from pathlib import Path

import imagecodecs
import numpy as np
import tifffile
from PIL import Image, ImageOps

from segmentation.errors import InputError

#: Endings that count as images in a data folder.
IMAGE_SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".bmp", ".webp", ".gif", ".tif", ".tiff", ".npy"})

logging.getLogger("tifffile").setLevel(logging.CRITICAL)  # it logs what it then raises

LARGE = 64_000_000  # pixels from which memory counts: Pillow needs four bytes each, and as much again for an array
DECODERS = {"PNG": imagecodecs.png_decode, "JPEG": imagecodecs.jpeg8_decode}

TIFF_MAGIC = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")


class WrongBands(InputError):
    """An image has another number of bands than declared.

    Args:
        message: the file and the remedy.
        found: its bands.
    """

    def __init__(self, message: str, found: int) -> None:
        super().__init__(message)
        self.found = found


def read_image(path: Path, channels: int | None, as_rgb: bool = False) -> np.ndarray:
    """`open_image`, in an array of its own: (channels, H, W), C-contiguous."""
    return np.array(open_image(path, channels, as_rgb), order="C")  # a copy: Pillow's own array is read-only


def open_image(path: Path, channels: int | None, as_rgb: bool = False) -> np.ndarray:
    """Pixels as the file has them, EXIF orientation applied: (channels, H, W), uint8, uint16 or float32.

    Without `channels` the file decides. An alpha band that is opaque everywhere is no band, unless `channels` counts
    it. A `.npy` file is (H, W), (H, W, C), or (C, H, W) where only the first axis can be the bands. Pages of a TIFF
    are bands where `channels` is their number. With `as_rgb` gray, palette, RGBA and CMYK pictures become RGB.

    Raises:
        InputError: the file is missing, not an image, cut off, or has another number of bands.
    """
    pixels, mode = _read(path, channels)
    if as_rgb and isinstance(pixels, Image.Image) and pixels.mode[0] not in "IF":  # of 8 bits
        pixels = pixels.convert("RGB")
        mode = pixels.mode
    if mode == "P" and isinstance(pixels, Image.Image):
        pixels = pixels.convert("RGBA" if "transparency" in pixels.info else "RGB")
        mode = pixels.mode
    pixels = _numeric(pixels)
    pixels = pixels[None] if pixels.ndim == 2 else np.moveaxis(pixels, -1, 0)
    opaque = np.iinfo(pixels.dtype).max if pixels.dtype.kind == "u" else None
    if mode in ("RGBA", "LA") and channels in (None, len(pixels) - 1) and (pixels[-1] == opaque).all():
        pixels = pixels[:-1]
    if pixels.shape[0] != (channels or pixels.shape[0]):
        raise WrongBands(
            f"{path}: has {pixels.shape[0]} bands ({mode}), but channels says {channels}. "
            f"Fix: channels: {pixels.shape[0]}, or, where pictures are mixed, as_rgb: true",
            len(pixels),
        )
    # What torch cannot compute with (32 bits, doubles) becomes float32.
    return pixels if pixels.dtype in (np.uint8, np.uint16) else pixels.astype(np.float32)


def read_mask(path: Path, by_color: bool = False) -> np.ndarray:
    """A mask's values as the file has them: (H, W) integers, or with `by_color` (H, W, 3) uint8.

    Palette files give their indices, not their colours, unless `by_color`. Gray saved as RGB is taken as gray.
    """
    image, _ = _read(path, 1)
    if isinstance(image, Image.Image):
        if by_color:
            return np.asarray(image.convert("RGB"))
        if image.mode in ("LA", "PA"):
            image = image.convert(image.mode[0])
    pixels = _numeric(image)
    if pixels.ndim == 3 and not by_color and (pixels[..., :1] == pixels[..., 1:3]).all():
        return pixels[..., 0]
    return pixels


def _read(path: Path, channels: int | None) -> tuple[Image.Image | np.ndarray, str]:
    """A picture of Pillow's, or the pixels (H, W) or (H, W, C) of what Pillow would lose; and what it is, in words."""
    try:
        if path.suffix.lower() == ".npy":
            return _array(path, channels), ".npy"
        try:
            with Image.open(path) as image:
                pages = getattr(image, "n_frames", 1)
                # Pillow reads the first page, and drops bands beyond those of its mode.
                lost = image.format == "TIFF" and image.tag_v2.get(277, 1) != len(image.getbands())
                large = image.width * image.height > LARGE and image.mode in ("L", "RGB", "RGBA", "I;16")
                if image.format == "TIFF" and (pages > 1 or lost or large or _deep_color(image)):
                    return _tiff(path, channels), image.mode if large else "TIFF"
                if pages > 1 and image.format != "MPO":  # which is what phones save: a JPEG and its previews
                    raise InputError(f"{path}: holds {pages} pictures. Save each as a file of its own")
                if _deep_color(image) or (large and image.format in DECODERS):
                    upright = ORIENTATIONS.get(image.getexif().get(274, 1), lambda x: x)
                    return upright(DECODERS[image.format](path.read_bytes())), image.mode
                image.load()
                ImageOps.exif_transpose(image, in_place=True)
                return image, image.mode
        except Image.UnidentifiedImageError:
            with path.open("rb") as file:
                if file.read(4) not in TIFF_MAGIC:
                    raise
            return _tiff(path, channels), "TIFF"
    except InputError:
        raise
    except FileNotFoundError as error:
        raise InputError(f"{path}: no such file") from error
    except Image.DecompressionBombError as error:
        raise InputError(f"{path}: {error}. Cut images this large into tiles first") from error
    except Exception as error:  # decoders raise anything from OSError to struct.error on a damaged file
        reason = " ".join(str(error).split())[:200]
        raise InputError(
            f"{path}: cannot be read as an image ({type(error).__name__}: {reason}). Copy it again or remove it"
        ) from error


def _deep_color(image: Image.Image) -> bool:
    """Whether Pillow would cut 16 bits to 8: it has modes of 16 bits for gray alone. (A BMP's are those of a pixel.)"""
    if image.format not in ("PNG", "TIFF"):
        return False
    options = image.tile[0].args if image.tile else ""
    return ";16" in str(options if isinstance(options, str) else options[0]) and not image.mode.startswith("I")


def _tiff(path: Path, channels: int | None) -> np.ndarray:
    with tifffile.TiffFile(path) as file:
        series = file.series[0]  # of a pyramid the first level is the image itself
        axes, shape = series.axes, dict(zip(series.axes, series.shape, strict=True))
        others = [axis for axis in axes if axis not in "YX" and shape[axis] > 1]
        pages = len(file.series) if len(file.series) > 1 else math.prod(shape[a] for a in others if a not in "SC")
        if pages > 1 and pages != channels:
            raise InputError(
                f"{path}: holds {pages} pictures. Save each as a file of its own, or, if they are bands, "
                f"declare channels: {pages}"
            )
        _check_area(shape["Y"] * shape["X"])
        mapped = "memmap" if math.prod(series.shape) > LARGE else None  # of a large one only what is looked at is kept
        if len(file.series) > 1:
            pixels = np.stack([one.asarray() for one in file.series], axis=-1)
        else:
            pixels = series.asarray(out=mapped).squeeze(
                tuple(i for i, axis in enumerate(axes) if axis not in ["Y", "X", *others])
            )
            if others:
                pixels = np.moveaxis(
                    pixels, [axis for axis in axes if axis in ["Y", "X", *others]].index(others[0]), -1
                )
        orientation = file.pages[0].tags.valueof("Orientation", 1)
    if not pixels.size:
        raise ValueError("no pixels")
    return ORIENTATIONS.get(int(orientation), lambda x: x)(pixels)


#: TIFF's orientation tag -> what makes the stored pixels upright.
ORIENTATIONS = {
    2: np.fliplr,
    3: lambda x: np.rot90(x, 2),
    4: np.flipud,
    5: lambda x: np.swapaxes(x, 0, 1),
    6: lambda x: np.rot90(x, -1),
    7: lambda x: np.rot90(np.swapaxes(x, 0, 1), 2),
    8: np.rot90,
}


def _array(path: Path, channels: int | None) -> np.ndarray:
    pixels = np.load(path, mmap_mode="r", allow_pickle=False)  # mapped: a header that lies allocates nothing
    if pixels.ndim not in (2, 3) or pixels.dtype.kind not in "buif" or 0 in pixels.shape:
        raise InputError(f"{path}: is {pixels.dtype} {pixels.shape}, not (H, W) or (H, W, C) numbers")
    first, last = pixels.shape[0], pixels.shape[-1]
    if pixels.ndim == 3 and (first == channels != last or (channels is None and first < last)):
        pixels = np.moveaxis(pixels, 0, -1)
    _check_area(pixels.shape[0] * pixels.shape[1])
    return np.array(pixels[..., 0] if pixels.ndim == 3 and pixels.shape[-1] == 1 else pixels)


def allow_large() -> None:
    """In a job that takes images piece by piece, let a picture have up to a thousand million pixels."""
    Image.MAX_IMAGE_PIXELS = 500_000_000


def _check_area(pixels: int) -> None:
    limit = 2 * (Image.MAX_IMAGE_PIXELS or pixels)  # where Pillow, too, takes a file for a decompression bomb
    if pixels > limit:
        raise Image.DecompressionBombError(f"image size ({pixels} pixels) exceeds limit of {limit} pixels")


def _numeric(image: Image.Image | np.ndarray) -> np.ndarray:
    pixels = np.asarray(image)
    if pixels.dtype == bool:
        return pixels.astype(np.uint8)
    return pixels.astype(pixels.dtype.newbyteorder("="), copy=False)
