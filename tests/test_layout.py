"""Layouts by configuration: each is written to disk as people have it, and every pair must be found, and no other."""

import os
from pathlib import Path

import numpy as np
import pytest
import torch

from conftest import TINY_RUN, train, write_image
from segmentation.data import FolderData, SegmentationDataModule
from segmentation.data.base import SPLITS
from segmentation.data.labels import IGNORE_INDEX
from segmentation.doctor import diagnose
from segmentation.errors import InputError

CLASSES = {"ground": 0, "thing": 255}
LAYOUTS = {
    "parallel folders": ("images/{n}.png", "masks/{n}.png", {}),
    "folders of other names": ("scans/{n}.png", "truth/{n}.png", {"images": "scans", "masks": "truth"}),
    "suffixes": ("{n}.jpg", "{n}_mask.png", {"images": "{name}.jpg", "masks": "{name}_mask.png"}),
    "suffixes of one ending": ("{n}.png", "{n}_mask.png", {"images": "{name}.png", "masks": "{name}_mask.png"}),
    "suffixes in sub-folders": (
        "x/{n}_rgb.png",
        "x/{n}_gt.png",
        {"images": "{name}_rgb.png", "masks": "{name}_gt.png"},
    ),
    "any ending": ("a/{n}_im.tif", "b/{n}_gt.png", {"images": "a/{name}_im", "masks": "b/{name}_gt"}),
    "one folder per image": (
        "{n}/image.png",
        "{n}/mask.png",
        {"images": "{name}/image.png", "masks": "{name}/mask.png"},
    ),
    "a folder of the image's name": (
        "{n}/{n}.png",
        "{n}/{n}_mask.png",
        {"images": "{name}/{name}.png", "masks": "{name}/{name}_mask.png"},
    ),
    "the same text twice": (
        "{n}/{n}.png",
        "{n}/{n}/{n}_gt.png",
        {"images": "{name}/{name}.png", "masks": "{name}/{name}/{name}_gt.png"},
    ),
    "a class twice": (
        "thing/{n}_thing.png",
        "thing/{n}_thing_gt.png",
        {"images": "{class}/{name}_{class}.png", "masks": "{class}/{name}_{class}_gt.png"},
    ),
    "images in the root": ("{n}.png", "masks/{n}.png", {"images": ".", "masks": "masks"}),
    "images in the root, by pattern": ("{n}.png", "masks/{n}.png", {"images": "{name}.png", "masks": "masks"}),
    "any suffix": ("{n}.png", "{n}_gt.tif", {"images": "{name}.*", "masks": "{name}_gt.*"}),
    "images in any folder": ("a/{n}.png", "b/c/{n}.png", {"images": "a/**/{name}", "masks": "b/**/{name}"}),
    "a name with dots and underscores": (
        "x/v1.2_{n}_a.png",
        "y/v1.2_{n}_a_gt.png",
        {"images": "x/{name}.*", "masks": "y/{name}_*.png"},
    ),
    "prefixes": ("img_{n}.png", "lab_{n}.png", {"images": "img_{name}.png", "masks": "lab_{name}.png"}),
}


def write(root: Path, image: str, mask: str, index: int) -> None:
    """Image and mask that both hold their number."""
    truth = np.zeros((6, 8), np.uint8)
    truth.flat[:index] = 255
    write_image(root / image, np.full((6, 8, 3), index * 5, np.uint8))
    write_image(root / mask, truth)


def found(data: FolderData) -> dict[int, int]:
    """Number in the image -> number in its mask, over all splits."""
    samples = [data.load(split, index) for split in SPLITS for index in range(len(data.names(split)))]
    return {round(float(s["image"].float().mean()) / 5): int((s["mask"] == 1).sum()) for s in samples}


@pytest.mark.parametrize("name", LAYOUTS)
def test_layout(name: str, place: Path) -> None:
    image, mask, options = LAYOUTS[name]
    for index in range(8):
        write(place, image.replace("{n}", f"s {index}"), mask.replace("{n}", f"s {index}"), index)
    data = FolderData(str(place), CLASSES, **options)
    assert data.problems == []
    assert found(data) == {index: index for index in range(8)}


