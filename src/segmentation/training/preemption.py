"""On a cluster: how processes were started, and what happens when the scheduler takes the machine away."""

import logging
import os
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint

from segmentation.errors import InputError
from segmentation.training.entry import Preempted
from segmentation.training.loggers import write_metrics_file
from segmentation.training.run_folder import RunFolder

#: SLURM's warning (`#SBATCH --signal=USR1@120`) before the time is up, and what precedes every kill.
SIGNALS = tuple(getattr(signal, name) for name in ("SIGUSR1", "SIGTERM") if hasattr(signal, name))

CHILD = getattr(signal, "SIGCHLD", None)

#: Processes agree on what to do every so many batches, as each time they wait for one another.
BATCHES = 5

#: Seconds after a signal for which the end of a validation is awaited, with the epoch's checkpoint after it.
GRACE = 45.0


def watch_processes() -> None:
    """Print what Lightning's launcher says, by default to nobody, when one of its processes dies and it ends all."""
    launchers = logging.getLogger("lightning.fabric.strategies.launchers")
    if not launchers.handlers:
        handler = logging.StreamHandler()
        handler.setFormatter(logging.Formatter("error: %(message)s. Start again with --resume"))
        launchers.addHandler(handler)
        launchers.setLevel(logging.INFO)
        launchers.propagate = False


def check_meeting_place() -> None:
    """Raises InputError if the processes are to meet at a port or a machine that cannot be."""
    port = os.environ.get("MASTER_PORT", "29500")
    address = os.environ.get("MASTER_ADDR", "localhost")
    if not (port.isdecimal() and 0 < int(port) < 65536):
        raise InputError(f"MASTER_PORT is {port!r}, which is no port: unset MASTER_PORT, or set it to a free one")
    try:
        socket.getaddrinfo(address, port)
    except OSError as error:
        raise InputError(
            f"MASTER_ADDR is {address!r}, which is not found ({error.strerror}): unset MASTER_ADDR, or set it to the "
            "name or number of the first machine"
        ) from error


def check_launch(devices: Any, num_nodes: int) -> None:
    """Compare what started this process with what the trainer is told, before anything can wait for ever.

    Raises:
        InputError: they do not fit; the message says which line to change.
    """
    env = os.environ
    if "TORCHELASTIC_RUN_ID" in env:
        tasks, local = int(env["WORLD_SIZE"]), float(env["LOCAL_WORLD_SIZE"])
        starter, nodes, fix_nodes, fix_devices = "torchrun", tasks / local, "--nnodes ", "--nproc-per-node "
    elif "SLURM_NTASKS" in env and "SLURM_PROCID" in env and env.get("SLURM_JOB_NAME") not in ("bash", "interactive"):
        tasks, nodes = int(env["SLURM_NTASKS"]), float(env["SLURM_NNODES"])
        local = tasks / nodes
        starter, fix_nodes, fix_devices = "the job", "#SBATCH --nodes=", "#SBATCH --ntasks-per-node="
    elif num_nodes > 1 and "MASTER_ADDR" not in env:
        raise InputError(
            f"trainer.num_nodes is {num_nodes}, but nothing here starts processes on other nodes: this one would wait "
            "for them. Fix: --trainer.num_nodes 1, or start by slurm/train.sbatch or torchrun"
        )
    else:
        return
    wrong = {"num_nodes": (num_nodes, nodes, "nodes", fix_nodes)}
    if str(devices).isdigit():
        wrong["devices"] = (int(devices), local, "processes a node", fix_devices)
    for option, (told, started, what, fix) in wrong.items():
        if told != started:
            raise InputError(
                f"{starter} starts {started:g} {what}, but trainer.{option} is {told}. "
                f"Fix: {fix}{told}, or --trainer.{option} {started:g}"
            )
    if starter == "the job" and tasks > 1 and "SLURM_STEP_ID" not in env:
        raise InputError(
            f"the job has {tasks} tasks, but the script starts one: this process would wait for the others. "
            "Fix: srun python src/train.py, as in slurm/train.sbatch"
        )


