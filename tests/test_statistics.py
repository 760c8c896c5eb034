"""The statistics: its figures against NumPy, and a cache that is used when it may be and never when it may not."""

import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from conftest import make_folder, write_image
from segmentation.data import FolderData, Labels, SegmentationData, SegmentationDataModule
from segmentation.data.base import Sample
from segmentation.data.statistics import compute_statistics, scale_of
from segmentation.errors import InputError

CLASSES = {"background": 0, "cell": 255}


class Counted(FolderData):
    """FolderData that counts how often a file is read."""

    reads = 0

    def load(self, split: str, index: int) -> Sample:
        self.reads += 1
        return super().load(split, index)


class Given(SegmentationData):
    """A user's own data set, of one sample."""

    def __init__(self, image: torch.Tensor, mask: torch.Tensor, classes: int = 2, channels: int = 3) -> None:
        super().__init__(Labels.parse({f"c{i}": i for i in range(classes)}, channels=channels))
        self.sample = Sample(image=image, mask=mask)

    def names(self, split: str) -> list[str]:
        return ["only"]

    def load(self, split: str, index: int) -> Sample:
        return self.sample

    def fingerprint(self, split: str) -> str:
        return str(self.sample["image"].flatten()[:3]) + str(self.sample["mask"].flatten()[:3])


def test_counts_and_moments(place: Path) -> None:
    rng = np.random.default_rng(1)
    images, masks = [], []
    for index in range(5):
        size = (5 + index, 9 - index)
        images.append(rng.integers(index * 20, 256, (*size, 3), dtype=np.uint8))
        masks.append(rng.choice(np.array([0, 1, 2, 255], np.uint8), size, p=[0.5, 0.3, 0, 0.2]))
        write_image(place / f"train/images/{index}.png", images[-1])
        write_image(place / f"train/masks/{index}.png", masks[-1])
    write_image(place / "val/images/v.png", images[0])
    write_image(place / "val/masks/v.png", masks[0])

    statistics = compute_statistics(FolderData(str(place), {"a": [0], "b": 1, "never": 2}, ignore=255), "train")

    pixels, values = np.concatenate([i.reshape(-1, 3) for i in images]) / 255, np.concatenate([m.flat for m in masks])
    assert statistics.sizes == [m.shape for m in masks]
    assert statistics.pixels == [(values == 0).sum(), (values == 1).sum(), 0]
    np.testing.assert_allclose(statistics.mean, pixels.mean(axis=0), rtol=1e-12)
    np.testing.assert_allclose(statistics.std, pixels.std(axis=0), rtol=1e-9)


@pytest.mark.parametrize(("dtype", "scale"), [(torch.uint8, 255), (torch.uint16, 65535), (torch.float32, 1)])
def test_scale(dtype: torch.dtype, scale: float) -> None:
    assert scale_of(dtype) == scale
    image = torch.tensor([[[7.0, 100.0, 13.0, 200.0]]]).to(dtype)
    statistics = compute_statistics(Given(image, torch.tensor([[0, 1, 1, 1]]), channels=1), "train")
    np.testing.assert_allclose(statistics.mean, [80 / scale])
    np.testing.assert_allclose(statistics.std, [np.std([7, 100, 13, 200]) / scale])


@pytest.mark.parametrize("dtype", [torch.uint8, torch.uint16, torch.float32])
def test_channel_of_one_value_has_no_deviation(dtype: torch.dtype) -> None:
    """What rounding leaves of it would be divided by, and make a small difference at inference a huge one."""
    image = torch.arange(256).view(-1, 1, 1).expand(256, 100, 77).to(dtype)
    statistics = compute_statistics(Given(image, torch.zeros(100, 77, dtype=torch.int64), channels=256), "train")
    assert statistics.std == [0] * 256


