"""Lightning's trainer: options that cannot work are refused before the first step, checkpoints are written whole."""

from pathlib import Path
from traceback import walk_tb
from typing import Any

import torch
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import BatchSizeFinder, LearningRateFinder, StochasticWeightAveraging
from lightning.pytorch.plugins.layer_sync import TorchSyncBatchNorm
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from segmentation.data.writing import atomic_write
from segmentation.errors import InputError, one_line
from segmentation.training.preemption import watch_processes


def make_trainer(**options: Any) -> Trainer:
    """Lightning's trainer.

    Raises:
        InputError: Lightning refuses the options, or this project cannot work with them.
    """
    watch_processes()
    try:
        trainer = Trainer(**options)
    except (MisconfigurationException, RuntimeError, ValueError, TypeError, ImportError) as error:
        raise refused(error) from error
    if trainer.precision not in ("32-true", "16-mixed", "bf16-mixed", "64-true"):
        raise InputError(
            f"trainer.precision {trainer.precision} keeps weights and normalisation in fewer bits than they need. "
            "Fix: --trainer.precision bf16-mixed"
        )
    if options.get("sync_batchnorm") and trainer.world_size > 1 and trainer.strategy.root_device.type == "cpu":
        raise InputError("trainer.sync_batchnorm is for GPUs only: set it to false here")
    forks = getattr(trainer.strategy.launcher, "is_interactive_compatible", False)
    if forks or "spawn" in str(options.get("strategy")):
        raise InputError(
            "trainer.strategy: processes are started by the script, not forked or spawned. "
            "Fix: python src/train.py --trainer.strategy ddp ...; in a notebook's cell with a ! before it"
        )
    return trainer


def refused(error: BaseException) -> InputError:
    """Lightning's error about its options as one line."""
    return InputError(f"the trainer refuses its options: {one_line(error)}")


def is_refusal(error: BaseException) -> bool:
    """Whether Lightning itself raised an error of a run, which is then about its options."""
    *_, (last, _) = walk_tb(error.__traceback__)
    is_inside = last.f_globals["__name__"].startswith("lightning.pytorch.")
    by_value = isinstance(error, RuntimeError | ValueError) and is_inside
    return by_value or isinstance(error, MisconfigurationException)


def check_callbacks(callbacks: list[Callback]) -> None:
    """Raise InputError for callbacks that would end a run later."""
    for callback in callbacks:
        monitor = getattr(callback, "monitor", None)
        if isinstance(monitor, str) and not monitor.startswith(("train/", "val/")):
            name = type(callback).__name__
            raise InputError(f"trainer.callbacks: {name} monitors {monitor!r}, which is not logged; val/miou is")
        if isinstance(callback, StochasticWeightAveraging):
            raise InputError(
                "trainer.callbacks: StochasticWeightAveraging trains an epoch more than is asked for, and cannot be "
                "resumed exactly. For averaged weights: --config configs/trainer/ema.yaml"
            )


def without_finders(callbacks: list[Callback]) -> list[Callback]:
    """The callbacks that do not search for a batch size or a learning rate before the first step."""
    return [each for each in callbacks if not isinstance(each, BatchSizeFinder | LearningRateFinder)]


def has_bf16(accelerator: str) -> bool:
    """Whether the device that the trainer will take computes in bfloat16, rather than emulating it."""
    if torch.cuda.is_available() and accelerator in ("auto", "gpu", "cuda"):
        return torch.cuda.is_bf16_supported(including_emulation=False)
    cpuinfo = Path("/proc/cpuinfo")
    return accelerator in ("auto", "cpu") and cpuinfo.exists() and "avx512_bf16" in cpuinfo.read_text()


class AtomicCheckpointIO(TorchCheckpointIO):
    """Write a checkpoint beside its place and rename it. Lightning's own writes to the temporary folder and moves:
    between file systems that is a copy, which a full disk or a kill can cut off."""

    def save_checkpoint(self, checkpoint: dict, path, storage_options=None) -> None:
        try:
            with atomic_write(Path(path)) as aside:
                torch.save(checkpoint, aside)
        except (OSError, RuntimeError) as error:  # torch reports a full disk as RuntimeError
            reason = one_line(error)
            raise InputError(f"{path}: cannot be written ({reason}). The last one is kept: make room, go on") from error


class SyncBatchNorm(TorchSyncBatchNorm):
    """One batch norm over all processes. timm's layers hold their activation, which torch's conversion would drop."""

    def apply(self, model: torch.nn.Module) -> torch.nn.Module:
        from timm.layers import convert_sync_batchnorm

        return convert_sync_batchnorm(model)

    def revert(self, model: torch.nn.Module) -> torch.nn.Module:
        return model  # in eval mode it is plain batch norm
