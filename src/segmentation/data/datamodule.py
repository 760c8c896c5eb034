"""The LightningDataModule: from a data set to batches on their way to the device."""

import math
import os
from collections.abc import Iterator, Sequence
from itertools import chain
from pathlib import Path
from statistics import median
from typing import Literal, NoReturn

import numpy as np
from lightning.pytorch import LightningDataModule, Trainer
from lightning.pytorch.callbacks import GradientAccumulationScheduler
from lightning.pytorch.utilities import rank_zero_warn
from torch.utils.data import DataLoader
from torchvision.transforms import v2

from segmentation.data.base import SPLITS, SegmentationData
from segmentation.data.leaks import find_leaks
from segmentation.data.loading import Batch, RareCrops, SplitDataset, collate, end_with_parent, unpack
from segmentation.data.sampler import TrainBatches, TrainLoader, eval_batches
from segmentation.data.splits import cross_validation, without
from segmentation.data.statistics import SplitStatistics, available_cores, compute_statistics
from segmentation.data.transforms import Augment
from segmentation.errors import InputError, Problem, plural

#: DataLoader timeout in seconds. A worker can hang on a file server that is gone or, before Python 3.12, in a fork
#: beside other threads; the run then ends and can be resumed.
PATIENCE = 600.0

#: A crop of more than so many times the pixels of the largest image is a slip of the keyboard.
MAX_PADDING = 16


