"""A loss or a gradient that is not finite ends the run, before a checkpoint keeps what it made of the weights."""

from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from segmentation.errors import InputError


class StopAtNonFinite(Callback):
    """Looks at every step's losses and gradient, a step late, and at all of them before a validation and a checkpoint.

    To ask at once would hold up a GPU at every step: while the answer is waited for, it gets no work.

    Attributes:
        coming: losses and names of the batches of a coming step.
        unchecked: the last step's: which numbers are finite, perhaps still on their way here, when they have arrived,
            names, and step.
    """

    def __init__(self) -> None:
        self.names: list[str] = []
        self.coming: list[tuple[Tensor, list[str]]] = []
        self.unchecked: list[tuple[Tensor, torch.cuda.Event | None, tuple[list[str], ...], int]] = []

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, i: int) -> None:
        self.names = batch["name"]

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        self.coming.append((loss.detach(), self.names))

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Any) -> None:
        self.check(trainer)
        norm = torch.nn.utils.get_total_norm([p.grad for p in pl_module.parameters() if p.grad is not None])
        losses, names = zip(*self.coming, strict=True)
        finite = torch.stack([norm, *losses]).isfinite().to("cpu", non_blocking=norm.is_cuda)
        arrived = torch.cuda.current_stream(norm.device).record_event() if norm.is_cuda else None
        self.coming, self.unchecked = [], [(finite, arrived, names, trainer.global_step)]

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.check(trainer)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.check(trainer)

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        self.check(trainer)

    def check(self, trainer: Trainer) -> None:
        """Raises InputError if an unchecked step was not finite, on every process: gradients are the same on all."""
        unchecked, self.unchecked = self.unchecked, []
        for finite, arrived, names, step in unchecked:
            if arrived is not None:
                arrived.synchronize()
            norm, *losses = finite.tolist()
            scaled = getattr(trainer.precision_plugin, "scaler", None) is not None  # it skips steps by itself
            if norm or (scaled and all(losses)):
                continue
            found = [name for loss, batch in zip(losses, names, strict=True) if not loss for name in batch]
            if trainer.world_size > 1:
                everywhere: list[list[str]] = [[] for _ in range(trainer.world_size)]
                torch.distributed.all_gather_object(everywhere, found)
                found = [name for names in everywhere for name in names]
            what = "loss" if found else "gradient"
            found = found or [name for batch in names for name in batch]
            raise InputError(
                f"the {what} is not finite in epoch {trainer.current_epoch + 1}, step {step}, on {', '.join(found)}. "
                "Look at these files, lower model.optimizer.lr, or use --trainer.precision 32-true. Checkpoints of "
                "finished epochs are kept"
            )
