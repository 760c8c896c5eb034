"""A run: its folder, its name, and the lock that keeps it one."""

import os
import socket
import subprocess
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
        self.resuming = resume and self.config.is_file() and last.is_file()  # what failed before may begin anew
        #: The checkpoint to go on from, if there is one.
        self.last = last if self.resuming else None
        # The W&B run's id is the folder's own, so that a resumed run is one run. Only rank 0 logs.
        self._wandb_id = self.path / "wandb" / "run_id"
        known = resume and self._wandb_id.is_file()
        new = os.environ.get("WANDB_RUN_ID") or os.urandom(4).hex()  # a sweep's agent gives one
        self.wandb_id = self._wandb_id.read_text().strip() if known else new
        if self.path.exists() and not resume and is_rank_zero():
            raise InputError(f"{self.path} exists: choose another --name, or add --resume to go on with that run")

    def create(self, config: str) -> None:
        """Make the folder, in rank 0, and keep the config and the id of the W&B run."""
        remove_stale(self.path)
        write_text(self._wandb_id, self.wandb_id + "\n")
        self.summary.unlink(missing_ok=True)  # of a run that is now lengthened: it is unfinished again
        write_text(self.config, config)


#: Locks of this process, by the run's name. In no object: Lightning's averaging of weights copies all it can reach.
_locks: dict[str, FileLock] = {}


def hold(name: str) -> None:
    """In rank 0, take a run's lock, which goes with this process, however it ends: two writers would spoil the run.

    Raises:
        InputError: another process, which may be about to end, still has it after half a minute; or it is no name.
    """
    if Path(name).name != name or name.startswith("."):
        raise InputError(f"--name {name!r} must be a plain folder name, without slashes")
    file = (RUNS / f".{name}.lock").resolve()
    lock = _locks.setdefault(name, FileLock(file))
    try:
        if is_rank_zero() and not lock.is_locked:  # in a notebook it may be
            lock.acquire(timeout=30)
            file.write_text(f"process {os.getpid()} on {socket.gethostname()}")
    except Timeout as error:
        raise InputError(f"{RUNS / name} is held by {file.read_text()}, which writes it: end that first") from error
    except OSError:  # a file system without locks
        pass


def release(name: str) -> None:
    """Let another process write."""
    lock = _locks.pop(name)
    if lock.is_locked:
        Path(lock.lock_file).unlink(missing_ok=True)  # before another can have it
        lock.release()


def new_name() -> str:
    """A name for a run without --name: the run's id in a W&B sweep, the job's under SLURM, else the time. Processes
    that Lightning starts take it from rank 0 through the environment; where another launcher starts them, only rank 0
    uses its name."""
    job, swept = os.environ.get("SLURM_JOB_ID"), os.environ.get("WANDB_SWEEP_ID") and os.environ.get("WANDB_RUN_ID")
    if is_rank_zero():
        now = datetime.now().strftime("%Y%m%d-%H%M%S-%f")  # runs may be started in one second
        os.environ["SEGMENTATION_RUN"] = f"sweep-{swept}" if swept else f"slurm-{job}" if job else now
    return os.environ.get("SEGMENTATION_RUN", "unnamed")


def is_rank_zero() -> bool:
    """Whether this is the process that writes."""
    return rank_zero_only.rank == 0  # type: ignore[attr-defined]  # Lightning sets it


def git_commit() -> str | None:
    """The commit of this checkout, "+" behind it where files differ; None outside git."""
    describe = ["git", "describe", "--always", "--exclude=*", "--abbrev=40", "--dirty=+"]
    try:
        done = subprocess.run(describe, cwd=Path(__file__).parent, capture_output=True, text=True, check=True)
        return done.stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
