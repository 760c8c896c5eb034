"""The generated data: a pure function of seed, split and index, with true masks, that colours alone do not solve."""

import pickle
import subprocess
import sys
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import ndimage
from sklearn.metrics import jaccard_score
from sklearn.tree import DecisionTreeClassifier

from segmentation.data.base import SPLITS
from segmentation.data.synthetic import RADIUS, VISIBLE, ShapesData

SOURCE = Path(__file__).parents[1] / "src"


@cache
def samples(split: str, count: int) -> list[dict[str, torch.Tensor]]:
    data = ShapesData()
    return [data.load(split, index) for index in range(count)]


def equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


@pytest.mark.parametrize("size", [48, 96, 131])
def test_types_and_shapes(size: int) -> None:
    sample = ShapesData(size=size).load("val", 3)
    assert {key: (value.dtype, tuple(value.shape)) for key, value in sample.items()} == {
        "image": (torch.uint8, (3, size, size)),
        "mask": (torch.int64, (size, size)),
        "instance": (torch.int64, (size, size)),
    }


def test_sample_depends_on_nothing_but_seed_split_and_index() -> None:
    first = ShapesData().load("train", 7)
    np.random.seed(1)  # noqa: NPY002  a shared generator must not matter
    torch.manual_seed(1)
    other = ShapesData(train=9, val=1, test=1)
    other.load("val", 0)
    assert equal(first, other.load("train", 7))
    assert equal(first, pickle.loads(pickle.dumps(other)).load("train", 7))
    assert not equal(first, ShapesData(seed=1).load("train", 7))
    assert not equal(first, ShapesData().load("train", 8))
    assert not equal(first, ShapesData().load("test", 7))


@pytest.mark.slow
def test_another_process_makes_the_same_sample() -> None:
    code = "import pickle, sys; from segmentation.data.synthetic import ShapesData; s = ShapesData().load('test', 5); "
    code += "sys.stdout.buffer.write(pickle.dumps({key: value.numpy() for key, value in s.items()}))"
    there = pickle.loads(subprocess.check_output([sys.executable, "-c", code], cwd=SOURCE))
    assert equal(ShapesData().load("test", 5), {key: torch.from_numpy(value) for key, value in there.items()})


def test_no_two_samples_are_alike() -> None:
    images = [s["image"].numpy().tobytes() for split in SPLITS for s in samples(split, 60)]
    assert len(set(images)) == len(images) == 180


def test_names_and_fingerprint() -> None:
    data = ShapesData(train=12, val=0, test=3)
    assert data.names("train")[7] == "train-0007"
    assert [len(data.names(split)) for split in SPLITS] == [12, 0, 3]
    prints = [
        ShapesData(**options).fingerprint(split)
        for split in SPLITS
        for options in ({}, {split: 9}, {"size": 64}, {"seed": 1})
    ]
    assert len(set(prints)) == 12
    assert ShapesData().fingerprint("val") == ShapesData(train=5).fingerprint("val")


def test_every_class_occurs_about_equally_often() -> None:
    counts = np.bincount(torch.stack([s["mask"] for s in samples("train", 60)]).flatten(), minlength=5)
    assert len(counts) == ShapesData().labels.num_classes == 5
    share = counts / counts.sum()
    assert 0.5 < share[0] < 0.85
    assert share[1:].min() > 0.04
    assert share[1:].max() < 2 * share[1:].min()


def test_instances_agree_with_the_mask_and_can_be_recognised() -> None:
    size = ShapesData().size
    for sample in samples("train", 60):
        mask, instance = sample["mask"].numpy(), sample["instance"].numpy()
        assert ((instance > 0) == (mask > 0)).all()
        ids, areas = np.unique(instance[instance > 0], return_counts=True)
        assert ids.tolist() == list(range(1, len(ids) + 1))
        assert len(ids) >= 3
        assert all(len(np.unique(mask[instance == i])) == 1 for i in ids)
        assert areas.min() >= VISIBLE * np.pi * (RADIUS[0] * size) ** 2 - 1


def test_some_instances_of_one_class_touch() -> None:
    touching = 0
    for sample in samples("train", 60):
        mask, instance = sample["mask"].numpy(), sample["instance"].numpy()
        pieces = sum(ndimage.label(mask == k, np.ones((3, 3)))[1] for k in range(1, 5))
        touching += pieces < instance.max()
    assert touching >= 6


def test_colours_alone_do_not_solve_it() -> None:
    """Independent oracles that see one pixel's colour: the best histogram rule, and trees, weighted and not."""

    def pixels(split: str, count: int) -> tuple[np.ndarray, np.ndarray]:
        chosen = samples(split, count)
        colours = torch.stack([s["image"] for s in chosen]).permute(0, 2, 3, 1).reshape(-1, 3).numpy()
        return colours, torch.stack([s["mask"] for s in chosen]).flatten().numpy()

    (train_x, train_y), (test_x, test_y) = pixels("train", 60), pixels("test", 30)
    score = {}
    for weight in (None, "balanced"):
        tree = DecisionTreeClassifier(max_depth=10, min_samples_leaf=50, class_weight=weight, random_state=0)
        guess = tree.fit(train_x[::4], train_y[::4]).predict(test_x)
        score["tree", weight] = jaccard_score(test_y, guess, average="macro")

        cells = np.zeros((16**3, 5))  # 16 levels a channel
        np.add.at(cells, (cell(train_x), train_y), 1)
        rule = (cells / (cells.sum(axis=0) if weight else 1)).argmax(axis=1)
        score["histogram", weight] = jaccard_score(test_y, rule[cell(test_x)], average="macro")
    assert max(score.values()) < 0.35, score


def cell(colours: np.ndarray) -> np.ndarray:
    return (colours // 16).astype(int) @ np.array([256, 16, 1])
