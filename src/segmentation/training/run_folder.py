"""The folder of a run, its name, and the lock that lets one process write it."""

import os
import socket
from datetime import datetime
from pathlib import Path

from filelock import FileLock, Timeout
from lightning.pytorch.utilities import rank_zero_only

from segmentation.data.writing import remove_stale, write_text
from segmentation.errors import InputError

RUNS = Path("runs")


class RunFolder:
    """`runs/<name>/` and the files in it.

    Args:
        name: the run's name.
        resume: go on where the run stopped, if it has begun.
    """

    def __init__(self, name: str, resume: bool) -> None:
        self.name = name
        self.path = RUNS / name
        self.config = self.path / "config.yaml"
        self.metrics = self.path / "metrics.csv"
        self.summary = self.path / "summary.json"
        self.per_image = self.path / "per_image.csv"
        self.skipped = self.path / "skipped_files.txt"
        self.pictures = self.path / "pictures"
        self.checkpoints = self.path / "checkpoints"
        last = self.checkpoints / "last.ckpt"
        self.resuming = resume and self.config.is_file() and last.is_file()
        #: The checkpoint to go on from, if there is one.
        self.last = last if self.resuming else None
        if self.path.exists() and not resume and is_rank_zero():
            raise InputError(f"{self.path} exists: choose another --name, or add --resume to go on with that run")

    def create(self, config: str) -> None:
        """Make the folder, in rank 0, with the config."""
        remove_stale(self.path)
        self.summary.unlink(missing_ok=True)  # a run that is lengthened is unfinished again
        write_text(self.config, config)


#: Locks of this process by the run's name. In no object: Lightning's weight averaging copies all it can reach.
LOCKS: dict[str, FileLock] = {}


def acquire_lock(name: str) -> None:
    """In rank 0, lock a run for this process. The lock goes when the process ends, in whatever way.

    Raises:
        InputError: another process still has it after half a minute, or `name` is no name of a folder.
    """
    if Path(name).name != name or name.startswith("."):
        raise InputError(f"--name {name!r} must be a plain folder name, without slashes")
    file = (RUNS / f".{name}.lock").resolve()
    lock = LOCKS.setdefault(name, FileLock(file))
    try:
        if is_rank_zero() and not lock.is_locked:  # in a notebook it may be
            lock.acquire(timeout=30)
            file.write_text(f"process {os.getpid()} on {socket.gethostname()}")
    except Timeout as error:
        raise InputError(f"{RUNS / name} is held by {file.read_text()}, which writes it: end that first") from error
    except OSError:  # a file system without locks
        pass


def release_lock(name: str) -> None:
    lock = LOCKS.pop(name)
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
