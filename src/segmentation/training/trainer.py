"""Lightning's trainer and its callbacks: what they cannot do here is said in one line, before the first step."""

from typing import Any

from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import BatchSizeFinder, LearningRateFinder, StochasticWeightAveraging
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from segmentation.errors import InputError

#: Callbacks that search for an option's value before the first step.
FINDERS = (BatchSizeFinder, LearningRateFinder)


def make_trainer(**options: Any) -> Trainer:
    """Lightning's trainer.

    Raises:
        InputError: Lightning refuses the options, or this project cannot work with them.
    """
    try:
        trainer = Trainer(**options)
    except (MisconfigurationException, ValueError, ImportError) as error:
        raise refused(error) from error
    if trainer.precision not in ("32-true", "16-mixed", "bf16-mixed", "64-true"):
        raise InputError(
            f"trainer.precision {trainer.precision} keeps weights and normalisation in fewer bits than they need. "
            "Fix: --trainer.precision bf16-mixed"
        )
    launcher = trainer.strategy.launcher
    forks = launcher is not None and launcher.is_interactive_compatible
    if forks or "spawn" in str(options.get("strategy")):
        raise InputError(
            "trainer.strategy: several processes are started by the script, not forked or spawned from a running one. "
            "Fix: python src/train.py --trainer.strategy ddp ...; in a notebook's cell with a ! before it"
        )
    return trainer


def refused(error: Exception) -> InputError:
    """Lightning's words for what is wrong with its options, in one line."""
    return InputError(f"the trainer refuses its options: {' '.join(str(error).split())}")


def as_list(given: Any) -> list[Any]:
    """What Lightning takes as one, as several, or as none."""
    if given is None:
        return []
    return given if isinstance(given, list) else [given]


def check_callbacks(callbacks: list[Callback]) -> None:
    """Raises InputError, before the first step, for what would end a run later."""
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
    """The callbacks that do not search before a run or a test: one that goes on has its values."""
    return [callback for callback in callbacks if not isinstance(callback, FINDERS)]
