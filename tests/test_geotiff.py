"""Georeference: rasterio, which is GDAL, finds the masks of a GeoTIFF where the image is."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from conftest import TINY_RUN, train, write_image
from segmentation.data.io import read_image
from segmentation.inference.predict import predict

rasterio = pytest.importorskip("rasterio")

WHERE = {"crs": "EPSG:32633", "transform": rasterio.transform.from_origin(500000, 5000000, 0.5, 0.5)}
PIXELS = np.random.default_rng(0).integers(1, 255, (3, 96, 80), dtype=np.uint8)


def write_geotiff(path: Path, pixels: np.ndarray = PIXELS, **options: object) -> None:
    path.parent.mkdir(exist_ok=True)
    count, height, width = pixels.shape
    form = {"driver": "GTiff", "count": count, "height": height, "width": width, "dtype": pixels.dtype}
    with rasterio.open(path, "w", **{**form, **WHERE, **options}) as file:
        file.write(pixels)


@pytest.mark.parametrize("form", ["index", "palette"])
def test_masks_lie_where_their_images_lie(trained: Path, form: str) -> None:
    write_geotiff(Path("in/a.tif"), nodata=0)
    write_geotiff(Path("in/tiled.tif"), tiled=True, blockxsize=16, blockysize=16, compress="deflate")
    Image.fromarray(np.moveaxis(PIXELS, 0, -1)).save("in/plain.tif")
    arguments = [str(trained), "in", "out", "--accelerator", "cpu", "--format", form]
    assert predict(arguments) == 3
    assert {path.name for path in Path("out").iterdir()} == {"a.tif", "tiled.tif", "plain.png", "predict.json"}
    plain = np.asarray(Image.open("out/plain.png"))
    for name in ("a", "tiled"):
        with rasterio.open(f"out/{name}.tif") as file:
            assert file.crs == WHERE["crs"]
            assert file.transform == WHERE["transform"]
            assert (file.count, file.dtypes, file.nodata) == (1, ("uint8",), None)
            assert (file.read(1) == plain).all()
    assert predict(arguments) == 0  # all have their masks


@pytest.mark.slow
@pytest.mark.parametrize("form", ["index", "palette"])
def test_masks_have_no_data_where_their_images_have_none(place: Path, form: str) -> None:
    for number in range(4):
        write_image(place / f"data/images/{number}.png", np.full((32, 32, 3), 40 * number, np.uint8))
        write_image(place / f"data/masks/{number}.png", np.eye(32, dtype=np.uint8))
    data = ["--data.dataset", "FolderData", "--data.dataset.root", "data", "--data.dataset.ignore", "255"]
    classes = ["--data.dataset.classes", "{background: 0, thing: 1}"]
    train(*TINY_RUN, *data, *classes, "--name", "run", "--trainer.max_epochs", "1")
    pixels = PIXELS.copy()
    pixels[:, :10] = 0
    write_geotiff(Path("in/a.tif"), pixels, nodata=0)
    predict(["runs/run/checkpoints/best.ckpt", "in", "out", "--accelerator", "cpu", "--format", form])
    with rasterio.open("out/a.tif") as file:
        assert file.nodata == 255
        mask = file.read(1)
    assert (mask[:10] == 255).all()
    assert (mask[10:] < 2).all()


def test_cogs_are_read_at_full_resolution() -> None:
    pixels = np.random.default_rng(0).integers(0, 60000, (4, 600, 700), dtype=np.uint16)
    write_geotiff(Path("data/cog.tif"), pixels, driver="COG", blocksize=128, compress="deflate")
    with rasterio.open("data/cog.tif") as file:
        assert file.overviews(1)
    assert (read_image(Path("data/cog.tif"), 4) == pixels).all()
