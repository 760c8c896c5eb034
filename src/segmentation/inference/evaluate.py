"""eval.py: test a checkpoint again, from the file alone."""

from argparse import Namespace
from pathlib import Path

from lightning.pytorch.utilities import rank_zero_only, rank_zero_warn
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from rich.console import Console

from segmentation.data.writing import atomic_write_all, write_csv, write_json
from segmentation.errors import InputError, readable
from segmentation.inference.calibrate import calibrate
from segmentation.inference.instances import InstanceScores
from segmentation.inference.predictor import adapt, add_options
from segmentation.inference.source import open_trained
from segmentation.metrics import table_rows
from segmentation.module import SegmentationModule
from segmentation.training.entry import JobParser, file_name, refuse_existing, start_job
from segmentation.training.page import write_page
from segmentation.training.report import predict_samples, provenance, worst_and_best
from segmentation.training.trainer import make_trainer, refused
from segmentation.visualize import iou_table, sample_grid, save_png, table

#: What may be the reason for other figures.
CAUSES = ("split", "data", "precision", "commit", "hardware")


def evaluate(args: list[str] | None = None) -> dict[str, float]:
    """Test a checkpoint on its own data or an overlay's; return the metrics by their logged keys without the split."""
    start_job()
    options, rest = parse(args)
    files = output_files(options.output)
    copies = [options.calibrate] if options.calibrate else []
    rank_zero_only(refuse_existing)(files + copies, options.overwrite)
    module, data, config, card = open_trained("eval", options, rest, options.split)
    adapt(module, [options.checkpoint, *options.ensemble], options.tile, options.tta, options.from_disk)
    if options.ensemble and data.test_split != "test" and data.hparams["folds"]:
        rank_zero_warn(
            f"the nets of other folds were trained on these {data.test_split} images: the figures are too good. For an "
            "honest test: --data OVERLAY of other images"
        )
    if options.surface_distances:
        module.surface_distances = True
    scores = None
    if options.instances:
        if "instance" not in data.dataset.load(data.test_split, 0):
            raise InputError("--instances needs a truth: give the data set its `instances` (ids, 0 for none)")
        scores = InstanceScores(module.labels, options.instances)
    trainer = make_trainer(**config, callbacks=scores)
    if not trainer.limit_test_batches:
        raise InputError("trainer.limit_test_batches 0 leaves nothing to evaluate: leave it out")
    if options.calibrate and trainer.world_size > 1:
        raise InputError("--calibrate takes one process: --trainer.devices 1")
    more: dict[str, float] = {}  # metrics that are not logged
    if options.calibrate:
        calibration, more = calibrate(options, config, data)
        module.set_calibration(calibration)
    try:
        trainer.test(module, datamodule=data, verbose=False)
    except MisconfigurationException as error:  # a share of less than a batch, say
        raise refused(error) from error
    logged = {key: float(value) for key, value in trainer.callback_metrics.items()}
    metrics = {key.removeprefix("test/"): value for key, value in logged.items()}
    if scores:
        more |= scores.metrics.compute()  # on every process: their counts are added
    metrics |= more
    if trainer.is_global_zero:
        print_tables(logged, more, module, data.test_split)
        if files or card:
            evaluation = {
                "split": data.test_split,
                "metrics": metrics,
                "data": data.statistics(data.test_split).digest(data.dataset.names(data.test_split)),
                "precision": trainer.precision,
                **provenance(trainer.strategy.root_device.type),
            }
            if files:
                write_results(files, trainer, module, evaluation, options.checkpoint)
            if card:
                print(compare_with_card(evaluation, card, options.checkpoint))
    return metrics


def output_files(output: Path | None) -> list[Path]:
    """What --output names: counts of each image, the worst and best of them, report.html, the metrics."""
    if output is None:
        return []
    beside = output.with_suffix("")
    files = [Path(f"{beside}_{end}") for end in ("per_image.csv", "worst_and_best.png", "report.html")]
    return [*files, output]


def print_tables(
    logged: dict[str, float],
    more: dict[str, float],
    module: SegmentationModule,
    split: str,
) -> None:
    """Print the IoU of each class, and the metrics that are not logged."""
    Console().print(iou_table(logged, module.labels, split, module.test_counts[0]))
    if more:
        shown = table("instances, calibration", "metric", "value")
        for key, value in more.items():
            shown.add_row(key, str(round(value, 4)))
        Console().print(shown)


