"""What a run shows of its results: grids of images, and at its end the table and the files in the run folder."""

import platform
import subprocess
from dataclasses import dataclass
from pathlib import Path
from shutil import which

import numpy as np
import torch
from lightning.pytorch import Callback
from lightning.pytorch.loggers import MLFlowLogger, TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_warn
from PIL import Image
from rich.console import Console
from torch import Tensor

from segmentation.checkpoint import read_checkpoint
from segmentation.data.labels import IGNORE_INDEX
from segmentation.data.writing import write_csv, write_json
from segmentation.errors import one_line, plural
from segmentation.metrics import confusion_counts, mean_iou, table_rows
from segmentation.module import SegmentationModule
from segmentation.training.callbacks import Throughput
from segmentation.training.page import write_page
from segmentation.training.run_folder import RunFolder
from segmentation.visualize import Shown, confusion_figure, evenly, iou_table, sample_grid, save_png, shrink, to_rgb


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

    def __init__(self, run: RunFolder, options: PictureOptions) -> None:
        self.run = run
        self.options = options
        self.worst_and_best: list[Shown] = []  # tested images, for the page

    def on_validation_end(self, trainer, pl_module) -> None:
        epoch = trainer.current_epoch
        # Not every epoch is validated: the first one that is, of so many.
        due = epoch % max(1, self.options.every_n_epochs) < (trainer.check_val_every_n_epoch or 1)
        if not trainer.sanity_checking and (due or epoch + 1 == trainer.max_epochs):
            self.show(trainer, pl_module, "val", f"epoch-{epoch:04d}", f"val images after epoch {epoch + 1}")

    def on_test_end(self, trainer, pl_module) -> None:
        split = trainer.datamodule.test_split
        self.show(
            trainer,
            pl_module,
            split,
            "test",
            f"{split} images, best checkpoint",
        )
        if self.options.images and trainer.is_global_zero:
            indices = worst_and_best(pl_module.test_counts[1])
            self.worst_and_best = predict_samples(trainer, pl_module, split, indices)

    def show(self, trainer, module, split: str, name: str, title: str) -> None:
        """Save and log evenly spaced images of a split, in rank 0 alone."""
        if not self.options.images or not trainer.is_global_zero:
            return
        indices = evenly(len(trainer.datamodule.dataset.names(split)), self.options.images)
        samples = predict_samples(trainer, module, split, indices)
        file = self.run.pictures / f"{name}.png"
        save_png(sample_grid(samples, module.labels, title), file)
        key = "test/images" if trainer.testing else "val/images"
        log_images(trainer, key, samples, module.labels.names)
        log_picture(trainer, key, file)


def predict_samples(trainer, module, split: str, indices: list[int]) -> list[Shown]:
    """Predict images of a split one by one, in this process alone.

    Returns:
        The samples, shrunk: `name`, `miou`, `image`, and, as class indices (H, W) on the CPU, `mask` and `prediction`.
    """
    dataset = trainer.datamodule.dataset
    names = dataset.names(split)
    samples = []
    module.eval()
    for index in indices:
        sample = dataset.load(split, index)
        image = sample["image"][None].to(module.device)
        with torch.inference_mode(), trainer.precision_plugin.forward_context():
            strips = [module.classify(outputs[-1]) for _, outputs in module.tiles.strips(image, module.outputs)]
        prediction = torch.cat(strips, dim=-2).cpu()
        matrix = confusion_counts(prediction, sample["mask"][None], module.labels.num_classes)
        samples.append(
            {
                "name": names[index],
                "miou": mean_iou(matrix).item(),
                "image": shrink(sample["image"]),
                "mask": shrink(sample["mask"]),
                "prediction": shrink(prediction[0]),
            }
        )
    return samples


def worst_and_best(counts: Tensor) -> list[int]:
    """Indices of the three images with the lowest and the three with the highest mIoU, the worst first.

    Args:
        counts: true positives, false positives and false negatives of each image, (images, 3, K).
    """
    tp, fp, fn = counts.double().unbind(dim=1)
    scores = (tp / (tp + fp + fn)).nanmean(dim=1)
    order = scores.argsort()[: scores.isfinite().sum()].tolist()  # NaN comes last
    return order if len(order) <= 6 else order[:3] + order[-3:]


