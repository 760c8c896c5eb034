"""A run's folder, its name, its loggers and its checkpoints."""

import csv
import os
import subprocess
import time
from dataclasses import dataclass, field
from datetime import timedelta
from netrc import NetrcParseError, netrc
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlsplit

import requests
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger, Logger, WandbLogger
from lightning.pytorch.utilities import rank_zero_only

from segmentation.errors import InputError
from segmentation.writing import write_text

RUNS = Path("runs")

#: How W&B is told to behave where the environment does not say. Seconds that a run's end waits for the server; what is
#: not uploaded by then stays on disk.
WANDB = {"WANDB_SILENT": "true", "WANDB_FINISH_TIMEOUT": "60", "WANDB_FINISH_TIMEOUT_RAISES": "true"}


@dataclass
class WandbOptions:
    """Weights & Biases. One run a job, however many processes; never a prompt, never a need for a network.

    Args:
        mode: `auto`: WANDB_MODE where it is set, else online when you are logged in (`wandb login`) and the server
            answers, else offline; or `online`, `offline`, `disabled`.
        project: project's name; null means WANDB_PROJECT, else unet-family.
        entity: user or team; null means WANDB_ENTITY, else your default.
        group: runs of one group are shown together; null means WANDB_RUN_GROUP.
        tags: tags of the run; none means WANDB_TAGS.
        log_checkpoint: whether to upload the best checkpoint as an artifact.
    """

    mode: Literal["auto", "online", "offline", "disabled"] = "auto"
    project: str | None = None
    entity: str | None = None
    group: str | None = None
    tags: list[str] = field(default_factory=list)
    log_checkpoint: bool = False

    def resolved_mode(self) -> str:
        """`online`, `offline` or `disabled`. Rank 0, which alone logs, asks the server before it says online.

        Raises:
            InputError: it is to be online and cannot be, or a variable of W&B's is unusable.
        """
        old = {"run": "online", "dryrun": "offline", "": None}  # W&B's earlier words
        told = os.environ.get("WANDB_MODE") or os.environ.pop("WANDB_MODE", "")  # W&B stumbles over an empty one
        told = old.get(told, told)
        if told not in (None, "online", "offline", "disabled"):
            raise InputError(f"WANDB_MODE={told} is not for one run a job: set it to online, offline or disabled")
        asked = told if self.mode == "auto" else self.mode
        if asked in ("offline", "disabled") or rank_zero_only.rank != 0:
            return asked or "online"
        settings = _wandb_settings()
        if asked is None and settings.mode == "offline":
            return "offline"  # by `wandb offline`
        server = settings.base_url.rstrip("/")
        key = os.environ.get("WANDB_API_KEY") or _saved_key(server)
        refusal = _refusal(server, key) if key else f"no key for {server} is at hand (wandb login)"
        if refusal and asked == "online":
            raise InputError(f"W&B is to be online, but {refusal}. To go on without: --wandb.mode offline")
        if refusal and key:
            print(f"W&B       {refusal}: this run is offline, and slurm/sync.sh uploads it later", flush=True)
        return "offline" if refusal else "online"


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
        last = self.checkpoints / "last.ckpt"
        self.resuming = resume and self.config.is_file() and last.is_file()  # what failed before may begin anew
        #: The checkpoint to go on from, if there is one.
        self.last = last if self.resuming else None
        # The W&B run's id is the folder's own, so that a resumed run is one run. Only rank 0 logs.
        self._wandb_id = self.path / "wandb" / "run_id"
        known = resume and self._wandb_id.is_file()
        new = os.environ.get("WANDB_RUN_ID") or os.urandom(4).hex()  # a sweep's agent gives one
        self.wandb_id = self._wandb_id.read_text().strip() if known else new
        if self.path.exists() and not resume and rank_zero_only.rank == 0:
            raise InputError(f"{self.path} exists: choose another --name, or add --resume to go on with that run")

    def create(self, config: str) -> None:
        """Make the folder, in rank 0, and keep the config and the id of the W&B run."""
        write_text(self._wandb_id, self.wandb_id + "\n")
        self.summary.unlink(missing_ok=True)  # of a run that is now lengthened: it is unfinished again
        write_text(self.config, config)


def new_name() -> str:
    """A name for a run without --name: the run's id in a W&B sweep, the job's under SLURM, else the time. Processes
    that Lightning starts take it from rank 0 through the environment; where another launcher starts them, only rank 0
    uses its name."""
    job, swept = os.environ.get("SLURM_JOB_ID"), os.environ.get("WANDB_SWEEP_ID") and os.environ.get("WANDB_RUN_ID")
    if rank_zero_only.rank == 0:
        now = time.strftime("%Y%m%d-%H%M%S")
        os.environ["SEGMENTATION_RUN"] = f"sweep-{swept}" if swept else f"slurm-{job}" if job else now
    return os.environ.get("SEGMENTATION_RUN", "unnamed")


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


