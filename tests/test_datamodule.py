"""The datamodule: the batch contract, whatever the number of workers; and what is refused before the first step."""

import csv
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch import Trainer
from torchvision.transforms import v2

from conftest import make_folder, write_image
from segmentation.data import IGNORE_INDEX, FolderData, Labels, SegmentationData, SegmentationDataModule, ShapesData
from segmentation.data.base import Sample
from segmentation.data.loading import SplitDataset, collate, unpack
from segmentation.data.sampler import Index, TrainBatches, eval_batches
from segmentation.data.transforms import Augment
from segmentation.errors import InputError

CLASSES = {"background": 0, "cell": 255}
AUGMENT = [v2.RandomHorizontalFlip(), v2.RandomRotation(30), v2.ColorJitter(0.4)]


def attach(module: SegmentationDataModule, **options: Any) -> SegmentationDataModule:
    """Give it a trainer, as `fit` does."""
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    module.trainer = Trainer(accelerator="cpu", enable_model_summary=False, **quiet, **options)
    return module


class Weighted(SegmentationData):
    """A data set of a user's own, with all that a sample may hold."""

    def __init__(self, count: int = 5) -> None:
        super().__init__(Labels.parse({"a": 0, "b": 1, "c": 2}, channels=2))
        self.count = count

    def names(self, split: str) -> list[str]:
        return [f"{split}{i}" for i in range(self.count)] if split != "test" else []

    def load(self, split: str, index: int) -> Sample:
        y, x = np.mgrid[:12, :10]
        return Sample(
            image=torch.from_numpy(np.stack([y, x]).astype(np.float32) + index),
            mask=torch.from_numpy((y + x + index) % 3),
            instance=torch.from_numpy(y),
            weight=torch.from_numpy(x.astype(np.float32)),
        )

    def fingerprint(self, split: str) -> str:
        return f"weighted {split} {self.count}"


def folder(place: Path, sizes: list[tuple[int, int]], split: str = "train") -> None:
    rng = np.random.default_rng(0)
    for index, size in enumerate(sizes):
        write_image(place / split / "images" / f"{index}.png", rng.integers(0, 255, (*size, 3), dtype=np.uint8))
        write_image(place / split / "masks" / f"{index}.png", rng.choice(np.array([0, 255], np.uint8), size))


def test_batch_contract() -> None:
    module = attach(SegmentationDataModule(Weighted(), batch_size=4, crop=[8, 6], augment=AUGMENT[:2], num_workers=0))
    contract = {"instance": (torch.int64, (4, 8, 6)), "weight": (torch.float32, (4, 8, 6))} | {
        "image": (torch.float32, (4, 2, 8, 6)),
        "mask": (torch.int64, (4, 8, 6)),
        "size": (torch.int64, (4, 2)),
        "index": (torch.int64, (4,)),
        "pixels": (torch.int64, (4, 3)),
        "step_pixels": (torch.float32, (3,)),
    }
    (batch,) = map(unpack, module.train_dataloader())
    names = batch.pop("name")
    assert {key: (value.dtype, tuple(value.shape)) for key, value in batch.items()} == contract
    assert all(type(value) is torch.Tensor for value in batch.values())
    assert names == [f"train{i}" for i in batch["index"]]
    assert batch["size"].tolist() == [[12, 10]] * 4  # of the file, not of the crop


def test_eval_batches_are_whole_images_as_they_are() -> None:
    data = Weighted()
    module = attach(SegmentationDataModule(data, batch_size=2, crop=8, augment=AUGMENT, num_workers=0))
    batches = [unpack(batch) for batch in module.val_dataloader()]
    assert [len(batch["name"]) for batch in batches] == [2, 2, 1]
    for batch in batches:
        for position, index in enumerate(batch["index"].tolist()):
            sample = data.load("val", index)
            assert all(torch.equal(batch[key][position], sample[key]) for key in sample)


@pytest.mark.parametrize("channels", [1, 3])
def test_images_travel_as_the_file_has_them(place: Path, channels: int) -> None:
    array = np.arange(48, dtype=np.uint16).reshape(6, 8) * 1000
    image = array if channels == 1 else np.dstack([array >> 8] * 3).astype(np.uint8)
    for split in ("train", "val"):
        for name in "ab":
            write_image(place / split / "images" / f"{name}.png", image)
            write_image(place / split / "masks" / f"{name}.png", (array > 9000).astype(np.uint8) * 255)
    data = FolderData(str(place), CLASSES, channels=channels)
    module = attach(SegmentationDataModule(data, batch_size=2, num_workers=0))
    for loader in (module.train_dataloader(), module.val_dataloader(), module.test_dataloader()):
        (batch,) = loader
        assert batch["image"].dtype == (torch.uint16 if channels == 1 else torch.uint8)
        assert batch["image"].shape == (2, channels, 6, 8)
        expected = np.moveaxis(image.reshape(6, 8, channels), -1, 0)
        assert (batch["image"].numpy() == expected).all()
        assert ((batch["mask"].numpy() == 1) == (array > 9000)).all()


