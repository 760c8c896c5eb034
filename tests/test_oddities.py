"""What public bug reports say of files and options: each comes out right, or one line says what to do."""

import struct
import unicodedata
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile
import torch
import yaml
from PIL import Image

from conftest import TINY, make_folder, train, write_image
from segmentation.data import FolderData, SegmentationDataModule
from segmentation.data.io import read_image, read_mask
from segmentation.doctor import diagnose
from segmentation.errors import InputError
from segmentation.schedulers import WarmupDecay
from segmentation.training.cli import SegmentationCLI
from segmentation.training.entry import run_job
from segmentation.training.parser import Parser

CLASSES = {"background": 0, "cell": 255}
WIDE = np.arange(6 * 10 * 3, dtype=np.uint8).reshape(6, 10, 3)


def tag(kind: int, count: int, value: bytes) -> bytes:
    """EXIF data that holds an orientation, of any type and length."""
    entry = struct.pack("<HHI", 0x112, kind, count) + value.ljust(4, b"\0")
    return b"Exif\0\0II*\0\x08\0\0\0" + struct.pack("<H", 1) + entry + bytes(4)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("suffix", ["jpg", "png", "webp"])
@pytest.mark.parametrize(
    ("exif", "turned"),
    [
        (tag(3, 1, b"\x06"), True),
        (tag(4, 1, b"\x06"), True),
        (tag(3, 1, b"\0"), False),
        (tag(3, 1, b"\x09"), False),
        (tag(2, 2, b"6\0"), False),
        (tag(5, 1, b"\xff\xff"), False),
        (tag(99, 1, b"\x06"), False),
        (tag(3, 1, b"\x06")[:20], False),
        (b"Exif\0\0", False),
    ],
)
def test_orientation_that_is_malformed(exif: bytes, turned: bool, suffix: str) -> None:
    Image.fromarray(WIDE).save(f"a.{suffix}", exif=exif)
    assert read_image(Path(f"a.{suffix}"), 3).shape == ((3, 10, 6) if turned else (3, 6, 10))
    assert read_mask(Path(f"a.{suffix}"), by_color=True).shape == ((10, 6, 3) if turned else (6, 10, 3))


@pytest.mark.parametrize("entry", [(3, 1, 0), (3, 1, 9), (3, 2, (6, 6))])
def test_orientation_of_a_tiff_that_is_malformed(entry: tuple[int, int, Any]) -> None:
    tifffile.imwrite("a.tif", WIDE, photometric="rgb", extratags=[(274, *entry, True)])
    assert (read_image(Path("a.tif"), 3) == WIDE.transpose(2, 0, 1)).all()


@pytest.mark.parametrize("photometric", ["minisblack", "miniswhite", "separated", "rgb"])
@pytest.mark.parametrize("bands", [5, 7, 9])
def test_tiffs_of_many_channels_come_without_a_line(photometric: str, bands: int, capfd: pytest.CaptureFixture) -> None:
    pixels = np.arange(4 * 5 * bands, dtype=np.uint8).reshape(4, 5, bands)
    tifffile.imwrite("a.tif", pixels, photometric=photometric, planarconfig="contig")
    assert (read_image(Path("a.tif"), None) == pixels.transpose(2, 0, 1)).all()
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize("driver", ["GTiff", "COG"])
@pytest.mark.parametrize(("bands", "dtype"), [(1, np.uint8), (3, np.uint8), (7, np.uint16), (4, np.float32)])
def test_geotiffs_with_a_mask_of_their_own(driver: str, bands: int, dtype: type, place: Path) -> None:
    """The first picture, whole: neither its mask nor what is reduced."""
    rasterio = pytest.importorskip("rasterio")
    shutil = pytest.importorskip("rasterio.shutil")
    pixels = np.random.default_rng(0).integers(0, 200, (bands, 600, 300)).astype(dtype)
    valid = np.full((600, 300), 255, np.uint8)
    valid[:9] = 0
    shape = {"count": bands, "height": 600, "width": 300, "dtype": dtype, "driver": "GTiff"}
    with rasterio.Env(GDAL_TIFF_INTERNAL_MASK=True):
        with rasterio.open("plain.tif", "w", **shape) as file:
            file.write(pixels)
            file.write_mask(valid)
        if driver == "COG":
            shutil.copy("plain.tif", "cog.tif", driver="COG", BLOCKSIZE=128)
    path = place / ("cog.tif" if driver == "COG" else "plain.tif")
    assert (read_image(path, None) == pixels).all()