def _wandb_settings() -> Any:
    """W&B's settings, from its files and the environment, which it reads once a process."""
    import wandb

    for key, value in WANDB.items():
        os.environ.setdefault(key, value)
    try:
        return wandb.setup().settings
    except ValueError as error:
        raise InputError(f"W&B cannot use a WANDB_ variable: {' '.join(str(error).split())}") from error


def _saved_key(server: str) -> str | None:
    """The key that `wandb login` has saved for a server."""
    import wandb

    try:
        saved = netrc(os.environ.get("NETRC") or Path.home() / ".netrc").hosts
    except (OSError, NetrcParseError):
        return None
    names = [urlsplit(server).netloc]
    names += ["api.wandb.ai"] if server == wandb.Settings().base_url else []  # by an earlier W&B
    return next((saved[name][2] for name in names if name in saved), None)


def _refusal(server: str, key: str) -> str | None:
    """Why a server cannot be logged to, or None. W&B itself would try for 90 seconds and end in a stack trace."""
    try:
        query = {"query": "query Viewer { viewer { id } }"}
        answer = requests.post(f"{server}/graphql", json=query, auth=("api", key), timeout=5)
        if answer.status_code in (401, 403):
            return f"{server} refuses the key (wandb login --relogin)"
        answer.raise_for_status()
        answer.json()
    except requests.RequestException:  # a firewall's web page, too
        return f"{server} does not answer"
    return None


class KeptCSVLogger(CSVLogger):
    """CSVLogger that writes `metrics.csv` into the run folder and, when a run is resumed, keeps the rows up to the
    checkpoint's step (Lightning's own deletes the file).

    Args:
        run: the run folder.
        step: step of the checkpoint that the run goes on from, or None.
    """

    def __init__(self, run: RunFolder, step: int | None) -> None:
        super().__init__(save_dir=str(run.path.parent), name=run.name, version="", flush_logs_every_n_steps=50)
        self.kept: list[dict[str, Any]] = []
        if step is not None and run.metrics.is_file() and rank_zero_only.rank == 0:
            with run.metrics.open(newline="") as file:
                rows = [{key: value for key, value in row.items() if value} for row in csv.DictReader(file)]
            self.kept = [row for row in rows if "step" in row and int(row["step"]) < step]

    @property
    @rank_zero_only
    def experiment(self) -> Any:
        fresh = self._experiment is None
        writer = super().experiment
        if fresh:
            writer.metrics = self.kept
        return writer

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        """config.yaml has them."""


class BestCheckpoint(ModelCheckpoint):
    """best.ckpt, by validation. Its place is the run folder's also when that was moved before the run is resumed."""

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        here = lambda path: str(Path(self.dirpath) / Path(path).name) if path else path  # noqa: E731
        moved = {key: here(state_dict[key]) for key in ("best_model_path", "kth_best_model_path")}
        models = {here(path): score for path, score in state_dict["best_k_models"].items()}
        super().load_state_dict({**state_dict, **moved, "best_k_models": models, "dirpath": self.dirpath})


class LastCheckpoint(ModelCheckpoint):
    """last.ckpt, at every epoch's end or by the clock. In mid-epoch it waits for the end of a step, and leaves an
    epoch's last step to the epoch's end: Lightning cannot go on from between the two."""

    def on_train_batch_end(self, trainer: Trainer, *args: Any) -> None:
        if not trainer.is_last_batch and not trainer.fit_loop._should_accumulate():
            super().on_train_batch_end(trainer, *args)


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
    last = {"dirpath": run.checkpoints, "filename": "last", "enable_version_counter": False}
    interval = timedelta(minutes=options.every_minutes)
    return [
        best,
        LastCheckpoint(**last, every_n_epochs=1, save_on_train_epoch_end=True),
        LastCheckpoint(**last, train_time_interval=interval, save_on_train_epoch_end=False),
    ]


def make_loggers(run: RunFolder, options: WandbOptions, step: int | None) -> list[Logger]:
    """CSV always; W&B unless disabled."""
    loggers: list[Logger] = [KeptCSVLogger(run, step)]
    mode = options.resolved_mode()
    if mode != "disabled":
        _wandb_settings()
        env, swept = os.environ, "WANDB_SWEEP_ID" in os.environ
        given = run.name != env.get("SEGMENTATION_RUN")  # by --name
        logger = WandbLogger(
            name=run.name if given else env.get("WANDB_NAME", run.name),
            id=run.wandb_id,
            save_dir=str(run.path.resolve() if swept else env.get("WANDB_DIR") or run.path.resolve()),
            project=options.project or env.get("WANDB_PROJECT", "unet-family"),
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
