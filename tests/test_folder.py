"""FolderData: which files become which samples of which split, and what is said about those that cannot."""

import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile
import torch

from conftest import make_folder, write_image
from segmentation.data import SegmentationDataModule
from segmentation.data.base import SPLITS
from segmentation.data.folder import FolderData
from segmentation.errors import InputError

CLASSES = {"background": 0, "cell": 255}


def number(index: int, size: tuple[int, int] = (4, 6)) -> tuple[np.ndarray, np.ndarray]:
    """An image that holds its number in every pixel, and a mask with that many cell pixels."""
    mask = np.zeros(size, np.uint8)
    mask.flat[:index] = 255
    return np.full((*size, 3), index, np.uint8), mask


def write_pair(
    root: Path, name: str, index: int, images: str = "images", masks: str = "masks", end: str = "png"
) -> None:
    image, mask = number(index)
    write_image(root / images / f"{name}.{end}", image)
    write_image(root / masks / f"{name}.png", mask)


def pool(root: Path, count: int) -> Path:
    for index in range(count):
        write_pair(root, f"{index:03d}", index % 24)
    return root


def content(data: FolderData, split: str) -> dict[str, tuple[int, int]]:
    """Name -> (number in the image, number in the mask), by loading every sample."""
    samples = [data.load(split, index) for index in range(len(data.names(split)))]
    found = [(int(s["image"].flatten()[0]), int((s["mask"] == 1).sum())) for s in samples]
    return dict(zip(data.names(split), found, strict=True))


def refusal(**options: Any) -> str:
    with pytest.raises(InputError) as error:
        SegmentationDataModule(FolderData(**{"classes": CLASSES} | options)).check()
    assert "\n" not in str(error.value)
    return str(error.value)


def test_parallel_folders_are_divided_by_a_fraction(place: Path) -> None:
    data = FolderData(str(pool(place, 20)), CLASSES, val_fraction=0.3, test_fraction=0.1)
    assert [len(data.names(split)) for split in SPLITS] == [12, 6, 2]
    together = {name: pair for split in SPLITS for name, pair in content(data, split).items()}
    assert together == {f"{i:03d}": (i, i) for i in range(20)}  # disjoint, all of them, each with its own mask
    for split in SPLITS:
        assert data.names(split) == sorted(data.names(split))


def test_the_division_is_a_function_of_names_and_seed(place: Path) -> None:
    def names(root: Path, seed: int) -> list[list[str]]:
        data = FolderData(str(root), CLASSES, val_fraction=0.5, split_seed=seed)
        return [data.names(split) for split in SPLITS]

    pool(place / "a", 20)
    for index in reversed(range(20)):  # written in another order, elsewhere
        write_pair(place / "b", f"{index:03d}", 0)
    assert names(place / "a", 0) == names(place / "a", 0) == names(place / "b", 0)
    assert names(place / "a", 0) != names(place / "a", 1)
    assert names(place / "a", 0)[0] != [f"{i:03d}" for i in range(10)]
    assert names(place / "a", 0)[2] == []


@pytest.mark.parametrize(("count", "fraction", "sizes"), [(2, 0.2, [1, 1]), (3, 0.01, [2, 1]), (10, 0.5, [5, 5])])
def test_every_split_gets_an_image(place: Path, count: int, fraction: float, sizes: list[int]) -> None:
    data = FolderData(str(pool(place, count)), CLASSES, val_fraction=fraction)
    assert [len(data.names(split)) for split in ("train", "val")] == sizes


@pytest.mark.parametrize("fractions", [(0, 0), (1, 0), (-0.1, 0), (0.5, 0.5), (0.2, -0.1), (0.2, 1.2)])
def test_impossible_fractions(place: Path, fractions: tuple[float, float]) -> None:
    message = refusal(root=str(pool(place, 4)), val_fraction=fractions[0], test_fraction=fractions[1])
    assert "val_fraction" in message


