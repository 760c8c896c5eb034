"""Files that describe masks: each format is written as people have it, and the masks that it means come back."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from pycocotools import mask as coco_mask
from scipy.io import savemat
from skimage.draw import polygon2mask

from conftest import documented_options, write_image
from segmentation.data import FolderData, SegmentationDataModule
from segmentation.data.io import read_mask
from segmentation.doctor import diagnose
from segmentation.errors import InputError

HEIGHT, WIDTH = 12, 16
#: Left, top, right, bottom: the second overlaps the first, and is drawn later.
BOXES = {
    "a": [("cat", 1, 2, 7, 8), ("dog", 5, 4, 12, 10)],
    "b": [("dog", 0, 0, 3, 12)],
    "c": [],
    "d": [("cat", 9, 9, 16, 12)],
}
IDS = {"cat": 3, "dog": 18}


def outline(left: int, top: int, right: int, bottom: int) -> list[float]:
    return [left, top, right, top, right, bottom, left, bottom]


def truth(name: str) -> tuple[np.ndarray, np.ndarray]:
    """Class index, cat 1 and dog 2, and instance id of each pixel."""
    index, ids = np.zeros((2, HEIGHT, WIDTH), np.int64)
    for number, (category, left, top, right, bottom) in enumerate(BOXES[name], start=1):
        index[top:bottom, left:right] = 1 + list(IDS).index(category)
        ids[top:bottom, left:right] = number
    return index, ids


def pixels(left: int, top: int, right: int, bottom: int) -> np.ndarray:
    mask = np.zeros((HEIGHT, WIDTH), np.uint8, order="F")
    mask[top:bottom, left:right] = 1
    return mask


def runs(mask: np.ndarray) -> list[int]:
    """Lengths of the runs of 0 and 1 in turn, down the columns."""
    flat = mask.T.ravel()
    edges = np.flatnonzero(np.diff(flat, prepend=0)).tolist()
    return np.diff([0, *edges, flat.size]).tolist()


def as_coco(region: Callable[..., Any], folder: str = "") -> dict:
    images, annotations = [], []
    for number, (name, boxes) in enumerate(BOXES.items(), start=7):
        images.append({"id": number, "file_name": f"{folder}{name}.png", "height": HEIGHT, "width": WIDTH})
        for category, *box in boxes:
            one = {"id": len(annotations), "image_id": number, "category_id": IDS[category], "iscrowd": 0}
            annotations.append({**one, "segmentation": region(*box)})
    categories = [{"id": number, "name": name} for name, number in {**IDS, "cow": 21}.items()]
    return {"images": images, "annotations": annotations, "categories": categories}


def uncompressed(*box: int) -> dict:
    return {"size": [HEIGHT, WIDTH], "counts": runs(pixels(*box))}


def compressed(*box: int) -> dict:
    rle = coco_mask.encode(pixels(*box))
    return {"size": rle["size"], "counts": rle["counts"].decode()}


def write_coco(root: Path, region: Callable[..., Any] = lambda *box: [outline(*box)], folder: str = "") -> dict:
    (root / "instances.json").write_text(json.dumps(as_coco(region, folder)))
    return {"masks": "instances.json"}


def write_labelme(root: Path) -> dict:
    for name, boxes in BOXES.items():
        shapes = []
        for category, *box in boxes:
            points = np.reshape(outline(*box), (-1, 2)).tolist()
            shapes.append({"label": category, "points": points, "shape_type": "polygon", "group_id": None})
        content = {"version": "5.4", "shapes": shapes, "imagePath": f"{name}.png", "imageData": None}
        content |= {"imageHeight": HEIGHT, "imageWidth": WIDTH}
        (root / f"images/{name}.json").write_text(json.dumps(content))
    return {"masks": "images/{name}.json"}


def write_yolo(root: Path) -> dict:
    (root / "labels").mkdir()
    for name, boxes in BOXES.items():
        lines = []
        for category, *box in boxes:
            points = np.reshape(outline(*box), (-1, 2)) / (WIDTH, HEIGHT)
            lines.append(" ".join(map(str, [list(IDS).index(category), *points.ravel()])))
        (root / f"labels/{name}.txt").write_text("\n".join(lines))
    return {"masks": "labels"}


def write_runs(root: Path) -> dict:
    lines = ["ImageId,ClassId,EncodedPixels"]
    for name, boxes in BOXES.items():
        for category, *box in boxes:
            lengths = runs(pixels(*box))
            ends = np.cumsum(lengths)
            numbers = [f"{start + 1} {length}" for start, length in zip(ends[::2], lengths[1::2], strict=False)]
            lines.append(f"{name}.png,{1 + list(IDS).index(category)},{' '.join(numbers)}")
        if not boxes:
            lines.append(f"{name}.png,1,")
    (root / "train.csv").write_text("\n".join(lines))
    return {"masks": "train.csv"}


def write_roboflow(root: Path) -> dict:
    for split, names in {"train": "ab", "valid": "cd"}.items():
        content = as_coco(lambda *box: [outline(*box)])
        content["images"] = [image for image in content["images"] if image["file_name"][0] in names]
        numbers = {image["id"] for image in content["images"]}
        content["annotations"] = [one for one in content["annotations"] if one["image_id"] in numbers]
        (root / split).mkdir()
        (root / f"{split}/_annotations.coco.json").write_text(json.dumps(content))
        for name in names:
            (root / f"images/{name}.png").rename(root / f"{split}/{name}.png")
    return {"images": "{split}", "masks": "{split}/_annotations.coco.json", "splits": {"val": "valid"}}


NAMED = {"background": 0, "cat": 1, "dog": 2}
FORMATS: dict[str, Callable[[Path], dict]] = {
    "COCO": write_coco,
    "COCO, uncompressed run lengths": lambda root: write_coco(root, uncompressed),
    "COCO, compressed run lengths": lambda root: write_coco(root, compressed),
    "COCO, other folders": lambda root: write_coco(root, folder="somewhere/else/"),
    "COCO, folders of Windows": lambda root: write_coco(root, folder="C:\\somewhere\\else\\"),
    "COCO, an absolute path": lambda root: write_coco(root, folder="/somewhere/./else/"),
    "COCO, as Roboflow": write_roboflow,
    "labelme": write_labelme,
    "YOLO": write_yolo,
    "run lengths": write_runs,
}


def make(root: Path, name: str) -> dict:
    rng = np.random.default_rng(0)
    for image in BOXES:
        write_image(root / f"images/{image}.png", rng.integers(0, 255, (HEIGHT, WIDTH, 3), dtype=np.uint8))
    return FORMATS[name](root)


def check(data: FolderData) -> None:
    assert data.problems == []
    found = set()
    for split in ("train", "val"):
        for position, name in enumerate(data.names(split)):
            sample = data.load(split, position)
            index, ids = truth(name)
            assert (sample["mask"].numpy() == index).all(), name
            assert (sample["instance"].numpy() == ids).all(), name
            found.add(name)
    assert found == BOXES.keys()


@pytest.mark.parametrize("name", ["COCO:", "COCO, as Roboflow", "labelme", "YOLO", "run lengths"])
def test_the_documented_options(name: str, place: Path) -> None:
    assert make(place, name.strip(":")) == documented_options(name)


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_gives_its_masks_and_instances(name: str, place: Path) -> None:
    options = make(place, name)
    check(FolderData(str(place), NAMED, instances=options["masks"], **options))


@pytest.mark.parametrize("name", FORMATS)
def test_classes_are_suggested_for_all_that_is_drawn(name: str, place: Path) -> None:
    options = make(place, name)
    with pytest.raises(InputError) as caught:
        FolderData(str(place), **options)
    suggested = caught.value.fix["classes"]
    assert suggested in (NAMED, {"background": 0, "class_1": 1, "class_2": 2})
    check(FolderData(str(place), suggested, instances=options["masks"], **options))
    mine = dict(zip(["rest", "Katze", "Hund"], [0, 1, 2], strict=True))
    if suggested != NAMED:
        check(FolderData(str(place), mine, instances=options["masks"], **options))


def test_the_doctor_goes_on_with_what_is_drawn(place: Path, capsys: pytest.CaptureFixture) -> None:
    make(place, "COCO")
    data = ["--data.dataset", "FolderData", "--data.dataset.root", str(place)]
    problems = diagnose([*data, "--data.dataset.masks", "instances.json"])
    stops = [problem.text for problem in problems if problem.stops]
    assert len(stops) == 1
    assert "classes: {background: 0, cat: 1, dog: 2}" in stops[0]
    assert "dog" in capsys.readouterr().out
    suggested = yaml.safe_load(Path("doctor/overlay.yaml").read_text())["data"]["dataset"]["init_args"]
    check(FolderData(**suggested, instances="instances.json"))


def test_what_is_not_declared_is_named_and_may_be_ignored(place: Path) -> None:
    make(place, "COCO")
    data = {"root": str(place), "masks": "instances.json", "instances": "instances.json"}
    with pytest.raises(InputError, match=r"classes: \{background: 0, cat: 1, dog: 2\}, or, .* ignore: \[dog\]"):
        FolderData(classes={"background": 0, "cat": 1}, **data)
    ignoring = FolderData(classes={"background": 0, "cat": 1}, ignore=["dog"], **data)
    for split in ("train", "val"):
        for position, name in enumerate(ignoring.names(split)):
            index, ids = truth(name)
            sample = ignoring.load(split, position)
            assert (sample["mask"].numpy() == np.where(index == 2, -100, index)).all()
            assert (sample["instance"].numpy() == np.where(index == 2, 0, ids)).all()


def test_the_first_class_is_what_no_shape_covers(place: Path) -> None:
    make(place, "COCO")
    with pytest.raises(InputError, match=r"begins with cat.*background: 0"):
        FolderData(str(place), {"cat": 1, "dog": 2}, masks="instances.json")


def test_crowds_are_ignored(place: Path) -> None:
    make(place, "COCO")
    content = json.loads((place / "instances.json").read_text())
    for annotation in content["annotations"]:
        if annotation["category_id"] == IDS["dog"]:
            annotation["iscrowd"] = 1
            annotation["segmentation"] = {"size": [HEIGHT, WIDTH], "counts": [0, HEIGHT * WIDTH]}
    (place / "instances.json").write_text(json.dumps(content))
    data = FolderData(str(place), {"background": 0, "cat": 1}, masks="instances.json", val_fraction=0.5)
    masks = {}
    for split in ("train", "val"):
        for position, name in enumerate(data.names(split)):
            masks[name] = data.load(split, position)["mask"]
    assert masks["b"].unique().tolist() == [-100]
    assert masks["d"].unique().tolist() == [0, 1]


def test_polygons_cover_the_pixels_whose_centres_they_hold(place: Path) -> None:
    rng = np.random.default_rng(0)
    (place / "images").mkdir()
    (place / "labels").mkdir()
    corners = {}
    for name in "abcdefgh":
        angles = np.sort(rng.uniform(0, 2 * np.pi, 9))
        radii = rng.uniform(20, 60, 9)
        corners[name] = np.stack([64 + radii * np.cos(angles), 64 + radii * np.sin(angles)], axis=1)
        write_image(place / f"images/{name}.png", np.zeros((128, 128, 3), np.uint8))
        (place / f"labels/{name}.txt").write_text(f"0 {' '.join(map(str, (corners[name] / 128).ravel()))}\n")
    data = FolderData(str(place), {"background": 0, "thing": 1}, masks="labels/{name}.txt")
    for position, name in enumerate(data.names("train")):
        mask = data.load("train", position)["mask"].numpy() == 1
        centres = polygon2mask((128, 128), corners[name][:, ::-1] - 0.5)
        assert (mask & centres).sum() / (mask | centres).sum() > 0.97
        assert abs(int(mask.sum()) - int(centres.sum())) < 40  # no half pixel all around, which would be 150


@pytest.mark.parametrize(
    ("header", "row"),
    [
        ("Image_Label,EncodedPixels", "{image}.png_{category},{runs}"),
        ("ImageId_ClassId,EncodedPixels", "{image}.png_{number},{runs}"),
        ("filename,category,rle", "{image}.png,{category},{runs}"),
        (",rle,image_id,label", "0,{runs},{image},{category}"),
    ],
)
def test_columns_of_run_lengths_as_kaggle_has_them(header: str, row: str, place: Path) -> None:
    make(place, "run lengths")
    lines = [header]
    for line in (place / "train.csv").read_text().splitlines()[1:]:
        name, number, lengths = line.split(",")
        category = list(IDS)[int(number) - 1]
        lines.append(row.format(image=name.removesuffix(".png"), category=category, number=number, runs=lengths))
    (place / "train.csv").write_text("\n".join(lines))
    check(FolderData(str(place), NAMED, masks="train.csv", instances="train.csv"))


def test_a_category_of_coco_called_background_is_the_background(place: Path) -> None:
    make(place, "COCO")
    content = json.loads((place / "instances.json").read_text())
    content["categories"].append({"id": 0, "name": "background"})
    content["annotations"].append({"id": 99, "image_id": 9, "category_id": 0, "segmentation": [outline(0, 0, 9, 9)]})
    (place / "instances.json").write_text(json.dumps(content))
    with pytest.raises(InputError, match=r"classes: \{background: 0, cat: 1, dog: 2\}"):
        FolderData(str(place), masks="instances.json")
    data = FolderData(str(place), NAMED, masks="instances.json", val_fraction=0.25)
    for split in ("train", "val"):
        for position, name in enumerate(data.names(split)):
            assert (data.load(split, position)["mask"].numpy() == truth(name)[0]).all()


BROKEN = {
    "cut off": ("labelme", "images/a.json", lambda text: text[:50], "a.json: cannot be read"),
    "a circle": ("labelme", "images/a.json", lambda text: text.replace("polygon", "circle"), "drawn as a circle"),
    "another size": (
        "labelme",
        "images/a.json",
        lambda text: text.replace(f'"imageWidth": {WIDTH}', '"imageWidth": 99'),
        "is 99x12 pixels, but its image",
    ),
    "Supervisely": ("labelme", "images/a.json", lambda text: '{"objects": [], "size": {}}', "COCO"),
    "a box": (
        "YOLO",
        "labels/a.txt",
        lambda text: "0 0.5 0.5 0.2 0.2\n",
        "0 has 4 coordinates",
    ),
    "pixels": ("YOLO", "labels/a.txt", lambda text: "0 1 1 8 1 8 8\n", "up to 8;"),
    "a negative class": ("YOLO", "labels/a.txt", lambda text: f"-1{text[1:]}", "class -1 has"),
    "an unknown category": (
        "COCO",
        "instances.json",
        lambda text: text.replace('"category_id": ', '"category_id": 9'),
        "which its categories do not list",
    ),
    "no numbers": ("YOLO", "labels/a.txt", lambda text: "cat\n", "a.txt: cannot be read"),
    "odd run lengths": ("run lengths", "train.csv", lambda text: text.replace("c.png,1,", "c.png,1,3 4 5"), "drawn"),
    "runs beyond": (
        "run lengths",
        "train.csv",
        lambda text: text.replace("c.png,1,", "c.png,1,190 9"),
        "cannot be drawn",
    ),
    "no such COCO": ("COCO", "instances.json", lambda text: "[]", "instances.json: cannot be read"),
    "no such image": (
        "COCO",
        "instances.json",
        lambda text: text.replace('"image_id": 8', '"image_id": 5'),
        "image_id 5",
    ),
    "boxes alone": ("COCO", "instances.json", lambda text: text.replace('"segmentation"', '"box"'), "segmentation"),
    "run lengths cut": (
        "COCO, uncompressed run lengths",
        "instances.json",
        lambda text: text.replace('"counts": [', '"counts": [1, '),
        "cannot be drawn",
    ),
    "run lengths of another size": (
        "COCO, uncompressed run lengths",
        "instances.json",
        lambda text: text.replace('"counts": [', '"counts": [1], "cut": ['),
        "cannot be drawn",
    ),
    "an image more": ("COCO", "instances.json", lambda text: text.replace("a.png", "e.png"), "image"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_file_is_one_line_before_the_first_step(case: str, place: Path) -> None:
    name, file, change, words = BROKEN[case]
    options = make(place, name)
    text = (place / file).read_text()
    assert change(text) != text
    (place / file).write_text(change(text))
    with pytest.raises(InputError) as caught:
        SegmentationDataModule(FolderData(str(place), NAMED, **options)).check()
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_yolos_list_of_classes_is_no_label(place: Path) -> None:
    make(place, "YOLO")
    (place / "labels/classes.txt").write_text("cat\ndog\n")
    check(FolderData(str(place), NAMED, masks="labels", instances="labels"))


def test_an_image_without_labels_of_yolo_may_have_an_empty_file(place: Path) -> None:
    make(place, "YOLO")
    (place / "labels/c.txt").unlink()
    data = FolderData(str(place), NAMED, masks="labels")
    assert "labels/c.txt, empty where it shows nothing" in data.problems[0]


def test_rectangles_of_labelme_are_drawn(place: Path) -> None:
    make(place, "labelme")
    corners = [[2, 1], [7, 5]]
    shape = {"label": "cat", "shape_type": "rectangle", "points": corners}
    content = {"shapes": [shape], "imageHeight": HEIGHT, "imageWidth": WIDTH}
    for name in BOXES:
        (place / f"images/{name}.json").write_text(json.dumps(content))
    data = FolderData(str(place), NAMED, masks="images/{name}.json")
    rows, columns = np.nonzero(data.load("train", 0)["mask"].numpy())
    assert (rows.min(), rows.max(), columns.min(), columns.max()) == (1, 4, 2, 6)


def test_without_classes_the_reason_is_said_where_nothing_is_drawn(place: Path) -> None:
    make(place, "labelme")
    for file in (place / "images").glob("*.json"):
        file.write_text(file.read_text().replace("polygon", "circle"))
    with pytest.raises(InputError, match=r"\.json: cannot be read .*drawn as a circle"):
        FolderData(str(place), masks="images/{name}.json")
    for file in (place / "images").glob("*.json"):
        file.write_text(json.dumps({"shapes": [], "imageHeight": HEIGHT, "imageWidth": WIDTH}))
    with pytest.raises(InputError, match=r"nothing is drawn in the masks. Fix: .*classes: "):
        FolderData(str(place), masks="images/{name}.json")


def test_statistics_are_counted_anew_when_annotations_change(place: Path) -> None:
    make(place, "COCO")

    def fingerprint() -> str:
        return FolderData(str(place), NAMED, masks="instances.json").fingerprint("train")

    before = fingerprint()
    assert fingerprint() == before
    (place / "instances.json").write_text(json.dumps(as_coco(uncompressed)))
    assert fingerprint() != before


@pytest.mark.parametrize("suffix", ["npy", "npz", "mat"])
def test_masks_of_numpy_and_matlab(suffix: str, place: Path) -> None:
    make(place, "COCO")
    (place / "masks").mkdir()
    for name in BOXES:
        mask = truth(name)[0].astype(np.uint8)
        path = place / f"masks/{name}.{suffix}"
        if suffix == "npy":
            np.save(path, mask)
        elif suffix == "npz":
            np.savez(path, mask=mask, threshold=0.5)
        else:
            savemat(path, {"GTcls": {"Segmentation": mask, "CategoriesPresent": [1, 2]}})
    data = FolderData(str(place), NAMED)
    for position, name in enumerate(data.names("train")):
        assert (data.load("train", position)["mask"].numpy() == truth(name)[0]).all()


def test_a_mat_file_of_several_arrays_names_them(place: Path) -> None:
    savemat("a.mat", {"mask": np.zeros((4, 4)), "edges": np.zeros((4, 4))})
    with pytest.raises(InputError, match=r"a\.mat: .*mask, edges"):
        read_mask(Path("a.mat"))


@pytest.mark.parametrize(("suffix", "tool"), [("nii.gz", "nibabel"), ("dcm", "pydicom"), ("jp2", "gdal_translate")])
def test_what_is_not_read_names_a_converter(suffix: str, tool: str, place: Path) -> None:
    make(place, "COCO")
    for kind in ("masks", "scans"):
        (place / kind).mkdir()
        (place / f"{kind}/a.{suffix}").write_bytes(b"")
    for options in ({}, {"images": "scans", "masks": "images"}):
        with pytest.raises(InputError, match=rf"a\.{suffix}: .*{tool}"):
            FolderData(str(place), NAMED, **options)
