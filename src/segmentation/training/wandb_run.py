"""Weights & Biases: its options, its logger, and what a run tells it. Nothing else in the project imports wandb."""

import logging
import os
import re
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

from lightning.pytorch.loggers import WandbLogger
from lightning.pytorch.utilities import rank_zero_only

from segmentation.data.writing import write_text
from segmentation.errors import InputError, one_line
from segmentation.training.run_folder import RunFolder, is_rank_zero

#: W&B's settings where the environment does not say: no chatter, and at most a minute's wait for the server at the end.
WANDB = {"WANDB_SILENT": "true", "WANDB_FINISH_TIMEOUT": "60", "WANDB_FINISH_TIMEOUT_RAISES": "true"}

Mode = Literal["auto", "online", "offline", "disabled"]


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

    mode: Mode = "auto"
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
        if not os.environ.get("WANDB_MODE"):
            os.environ.pop("WANDB_MODE", None)  # W&B stumbles over an empty one
        told = os.environ.get("WANDB_MODE", "auto")
        if told not in get_args(Mode):
            raise InputError(f"WANDB_MODE={told} is not for one run a job: set it to online, offline or disabled")
        asked = told if self.mode == "auto" else self.mode
        if asked in ("offline", "disabled"):
            return asked
        if not is_rank_zero():
            return "online"
        import wandb

        settings = wandb_settings()
        if asked == "auto" and settings.mode == "offline":
            return "offline"  # by `wandb offline`
        server = settings.base_url
        try:
            if wandb.login(prompt=False):
                return "online"
            refusal = f"no key for {server} is at hand (wandb login)"
        except wandb.errors.AuthenticationError:
            refusal = f"{server} does not answer, or refuses the key (wandb login --relogin)"
        if asked == "online":
            raise InputError(f"W&B is to be online, but {refusal}. To go on without: --wandb.mode offline")
        if refusal.startswith(server):
            print(f"W&B       {refusal}: this run is offline, and slurm/sync.sh uploads it later", flush=True)
        return "offline"


class Wandb(WandbLogger):
    """Lightning's logger, which stops logging when W&B fails. A scheduler's SIGTERM, for one, ends W&B's own process at
    once, while the run still saves.

    Args:
        run: the run folder.
        options: options of `wandb.init`.
    """

    def __init__(self, run: RunFolder, **options: Any) -> None:
        super().__init__(**options)
        self.run = run
        self.failed = False

    @rank_zero_only
    def log_metrics(self, metrics, step: int | None = None) -> None:
        if self.failed:
            return
        try:
            super().log_metrics(metrics, step)
        except Exception as error:  # each layer of W&B has errors of its own
            self.failed = True
            print(f"W&B       its process has ended ({type(error).__name__}): the run goes on without", flush=True)

    def describe(self, config: dict) -> None:
        """Keep the id of the W&B run, in rank 0; start it, and give it the config and its most important metric."""
        import wandb

        write_text(self.run.path / "wandb" / "run_id", f"{self.version}\n")
        try:
            self.log_hyperparams(config)
        except wandb.Error as error:  # no such entity, say
            raise InputError(
                f"W&B refuses the run: {one_line(error)}. To go on without: --wandb.mode offline"
            ) from error
        self.experiment.define_metric("val/miou", summary="max")
        upload = f"offline; upload by: slurm/sync.sh {self.run.path}"
        print(f"W&B       {self.experiment.url or upload}", flush=True)

    def log_results(self, checkpoint: Path | None) -> None:
        """Log the plot of the confusion matrix and, if there is one, a checkpoint. Called in rank 0, after the test."""
        if self.run.confusion.is_file():
            self.log_image("test/confusion", [str(self.run.confusion)])
        if checkpoint and not self.failed:
            name = re.sub(r"[^A-Za-z0-9_.-]", "-", self.run.name)  # what W&B allows
            self.experiment.log_artifact(str(checkpoint), name=name, type="model")


def make_wandb(run: RunFolder, options: WandbOptions) -> Wandb | None:
    """The logger, or None if W&B is disabled."""
    mode = options.resolved_mode()
    if mode == "disabled":
        return None
    wandb_settings()
    # W&B warns of images of unequal sizes, which a data set may well have.
    logging.getLogger().addFilter(lambda record: "Images sizes do not match" not in record.getMessage())
    name = run.name
    folder = str(run.path.resolve())
    if name == os.environ.get("SEGMENTATION_RUN"):  # not given by --name
        name = os.environ.get("WANDB_NAME", name)
    if "WANDB_SWEEP_ID" not in os.environ:
        folder = os.environ.get("WANDB_DIR") or folder
    return Wandb(
        run,
        id=run_id(run),
        name=name,
        save_dir=folder,
        project=options.project or os.environ.get("WANDB_PROJECT", "unet-family"),
        entity=options.entity,
        group=options.group,
        tags=options.tags or None,
        mode=mode,
    )


def wandb_settings() -> Any:
    """W&B's settings, from its files and the environment, which it reads once a process."""
    import wandb

    for key, value in WANDB.items():
        os.environ.setdefault(key, value)
    try:
        return wandb.setup().settings
    except ValueError as error:
        raise InputError(f"W&B cannot use a WANDB_ variable: {one_line(error)}") from error


def run_id(run: RunFolder) -> str:
    """The id of the W&B run: a resumed run is the same one."""
    file = run.path / "wandb" / "run_id"
    if file.is_file():
        return file.read_text().strip()
    return os.environ.get("WANDB_RUN_ID") or os.urandom(4).hex()  # a sweep's agent gives one


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
    except Exception:  # a timeout; or its own process was killed with the job, and the record is on the disk
        print("W&B       the server has not taken all of the run: slurm/sync.sh uploads the rest", flush=True)