def test_split_folders_are_found(place: Path) -> None:
    for number_, split in enumerate(SPLITS):
        for index in range(3 - number_):
            write_pair(place / split, f"{split}{index}", 5 * number_ + index)
    data = FolderData(str(place), CLASSES)
    found = {split: content(data, split) for split in SPLITS}
    assert found == {
        "train": {"train0": (0, 0), "train1": (1, 1), "train2": (2, 2)},
        "val": {"val0": (5, 5), "val1": (6, 6)},
        "test": {"test0": (10, 10)},
    }


def test_folders_by_pattern_and_without_a_test_split(place: Path) -> None:
    for index, split in enumerate(("train", "val")):
        write_pair(place, "a", 1 + index, f"pictures/{split}", f"{split}_truth/x", "jpg")
    data = FolderData(str(place), CLASSES, images="pictures/{split}", masks="{split}_truth/x")
    assert [data.names(split) for split in SPLITS] == [["a"], ["a"], []]
    assert content(data, "val") == {"a": (2, 2)}


def test_masks_of_all_splits_in_one_folder(place: Path) -> None:
    for index, split in enumerate(("train", "val")):
        write_pair(place, split, index, f"images/{split}", "masks")
    data = FolderData(str(place), CLASSES, images="images/{split}", masks="masks")
    assert content(data, "train") | content(data, "val") == {"train": (0, 0), "val": (1, 1)}


def test_list_files(place: Path) -> None:
    for index, name in enumerate(("a", "b.v1", "sub/c", "d.v2", "scan.tif")):
        write_pair(place, name, index)
    (place / "train.txt").write_text("\ufeffb.v1\r\n\r\n  sub/c.png \r\n", encoding="utf-8")
    (place / "val.txt").write_text("./d.v2\nscan.tif")
    data = FolderData(str(place), CLASSES, lists="{split}.txt")
    assert content(data, "train") == {"b.v1": (1, 1), "sub/c": (2, 2)}
    assert content(data, "val") == {"d.v2": (3, 3), "scan.tif": (4, 4)}
    assert data.names("test") == []


def test_list_files_that_cannot_be_used(place: Path) -> None:
    write_pair(place, "a", 0)
    write_image(place / "images/lonely.png", number(0)[0])
    (place / "train.txt").write_text("a\n")
    root = str(place)
    assert "the val split is empty. Fill val.txt" in refusal(root=root, lists="{split}.txt")
    (place / "val.txt").write_text("\n")
    message = refusal(root=root, lists="{split}.txt")
    assert "the val split is empty" in message
    assert "val.txt" in message
    (place / "val.txt").write_text("ghost\n")
    message = refusal(root=root, lists="{split}.txt")
    assert "val.txt: lists ghost" in message
    (place / "val.txt").write_text("lonely\n")
    message = refusal(root=root, lists="{split}.txt")
    assert "val.txt: lists lonely" in message
    assert "a list of its own" in refusal(root=root, lists="train.txt")  # else train would be val


def test_nested_folders_and_odd_names(place: Path) -> None:
    names = ["a/01", "b/01", "with space", "größe-日本", "100%", "%d %s {x}", "v1.2.3", "a.b/c.d", "UPPER", "x'y\"z"]
    for index, name in enumerate(names):
        write_pair(place, name, index, end="PNG" if name == "UPPER" else "png")
    for hidden in (".hidden", "._01", ".ipynb_checkpoints/01-checkpoint"):  # a Mac makes such of masks too
        write_pair(place, hidden, 0)
    (place / "images/Thumbs.db").write_text("")
    (place / "masks/README.txt").write_text("")
    data = FolderData(str(place), CLASSES)
    assert content(data, "train") | content(data, "val") == {name: (i, i) for i, name in enumerate(names)}