@pytest.mark.parametrize("inner", ["{split}/images", "images/{split}"])
def test_splits_under_other_names(inner: str, place: Path) -> None:
    for index, called in enumerate(("training", "validation", "testing")):
        folder = inner.replace("{split}", called)
        write(place, f"{folder}/{index}.png", f"{folder.replace('images', 'masks')}/{index}.png", index)
    called = {"train": "training", "val": "validation", "test": "testing"}
    data = FolderData(str(place), CLASSES, images=inner, masks=inner.replace("images", "masks"), splits=called)
    assert [data.names(split) for split in SPLITS] == [["0"], ["1"], ["2"]]
    assert found(data) == {0: 0, 1: 1, 2: 2}


def test_a_validation_folder_of_another_name_is_named_in_the_error(place: Path) -> None:
    for split in ("train", "valid"):
        write(place, f"{split}/images/a.png", f"{split}/masks/a.png", 1)
    with pytest.raises(InputError, match=r"the val split is empty\..*splits: \{val: valid\}"):
        FolderData(str(place), CLASSES)
    assert len(FolderData(str(place), CLASSES, splits={"val": "valid"}).names("val")) == 1


def test_train_and_test_without_val(place: Path) -> None:
    for index in range(10):
        split = "train" if index < 8 else "test"
        write(place, f"{split}/images/{index}.png", f"{split}/masks/{index}.png", index)
    with pytest.raises(InputError, match=r"the val split is empty.*val_fraction: 0\.2"):
        FolderData(str(place), CLASSES)
    data = FolderData(str(place), CLASSES, val_fraction=0.25)
    assert [len(data.names(split)) for split in SPLITS] == [6, 2, 2]
    assert data.names("test") == ["8", "9"]
    with pytest.raises(InputError, match="needs no fraction: take it away"):
        FolderData(str(place), CLASSES, val_fraction=0.25, test_fraction=0.25)


def test_the_class_from_a_folders_name(place: Path) -> None:
    classes = {"ground": 0, "cat": 1, "dog": 2}
    for index, name in enumerate(("cat", "cat", "dog", "dog")):
        write(place, f"{name}/{index % 2}.png", f"{name}/{index % 2}_mask.png", 1 + index)
    data = FolderData(str(place), classes, images="{class}/{name}.png", masks="{class}/{name}_mask.png")
    names = {n: (s, i) for s in SPLITS for i, n in enumerate(data.names(s))}
    assert set(names) == {"cat/0", "cat/1", "dog/0", "dog/1"}
    for name, at in names.items():
        pixels = torch.bincount(data.load(*at)["mask"].flatten(), minlength=3).tolist()
        count = 1 + int(name[-1]) + 2 * name.startswith("dog")
        assert pixels == ([48 - count, count, 0] if name.startswith("cat") else [48 - count, 0, count])
    write(place, "bird/0.png", "bird/0_mask.png", 1)
    with pytest.raises(InputError, match=r"bird.*names no class\. Declared: ground, cat, dog"):
        SegmentationDataModule(
            FolderData(str(place), classes, images="{class}/{name}.png", masks="{class}/{name}_mask.png")
        ).check()


def test_a_mask_per_object(place: Path) -> None:
    for index in range(2):
        write_image(place / f"{index}/images/x.png", np.zeros((6, 8, 3), np.uint8))
        for number in range(3):
            mask = np.zeros((6, 8), np.uint8)
            mask[number * 2, : 2 + index] = 255
            write_image(place / f"{index}/masks/{number}.png", mask)
    data = FolderData(str(place), CLASSES, images="{name}/images/*", masks="{name}/masks/*")
    sample = data.load("train", 0)
    assert sample["instance"][::2, 0].tolist() == [1, 2, 3]
    assert torch.equal(sample["instance"] > 0, sample["mask"] == 1)
    with pytest.raises(InputError, match="tell two classes apart"):
        FolderData(str(place), CLASSES | {"third": 7}, images="{name}/images/*", masks="{name}/masks/*")


def test_a_second_mask_of_one_name_is_left_out_and_changes_nothing_else(place: Path) -> None:
    for index in range(4):
        write(place, f"images/{index}.png", f"masks/{index}.png", index)
    write_image(place / "masks/1.tif", np.full((6, 8), 9, np.uint8))
    data = FolderData(str(place), {"ground": 0, "thing": 255, "other": 7})  # three classes: no masks of objects
    assert len(data.problems) == 1
    assert found(data) == {index: index for index in range(4)}


