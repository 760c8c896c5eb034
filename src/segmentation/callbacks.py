"""What a run shows on its way: its beginning, a line an epoch, throughput, pictures."""

import os
import time
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint, RichProgressBar
from lightning.pytorch.utilities import rank_zero_warn
from torch.utils.flop_counter import FlopCounterMode

from segmentation.data.base import SPLITS
from segmentation.data.labels import IGNORE_INDEX
from segmentation.data.loading import SplitDataset
from segmentation.data.sampler import Index
from segmentation.metrics import confusion_counts, mean_iou
from segmentation.nets import SegmentationNet
from segmentation.pictures import contact_sheet, save_png, to_rgb
from segmentation.run import RunFolder, wandb_runs

#: Seconds that an epoch must have waited for data before it is said: a run of a moment need not be told.
PATIENCE = 5.0


class Progress(RichProgressBar):
    """Lightning's bar, with the loss alone: a line of EpochLines has the rest."""

    def get_metrics(self, trainer: Trainer, pl_module: LightningModule) -> dict[str, Any]:
        metrics = super().get_metrics(trainer, pl_module)
        return {"loss": metrics["train/loss_step"]} if "train/loss_step" in metrics else {}

    def _get_train_description(self, current_epoch: int) -> str:
        return f"epoch {current_epoch + 1:>3}/{self.trainer.max_epochs}"


class EpochLines(Checkpoint):
    """A line for every epoch, validated or not, on the terminal and in a cluster's log. (A Checkpoint, as Lightning
    calls these after the module's on_train_epoch_end, which logs the training figures.)"""

    validated = False

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.validated = not trainer.sanity_checking

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        validated, self.validated = self.validated, False
        found = trainer.callback_metrics
        if trainer.is_global_zero:
            shown = {"train/loss": "loss"} | ({"val/loss": "val loss", "val/miou": "val mIoU"} if validated else {})
            figures = "  ".join(f"{label} {found[key]:.4f}" for key, label in shown.items())
            of = f"/{trainer.max_epochs}" if trainer.max_epochs > 0 else ""
            rate = found["train/images_per_second"]
            print(f"epoch {trainer.current_epoch + 1:>3}{of}  {figures}  {rate:.1f} images/s", flush=True)


class Introduction(Callback):
    """Says, before the first step, what is about to run: data, net with parameters and FLOPs, device, W&B.

    Args:
        run: the run folder.
    """

    def __init__(self, run: RunFolder) -> None:
        self.run = run

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage == "fit":  # before a callback of the user's copies the module, to average its weights
            pl_module.fill()

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not trainer.is_global_zero:
            return
        data, labels, net = trainer.datamodule, pl_module.labels, pl_module.net
        height, width = data.train_size
        counts = ", ".join(
            f"{len(data.dataset.names(split)):,} {split}" for split in SPLITS if data.dataset.names(split)
        )
        parameters = sum(parameter.numel() for parameter in net.parameters())
        try:
            flops = f"{count_flops(net, (1, labels.channels, height, width)) / 1e9:.1f}"
        except (RuntimeError, NotImplementedError):
            # A net that looks at its data cannot run on the meta device; on images it has, in the sanity check.
            flops = "? "
        size = f"{labels.channels}x{height}x{width}"
        steps = trainer.estimated_stepping_batches
        length = f"{trainer.max_epochs} epochs, {int(steps):,} steps" if steps < float("inf") else "steps without end,"
        batch = data.batch_size * trainer.world_size * trainer.accumulate_grad_batches
        where = f"on {trainer.world_size} x {pl_module.device.type} in {trainer.precision}"
        lines = {
            "run": f"{self.run.path}",
            "data": f"{type(data.source).__name__}: {counts} images; {labels.task}, {labels.num_classes} classes",
            "net": f"{type(net).__name__}: {in_millions(parameters)} parameters, {flops} GFLOPs for {size}",
            "training": f"{length} of {batch} images {where}",
        }
        for logged in wandb_runs(trainer):
            lines["W&B"] = logged.url or f"offline; upload by: wandb sync {self.run.path}/wandb/offline-run-*"
        for key, line in lines.items():
            print(f"{key:<9} {line}", flush=True)


def in_millions(parameters: int) -> str:
    """A count of parameters as it is shown."""
    return f"{parameters / 1e6:.2f} M" if parameters >= 100_000 else f"{parameters:,}"


