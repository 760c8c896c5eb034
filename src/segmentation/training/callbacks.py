"""What a run shows on its way: its beginning, a line an epoch, throughput, pictures.

Hooks take Any: Lightning's classes declare neither the trainer's datamodule nor what is our module's own.
"""

import math
import os
import time
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.utilities import rank_zero_warn
from PIL.Image import Image
from torch.utils.flop_counter import FlopCounterMode

from segmentation.data.base import SPLITS
from segmentation.data.labels import IGNORE_INDEX
from segmentation.metrics import confusion_counts, mean_iou
from segmentation.nets import SegmentationNet
from segmentation.training.loggers import log_to_wandb, wandb_runs
from segmentation.training.run_folder import RunFolder
from segmentation.visualize import evenly, sample_grid, save_png, to_rgb

#: Seconds that an epoch must have waited for data before it is said: a run of a moment need not be told.
PATIENCE = 5.0


class EpochPrinter(Checkpoint):
    """A line for every epoch, validated or not, on the terminal and in a cluster's log. (A Checkpoint, as Lightning
    calls these after the module's on_train_epoch_end, which logs the training figures.)"""

    validated = False

    def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
        self.validated = not trainer.sanity_checking

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        shown = {"train/loss": "loss"} | ({"val/loss": "val loss", "val/miou": "val mIoU"} if self.validated else {})
        self.validated = False
        if trainer.is_global_zero:
            found = trainer.callback_metrics
            figures = "  ".join(f"{label} {found[key]:.4f}" for key, label in shown.items())
            of = f"/{trainer.max_epochs}" if trainer.max_epochs > 0 else ""
            rate = found["train/images_per_second"]
            print(f"epoch {trainer.current_epoch + 1:>3}{of}  {figures}  {rate:.1f} images/s", flush=True)


class RunSummary(Callback):
    """Says, before the first step, what is about to run: data, net with parameters and FLOPs, device, W&B."""

    def __init__(self, run: RunFolder) -> None:
        self.run = run

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        if stage == "fit":  # before a callback of the user's copies the module, to average its weights
            pl_module.fill()
            pl_module.to(trainer.strategy.root_device)  # the copy stays where the module is now: not on the CPU

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        if not trainer.is_global_zero:
            return
        data, labels, net = trainer.datamodule, pl_module.labels, pl_module.net
        height, width = data.train_size
        images = {split: len(data.dataset.names(split)) for split in SPLITS}
        counts = ", ".join(f"{count:,} {split}" for split, count in images.items() if count)
        parameters = sum(parameter.numel() for parameter in net.parameters())
        try:
            flops = f"{count_flops(net, (1, labels.channels, height, width)) / 1e9:.1f}"
        except (RuntimeError, NotImplementedError):
            # A net that looks at its data cannot run on the meta device; on images it has, in the sanity check.
            flops = "? "
        steps = trainer.estimated_stepping_batches
        length = f"{trainer.max_epochs} epochs, {int(steps):,} steps" if steps < float("inf") else "steps without end,"
        factors = (data.batch_size, trainer.world_size, trainer.accumulate_grad_batches)
        names = ("images", "processes", "batches a step")
        made = " x ".join(f"{factor} {name}" for factor, name in zip(factors, names, strict=True) if factor > 1)
        where = f"on {trainer.world_size} x {pl_module.device.type} in {trainer.precision}"
        rates = ", ".join(f"{group.get('initial_lr', group['lr']):g}" for group in trainer.optimizers[0].param_groups)
        workers = f"{data.train_loader.num_workers} loader workers a process"
        size = f"{labels.channels}x{height}x{width}"
        origin = "as LearningRateFinder found it" if pl_module.lr else "as given"
        print(f"run       {self.run.path}")
        print(f"data      {type(data.source).__name__}: {counts} images; {labels.task}, {labels.num_classes} classes")
        print(f"net       {type(net).__name__}: {in_millions(parameters)} parameters, {flops} GFLOPs for {size}")
        print(f"training  {length} of {made or '1 image'} {where}")
        print(f"          learning rate {rates}, {origin}: it is not scaled by the batch; {workers}", flush=True)
        for logged in wandb_runs(trainer):
            logged.config.update({"images_per_step": math.prod(factors), "processes": trainer.world_size})
            print(f"W&B       {logged.url or f'offline; upload by: slurm/sync.sh {self.run.path}'}")


def in_millions(parameters: int) -> str:
    """A count of parameters as it is shown."""
    return f"{parameters / 1e6:.2f} M" if parameters >= 100_000 else f"{parameters:,}"


def count_flops(net: SegmentationNet, shape: tuple[int, ...]) -> int:
    """Floating-point operations (2 x multiply-adds) of one prediction on an input of shape (N, C, H, W), counted on
    torch's meta device: nothing is run."""
    with torch.device("meta"):
        twin = deepcopy(net).to("meta").eval()
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            twin.predict(torch.empty(shape))
    return counter.get_total_flops()


