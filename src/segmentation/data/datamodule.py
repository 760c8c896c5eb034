"""The LightningDataModule: from a data set to batches on their way to the device."""

import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, NoReturn

import numpy as np
from lightning.pytorch import LightningDataModule, Trainer
from lightning.pytorch.callbacks import GradientAccumulationScheduler
from lightning.pytorch.utilities import rank_zero_warn
from torch.utils.data import DataLoader
from torchvision.transforms import v2

from segmentation.data.base import SPLITS, SegmentationData
from segmentation.data.loading import RareCrops, SplitDataset, collate, ignore_preemption, unpack
from segmentation.data.sampler import EvalBatches, Progress, TrainBatches, TrainLoader
from segmentation.data.splits import cross_validation, without
from segmentation.data.statistics import SplitStatistics, available_cores, compute_statistics, find_leaks
from segmentation.data.transforms import Augment
from segmentation.errors import InputError

#: Seconds to wait for a batch, after which a worker counts as hung and the run ends, to be resumed: before Python 3.12
#: a fork beside other threads can hang, and so do files on a server that is gone.
PATIENCE = 600.0


class SegmentationDataModule(LightningDataModule):
    """Feeds a data set to the trainer: crops and augmentations to train, whole images to validate and test.

    Args:
        dataset: the images and masks: `ShapesData` (generated), `FolderData` (your own), or a class of yours.
        batch_size: samples of a training batch, in each process.
        eval_batch_size: images of a validation or test batch; null means batch_size. Images of unequal sizes are
            never put into one batch. No figure depends on it.
        crop: side of the random square crop to train on, or [height, width]; null for whole images.
        zoom: [smallest, largest] random enlargement of a crop; null: none.
        rare_crops: share of the training crops that hold a rare class at least, which is one with less than half of an
            equal share of the pixels; images that have one come more often.
        augment: transforms of torchvision.transforms.v2, applied to image, mask, instances and weights together.
        num_workers: processes that read and augment, for each training process; null means the machine's cores
            shared among the training processes, 8 at most.
        cache: keep decoded images in memory: for data that is small, or slow to read.
        folds: divide what there is to train and validate into so many folds; null: take the splits as they are.
        fold: the one to validate on, 0..folds - 1.
        on_bad_file: what to do about a file that cannot be used: `error`, or `skip` it and list it in the run folder.
        seed: of the order and the augmentation of the training samples, and of the folds.
    """

    trainer: Trainer  # there is one before a loader is asked for

    def __init__(
        self,
        dataset: SegmentationData,
        batch_size: int = 8,
        eval_batch_size: int | None = None,
        crop: int | list[int] | None = None,
        zoom: list[float] | None = None,
        rare_crops: float = 0.0,
        augment: list[v2.Transform] | None = None,
        num_workers: int | None = None,
        cache: bool = False,
        folds: int | None = None,
        fold: int = 0,
        on_bad_file: Literal["error", "skip"] = "error",
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.save_hyperparameters(logger=False)
        self.source = dataset
        #: All samples, those of bad files too; `dataset` is without these.
        self.whole = cross_validation(dataset, folds, fold, seed) if folds else dataset
        self.dataset = self.whole
        self.labels = dataset.labels
        self.batch_size, self.eval_batch_size = batch_size, eval_batch_size
        sizes = [batch_size] if eval_batch_size is None else [batch_size, eval_batch_size]
        sides = [crop, crop] if isinstance(crop, int) else crop or []
        if min([*sizes, *sides]) < 1 or len(sides) not in (0, 2):
            raise InputError(
                f"data.batch_size {batch_size}, data.eval_batch_size {eval_batch_size} and data.crop {crop} must be "
                "positive; crop one or two sides"
            )
        if seed < 0 or (num_workers or 0) < 0:
            raise InputError(f"data.seed {seed} and data.num_workers {num_workers} must be 0 or more")
        self.augment = Augment((sides[0], sides[1]) if sides else None, augment or [], zoom)
        if not 0 <= rare_crops <= 1 or (rare_crops and not sides):
            raise InputError(f"data.rare_crops {rare_crops} must be a share of the crops (data.crop {crop})")
        self.rare_crops = rare_crops
        self.num_workers, self.cache, self.skip = num_workers, cache, on_bad_file == "skip"
        self.seed = seed
        self._statistics: dict[str, SplitStatistics] = {}
        #: The split that is tested: the validation split where a data set has no test split.
        self.test_split = "test" if self.dataset.names("test") else "val"

    @classmethod
    def load_from_checkpoint(  # type: ignore[override]  # it never returns
        cls, checkpoint_path: str | Path, **options: Any
    ) -> NoReturn:
        """Raises InputError: Lightning's own would import and call what classes and functions the file names."""
        raise InputError(
            f"{checkpoint_path}: data is not built from a checkpoint alone, as that could run code. "
            "Fix: SegmentationDataModule(dataset, ...) with a data set of yours"
        )

    @property
    def train_size(self) -> tuple[int, int]:
        """(H, W) of a training sample: the crop's, or that of the largest image."""
        return self.augment.crop or max(self.statistics("train").sizes, key=lambda size: size[0] * size[1])

    def statistics(self, split: str) -> SplitStatistics:
        """Counts over a split; cached, and kept here too, should the user's cache not be writable."""
        if split not in self._statistics:
            self._statistics[split] = compute_statistics(self.whole, split, self.skip)
            self._leave_out()
        return self._statistics[split]

    def _leave_out(self) -> None:
        """The data set without the samples that cannot be used."""
        self.dataset = self.whole
        for split, statistics in self._statistics.items():
            if statistics.bad:
                self.dataset = without(self.dataset, split, statistics.bad)

    def skipped(self) -> list[str]:
        """What is wrong with the files that were left out (`on_bad_file: skip`), a message each."""
        bad = (error for statistics in self._statistics.values() for error in statistics.bad.values())
        return [*self.whole.problems, *map(str, bad)]

    def check(self, splits: Sequence[str] = SPLITS) -> None:
        """Read every sample of `splits` once and say, before the first step, what would stop a run or spoil it.

        Raises:
            InputError: with the file and the fix.
        """
        problems = self.whole.problems
        if problems and not self.skip:
            more = f" ({len(problems) - 1} more files have such problems)" if len(problems) > 1 else ""
            raise InputError(f"{problems[0]}{more}")
        lacking: dict[str, list[str]] = {}
        for split in splits:
            if self.whole.names(split):
                for name in self.statistics(split).absent:
                    lacking.setdefault(name, []).append(split)
            elif split != "test":
                raise InputError(f"the {split} split is empty: {type(self.source).__name__}.names({split!r}) is []")
        for name, where in lacking.items():
            consequence = "the net cannot learn it" if "train" in where else "its IoU there is NaN, or 0 if predicted"
            rank_zero_warn(f"class {name!r} never occurs in the {' and the '.join(where)} split: {consequence}")
        for leak in find_leaks(self.dataset, self._statistics):
            rank_zero_warn(leak)
        if "train" in splits:
            self._check_shapes(self.statistics("train"))

    def _check_shapes(self, statistics: SplitStatistics) -> None:
        """Training images must have one shape when batched: tries the extreme ones, and a few for the transforms."""
        train = self._split("train", self.augment)
        extremes = {int(at) for find in (np.argmin, np.argmax) for at in find(statistics.sizes, axis=0)}
        some = sorted(extremes | set(range(min(4, len(train)))))
        shapes = {tuple(train[index]["image"].shape[1:]): train.names[index] for index in some}
        if len(shapes) > 1 and self.batch_size > 1:
            ((h, w), name), ((h2, w2), other), *_ = shapes.items()
            crop = max(32, min(map(min, statistics.sizes)) // 32 * 32)
            fix = "transforms in data.augment that keep the size" if self.augment.crop else f"data.crop: {crop}"
            raise InputError(
                f"training images have unequal sizes ({name} {w}x{h}, {other} {w2}x{h2}) and cannot be batched. "
                f"Fix: {fix}, or data.batch_size: 1"
            )

    def setup(self, stage: str) -> None:
        """The statistics that rank 0 has counted goes to every process: nodes need not share a cache."""
        self._statistics = self.trainer.strategy.broadcast(self._statistics)
        self._leave_out()

    @property
    def overfit(self) -> bool:
        """Whether the same crops are trained on for ever, without augmentation, and validated too."""
        return self.trainer.overfit_batches > 0  # type: ignore[attr-defined]  # Trainer sets it without declaring it

    def train_dataloader(self) -> DataLoader:
        split = self._training_split()
        batches = self._train_batches(len(split))
        if batches.epoch_length % batches.accumulate:
            option = "trainer.overfit_batches" if self.overfit else "trainer.limit_train_batches"
            whole = math.ceil(batches.epoch_length / batches.accumulate) * batches.accumulate
            raise InputError(
                f"{option} makes an epoch of {batches.epoch_length} batches, which is no whole number of steps of "
                f"{batches.accumulate} batches. Fix: --{option} {whole}"
            )
        self.train_loader = TrainLoader(split, batch_sampler=batches, progress=self._progress, **self._workers())
        return self.train_loader

    def _training_split(self) -> SplitDataset:
        if self.overfit:
            return self._split("train", Augment(self.augment.crop, []))
        return self._split("train", self.augment, self._rare())

    def _train_batches(self, length: int) -> TrainBatches:
        trainer = self.trainer
        callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
        schedulers = [each for each in callbacks if isinstance(each, GradientAccumulationScheduler)]
        factors = [factor for each in schedulers for factor in each.scheduling.values()]
        return TrainBatches(
            length,
            self.batch_size,
            self.seed,
            trainer.global_rank,
            trainer.world_size,
            shuffle=not self.overfit,
            limit=trainer.limit_train_batches,
            accumulate=math.lcm(trainer.accumulate_grad_batches, *factors),
        )

    def _progress(self) -> Progress:
        """What the trainer has done, which a checkpoint gives back to it."""
        batch = self.trainer.fit_loop.epoch_loop.batch_progress.current.ready
        return Progress(self.trainer.current_epoch, batch, self.trainer.accumulate_grad_batches)

    def val_dataloader(self) -> DataLoader:
        if self.overfit:  # does the net know by heart what it was trained on?
            split = self._training_split()
            return DataLoader(split, batch_sampler=self._train_batches(len(split)), **self._workers())
        return self._eval_loader("val")

    def test_dataloader(self) -> DataLoader:
        return self._eval_loader(self.test_split)

    def on_after_batch_transfer(self, batch: dict[str, Any], dataloader_idx: int) -> dict[str, Any]:
        return unpack(batch)

    def _eval_loader(self, split: str) -> DataLoader:
        sizes = self.statistics(split).sizes
        batch_size = self.eval_batch_size or self.batch_size  # not before: Lightning's BatchSizeFinder changes it
        batches = EvalBatches(sizes, batch_size, self.trainer.global_rank, self.trainer.world_size)
        return DataLoader(self._split(split), batch_sampler=batches, **self._workers())

    def _split(self, split: str, augment: Augment | None = None, rare: RareCrops | None = None) -> SplitDataset:
        return SplitDataset(self.dataset, split, augment, self.seed, rare, self.cache and self.trainer is not None)

    def _rare(self) -> RareCrops | None:
        """Which crops of the training split are to hold which classes."""
        if not self.rare_crops:
            return None
        statistics = self.statistics("train")
        classes = np.flatnonzero(statistics.shares < 0.5 / len(statistics.names)).tolist()
        samples = np.flatnonzero(statistics.counts[:, classes].sum(axis=1)).tolist()
        if not samples:
            raise InputError(f"data.rare_crops {self.rare_crops}: no training image has a rare class. Set it to 0")
        return RareCrops(self.rare_crops, classes, samples)

    def _workers(self) -> dict[str, Any]:
        """How every loader reads: workers stay alive between epochs; memory is pinned where there is a GPU."""
        # The cores of a task of SLURM are its own, but where torchrun starts several processes in it; others share.
        own = os.environ.get("SLURM_CPUS_PER_TASK") if "TORCHELASTIC_RUN_ID" not in os.environ else None
        shared = min(8, max(1, int(own) if own else available_cores() // max(1, self.trainer.num_devices)))
        workers = shared if self.num_workers is None else self.num_workers
        return {
            "collate_fn": collate,
            "worker_init_fn": ignore_preemption,
            "num_workers": workers,
            "persistent_workers": workers > 0,
            "timeout": PATIENCE if workers else 0,
            "pin_memory": self.trainer.strategy.root_device.type == "cuda",
        }