def photos(root: Path, orientation: int, size: tuple[int, int]) -> Path:
    """Photographs with the tag of a phone, and masks that were drawn on what is stored."""
    rng = np.random.default_rng(0)
    exif = Image.Exif()
    exif[0x112] = orientation
    for split, count in (("train", 3), ("val", 2)):
        for number in range(count):
            mask = rng.integers(0, 2, size, dtype=np.uint8) * 255
            write_image(root / f"{split}/masks/{number}.png", mask)
            (root / f"{split}/images").mkdir(exist_ok=True)
            picture = Image.fromarray(rng.integers(0, 255, (*size, 3), dtype=np.uint8))
            picture.save(root / f"{split}/images/{number}.jpg", exif=exif)
    return root


def test_a_picture_that_exif_turns_and_its_mask_that_it_does_not(place: Path) -> None:
    data = FolderData(str(photos(place / "data", 6, (24, 16))), CLASSES)
    with pytest.raises(InputError, match=r"is 16x24 pixels, but its image 0.jpg is 24x16. EXIF turns .*exiftool -n"):
        data.load("train", 0)


def test_masks_are_not_squashed_onto_images_that_exif_turns(place: Path) -> None:
    data = FolderData(str(photos(place / "data", 6, (24, 16))), CLASSES, resize_masks=True)
    with pytest.raises(InputError, match=r"EXIF turns .*exiftool -n"):
        data.load("train", 0)


def test_square_tiffs_that_are_turned_and_not_their_masks(place: Path) -> None:
    (place / "images").mkdir()
    for index in range(4):
        options: dict[str, Any] = {"photometric": "rgb", "extratags": [(274, "H", 1, 6, True)]}
        tifffile.imwrite(place / f"images/{index}.tif", np.zeros((16, 16, 3), np.uint8), **options)
        write_image(place / f"masks/{index}.png", np.eye(16, dtype=np.uint8) * 255)
    (problem,) = FolderData(str(place), CLASSES).find_problems()
    assert "EXIF turns 4 images and not their masks" in problem.text


@pytest.mark.parametrize(("orientation", "size"), [(6, (24, 24)), pytest.param(3, (24, 16), marks=pytest.mark.slow)])
def test_where_the_size_does_not_tell_the_doctor_does(orientation: int, size: tuple[int, int], place: Path) -> None:
    root = photos(place / "data", orientation, size)
    given = ["--data.dataset", "FolderData", "--data.dataset.root", str(root), "--data.dataset.classes"]
    problems = [problem for problem in diagnose([*given, yaml.safe_dump(CLASSES)]) if "EXIF" in problem.text]
    assert [problem.stops for problem in problems] == [False]
    assert "EXIF turns 5 images and not their masks" in problems[0].text
    with pytest.warns(UserWarning, match="exiftool -n -Orientation=1"):
        SegmentationDataModule(FolderData(str(root), CLASSES, val_fraction=None)).check()


@pytest.mark.parametrize(("orientation", "size"), [(1, (24, 24)), (0, (24, 16))])
def test_pictures_that_exif_leaves_are_no_problem(orientation: int, size: tuple[int, int], place: Path) -> None:
    assert FolderData(str(photos(place / "data", orientation, size)), CLASSES).find_problems() == []


def test_names_of_macos_fit_those_of_others(place: Path) -> None:
    """Letters with their accents apart (NFD) in one folder or list, composed (NFC) in another."""
    root = make_folder(place / "data", {"train": 3, "val": 1})
    apart = unicodedata.normalize("NFD", "Zürich é")
    whole = unicodedata.normalize("NFC", apart)
    for kind, name in (("images", apart), ("masks", whole)):
        (root / f"train/{kind}/00.png").rename(root / f"train/{kind}/{name}.png")
    data = FolderData(str(root), CLASSES)
    assert data.names("train") == ["01", "02", whole]
    assert data.problems == []
    (root / "train.txt").write_text(f"{apart}.png\n01\n")
    (root / "val.txt").write_text("00\n")
    assert FolderData(str(root), CLASSES, lists="{split}.txt").names("train") == [whole, "01"]


@pytest.mark.parametrize("line", ["{0}.png;{0}_mask.png", "{0};1;2", "images/{0}.png ; masks/{0}.png", "{0}.png 3"])
def test_lists_with_columns(line: str, place: Path) -> None:
    root = make_folder(place / "data", {"train": 3, "val": 1})
    for split, names in (("train", ["02", "00"]), ("val", ["00"])):
        (root / f"{split}.txt").write_text("".join(f"{line.format(name)}\n" for name in names))
    assert FolderData(str(root), CLASSES, lists="{split}.txt").names("train") == ["02", "00"]


