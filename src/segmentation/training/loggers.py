"""metrics.csv: every metric that a run has logged."""

import csv
from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.loggers import Logger
from lightning.pytorch.utilities import rank_zero_only

from segmentation.data.writing import write_csv
from segmentation.errors import InputError
from segmentation.training.run_folder import RunFolder, is_rank_zero


class MetricsFile(Logger):
    """`metrics.csv`, with a row for each logged step or epoch.

    The file is written whole each time, and a resumed run keeps the rows up to its checkpoint's step, so the file is
    exact however the run was stopped. Lightning's CSVLogger deletes a file that it finds.

    Args:
        run: the run folder.
        step: step of the checkpoint that the run goes on from, or None.

    Raises:
        InputError: the file of the run that goes on is damaged.
    """

    name = "metrics"
    version = ""
    EVERY = 50  # rows after which the file is written

    def __init__(self, run: RunFolder, step: int | None) -> None:
        super().__init__()
        self.path = run.metrics
        self.rows: list[dict[str, Any]] = []
        self.written = 0
        if step is not None and self.path.is_file() and is_rank_zero():
            try:
                self.rows = self.read(step)
            except (ValueError, csv.Error) as error:
                raise InputError(
                    f"{self.path}: is damaged ({error}). Remove it, and the run goes on without its earlier rows"
                ) from error

    def read(self, end: int) -> list[dict[str, Any]]:
        """The rows of the steps before `end`."""
        rows = []
        with self.path.open(newline="", encoding="utf-8") as file:
            for row in csv.DictReader(file):
                filled = {key: value for key, value in row.items() if value}
                if "step" in filled and int(filled["step"]) < end:
                    rows.append(filled)
        return rows

    @rank_zero_only
    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        self.rows.append({**metrics, "step": step})

    def save(self) -> None:
        if len(self.rows) - self.written >= self.EVERY:
            self.write()

    @rank_zero_only
    def write(self) -> None:
        """Write the file, if there is a row."""
        if self.rows:
            write_csv(self.path, self.rows)
            self.written = len(self.rows)

    def finalize(self, status: str) -> None:
        self.write()

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        """config.yaml has them."""


def write_metrics_file(trainer: Trainer) -> None:
    """Write metrics.csv, which must hold all rows before a checkpoint of the same step is saved."""
    for logger in trainer.loggers:
        if isinstance(logger, MetricsFile):
            logger.write()