class PreemptionCheckpoint(Checkpoint):
    """Saves last.ckpt within an epoch: every few minutes, and on SIGUSR1 or SIGTERM, after which it stops the run.

    A signal's handler only notes the signal: the step is finished first, and all processes agree. Lightning's own
    handlers would save in the middle of a step. After SLURM's warning (SIGUSR1) the job is requeued.

    Lightning cannot go on from between an epoch's last step and its end, nor from between accumulated batches, and goes
    on behind a validation that follows a step: there the saving is left to the epoch's end or to the next step.

    It is a Checkpoint, as Lightning calls these last: a moving average of the weights has then counted the step.

    Args:
        run: the run folder.
        every_minutes: how often to save.
    """

    def __init__(self, run: RunFolder, every_minutes: float) -> None:
        self.run = run
        self.every_seconds = 60 * every_minutes
        self.saved = time.monotonic()
        self.received = 0  # the first signal
        self.since = 0.0  # when it came

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Listen for signals while a run lasts.

        The handlers of before come back when the run is finished. A run that was stopped keeps ours, since it has a W&B
        run to close and a job to requeue, and a second signal must not end that.
        """
        before = {number: signal.getsignal(number) for number in SIGNALS}
        self.listen()
        try:
            yield
        finally:
            self.watch_workers()
        for number, handler in before.items():
            signal.signal(number, handler)

    def listen(self) -> None:
        for number in SIGNALS:
            signal.signal(number, self.note)
        self.of_workers = signal.getsignal(CHILD) if CHILD else None

    def watch_workers(self) -> None:
        """Put back torch's handler for the death of a loader's worker. torch sets it once, with the first worker; after
        a fit Lightning puts back all handlers of before that."""
        if CHILD and self.of_workers:
            signal.signal(CHILD, self.of_workers)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self.watch_workers()

    def note(self, number: int, frame: FrameType | None) -> None:
        """Keep the first signal: SIGTERM after SIGUSR1 still means requeue."""
        if not self.received:
            self.received = number
            self.since = time.monotonic()

    # Lightning sets its own handlers before each of these three, and takes them away by itself.
    def on_sanity_check_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.listen()

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.listen()

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.listen()

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.saved = time.monotonic()  # at the end of the epoch before
        if trainer.current_epoch and self.any_process(trainer, bool(self.received)):
            self.stop(trainer, f"stopped by a signal at step {trainer.global_step}")

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if not can_resume_from(trainer, batch_idx) or not self.is_time_to_agree(trainer, trainer.global_step):
            return
        due = time.monotonic() - self.saved >= self.every_seconds
        stop = self.any_process(trainer, bool(self.received))
        if stop or self.any_process(trainer, due):
            write_metrics_file(trainer)
            trainer.save_checkpoint(self.run.checkpoints / "last.ckpt")
            self.saved = time.monotonic()
        if stop:
            self.stop(trainer, f"stopped by a signal at step {trainer.global_step}")

    def on_validation_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int, *others: int
    ) -> None:
        if trainer.sanity_checking or not self.is_time_to_agree(trainer, batch_idx):
            return
        late = bool(self.received) and time.monotonic() - self.since > GRACE
        if self.any_process(trainer, late):
            self.stop(trainer, "stopped by a signal in a validation that would not end in time")

    def on_test_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int, *others: int
    ) -> None:
        if self.is_time_to_agree(trainer, batch_idx) and self.any_process(trainer, bool(self.received)):
            self.stop(trainer, "stopped by a signal in the test")

    def is_time_to_agree(self, trainer: Trainer, number: int) -> bool:
        """Whether the processes ask one another after this batch or step: each time they wait."""
        return trainer.world_size == 1 or number % BATCHES == 0

    def any_process(self, trainer: Trainer, wish: bool) -> bool:
        """Whether any process has the wish. All must ask."""
        return trainer.strategy.reduce_boolean_decision(wish, all=False)

    def stop(self, trainer: Trainer, why: str) -> None:
        """Raises Preempted, on every process."""
        last = None
        if trainer.is_global_zero:
            last = str if self.received == signal.SIGTERM else requeue
        raise Preempted(f"{why}, saved in {self.run.checkpoints}", last)


def can_resume_from(trainer: Trainer, batch_idx: int) -> bool:
    """Whether Lightning goes on exactly from a checkpoint that is saved after this training batch."""
    batches = batch_idx + 1
    ends_run = trainer.should_stop or 0 <= trainer.max_steps <= trainer.global_step
    if trainer.is_last_batch or ends_run or batches % trainer.accumulate_grad_batches:
        return False
    if trainer.check_val_every_n_epoch is None:  # validations are counted over all epochs
        batches = trainer.fit_loop.total_batch_idx + 1
    every = trainer.val_check_batch
    return every is None or batches % every != 0


def requeue() -> str:
    """Ask SLURM to run this job again, and say so; nothing outside SLURM."""
    job = os.environ.get("SLURM_JOB_ID")
    if not job:
        return ""
    if "SLURM_ARRAY_JOB_ID" in os.environ:
        job = f"{os.environ['SLURM_ARRAY_JOB_ID']}_{os.environ['SLURM_ARRAY_TASK_ID']}"
    try:
        subprocess.run(["scontrol", "requeue", job], check=True, capture_output=True, text=True)
    except (OSError, subprocess.CalledProcessError) as error:
        return f"; job {job} could not be requeued ({getattr(error, 'stderr', '') or error}): submit it again"
    return f"; job {job} is requeued"
