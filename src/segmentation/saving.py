"""What is kept of a run: checkpoints/best.ckpt and checkpoints/last.ckpt."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import Callback, ModelCheckpoint

from segmentation.run import RunFolder
from segmentation.tracking import metrics_file


@dataclass
class CheckpointOptions:
    """What is kept: checkpoints/best.ckpt and checkpoints/last.ckpt.

    Args:
        monitor: logged key by which the best is chosen.
        mode: whether `max` or `min` of it is best.
        every_minutes: last.ckpt is saved at every epoch's end, and within an epoch when this many minutes have gone by.
    """

    monitor: str = "val/miou"
    mode: Literal["max", "min"] = "max"
    every_minutes: float = 10.0


class BestCheckpoint(ModelCheckpoint):
    """best.ckpt, by validation. Its place is the run folder's also when that was moved before the run is resumed."""

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        here = lambda path: str(Path(str(self.dirpath)) / Path(path).name) if path else path  # noqa: E731
        moved = {key: here(state_dict[key]) for key in ("best_model_path", "kth_best_model_path")}
        models = {here(path): score for path, score in state_dict["best_k_models"].items()}
        super().load_state_dict({**state_dict, **moved, "best_k_models": models, "dirpath": self.dirpath})


class LastCheckpoint(ModelCheckpoint):
    """last.ckpt at every epoch's end. (Within an epoch: `cluster.MidEpoch`.)"""

    def on_train_epoch_end(self, trainer: Trainer, *args: Any) -> None:
        metrics_file(trainer).log_ahead(trainer)
        metrics_file(trainer).write()
        super().on_train_epoch_end(trainer, *args)


def checkpoint_callbacks(run: RunFolder, options: CheckpointOptions) -> list[Callback]:
    """best.ckpt and last.ckpt. The best comes first: it is what `trainer.checkpoint_callback` names."""
    best = BestCheckpoint(
        dirpath=run.checkpoints,
        filename="best",
        monitor=options.monitor,
        mode=options.mode,
        save_on_train_epoch_end=False,
        enable_version_counter=False,
    )
    last = LastCheckpoint(
        dirpath=run.checkpoints, filename="last", save_on_train_epoch_end=True, enable_version_counter=False
    )
    return [best, last]