def test_fillers_count_nowhere() -> None:
    split = SplitDataset(Weighted(), "val")
    filler, real = split[Index(0, filler=True)], split[Index(0)]
    assert (filler["mask"] == IGNORE_INDEX).all()
    assert filler["index"] == -1
    assert real["index"] == 0
    assert torch.equal(filler["image"], real["image"])
    assert collate([filler, real])["index"].tolist() == [-1, 0]
    seen = []
    for rank in range(3):  # 2 images, 3 processes
        (keys,) = eval_batches([(12, 10)] * 2, 1, rank, 3)
        seen += [split[key]["index"] for key in keys]
    assert sorted(seen) == [-1, 0, 1]


def test_the_number_of_workers_changes_nothing(place: Path) -> None:
    root = make_folder(place / "data", {"train": 7, "val": 3})

    def batches(workers: int) -> list[dict[str, Any]]:
        data = FolderData(str(root), CLASSES)
        module = attach(SegmentationDataModule(data, 3, crop=24, augment=AUGMENT, num_workers=workers, seed=4))
        torch.manual_seed(workers)  # nor does the state of the process
        train = module.train_dataloader()
        first = list(train)
        module.trainer.fit_loop.epoch_progress.current.completed = 1
        return [unpack(batch) for loader in (first, train, module.val_dataloader()) for batch in loader]

    alone, helped = batches(0), batches(2)
    assert len(alone) == len(helped) == 2 + 2 + 1
    for a, b in zip(alone, helped, strict=True):
        assert a["name"] == b["name"]
        assert all(torch.equal(a[key], b[key]) for key in a if key != "name")
    seen = {
        (name, image.numpy().tobytes()) for b in alone[:4] for name, image in zip(b["name"], b["image"], strict=True)
    }
    assert len(seen) == 12  # the second epoch's samples look different


def test_ranks_see_what_one_process_would() -> None:
    split = SplitDataset(Weighted(8), "train", Augment((6, 6), AUGMENT[:2]))

    def batches(rank: int, world: int, batch: int) -> list[dict[str, Any]]:
        sampler = TrainBatches(8, batch, 0, rank, world)
        return [collate([split[key] for key in keys]) for keys in islice(sampler, len(sampler))]

    one, ranks = batches(0, 1, 4), [batches(rank, 2, 2) for rank in range(2)]
    assert len(one) == 2
    for step, batch in enumerate(one):
        for key in ("image", "mask", "weight"):
            assert torch.equal(torch.cat([rank[step][key] for rank in ranks]), batch[key])


def test_val_is_tested_where_there_is_no_test_split() -> None:
    module = attach(SegmentationDataModule(Weighted(), num_workers=0))
    assert module.test_split == "val"
    assert next(iter(module.test_dataloader()))["name"][0] == "val0"
    module = attach(SegmentationDataModule(ShapesData(2, 2, 2, size=48), num_workers=0))
    assert module.test_split == "test"
    assert next(iter(module.test_dataloader()))["name"][0] == "test-0000"


@pytest.mark.parametrize(
    "sizes",
    [[(50, 70), (40, 70), (50, 70)], [(40, 60), (60, 40)], [(64, 64), (64, 40), (64, 64)], [(200, 300), (90, 70)]],
)
def test_unequal_sizes_without_a_crop_are_refused_with_the_fix(place: Path, sizes: list[tuple[int, int]]) -> None:
    """Before the first step; also where the areas are equal (40x60 and 60x40)."""
    folder(place, sizes)
    folder(place, sizes[:1], "val")
    data = FolderData(str(place), CLASSES)
    with pytest.raises(InputError, match=r"unequal sizes .*Fix: data\.crop: ") as error:
        SegmentationDataModule(data, 2).check()
    crop = int(str(error.value).split("data.crop: ")[1].split(",")[0])
    assert 32 <= crop <= max(min(size) for size in sizes)
    for fixed in ({"crop": crop}, {"batch_size": 1}):
        module = attach(SegmentationDataModule(data, **{"batch_size": 2, "num_workers": 0} | fixed))
        module.check()
        list(module.train_dataloader())


