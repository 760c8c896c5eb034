"""What is kept of a run: checkpoints/best.ckpt and checkpoints/last.ckpt."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import Callback, ModelCheckpoint

from segmentation.training.loggers import write_metrics_file
from segmentation.training.run_folder import RunFolder


@dataclass
class CheckpointOptions:
    """What is kept: checkpoints/best.ckpt, by val/miou, and checkpoints/last.ckpt.

    Args:
        every_minutes: last.ckpt is saved at every epoch's end, and within an epoch when this many minutes have gone by.
    """

    every_minutes: float = 10.0


class BestCheckpoint(ModelCheckpoint):
    """best.ckpt, by val/miou. A resumed run knows it from its own folder, which may have been moved or copied."""

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        if state_dict["best_model_path"]:
            best = str(Path(self.dirpath or ".") / "best.ckpt")
            known = {
                "best_model_score": state_dict["best_model_score"],
                "best_model_path": best,
                "kth_best_model_path": best,
                "best_k_models": {best: state_dict["best_model_score"]},
            }
            super().load_state_dict(known)


class LastCheckpoint(ModelCheckpoint):
    """last.ckpt at every epoch's end. (Within an epoch: `preemption.PreemptionCheckpoint`.)"""

    def on_train_epoch_end(self, trainer: Trainer, *args: Any) -> None:
        write_metrics_file(trainer)
        super().on_train_epoch_end(trainer, *args)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """It needs none. Lightning would remove what the file names as the checkpoint before, which may be anything."""


def checkpoint_callbacks(run: RunFolder) -> list[Callback]:
    """best.ckpt and last.ckpt. The best comes first: it is what `trainer.checkpoint_callback` names."""
    place: dict[str, Any] = {"dirpath": run.checkpoints, "enable_version_counter": False}
    best = BestCheckpoint(filename="best", monitor="val/miou", mode="max", save_on_train_epoch_end=False, **place)
    return [best, LastCheckpoint(filename="last", save_on_train_epoch_end=True, **place)]
