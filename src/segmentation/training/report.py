"""What a run says at its end: the table on the terminal, the files in the run folder, the plots in W&B."""

import csv
import re
from pathlib import Path
from typing import Any

from rich.console import Console
from torch import Tensor

from segmentation.checkpoint import read_checkpoint
from segmentation.data.labels import Labels
from segmentation.data.writing import write_csv, write_json
from segmentation.metrics import table_rows
from segmentation.module import SegmentationModule
from segmentation.training.callbacks import Throughput
from segmentation.training.loggers import wandb_runs
from segmentation.training.run_folder import RunFolder
from segmentation.visualize import confusion_figure, iou_table, save_png


def report(
    trainer: Any, module: SegmentationModule, run: RunFolder, tested: Path, throughput: Throughput, log_checkpoint: bool
) -> None:
    """At a run's end, in rank 0: the table of IoU per class on the terminal; `summary.json`, `per_image.csv` and the
    plot of the confusion matrix in the run folder; the plot, and by option the tested checkpoint, in W&B."""
    data, labels, picture = trainer.datamodule, module.labels, run.pictures / "confusion.png"
    found = {key: float(value) for key, value in trainer.callback_metrics.items()}
    if trainer.limit_test_batches:
        matrix, counts = module.test_counts
        write_csv(run.per_image, table_rows(counts, data.dataset.names(data.test_split), labels.names))
        save_png(confusion_figure(matrix, labels), picture)
    checkpoint = read_checkpoint(tested)
    epoch = checkpoint["epoch"]
    summary = {
        **_logged_figures(run, epoch, checkpoint["global_step"]),
        **found,
        "split": data.test_split,
        "epoch": epoch,
        "parameters": sum(parameter.numel() for parameter in module.net.parameters()),
        **throughput.figures(),
    }
    write_json(run.summary, summary)
    where = "none, as trainer.limit_test_batches is 0"
    if trainer.limit_test_batches:  # when all is written: a terminal may fail
        print_table(found, labels, data.test_split, matrix)
        where = str(run.checkpoints / tested.name)
    print(f"run folder {run.path}   ({summary['minutes']:.1f} minutes; tested checkpoint: {where})", flush=True)
    for logged in wandb_runs(trainer):
        import wandb

        if trainer.limit_test_batches:
            logged.log({"test/confusion": wandb.Image(str(picture))})
        if log_checkpoint:
            name = re.sub(r"[^A-Za-z0-9_.-]", "-", run.name)  # what W&B allows
            artifact = wandb.Artifact(name, type="model", metadata={"val/miou": summary.get("val/miou")})
            artifact.add_file(str(tested))
            logged.log_artifact(artifact)


def _logged_figures(run: RunFolder, epoch: int, step: int) -> dict[str, float]:
    """Training's figures of the epoch whose checkpoint was tested, and the validation's of the step at which that was
    saved, from metrics.csv."""
    with run.metrics.open(newline="", encoding="utf-8") as file:
        rows = [row for row in csv.DictReader(file) if row["epoch"] == str(epoch)]
    # A validation between accumulated batches is logged under the step that is under way.
    validations = [row for row in rows if row.get("val/miou") and int(row["step"]) in (step - 1, step)]
    found: dict[str, float] = {}
    for split, of_split in (("train/", rows), ("val/", validations[:1])):
        for row in of_split:
            found |= {key: float(value) for key, value in row.items() if value and key.startswith(split)}
    return found


def print_table(found: dict[str, float], labels: Labels, split: str, matrix: Tensor) -> None:
    """The table of IoU per class, of figures logged under `test/`, which may be those of the validation split."""
    named = {f"{split}/{key.removeprefix('test/')}": value for key, value in found.items() if key.startswith("test/")}
    Console().print(iou_table(named, labels, split, matrix.sum(dim=1).tolist()))
