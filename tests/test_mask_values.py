"""What masks hold and what the doctor makes of it: its overlay trains, and the values come back from predict."""

import re
from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile
import yaml
from PIL import Image, ImageDraw

from conftest import TINY_RUN, train, write_image
from segmentation.data import FolderData, SegmentationDataModule
from segmentation.data.labels import IGNORE_INDEX
from segmentation.doctor import diagnose
from segmentation.errors import InputError
from segmentation.inference.predict import predict

SIDE = 64
DISCS = np.hypot(*(np.mgrid[:SIDE, :SIDE] - SIDE / 2)) < 20


def blocks(*values: int) -> np.ndarray:
    """A mask of these values, each in a stripe."""
    return np.array(values, np.int64).repeat(-(-SIDE // len(values)))[:SIDE] * np.ones((SIDE, 1), np.int64)


def smeared(index: int) -> np.ndarray:
    """A disc of 0 and 255, made larger as photographs are."""
    small = Image.fromarray(np.uint8(np.roll(DISCS, index, 0)[::4, ::4] * 255))
    return np.asarray(small.resize((SIDE, SIDE), Image.Resampling.BICUBIC))


def three_levels(index: int) -> np.ndarray:
    """Discs of 128 and 255, as a JPEG gives them back."""
    levels = np.where(np.roll(DISCS, index, 0), 255, np.where(np.roll(DISCS, 24, 1), 128, 0))
    file = BytesIO()
    Image.fromarray(np.uint8(levels)).save(file, "JPEG")
    return np.asarray(Image.open(file))


def ids(index: int) -> np.ndarray:
    return blocks(*range(3 + 2 * index))


def stray(index: int) -> np.ndarray:
    mask = np.where(DISCS, 255, 0)
    if index == 2:
        mask[0, :3] = [17, 90, 201]
    return mask


def colors(*values: str) -> np.ndarray:
    palette = np.array([list(bytes.fromhex(value)) for value in values], np.uint8)
    return palette[blocks(*range(len(values)))]


#: Case -> (mask of each image, options of the overlay that matter).
Case = tuple[Callable[[int], np.ndarray], dict[str, Any]]
TWO = {"background": 0, "foreground": 255}
CASES: dict[str, Case] = {
    "three levels, smeared by JPEG": (
        three_levels,
        {"classes": {"background": 0, "class_128": 128, "class_255": 255}, "mask_tolerance": 64},
    ),
    "0 and 1": (lambda i: blocks(0, 1).astype(np.uint8), {"classes": {"background": 0, "foreground": 1}}),
    "0 and 255": (lambda i: np.uint8(DISCS * 255), {"classes": TWO}),
    "0 to 3": (
        lambda i: np.uint8(blocks(0, 3, *range(i % 4))),
        {"classes": {"background": 0, "class_1": 1, "class_2": 2, "class_3": 3}},
    ),
    "classes and 255": (
        lambda i: np.uint8(blocks(0, 1, 2 + i % 4, 7, 255)),
        {"ignore": [255]},
    ),
    "0, 1 and 255": (
        lambda i: np.uint8(blocks(0, 1, 255)),
        {"classes": {"background": 0, "foreground": 1}, "ignore": [255]},
    ),
    "-1": (lambda i: np.int16(blocks(-1, 0, 1, 2)), {"ignore": [-1]}),
    "above 65535": (lambda i: np.int32(blocks(0, 70_000)), {"classes": {"background": 0, "foreground": 70_000}}),
    "-1 and 0 alone": (lambda i: np.int16(blocks(-1, 0)), {"classes": {"background": -1, "foreground": 0}}),
    "ids of their own": (
        lambda i: np.int32(blocks(0, *range(1000 + 37 * i, 9000, 1000))),
        {"classes": {"background": 0, "foreground": 1}, "mask_threshold": 1, "instances": "masks"},
    ),
    "ids that a byte does not hold": (
        lambda i: np.uint16(np.arange(SIDE * SIDE).reshape(SIDE, SIDE) // 8 % (260 + 20 * i)),
        {"classes": {"background": 0, "foreground": 1}, "mask_threshold": 1, "instances": "masks"},
    ),
    "ids above 65535": (
        lambda i: np.int32(blocks(0, 1, 300 + i, 70_000 - i)),
        {"classes": {"background": 0, "foreground": 1}, "mask_threshold": 1, "instances": "masks"},
    ),
    "ids with gaps": (
        lambda i: np.uint8(blocks(0, *(3 + 5 * i, 50 + 9 * i, 140 + 13 * i, 244 - 11 * i)[: 4 - i % 2])),
        {"classes": {"background": 0, "foreground": 1}, "mask_threshold": 1, "instances": "masks"},
    ),
    "like DRIVE": (
        lambda i: np.uint8(DISCS * (251 if i % 3 else 255)),
        {"classes": {"background": 0, "foreground": [251, 255]}},
    ),
    "1 and 255": (
        lambda i: np.uint8(DISCS * (1 if i % 3 else 255)),
        {"classes": {"background": 0, "foreground": [1, 255]}},
    ),
    "127 and 128": (
        lambda i: np.uint8(DISCS * (127 + i % 2)),
        {"classes": {"background": 0, "foreground": [127, 128]}},
    ),
    "strays": (lambda i: np.uint8(stray(i)), {"classes": TWO, "ignore": [17, 90, 201]}),
    "smeared": (smeared, {"classes": TWO, "mask_threshold": 128}),
    "instances": (
        lambda i: np.uint16(ids(i)),
        {"classes": {"background": 0, "foreground": 1}, "mask_threshold": 1, "instances": "masks"},
    ),
    "floats": (lambda i: np.float32(DISCS), {"classes": {"background": 0, "foreground": 1}}),
    "empty but for one": (lambda i: np.uint8(DISCS * 255 * (i == 1)), {"classes": TWO}),
    "all empty": (lambda i: np.uint8(DISCS * 0), {"classes": TWO}),
    "all full": (lambda i: np.uint8(DISCS * 0 + 1), {"classes": {"background": 0, "foreground": 1}}),
    "colours": (
        lambda i: colors("000000", "FF0000", "00FF00") if i else np.uint8(DISCS * 0),
        {"classes": {"background": "#000000", "class_00FF00": "#00FF00", "class_FF0000": "#FF0000"}},
    ),
}


def write_case(root: Path, mask_of: Callable[[int], np.ndarray]) -> Path:
    rng = np.random.default_rng(0)
    for index in range(8):
        mask = mask_of(index)
        write_image(root / f"images/{index}.png", rng.integers(0, 256, (*mask.shape[:2], 3), dtype=np.uint8))
        (root / "masks").mkdir(exist_ok=True)
        if mask.dtype == np.uint8:
            write_image(root / f"masks/{index}.png", mask)
        else:
            tifffile.imwrite(root / f"masks/{index}.tif", mask)
    return root


@pytest.mark.parametrize("case", CASES)
def test_what_masks_hold(case: str, place: Path) -> None:
    """The error about missing classes says it, and its options make a data set."""
    mask_of, expected = CASES[case]
    root = str(write_case(place / "data", mask_of))
    with pytest.raises(InputError) as error:
        FolderData(root)
    fix = error.value.fix
    found = {option: fix.get(option) for option in expected}
    assert found == expected
    assert fix.keys() <= expected.keys() | {"classes"}
    assert "\n" not in str(error.value)
    SegmentationDataModule(FolderData(root, **fix)).check()


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_the_overlay_trains_and_values_come_back(case: str, place: Path) -> None:
    mask_of, expected = CASES[case]
    root = write_case(place / "data", mask_of)
    diagnose(["--data.dataset", "FolderData", "--data.dataset.root", str(root)])
    cli = train("--config", "doctor/overlay.yaml", *TINY_RUN, "--trainer.max_epochs", "1", "--name", "run")
    options = cli.config.data.dataset.init_args
    assert {option: options[option] for option in expected} == expected
    command = ["runs/run/checkpoints/last.ckpt", str(root / "images"), "out", "--accelerator", "cpu"]
    if case in ("-1 and 0 alone", "above 65535"):  # what a PNG cannot hold
        with pytest.raises(InputError, match="--format palette"):
            predict(command)
        return
    predict(command)
    for path in Path("out").glob("*.png"):
        with Image.open(path) as image:
            cli.datamodule.labels.encode(np.asarray(image), str(path))


def by_folder(root: Path, mask_of: Callable[[int], np.ndarray]) -> list[str]:
    """Folders named after what is in them; one holds images without defects."""
    for folder in ("MT_Crack", "MT_Free", "MT_Break"):
        for index in range(3):
            mask = mask_of(index) * (folder != "MT_Free")
            write_image(root / f"{folder}/{index}.jpg", np.uint8(255 * DISCS[..., None] + np.arange(3)))
            write_image(root / f"{folder}/{index}.png", mask)
    patterns = ["--data.dataset.images", "{class}/{name}.jpg", "--data.dataset.masks", "{class}/{name}.png"]
    return ["--data.dataset", "FolderData", "--data.dataset.root", str(root), *patterns]


def overlay(options: list[str]) -> dict[str, Any]:
    diagnose(options)
    return yaml.safe_load(Path("doctor/overlay.yaml").read_text())["data"]


def test_classes_from_folders_and_options_that_were_given(place: Path) -> None:
    options = by_folder(place / "data", smeared)
    section = overlay([*options, "--data.folds", "3", "--data.crop", "32", "--data.batch_size", "2"])
    dataset = section.pop("dataset")["init_args"]
    assert section == {"folds": 3, "crop": 32, "batch_size": 2}
    assert dataset["classes"] == {"background": 0, "MT_Break": 1, "MT_Crack": 2}
    assert dataset["mask_threshold"] == 128
    SegmentationDataModule(FolderData(**dataset), folds=3).check()


def test_colours_with_smooth_edges(place: Path) -> None:
    """Declared colours, mixed where they meet: training and the doctor say the one option to type."""

    def mask_of(index: int) -> np.ndarray:
        picture = Image.new("RGB", (1024, 1024))
        draw = ImageDraw.Draw(picture)
        draw.ellipse((100 + 9 * index, 200, 700, 800), "#FF0000")
        draw.polygon([(400, 400), (990, 500 + 7 * index), (450, 950)], "#00FF00")
        return np.asarray(picture.resize((192, 192), Image.Resampling.BILINEAR))

    classes = {"ground": "#000000", "disc": "#FF0000", "other": "#00FF00"}
    root = str(write_case(place / "data", mask_of))
    given = ["--data.dataset", "FolderData", "--data.dataset.root", root, "--data.dataset.classes", str(classes)]
    with pytest.raises(InputError, match=r"Fix: mask_tolerance: 170 \("):
        SegmentationDataModule(FolderData(root, classes)).check()
    dataset = overlay(given)["dataset"]["init_args"]
    assert dataset["classes"] == classes
    assert dataset["mask_tolerance"] == 170
    SegmentationDataModule(FolderData(**dataset)).check()


def test_edges_of_objects_do_not_count_unasked(place: Path) -> None:
    options = by_folder(place / "data", smeared)
    classes = {"background": 0, "MT_Break": 1, "MT_Crack": 2}
    dataset = overlay([*options, "--data.dataset.classes", str(classes)])["dataset"]["init_args"]
    assert dataset["classes"] == classes
    assert dataset["mask_threshold"] == 128
    dataset.pop("mask_threshold")
    with pytest.raises(InputError, match=r"several values in a mask that only tells objects.*mask_threshold: 128"):
        SegmentationDataModule(FolderData(**dataset)).check()


def test_fixes_of_images_come_into_the_overlay(place: Path) -> None:
    """Gray among colour, and pixels without data; a file that nothing mends is left out."""
    root = write_case(place / "data", lambda index: np.uint8(DISCS * 255))
    write_image(root / "images/0.png", np.zeros((SIDE, SIDE), np.uint8))
    (root / "images/3.png").write_bytes(b"")
    given = ["--data.dataset", "FolderData", "--data.dataset.root", str(root)]
    section = overlay(given)
    assert section["dataset"]["init_args"]["as_rgb"] is True
    assert section["on_bad_file"] == "skip"
    SegmentationDataModule(FolderData(**section["dataset"]["init_args"]), on_bad_file="skip").check()
    for path in (root / "images").iterdir():
        image = np.random.default_rng(0).random((SIDE, SIDE), np.float32)
        image[:5] = -9999
        image[5, :9] = np.nan
        path.unlink()
        tifffile.imwrite(path.with_suffix(".tif"), image if path.stem < "5" else image[::-1].clip(0, 1))
    section = overlay(given)
    assert section["dataset"]["init_args"]["nodata"] == -9999


def test_nothing_of_an_earlier_call_stays(place: Path) -> None:
    given = ["--data.dataset", "FolderData", "--data.dataset.root", str(place / "data")]
    write_case(place / "data", lambda index: np.uint8(DISCS * 255))
    overlay(given)
    assert Path("doctor/train.png").is_file()
    assert "data:image" in Path("doctor/report.html").read_text(encoding="utf-8")
    (place / "data/masks").rename(place / "data/elsewhere")
    diagnose(given)
    assert [path.name for path in Path("doctor").iterdir()] == ["report.html"]
    assert "data:image" not in Path("doctor/report.html").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("classes", "fix"),
    [
        (["background", "crack"], "{background: 0, crack: 1}"),
        ({0: "background"}, "{background: 0, foreground: 255}"),
        ({0: "background", 255: "crack"}, "{background: 0, crack: 255}"),
        ({"0": "background", "1": "crack"}, "{background: 0, crack: 1}"),
        ({"background": [0, 0, 0], "crack": [255, 255, 255]}, "{background: '#000000', crack: '#FFFFFF'}"),
    ],
)
def test_classes_written_otherwise(classes: Any, fix: str, place: Path) -> None:
    root = write_case(place / "data", lambda index: np.uint8(DISCS * 255))
    options = ["--data.dataset", "FolderData", "--data.dataset.root", str(root)]
    problems = diagnose([*options, "--data.dataset.classes", yaml.safe_dump(classes)])
    assert any(f"Fix: classes: {fix}" in problem.text for problem in problems)


def averaged(index: int) -> np.ndarray:
    """A disc of 0 and 255 at half its size: each pixel is the mean of four."""
    large = np.roll(DISCS, index, 0).repeat(2, 0).repeat(2, 1)[1:-1, 1:-1] * 255.0
    return np.uint8(large.reshape(SIDE - 1, 2, SIDE - 1, 2).mean(axis=(1, 3)))


@pytest.mark.parametrize(("top", "threshold"), [(255, 128), (254, None)])
def test_edges_of_few_levels_between_two_declared_values(top: int, threshold: int | None, place: Path) -> None:
    root = write_case(place / "data", averaged)
    given = ["--data.dataset", "FolderData", "--data.dataset.root", str(root), "--data.dataset.classes"]
    options = overlay([*given, yaml.safe_dump({"bg": 0, "fg": top})])["dataset"]["init_args"]
    assert options.get("mask_threshold") == threshold
    if threshold:
        assert options["classes"] == {"bg": 0, "fg": 255}
        SegmentationDataModule(FolderData(**options)).check()


def test_only_the_true_line_where_no_sample_can_be_used(place: Path) -> None:
    """Masks of another shape; those of the same shape may be resized."""
    root = write_case(place / "data", lambda index: np.uint8(DISCS[::2] * 255))
    for path in (root / "images").iterdir():
        write_image(path, np.zeros((SIDE, SIDE, 3), np.uint8))
    given = ["--data.dataset", "FolderData", "--data.dataset.root", str(root), "--data.dataset.classes"]
    given.append(yaml.safe_dump(TWO))
    (problem,) = (problem for problem in diagnose(given) if "W&B" not in problem.text)
    assert re.search(r"no sample of any split can be used, e.g. .* is 64x32 pixels", problem.text)
    for path in (root / "masks").iterdir():
        write_image(path, np.uint8(DISCS[::2, ::2] * 255))
    assert overlay(given)["dataset"]["init_args"]["resize_masks"] is True


def test_pixels_without_data_are_ignored(place: Path) -> None:
    for index in range(4):
        image = np.random.default_rng(index).random((SIDE, SIDE)).astype(np.float32)
        image[:8] = -9999
        image[8] = np.nan
        (place / "images").mkdir(exist_ok=True)
        tifffile.imwrite(place / f"images/{index}.tif", image)
        write_image(place / f"masks/{index}.png", np.uint8(DISCS))
    classes = {"background": 0, "cell": 1}
    with pytest.raises(InputError, match=r"images/\d\.tif: holds (nan|-9999), .* Fix: nodata: -9999"):
        SegmentationDataModule(FolderData(str(place), classes)).check()
    data = FolderData(str(place), classes, nodata=-9999)
    sample = data.load("train", 0)
    assert (sample["mask"][:9] == IGNORE_INDEX).all()
    assert (sample["image"][:, :9] == 0).all()
    assert (sample["mask"][9:] >= 0).all()


@pytest.mark.parametrize("value", [float(np.finfo(np.float32).min), -32768])
def test_the_value_that_means_no_data_is_named(value: float, place: Path) -> None:
    """What one file needs is no answer for those that hold another value."""
    root = write_case(place / "data", lambda index: np.uint8(DISCS * 255))
    for index, path in enumerate(sorted((root / "images").iterdir())):
        image = np.random.default_rng(index).random((SIDE, SIDE)).astype(np.float32)
        image[:8] = value if index else np.nan
        path.unlink()
        tifffile.imwrite(path.with_suffix(".tif"), image)
    classes = {"background": 0, "cell": 255}
    with pytest.raises(InputError, match=rf"Fix: nodata: {re.escape(f'{value:.9g}')} .* hold -9999, save NaN"):
        SegmentationDataModule(FolderData(str(root), classes, nodata=-9999)).check()
    options = overlay(["--data.dataset", "FolderData", "--data.dataset.root", str(root)])["dataset"]["init_args"]
    assert options["nodata"] == value
    SegmentationDataModule(FolderData(**options)).check()


@pytest.mark.slow
def test_a_run_on_images_with_pixels_without_data(place: Path) -> None:
    root = write_case(place / "data", lambda index: np.uint8(DISCS * 255))
    for path in (root / "images").iterdir():
        image = np.random.default_rng(0).random((SIDE, SIDE)).astype(np.float32)
        image[:8] = -9999
        image[8] = np.nan
        path.unlink()
        tifffile.imwrite(path.with_suffix(".tif"), image)
    diagnose(["--data.dataset", "FolderData", "--data.dataset.root", str(root)])
    cli = train("--config", "doctor/overlay.yaml", *TINY_RUN, "--trainer.max_epochs", "1", "--name", "run")
    assert np.isfinite(float(cli.trainer.callback_metrics["test/loss"]))
    assert predict(["runs/run/checkpoints/last.ckpt", str(root / "images"), "out", "--accelerator", "cpu"]) == 8


def test_what_is_no_mask_is_named(place: Path) -> None:
    root = write_case(place / "data", lambda i: np.where(DISCS, np.float32("nan"), np.float32(0)))
    with pytest.raises(InputError, match=r"masks/0\.tif: this mask holds NaN"):
        FolderData(str(root))
    for index in range(8):
        (root / f"masks/{index}.tif").unlink()
        np.save(root / f"masks/{index}.npy", np.stack([~DISCS, DISCS], axis=-1))
    with pytest.raises(InputError, match=r"masks/0\.npy: holds 2 channels.*argmax"):
        FolderData(str(root))


@pytest.mark.parametrize("value", [-1, 70_000])
def test_values_that_predicted_masks_cannot_hold_are_said_before_training(value: int, place: Path) -> None:
    root = write_case(place / "data", lambda i: np.int32(DISCS * value))
    (problem,) = FolderData(str(root), {"background": 0, "foreground": value}).find_problems()
    assert "--format palette" in problem.text


def test_small_masks_of_one_value_each(place: Path) -> None:
    for index in range(4):
        write_image(place / f"images/{index}.png", np.full((8, 8, 3), index, np.uint8))
        write_image(place / f"masks/{index}.png", np.full((8, 8), index, np.uint8))
    with pytest.raises(InputError, match=r"classes: \{background: 0, class_1: 1, class_2: 2, class_3: 3\}"):
        FolderData(str(place))


def test_splits_in_capitals(place: Path) -> None:
    root = write_case(place / "data", lambda i: np.uint8(DISCS * 255))
    rows = [f"{index}.png,{'VAL' if index > 5 else 'TRAIN'}" for index in range(8)]
    (root / "all.csv").write_text("\n".join(["name,split", *rows]))
    data = FolderData(str(root), TWO, lists="all.csv")
    assert [len(data.names(split)) for split in ("train", "val", "test")] == [6, 2, 0]
