"""A run's folder, its name, its loggers and its checkpoints."""

import csv
import os
import socket
import subprocess
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, Literal

from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.loggers import Logger, WandbLogger
from lightning.pytorch.utilities import rank_zero_only
from requests.utils import get_netrc_auth

from segmentation.errors import InputError
from segmentation.writing import write_csv, write_text

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

RUNS = Path("runs")


@dataclass
class WandbOptions:
    """Weights & Biases. One run a job, however many processes; never a prompt, never a need for a network.

    Args:
        mode: `auto`: WANDB_MODE where it is set, else online when you are logged in (`wandb login`) and offline when
            not; or `online`, `offline`, `disabled`.
        project: project's name.
        entity: user or team; null means your default.
        group: runs of one group are shown together.
        tags: tags of the run.
        log_checkpoint: whether to upload the best checkpoint as an artifact.
    """

    mode: Literal["auto", "online", "offline", "disabled"] = "auto"
    project: str = "unet-family"
    entity: str | None = None
    group: str | None = None
    tags: list[str] = field(default_factory=list)
    log_checkpoint: bool = False

    def resolved_mode(self) -> str:
        """`online`, `offline` or `disabled`."""
        asked = self.mode if self.mode != "auto" else os.environ.get("WANDB_MODE", "")
        if asked == "online" and not _logged_in():
            raise InputError("W&B is to be online, but no key is at hand: wandb login, or --wandb.mode offline")
        if asked:
            return "offline" if asked == "dryrun" else asked
        return "online" if _logged_in() else "offline"


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


class RunFolder:
    """`runs/<name>/` and the files in it.

    Args:
        name: the run's name.
        resume: go on where the run stopped, if it has begun.
    """

    def __init__(self, name: str, resume: bool) -> None:
        if Path(name).name != name or name.startswith("."):
            raise InputError(f"--name {name!r} must be a plain folder name, without slashes")
        self.name = name
        self.path = RUNS / name
        self.config = self.path / "config.yaml"
        self.metrics = self.path / "metrics.csv"
        self.summary = self.path / "summary.json"
        self.per_image = self.path / "per_image.csv"
        self.skipped = self.path / "skipped_files.txt"
        self.pictures = self.path / "pictures"
        self.checkpoints = self.path / "checkpoints"
        self.lock = RUNS / f".{name}.lock"
        last = self.checkpoints / "last.ckpt"
        if is_rank_zero():
            hold(self.lock)
        self.resuming = resume and self.config.is_file() and last.is_file()  # what failed before may begin anew
        #: The checkpoint to go on from, if there is one.
        self.last = last if self.resuming else None
        # The W&B run's id is the folder's own, so that a resumed run is one run. Only rank 0 logs.
        self._wandb_id = self.path / "wandb" / "run_id"
        known = resume and self._wandb_id.is_file()
        self.wandb_id = self._wandb_id.read_text().strip() if known else os.urandom(4).hex()
        if self.path.exists() and not resume and is_rank_zero():
            raise InputError(f"{self.path} exists: choose another --name, or add --resume to go on with that run")

    def create(self, config: str) -> None:
        """Make the folder, in rank 0, and keep the config and the id of the W&B run."""
        write_text(self._wandb_id, self.wandb_id + "\n")
        self.summary.unlink(missing_ok=True)  # of a run that is now lengthened: it is unfinished again
        write_text(self.config, config)

    def release(self) -> None:
        """Let another process write."""
        file = _held.pop(self.lock.resolve(), None)
        if file:
            file.close()


#: Lock files that this process holds, open: a lock lasts as long as they are.
_held: dict[Path, IO[str]] = {}


def hold(path: Path, patience: float = 30.0) -> None:
    """Take a lock that goes with this process, however it ends: two writers would spoil a run.

    Args:
        path: the lock file.
        patience: seconds to wait for another process, which may be about to end.

    Raises:
        InputError: another process holds it.
    """
    path.parent.mkdir(exist_ok=True)
    path, end = path.resolve(), time.monotonic() + patience
    if path in _held or fcntl is None:
        return
    file = path.open("a+")
    while True:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            break
        except BlockingIOError:
            if time.monotonic() > end:
                file.seek(0)
                raise InputError(f"{path} is held by {file.read()}, which writes this run: end that first") from None
            time.sleep(0.2)
        except OSError:  # a file system without locks
            break
    file.truncate(0)
    file.write(f"process {os.getpid()} on {socket.gethostname()}")
    file.flush()
    _held[path] = file


