"""The learning rate of a run: warm-up, then decay to zero at its last step."""

import math
from typing import Literal

from lightning.pytorch.callbacks import Timer
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from segmentation.errors import InputError

#: Two classes have this name, and torch's does not say what to watch.
PLATEAU = "ReduceLROnPlateau"
PLATEAU_FIX = ". Fix: --model.schedule lightning.pytorch.cli.ReduceLROnPlateau --model.schedule.monitor val/loss"


class WarmupDecay(LRScheduler):
    """Linear warm-up to the optimizer's learning rate, then polynomial or cosine decay to zero, step by step.

    Factor at step t of T, the run's number of steps, with W = warmup * T: (t + 1) / W below W, then with
    x = (t - W) / (T - W) `(1 - x) ** power` (poly; Chen et al. 2017, DeepLab, section 4.1) or `(1 + cos(pi x)) / 2`
    (cosine; Loshchilov and Hutter 2017, eq. 5).

    A run that its time may end (`trainer.max_time`) is at step t too when that share t / T of its time has gone: the
    schedule follows what ends the run first. Such a run's rates depend on its speed, to the last digit.

    Args:
        optimizer: whose learning rates to set.
        warmup: share of the steps to warm up in.
        decay: `poly`, `cosine` or `constant`.
        power: exponent of `poly`.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        warmup: float = 0.05,
        decay: Literal["poly", "cosine", "constant"] = "poly",
        power: float = 0.9,
    ) -> None:
        self.warmup = warmup
        self.decay = decay
        self.power = power
        self.total_steps = 1
        #: Share of the run's time that has gone.
        self.elapsed = 0.0
        super().__init__(optimizer)

    def factor(self, step: int) -> float:
        """What the learning rate is multiplied by at `step`, in 0..1."""
        total = self.total_steps  # T
        step = max(step, int(self.elapsed * total))
        warm = round(self.warmup * total)
        if step < warm:
            return (step + 1) / warm
        if self.decay == "constant":
            return 1.0
        x = min(1.0, (step - warm) / max(1, total - warm))
        if self.decay == "cosine":
            return (1 + math.cos(math.pi * x)) / 2
        return (1 - x) ** self.power

    def get_lr(self) -> list[float | Tensor]:
        return [base * self.factor(self.last_epoch) for base in self.base_lrs]

    def set_total_steps(self, total_steps: float, elapsed: float = 0.0) -> None:
        """Say how long the run is, before its first step.

        Args:
            total_steps: the number of steps; infinity, or less than 1, where only time ends the run.
            elapsed: share of the run's time that has gone; 0 where time does not end it.

        Raises:
            InputError: the learning rate decays, and the run has no end.
        """
        if total_steps < 1:
            total_steps = math.inf
        if self.decay != "constant" and not elapsed and total_steps == math.inf:
            raise InputError(
                "a schedule that decays needs an end: give trainer.max_epochs or max_time, or decay: constant"
            )
        self.elapsed = elapsed
        self.total_steps = int(min(total_steps, 2**53))
        for group, rate in zip(self.optimizer.param_groups, self.get_lr(), strict=True):
            group["lr"] = rate

    def state_dict(self) -> dict:
        """The place in the schedule; its shape is the config's, so that a resumed run may be lengthened."""
        return {"last_epoch": self.last_epoch, "base_lrs": self.base_lrs, "_step_count": self._step_count}


def elapsed_share(trainer) -> float:
    """The share that has gone of the time that `trainer.max_time` allows, the same in every process; 0: no limit."""
    for callback in trainer.callbacks:
        if isinstance(callback, Timer):
            elapsed = callback.time_elapsed()
            remaining = callback.time_remaining()
            if remaining is not None:
                return trainer.strategy.broadcast(elapsed / (elapsed + remaining))
    return 0.0
