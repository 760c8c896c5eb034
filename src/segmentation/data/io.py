"""Read an image or a mask from a file. Decoding is Pillow's, and tifffile's or imagecodecs' for what Pillow would lose
(more than four bands, 16 bits in colour). Every failure names the file and the remedy."""

import logging
import math
import os
from pathlib import Path
from typing import Any

import numpy as np
import tifffile
from PIL import Image, ImageOps
from PIL.ImageFile import ImageFile
from PIL.TiffImagePlugin import TiffImageFile

from segmentation.errors import InputError

#: Endings that count as images in a data folder.
IMAGE_SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".bmp", ".webp", ".gif", ".tif", ".tiff", ".npy"})

logging.getLogger("tifffile").setLevel(logging.CRITICAL)  # it logs what it then raises

LARGE = 64_000_000  # pixels from which memory counts: Pillow needs four bytes each, and as much again for an array
TIFF_MAGIC = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")


class WrongBands(InputError):
    """An image has another number of bands, `found`, than declared."""

    def __init__(self, message: str, found: int = 0) -> None:
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
    if isinstance(pixels, Image.Image):
        if as_rgb and mode[0] not in "IF":  # of 8 bits
            pixels = pixels.convert("RGB")
        elif mode == "P":
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
    check_file(path)
    try:
        return (_array(path, channels), ".npy") if path.suffix.lower() == ".npy" else _decoded(path, channels)
    except InputError:
        raise
    except Image.DecompressionBombError as error:
        raise InputError(f"{path}: {error}. Cut images this large into tiles first") from error
    except Exception as error:  # decoders raise anything from OSError to struct.error on a damaged file
        reason = " ".join(str(error).split())[:200]
        raise InputError(
            f"{path}: cannot be read as an image ({type(error).__name__}: {reason}). Copy it again or remove it"
        ) from error


def check_file(path: Path) -> None:
    """Raises InputError for a link that leads nowhere, and for what would never end, such as a pipe."""
    if path.is_file():
        return
    if path.is_symlink():
        raise InputError(
            f"{path}: is a link to {os.readlink(path)}, which is no file here. Fetch it (git annex get, dvc pull), or "
            "remove the link"
        )
    if path.exists():
        raise InputError(f"{path}: cannot be read as an image, as it is no ordinary file. Remove it")
    raise InputError(f"{path}: no such file")


def _decoded(path: Path, channels: int | None) -> tuple[Image.Image | np.ndarray, str]:
    try:
        image = Image.open(path)
    except Image.UnidentifiedImageError:
        with path.open("rb") as file:
            if file.read(4) not in TIFF_MAGIC:
                raise
        return _tiff(path, channels), "TIFF"
    with image:
        pages = getattr(image, "n_frames", 1)
        large = image.width * image.height > LARGE and image.mode in ("L", "RGB", "RGBA", "I;16")
        deep = _deep_color(image)
        if isinstance(image, TiffImageFile):
            # Pillow reads the first page, and drops bands beyond those of its mode.
            lost = image.tag_v2.get(277, 1) != len(image.getbands())
            if pages > 1 or lost or large or deep:
                return _tiff(path, channels), image.mode if large else "TIFF"
        elif pages > 1 and image.format != "MPO":  # which is what phones save: a JPEG and its previews
            raise InputError(f"{path}: holds {pages} pictures. Save each as a file of its own")
        if deep or (large and image.format in ("PNG", "JPEG")):
            import imagecodecs  # large, and of no use to most data sets

            decode = imagecodecs.png_decode if image.format == "PNG" else imagecodecs.jpeg8_decode
            return _upright(decode(path.read_bytes()), image.getexif().get(274, 1)), image.mode
        image.load()
        ImageOps.exif_transpose(image, in_place=True)
        return image, image.mode


def _deep_color(image: ImageFile) -> bool:
    """Whether Pillow would cut 16 bits to 8: it has modes of 16 bits for gray alone. (A BMP's are those of a pixel.)"""
    if image.format not in ("PNG", "TIFF") or image.mode.startswith("I") or not image.tile:
        return False
    options: Any = image.tile[0].args
    return ";16" in str(options if isinstance(options, str) else options[0])


def _tiff(path: Path, channels: int | None) -> np.ndarray:
    with tifffile.TiffFile(path) as file:
        first = file.series[0]  # of a pyramid the first level is the image itself
        axes, shape = first.axes, dict(zip(first.axes, first.shape, strict=True))
        pages = len(file.series) * math.prod(size for axis, size in shape.items() if axis not in "YXSC")
        if pages > 1 and (pages != channels or len(file.series) > 1):
            bands = f", or, if they are bands, declare channels: {pages}" if len(file.series) == 1 else ""
            raise InputError(f"{path}: holds {pages} pictures. Save each as a file of its own{bands}")
        _check_area(shape["Y"] * shape["X"])
        # Of a large one only what is looked at is kept.
        pixels = first.asarray(out="memmap" if math.prod(first.shape) > LARGE else None)
        pixels = np.moveaxis(pixels, (axes.index("Y"), axes.index("X")), (0, 1)).reshape(shape["Y"], shape["X"], -1)
        orientation = file.pages.first.tags.valueof("Orientation", 1)
    if not pixels.size:
        raise ValueError("no pixels")
    return _upright(pixels, int(orientation))


def _upright(pixels: np.ndarray, orientation: int) -> np.ndarray:
    """Pixels (H, W, ...) as stored, turned as EXIF's and TIFF's orientation tag says."""
    if orientation in (5, 6, 7, 8):  # stored on their side
        pixels = np.swapaxes(pixels, 0, 1)
    if orientation in (2, 3, 6, 7):
        pixels = np.fliplr(pixels)
    return np.flipud(pixels) if orientation in (3, 4, 7, 8) else pixels


def _array(path: Path, channels: int | None) -> np.ndarray:
    pixels = np.load(path, mmap_mode="r", allow_pickle=False)  # mapped: a header that lies allocates nothing
    if pixels.ndim not in (2, 3) or pixels.dtype.kind not in "buif" or 0 in pixels.shape:
        raise InputError(f"{path}: is {pixels.dtype} {pixels.shape}, not (H, W) or (H, W, C) numbers")
    first, last = pixels.shape[0], pixels.shape[-1]
    if pixels.ndim == 3 and (first == channels != last or (channels is None and first < last)):
        pixels = np.moveaxis(pixels, 0, -1)
    _check_area(pixels.shape[0] * pixels.shape[1])
    return np.array(pixels)


def allow_large() -> None:
    """In a job that takes images piece by piece, let a picture have up to a thousand million pixels."""
    Image.MAX_IMAGE_PIXELS = 500_000_000


def _check_area(pixels: int) -> None:
    limit = 2 * (Image.MAX_IMAGE_PIXELS or pixels)  # where Pillow, too, takes a file for a decompression bomb
    if pixels > limit:
        raise Image.DecompressionBombError(f"image size ({pixels} pixels) exceeds limit of {limit} pixels")


def _numeric(image: Image.Image | np.ndarray) -> np.ndarray:
    pixels = np.asarray(image)
    pixels = pixels[..., 0] if pixels.ndim == 3 and pixels.shape[-1] == 1 else pixels
    if pixels.dtype == bool:
        return pixels.astype(np.uint8)
    return pixels.astype(pixels.dtype.newbyteorder("="), copy=False)
