"""prune.py: what each level of a UNet++ costs and reaches (Zhou et al. 2019, section 4.6); the checkpoint of one."""

import statistics
from argparse import Namespace
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch import Trainer
from rich.console import Console
from torch import Tensor

from segmentation.checkpoint import load_module, read_checkpoint
from segmentation.errors import InputError
from segmentation.inference.predictor import Predictor
from segmentation.inference.source import Trained, open_trained
from segmentation.module import SegmentationModule
from segmentation.nets import SegmentationNet, UNetPlusPlus
from segmentation.training.callbacks import count_flops, in_millions
from segmentation.training.job import JobParser, file_name, refuse_existing, start_job
from segmentation.training.machine import machine, peak_memory, seconds
from segmentation.training.plugins import AtomicCheckpointIO
from segmentation.visualize import INK, SOFT, plot, save_png, table

if TYPE_CHECKING:
    from matplotlib.figure import Figure

ROUNDS = 15  # of timing, whose medians count
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
    """A table and a plot of the levels, which are returned (none with `--level`, which needs no measuring); by option
    the checkpoint of one."""
    start_job()
    options, rest = _parser().parse_known_args(args)
    base = options.output or Path(options.checkpoint).with_suffix("")
    if options.level is not None:
        _write(options, base, options.level)
        return []
    plot = base.with_name(f"{base.name}_levels.png")
    trained = open_trained("prune", options, rest, "val")
    trained.module.net.prune(1)  # an error, where it cannot be
    refuse_existing([plot], options.overwrite)
    predictor = Predictor(options.checkpoint, trained.trainer.get("accelerator", "auto"))
    levels, size = measure(trained, predictor)
    chosen = choose(levels, options.max_ms, options.max_drop)
    where = f"one image of {size[1]}x{size[0]}, {machine(predictor.device.type)}"
    shown = table(f"levels, {where}", "level", "val mIoU", "parameters", "GFLOPs", "ms", "times faster", "MiB")
    for one in levels:
        costs = f"{one.gflops:.1f}", f"{one.ms:.1f}", f"{levels[-1].ms / one.ms:.1f}", f"{one.mib:.0f}"
        shown.add_row(f"L{one.level}", f"{one.miou:.4f}", in_millions(one.parameters), *costs)
    Console().print(shown)
    save_png(levels_figure(levels, chosen, where), plot)
    print(f"plot       {plot}")
    if chosen:
        _write(options, base, chosen)
    else:
        print("to prune   --level 2, or --max-ms, or --max-drop: see --help")
    return levels


def _parser() -> JobParser:
    parser = JobParser("prune")
    parser.add_checkpoint()
    add = parser.add_mutually_exclusive_group().add_argument
    add("--level", type=int, metavar="L", help="write the checkpoint of this level; nothing is measured")
    add("--max-ms", type=float, metavar="MS", help="of the best level of those that take MS at most")
    add("--max-drop", type=float, metavar="MIOU", help="of the fastest that loses MIOU at most")
    text = "results are BASE_L2.ckpt and BASE_levels.png"
    parser.add_argument("--output", metavar="BASE", type=file_name, help=text)
    return parser


def measure(trained: Trained, predictor: Predictor) -> tuple[list[Level], tuple[int, int]]:
    """mIoU of every level from one pass over the validation split, then time and memory of one image, whose (H, W) is
    returned too. Levels take turns, so that what else the machine does hits all alike."""
    module, data, config = trained
    trainer = Trainer(**config)
    trainer.validate(module, datamodule=data, verbose=False)
    image = data.dataset.load("val", 0)["image"][None]
    device = predictor.device.type
    x = predictor.module.normalize(image.to(predictor.device))
    nets = [predictor.module.net.prune(level).eval() for level in range(1, module.net.num_heads + 1)]

    def run(net: SegmentationNet) -> Tensor:
        with torch.inference_mode(), predictor.fabric.autocast():
            return net.predict(x)

    jobs = [partial(run, net) for net in nets]
    memory = []
    for job in jobs:
        job()  # once to warm up
        memory.append(peak_memory(job, device))
    times = [[seconds(job, device) for job in jobs] for _ in range(ROUNDS)]
    levels = [
        Level(
            level=number,
            miou=float(trainer.callback_metrics[f"val/head{number}/miou"]),
            parameters=sum(parameter.numel() for parameter in net.parameters()),
            gflops=count_flops(net, tuple(image.shape)) / 1e9,
            ms=statistics.median(taken) * 1e3,
            mib=used * 1024,
        )
        for number, (net, taken, used) in enumerate(zip(nets, zip(*times, strict=True), memory, strict=True), start=1)
    ]
    return levels, (image.shape[-2], image.shape[-1])