def write_results(
    files: list[Path],
    trainer,
    module: SegmentationModule,
    evaluation: dict,
    checkpoint: str,
) -> None:
    """Write all files of --output, or none.

    Args:
        files: as `output_files` gives them.
        trainer: after the test.
        module: the one that was tested.
        evaluation: the metrics, and what they depend on.
        checkpoint: as the user named it.
    """
    data = trainer.datamodule
    split = data.test_split
    labels = module.labels
    matrix, counts = module.test_counts
    samples = predict_samples(trainer, module, split, worst_and_best(counts))
    with atomic_write_all(*files) as (per_image, grid, page, output):
        write_csv(per_image, table_rows(counts, data.dataset.names(split), labels.names))
        save_png(sample_grid(samples, labels, f"{split} images, the worst first, the best last"), grid)
        write_page(
            page,
            title=files[-1].stem,
            lines=[f"{checkpoint} on {data.description}: {split} images"],
            metrics={f"test/{key}": value for key, value in evaluation["metrics"].items()},
            matrix=matrix,
            counts=counts,
            labels=labels,
            samples=samples,
            facts=evaluation,
        )
        write_json(output, evaluation)
    print(f"metrics    {files[3]}; counts of each image: {files[0]}\nimages     {files[1]}\npage       {files[2]}")


def compare_with_card(found: dict, card: dict, checkpoint: str) -> str:
    """Whether figures are those of a model card, to the last digit; if not, what else differs. In one line.

    Args:
        found: the evaluation's.
        card: the one that the card was made of.
        checkpoint: as the user named it.

    Raises:
        InputError: the card is damaged.
    """
    here = found["metrics"]
    try:
        said = card["metrics"]
        others = [key for key in said if said[key] not in (None, here.get(key))]  # None: NaN
        if not others:
            return "card       every figure is the card's, to the last digit"
        figures = [f"{key} (card: {said[key]}, here: {here.get(key)})" for key in others[:4]]
        causes = [f"{key} (card: {card[key]}, here: {found[key]})" for key in CAUSES if found[key] != card[key]]
    except (AttributeError, LookupError, TypeError) as error:
        raise InputError(f"{checkpoint}: the figures of its card are damaged") from error
    differing = readable(f"{', '.join(figures)}. What else differs: {', '.join(causes) or 'an option'}")
    return f"card       {len(others)} of {len(said)} figures are others: {differing[:2000]}"


def parse(args: list[str] | None) -> tuple[Namespace, list[str]]:
    parser = JobParser("eval")
    parser.add_checkpoint()
    parser.add_argument(
        "--split",
        choices=("train", "val", "test"),
        help="default: what training tested",
    )
    add_options(parser)
    parser.add_argument(
        "--instances",
        nargs="?",
        const="watershed",
        choices=("watershed", "components"),
        help="also average precision and panoptic quality of instances; components: connected pixels are one",
    )
    parser.add_argument(
        "--surface-distances",
        action="store_true",
        help="also HD95 and the average symmetric surface distance of each class, in pixels",
    )
    parser.add_argument(
        "--calibrate",
        metavar="COPY.ckpt",
        type=file_name,
        help="write a copy whose probabilities are calibrated on the val split, and test it",
    )
    parser.add_argument(
        "--max-missed",
        type=float,
        metavar="SHARE",
        help="with --calibrate, for two classes: set the threshold so that images miss less of their foreground",
    )
    parser.add_argument(
        "--confidence",
        type=float,
        default=0.9,
        metavar="SHARE",
        help="of --max-missed; default: 0.9",
    )
    parser.add_argument(
        "--output",
        metavar="FILE.json",
        type=file_name,
        help="write the metrics there; FILE_per_image.csv, FILE_worst_and_best.png and FILE_report.html beside it",
    )
    options, rest = parser.parse_known_args(args)
    if options.max_missed is not None and not options.calibrate:
        parser.error("--max-missed belongs to --calibrate")
    if options.calibrate and options.calibrate == options.output:
        parser.error("--calibrate and --output are one file")
    if options.calibrate and options.ensemble:
        parser.error("--calibrate takes one checkpoint, no --ensemble")
    for share in (options.confidence, options.max_missed):
        if share is not None and not 0 < share < 1:
            parser.error("--max-missed and --confidence are shares, between 0 and 1")
    return options, rest
