"""Georeference: a GeoTIFF's mask lies where the image lies on the earth, and has no data where the image has none."""

from contextlib import suppress
from pathlib import Path

import numpy as np
import tifffile
from PIL import Image, TiffTags
from PIL.TiffImagePlugin import ImageFileDirectory_v2

from segmentation.data.labels import Labels
from segmentation.data.writing import atomic_write

#: Tags of the place: pixel scale, tie points, transformation, rational polynomials, and the keys of the projection.
PLACE = (33550, 33922, 34264, 50844, 34735, 34736, 34737)

#: GDAL's tag: the value of pixels without data, as a text.
NODATA = 42113


def is_geotiff(file: Path) -> bool:
    with suppress(Exception):  # reading the image says what is wrong
        if file.suffix.lower() in (".tif", ".tiff"):
            with tifffile.TiffFile(file) as tiff:
                return tiff.is_geotiff
    return False


def save_geotiff(
    picture: Image.Image,
    path: Path,
    source: Path,
    image: np.ndarray,
    labels: Labels,
) -> None:
    """Save a mask with the place of its image.

    Args:
        picture: the mask.
        path: where to.
        source: the image's file.
        image: its pixels (C, H, W). Where all channels have GDAL's value of no data, the mask has the ignored value, if
            there is one.
        labels: the classes.
    """
    copied = ImageFileDirectory_v2()
    with tifffile.TiffFile(source) as tiff:
        tags = tiff.pages.first.tags
        for tag in tags:
            if tag.code in PLACE:
                copied.tagtype[tag.code] = int(tag.dtype)
                copied[tag.code] = tag.value
        nodata = tags.valueof(NODATA)
    ignored = [value for value in labels.ignore if value in range(256)]
    if nodata and ignored and not labels.by_color:
        empty = np.isclose(image, float(nodata), rtol=0, atol=0, equal_nan=True)
        pixels = np.array(picture)
        pixels[empty.all(axis=0)] = ignored[0]
        palette = picture.getpalette()
        picture = Image.fromarray(pixels)
        if palette:
            picture.putpalette(palette)
        copied.tagtype[NODATA] = TiffTags.ASCII
        copied[NODATA] = str(ignored[0])
    with atomic_write(path) as aside:
        picture.save(aside, format="tiff", compression="tiff_deflate", tiffinfo=copied)
