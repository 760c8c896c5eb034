"""prune.py: what each level of a UNet++ costs and reaches (Zhou et al. 2019, section 4.6); the checkpoint of one."""

import statistics
from argparse import Namespace
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch import Trainer
from rich.console import Console
from rich.table import Table
from torch import Tensor

from segmentation.callbacks import count_flops, in_millions, progress_bar
from segmentation.checkpoint import load_module
from segmentation.errors import InputError
from segmentation.inference.predictor import Predictor
from segmentation.inference.source import Trained, open_trained
from segmentation.job import JobParser, file_name, number, refuse_existing, start_job
from segmentation.machine import machine, peak_memory, seconds
from segmentation.module import SegmentationModule
from segmentation.pictures import INK, SOFT, save_png
from segmentation.plugins import AtomicCheckpointIO
from segmentation.writing import write_json, written_together

if TYPE_CHECKING:
    from matplotlib.figure import Figure

EXAMPLES = """examples:
  python src/prune.py runs/NAME/checkpoints/best.ckpt                     what each level costs and reaches
  python src/prune.py runs/NAME/checkpoints/best.ckpt --level 2           best_L2.ckpt, at once
  python src/prune.py runs/NAME/checkpoints/best.ckpt --max-ms 20         the best that takes 20 ms at most, here
  python src/prune.py runs/NAME/checkpoints/best.ckpt --max-drop 0.01     the fastest that loses 0.01 mIoU at most

Any option of data and trainer, as in train.py: --data.num_workers 0 --trainer.accelerator cpu"""

#: Of a checkpoint, what a pruned one keeps as it is; the rest belongs to the training of the whole net.
KEPT = (
    "epoch",
    "global_step",
    "pytorch-lightning_version",
    "hparams_name",
    "datamodule_hparams_name",
    "datamodule_hyper_parameters",
    "precision",
)


@dataclass
class Level:
    """What a level of the net reaches and costs: mIoU of the validation split, parameters, FLOPs of one image of
    `size`, median milliseconds and MiB at its peak for that image."""

    level: int
    miou: float
    parameters: int
    gflops: float
    ms: float
    mib: float


def prune(args: list[str] | None = None) -> list[Level]:
    """prune.py: a table and a plot of the levels; by option the checkpoint of one.

    Args:
        args: the command line, by default the process's own.

    Returns:
        The levels, those of the table; none with `--level`, which needs no measuring.
    """
    start_job()
    options, rest = _parser().parse_with_others(args)
    source = Path(options.checkpoint)
    base = options.output or source.with_suffix("")
    if options.level is not None:
        refuse_existing([_pruned_path(base, options.level)], options.overwrite)
        _write(options, base, options.level)
        return []
    plot, figures = base.with_name(f"{base.name}_levels.png"), base.with_name(f"{base.name}_levels.json")
    trained = open_trained("prune", options, rest, "val")
    _check_prunable(trained.module)
    refuse_existing([plot, figures], options.overwrite)
    predictor = Predictor(source, trained.trainer["accelerator"])
    levels, size = measure(trained, predictor, options.repeats)
    chosen = choose(levels, options.max_ms, options.max_drop)
    where = machine(predictor.device.type)
    _print_levels(levels, size, where)
    with written_together(plot, figures) as (plot_aside, figures_aside):
        save_png(levels_figure(levels, chosen, f"{size[1]}x{size[0]} pixels, {where}"), plot_aside)
        write_json(figures_aside, {"size": size, "machine": where, "levels": [asdict(level) for level in levels]})
    print(f"plot       {plot}\nfigures    {figures}")
    if chosen:
        refuse_existing([_pruned_path(base, chosen)], options.overwrite)
        _write(options, base, chosen)
    else:
        print("to prune   --level 2, or --max-ms, or --max-drop: see --help")
    return levels