def test_second_call_reads_nothing_and_a_change_is_counted(place: Path) -> None:
    root = make_folder(place / "data", {"train": 3, "val": 2})

    def take(classes: dict = CLASSES, split: str = "train") -> tuple[int, list[int], list[tuple[int, int]]]:
        data = Counted(str(root), classes)  # a new object, as in a new process
        statistics = compute_statistics(data, split)
        return data.reads, statistics.pixels, statistics.sizes

    reads, pixels, sizes = take()
    assert reads == 3
    assert take() == (0, pixels, sizes)
    assert take(split="val")[0] == 2
    assert take(split="val")[0] == 0

    write_image(root / "train/masks/00.png", np.full((48, 40), 255, np.uint8))  # a changed file
    reads, changed, _ = take()
    assert (reads, sum(changed)) == (3, 3 * 48 * 40)
    assert changed[1] > pixels[1]
    reads, swapped, _ = take({"cell": 255, "background": 0})  # a changed class list
    assert (reads, swapped) == (3, changed[::-1])
    write_image(root / "train/images/new.png", np.zeros((8, 8, 3), np.uint8))  # a new file
    write_image(root / "train/masks/new.png", np.zeros((8, 8), np.uint8))
    reads, _, sizes = take()
    assert (reads, sizes[-1]) == (4, (8, 8))
    assert take()[0] == 0


def test_a_change_that_keeps_the_files_size_is_counted(place: Path) -> None:
    for split in ("train", "val"):
        write_image(place / split / "images/a.png", np.zeros((8, 8, 3), np.uint8))
        write_image(place / split / "masks/a.bmp", np.zeros((8, 8), np.uint8))
    assert compute_statistics(FolderData(str(place), CLASSES), "train").pixels == [64, 0]
    write_image(place / "train/masks/a.bmp", np.full((8, 8), 255, np.uint8))
    assert compute_statistics(FolderData(str(place), CLASSES), "train").pixels == [0, 64]


def test_splits_are_kept_apart_though_a_fingerprint_forgets_them() -> None:
    data = Given(GOOD, torch.zeros(4, 5, dtype=torch.int64))
    compute_statistics(data, "train")
    data.sample["image"] = GOOD.clone()
    data.sample["image"][:, -1, -1] = 255
    assert compute_statistics(data, "val").mean == [1 / 20] * 3


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", "3", '{"sizes": 3}', '{"sizes": [], "unknown": 1}'])
def test_a_damaged_cache_is_counted_anew(place: Path, text: str) -> None:
    data = Counted(str(make_folder(place / "data", {"train": 2, "val": 1})), CLASSES)
    statistics = compute_statistics(data, "train")
    (file,) = (place / "cache").rglob("*.json")
    file.write_text(text)
    assert compute_statistics(data, "train") == statistics
    assert data.reads == 4
    assert compute_statistics(data, "train") == statistics
    assert data.reads == 4
    assert [path.suffix for path in file.parent.iterdir()] == [".json"]  # nothing half-written stays


