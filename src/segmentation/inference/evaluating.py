"""Test a checkpoint again, from the file alone."""

import argparse
import math
from pathlib import Path

from lightning.pytorch import Trainer
from lightning.pytorch.utilities import rank_zero_only
from PIL import Image
from rich.console import Console
from rich.table import Column, Table

from segmentation.callbacks import predict_one, progress_bar
from segmentation.data import SegmentationDataModule
from segmentation.inference.averaged import Averaged, Symmetries
from segmentation.inference.instances import InstanceScores
from segmentation.inference.predictor import add_options
from segmentation.inference.source import open_trained
from segmentation.job import JobParser, file_name, refuse_existing, start_job
from segmentation.metrics import table_rows
from segmentation.module import SegmentationModule
from segmentation.pictures import contact_sheet, save_png
from segmentation.report import print_table
from segmentation.writing import write_csv, write_json, written_together


def evaluate(args: list[str] | None = None) -> dict[str, float]:
    """eval.py: load a checkpoint, test it on its own data or on an overlay's, print the table of IoU per class.

    Args:
        args: the command line, by default the process's own.

    Returns:
        The figures, under their logged keys without the split.
    """
    start_job()
    options, rest = _arguments(args)
    figures = options.output or Path("unwritten.json")
    per_image, sheet = (figures.with_name(f"{figures.stem}_{end}") for end in ("per_image.csv", "worst_and_best.png"))
    if options.output and rank_zero_only.rank == 0:
        refuse_existing([figures, per_image, sheet], options.overwrite)
    _, module, data, config = open_trained("eval", options, rest, options.split)
    if options.tile or options.tta != "none":
        average(module, options.tile, options.tta)
    scores = InstanceScores(module.labels, options.instances) if options.instances else None
    callbacks = [*progress_bar(config), *([scores] if scores else [])]
    trainer = Trainer(**config, callbacks=callbacks)
    trainer.test(module, datamodule=data, verbose=False)
    found = {key: float(value) for key, value in trainer.callback_metrics.items()}
    metrics = {key.removeprefix("test/"): value for key, value in found.items()}
    if scores:
        metrics |= scores.metrics.compute()  # on every process: their counts are added
    if trainer.is_global_zero:
        print_table(found, module.labels, data.test_split, module.test_counts[0])
        if scores:
            print_instances(metrics, options.instances)
        if options.output:
            names = data.dataset.names(data.test_split)
            with written_together(per_image, sheet, figures) as aside:
                write_csv(aside[0], table_rows(module.test_counts[1], names, module.labels.names))
                save_png(extremes(trainer, module, data), aside[1])
                write_json(aside[2], {"split": data.test_split, "metrics": metrics})
            print(f"figures    {figures}; counts of each image: {per_image}")
            print(f"pictures   {sheet}")
    return metrics


def average(module: SegmentationModule, tile: int | None, tta: Symmetries) -> None:
    """Let a module predict by tiles and symmetries. Its loss is then that of the mean probabilities."""
    module.net, module.head_weights = Averaged(module.net, tile, tta), [1.0]


def extremes(trainer: Trainer, module: SegmentationModule, data: SegmentationDataModule, each: int = 4) -> Image.Image:
    """A contact sheet of the images with the lowest and the highest mIoU, the worst first."""
    tp, fp, fn = module.test_counts[1].double().unbind(dim=1)
    score = (tp / (tp + fp + fn)).nanmean(dim=1)
    order = [i for i in score.argsort().tolist() if not math.isnan(score[i])]
    chosen = order if len(order) <= 2 * each else order[:each] + order[-each:]
    names = data.dataset.names(data.test_split)
    samples = [data.dataset.load(data.test_split, i) for i in chosen]
    predictions = [predict_one(trainer, module, sample["image"]) for sample in samples]
    images, masks = ([sample[key] for sample in samples] for key in ("image", "mask"))
    which = f"All {len(chosen)}" if chosen == order else f"The {each} worst and the {each} best of {len(names):,}"
    title = f"{which} {data.test_split} images, the worst first"
    scores = [float(score[i]) for i in chosen]
    return contact_sheet(images, masks, predictions, module.labels, [names[i] for i in chosen], title, scores)


def print_instances(metrics: dict[str, float], by: str) -> None:
    """The figures of individuals, on the terminal."""
    table = Table(Column("instances", no_wrap=True), title=f"individuals, by {by}", title_justify="left")
    kinds = [key.split("/")[2] for key in metrics if key.startswith("instances/pq/")]
    for heading in ("AP 0.5", "AP 0.75", "AP", "PQ", "SQ", "RQ"):
        table.add_column(heading, justify="right")
    keys = ("ap50", "ap75", "ap", "pq", "sq", "rq")
    for kind in kinds:
        values = (metrics.get(f"instances/{key}/{kind}") for key in keys)
        table.add_row(kind, *("" if value is None else f"{value:.4f}" for value in values))
    table.add_row("all", *(f"{metrics[f'instances/{key}']:.4f}" for key in keys))
    Console().print(table)
    print(f"found      {metrics['instances/found']:,} individuals; there are {metrics['instances/true']:,}")


def _arguments(args: list[str] | None) -> tuple[argparse.Namespace, list[str]]:
    parser = JobParser(
        "eval",
        "Test a checkpoint: training's own test figures again, to the last digit.",
        "Any option of data and trainer, as in train.py: --data.eval_batch_size 1 --trainer.devices 2",
    )
    parser.add_checkpoint()
    parser.add_argument("--split", choices=("train", "val", "test"), help="default: what training tested")
    add_options(parser)
    parser.add_argument(
        "--instances",
        nargs="?",
        const="watershed",
        choices=("watershed", "components"),
        help="also average precision and panoptic quality of individuals; components: connected pixels are one",
    )
    parser.add_argument(
        "--output",
        metavar="FILE.json",
        type=file_name,
        help="write the figures there, FILE_per_image.csv and FILE_worst_and_best.png beside it",
    )
    return parser.parse_with_others(args)