def suggest_crop(sizes: list[tuple[int, int]]) -> int:
    """Side of a training crop for images of these sizes: a multiple of 32, 512 at most."""
    side = median(map(min, sizes))
    return int(min(512, max(32, side // 32 * 32)))


class SegmentationDataModule(LightningDataModule):
    """Feeds a data set to the trainer: crops and augmentations to train, whole images to validate and test.

    Images of more than 2 megapixels are validated and tested by the tiles of prediction (`segmentation.nets.tiles`).

    Args:
        dataset: the images and masks: `ShapesData` (generated), `FolderData` (your own), or a class of yours.
        batch_size: samples of a training batch, in each process.
        eval_batch_size: images of a validation or test batch; null means batch_size. Images of unequal sizes are
            never put into one batch. No metric depends on it.
        crop: side of the random square crop to train on, or [height, width]; null for whole images.
        zoom: [smallest, largest] random enlargement of a crop; null: none.
        rare_crops: minimum share of training crops that contain a rare class: one with fewer than 1 / (2 * num_classes)
            of the pixels. Images with a rare class are drawn more often.
        augment: transforms of torchvision.transforms.v2, applied to image, mask, instances and weights together.
        num_workers: processes that read and augment, for each training process; null means the machine's cores
            shared among the training processes, 8 at most.
        cache: keep decoded images in memory: for data that is small, or slow to read.
        folds: cross-validate: merge train and val and divide them into this many folds; null: use the splits as given.
        fold: index of the fold to validate on, 0..folds - 1.
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
        least = {"batch_size": 1, "eval_batch_size": 1, "num_workers": 0, "seed": 0}
        for option, smallest in least.items():
            value = self.hparams[option]
            if value is not None and value < smallest:
                raise InputError(f"data.{option} {value} must be {smallest} or more")
        sides = [crop, crop] if isinstance(crop, int) else crop or []
        if sides and (len(sides) != 2 or min(sides) < 1):
            raise InputError(f"data.crop {crop}: give one or two sides, each 1 or more")
        if not 0 <= rare_crops <= 1 or (rare_crops and not sides):
            raise InputError(f"data.rare_crops {rare_crops} must be a share of the crops (data.crop {crop})")
        #: What the data set is, in words.
        self.description = type(dataset).__name__
        if hasattr(dataset, "root"):
            self.description += f" in {dataset.root}"
        #: The data set to train on; without the samples that cannot be used, as soon as their split is read.
        self.dataset = dataset
        if folds:
            self.dataset = cross_validation(dataset, folds, fold, seed)
        elif fold:
            raise InputError(f"data.fold {fold} is one part of a cross-validation: say of how many, --data.folds 5")
        self.labels = dataset.labels
        self.batch_size = batch_size
        self.eval_batch_size = eval_batch_size
        self.augment = Augment(tuple(sides) or None, augment or [], zoom)
        self.rare_crops = rare_crops
        self.num_workers = num_workers
        self.cache = cache
        self.skip = on_bad_file == "skip"
        self.seed = seed
        #: The statistics of the splits that were read.
        self.counted: dict[str, SplitStatistics] = {}
        #: The split that is tested: the validation split where a data set has no test split.
        self.test_split = "test" if dataset.names("test") else "val"

    @classmethod
    def load_from_checkpoint(  # type: ignore[override]  # it never returns
        cls, checkpoint_path: str | Path, **options
    ) -> NoReturn:
        """Raises InputError: Lightning's own would import and call what classes and functions the file names."""
        raise InputError(
            f"{checkpoint_path}: data is not built from a checkpoint alone, as that could run code. "
            "Fix: SegmentationDataModule(dataset, ...) with a data set of yours"
        )

    def statistics(self, split: str) -> SplitStatistics:
        """Counts over a split, whose samples are read unless they are known already. `dataset` loses those that cannot
        be used.

        Raises:
            InputError: some samples cannot be used (unless `on_bad_file: skip`).
        """
        if split not in self.counted:
            statistics = compute_statistics(self.dataset, split)
            errors = list(statistics.bad.values())
            if errors and not self.skip:
                count = f"{len(errors)} of {len(self.dataset.names(split))} {split} samples"
                raise InputError(f"{errors[0]} ({count} cannot be used)")
            self._keep(split, statistics)
        return self.counted[split]

    def _keep(self, split: str, statistics: SplitStatistics) -> None:
        self.counted[split] = statistics
        if statistics.bad:
            self.dataset = without(self.dataset, split, statistics.bad)

    def train_size(self) -> tuple[int, ...]:
        """(H, W) of a training sample: the crop's, or that of the largest image."""
        return self.augment.crop or max(self.statistics("train").sizes, key=math.prod)

    def errors(self) -> list[InputError]:
        """What is wrong with samples of the splits that were read."""
        return list(chain.from_iterable(statistics.bad.values() for statistics in self.counted.values()))

    def skipped(self) -> list[str]:
        """What is wrong with the files that were left out, a message each."""
        return [*self.dataset.problems, *map(str, self.errors())]

    def check(self, splits: Sequence[str] = SPLITS) -> None:
        """Read every sample of `splits` once, before the first step. Warn of what would spoil a run.

        Raises:
            InputError: what would stop a run, with the file and the fix.
        """
        problems = self.dataset.problems
        if problems and not self.skip:
            raise InputError(f"{problems[0]} ({plural(len(problems), 'file')} with such problems)")
        for problem in self.find_problems(splits):
            if problem.stops:
                raise InputError(problem.text)
            rank_zero_warn(problem.text)

    def find_problems(self, splits: Sequence[str] = SPLITS) -> Iterator[Problem]:
        """Read every sample of `splits`, and say what would stop or spoil a run: leaks, absent classes, unequal sizes.

        Yields:
            what is wrong.

        Raises:
            InputError: a split is empty (the test split may be).
        """
        for split in splits:
            if self.dataset.names(split):
                self.statistics(split)
            elif split != "test":
                raise InputError(f"the {split} split is empty: {self.description}")
        errors = self.errors()
        if errors and not any(statistics.records for statistics in self.counted.values()):
            yield Problem(f"no sample of any split can be used, e.g. {errors[0]}", stops=True)
            return
        yield from self.dataset.find_problems()
        yield from find_leaks(self.dataset, self.counted)
        nowhere = []
        if len(self.counted) > 1:
            absent = [statistics.absent for statistics in self.counted.values()]
            nowhere = [name for name in absent[0] if all(name in names for names in absent)]
        if nowhere:
            yield Problem(
                f"no split has a pixel of {', '.join(nowhere)}. Fix: take it out of data.dataset.classes, or give it "
                "the value that masks have"
            )
        for split, statistics in self.counted.items():
            missing = [name for name in statistics.absent if name not in nowhere]
            if not statistics.records:
                yield Problem(f"no sample of the {split} split can be used", stops=True)
            elif missing:
                yield Problem(
                    f"the {split} split has no pixel of {', '.join(missing)}. Fix: take the class out of classes, or "
                    "divide the data anew (data.folds, split_seed)"
                )
        if "train" in splits and self.dataset.names("train"):
            yield from self._check_training()

    def _check_training(self) -> Iterator[Problem]:
        """Augment a few training images, those of extreme sizes among them: in a batch they must have one shape."""
        sizes = self.statistics("train").sizes
        train = SplitDataset(self.dataset, "train", self.augment, self.seed)
        crop = self.augment.crop or (0, 0)
        height, width = np.max(sizes, axis=0)
        is_huge = math.prod(crop) > MAX_PADDING * height * width
        if is_huge or (crop[0] > height and crop[1] > width):
            yield Problem(
                f"data.crop {crop[0]}x{crop[1]} is larger than the training images: the rest is padding, which costs "
                f"memory and time. Fix: --data.crop '[{height},{width}]'",
                stops=is_huge,
            )
        if is_huge:  # a few samples may fill the memory
            return
        shapes = set()
        try:
            for index in {*range(min(4, len(train))), *np.argmin(sizes, axis=0), *np.argmax(sizes, axis=0)}:
                shapes.add(train[int(index)]["mask"].shape)
        except InputError as error:
            yield Problem(str(error), stops=True)
        if len(shapes) > 1 and self.batch_size > 1:
            fix = (
                "transforms in data.augment that keep the size"
                if self.augment.crop
                else f"data.crop: {suggest_crop(sizes)}"
            )
            text = f"training images of unequal sizes cannot be batched. Fix: {fix}, or data.batch_size: 1"
            yield Problem(text, stops=True)

    def setup(self, stage: str) -> None:
        """Give every process the statistics that rank 0 has counted: nodes need not share a cache."""
        for split, statistics in self.trainer.strategy.broadcast(self.counted).items():
            if split not in self.counted:
                self._keep(split, statistics)

    def train_dataloader(self) -> DataLoader:
        batches = self._train_batches()
        length = batches.epoch_length
        if length % batches.accumulate:
            option = "overfit_batches" if self._overfits() else "limit_train_batches"
            raise InputError(
                f"an epoch of {length} batches is no whole number of steps of {batches.accumulate} batches. "
                f"Fix: --trainer.{option} {length + -length % batches.accumulate}"
            )
        return TrainLoader(
            self._train_split(),
            batch_sampler=batches,
            progress=self._progress,
            **self._loader_options(),
        )

    def val_dataloader(self) -> DataLoader:
        if not self._overfits():
            return self._eval_loader("val")
        # overfit_batches: validate on the training crops
        return DataLoader(
            self._train_split(),
            batch_sampler=self._train_batches(),
            **self._loader_options(),
        )

    def test_dataloader(self) -> DataLoader:
        return self._eval_loader(self.test_split)

    def on_after_batch_transfer(self, batch: Batch, dataloader_idx: int) -> Batch:
        return unpack(batch)

    def _overfits(self) -> bool:
        """Whether the same crops are trained on for ever, without augmentation, and validated too."""
        return self.trainer.overfit_batches > 0  # type: ignore[attr-defined]  # Trainer sets it without declaring it

    def _train_split(self) -> SplitDataset:
        augment = self.augment
        rare = None
        if self._overfits():
            augment = Augment(augment.crop, [])
        elif self.rare_crops:
            rare = self._rare_crops()
        return SplitDataset(
            self.dataset,
            "train",
            augment,
            self.seed,
            rare,
            self.cache,
        )

    def _train_batches(self) -> TrainBatches:
        trainer = self.trainer
        accumulate = trainer.accumulate_grad_batches
        for callback in trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(callback, GradientAccumulationScheduler):
                accumulate = math.lcm(accumulate, *callback.scheduling.values())
        return TrainBatches(
            len(self.dataset.names("train")),
            self.batch_size,
            self.seed,
            trainer.global_rank,
            trainer.world_size,
            shuffle=not self._overfits(),
            limit=trainer.limit_train_batches,
            accumulate=accumulate,
        )

    def _rare_crops(self) -> RareCrops:
        """Which crops of the training split are to hold which classes."""
        statistics = self.statistics("train")
        classes = np.flatnonzero(statistics.shares < 0.5 / len(statistics.names))
        samples = np.flatnonzero(statistics.counts[:, classes].any(axis=1))
        if not len(samples):
            raise InputError(f"data.rare_crops {self.rare_crops}: no training image has a rare class. Set it to 0")
        return RareCrops(self.rare_crops, classes.tolist(), samples.tolist())

    def _progress(self) -> tuple[int, int, int]:
        """What the trainer has done, which a checkpoint gives back to it."""
        batch = self.trainer.fit_loop.epoch_loop.batch_progress.current.ready
        return self.trainer.current_epoch, batch, self.trainer.accumulate_grad_batches

    def _eval_loader(self, split: str) -> DataLoader:
        batches = eval_batches(
            self.statistics(split).sizes,
            self.eval_batch_size or self.batch_size,  # not before: Lightning's BatchSizeFinder changes it
            self.trainer.global_rank,
            self.trainer.world_size,
        )
        dataset = SplitDataset(self.dataset, split, cache=self.cache)
        return DataLoader(dataset, batch_sampler=batches, **self._loader_options())

    def _loader_options(self) -> dict:
        """How every loader reads: workers stay alive between epochs; memory is pinned where there is a GPU."""
        workers = self.num_workers
        if workers is None:
            # A SLURM task has its cores to itself, unless torchrun starts several processes in it; else they share.
            cores = available_cores() // max(1, self.trainer.num_devices)
            if "TORCHELASTIC_RUN_ID" not in os.environ:
                cores = int(os.environ.get("SLURM_CPUS_PER_TASK", cores))
            workers = min(8, max(1, cores))
        return {
            "collate_fn": collate,
            "worker_init_fn": end_with_parent,
            "num_workers": workers,
            "persistent_workers": workers > 0,
            "timeout": PATIENCE if workers else 0,
            "pin_memory": self.trainer.strategy.root_device.type == "cuda",
        }
