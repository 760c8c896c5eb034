"""Read an image or a mask from a file, as NumPy arrays; every failure names the file and the fix.

Pillow decodes pictures. tifffile and imagecodecs decode what Pillow would cut: more than four channels, and colour of
16 bits.
"""

import logging
import os
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import tifffile
from PIL import ExifTags, Image

from segmentation.errors import InputError, plural

#: Suffixes that count as images in a data folder. A new one also needs a branch in `_decode`.
IMAGE_SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".bmp", ".webp", ".gif", ".tif", ".tiff", ".npy"})

#: What GeoTIFFs hold where there is no data.
NODATA = (-9999, -32768)

#: Suffixes of masks, and of files that describe them (`segmentation.data.annotations`).
MASK_SUFFIXES = IMAGE_SUFFIXES | {".mat", ".npz", ".json", ".txt"}

#: Ending of what is not read -> what converts it.
CONVERTERS = {
    ".nii": "nibabel and numpy.save, one file per slice",
    ".nii.gz": "nibabel and numpy.save, one file per slice",
    ".dcm": "pydicom and numpy.save, or dcmj2pnm",
    ".jp2": "gdal_translate a.jp2 a.tif, or opj_decompress",
}

#: Pixels from which an image is kept on disk (memory-mapped) where its format allows it.
LARGE = 64_000_000

ORIENTATION = ExifTags.Base.Orientation
PNG_MAGIC = b"\x89PNG"
PNG_BITS = 24  # the byte of a PNG's header that holds the bits of a channel
TIFF_MAGIC = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")

#: What only Pillow turns into the colours that a viewer shows.
PILLOWS_TIFF = (tifffile.PHOTOMETRIC.PALETTE, tifffile.PHOTOMETRIC.SEPARATED, tifffile.PHOTOMETRIC.MINISWHITE)

for library in ("tifffile", "PIL.TiffImagePlugin"):
    logging.getLogger(library).setLevel(logging.CRITICAL)  # they log what they then raise


def read_image(
    path: Path,
    channels: int | None,
    as_rgb: bool = False,
) -> np.ndarray:
    """`open_image` as a writable, contiguous array in memory."""
    return np.array(open_image(path, channels, as_rgb), order="C")


def open_image(
    source: Path | Image.Image | np.ndarray,
    channels: int | None,
    as_rgb: bool = False,
) -> np.ndarray:
    """Pixels as the file has them, upright: (channels, H, W), uint8, uint16 or float32.

    Palette and CMYK pictures become RGB. A `.npy` file is (H, W), (H, W, C), or (C, H, W) where only the first axis
    can be the channels.

    Args:
        source: the file; or what is in memory: a Pillow image, or an array (H, W) or (H, W, C).
        channels: expected channels; None: those of the file. Pages of a TIFF are channels where their numbers agree.
            An alpha channel that is opaque everywhere is dropped, unless it is expected.
        as_rgb: turn gray, palette, RGBA and CMYK pictures into RGB.

    Raises:
        InputError: the file is missing, not an image, cut off, or has another number of channels.
    """
    white = 255 if as_rgb else 1
    if isinstance(source, Path):
        pixels = _read(source, channels, white=white)
    else:
        pixels = _pixels_of(source) if isinstance(source, Image.Image) else np.array(source)
        if pixels.ndim not in (2, 3) or not pixels.size:
            raise InputError(f"the image is an array {pixels.shape}: give (H, W) or (H, W, C)")
        pixels = _to_numbers(np.moveaxis(np.atleast_3d(pixels), -1, 0), white)
    if as_rgb:
        pixels = _to_rgb(pixels)
    elif len(pixels) in (2, 4) and channels in (None, len(pixels) - 1):
        alpha = pixels[-1]
        if alpha.dtype.kind == "u" and alpha.min() == np.iinfo(alpha.dtype).max:
            pixels = pixels[:-1]
    found = len(pixels)
    if channels not in (None, found):
        name = source if isinstance(source, Path) else "the image (H, W, C)"
        raise InputError(
            f"{name}: has {plural(found, 'channel')}, where the data has {channels}. Fix: convert it; or train with "
            f"channels: {found}, or, where gray and colour are mixed, as_rgb: true",
            {"as_rgb": True, "channels": None},
        )
    if pixels.dtype in (np.uint8, np.uint16):
        return pixels
    return pixels.astype(np.float32)  # torch cannot compute with most other types


