"""The overlays of well-known data sets, on tiny data in their real layout: what is read, against what was written."""

from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from torchvision import datasets

import official_sets
from conftest import ROOT
from segmentation.data import IGNORE_INDEX, FolderData, SegmentationData, TorchvisionData
from segmentation.errors import InputError


def load(name: str, place: Path, monkeypatch: pytest.MonkeyPatch, **changed: object) -> SegmentationData:
    monkeypatch.setenv("SEG_DATA", str(place))
    dataset = yaml.safe_load((ROOT / f"configs/data/{name}.yaml").read_text())["data"]["dataset"]
    cls = {"TorchvisionData": TorchvisionData, "FolderData": FolderData}[dataset["class_path"]]
    return cls(**dataset["init_args"] | changed)


@pytest.mark.parametrize(
    ("name", "counts", "classes", "present"),
    [
        ("voc2012", [9, 2, 0], 21, {0, 1, 2, 15, 20, IGNORE_INDEX}),
        ("cityscapes", [9, 2, 0], 19, {*range(19), IGNORE_INDEX}),
        ("oxford_pet", [9, 2, 2], 2, {0, 1, IGNORE_INDEX}),
        ("ade20k", [9, 2, 0], 150, {0, 1, 99, 149, IGNORE_INDEX}),
        ("dsb2018", [9, 2, 0], 2, {0, 1}),
    ],
)
def test_overlay(
    name: str, counts: list[int], classes: int, present: set, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    official_sets.MAKERS[name](place)
    data = load(name, place, monkeypatch)
    assert [len(data.names(split)) for split in ("train", "val", "test")] == counts
    assert data.problems == []
    assert data.labels.num_classes == classes
    for index in range(counts[0]):
        sample = data.load("train", index)
        assert sample["image"].shape == (3, 64, 64)
        assert sample["image"].dtype == torch.uint8
        assert set(sample["mask"].unique().tolist()) == present


def test_class_indices_are_the_benchmarks(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Cityscapes: an id's index is its trainId, and all that the benchmark ignores is ignored; VOC's colours are those
    of its own palette; of Oxford's trimaps 1 is the pet."""
    for name in ("cityscapes", "voc2012", "oxford_pet"):
        official_sets.MAKERS[name](place)
    labels = load("cityscapes", place, monkeypatch).labels
    for known in datasets.Cityscapes.classes:
        if known.id >= 0:
            expected = IGNORE_INDEX if known.ignore_in_eval else known.train_id
            assert labels.encode(np.array([[known.id]]), "mask").item() == expected
            if not known.ignore_in_eval:
                assert labels.names[known.train_id] == known.name
                assert tuple(labels.palette[known.train_id]) == known.color
    palette = load("voc2012", place, monkeypatch).labels.palette
    bits = lambda index, start: sum((index >> start + 3 * k & 1) << 7 - k for k in range(3))  # noqa: E731
    assert palette.tolist() == [[bits(index, band) for band in range(3)] for index in range(21)]
    assert load("oxford_pet", place, monkeypatch).labels.encode(np.array([[1, 2, 3]]), "m").tolist() == [[1, 0, -100]]


def test_one_mask_per_object_gives_mask_and_instances(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    official_sets.dsb2018(place)
    sample = load("dsb2018", place, monkeypatch).load("train", 0)
    assert sample["instance"].unique(return_counts=True)[1].tolist()[1:] == [96, 96, 96]
    assert torch.equal(sample["instance"] > 0, sample["mask"] == 1)


@pytest.mark.parametrize("name", ["voc2012", "oxford_pet"])
def test_a_data_set_that_is_not_there_says_how_to_get_it(
    name: str, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(InputError, match=f"^{place}/.*download: true"):
        load(name, place, monkeypatch)


def test_download_is_torchvisions(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`download: true` reaches torchvision, whose failure, without internet, is one line."""
    monkeypatch.setattr(datasets.voc, "download_and_extract_archive", _no_network)
    with pytest.raises(InputError, match=r"VOCSegmentation cannot be fetched .no route to host"):
        load("voc2012", place, monkeypatch, download=True)


def _no_network(url: str, *args: object, **options: object) -> None:
    assert url.endswith("VOCtrainval_11-May-2012.tar")
    raise OSError("no route to host")