def test_lists_in_csv_and_with_paths(place: Path) -> None:
    for index in range(5):
        write(place, f"images/s{index}.jpg", f"masks/s{index}.png", index)
    (place / "all.csv").write_text("name,split,hospital\ns0,train,a\ns1.jpg,train,b\nimages/s2.jpg,val,a\ns3,test,c\n")
    data = FolderData(str(place), CLASSES, lists="all.csv")
    assert [data.names(split) for split in SPLITS] == [["s0", "s1"], ["s2"], ["s3"]]
    (place / "train.txt").write_text("/SegNet/images/s4.jpg /SegNet/masks/s4.png\n")
    (place / "val.txt").write_text("s1 3 1 1\n")
    data = FolderData(str(place), CLASSES, lists="{split}.txt")
    assert [data.names(split) for split in SPLITS] == [["s4"], ["s1"], []]
    (place / "bad.csv").write_text("image,split\ns0,training\n")
    with pytest.raises(InputError, match=r"Fill bad\.csv \(rows that say train.*splits: \{val: valid\}"):
        FolderData(str(place), CLASSES, lists="bad.csv")


@pytest.mark.parametrize(
    ("file", "text", "found"),
    [
        ("all.csv", "name,hospital\ns0,a\n", "the columns name, hospital;"),
        ("all.yaml", "fold1: [s0]\nfold2: [s1]\n", "the lists fold1, fold2;"),
        ("none.csv", "", "no rows;"),
    ],
)
def test_a_list_without_splits_says_what_it_has(place: Path, file: str, text: str, found: str) -> None:
    for index in range(2):
        write(place, f"images/s{index}.jpg", f"masks/s{index}.png", index)
    (place / file).write_text(text)
    with pytest.raises(InputError, match=f"say train in a column .*it has .*{found}") as error:
        FolderData(str(place), CLASSES, lists=file)
    assert 'a list of its own: "{split}.' in str(error.value)


def test_jpeg_masks_by_a_declared_threshold(place: Path) -> None:
    rng = np.random.default_rng(0)
    truth = rng.integers(0, 2, (2, 4, 4), dtype=np.uint8).repeat(12, 1).repeat(12, 2) * 255  # no block of JPEG's
    for index in range(2):
        write_image(place / f"images/{index}.png", np.zeros((48, 48, 3), np.uint8))
        (place / "masks").mkdir(exist_ok=True)
        write_image(place / f"masks/{index}.jpg", truth[index])
    with pytest.raises(InputError, match="mask_threshold: 128"):
        SegmentationDataModule(FolderData(str(place), CLASSES)).check()
    for classes, bright in ((CLASSES, 1), ({"thing": 255, "ground": 0}, 0)):
        data = FolderData(str(place), classes, mask_threshold=128)
        index = int(data.names("train")[0])
        assert torch.equal(data.load("train", 0)["mask"] == bright, torch.from_numpy(truth[index] > 0))


def test_links_are_followed_and_loops_end(place: Path) -> None:
    for index in range(4):
        write(place / "far", f"{index}.png", f"../masks/{index}.png", index)
    (place / "images").symlink_to(place / "far", target_is_directory=True)
    (place / "far/loop").symlink_to(place / "far", target_is_directory=True)
    (place / "far/up").symlink_to(place, target_is_directory=True)
    (place / "far/itself.png").symlink_to(place / "far/itself.png")
    data = FolderData(str(place), CLASSES)
    assert any("itself.png" in problem for problem in data.problems)
    assert {n for split in SPLITS for n in data.names(split)} == {"0", "1", "2", "3"}


def test_groups_are_never_torn_apart(place: Path) -> None:
    for index in range(24):
        write(place, f"images/p{index // 4}_{index:02d}.png", f"masks/p{index // 4}_{index:02d}.png", index)
    data = FolderData(str(place), CLASSES, val_fraction=0.3, test_fraction=0.2, group=r"^(p\d+)_")
    parts = [{name.split("_")[0] for name in data.names(split)} for split in SPLITS]
    assert [len(data.names(split)) for split in SPLITS] == [8, 8, 8]  # of groups of four
    assert len(set.union(*parts)) == sum(map(len, parts)) == 6
    with pytest.raises(InputError, match=r"group '\(' is no regular expression"):
        FolderData(str(place), CLASSES, group="(")


def test_channels_type_and_scale_are_those_of_the_first_image(place: Path) -> None:
    deep = np.arange(48, dtype=np.uint16).reshape(6, 8) * 80
    for name in ("a", "b", "c"):
        write_image(place / f"images/{name}.png", deep)
        write_image(place / f"masks/{name}.png", np.zeros((6, 8), np.uint8))
    labels = FolderData(str(place), CLASSES, scale=4095).labels
    assert (labels.channels, labels.dtype, labels.scale) == (1, "uint16", 4095)
    write_image(place / "images/b.png", deep.astype(np.uint8))
    with pytest.raises(InputError, match=r"is uint(8|16), but the first image is uint(16|8)\. Save all as one type"):
        SegmentationDataModule(FolderData(str(place), CLASSES)).check()