def hide_nodata(
    image: np.ndarray,
    nodata: float | None,
    source: Any,
) -> tuple[np.ndarray, np.ndarray]:
    """An image with 0 where it has no data, and where that is: (C, H, W), and (H, W) bool.

    Args:
        image: pixels (C, H, W).
        nodata: the value that means no data, as NaN and infinity do; None: there are no such pixels.
        source: the file, for the error.

    Raises:
        InputError: there are such pixels, and `nodata` is None; or others that look like them.
    """
    if nodata is None and image.dtype != np.float32:
        return image, np.zeros(image.shape[1:], bool)
    hidden = ~np.isfinite(image)
    found = np.nan if nodata is None and hidden.any() else None
    if nodata is not None:
        hidden |= image == nodata
    if image.dtype == np.float32:
        lowest = float(image.min(initial=0, where=~hidden))
        if lowest in NODATA or lowest < -1e30:
            found = lowest
    if found is not None:
        value = NODATA[0] if np.isnan(found) else found
        text = f"{source}: holds {found:.9g}, where it has no data. Fix: nodata: {value:.9g} ignores them, and NaN"
        if nodata is not None:
            text += f"; where other files hold {nodata:.9g}, save NaN in all"
        raise InputError(text, {"nodata": value})
    hidden = hidden.any(axis=0)
    if nodata is None:
        return image, hidden
    return np.where(hidden, image.dtype.type(0), image), hidden


def read_mask(path: Path, by_color: bool = False) -> np.ndarray:
    """A mask's values as the file has them: (H, W) integers, or (H, W, 3) colours.

    A palette file gives its indices, unless `by_color`. Gray saved as RGB is taken as gray.
    """
    pixels = _read(
        path,
        1,
        expand_palette=by_color,
        white=255 if by_color else 1,
    )
    if pixels.dtype.kind == "f" and not np.isfinite(pixels).all():
        raise InputError(f"{path}: this mask holds NaN. Save masks as PNG with one integer per class, and ignore one")
    if path.suffix.lower() == ".npy" and len(pixels) == 2:  # no gray with alpha
        raise InputError(
            f"{path}: holds {plural(len(pixels), 'channel')}. Save one integer per pixel, e.g. mask.argmax(axis=-1)"
        )
    is_gray = len(pixels) == 1 or (_to_rgb(pixels) == pixels[0]).all()
    if is_gray and not by_color:
        return pixels[0]
    return np.moveaxis(_to_rgb(pixels), 0, -1)


def check_file(path: Path) -> None:
    """Raises InputError for a link that leads nowhere, for what would never end (a pipe), and as check_format."""
    check_format(path)
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


def check_format(path: Path) -> None:
    """Raises InputError for a format that is not read."""
    for ending, converter in CONVERTERS.items():
        if path.name.lower().endswith(ending):
            raise InputError(f"{path}: {ending} is not read. Convert it: {converter}")


def allow_large() -> None:
    """Accept images of up to a thousand million pixels, in a job that takes them tile by tile."""
    Image.MAX_IMAGE_PIXELS = 500_000_000


def _to_rgb(pixels: np.ndarray) -> np.ndarray:
    """(3, H, W) of gray and RGB, with alpha or without; other channels stay as they are."""
    if len(pixels) <= 2:
        return pixels[[0, 0, 0]]
    return pixels[:3] if len(pixels) == 4 else pixels


def _read(
    path: Path,
    channels: int | None,
    expand_palette: bool = True,
    white: int = 1,
) -> np.ndarray:
    """Pixels (C, H, W), in the machine's byte order; a bit that is set is `white`."""
    check_file(path)
    try:
        pixels = np.moveaxis(np.atleast_3d(_decode(path, channels, expand_palette)), -1, 0)
        if pixels.ndim > 3 or not pixels.size:
            raise ValueError(f"an array of {pixels.shape}")
    except InputError:
        raise
    except Exception as error:  # decoders raise anything from OSError to struct.error on a damaged file
        too_large = isinstance(error, Image.DecompressionBombError)
        fix = "Cut images this large into tiles first" if too_large else "Copy it again or remove it"
        reason = f"{type(error).__name__}: {str(error)[:200]}"
        raise InputError(f"{path}: cannot be read as an image ({reason}). {fix}") from error
    return _to_numbers(pixels, white)


def _to_numbers(pixels: np.ndarray, white: int) -> np.ndarray:
    """Pixels in the machine's byte order; a bit that is set is `white`."""
    if pixels.dtype == bool:
        return pixels * np.uint8(white)
    return pixels.astype(pixels.dtype.newbyteorder("="), copy=False)


def _decode(
    path: Path,
    channels: int | None,
    expand_palette: bool,
) -> np.ndarray:
    """Pixels (H, W) or (H, W, C), by the library that reads such a file whole."""
    suffix = path.suffix.lower()
    if suffix == ".npy":
        return _decode_npy(path, channels)
    if suffix in (".npz", ".mat"):
        return _decode_variables(path)
    with path.open("rb") as file:
        head = file.read(PNG_BITS + 1)
        file.seek(0)
        if head.startswith(TIFF_MAGIC):
            with tifffile.TiffFile(file) as tiff:
                first = tiff.pages.first
                if first.photometric not in PILLOWS_TIFF or first.samplesperpixel > 4:
                    return _decode_tiff(tiff, path, channels)
            file.seek(0)
        image = Image.open(file)
        pictures = getattr(image, "n_frames", 1)
        if pictures > 1 and image.format != "MPO":  # which is what phones save: a JPEG and its previews
            raise InputError(f"{path}: holds {pictures} pictures. Save each as a file of its own")
        image.load()
        if head.startswith(PNG_MAGIC) and head[PNG_BITS] == 16 and image.mode != "I;16":
            import imagecodecs  # it takes long to import, and most data sets do without

            pixels = imagecodecs.png_decode(path.read_bytes())
            return _upright(pixels, image.getexif().get(ORIENTATION, 1))
        return _pixels_of(image, expand_palette)


