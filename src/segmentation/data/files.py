"""Read an image or a mask from a file. Decoding is Pillow's; every failure names the file and the remedy."""

from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from segmentation.errors import InputError

#: Endings that count as images in a data folder.
IMAGE_SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".bmp", ".webp", ".gif", ".tif", ".tiff"})


def read_image(path: Path, channels: int) -> np.ndarray:
    """Pixels as the file has them, EXIF orientation applied: (channels, H, W), uint8, uint16 or float32.

    Raises:
        InputError: the file is missing, not an image, cut off, or has another number of bands.
    """
    image = _open(path)
    if image.mode == "P":
        image = image.convert("RGBA" if "transparency" in image.info else "RGB")
    pixels = _numeric(image)
    pixels = pixels[None] if pixels.ndim == 2 else np.moveaxis(pixels, -1, 0)
    if pixels.shape[0] != channels:
        raise InputError(
            f"{path}: has {pixels.shape[0]} bands ({image.mode}), but channels says {channels}. "
            f"Fix: channels: {pixels.shape[0]}, or convert the images to one number of bands"
        )
    # A copy, since Pillow's own array is read-only; 32-bit integers become floats, which torch and torchvision handle.
    return np.array(pixels, dtype=np.float32 if pixels.dtype == np.int32 else pixels.dtype, order="C")


def read_mask(path: Path, by_color: bool = False) -> np.ndarray:
    """A mask's values as the file has them: (H, W) integers, or with `by_color` (H, W, 3) uint8.

    Palette files give their indices, not their colours, unless `by_color`. Gray saved as RGB is taken as gray.
    """
    image = _open(path)
    if by_color:
        return np.asarray(image.convert("RGB"))
    if image.mode in ("LA", "PA"):
        image = image.convert(image.mode[0])
    pixels = _numeric(image)
    if pixels.ndim == 3 and (pixels[..., :1] == pixels[..., 1:3]).all():
        return pixels[..., 0]
    return pixels


def _open(path: Path) -> Image.Image:
    try:
        with Image.open(path) as image:
            image.load()
            # MPO is what phones save: a JPEG and its previews.
            frames = 1 if image.format == "MPO" else getattr(image, "n_frames", 1)
            upright = ImageOps.exif_transpose(image)
    except FileNotFoundError as error:
        raise InputError(f"{path}: no such file") from error
    except Image.DecompressionBombError as error:
        raise InputError(f"{path}: {error}. Cut images this large into tiles first") from error
    except Exception as error:  # Pillow's plugins raise anything from OSError to struct.error on a damaged file
        raise InputError(
            f"{path}: cannot be read as an image ({type(error).__name__}: {error}). Copy it again or remove it"
        ) from error
    if frames > 1:
        raise InputError(f"{path}: holds {frames} pictures. Save each as a file of its own")
    return upright


def _numeric(image: Image.Image) -> np.ndarray:
    pixels = np.asarray(image)
    if pixels.dtype == bool:
        return pixels.astype(np.uint8)
    if pixels.dtype.byteorder == ">":
        pixels = pixels.astype(pixels.dtype.newbyteorder("="))
    return pixels