def test_classes_nobody_declared_are_suggested(place: Path) -> None:
    for index in range(3):
        write(place, f"images/{index}.png", f"masks/{index}.png", index)
    with pytest.raises(InputError, match=r"classes is not declared.*Fix: classes: \{background: 0, foreground: 255\}"):
        FolderData(str(place))


def test_nothing_in_the_data_folder_is_written(place: Path) -> None:
    root = place / "data"
    for index in range(4):
        write(root, f"images/{index}.png", f"masks/{index}.png", index)
    before = {path: (path.stat().st_mtime_ns, path.stat().st_size) for path in root.rglob("*")}
    for path in [root, *root.rglob("*")]:
        os.chmod(path, 0o555 if path.is_dir() else 0o444)
    module = SegmentationDataModule(FolderData(str(root), CLASSES), folds=2, on_bad_file="skip")
    module.check()
    assert {path: (path.stat().st_mtime_ns, path.stat().st_size) for path in root.rglob("*")} == before


def test_images_of_one_name_in_many_folders(place: Path) -> None:
    """Words in braces tell them apart; a star would mix them."""
    for index in range(4):
        folder = f"p{index // 2}"
        write(place, f"{folder}/images/{index % 2}.jpg", f"{folder}/masks/{index % 2}.png", 3 * index)
    data = FolderData(str(place), CLASSES, images="{patient}/images/{name}", masks="{patient}/masks/{name}")
    assert {name for split in SPLITS for name in data.names(split)} == {"p0/0", "p0/1", "p1/0", "p1/1"}
    assert found(data) == {0: 0, 3: 3, 6: 6, 9: 9}
    for images, masks in (
        ("*/images/{name}", "{patient}/masks/{name}"),
        ("{name}/images/0.jpg", "*/masks/{name}.png"),
        ("**/{name}.jpg", "*/masks/{name}.png"),
    ):
        with pytest.raises(InputError, match=r"masks/.\.png: .*masks/.\.png has the same name, .*\{folder\}/\{name\}"):
            FolderData(str(place), CLASSES, images=images, masks=masks)
    with pytest.raises(InputError, match=r"same words in braces"):
        FolderData(str(place), CLASSES, images="{patient}/images/{name}", masks="{hospital}/masks/{name}")


def test_folders_outside_of_the_root(place: Path) -> None:
    for index in range(4):
        write(place, f"here/{index}.png", f"there/masks/{index}.png", index)
    there = str(place / "there/masks")
    data = FolderData(str(place / "here"), CLASSES, images=".", masks=there, instances=f"{there}/{{name}}.png")
    assert found(data) == {index: index for index in range(4)}


CLASS_MASKS = {"ground": 0, "cat": 1, "traffic_light": 2}


@pytest.mark.parametrize("classes", [None, {"ground": 0, "car": 1}, {"ground": 0, "car": 1, "red_car": 2}])
def test_names_of_classes_that_end_alike(classes: dict[str, int] | None, place: Path) -> None:
    for name in ("a_1", "a_2"):
        write_image(place / f"images/{name}.png", np.zeros((4, 6, 3), np.uint8))
        for row, thing in enumerate(("car", "red_car")):
            mask = np.zeros((4, 6), np.uint8)
            mask[row] = 255
            write_image(place / f"masks/{name}_{thing}.png", mask)
    masks = "masks/{name}_{class}.png"
    if classes is None:
        with pytest.raises(InputError) as caught:
            FolderData(str(place), masks=masks)
        assert caught.value.fix["classes"] == {"background": 0, "car": 1, "red_car": 2}
        return
    data = FolderData(str(place), classes, masks=masks)
    assert data.problems == []
    assert data.load("train", 0)["mask"][:, 0].tolist() == [1, len(classes) - 1 if len(classes) > 2 else 0, 0, 0]
    assert len(data.find_problems()) == (0 if "red_car" in classes else 1)