def test_a_crop_larger_than_every_image_is_told() -> None:
    data = ShapesData(4, 1, 0, size=48)
    texts = {}
    for crop in (64, [64, 48], 48):
        problems = SegmentationDataModule(data, 2, crop=crop).find_problems()
        texts[str(crop)] = [problem.text for problem in problems if "data.crop" in problem.text]
    assert texts["[64, 48]"] == texts["48"] == []
    (text,) = texts["64"]
    assert text.endswith("Fix: --data.crop '[48,48]'")
    with pytest.raises(InputError, match=r"data\.crop 9999x9999 .*Fix: --data\.crop '\[48,48\]'"):
        SegmentationDataModule(data, 2, crop=9999).check()  # 800 MB a mask
    with pytest.raises(InputError, match=r"data\.crop 40x99999 .*Fix: --data\.crop '\[48,48\]'"):
        SegmentationDataModule(data, 2, crop=[40, 99999]).check()


def test_transforms_that_make_sizes_unequal_are_refused_too() -> None:
    data = ShapesData(4, 1, 0, size=48)
    with pytest.raises(InputError, match=r"unequal sizes .*transforms in data\.augment that keep the size"):
        SegmentationDataModule(data, 2, crop=32, augment=[v2.RandomResize(16, 64)]).check()
    SegmentationDataModule(data, 2, crop=32, augment=[v2.RandomResize(32, 64), v2.RandomCrop(32)]).check()
    with pytest.raises(InputError, match=r"data\.augment cannot take a torch.uint8 image of \(3, 48, 48\): "):
        SegmentationDataModule(data, 2, augment=[v2.RandomCrop(512)]).check()


def test_a_transform_may_give_unequal_sizes_one_shape(place: Path) -> None:
    for name, size in (("a", (40, 48)), ("b", (64, 50)), ("c", (40, 48)), ("d", (40, 48))):
        write_image(place / f"data/images/{name}.png", np.zeros((*size, 3), np.uint8))
        write_image(place / f"data/masks/{name}.png", np.eye(*size, dtype=np.uint8) * 255)
    data = FolderData(str(place / "data"), CLASSES)
    SegmentationDataModule(data, 2, augment=[v2.RandomResizedCrop(32)]).check()


def test_unequal_sizes_are_fine_to_validate(place: Path) -> None:
    folder(place, [(40, 40)] * 2)
    sizes = [(40, 60), (33, 47), (40, 60), (60, 40), (33, 47)]
    folder(place, sizes, "val")
    module = attach(SegmentationDataModule(FolderData(str(place), CLASSES), 8, num_workers=0))
    module.check()
    found = {}
    for batch in module.val_dataloader():
        assert batch["image"].shape[2:] == batch["mask"].shape[1:] == tuple(batch["size"][0].tolist())
        found |= {name: tuple(size) for name, size in zip(batch["name"], batch["size"].tolist(), strict=True)}
    assert found == {str(index): size for index, size in enumerate(sizes)}


def test_a_transform_that_changes_the_type_is_refused_before_the_first_step() -> None:
    module = SegmentationDataModule(ShapesData(2, 1, 0, size=48), 2, augment=[v2.ToDtype(torch.float32, scale=True)])
    with pytest.raises(InputError, match="Remove ToDtype"):
        module.check()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 0}, "batch_size 0"),
        ({"eval_batch_size": 0}, "eval_batch_size 0"),
        ({"crop": 0}, "crop 0"),
        ({"crop": -32}, "crop -32"),
        ({"crop": [32, 32, 32]}, "one or two sides"),
        ({"num_workers": -1}, "num_workers -1"),
        ({"seed": -1}, "seed -1"),
    ],
)
def test_bad_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        SegmentationDataModule(Weighted(), **options)


def test_an_empty_split_of_a_data_set_of_ones_own_is_named() -> None:
    with pytest.raises(InputError, match="the train split is empty: Weighted"):
        SegmentationDataModule(Weighted(0)).check()


@pytest.mark.parametrize(("limit", "batches"), [(2, 2), (1.0, 4), (0.5, 2), (0.1, 1), (99, 4)])
def test_an_epoch_ends_at_the_trainers_limit(limit: float, batches: int) -> None:
    module = SegmentationDataModule(Weighted(8), 2, num_workers=0)
    loader = attach(module, limit_train_batches=limit).train_dataloader()
    assert len(list(loader)) == batches


def test_overfitting_validates_on_the_very_batch_that_it_trains_on() -> None:
    module = SegmentationDataModule(ShapesData(9, 2, 2, size=48), 4, crop=32, augment=AUGMENT, num_workers=0)
    attach(module, overfit_batches=1)
    train = module.train_dataloader()
    first, again, val = (unpack(next(iter(loader))) for loader in (train, train, module.val_dataloader()))
    assert first["index"].tolist() == [0, 1, 2, 3]
    for other in (again, val):
        assert all(torch.equal(first[key], other[key]) for key in ("image", "mask", "index"))