def test_image_without_mask_and_mask_without_image(place: Path) -> None:
    pool(place, 4)
    write_image(place / "images/sub/zz.jpg", number(0)[0])
    message = refusal(root=str(place))
    assert message.startswith(f"{place}/images/sub/zz.jpg: this image has no mask. Fix: add {place}/masks/sub/zz.*")
    write_image(place / "masks/sub/zz.png", number(0)[1])
    FolderData(str(place), CLASSES)
    for name in ("q1", "q2", "q3"):
        write_image(place / f"masks/{name}.png", number(0)[1])
    message = refusal(root=str(place))
    assert message.startswith(f"{place}/masks/q1.png: this mask has no image. Fix: add")
    assert "(3 files with such problems)" in message
    assert f"{place}/images/q1.*" in message


def test_image_without_instances(place: Path) -> None:
    pool(place, 2)
    write_image(place / "ids/000.png", np.zeros((4, 6), np.uint16))
    message = refusal(root=str(place), instances="ids")
    assert message.startswith(f"{place}/images/001.png: this image has no instance")


def test_two_files_of_one_name(place: Path) -> None:
    pool(place, 3)
    write_image(place / "images/001.jpg", number(1)[0])
    message = refusal(root=str(place))
    assert "001.jpg" in message
    assert "001.png" in message
    assert "same name" in message


def test_mask_of_another_size(place: Path) -> None:
    pool(place, 2)
    for name in ("000", "001"):
        write_image(place / f"masks/{name}.png", np.zeros((6, 4), np.uint8))
    data = FolderData(str(place), CLASSES)
    with pytest.raises(InputError, match=r"masks/00\d\.png: is 4x6 pixels, .* is 6x4.*resize_masks: true"):
        data.load("train", 0)


def test_missing_folders(place: Path) -> None:
    assert refusal(root=str(place / "nowhere")).startswith(f"{place}/nowhere: no such folder. Set data.dataset.root")
    assert refusal(root=str(place / "nowhere"), lists="{split}.txt").startswith(f"{place}/nowhere: no such folder")
    assert refusal(root=str(place)).startswith(f"{place}/masks: no such folder")
    write_image(place / "images/a.png", number(0)[0])
    assert refusal(root=str(place)).startswith(f"{place}/masks: no such folder")
    (place / "train").mkdir()
    assert refusal(root=str(place)).startswith(f"{place}/train/masks: no such folder")


def test_empty_splits(place: Path) -> None:
    write_pair(place / "train", "a", 0)
    message = refusal(root=str(place))
    assert "the val split is empty" in message
    assert "Fill val/images and val/masks" in message
    for kind in ("images", "masks"):
        (place / "one" / kind).mkdir(parents=True)
    assert "the train split is empty" in refusal(root=str(place / "one"))
    write_pair(place / "one", "a", 0)
    assert "the train split is empty" in refusal(root=str(place / "one"))


