"""Folds, groups and divisions: properties that hold for any names."""

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from conftest import TINY, make_folder, train
from segmentation.data import FolderData, SegmentationDataModule, ShapesData
from segmentation.data.splits import divide, fold
from segmentation.errors import InputError

NAMES = st.lists(st.tuples(st.integers(0, 8), st.integers(0, 999)), min_size=2, max_size=60, unique=True).map(
    lambda pairs: sorted(f"p{patient}_{number:03d}" for patient, number in pairs)
)


def patient(name: str) -> str:
    return name.split("_")[0]


@settings(max_examples=60, deadline=None)
@given(NAMES, st.floats(0.05, 0.6), st.floats(0, 0.3), st.integers(0, 99), st.booleans())
def test_a_division_is_a_partition_that_keeps_groups(
    names: list[str], val: float, test: float, seed: int, grouped: bool
) -> None:
    groups = list(map(patient, names)) if grouped else names
    parts = divide(groups, [val, test], seed)
    assert sorted(index for part in parts for index in part) == list(range(len(names)))
    found = [{groups[index] for index in part} for part in parts]
    assert sum(map(len, found)) == len(set.union(*found))
    assert parts == divide(groups, [val, test], seed)
    if not grouped:
        assert len(parts[0]) == max(1, round(val * len(names)))


@settings(max_examples=60, deadline=None)
@given(NAMES, st.integers(2, 6), st.integers(0, 99))
def test_folds_are_a_partition_of_about_one_size(names: list[str], count: int, seed: int) -> None:
    if len(names) >= count:
        folds = fold(names, count, seed)
        assert sorted(index for members in folds for index in members) == list(range(len(names)))
        assert max(map(len, folds)) - min(map(len, folds)) <= 1
    patients = list(map(patient, names))
    if len(set(patients)) < count:
        with pytest.raises(InputError, match=f"only {len(set(patients))} groups"):
            fold(patients, count, seed)
    else:
        folds = fold(patients, count, seed)
        assert all(folds)
        assert sum(len({patients[index] for index in members}) for members in folds) == len(set(patients))


def test_cross_validation_validates_on_each_sample_once_and_leaves_the_test_split(place: Path) -> None:
    root = make_folder(place / "data", {"train": 7, "val": 4, "test": 2})  # names of train and val are the same

    def module(number: int) -> SegmentationDataModule:
        return SegmentationDataModule(FolderData(str(root), {"a": 0, "b": 255}), folds=3, fold=number)

    seen: list[str] = []
    for number in range(3):
        data = module(number).dataset
        assert len(data.names("train")) + len(data.names("val")) == 11
        assert not set(data.names("train")) & set(data.names("val"))
        assert data.names("test") == ["00", "01"]
        seen += [str(data.load("val", index)["image"].sum()) for index in range(len(data.names("val")))]
        assert len(data.fingerprint("val")) > 0
    originals = FolderData(str(root), {"a": 0, "b": 255})
    sums = [str(originals.load(s, i)["image"].sum()) for s in ("train", "val") for i in range(len(originals.names(s)))]
    assert sorted(seen) == sorted(sums)
    assert module(0).statistics("val").sizes == [(48, 40)] * len(module(0).dataset.names("val"))
    for folds, number in ((1, 0), (3, 3), (3, -1)):
        with pytest.raises(InputError, match=f"data.fold {number} of data.folds {folds}"):
            SegmentationDataModule(FolderData(str(root), {"a": 0, "b": 255}), folds=folds, fold=number)
    with pytest.raises(InputError, match=r"--data\.folds 5"):
        SegmentationDataModule(FolderData(str(root), {"a": 0, "b": 255}), fold=1)


def test_generated_images_can_be_folded_too() -> None:
    data = SegmentationDataModule(ShapesData(train=4, val=2, test=1, size=48), folds=2, fold=1).dataset
    assert [len(data.names(split)) for split in ("train", "val", "test")] == [3, 3, 1]
    assert torch.equal(
        data.load("test", 0)["image"], ShapesData(train=4, val=2, test=1, size=48).load("test", 0)["image"]
    )


def test_folds_from_the_command_line(place: Path) -> None:
    root = make_folder(place / "data", {"train": 6, "val": 3})
    options = ["--data.dataset", "FolderData", "--data.dataset.root", str(root)]
    options += ["--data.dataset.classes", "{a: 0, b: 255}", "--data.folds", "3", "--data.fold", "2"]
    cli = train(*options, *TINY[8:], "--name", "folded")
    assert len(cli.datamodule.dataset.names("val")) == 3
    rows = (place / "runs/folded/per_image.csv").read_text().splitlines()[1:]
    assert {row.split(",")[0] for row in rows} == set(cli.datamodule.dataset.names("val"))