@pytest.mark.parametrize("name", ["no", "on", "null", "1.0", "2024", "on time"])
def test_class_names_that_yaml_takes_for_values(name: str, place: Path) -> None:
    root = make_folder(place / "data", {"train": 3, "val": 1})

    def names(written: str) -> list[str]:
        parser = Parser()
        parser.add_lightning_class_args(SegmentationDataModule, "data")
        classes = f"{{{written}: 0, cell: 255}}"
        given = ["--data.dataset", "FolderData", "--data.dataset.root", str(root), "--data.dataset.classes", classes]
        return parser.instantiate_classes(parser.parse_args(given)).data.labels.names

    if name in ("2024", "on time"):
        assert names(name) == [name, "cell"]
    else:
        with pytest.raises(InputError, match=r"^[^\n]*YAML reads [^\n]*in quotes[^\n]*$"):
            names(name)
    assert names(f'"{name}"') == [name, "cell"]


def rates(schedule: WarmupDecay, shares: list[float]) -> list[float]:
    found = []
    for share in shares:
        schedule.elapsed = share
        schedule.optimizer.step()
        schedule.step()
        found.append(schedule.get_last_lr()[0])
    return found


def test_a_schedule_follows_what_ends_the_run_first() -> None:
    def make(steps: float, elapsed: float) -> WarmupDecay:
        schedule = WarmupDecay(torch.optim.SGD([torch.zeros(1)], lr=1.0), warmup=0.2, decay="cosine")
        schedule.set_total_steps(steps, elapsed)
        return schedule

    by_steps = rates(make(10, 0.0), [0.0] * 10)
    assert by_steps[-1] == 0
    assert (
        rates(make(10, 1e-9), [step / 20 for step in range(1, 11)]) == by_steps
    )  # time is no limit: exactly as without
    for endless in (-1, float("inf"), 100):
        by_time = rates(make(endless, 1e-9), [step / 10 for step in range(1, 11)])
        assert by_time[1:] == pytest.approx(by_steps[1:], abs=0.01)
        assert by_time[-1] == 0
    with pytest.raises(InputError, match=r"needs an end: .*max_time"):
        make(float("inf"), 0.0)


@pytest.mark.slow
def test_a_run_that_its_time_ends_comes_down_and_may_have_more(capsys: pytest.CaptureFixture) -> None:
    args = [*TINY, "--trainer.max_epochs", "-1", "--trainer.log_every_n_steps", "1", "--name", "run"]
    first = train(*args, "--trainer.max_time", "00:00:00:06")
    assert first.trainer.global_step > 0
    assert first.trainer.optimizers[0].param_groups[0]["lr"] == 0
    train(*args, "--trainer.max_time", "00:00:00:06", "--resume")
    assert "the run is finished" in capsys.readouterr().out
    longer = train(*args, "--trainer.max_time", "00:00:00:12", "--resume")
    assert "trainer.max_time is 00:00:00:12" in capsys.readouterr().out
    assert longer.trainer.global_step > first.trainer.global_step
    assert longer.trainer.optimizers[0].param_groups[0]["lr"] == 0
    logged = torch.load("runs/run/checkpoints/last.ckpt", weights_only=True)["global_step"]
    assert logged == longer.trainer.global_step


def test_a_one_cycle_that_ends_before_the_run() -> None:
    schedule = ["--model.schedule", "torch.optim.lr_scheduler.OneCycleLR", "--model.schedule.max_lr", "0.01"]
    with pytest.raises(InputError, match=r"OneCycleLR ends after 5 steps, the run after 6.*total_steps 6"):
        train(*TINY, *schedule, "--model.schedule.total_steps", "5", "--name", "run")


@pytest.mark.slow
def test_batch_norm_of_one_value(exit_raises: None, capsys: pytest.CaptureFixture) -> None:
    options = ["--data.batch_size", "1", "--data.crop", "2", "--model.net.widths", "[4,8]"]
    cli = SegmentationCLI([*TINY, *options, "--name", "run"])
    with pytest.raises(SystemExit, match="2"):
        run_job(cli.run)
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert said.startswith("error: batch norm needs more than one value")
    assert "--model.net.norm group" in said


def test_an_augmentation_that_knows_no_masks() -> None:
    with pytest.raises(InputError, match=r"^[^\n]*AutoAugment[^\n]*With masks go flips[^\n]*$"):
        train(*TINY, "--data.augment", "[AutoAugment]", "--name", "run")
    assert not Path("runs/run").exists()
