"""How much of the training step's speed a whole epoch keeps: `python benchmarks/training.py`, CamVid with SEG_DATA set.

    python benchmarks/training.py --net UNetPlusPlus --batch-size 16 --workers 16     # a GPU with 16 cores to feed it
    python benchmarks/training.py --epochs 1 --trainer.limit_train_batches 10         # does it work? a minute on a CPU

An epoch is train.py's own: loader, trainer, loggers, callbacks, last.ckpt at its end; without validation. It counts
from its start to the next one's, the first is left out. The step alone is forward, loss, backward, clipping and
optimizer on one batch that already lies on the device, before the epochs and after them. Where the time of the epochs
went is from Lightning's profiler: `step` is what the step alone does, `counting` the confusion matrices. On CUDA these
are the host's times; the device's work shows up where the host waits for it: in the finite check, and in the step every
log_every_n_steps, for the losses that are logged.
"""

import argparse
import json
import os
import re
import shutil
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.profilers import SimpleProfiler

sys.path.insert(0, str(Path(__file__).parents[1] / "src"))
from segmentation.errors import InputError
from segmentation.module import SegmentationModule
from segmentation.training.cli import SegmentationCLI
from segmentation.training.run_folder import release_lock
from timing import machine, seconds

CAMVID = Path(__file__).parents[1] / "configs/data/camvid.yaml"
#: Parts of an epoch, each by the profiler's actions; an action belongs to the first part that it fits.
PARTS = {
    "data wait": r"train_dataloader_next",
    "transfer": r"batch_to_device",
    "step": r"run_training_batch",
    "counting": r"counting",
    "finite check": r"StopAtNonFinite.on_before_optimizer_step",
    "logging": r"(SegmentationModule.on_train_batch_end|LearningRateMonitor.on_train_batch_start)",
    "callbacks": r"on_train_batch_(start|end)",
    "last.ckpt": r"save_checkpoint",
}
WITHIN_STEP = ("counting", "finite check")


class Stopwatch(Callback):
    """Times epochs, and the step alone before and after them.

    Args:
        steps: how often the step alone is timed, on either side; on CUDA each time is that of ten in a row.
    """

    def __init__(self, steps: int) -> None:
        self.steps, self.epochs, self.alone = steps, [], []
        self.started = 0.0
        self.durations: dict[str, float] = {}

    def on_train_start(self, trainer: Trainer, pl_module: SegmentationModule) -> None:
        pl_module.update_metrics = profiled(trainer, "counting", pl_module.update_metrics)

    def on_train_batch_start(self, trainer: Trainer, pl_module: SegmentationModule, batch: Any, i: int) -> None:
        if trainer.global_step == 0:
            self.batch = batch
            self.time_step(trainer, pl_module)

    def on_train_epoch_start(self, trainer: Trainer, pl_module: SegmentationModule) -> None:
        self.lap(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: SegmentationModule) -> None:
        self.lap(trainer)
        self.durations = {action: sum(times) for action, times in trainer.profiler.recorded_durations.items()}
        self.time_step(trainer, pl_module)

    def lap(self, trainer: Trainer) -> None:
        now = self.now(trainer)
        if trainer.current_epoch >= 2:
            self.epochs.append(now - self.started)
        else:
            trainer.profiler.recorded_durations.clear()
        self.started = now

    @staticmethod
    def now(trainer: Trainer) -> float:
        if trainer.strategy.root_device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    def time_step(self, trainer: Trainer, module: SegmentationModule) -> None:
        optimizer, device = trainer.optimizers[0], trainer.strategy.root_device.type
        optimizer = getattr(optimizer, "optimizer", optimizer)
        clip = trainer.gradient_clip_val if trainer.gradient_clip_algorithm != "value" else None
        many = 10 if device == "cuda" else 1

        def step() -> None:
            with trainer.precision_plugin.forward_context():
                loss, _ = module.compute_loss(module.net(module.normalize(self.batch["image"])), self.batch)
            optimizer.zero_grad()
            loss.backward()
            if clip:
                torch.nn.utils.clip_grad_norm_(module.parameters(), clip)
            optimizer.step()

        times = [seconds(lambda: [step() for _ in range(many)], device) / many for _ in range(self.steps + 2)]
        self.alone += times[2:]  # the first two warm up
        optimizer.zero_grad()