def test_environment_variables(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pool(place / "cells", 2)
    monkeypatch.delenv("MY_DATA", raising=False)
    for root in ("${MY_DATA}/cells", "$MY_DATA/cells"):
        message = refusal(root=root)
        assert "MY_DATA is not set" in message
        assert "export MY_DATA=" in message
    monkeypatch.setenv("MY_DATA", str(place))
    assert len(FolderData("${MY_DATA}/cells", CLASSES).names("train")) == 1
    monkeypatch.setenv("HOME", str(place))
    assert len(FolderData("~/cells", CLASSES).names("train")) == 1


def test_samples_have_the_contracts_types(place: Path) -> None:
    deep = np.arange(24, dtype=np.uint16).reshape(4, 6) * 2000
    ids = np.arange(24, dtype=np.uint16).reshape(4, 6) + 300
    for name in ("a", "b"):
        write_image(place / f"images/{name}.png", deep)
        write_image(place / f"masks/{name}.png", (deep > 20000).astype(np.uint8) * 255)
        write_image(place / f"ids/{name}.png", ids)
    data = pickle.loads(pickle.dumps(FolderData(str(place), CLASSES, channels=1, instances="ids")))
    sample = data.load("val", 0)
    assert {k: (v.dtype, tuple(v.shape)) for k, v in sample.items()} == {
        "image": (torch.uint16, (1, 4, 6)),
        "mask": (torch.int64, (4, 6)),
        "instance": (torch.int64, (4, 6)),
    }
    assert (sample["image"][0].numpy() == deep).all()
    assert (sample["mask"].numpy() == (deep > 20000)).all()
    assert (sample["instance"].numpy() == ids).all()


def test_files_that_their_tag_turns(place: Path) -> None:
    """Image, mask and ids of types that Pillow cannot read, in every orientation."""
    ids = np.random.default_rng(0).integers(0, 2, (6, 9)) * 7
    for orientation in range(1, 9):
        options: dict[str, Any] = {"extratags": [(274, "H", 1, orientation, True)], "photometric": "minisblack"}
        pixels = np.repeat(ids[..., None] * 1000, 5, axis=2).astype(np.uint16)
        for kind, array in (("images", pixels), ("masks", ids // 7), ("ids", ids)):
            (place / kind).mkdir(exist_ok=True)
            layout = {"planarconfig": "contig"} if kind == "images" else {}
            tifffile.imwrite(place / kind / f"{orientation}.tif", array, **options, **layout)
    data = FolderData(str(place), {"background": 0, "cell": 1}, instances="ids")
    samples = [data.load(split, index) for split in ("train", "val") for index in range(len(data.names(split)))]
    assert len(samples) == 8
    for sample in samples:
        assert torch.equal(sample["instance"], 7 * sample["mask"])
        assert (sample["image"].int() == 1000 * sample["instance"]).all()


def test_instances_in_colour_are_refused(place: Path) -> None:
    pool(place, 2)
    for name in ("000", "001"):
        write_image(place / f"ids/{name}.png", np.random.default_rng(0).integers(0, 255, (4, 6, 3), dtype=np.uint8))
    with pytest.raises(InputError, match=r"ids/00\d\.png: is a colour image"):
        FolderData(str(place), CLASSES, instances="ids").load("train", 0)


def test_unequal_sizes_load_whole(place: Path) -> None:
    sizes = {"a": (4, 6), "b": (9, 5), "c": (16, 16)}
    for name, size in sizes.items():
        image, mask = number(3, size)
        write_image(place / f"images/{name}.png", image)
        write_image(place / f"masks/{name}.png", mask)
    data = FolderData(str(place), CLASSES)
    found = {n: tuple(data.load(s, i)["mask"].shape) for s in SPLITS for i, n in enumerate(data.names(s))}
    assert found == sizes


@pytest.mark.parametrize(
    ("break_it", "message"),
    [
        (lambda root: (root / "val/masks/01.png").write_bytes(b"\x89PNG"), "val/masks/01.png: cannot be read"),
        (lambda root: (root / "train/images/02.png").write_bytes(b""), "train/images/02.png: cannot be read"),
        (
            lambda root: write_image(root / "test/masks/00.png", np.full((48, 40), 7, np.uint8)),
            r"test/masks/00.png: .* 7 \(1,920 pixels\), of 1,920",
        ),
        (
            lambda root: write_image(root / "train/images/03.png", np.zeros((48, 40), np.uint8)),
            "train/images/03.png: .*channels: 1",
        ),
        (
            lambda root: write_image(root / "val/masks/00.png", np.zeros((40, 48), np.uint8)),
            "val/masks/00.png: is 48x40 pixels, but its image 00.png is 40x48",
        ),
    ],
)
def test_check_finds_a_bad_file_in_any_split(place: Path, break_it: Any, message: str) -> None:
    root = make_folder(place / "data", {"train": 4, "val": 2, "test": 1})
    break_it(root)
    with pytest.raises(InputError, match=message):
        SegmentationDataModule(FolderData(str(root), CLASSES)).check()