def test_a_class_that_paths_of_images_name_is_not_left_out(place: Path) -> None:
    """Its masks are read, and empty."""
    for thing in ("MT_Free", "MT_Crack"):
        for index in range(4):
            mask = np.full((4, 6), 255 * (thing == "MT_Crack"), np.uint8)
            write_image(place / f"{thing}/Imgs/{thing}{index}.jpg", np.full((4, 6, 3), index, np.uint8))
            write_image(place / f"{thing}/Imgs/{thing}{index}.png", mask)
    files = {"images": "{class}/Imgs/{name}.jpg", "masks": "{class}/Imgs/{name}.png"}
    assert FolderData(str(place), {"good": 0, "MT_Crack": 1}, **files).find_problems() == []


@pytest.mark.parametrize("masks", ["masks/{name}_{class}.png", "masks/{class}/{name}.png"])
def test_a_mask_per_class(place: Path, masks: str) -> None:
    for name in ("a_1", "a_2"):
        write_image(place / f"images/{name}.png", np.zeros((4, 6, 3), np.uint8))
        for row, thing in enumerate(("traffic_light", "cat", "bird")):
            mask = np.zeros((4, 6), np.uint8)
            mask[row : row + 2] = 255
            write_image(place / masks.replace("{name}", name).replace("{class}", thing), mask)
    data = FolderData(str(place), CLASS_MASKS, masks=masks)
    sample = data.load("train", 0)
    assert sample["mask"][:, 0].tolist() == [2, 2, 1, 0]  # of two that overlap the later class; birds are left out
    assert "instance" not in sample
    (problem,) = data.find_problems()
    assert "left out: bird, e.g." in problem.text
    assert "classes: {..., bird: 3}" in problem.text
    capitals = {name.title(): value for name, value in CLASS_MASKS.items()}
    assert FolderData(str(place), capitals, masks=masks).load("train", 0)["mask"].equal(sample["mask"])
    with pytest.raises(InputError, match=r"this image has no mask. Fix: add .*ground\|dog"):
        SegmentationDataModule(FolderData(str(place), {"ground": 0, "dog": 1}, masks=masks)).check()


@pytest.mark.parametrize(
    ("file", "text", "options"),
    [
        ("all.csv", "id;image_path;mask_path;fold\n1;images/s0.jpg;masks/s0.png;train\n2;images/s1.jpg;;val\n", {}),
        ("all.csv", "name,class,split\ns0,val,train\ns1,train,val\n", {}),
        ("all.tsv", "file\tset\ns0\ttrain\ns1\tval\n", {}),
        ("all.yaml", "train: [s0]\nval: [images/s1.jpg]\ninfo: {by: us}\n", {}),
        ("all.json", '{"training": ["s0.jpg"], "val": ["s1"]}', {"splits": {"train": "training"}}),
        ("all.txt", "s0 train\ns1 val\n", {}),
        ("{split}.csv", "path,mask\nimages/{n}.jpg,masks/{n}.png\n", {}),
        ("{split}_list.csv", "images/{n}.jpg,masks/{n}.png\n", {}),
    ],
)
def test_lists_as_data_sets_ship_them(place: Path, file: str, text: str, options: dict) -> None:
    for index, split in enumerate(("train", "val")):
        write(place, f"images/s{index}.jpg", f"masks/s{index}.png", index)
        (place / file.replace("{split}", split)).write_text(text.replace("{n}", f"s{index}"))
    data = FolderData(str(place), CLASSES, lists=file, **options)
    assert [data.names(split) for split in SPLITS] == [["s0"], ["s1"], []]


def test_classes_that_roboflow_has_written(place: Path) -> None:
    for split in ("train", "valid"):
        write_image(place / split / "a.rf.1.jpg", np.zeros((6, 8, 3), np.uint8))
        write_image(place / split / "a.rf.1_mask.png", np.eye(6, 8, dtype=np.uint8) * 2)
    (place / "train/_classes.csv").write_text("Pixel Value, Class\n0, background\n1, cat\n2, big dog\n")
    data = FolderData(str(place), images="{split}/{name}.jpg", masks="{split}/{name}_mask.png", splits={"val": "valid"})
    assert data.labels.names == ["background", "cat", "big dog"]
    assert int((data.load("val", 0)["mask"] == 2).sum()) == 6


