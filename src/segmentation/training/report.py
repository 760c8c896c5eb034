"""What a run says at its end: the table on the terminal, the files in the run folder."""

import csv
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
from segmentation.training.run_folder import RunFolder
from segmentation.visualize import confusion_figure, iou_table, save_png


def report(
    trainer: Any,
    module: SegmentationModule,
    run: RunFolder,
    tested: Path,
    throughput: Throughput,
) -> None:
    """Write summary.json, per_image.csv and the plot of the confusion matrix, and print the table of IoU per class.
    Called in rank 0, after the test of the checkpoint `tested`."""
    data = trainer.datamodule
    labels = module.labels
    picture = run.pictures / "confusion.png"
    metrics = {key: float(value) for key, value in trainer.callback_metrics.items()}
    checkpoint = read_checkpoint(tested)
    summary = {
        **_logged_metrics(run, checkpoint["epoch"], checkpoint["global_step"]),
        **metrics,
        "split": data.test_split,
        "epoch": checkpoint["epoch"],
        "parameters": sum(parameter.numel() for parameter in module.net.parameters()),
        **throughput.metrics(),
    }
    name = "none, as trainer.limit_test_batches is 0"
    if trainer.limit_test_batches:
        name = str(tested)
        matrix, counts = module.test_counts
        write_csv(run.per_image, table_rows(counts, data.dataset.names(data.test_split), labels.names))
        save_png(confusion_figure(matrix, labels), picture)
    write_json(run.summary, summary)
    if trainer.limit_test_batches:  # after all files: a terminal may fail
        print_table(
            metrics,
            labels,
            data.test_split,
            matrix,
        )
    print(f"run folder {run.path}   ({summary['minutes']:.1f} minutes; tested checkpoint: {name})", flush=True)


def _logged_metrics(run: RunFolder, epoch: int, step: int) -> dict[str, float]:
    """Training metrics of the checkpoint's epoch and validation metrics of its step, from metrics.csv."""
    metrics: dict[str, float] = {}
    validation: dict[str, float] = {}
    with run.metrics.open(newline="", encoding="utf-8") as file:
        for row in csv.DictReader(file):
            if row["epoch"] != str(epoch):
                continue
            numbers = {key: float(value) for key, value in row.items() if value}
            metrics |= {key: value for key, value in numbers.items() if key.startswith("train/")}
            # A validation between accumulated batches is logged under the step that is under way.
            if "val/miou" in numbers and numbers["step"] in (step - 1, step) and not validation:
                validation = {key: value for key, value in numbers.items() if key.startswith("val/")}
    return metrics | validation


def print_table(metrics: dict[str, float], labels: Labels, split: str, matrix: Tensor) -> None:
    """Print the table of IoU per class, of metrics logged under `test/`, which may be those of the validation split."""
    found = {key.removeprefix("test/"): value for key, value in metrics.items() if key.startswith("test/")}
    Console().print(
        iou_table(
            found,
            labels,
            split,
            matrix.sum(dim=1).tolist(),
        )
    )