class Throughput(Callback):
    """Logs `train/images_per_second`: of all processes, data and optimizer included, validation not; and
    `train/data_wait`, the share of that time that this process waited for a batch, of which it warns once. Its sums,
    and the minutes of the run, go into the checkpoints, so that a resumed run reports the whole."""

    def __init__(self) -> None:
        self.images, self.seconds, self.minutes = 0, 0.0, 0.0  # of the epochs, and of the run's earlier processes
        self.warned = False
        self.started = time.perf_counter()
        self.begin_epoch()

    def begin_epoch(self) -> None:
        self.epoch_images, self.epoch_seconds, self.waited, self.since = 0, 0.0, 0.0, time.perf_counter()

    def state_dict(self) -> dict[str, Any]:
        return {"images": self.images, "seconds": self.seconds, **self.figures()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.images, self.seconds, self.minutes = (state_dict[key] for key in ("images", "seconds", "minutes"))

    def figures(self) -> dict[str, Any]:
        """Of the whole run."""
        minutes = self.minutes + (time.perf_counter() - self.started) / 60
        return {"minutes": minutes, "images_per_second": self.images / self.seconds if self.seconds else None}

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        self.since = time.perf_counter()

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx:  # an epoch's first batch waits for the workers to start
            self.waited += time.perf_counter() - self.since

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        now = time.perf_counter()
        self.epoch_images += len(batch["image"]) * trainer.world_size
        self.epoch_seconds, self.since = self.epoch_seconds + now - self.since, now

    def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
        self.since = time.perf_counter()

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        self.images, self.seconds = self.images + self.epoch_images, self.seconds + self.epoch_seconds
        seconds = self.epoch_seconds or float("inf")
        wait = self.waited / seconds
        pl_module.log("train/images_per_second", self.epoch_images / seconds, rank_zero_only=True)
        pl_module.log("train/data_wait", wait, rank_zero_only=True)
        if wait > 0.1 and self.waited > PATIENCE and not self.warned:
            self.warned = True
            rank_zero_warn(
                f"{wait:.0%} of the training time went into waiting for data. Remedies: data.num_workers (the machine "
                f"has {os.cpu_count()} cores), data.cache: true for data that fits into memory, fewer transforms"
            )
        self.begin_epoch()


@dataclass
class PictureOptions:
    """Contact sheets in the run folder's pictures/ and mask overlays in W&B.

    Args:
        images: validation images to show, the same every time; 0 for none.
        every_n_epochs: how often.
    """

    images: int = 6
    every_n_epochs: int = 5


class Pictures(Callback):
    """The same images every few epochs, as PictureOptions has it: image, truth, prediction and errors."""

    def __init__(self, run: RunFolder, images: int, every_n_epochs: int) -> None:
        self.run, self.images, self.every_n_epochs = run, images, every_n_epochs
        self.shown: int | None = None  # epoch of the last sheet

    def state_dict(self) -> dict[str, Any]:
        return {"shown": self.shown}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.shown = state_dict["shown"]

    def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
        epoch = trainer.current_epoch
        due = self.shown is None or epoch - self.shown >= self.every_n_epochs or epoch + 1 == trainer.max_epochs
        if due and not trainer.sanity_checking:
            self.shown = epoch
            title = f"Validation images after epoch {epoch + 1}"
            self.show(trainer, pl_module, "val", "val", f"epoch-{epoch:04d}", title)

    def on_test_end(self, trainer: Any, pl_module: Any) -> None:
        self.show(trainer, pl_module, trainer.datamodule.test_split, "test", "test", "Test images, best checkpoint")

    def show(self, trainer: Any, module: Any, split: str, key: str, file: str, title: str) -> None:
        """Evenly spaced images of a split, in rank 0 alone."""
        if not self.images or not trainer.is_global_zero:
            return
        indices = evenly(len(trainer.datamodule.dataset.names(split)), self.images)
        sheet, samples = prediction_grid(trainer, module, split, indices, title)
        save_png(sheet, self.run.pictures / f"{file}.png")
        if wandb_runs(trainer):
            overlays = [_overlay(sample, module.labels.names) for sample in samples]
            log_to_wandb(trainer, {f"{key}/images": overlays, "trainer/global_step": trainer.global_step})


def prediction_grid(
    trainer: Any, module: Any, split: str, indices: list[int], title: str
) -> tuple[Image, list[dict[str, Any]]]:
    """A contact sheet of images of a split, predicted one by one in this process alone; and the samples, to which
    `name` and `prediction`, (H, W) class indices on the CPU, are added."""
    dataset, labels = trainer.datamodule.dataset, module.labels
    samples, scores = [], []
    module.eval()
    for index in indices:
        sample = dataset.load(split, index)
        with torch.inference_mode(), trainer.precision_plugin.forward_context():
            found = module.classify(module(sample["image"][None].to(module.device))).cpu()
        samples.append({**sample, "name": dataset.names(split)[index], "prediction": found[0]})
        scores.append(float(mean_iou(confusion_counts(found, sample["mask"][None], labels.num_classes))))
    images, masks, found, names = ([s[key] for s in samples] for key in ("image", "mask", "prediction", "name"))
    return sample_grid(images, masks, found, labels, names, title, scores), samples


def _overlay(sample: dict[str, Any], classes: list[str]) -> Any:
    """A W&B image with truth and prediction as masks that can be switched on and off."""
    import wandb

    labels = {**dict(enumerate(classes)), 255: "ignored"}
    masks = {
        "truth": {"mask_data": np.where(sample["mask"] == IGNORE_INDEX, 255, sample["mask"]), "class_labels": labels},
        "prediction": {"mask_data": sample["prediction"].numpy(), "class_labels": labels},
    }
    return wandb.Image(to_rgb(sample["image"]), caption=sample["name"], masks=masks)
