"""The folder of a run: its name, the lock that lets one process write it, metrics.csv and checkpoints."""

import csv
import os
import socket
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from filelock import FileLock, Timeout
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import Logger
from lightning.pytorch.utilities import rank_zero_only

from segmentation.data.writing import remove_stale, write_csv, write_text
from segmentation.errors import InputError

RUNS = Path("runs")


class RunFolder:
    """`runs/<name>/` and the files in it.

    Args:
        name: the run's name.
        resume: go on where the run stopped, if it has begun.
        runs: the folder that holds all runs.
    """

    def __init__(self, name: str, resume: bool, runs: Path = RUNS) -> None:
        self.name = name
        self.path = runs / name
        self.config = self.path / "config.yaml"
        self.metrics = self.path / "metrics.csv"
        self.summary = self.path / "summary.json"
        self.page = self.path / "report.html"
        self.per_image = self.path / "per_image.csv"
        self.skipped = self.path / "skipped_files.txt"
        self.pictures = self.path / "pictures"
        self.confusion = self.pictures / "confusion.png"
        self.checkpoints = self.path / "checkpoints"
        #: The checkpoint to go on from, if there is one.
        self.last: Path | None = self.checkpoints / "last.ckpt"
        if not (resume and self.config.is_file() and self.last.is_file()):
            self.last = None
        if self.path.exists() and not resume and is_rank_zero():
            raise InputError(f"{self.path} exists: choose another --name, or add --resume to go on with that run")

    def create(self, config: str) -> None:
        """Make the folder, in rank 0, with the config."""
        remove_stale(self.path)
        for result in (self.summary, self.page):  # a run that is lengthened is unfinished again
            result.unlink(missing_ok=True)
        write_text(self.config, config)


#: Locks of this process by the run's folder. In no object: Lightning's weight averaging copies all it can reach.
LOCKS: dict[Path, FileLock] = {}


def acquire_lock(name: str, runs: Path = RUNS) -> None:
    """In rank 0, lock the run `runs/name` for this process. The lock goes when the process ends, in whatever way.

    Raises:
        InputError: another process still has it after half a minute, or `name` is no name of a folder.
    """
    if Path(name).name != name or name.startswith("."):
        raise InputError(f"--name {name!r} must be a plain folder name, without slashes")
    file = (runs / f".{name}.lock").resolve()
    lock = LOCKS.setdefault(runs / name, FileLock(file))
    try:
        if is_rank_zero() and not lock.is_locked:  # in a notebook it may be
            lock.acquire(timeout=30)
            file.write_text(f"process {os.getpid()} on {socket.gethostname()}")
    except Timeout as error:
        raise InputError(f"{runs / name} is held by {file.read_text()}, which writes it: end that first") from error
    except OSError:  # a file system without locks
        pass


def release_lock(run: RunFolder) -> None:
    lock = LOCKS.pop(run.path)
    if lock.is_locked:
        Path(lock.lock_file).unlink(missing_ok=True)  # before another process can have it
        lock.release()


def new_name() -> str:
    """Name of a run without --name: from the W&B sweep, the SLURM job or the time. Processes that Lightning starts
    take it from rank 0 through the environment; under another launcher only rank 0 uses its name."""
    job = os.environ.get("SLURM_JOB_ID")
    if not is_rank_zero():
        return os.environ.get("SEGMENTATION_RUN", "unnamed")
    if "WANDB_SWEEP_ID" in os.environ and "WANDB_RUN_ID" in os.environ:
        name = f"sweep-{os.environ['WANDB_RUN_ID']}"
    elif job:
        name = f"slurm-{job}"
    else:
        name = datetime.now().strftime("%Y%m%d-%H%M%S-%f")  # two runs may start in one second
    os.environ["SEGMENTATION_RUN"] = name
    return name


def is_rank_zero() -> bool:
    """Whether this is the process that writes."""
    return rank_zero_only.rank == 0  # type: ignore[attr-defined]  # Lightning sets it


class MetricsFile(Logger):
    """`metrics.csv`, with a row for each logged step or epoch.

    The file is written whole, before each checkpoint, and a resumed run keeps the rows up to its checkpoint's step, so
    the file is exact however the run was stopped. Lightning's CSVLogger deletes a file that it finds.

    Args:
        run: the run folder.
        step: step of the checkpoint that the run goes on from, or None.

    Raises:
        InputError: the file of the run that goes on is damaged.
    """

    name = "metrics"
    version = ""
    EVERY = 50  # rows after which `save` writes: Lightning calls it for each

    def __init__(self, run: RunFolder, step: int | None) -> None:
        super().__init__()
        self.path = run.metrics
        self.rows = []
        self.written = 0
        if step is None or not self.path.is_file():
            return
        try:
            with self.path.open(newline="", encoding="utf-8") as file:
                for row in csv.DictReader(file):
                    if row["step"] and int(row["step"]) < step:
                        self.rows.append({key: value for key, value in row.items() if value})
        except (KeyError, ValueError, csv.Error) as error:
            raise InputError(
                f"{self.path}: is damaged ({error}). Remove it, and the run goes on without its earlier rows"
            ) from error

    @rank_zero_only
    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        self.rows.append({**metrics, "step": step})

    def save(self) -> None:
        if len(self.rows) - self.written >= self.EVERY:
            self.write()

    @rank_zero_only
    def write(self, *args, **kwargs) -> None:
        """Write the file, if there is a row."""
        if self.rows:
            write_csv(self.path, self.rows)
            self.written = len(self.rows)

    finalize = write

    def log_hyperparams(self, *args, **kwargs) -> None:
        """config.yaml has them."""


@dataclass
class CheckpointOptions:
    """What is kept: checkpoints/best.ckpt, by val/miou, and checkpoints/last.ckpt.

    Args:
        every_minutes: last.ckpt is saved at every epoch's end, and within an epoch when this many minutes have gone by.
    """

    every_minutes: float = 10.0


class BestCheckpoint(ModelCheckpoint):
    """best.ckpt, by val/miou. A resumed run knows it from its own folder, which may have been moved or copied.

    last.ckpt is saved by `preemption.LastCheckpoint`.
    """

    def __init__(self, run: RunFolder) -> None:
        super().__init__(
            dirpath=run.checkpoints,
            filename="best",
            monitor="val/miou",
            mode="max",
            save_on_train_epoch_end=False,
            enable_version_counter=False,
        )

    def load_state_dict(self, state_dict: dict) -> None:
        if state_dict["best_model_path"]:
            best = str(Path(self.dirpath or ".") / "best.ckpt")
            self.best_model_score = state_dict["best_model_score"]
            self.best_model_path = best
            self.kth_best_model_path = best
            self.best_k_models = {best: self.best_model_score}
