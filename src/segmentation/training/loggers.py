"""Where a run is logged: metrics.csv and Weights & Biases."""

import csv
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from lightning.pytorch import Trainer
from lightning.pytorch.loggers import Logger, WandbLogger
from lightning.pytorch.utilities import rank_zero_only

from segmentation.data.writing import write_csv, write_text
from segmentation.errors import InputError
from segmentation.training.run_folder import RunFolder, is_rank_zero

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
        told = os.environ.get("WANDB_MODE") or os.environ.pop("WANDB_MODE", None)  # W&B stumbles over an empty one
        if told not in (None, "", "online", "offline", "disabled"):
            raise InputError(f"WANDB_MODE={told} is not for one run a job: set it to online, offline or disabled")
        asked = told if self.mode == "auto" else self.mode
        if asked in ("offline", "disabled") or not is_rank_zero():
            return asked or "online"
        import wandb

        settings = _wandb_settings()
        if not asked and settings.mode == "offline":
            return "offline"  # by `wandb offline`
        server, refusal = settings.base_url, ""
        try:
            if not wandb.login(prompt=False):
                refusal = f"no key for {server} is at hand (wandb login)"
        except wandb.errors.AuthenticationError as error:
            refused = any(f"error {code}" in str(error) for code in (401, 403))
            refusal = f"{server} {'refuses the key (wandb login --relogin)' if refused else 'does not answer'}"
        if refusal and asked == "online":
            raise InputError(f"W&B is to be online, but {refusal}. To go on without: --wandb.mode offline")
        if refusal.startswith(server):
            print(f"W&B       {refusal}: this run is offline, and slurm/sync.sh uploads it later", flush=True)
        return "offline" if refusal else "online"


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
            try:
                with self.path.open(newline="", encoding="utf-8") as file:
                    rows = [{key: value for key, value in row.items() if value} for row in csv.DictReader(file)]
                self.rows = [row for row in rows if "step" in row and int(row["step"]) < step]
            except (ValueError, csv.Error) as error:
                raise InputError(
                    f"{self.path}: is damaged ({error}). Remove it, and the run goes on without its earlier rows"
                ) from error

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


class Wandb(WandbLogger):
    """Lightning's logger, but a run outlives W&B's own process, which a scheduler's SIGTERM ends at once, while the run
    saves."""

    gone = False

    @contextmanager
    def outlived(self) -> Iterator[None]:
        """What is logged here is lost without W&B, and nothing else is."""
        try:
            yield
        except Exception as error:  # each of W&B's layers has errors of its own
            self.gone = True
            print(f"W&B       its process has ended ({type(error).__name__}): the run goes on without", flush=True)

    @rank_zero_only
    def log_metrics(self, metrics: Any, step: int | None = None) -> None:
        if not self.gone:
            with self.outlived():
                super().log_metrics(metrics, step)


def log_to_wandb(trainer: Trainer, values: dict[str, Any]) -> None:
    """Pictures, say: what Lightning's loggers do not take."""
    for logger in trainer.loggers:
        if isinstance(logger, Wandb) and not logger.gone:
            with logger.outlived():
                logger.experiment.log(values)


def metrics_file(trainer: Trainer) -> MetricsFile:
    """The trainer's `metrics.csv`, which must be written before a checkpoint of the same step."""
    return next(logger for logger in trainer.loggers if isinstance(logger, MetricsFile))


def make_loggers(run: RunFolder, options: WandbOptions, step: int | None) -> list[Logger]:
    """CSV always; W&B unless disabled."""
    loggers: list[Logger] = [MetricsFile(run, step)]
    mode = options.resolved_mode()
    if mode != "disabled":
        _wandb_settings()
        env, swept = os.environ, "WANDB_SWEEP_ID" in os.environ
        given = run.name != env.get("SEGMENTATION_RUN")  # by --name
        logger = Wandb(
            name=run.name if given else env.get("WANDB_NAME", run.name),
            id=run_id(run),
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
    return [logger.experiment for logger in trainer.loggers if isinstance(logger, Wandb) and not logger.gone]


def _wandb_settings() -> Any:
    """W&B's settings, from its files and the environment, which it reads once a process."""
    import wandb

    for key, value in WANDB.items():
        os.environ.setdefault(key, value)
    try:
        return wandb.setup().settings
    except ValueError as error:
        raise InputError(f"W&B cannot use a WANDB_ variable: {' '.join(str(error).split())}") from error


def run_id(run: RunFolder) -> str:
    """The id of the W&B run: a resumed run is the same one."""
    file = run.path / "wandb" / "run_id"
    if file.is_file():
        return file.read_text().strip()
    return os.environ.get("WANDB_RUN_ID") or os.urandom(4).hex()  # a sweep's agent gives one


def describe_run(trainer: Trainer, run: RunFolder, config: dict[str, Any]) -> None:
    """Give the W&B run, if there is one, its config and its most important metric, and keep its id."""
    for logger in trainer.loggers:
        if isinstance(logger, Wandb):
            import wandb

            try:
                logger.log_hyperparams({**config, "git_commit": git_commit()})
            except wandb.Error as error:  # no such entity, say
                reason = " ".join(str(error).split())
                raise InputError(f"W&B refuses the run: {reason}. To go on without: --wandb.mode offline") from error
            logger.experiment.define_metric("val/miou", summary="max")
            write_text(run.path / "wandb" / "run_id", f"{logger.version}\n")


def git_commit() -> str | None:
    """The commit of this checkout, with "+" if files differ from it; None outside git."""
    describe = ["git", "describe", "--always", "--exclude=*", "--abbrev=40", "--dirty=+"]
    try:
        done = subprocess.run(describe, cwd=Path(__file__).parent, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()


def close_wandb(status: int) -> None:
    """End the W&B run, if there is one. What its server does not take in time is left to slurm/sync.sh, which finds a
    run that was online by the file `.unsent` beside its record."""
    sys.stdout.flush()
    wandb = sys.modules.get("wandb")
    if wandb is None or wandb.run is None:
        return
    unsent = Path(f"{wandb.run.settings.sync_file}.unsent")
    if not wandb.run.offline:
        unsent.touch()
    try:
        wandb.finish(exit_code=status)
        unsent.unlink(missing_ok=True)
    except TimeoutError:
        print("W&B       the server has not taken all of the run: slurm/sync.sh uploads the rest", flush=True)
    except Exception as error:  # its own process may have been killed with the job; the record is on the disk
        print(f"W&B       was not closed ({type(error).__name__}): slurm/sync.sh uploads what there is", flush=True)
