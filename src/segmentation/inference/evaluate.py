"""eval.py: test a checkpoint again, from the file alone."""

import argparse
import math
from pathlib import Path
from typing import Any

from lightning.pytorch.utilities import rank_zero_only
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from PIL import Image
from rich.console import Console

from segmentation.data.writing import atomic_write_all, write_csv, write_json
from segmentation.errors import InputError
from segmentation.inference.instances import InstanceScores
from segmentation.inference.predictor import add_options
from segmentation.inference.source import open_trained
from segmentation.inference.tiled import TiledInference
from segmentation.metrics import table_rows
from segmentation.module import SegmentationModule
from segmentation.training.callbacks import prediction_grid
from segmentation.training.entry import JobParser, file_name, refuse_existing, start_job
from segmentation.training.report import print_table
from segmentation.training.trainer import make_trainer, refused
from segmentation.visualize import save_png, table


def evaluate(args: list[str] | None = None) -> dict[str, float]:
    """Test a checkpoint on its own data or on an overlay's: the figures, under their logged keys without the split."""
    start_job()
    options, rest = _arguments(args)
    figures = options.output or Path("unwritten.json")
    per_image, sheet = (figures.with_name(f"{figures.stem}_{end}") for end in ("per_image.csv", "worst_and_best.png"))
    if options.output:
        rank_zero_only(refuse_existing)([figures, per_image, sheet], options.overwrite)
    module, data, config = open_trained("eval", options, rest, options.split)
    if options.tile is not None or options.tta != "none":  # the loss is then that of the mean probabilities
        module.net, module.head_weights = TiledInference(module.net, options.tile, options.tta), [1.0]
    scores = InstanceScores(module.labels, options.instances) if options.instances else None
    trainer = make_trainer(**config, callbacks=scores)
    if not trainer.limit_test_batches:
        raise InputError("trainer.limit_test_batches 0 leaves nothing to evaluate: leave it out")
    try:
        trainer.test(module, datamodule=data, verbose=False)
    except MisconfigurationException as error:  # a share of less than a batch, say
        raise refused(error) from error
    found = {key: float(value) for key, value in trainer.callback_metrics.items()}
    metrics = {key.removeprefix("test/"): value for key, value in found.items()}
    if scores:
        metrics |= scores.metrics.compute()  # on every process: their counts are added
    if trainer.is_global_zero:
        matrix, counts = module.test_counts
        print_table(found, module.labels, data.test_split, matrix)
        if scores:
            print_instances(metrics, options.instances)
        if options.output:
            names = data.dataset.names(data.test_split)
            with atomic_write_all(per_image, sheet, figures) as aside:
                write_csv(aside[0], table_rows(counts, names, module.labels.names))
                save_png(extremes(trainer, module, data.test_split), aside[1])
                write_json(aside[2], {"split": data.test_split, "metrics": metrics})
            print(f"figures    {figures}; counts of each image: {per_image}\npictures   {sheet}")
    return metrics


def extremes(trainer: Any, module: SegmentationModule, split: str, each: int = 4) -> Image.Image:
    """A contact sheet of the images with the lowest and the highest mIoU, the worst first."""
    tp, fp, fn = module.test_counts[1].double().unbind(dim=1)
    score = (tp / (tp + fp + fn)).nanmean(dim=1)
    order = [i for i in score.argsort().tolist() if not math.isnan(score[i])]
    chosen = order if len(order) <= 2 * each else order[:each] + order[-each:]
    which = f"All {len(chosen)}" if chosen == order else f"The {each} worst and the {each} best of {len(score):,}"
    return prediction_grid(trainer, module, split, chosen, f"{which} {split} images, the worst first")[0]


def print_instances(metrics: dict[str, float], by: str) -> None:
    """The figures of individuals, on the terminal."""
    shown = table(f"individuals, by {by}", "instances", "AP 0.5", "AP 0.75", "AP", "PQ", "SQ", "RQ")
    of_class = [f"/{key.split('/')[2]}" for key in metrics if key.startswith("instances/pq/")]
    for kind in (*of_class, ""):
        values = (metrics.get(f"instances/{key}{kind}") for key in ("ap50", "ap75", "ap", "pq", "sq", "rq"))
        shown.add_row(kind[1:] or "all", *("" if value is None else f"{value:.4f}" for value in values))
    Console().print(shown)
    print(f"found      {metrics['instances/found']:,} individuals; there are {metrics['instances/true']:,}")


def _arguments(args: list[str] | None) -> tuple[argparse.Namespace, list[str]]:
    parser = JobParser("eval")
    parser.add_checkpoint()
    parser.add_argument("--split", choices=("train", "val", "test"), help="default: what training tested")
    add_options(parser)
    choices = ("watershed", "components")
    text = "also average precision and panoptic quality of individuals; components: connected pixels are one"
    parser.add_argument("--instances", nargs="?", const="watershed", choices=choices, help=text)
    text = "write the figures there, FILE_per_image.csv and FILE_worst_and_best.png beside it"
    parser.add_argument("--output", metavar="FILE.json", type=file_name, help=text)
    return parser.parse_known_args(args)
