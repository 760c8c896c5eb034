"""What lies among the images besides images, and names that are no plain text: said in a line, or left out and listed;
never a hang, never dropped without a word."""

import csv
import os
import re
import sys
from pathlib import Path

import numpy as np
import pytest

from conftest import TINY_RUN, make_folder, train, write_image
from segmentation.data import FolderData, SegmentationDataModule
from segmentation.doctor import diagnose
from segmentation.errors import InputError
from segmentation.inference.predict import find_images, predict
from segmentation.training.cli import SegmentationCLI
from segmentation.training.entry import run_job

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="names of bytes, pipes and links")

CLASSES = {"background": 0, "cell": 255}


def put(kind: str, path: Path) -> None:
    """In the place of a file."""
    path.unlink()
    if kind == "pipe":
        os.mkfifo(path)
    else:
        path.symlink_to({"dangling": "../../annex/objects/x.png", "loop": path.name}[kind])


def rename(root: Path, split: str, name: str, new: bytes) -> None:
    for kind in ("images", "masks"):
        folder = os.fsencode(root / split / kind)
        os.rename(folder + b"/" + name.encode(), folder + b"/" + new)


@pytest.fixture
def odd(place: Path) -> Path:
    """Files of all kinds, of which four samples cannot be used."""
    root = make_folder(place / "data", {"train": 8, "val": 5})
    put("dangling", root / "train/images/00.png")
    put("loop", root / "train/masks/01.png")
    put("pipe", root / "train/images/02.png")
    put("dangling", root / "val/masks/00.png")
    rename(root, "train", "03.png", b"two\nlines.png")
    rename(root, "val", "03.png", b"caf\xe9.png")
    rename(root, "val", "04.png", b"two\nlines.png")
    return root


@pytest.mark.parametrize(
    ("kind", "words"), [("dangling", "is a link to "), ("loop", "is a link to "), ("pipe", "no ordinary file")]
)
@pytest.mark.parametrize("what", ["train/images/00.png", "val/masks/01.png"])
def test_one_line(kind: str, words: str, what: str, place: Path) -> None:
    root = make_folder(place / "data", {"train": 3, "val": 2})
    put(kind, root / what)
    with pytest.raises(InputError, match=f"^[^\n]*{what}: [^\n]*{words}[^\n]*$"):
        SegmentationDataModule(FolderData(str(root), CLASSES)).check()


@pytest.mark.slow
def test_a_run_on_the_rest(odd: Path) -> None:
    options = ["--data.dataset", "FolderData", "--data.dataset.root", str(odd), "--data.on_bad_file", "skip"]
    options += ["--data.dataset.classes", "{background: 0, cell: 255}", *TINY_RUN]
    cli = train(
        *options, "--pictures.images", "4", "--data.batch_size", "2", "--data.num_workers", "1", "--name", "run"
    )
    assert len(cli.datamodule.dataset.names("train")) == 5
    skipped = Path("runs/run/skipped_files.txt").read_text().splitlines()
    assert [line.split(": ")[0] for line in skipped] == [
        str(odd / name)
        for name in ("train/images/00.png", "train/masks/01.png", "train/images/02.png", "val/masks/00.png")
    ]
    with Path("runs/run/per_image.csv").open(encoding="utf-8", newline="") as file:
        tested = {row["name"] for row in csv.DictReader(file)}
    assert tested == {"01", "02", r"caf\udce9", r"two\nlines"}
    assert Path("runs/run/summary.json").is_file()
    bad = [problem for problem in diagnose(options[: -len(TINY_RUN)]) if problem.stops]
    assert bad == []
    assert Path("doctor/bad_files.txt").read_text().splitlines() == skipped


def test_a_name_that_is_no_text_is_named_in_one(place: Path) -> None:
    """Of a file that has no mask, and in a list file, whatever its encoding."""
    root = make_folder(place / "data", {"train": 3, "val": 2})
    write_image(root / "train/images/two\nlines.png", np.zeros((8, 8, 3), np.uint8))
    with pytest.raises(InputError, match=r"^[^\n]*two\\nlines\.png: this image has no mask[^\n]*$"):
        SegmentationDataModule(FolderData(str(root), CLASSES)).check()
    for split in ("train", "val"):
        rename(root, split, "01.png", b"caf\xe9.png")
        (root / f"{split}.txt").write_bytes(b"00\ncaf\xe9.png\n")
    data = FolderData(str(root), CLASSES, lists="{split}.txt")
    assert data.names("val") == ["00", r"caf\udce9"]
    (root / "val.txt").write_bytes(b"na\xefve\n")
    with pytest.raises(InputError, match=r"lists na\\udcefve, but no image"):
        FolderData(str(root), CLASSES, lists="{split}.txt")


def test_predict_does_the_others(odd: Path, trained: Path) -> None:
    images = odd / "train/images"
    os.rename(images / "02.png", os.fsencode(images) + b"/p\xefpe\n.png")
    with pytest.raises(InputError, match=r"2 of 8 images left out"):
        predict([str(trained), str(images), "out", "--accelerator", "cpu"])
    assert len(list(Path("out").glob("*.png"))) == 6
    assert Path("out/two\nlines.png").is_file()
    first, second = Path("out/unreadable.txt").read_text().splitlines()
    assert first.startswith(f"{images / '00.png'}: is a link to ")
    assert second.startswith(rf"{images}/p\udcefpe\n.png: ")
    # by a pattern and by name, too, nothing is left out without a word
    assert len(find_images([f"{images}/*.png"], Path("out"))) == 8
    assert len(find_images([f"{images}/00.png"], Path("out"))) == 1


@pytest.mark.parametrize(
    ("image", "mask", "words"),
    [
        (np.zeros((24, 16, 3)), np.zeros((24, 16)), "unequal sizes: .*start it again with --resume"),
        (np.zeros((48, 40, 3)), np.full((48, 40), 7), "classes: "),
        (np.zeros((48, 40, 4)), np.zeros((48, 40)), "channels: 4"),
        (None, np.zeros((48, 40)), "no such file"),
    ],
    ids=["size", "values", "bands", "gone"],
)
def test_files_that_change_after_they_were_read(
    image: np.ndarray | None,
    mask: np.ndarray,
    words: str,
    place: Path,
    exit_raises: None,
    capsys: pytest.CaptureFixture,
) -> None:
    """In a worker of the loader, which has errors of its own."""
    root = make_folder(place / "data", {"train": 4, "val": 2})
    options = ["--data.dataset", "FolderData", "--data.dataset.root", str(root), *TINY_RUN, "--data.num_workers", "1"]
    cli = SegmentationCLI([*options, "--data.dataset.classes", "{background: 0, cell: 255}", "--name", "run"])
    cli.datamodule.check()
    write_image(root / "val/masks/01.png", mask.astype(np.uint8))
    file = root / "val/images/01.png"
    file.unlink() if image is None else write_image(file, image.astype(np.uint8))
    capsys.readouterr()
    with pytest.raises(SystemExit, match="2"):
        run_job(cli.run)
    said = capsys.readouterr().err
    assert re.match(f"error: .*{words}", said)
    assert said.count("\n") == 1


def test_a_folder_that_cannot_be_opened(place: Path) -> None:
    root = make_folder(place / "data", {"train": 3, "val": 2})
    (root / "train/images/more").mkdir(mode=0)
    place.chmod(0o755)
    user = os.geteuid()
    if user == 0:
        os.seteuid(65534)  # who may do all is refused nothing
    try:
        with pytest.raises(InputError, match=r"train/images/more: cannot be opened"):
            FolderData("data", CLASSES)
    finally:
        os.seteuid(user)