def count_flops(net: SegmentationNet, shape: tuple[int, ...]) -> int:
    """Floating-point operations (2 x multiply-adds) of one prediction, counted on torch's meta device: nothing is run.

    Args:
        net: any net.
        shape: (N, C, H, W) of its input.
    """
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
        self.images = self.seconds = self.minutes = 0.0
        self.epoch_images, self.epoch_seconds, self.waited = 0, 0.0, 0.0
        self.warned = False
        self.started = self.since = time.perf_counter()

    def state_dict(self) -> dict[str, float]:
        return {"images": self.images, "seconds": self.seconds, "minutes": self.total_minutes()}

    def load_state_dict(self, state: dict[str, float]) -> None:
        self.images, self.seconds, self.minutes = state["images"], state["seconds"], state["minutes"]

    def total_minutes(self) -> float:
        return self.minutes + (time.perf_counter() - self.started) / 60

    def images_per_second(self) -> float | None:
        return self.images / self.seconds if self.seconds else None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.since = time.perf_counter()

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, i: int) -> None:
        if i:  # an epoch's first batch waits for the workers to start
            self.waited += time.perf_counter() - self.since

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, i: int
    ) -> None:
        now = time.perf_counter()
        self.epoch_images += len(batch["image"]) * trainer.world_size
        self.epoch_seconds, self.since = self.epoch_seconds + now - self.since, now

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.since = time.perf_counter()

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.images, self.seconds = self.images + self.epoch_images, self.seconds + self.epoch_seconds
        rate = self.epoch_images / self.epoch_seconds if self.epoch_seconds else 0.0
        pl_module.log("train/images_per_second", rate, rank_zero_only=True)
        wait = self.waited / self.epoch_seconds if self.epoch_seconds else 0.0
        pl_module.log("train/data_wait", wait, rank_zero_only=True)
        if wait > 0.1 and self.waited > PATIENCE and not self.warned:
            self.warned = True
            rank_zero_warn(
                f"{wait:.0%} of the training time went into waiting for data. Remedies: data.num_workers (the machine "
                f"has {os.cpu_count()} cores), data.cache: true for data that fits into memory, fewer transforms"
            )
        self.epoch_images, self.epoch_seconds, self.waited, self.since = 0, 0.0, 0.0, time.perf_counter()


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
    """Every few epochs the same validation images: image, truth, prediction and errors, as a PNG contact sheet in the
    run folder's `pictures/` and as mask overlays in W&B.

    Args:
        run: the run folder.
        images: how many images to show; 0 for none.
        every_n_epochs: how often.
    """

    def __init__(self, run: RunFolder, images: int, every_n_epochs: int) -> None:
        self.run, self.images, self.every_n_epochs = run, images, every_n_epochs
        self.shown: int | None = None  # epoch of the last sheet

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        epoch = trainer.current_epoch
        final = trainer.max_epochs is not None and epoch == trainer.max_epochs - 1
        wanted = self.shown is None or epoch - self.shown >= self.every_n_epochs or final
        if trainer.sanity_checking or not self.images or not wanted or not trainer.is_global_zero:
            return
        self.shown = epoch
        self.show(trainer, pl_module, "val", "val", f"epoch-{epoch:04d}", f"Validation images after epoch {epoch + 1}")

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.images and trainer.is_global_zero:
            split = trainer.datamodule.test_split
            self.show(trainer, pl_module, split, "test", "test", "Test images, best checkpoint")

    def show(self, trainer: Trainer, pl_module: LightningModule, split: str, key: str, file: str, title: str) -> None:
        """Predict evenly spaced images of a split, in rank 0 alone, one by one, and show them."""
        dataset = SplitDataset(trainer.datamodule.dataset, split)
        indices = np.linspace(0, len(dataset) - 1, min(self.images, len(dataset))).round().astype(int).tolist()
        items = [dataset[Index(index)] for index in indices]
        images, masks, names = ([item[key] for item in items] for key in ("image", "mask", "name"))
        predictions = [predict_one(trainer, pl_module, image) for image in images]
        classes = pl_module.labels.num_classes
        scores = [
            float(mean_iou(confusion_counts(predicted[None], mask[None], classes)))
            for predicted, mask in zip(predictions, masks, strict=True)
        ]
        sheet = contact_sheet(images, masks, predictions, pl_module.labels, names, title, scores)
        save_png(sheet, self.run.pictures / f"{file}.png")
        for logged in wandb_runs(trainer):
            overlays = _overlays(images, masks, predictions, names, pl_module.labels.names)
            logged.log({f"{key}/images": overlays, "trainer/global_step": trainer.global_step})


def predict_one(trainer: Trainer, module: LightningModule, image: torch.Tensor) -> torch.Tensor:
    """Class indices (H, W), on the CPU, of an image (C, H, W) as a file has it, in the trainer's precision."""
    module.eval()
    with torch.inference_mode(), trainer.precision_plugin.forward_context():
        return module.classify(module(image[None].to(module.device)))[0].cpu()


def _overlays(images: list, masks: list, predictions: list, names: list[str], classes: list[str]) -> list[Any]:
    """W&B images with truth and prediction as masks that can be switched on and off."""
    import wandb

    labels = {**dict(enumerate(classes)), 255: "ignored"}
    return [
        wandb.Image(
            to_rgb(image),
            caption=name,
            masks={
                "truth": {"mask_data": np.where(mask == IGNORE_INDEX, 255, mask), "class_labels": labels},
                "prediction": {"mask_data": predicted.numpy(), "class_labels": labels},
            },
        )
        for image, mask, predicted, name in zip(images, masks, predictions, names, strict=True)
    ]