def choose(levels: list[Level], max_ms: float | None, max_drop: float | None) -> int | None:
    """The level that the options ask for; None where they ask for none. Raises InputError if no level is as fast."""
    if max_ms is not None:
        fast = [level for level in levels if level.ms <= max_ms]
        if not fast:
            quickest = min(levels, key=lambda level: level.ms)
            raise InputError(f"--max-ms {max_ms:g}: the fastest level, L{quickest.level}, takes {quickest.ms:.1f} ms")
        return max(fast, key=lambda level: level.miou).level
    if max_drop is not None:
        best = max(level.miou for level in levels)
        return min(
            (level for level in levels if level.miou >= best - max(max_drop, 0)), key=lambda level: level.ms
        ).level
    return None


def pruned_checkpoint(checkpoint: dict[str, Any], module: SegmentationModule, level: int) -> dict[str, Any]:
    """An ordinary checkpoint of the net cut to a level. Raises InputError if it has no such level."""
    net, hparams = module.net, checkpoint["hyper_parameters"]
    state = {f"net.{key}": value for key, value in net.prune(level).state_dict().items()}
    assert isinstance(net, UNetPlusPlus)  # no other can be pruned
    arguments = net.pruned_arguments(level)
    section = {"class_path": hparams["net"]["class_path"], "init_args": {**arguments, "widths": [*arguments["widths"]]}}
    return {
        **{key: checkpoint[key] for key in KEPT if key in checkpoint},
        "hyper_parameters": {**hparams, "net": section, "head_weights": None, "init_from": None},
        "state_dict": state | {k: v for k, v in checkpoint["state_dict"].items() if not k.startswith("net.")},
    }


def _write(options: Namespace, base: Path, level: int) -> None:
    """Write the checkpoint of a level."""
    path = base.with_name(f"{base.name}_L{level}.ckpt")
    refuse_existing([path], options.overwrite)
    checkpoint = read_checkpoint(options.checkpoint)
    module = load_module(SegmentationModule, checkpoint, options.checkpoint, with_loss=False)
    small = pruned_checkpoint(checkpoint, module, level)
    AtomicCheckpointIO().save_checkpoint(small, path)
    before, after = (file.stat().st_size / 2**20 for file in (Path(options.checkpoint), path))
    print(f"level {level}    {path}: {after:.1f} MiB, of {before:.1f} (which also hold the optimizer)")


def levels_figure(levels: list[Level], chosen: int | None, where: str) -> "Figure":
    """mIoU against time, a point a level, its area that of the parameters; the chosen one is filled."""
    figure, axes = plot(7, 4.4)
    times, ious = [level.ms for level in levels], [level.miou for level in levels]
    most = max(level.parameters for level in levels)
    areas = [40 + 360 * level.parameters / most for level in levels]
    faces = ["#3B7DBD" if chosen in (None, level.level) else "white" for level in levels]
    axes.plot(times, ious, color="#B9CDE2", lw=1.5, zorder=1)
    axes.scatter(times, ious, areas, faces, edgecolor="#3B7DBD", lw=1.5, zorder=2)
    for level in levels:
        text = f"L{level.level}\n{in_millions(level.parameters)}"
        axes.annotate(text, (level.ms, level.miou), (12, -12), textcoords="offset points", va="top", fontsize=9)
    axes.margins(y=0.3)
    axes.set_xlim(0, 1.18 * max(times))  # room for the last one's label
    axes.set_xlabel("milliseconds an image", color=SOFT)
    axes.set_ylabel("validation mIoU", color=SOFT)
    axes.set_title(f"What a level reaches and costs\n{where}", loc="left", fontsize=10, color=INK)
    return figure