def test_an_unwritable_cache_only_costs_time(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = str(make_folder(place / "data", {"train": 2, "val": 1}))
    expected = compute_statistics(FolderData(root, CLASSES), "train")
    (place / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(place / "file"))  # root may write anywhere, but not below a file
    data = Counted(root, CLASSES)
    assert compute_statistics(data, "train") == expected
    module = SegmentationDataModule(data)
    data.reads = 0
    module.check()
    assert module.train_size() == (48, 40)
    assert data.reads == 3 + 2  # each sample once, and the training samples for their shapes after augmentation


def test_bad_files_are_counted_and_read_again(place: Path) -> None:
    root = make_folder(place / "data", {"train": 6, "val": 1})
    for name in ("01", "02", "04"):
        (root / f"train/images/{name}.png").write_text("no image")
    for _ in range(2):
        with pytest.raises(InputError, match=r"images/01\.png: cannot be read .*\(3 of 6 train samples"):
            SegmentationDataModule(FolderData(str(root), CLASSES)).statistics("train")
    for name in ("02", "04"):
        Image.new("RGB", (40, 48)).save(root / f"train/images/{name}.png")
    with pytest.raises(InputError, match=r"images/01\.png: cannot be read .*remove it"):
        SegmentationDataModule(FolderData(str(root), CLASSES)).statistics("train")


def test_what_is_good_is_remembered_beside_what_is_bad(place: Path) -> None:
    """So that train.py does not read again what the doctor has read, whatever the classes are then called."""
    root = make_folder(place / "data", {"train": 4, "val": 1})
    (root / "train/masks/02.png").write_text("no mask")
    for names, reads in ((("background", "cell"), 4), (("ground", "nucleus"), 1)):
        data = Counted(str(root), dict(zip(names, CLASSES.values(), strict=True)))
        statistics = compute_statistics(data, "train")
        assert data.reads == reads
        assert len(statistics.records) == 3
        assert list(statistics.bad) == [2]


def test_what_is_bad_takes_no_memory(place: Path) -> None:
    """Neither the pixels, in the frames of an error, nor the thousands of colours of an anti-aliased mask."""
    rng = np.random.default_rng(0)
    for number in range(4):
        for kind in ("images", "masks"):
            write_image(place / f"data/{kind}/{number}.png", rng.integers(0, 256, (64, 64, 3), dtype=np.uint8))
    data = FolderData(str(place / "data"), {"ground": "#000000", "cell": "#FF0000"})
    compute_statistics(data, "val")
    tracemalloc.start()
    bad = compute_statistics(data, "train").bad
    held, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(bad) == 3
    assert held < len(bad) * 100_000  # the commonest 256 of 4,096 colours


def test_what_is_bad_is_read_anew() -> None:
    """A disk that was away for a moment is not remembered."""
    data = Given(GOOD, torch.full((4, 5), 7))
    data.fingerprint = lambda split: "the same files"
    assert list(compute_statistics(data, "train").bad) == [0]
    data.sample["mask"] = torch.zeros(4, 5, dtype=torch.int64)
    assert compute_statistics(data, "train").pixels == [20, 0]


def test_a_class_that_never_occurs_is_named(place: Path) -> None:
    root = make_folder(place / "data", {"train": 2, "val": 1}, values=(0, 3))
    classes = {"ground": 0, "unicorn": 1, "cell": 3}
    with pytest.warns(UserWarning, match="no split has a pixel of unicorn. Fix: take it out of data.dataset.classes"):
        SegmentationDataModule(FolderData(str(root), classes)).check()
    write_image(root / "val/masks/00.png", np.ones((48, 40), np.uint8))
    with pytest.warns(UserWarning, match="train split has no pixel of unicorn.*divide the data anew"):
        SegmentationDataModule(FolderData(str(root), classes)).check()


GOOD = torch.zeros(3, 4, 5, dtype=torch.uint8)


@pytest.mark.parametrize(
    ("image", "mask", "message"),
    [
        (GOOD[:1], torch.zeros(4, 5, dtype=torch.int64), r"image \(1, 4, 5\) .* must be \(3, 4, 5\)"),
        (GOOD, torch.zeros(5, 4, dtype=torch.int64), r"mask \(5, 4\)"),
        (GOOD, torch.zeros(4, 5, dtype=torch.uint8), "the mask must be int64 in 0..1"),
        (GOOD, torch.full((4, 5), 2), "the mask must be int64 in 0..1"),
        (GOOD, torch.full((4, 5), -1), "or -100 to ignore"),
        (torch.full((3, 4, 5), torch.nan), torch.zeros(4, 5, dtype=torch.int64), "NaN"),
    ],
)
def test_a_data_set_of_ones_own_is_held_to_the_contract(image: torch.Tensor, mask: torch.Tensor, message: str) -> None:
    with pytest.raises(InputError, match=f"^train sample only: .*{message}"):
        SegmentationDataModule(Given(image, mask)).statistics("train")


def test_a_cache_that_parses_but_is_not_what_was_written_is_counted_anew(place: Path) -> None:
    """It would be a wrong mean, or a crash later."""
    data = Counted(str(make_folder(place / "data", {"train": 3, "val": 1})), CLASSES)
    statistics = compute_statistics(data, "train")
    (file,) = (place / "cache").rglob("*.json")
    whole = file.read_text()
    for damaged in (whole[:-20], whole.replace("[", "[[]", 1), "[]"):
        file.write_text(damaged)
        data.reads = 0
        assert compute_statistics(data, "train") == statistics
        assert data.reads == 3