def test_train_size(place: Path) -> None:
    folder(place, [(30, 40), (90, 20), (50, 50)])
    folder(place, [(30, 40)], "val")
    data = FolderData(str(place), CLASSES)
    assert SegmentationDataModule(data).train_size() == (50, 50)
    assert SegmentationDataModule(data, crop=[8, 16]).train_size() == (8, 16)


def test_a_plain_index_is_epoch_zero() -> None:
    split = SplitDataset(Weighted(), "train", Augment((4, 4), []), seed=3)
    sampler = TrainBatches(5, 5, seed=3, shuffle=False)
    asked = next(iter(sampler))
    assert all(torch.equal(split[key]["image"], split[key.index]["image"]) for key in asked)
    later = [split[Index(2, epoch)]["image"].numpy().tobytes() for epoch in range(12)]
    assert len(set(later)) > 3


def training_split(data: SegmentationData, **options: Any) -> SplitDataset:
    """The split that training reads."""
    return attach(SegmentationDataModule(data, num_workers=0, **options)).train_dataloader().dataset


class Spotted(ShapesData):
    """A rare class in a corner of one image in eight."""

    def load(self, split: str, index: int) -> Sample:
        mask = torch.zeros(96, 96, dtype=torch.int64)
        if index % 8 == 0:
            mask[:4, :4] = 4
        return Sample(image=torch.zeros(3, 96, 96, dtype=torch.uint8), mask=mask)


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_a_share_of_the_crops_holds_a_rare_class(share: float) -> None:
    split = training_split(Spotted(train=200, val=2), crop=32, rare_crops=share)
    items = [split[Index(index, epoch)] for epoch in range(3) for index in range(200)]
    held = sum(bool((item["mask"] == 4).any()) for item in items) / len(items)
    assert held == pytest.approx(share, abs=0.05)
    again = [split[Index(index, epoch)] for epoch in range(3) for index in range(200)]
    assert all(torch.equal(a["mask"], b["mask"]) for a, b in zip(items, again, strict=True))  # (seed, epoch, index)
    for item in items:  # name and number are those of the image that is shown
        assert item["name"] == split.names[item["index"]]
        assert not (item["mask"] == 4).any() or item["index"] % 8 == 0


def test_rare_classes_are_those_below_half_of_an_equal_share() -> None:
    split = training_split(Spotted(train=16, val=2), crop=32, rare_crops=1.0)
    shown = [split[Index(3, epoch)]["index"] for epoch in range(20)]
    assert set(shown) == {0, 8}  # only these have one; which of them is drawn anew in each epoch
    with pytest.raises(InputError, match=r"data\.rare_crops 0\.5: no training image has a rare class"):
        training_split(Weighted(), crop=8, rare_crops=0.5)


def test_instance_ids_above_16_bits_travel_unchanged() -> None:
    split = SplitDataset(Weighted(), "train")
    item = split[0] | {"instance": torch.tensor([[0, 70_000], [2**31 - 1, 5]])}
    assert torch.equal(unpack(collate([item, item]))["instance"], torch.stack([item["instance"]] * 2))


def test_a_cache_changes_nothing_but_where_samples_come_from() -> None:
    data = ShapesData(train=4, val=2, size=48)
    plain, kept = (SplitDataset(data, "train", Augment((32, 32), []), cache=cache) for cache in (False, True))
    data.load = None  # nothing is read any more
    for index in range(4):
        assert kept[index]["mask"].dtype == torch.int64
    del data.load
    for index in range(4):
        assert all(torch.equal(plain[index][key], kept[index][key]) for key in ("image", "mask", "instance"))


@pytest.mark.slow
def test_the_wait_for_data_is_logged_and_told_once(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """A data set that sleeps: most of the epoch is waiting."""
    import time

    from conftest import TINY, train

    load = ShapesData.load
    slow = lambda self, split, index: (time.sleep(0.1), load(self, split, index))[1]  # noqa: E731
    monkeypatch.setattr("segmentation.training.callbacks.PATIENCE", 0.2)
    monkeypatch.setattr(ShapesData, "load", slow)
    with pytest.warns(
        UserWarning, match=r"% of the training time went into waiting for data.*data\.num_workers"
    ) as told:
        train(*TINY, "--name", "slow")
    assert len([w for w in told if "waiting for data" in str(w.message)]) == 1
    with (place / "runs/slow/metrics.csv").open() as file:
        shares = [float(row["train/data_wait"]) for row in csv.DictReader(file) if row["train/data_wait"]]
    assert len(shares) == 2
    assert all(0.1 < share <= 1 for share in shares)