def _parser() -> JobParser:
    parser = JobParser("prune", "Cut a UNet++ that was trained with deep supervision to one of its levels.", EXAMPLES)
    parser.add_checkpoint()
    choice = parser.add_mutually_exclusive_group()
    choice.add_argument(
        "--level", type=number(int, 1), metavar="L", help="write the checkpoint of this level; nothing is measured"
    )
    choice.add_argument(
        "--max-ms", type=number(float, 0), metavar="MS", help="of the best level of those that take MS at most"
    )
    choice.add_argument(
        "--max-drop", type=number(float, 0), metavar="MIOU", help="of the fastest that loses MIOU at most"
    )
    repeats = "rounds of timing; the table has medians (default: 15)"
    parser.add_argument("--repeats", metavar="N", type=number(int, 1), default=15, help=repeats)
    parser.add_argument(
        "--output", metavar="BASE", type=file_name, help="results are BASE_L2.ckpt, BASE_levels.png and .json"
    )
    return parser


def measure(trained: Trained, predictor: Predictor, repeats: int) -> tuple[list[Level], tuple[int, int]]:
    """mIoU of every level from one pass over the validation split, then time and memory of one image.

    Levels take turns, so that what else the machine does hits all alike.

    Returns:
        The levels, and (H, W) of the image.
    """
    _, module, data, config = trained
    trainer = Trainer(**config, callbacks=progress_bar(config))
    trainer.validate(module, datamodule=data, verbose=False)
    image = data.dataset.load("val", 0)["image"][None]
    device = predictor.device.type
    x = predictor.module.normalize(image.to(predictor.device))
    nets = [predictor.module.net.prune(level).eval() for level in range(1, module.net.num_heads + 1)]
    times: list[list[float]] = [[] for _ in nets]

    def run(net: torch.nn.Module) -> Tensor:
        with torch.inference_mode(), predictor.fabric.autocast():
            return net.predict(x)

    memory = [(seconds(lambda: run(net), device), peak_memory(lambda: run(net), device))[1] for net in nets]  # noqa: B023
    for _ in range(repeats):
        for net, taken in zip(nets, times, strict=True):
            taken.append(seconds(lambda: run(net), device))  # noqa: B023
    levels = [
        Level(
            number,
            float(trainer.callback_metrics[f"val/head{number}/miou"]),
            sum(parameter.numel() for parameter in net.parameters()),
            count_flops(net, tuple(image.shape)) / 1e9,
            statistics.median(taken) * 1e3,
            used * 1024,
        )
        for number, (net, taken, used) in enumerate(zip(nets, times, memory, strict=True), start=1)
    ]
    return levels, tuple(image.shape[-2:])


def choose(levels: list[Level], max_ms: float | None, max_drop: float | None) -> int | None:
    """The level that the options ask for; None where they ask for none.

    Raises:
        InputError: no level is as fast.
    """
    if max_ms is not None:
        fast = [level for level in levels if level.ms <= max_ms]
        if not fast:
            quickest = min(levels, key=lambda level: level.ms)
            raise InputError(f"--max-ms {max_ms:g}: the fastest level, L{quickest.level}, takes {quickest.ms:.1f} ms")
        return max(fast, key=lambda level: level.miou).level
    if max_drop is not None:
        best = max(level.miou for level in levels)
        return min((level for level in levels if level.miou >= best - max_drop), key=lambda level: level.ms).level
    return None


def pruned_checkpoint(checkpoint: dict[str, Any], module: SegmentationModule, level: int) -> dict[str, Any]:
    """An ordinary checkpoint of the net cut to a level.

    Raises:
        InputError: the net has no such level.
    """
    arguments = module.net.pruned_arguments(level)
    hparams = checkpoint["hyper_parameters"]
    net = {"class_path": hparams["net"]["class_path"], "init_args": {**arguments, "widths": [*arguments["widths"]]}}
    state = module.net.prune(level).state_dict()
    others = {key: value for key, value in checkpoint["state_dict"].items() if not key.startswith("net.")}
    return {
        **{key: checkpoint[key] for key in KEPT if key in checkpoint},
        "hyper_parameters": {**hparams, "net": net, "head_weights": None, "init_from": None},
        "state_dict": {f"net.{key}": value for key, value in state.items()} | others,
    }


