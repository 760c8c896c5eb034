"""What a run shows on its way: a summary before the first step, a line an epoch, throughput, pictures.

Hooks take Any: Lightning's classes do not declare the datamodule and the attributes of our module.
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
from segmentation.training.run_folder import RunFolder
from segmentation.visualize import evenly, sample_grid, save_png, to_rgb

#: An epoch that waited for data for fewer seconds is no reason for a warning.
PATIENCE = 5.0


class EpochPrinter(Checkpoint):
    """Prints a line an epoch. It is a Checkpoint, as Lightning calls these after the module has logged the epoch."""

    validated = False

    def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
        self.validated = not trainer.sanity_checking

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        metrics = trainer.callback_metrics
        epoch = f"epoch {trainer.current_epoch + 1:>3}"
        if trainer.max_epochs > 0:
            epoch += f"/{trainer.max_epochs}"
        line = f"{epoch}  loss {metrics['train/loss']:.4f}"
        if self.validated:
            line += f"  val loss {metrics['val/loss']:.4f}  val mIoU {metrics['val/miou']:.4f}"
        self.validated = False
        if trainer.is_global_zero:
            print(f"{line}  {metrics['train/images_per_second']:.1f} images/s", flush=True)


class RunSummary(Callback):
    """Prints, before the first step, what is about to run: data, net with parameters and FLOPs, device, W&B."""

    def __init__(self, run: RunFolder) -> None:
        self.run = run

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        if stage == "fit":  # before a callback of the user's copies the module, to average its weights
            pl_module.configure_from_data()
            pl_module.to(trainer.strategy.root_device)  # the copy stays where the module is now: not on the CPU

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        if not trainer.is_global_zero:
            return
        data = trainer.datamodule
        labels = pl_module.labels
        net = pl_module.net
        counts = {split: len(data.dataset.names(split)) for split in SPLITS}
        images = ", ".join(f"{count:,} {split}" for split, count in counts.items() if count)
        parameters = sum(parameter.numel() for parameter in net.parameters())
        shape = (1, labels.channels, *data.train_size())
        try:
            flops = f"{count_flops(net, shape) / 1e9:.1f}"
        except (RuntimeError, NotImplementedError):  # a net that looks at its data cannot run on the meta device
            flops = "?"
        step = f"{data.batch_size} images"
        if trainer.world_size > 1:
            step += f" x {trainer.world_size} processes"
        if trainer.accumulate_grad_batches > 1:
            step += f" x {trainer.accumulate_grad_batches} batches"
        rates = ", ".join(f"{group.get('initial_lr', group['lr']):g}" for group in trainer.optimizers[0].param_groups)
        origin = "as LearningRateFinder found it" if pl_module.lr else "as given"
        print(f"run       {self.run.path}")
        print(f"data      {data.description}: {images} images; {labels.task}, {labels.num_classes} classes")
        print(f"net       {type(net).__name__}: {in_millions(parameters)} parameters, {flops} GFLOPs for {shape}")
        steps = trainer.estimated_stepping_batches
        length = f"{trainer.max_epochs} epochs, {steps:,} steps" if steps < math.inf else "steps without end,"
        print(f"training  {length} of {step}")
        device = f"{pl_module.device.type} in {trainer.precision}"
        print(f"          on {device}, learning rate {rates}, {origin}", flush=True)


def in_millions(parameters: int) -> str:
    """Format a count of parameters."""
    return f"{parameters / 1e6:.2f} M" if parameters >= 100_000 else f"{parameters:,}"


def count_flops(net: SegmentationNet, shape: tuple[int, ...]) -> int:
    """Count the floating-point operations (2 x multiply-adds) of one prediction on an input of shape (N, C, H, W).
    Nothing is computed: the net is copied to torch's meta device."""
    with torch.device("meta"):
        twin = deepcopy(net).to("meta").eval()
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            twin.predict(torch.empty(shape))
    return counter.get_total_flops()


