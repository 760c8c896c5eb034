"""Leaks between splits: near twins are found by look and by name, with the `group` that mends it, and no others."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from conftest import write_image
from segmentation.data import FolderData, SegmentationDataModule, ShapesData

CLASSES = {"ground": 0, "thing": 255}


def leaks(data: FolderData | ShapesData) -> list[str]:
    problems = SegmentationDataModule(data).find_problems()
    return [problem.text for problem in problems if "flatter" in problem.text]


def scene(seed: int) -> Image.Image:
    """A smooth picture of its own."""
    cells = np.random.default_rng(seed).integers(0, 255, (9, 9, 3), dtype=np.uint8)
    return Image.fromarray(cells).resize((64, 48), Image.Resampling.BICUBIC)


def copies(seed: int, number: int) -> np.ndarray:
    """The same scene as a camera sees it a moment later: brighter, noisier and shifted."""
    picture = np.asarray(scene(seed)).astype(int)
    noise = np.random.default_rng([seed, number]).integers(-4, 5, picture.shape)
    return (0.8 * picture + 5 * number + noise).clip(0, 255).astype(np.uint8)


NAMES = {
    "frames": ("seq{s}_f{n:03d}", r"^(.+)[-_./ ]"),
    "frames without a separator": ("video{s}frame{n}", r"^(.*\D)\d"),
    "frames in folders": ("{s}/{n}", r"^(.+)[-_./ ]"),
    "a name in several parts": ("case-{s}_left_{n}_x", r"^(.*\D)\d"),
}


@pytest.mark.parametrize("kind", NAMES)
def test_frames_of_videos_and_the_group_that_keeps_them_together(place: Path, kind: str) -> None:
    pattern, group = NAMES[kind]
    for seed in range(5):
        for number in range(4):
            name = pattern.format(s=seed, n=number)
            write_image(place / f"images/{name}.png", copies(seed, number))
            write_image(place / f"masks/{name}.png", np.eye(48, 64, dtype=np.uint8) * 255)
    (text,) = leaks(FolderData(str(place), CLASSES))
    assert "val images with a near twin in train: 4 of 4, e.g. " in text
    assert f"Fix: group: '{group}'" in text
    assert leaks(FolderData(str(place), CLASSES, group=group)) == []


def test_augmented_copies_by_their_names(place: Path) -> None:
    """A copy that is turned looks like another image."""
    for seed in range(6):
        for number, end in enumerate(("", "_rot90", "_hflip", "-aug_1")):
            picture = np.rot90(np.asarray(scene(seed).crop((0, 0, 48, 48))), number).copy()
            write_image(place / f"images/a{seed}{end}.png", picture)
            write_image(place / f"masks/a{seed}{end}.png", np.eye(48, dtype=np.uint8) * 255)
    (text,) = leaks(FolderData(str(place), CLASSES))
    assert "near twin in train: " in text
    group = text.partition("group: '")[2].partition("'")[0]
    assert leaks(FolderData(str(place), CLASSES, group=group)) == []


def test_mirrored_copies(place: Path) -> None:
    for index in range(8):
        picture = copies(index // 2, 0)
        write_image(place / f"images/{index}.png", picture[:, ::-1].copy() if index % 2 else picture)
        write_image(place / f"masks/{index}.png", np.eye(48, 64, dtype=np.uint8) * 255)
    rows = [f"{index},{'val' if index == 7 else 'train'}" for index in range(8)]
    (place / "all.csv").write_text("\n".join(["name,split", *rows]))
    (text,) = leaks(FolderData(str(place), CLASSES, lists="all.csv"))
    assert "1 of 1, e.g. 7 of 6" in text


def test_a_list_that_names_images_twice(place: Path) -> None:
    """No group would tell them apart."""
    rows = ["name,split"]
    for index in range(8):
        write_image(place / f"images/im{index}.png", copies(index, 0))
        write_image(place / f"masks/im{index}.png", np.eye(48, 64, dtype=np.uint8) * 255)
        rows.append(f"im{index},train")
    (place / "all.csv").write_text("\n".join([*rows, "im0,val", "im1,val"]))
    (text,) = leaks(FolderData(str(place), CLASSES, lists="all.csv"))
    assert "2 of 2, e.g. im0 of im0" in text
    assert "in both: take them out of one list" in text
    assert "group:" not in text


def test_what_is_no_leak(place: Path) -> None:
    for index in range(12):
        picture = np.asarray(scene(index)).copy()
        if index % 3 == 0:
            picture[:] = 255  # blank
        if index % 3 == 1:
            picture[4:] = 0  # nearly blank
        write_image(place / f"images/scan_rotor_{index:02d}.png", picture)
        write_image(place / f"masks/scan_rotor_{index:02d}.png", np.eye(48, 64, dtype=np.uint8) * 255)
    assert leaks(FolderData(str(place), CLASSES, val_fraction=0.5)) == []
    assert leaks(ShapesData(train=40, val=20, test=5, size=48)) == []


@pytest.mark.slow
def test_official_splits_of_real_images(seg_data: Path) -> None:
    classes = {f"class {index}": index for index in range(11)}
    assert leaks(FolderData(str(seg_data / "camvid"), classes, ignore=11)) == []
    assert leaks(FolderData(str(seg_data / "isbi2012"), {"membrane": 0, "cell": 255})) == []
    (text,) = leaks(FolderData(str(seg_data / "nuclei"), {"background": 0, "nucleus": 255}))
    assert "1 of 77, e.g. 20b20ab04937 of cb4df20a83b2" in text  # two slices of one embryo