def profiled(trainer: Trainer, name: str, job: Callable) -> Callable:
    def run(*args: Any, **kwargs: Any) -> Any:
        with trainer.profiler.profile(name):
            return job(*args, **kwargs)

    return run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=3, help="beside the first, which warms up (%(default)s)")
    parser.add_argument("--steps", type=int, default=10, help="of the step alone, on either side (%(default)s)")
    parser.add_argument("--batch-size", help="data.batch_size")
    parser.add_argument("--workers", help="data.num_workers")
    parser.add_argument("--net", help="model.net")
    parser.add_argument("--output", type=Path, metavar="FILE.json", help="write the figures there too")
    args, options = parser.parse_known_args()
    given = {"data.batch_size": args.batch_size, "data.num_workers": args.workers, "model.net": args.net}
    words = [word for key, value in given.items() if value for word in (f"--{key}", value)]
    if "--config" not in options:
        if os.environ.get("SEG_DATA"):
            words = ["--config", str(CAMVID), *words]
        else:
            print("SEG_DATA is not set, so these are generated shapes: the figures are not those of CamVid")
    own = ["--name", f"benchmark-{time.time_ns()}", "--trainer.max_epochs", str(args.epochs + 1)]
    own += ["--trainer.limit_val_batches", "0", "--wandb.mode", "disabled", "--trainer.enable_progress_bar", "true"]
    cli = SegmentationCLI([*words, *options, *own])  # an overlay has a length of its own
    stopwatch = Stopwatch(args.steps)
    cli.trainer.callbacks.append(stopwatch)
    cli.trainer.profiler = SimpleProfiler()
    try:
        cli.trainer.fit(cli.model, cli.datamodule)
    finally:
        release_lock(cli.run_folder)
        shutil.rmtree(cli.run_folder.path, ignore_errors=True)
    found = print_tables(cli.trainer, stopwatch, cli.datamodule.batch_size)
    if args.output:
        args.output.write_text(json.dumps(found, indent=1))


def print_tables(trainer: Trainer, stopwatch: Stopwatch, batch_size: int) -> dict[str, Any]:
    """Print them, and return their figures."""
    steps, epochs = trainer.num_training_batches, stopwatch.epochs
    size = "x".join(map(str, stopwatch.batch["image"].shape))
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    loader = trainer.train_dataloader
    print(f"\n{machine(trainer.strategy.root_device.type)}, cores: {cores}, workers: {loader.num_workers}; ", end="")
    print(f"{type(trainer.lightning_module.net).__name__} in {trainer.precision}, batches of {size}, ", end="")
    print(f"{steps} steps per epoch, epochs: {len(epochs)}\n")
    rate, alone = steps * batch_size / statistics.median(epochs), batch_size / statistics.median(stopwatch.alone)
    print("| whole epoch | step alone | ratio |\n|---|---|---|")
    print(f"| {rate:,.1f} images/s | {alone:,.1f} images/s | {rate / alone:.1%} |\n")
    found = dict.fromkeys(PARTS, 0.0)
    for action, total in stopwatch.durations.items():
        part = next((part for part, pattern in PARTS.items() if re.search(rf"(^|[.\]]){pattern}$", action)), None)
        if part:
            found[part] += total
    found["step"] -= sum(found[part] for part in WITHIN_STEP)
    found["rest"] = sum(epochs) - sum(found.values())
    print("| part of an epoch | ms per step | share |\n|---|---|---|")
    for part, total in found.items():
        print(f"| {part} | {total / len(epochs) / steps * 1e3:,.2f} | {total / sum(epochs):.1%} |")
    shares = {part: total / sum(epochs) for part, total in found.items()}
    about = {"machine": machine(trainer.strategy.root_device.type), "net": type(trainer.lightning_module.net).__name__}
    about |= {"precision": trainer.precision, "batch": size, "workers": loader.num_workers, "cores": cores}
    return {**about, "epoch": rate, "alone": alone, "shares": shares}


if __name__ == "__main__":
    try:
        main()
    except InputError as error:
        sys.exit(f"training.py: {error}")