class Throughput(Callback):
    """Logs `train/images_per_second`, of all processes and without validation, and `train/data_wait`, the share of that
    time that this process waited for batches. Checkpoints keep the sums, so that a resumed run reports the whole."""

    def __init__(self) -> None:
        self.images = 0  # of the run
        self.seconds = 0.0  # of the run
        self.minutes = 0.0  # of the run's earlier processes
        self.started = time.perf_counter()
        self.warned = False
        self.start_epoch()

    def start_epoch(self) -> None:
        self.epoch_images = 0
        self.epoch_seconds = 0.0
        self.waited = 0.0
        self.last = time.perf_counter()  # end of the last batch

    def state_dict(self) -> dict[str, Any]:
        return {"images": self.images, "seconds": self.seconds, **self.metrics()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.images = state_dict["images"]
        self.seconds = state_dict["seconds"]
        self.minutes = state_dict["minutes"]

    def metrics(self) -> dict[str, Any]:
        """Minutes and throughput of the whole run."""
        minutes = self.minutes + (time.perf_counter() - self.started) / 60
        return {"minutes": minutes, "images_per_second": self.images / self.seconds if self.seconds else None}

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        self.last = time.perf_counter()

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx:  # an epoch's first batch waits for the workers to start
            self.waited += time.perf_counter() - self.last

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        now = time.perf_counter()
        self.epoch_images += len(batch["image"]) * trainer.world_size
        self.epoch_seconds += now - self.last
        self.last = now

    def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
        self.last = time.perf_counter()

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        self.images += self.epoch_images
        self.seconds += self.epoch_seconds
        seconds = self.epoch_seconds or math.inf
        wait = self.waited / seconds
        # The module gives them to the loggers, with the epoch's other metrics.
        pl_module.log("train/images_per_second", self.epoch_images / seconds, logger=False, rank_zero_only=True)
        pl_module.log("train/data_wait", wait, logger=False, rank_zero_only=True)
        if wait > 0.1 and self.waited > PATIENCE and not self.warned:
            self.warned = True
            rank_zero_warn(
                f"{wait:.0%} of the training time went into waiting for data. Remedies: data.num_workers (the machine "
                f"has {os.cpu_count()} cores), data.cache: true for data that fits into memory, fewer transforms"
            )
        self.start_epoch()


@dataclass
class PictureOptions:
    """Grids of images in the run folder's pictures/ and mask overlays in W&B.

    Args:
        images: validation images to show, the same every time; 0 for none.
        every_n_epochs: how often.
    """

    images: int = 6
    every_n_epochs: int = 5


class Pictures(Callback):
    """Shows the same images every few epochs: image, truth, prediction and errors."""

    def __init__(self, run: RunFolder, images: int, every_n_epochs: int) -> None:
        self.run = run
        self.images = images
        self.every_n_epochs = every_n_epochs
        self.shown = -math.inf  # epoch of the last grid

    def state_dict(self) -> dict[str, Any]:
        return {"shown": self.shown}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.shown = state_dict["shown"]

    def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
        epoch = trainer.current_epoch
        due = epoch - self.shown >= self.every_n_epochs or epoch + 1 == trainer.max_epochs
        if due and not trainer.sanity_checking:
            self.shown = epoch
            title = f"Validation images after epoch {epoch + 1}"
            self.show(
                trainer,
                pl_module,
                "val",
                "val",
                f"epoch-{epoch:04d}",
                title,
            )

    def on_test_end(self, trainer: Any, pl_module: Any) -> None:
        self.show(
            trainer,
            pl_module,
            trainer.datamodule.test_split,
            "test",
            "test",
            "Test images, best checkpoint",
        )

    def show(self, trainer: Any, module: Any, split: str, key: str, file: str, title: str) -> None:
        """Save and log evenly spaced images of a split, in rank 0 alone."""
        if self.images and trainer.is_global_zero:
            indices = evenly(len(trainer.datamodule.dataset.names(split)), self.images)
            grid, samples = prediction_grid(
                trainer,
                module,
                split,
                indices,
                title,
            )
            save_png(grid, self.run.pictures / f"{file}.png")
            log_images(
                trainer,
                f"{key}/images",
                samples,
                module.labels.names,
            )


def prediction_grid(
    trainer: Any,
    module: Any,
    split: str,
    indices: list[int],
    title: str,
) -> tuple[Image, list[dict[str, Any]]]:
    """Predict images of a split one by one, in this process alone, and draw them.

    Returns:
        The grid, and the samples with `name`, `prediction`, (H, W) class indices on the CPU, and `miou`.
    """
    dataset = trainer.datamodule.dataset
    labels = module.labels
    names = dataset.names(split)
    samples = []
    module.eval()
    for index in indices:
        sample = dataset.load(split, index)
        image = sample["image"][None].to(module.device)
        with torch.inference_mode(), trainer.precision_plugin.forward_context():
            prediction = module.classify(module(image)).cpu()
        matrix = confusion_counts(prediction, sample["mask"][None], labels.num_classes)
        sample |= {"name": names[index], "prediction": prediction[0], "miou": mean_iou(matrix).item()}
        samples.append(sample)
    return sample_grid(samples, labels, title), samples


def log_images(trainer: Any, key: str, samples: list[dict[str, Any]], names: list[str]) -> None:
    """Give images to loggers that take them, with truth and prediction as masks that can be switched on and off."""
    labels = {**dict(enumerate(names)), 255: "ignored"}
    images = []
    captions = []
    masks = []
    for sample in samples:
        truth = np.where(sample["mask"] == IGNORE_INDEX, 255, sample["mask"])
        images.append(to_rgb(sample["image"]))
        captions.append(sample["name"])
        masks.append(
            {
                "truth": {"mask_data": truth, "class_labels": labels},
                "prediction": {"mask_data": sample["prediction"].numpy(), "class_labels": labels},
            }
        )
    for logger in trainer.loggers:
        if hasattr(logger, "log_image"):  # W&B's
            logger.log_image(key, images, trainer.global_step, caption=captions, masks=masks)