def _write(options: Namespace, base: Path, level: int) -> None:
    """Write the checkpoint of a level, once it has been seen to give exactly that head's output."""
    predictor = Predictor(options.checkpoint, "cpu", "32-true")
    _check_prunable(predictor.module)
    small = pruned_checkpoint(predictor.checkpoint, predictor.module, level)
    path, net = _pruned_path(base, level), predictor.module.net
    image = torch.rand(1, net.in_channels, 2 * net.stride + 1, 2 * net.stride + 3)
    again = load_module(small, str(path)).net
    if predictor.module.channels_last:  # another layout would round otherwise
        again.to(memory_format=torch.channels_last)
    with torch.inference_mode():
        if not torch.equal(again(image).logits[-1], net(image, level=level).logits[-1]):
            raise RuntimeError(f"level {level} of the pruned net differs from that of its parent")
    AtomicCheckpointIO().save_checkpoint(small, path)
    before, after = (file.stat().st_size / 2**20 for file in (Path(options.checkpoint), path))
    print(f"level {level}    {path}: {after:.1f} MiB, of {before:.1f} (which also hold the optimizer)")


def _check_prunable(module: SegmentationModule) -> None:
    if not hasattr(module.net, "pruned_arguments"):
        module.net.prune(1)
    module.net.pruned_arguments(1)


def _pruned_path(base: Path, level: int) -> Path:
    return base.with_name(f"{base.name}_L{level}.ckpt")


def _print_levels(levels: list[Level], size: tuple[int, int], where: str) -> None:
    table = Table(title=f"levels, one image of {size[1]}x{size[0]}, {where}", title_justify="left")
    for heading in ("level", "val mIoU", "parameters", "GFLOPs", "ms", "times faster", "MiB"):
        table.add_column(heading, justify="right")
    for level in levels:
        faster = levels[-1].ms / level.ms
        table.add_row(
            f"L{level.level}",
            f"{level.miou:.4f}",
            in_millions(level.parameters),
            f"{level.gflops:.1f}",
            f"{level.ms:.1f}",
            f"{faster:.1f}",
            f"{level.mib:.0f}",
        )
    Console().print(table)


def levels_figure(levels: list[Level], chosen: int | None, where: str) -> "Figure":
    """mIoU against time, a point a level, its area that of the parameters; the chosen one is filled."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.4), dpi=144, facecolor="white", layout="constrained")
    axes = figure.subplots()
    axes.plot([level.ms for level in levels], [level.miou for level in levels], color="#B9CDE2", lw=1.5, zorder=1)
    most = max(level.parameters for level in levels)
    for level in levels:
        filled = chosen in (None, level.level)
        face = "#3B7DBD" if filled else "white"
        area = 40 + 360 * level.parameters / most
        axes.scatter(level.ms, level.miou, s=area, color=face, edgecolor="#3B7DBD", lw=1.5, zorder=2)
        text = f"L{level.level}\n{in_millions(level.parameters)}"
        axes.annotate(text, (level.ms, level.miou), (12, -12), textcoords="offset points", va="top", fontsize=9)
    axes.margins(x=0.15, y=0.3)
    axes.set_xlim(0, 1.18 * max(level.ms for level in levels))  # room for the last one's label
    axes.set_xlabel("milliseconds an image", color=SOFT)
    axes.set_ylabel("validation mIoU", color=SOFT)
    axes.grid(color="#ECEDEF", zorder=0)
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_title("What a level reaches and costs", loc="left", fontsize=12, weight="bold", color=INK, pad=22)
    axes.text(0, 1.03, where, transform=axes.transAxes, fontsize=8.5, color=SOFT)
    return figure