def log_images(trainer, key: str, samples: list[Shown], names: list[str]) -> None:
    """Give images to loggers that take them, with truth and prediction as masks that can be switched on and off."""
    labels = {**dict(enumerate(names)), 255: "ignored"}
    masks = []
    for sample in samples:
        truth = np.where(sample["mask"] == IGNORE_INDEX, 255, sample["mask"])
        masks.append(
            {
                "truth": {"mask_data": truth, "class_labels": labels},
                "prediction": {"mask_data": sample["prediction"].numpy(), "class_labels": labels},
            }
        )
    for logger in trainer.loggers:
        if hasattr(logger, "log_image"):  # W&B's
            logger.log_image(
                key,
                [to_rgb(sample["image"]) for sample in samples],
                trainer.global_step,
                caption=[sample["name"] for sample in samples],
                masks=masks,
            )


def log_picture(trainer, key: str, file: Path) -> None:
    """Give a picture to loggers that take one."""
    for logger in trainer.loggers:
        if isinstance(logger, TensorBoardLogger):
            with Image.open(file) as picture:
                pixels = np.asarray(picture.convert("RGB"))
            logger.experiment.add_image(key, pixels, trainer.global_step, dataformats="HWC")
            logger.experiment.flush()  # after the test nothing else would
        elif isinstance(logger, MLFlowLogger):
            logger.experiment.log_artifact(logger.run_id, str(file), key)


def report(
    trainer,
    module: SegmentationModule,
    run: RunFolder,
    tested: Path,
    throughput: Throughput,
    samples: list[Shown],
    options: str,
) -> None:
    """Write per_image.csv, the plot of the confusion matrix, summary.json and report.html; print the table of IoU per
    class. Called in rank 0, after the test of the checkpoint `tested`.

    Args:
        trainer: after the test.
        module: the one that was tested.
        run: where to write.
        tested: the checkpoint.
        throughput: of the run.
        samples: tested images to show, with their predictions.
        options: those that differ from the defaults, as YAML.
    """
    data = trainer.datamodule
    labels = module.labels
    metrics = {key: float(value) for key, value in trainer.callback_metrics.items()}
    checkpoint = read_checkpoint(tested)
    summary = {
        **_logged_metrics(trainer.logger.rows, checkpoint["epoch"], checkpoint["global_step"]),
        **metrics,
        "split": data.test_split,
        "epoch": checkpoint["epoch"],
        "parameters": sum(parameter.numel() for parameter in module.net.parameters()),
        **provenance(trainer.strategy.root_device.type),
        **throughput.metrics(),
    }
    name = "none, as trainer.limit_test_batches is 0"
    if trainer.limit_test_batches:
        name = str(tested)
        matrix, counts = module.test_counts
        write_csv(run.per_image, table_rows(counts, data.dataset.names(data.test_split), labels.names))
        save_png(confusion_figure(matrix, labels), run.confusion)
        log_picture(trainer, "test/confusion", run.confusion)
    write_json(run.summary, summary)
    if trainer.limit_test_batches:  # after all files: a terminal may fail
        try:
            write_page(
                run.page,
                title=run.name,
                lines=[f"{type(module.net).__name__} on {data.description}: {data.test_split} images"],
                metrics=metrics,
                matrix=matrix,
                counts=counts,
                labels=labels,
                samples=samples,
                rows=trainer.logger.rows,
                facts=summary | {"epoch": checkpoint["epoch"] + 1},  # as printed
                options=options,
            )
        except Exception as error:  # the run has its results without it
            rank_zero_warn(f"{run.page} is not written: {one_line(error)}")
        Console().print(iou_table(metrics, labels, data.test_split, matrix))
    print(f"run folder {run.path}   ({summary['minutes']:.1f} minutes; tested checkpoint: {name})", flush=True)


def provenance(device: str) -> dict[str, str]:
    """What a figure depends on beside weights and data: the code's commit, the hardware and torch's version.

    Args:
        device: its type, as torch names it.
    """
    root = Path(__file__).parents[3]
    commit = "unknown"  # of a package that is installed, perhaps inside another's repository
    if (root / ".git").exists() and which("git"):
        command = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
        commit = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False).stdout.strip()
    name = f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}"
    if device == "cuda":
        name = torch.cuda.get_device_name()
    return {
        "commit": commit,
        "hardware": f"{name}, {plural(torch.get_num_threads(), 'thread')}, torch {torch.__version__}",
    }


def _logged_metrics(rows: list[dict], epoch: int, step: int) -> dict[str, float]:
    """Of the rows of metrics.csv, training metrics of a checkpoint's epoch and validation metrics of its step."""
    metrics: dict[str, float] = {}
    for row in rows:
        if str(row.get("epoch")) == str(epoch):
            # A validation between accumulated batches is logged under the step that is under way.
            wanted = ("train/", "val/") if int(row["step"]) in (step - 1, step) else "train/"
            metrics |= {key: float(value) for key, value in row.items() if key.startswith(wanted)}
    return metrics