def new_name() -> str:
    """A name for a run without --name: the run's id in a W&B sweep, the job's under SLURM, else the time. Processes
    that Lightning starts take it from rank 0 through the environment; where another launcher starts them, only rank 0
    uses its name."""
    job, swept = os.environ.get("SLURM_JOB_ID"), os.environ.get("WANDB_SWEEP_ID") and os.environ.get("WANDB_RUN_ID")
    if is_rank_zero():
        now = time.strftime("%Y%m%d-%H%M%S")
        os.environ["SEGMENTATION_RUN"] = f"sweep-{swept}" if swept else f"slurm-{job}" if job else now
    return os.environ.get("SEGMENTATION_RUN", "unnamed")


def is_rank_zero() -> bool:
    """Whether this is the process that writes."""
    return rank_zero_only.rank == 0  # type: ignore[attr-defined]  # Lightning sets it


def git_commit() -> str | None:
    """The commit of this checkout, "+" behind it where files differ; None outside git."""
    describe = [
        "git",
        "-C",
        str(Path(__file__).parent),
        "describe",
        "--always",
        "--exclude=*",
        "--abbrev=40",
        "--dirty=+",
    ]
    try:
        return subprocess.run(describe, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def _logged_in() -> bool:
    """Whether W&B would find a key without asking for one."""
    server = os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")
    return bool(os.environ.get("WANDB_API_KEY") or get_netrc_auth(server))


class MetricsFile(Logger):
    """`metrics.csv`, a row a logged step or epoch. It is written whole each time, and a resumed run keeps the rows up
    to the checkpoint's step: so it is exact however the run was stopped. (Lightning's CSVLogger deletes the old one.)

    Args:
        run: the run folder.
        step: step of the checkpoint that the run goes on from, or None.
    """

    name, version = "metrics", ""
    EVERY = 50  # rows

    def __init__(self, run: RunFolder, step: int | None) -> None:
        super().__init__()
        self.path, self.written = run.metrics, 0
        self.rows: list[dict[str, Any]] = []
        if step is not None and self.path.is_file() and is_rank_zero():
            with self.path.open(newline="") as file:
                rows = [{key: value for key, value in row.items() if value} for row in csv.DictReader(file)]
            self.rows = [row for row in rows if "step" in row and int(row["step"]) < step]

    @rank_zero_only
    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        row = {**metrics, "step": step}
        for index in range(len(self.rows))[-4:]:
            if self.rows[index]["step"] == step and self.rows[index].keys() == row.keys():  # logged ahead
                self.rows[index] = row
                return
        self.rows.append(row)

    def log_ahead(self, trainer: Trainer) -> None:
        """Take the figures of the epoch that ends, which Lightning logs after its callbacks: a run that goes on from
        the checkpoint that one of these saves would never log them."""
        metrics = {key: float(value) for key, value in trainer._logger_connector.metrics["log"].items()}
        step = trainer.fit_loop.epoch_loop._batches_that_stepped - 1
        self.log_metrics({**metrics, "epoch": trainer.current_epoch}, step)

    def save(self) -> None:
        if len(self.rows) - self.written >= self.EVERY:
            self.write()

    @rank_zero_only
    def write(self) -> None:
        if self.rows:
            write_csv(self.path, self.rows)
            self.written = len(self.rows)

    def finalize(self, status: str) -> None:
        self.write()

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        """config.yaml has them."""


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


def metrics_file(trainer: Trainer) -> MetricsFile:
    """The trainer's `metrics.csv`, which must be written before a checkpoint of the same step."""
    return next(logger for logger in trainer.loggers if isinstance(logger, MetricsFile))


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


def make_loggers(run: RunFolder, options: WandbOptions, step: int | None) -> list[Logger]:
    """CSV always; W&B unless disabled."""
    loggers: list[Logger] = [MetricsFile(run, step)]
    mode = options.resolved_mode()
    if mode != "disabled":
        os.environ.setdefault("WANDB_SILENT", "true")  # the run says itself where it is logged
        logger = WandbLogger(
            name=run.name,
            id=run.wandb_id,
            save_dir=str(run.path.resolve()),
            project=options.project,
            entity=options.entity,
            group=options.group,
            tags=options.tags or None,
            mode=mode,
        )
        logger._wandb_init.pop("anonymous", None)  # W&B warns of this option, which Lightning gives it unasked
        loggers.append(logger)
    return loggers


def wandb_runs(trainer: Trainer) -> list[Any]:
    """The W&B run that a trainer logs to, if it does."""
    return [logger.experiment for logger in trainer.loggers if isinstance(logger, WandbLogger)]