def _pixels_of(image: Image.Image, expand_palette: bool = True) -> np.ndarray:
    """Pixels (H, W) or (H, W, C) of a Pillow image, upright."""
    orientation = image.getexif().get(ORIENTATION, 1)
    if image.mode == "CMYK" or (image.mode == "P" and expand_palette):
        image = image.convert("RGB")
    return _upright(np.asarray(image), orientation)


def _decode_tiff(
    file: tifffile.TiffFile,
    path: Path,
    channels: int | None,
) -> np.ndarray:
    """Pixels (H, W) or (H, W, C) of a TIFF with any number of channels and bits."""
    full = [page for page in file.pages[:] if isinstance(page, tifffile.TiffPage)]
    pages = [page for page in full if not (page.is_reduced or page.is_mask)]
    first = pages[0]  # others may be of a pyramid, or GDAL's mask of the pixels that hold data
    area = first.imagelength * first.imagewidth
    limit = 2 * (Image.MAX_IMAGE_PIXELS or area)
    if area > limit:  # a damaged header may claim any size
        raise Image.DecompressionBombError(f"{area} pixels are more than {limit}")
    if len(pages) not in (1, channels):
        raise InputError(
            f"{path}: holds {len(pages)} pictures. Save each as a file of its own, or, if they are channels, declare "
            f"channels: {len(pages)}"
        )
    if len(pages) > 1:
        pixels = np.dstack([page.asarray() for page in pages])
    else:
        pixels = first.asarray(out="memmap" if first.size > LARGE else None)
        if first.axes[0] != "Y":  # one plane after the other
            pixels = np.moveaxis(pixels, 0, -1)
    return _upright(pixels, first.tags.valueof("Orientation", 1))


def _decode_variables(path: Path) -> np.ndarray:
    """The one array (H, W) among the variables of a NumPy or MATLAB file, or the fields of these."""
    if path.suffix.lower() == ".npz":
        variables = dict(np.load(path, allow_pickle=False))
    else:
        from scipy.io import loadmat  # it takes long to import

        variables = loadmat(path, simplify_cells=True)
    fields = dict(variables)
    for value in variables.values():
        if isinstance(value, dict):
            fields |= value
    masks = {name: value for name, value in fields.items() if np.ndim(value) == 2}
    if len(masks) != 1:
        names = ", ".join(masks or variables)
        raise InputError(f"{path}: must hold one array (H, W), but holds {names}. Save the mask alone")
    (mask,) = masks.values()
    return mask


def _decode_npy(path: Path, channels: int | None) -> np.ndarray:
    """Pixels (H, W) or (H, W, C) of a NumPy file."""
    pixels = np.load(path, mmap_mode="r", allow_pickle=False)  # mapped: a header that lies allocates nothing
    if pixels.ndim not in (2, 3) or pixels.dtype.kind not in "buif" or not pixels.size:
        raise InputError(f"{path}: is {pixels.dtype} {pixels.shape}, not (H, W) or (H, W, C) numbers")
    if pixels.ndim == 3:
        first, _, last = pixels.shape
        if first == channels != last or (channels is None and first < last):
            pixels = np.moveaxis(pixels, 0, -1)
    return np.array(pixels)


def is_turned(path: Path, unseen: bool = False) -> bool:
    """Whether a picture is read in another orientation than it is stored in, by its EXIF tag.

    Args:
        path: the file.
        unseen: whether only what the size does not show counts: a square picture, or one turned by 180 degrees.
    """
    turns = range(2, 9)
    with suppress(Exception):  # reading it says what is wrong
        check_file(path)
        with Image.open(path) as image:
            if unseen and image.width != image.height:
                turns = range(2, 5)
            may_turn = image.format == "TIFF" or "exif" in image.info  # a PNG is decoded whole to look for more
            return may_turn and image.getexif().get(ORIENTATION) in turns
    return False


def _upright(pixels: np.ndarray, orientation: Any) -> np.ndarray:
    """Pixels (H, W, ...) as stored, turned as the orientation tag of EXIF and TIFF says, where it is one of 1 to 8."""
    if orientation in (5, 6, 7, 8):  # stored on their side
        pixels = np.swapaxes(pixels, 0, 1)
    if orientation in (2, 3, 6, 7):
        pixels = np.fliplr(pixels)
    if orientation in (3, 4, 7, 8):
        pixels = np.flipud(pixels)
    return pixels
