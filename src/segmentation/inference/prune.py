"""prune.py: mIoU and speed of each level of a UNet++ (Zhou et al. 2019, section 4.6); the checkpoint of one."""

import statistics
import timeit
from argparse import Namespace
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from lightning.pytorch import Trainer
from rich.console import Console

from segmentation.checkpoint import load_module, read_checkpoint, results_of
from segmentation.errors import InputError
from segmentation.inference.source import Trained, open_trained
from segmentation.module import SegmentationModule
from segmentation.nets import UNetPlusPlus
from segmentation.training.callbacks import count_flops
from segmentation.training.entry import JobParser, file_name, refuse_existing, start_job
from segmentation.training.trainer import AtomicCheckpointIO
from segmentation.visualize import plot, save_png, style, table

if TYPE_CHECKING:
    from matplotlib.figure import Figure

#: Entries of a checkpoint that a pruned one keeps; the others belong to the training of the whole net.
KEPT = (
    "epoch",
    "global_step",
    "pytorch-lightning_version",
    "datamodule_hyper_parameters",
    "precision",
)

ROUNDS = 20  # predictions that a level is timed over


@dataclass
class Level:
    """What a level of the net reaches and costs."""

    level: int
    miou: float  # of the validation split
    parameters: int
    gflops: float  # for one image
    ms: float  # for one image, median


def prune(args: list[str] | None = None) -> list[Level]:
    """Measure the levels and write the checkpoint of the one that the options choose; `--level` measures nothing."""
    start_job()
    options, rest = _parser().parse_known_args(args)
    base = options.output or results_of(options.checkpoint)
    if options.level is not None:
        write_level(options, base, options.level)
        return []

    path = base.with_name(f"{base.name}_levels.png")
    refuse_existing([path], options.overwrite)
    trained = open_trained("prune", options, rest, "val")
    levels = measure(trained)
    chosen = choose(levels, options.max_ms, options.max_drop)
    shown = table("levels, for one image", "level", "val mIoU", "parameters", "GFLOPs", "ms")
    for level in levels:
        shown.add_row(
            f"L{level.level}",
            f"{level.miou:.4f}",
            f"{level.parameters:,}",
            f"{level.gflops:.1f}",
            f"{level.ms:.1f}",
        )
    Console().print(shown)
    save_png(levels_figure(levels), path)
    print(f"plot       {path}")
    if chosen:
        write_level(options, base, chosen.level)
    else:
        print("to prune   --level 2, or --max-ms, or --max-drop: see --help")
    return levels


def measure(trained: Trained) -> list[Level]:
    """Validate all levels in one pass, then time each on one image."""
    module, data, config = trained[:3]
    nets = [module.net.prune(level).eval() for level in range(1, module.net.num_heads + 1)]
    trainer = Trainer(**config)
    trainer.validate(module, datamodule=data, verbose=False)
    device = trainer.strategy.root_device
    sample = data.dataset.load("val", 0)
    image = module.normalize(sample["image"][None]).to(device)
    levels = []
    for number, net in enumerate(nets, start=1):
        net.to(device)
        with torch.inference_mode(), trainer.precision_plugin.forward_context():
            times = timeit.repeat(
                "net.predict(image)[0, 0, 0, 0].item()",  # reading a pixel waits for the device
                globals={"net": net, "image": image},
                number=1,
                repeat=ROUNDS,
            )
        level = Level(
            level=number,
            miou=float(trainer.callback_metrics[f"val/head{number}/miou"]),
            parameters=sum(parameter.numel() for parameter in net.parameters()),
            gflops=count_flops(net, tuple(image.shape)) / 1e9,
            ms=statistics.median(times) * 1e3,
        )
        levels.append(level)
    return levels


def choose(
    levels: list[Level],
    max_ms: float | None,
    max_drop: float | None,
) -> Level | None:
    """Choose a level.

    Args:
        levels: all levels, the smallest first.
        max_ms: choose the best of those that take so many milliseconds at most.
        max_drop: choose the smallest of those that lose so much mIoU at most.

    Raises:
        InputError: no level is as fast.
    """
    if max_ms is not None:
        fast = [level for level in levels if level.ms <= max_ms]
        if not fast:
            raise InputError(f"--max-ms {max_ms:g}: level 1 takes {levels[0].ms:.1f} ms")
        return max(fast, key=lambda level: level.miou)
    if max_drop is not None:
        best = max(level.miou for level in levels)
        return next(level for level in levels if level.miou >= best - max_drop)
    return None


def write_level(options: Namespace, base: Path, level: int) -> None:
    """Write an ordinary checkpoint of the net cut to a level. Raises InputError if the net has no such level."""
    path = base.with_name(f"{base.name}_L{level}.ckpt")
    refuse_existing([path], options.overwrite)
    checkpoint = read_checkpoint(options.checkpoint)
    net = load_module(SegmentationModule, checkpoint, options.checkpoint, with_loss=False).net
    state = net.prune(level).state_dict(prefix="net.")
    for key, value in checkpoint["state_dict"].items():
        if not key.startswith("net."):
            state[key] = value
    assert isinstance(net, UNetPlusPlus)  # `prune` refuses the others
    hparams = checkpoint["hyper_parameters"]
    pruned = {key: checkpoint[key] for key in KEPT if key in checkpoint}
    pruned["state_dict"] = state
    pruned["hyper_parameters"] = {
        **hparams,
        "net": {"class_path": hparams["net"]["class_path"], "init_args": net.pruned_arguments(level)},
        "head_weights": None,
        "init_from": None,
    }
    AtomicCheckpointIO().save_checkpoint(pruned, path)
    print(f"level {level}    {path}: {path.stat().st_size / 2**20:.1f} MiB")


@style()
def levels_figure(levels: list[Level]) -> "Figure":
    """mIoU against time, a point for each level."""
    figure, axes = plot(7, 4.4)
    times = [level.ms for level in levels]
    mious = [level.miou for level in levels]
    axes.plot(times, mious, "o-")
    for level in levels:
        axes.annotate(
            f"L{level.level}\n{level.parameters / 1e6:.2f} M",
            xy=(level.ms, level.miou),
            xytext=(10, -10),
            textcoords="offset points",
            va="top",
        )
    axes.margins(0.2)
    axes.set_xlim(left=0)
    axes.set_title("Levels of the net and their parameters")
    axes.set_xlabel("milliseconds per image")
    axes.set_ylabel("validation mIoU")
    return figure


def _parser() -> JobParser:
    parser = JobParser("prune")
    parser.add_checkpoint()
    group = parser.add_mutually_exclusive_group()
    group.add_argument(
        "--level",
        type=int,
        metavar="L",
        help="write the checkpoint of this level, measure nothing",
    )
    group.add_argument(
        "--max-ms",
        type=float,
        metavar="MS",
        help="write the best level that takes MS at most",
    )
    group.add_argument(
        "--max-drop",
        type=float,
        metavar="MIOU",
        help="write the smallest level that loses MIOU at most",
    )
    parser.add_argument(
        "--output",
        metavar="BASE",
        type=file_name,
        help="results are BASE_L2.ckpt and BASE_levels.png",
    )
    return parser