def test_masks_of_another_size_pixels_outside_the_field_of_view_and_smooth_edges(place: Path) -> None:
    red = np.zeros((6, 8, 3), np.uint8)
    red[:, 4:] = (250, 10, 0)
    red[:, 3] = (60, 5, 0)
    valid = np.ones((3, 4), np.uint8)
    valid[0] = 0
    for name in ("a", "b"):
        write_image(place / f"images/{name}.png", np.zeros((12, 16, 3), np.uint8))
        write_image(place / f"masks/{name}.png", red)
        write_image(place / f"fov/{name}_fov.png", valid)
    options = {"valid": "fov/{name}_fov.png", "resize_masks": True}
    classes = {"ground": "#000000", "crack": "#FF0000"}
    with pytest.raises(InputError, match=r"#FA0A00 .*mask values that classes does not declare|does not declare"):
        FolderData(str(place), classes, **options).load("train", 0)
    mask = FolderData(str(place), classes, mask_tolerance=100, **options).load("train", 0)["mask"]
    assert (mask[:4] == IGNORE_INDEX).all()
    assert mask[4].tolist() == [0] * 8 + [1] * 8
    numbers = FolderData(str(place), {"a": 0, "b": 2}, masks="fov/{name}_fov.png", resize_masks=True, mask_tolerance=1)
    assert numbers.load("train", 0)["mask"].unique().tolist() == [0]  # 1 is as near to both: the first
    (place / "fov/a_fov.png").unlink()
    with pytest.raises(InputError, match=r"a\.png: this image has no validity mask. Fix: add .*fov/a_fov\.png"):
        SegmentationDataModule(FolderData(str(place), classes, **options)).check()


def test_masks_of_objects_in_any_colour(place: Path) -> None:
    for index in range(2):
        write_image(place / f"{index}/image.png", np.zeros((6, 8, 3), np.uint8))
        for number in range(2):
            mask = np.zeros((6, 8, 3), np.uint8)
            mask[3 * number, :2, number] = 200
            write_image(place / f"{index}/masks/{number}.png", mask)
    sample = FolderData(str(place), CLASSES, images="{name}/image.png", masks="{name}/masks/*").load("train", 0)
    assert sample["instance"][[0, 3], 0].tolist() == [1, 2]
    assert torch.equal(sample["instance"] > 0, sample["mask"] == 1)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["roboflow", "a mask per class, smaller, and a field of view"])
def test_the_doctors_overlay_trains(place: Path, kind: str) -> None:
    mask = np.eye(64, dtype=np.uint8)
    options = ["--data.dataset", "FolderData", "--data.dataset.root", str(place / "data")]
    for index in range(6):
        image = np.random.default_rng(index).integers(0, 255, (64, 64, 3), dtype=np.uint8)
        split = "train" if index < 4 else "valid"
        if kind == "roboflow":
            write_image(place / f"data/{split}/{index}.rf.a.png", image)
            write_image(place / f"data/{split}/{index}.rf.a_mask.png", mask)
        else:
            write_image(place / f"data/images/{index}.png", image)
            write_image(place / f"data/fov/{index}.png", np.ones((64, 64), np.uint8))
            write_image(place / f"data/masks/{index}_cat.png", mask[::2, ::2])
            write_image(place / f"data/masks/{index}_dog.png", np.fliplr(mask[::2, ::2]))
    if kind == "roboflow":
        (place / "data/train/_classes.csv").write_text("Pixel Value, Class\n0, background\n1, cat\n")
        options += ["--data.dataset.images", "{split}/{name}.png", "--data.dataset.masks", "{split}/{name}_mask.png"]
        options += ["--data.dataset.splits", "{val: valid}"]
    else:
        options += ["--data.dataset.masks", "masks/{name}_{class}.png", "--data.dataset.resize_masks", "true"]
        options += ["--data.dataset.classes", "{ground: 0, cat: 1, dog: 2}", "--data.dataset.valid", "fov"]
    assert diagnose(options) == []
    cli = train("--config", "doctor/overlay.yaml", *TINY_RUN, "--name", "run")
    assert cli.datamodule.labels.names[1] == "cat"
    assert (place / "runs/run/summary.json").is_file()


def test_a_second_mask_of_a_name_is_no_image(place: Path) -> None:
    for name in ("a", "b", "c"):
        write_image(place / f"{name}.png", np.zeros((8, 8, 3), np.uint8))
        write_image(place / f"{name}_mask.png", np.zeros((8, 8), np.uint8))
    write_image(place / "a_mask.tif", np.zeros((8, 8), np.uint8))
    data = FolderData(str(place), classes=CLASSES, images="{name}.*", masks="{name}_mask.*", val_fraction=0.34)
    assert sorted(data.names("train") + data.names("val")) == ["a", "b", "c"]
    [problem] = data.problems
    assert "a_mask.tif" in problem
    assert "Keep one" in problem
