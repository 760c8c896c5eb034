"""On a cluster: how processes were started, and what happens when the scheduler takes the machine away."""

import logging
import math
import os
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

from lightning.fabric.plugins.environments import SLURMEnvironment, TorchElasticEnvironment
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import Checkpoint

from segmentation.errors import InputError
from segmentation.training.entry import Preempted
from segmentation.training.run_folder import RunFolder

#: SLURM's warning (`#SBATCH --signal=USR1@120`) before the time is up, and what precedes every kill.
SIGNALS = (signal.SIGTERM, getattr(signal, "SIGUSR1", signal.SIGTERM))  # Windows lacks it

CHILD = getattr(signal, "SIGCHLD", signal.SIGTERM)

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


def check_launch(num_nodes: int) -> None:
    """Raise InputError if this process would wait for ever for others that nothing starts."""
    if TorchElasticEnvironment.detect():
        return
    tasks = os.environ.get("SLURM_NTASKS", "1")
    by_slurm = SLURMEnvironment.detect()
    if by_slurm and tasks != "1" and "SLURM_STEP_ID" not in os.environ:
        raise InputError(
            f"the job has {tasks} tasks, but the script starts one: this process would wait for the others. "
            "Fix: srun python src/train.py, as in slurm/train.sbatch"
        )
    if num_nodes > 1 and not by_slurm and "MASTER_ADDR" not in os.environ:
        raise InputError(
            f"trainer.num_nodes is {num_nodes}, but nothing here starts processes on other nodes: this one would wait "
            "for them. Fix: --trainer.num_nodes 1, or start by slurm/train.sbatch or torchrun"
        )


def check_processes(trainer: Trainer) -> None:
    """Raise InputError if torchrun or SLURM has started other processes than the trainer is told of."""
    told = trainer.num_devices * trainer.num_nodes
    for environment in (TorchElasticEnvironment, SLURMEnvironment):
        if environment.detect():
            started = environment().world_size()
            if started != told:
                raise InputError(
                    f"{started} processes are started, but trainer.devices times trainer.num_nodes is {told}. Fix: "
                    "--trainer.devices and --trainer.num_nodes as torchrun or #SBATCH has them"
                )
            return


class LastCheckpoint(Checkpoint):
    """Saves last.ckpt: at each epoch's end, within an epoch every few minutes, and on SIGUSR1 or SIGTERM, which stop
    the run.

    The signal handler only records the signal; the optimizer step is finished first, and all processes agree to stop.
    Lightning's own handlers would save in the middle of a step. After SIGUSR1, SLURM's warning, the job is requeued;
    after SIGTERM (scancel, say) it is not.

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
        self.received: int | None = None  # the first signal
        self.since = math.inf  # when it came
        self.batches = 0  # that have ended

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

    def listen(self, *args, **kwargs) -> None:
        for number in SIGNALS:
            signal.signal(number, self.note)
        self.of_workers = signal.getsignal(CHILD)

    # Lightning sets its own handlers before each of these three, and takes them away by itself.
    on_sanity_check_start = on_train_start = on_test_start = listen

    def note(self, number: int, frame: FrameType | None) -> None:
        """Keep the first signal: SIGTERM after SIGUSR1 still means requeue."""
        if not self.received:
            self.received = number
            self.since = time.monotonic()

    def watch_workers(self, *args, **kwargs) -> None:
        """Put back torch's handler for the death of a loader's worker. torch sets it once, with the first worker; after
        a fit Lightning puts back all handlers of before that."""
        if self.of_workers:
            signal.signal(CHILD, self.of_workers)

    teardown = watch_workers

    def on_train_batch_end(self, trainer: Trainer, *args) -> None:
        due = time.monotonic() - self.saved >= self.every_seconds
        if can_resume_from(trainer) and self.is_turn(trainer) and any_process(trainer, due or self.received):
            self.save(trainer)
            self.stop_if(self.received, trainer)

    def on_train_epoch_end(self, trainer: Trainer, *args) -> None:
        self.save(trainer)

    def on_train_epoch_start(self, trainer: Trainer, *args) -> None:
        if trainer.current_epoch:  # not at the epoch's end: callbacks of the user may save it too
            self.stop_if(self.received, trainer)

    def save(self, trainer: Trainer) -> None:
        """Save last.ckpt, after metrics.csv, which must hold all rows up to its step."""
        metrics: Any = trainer.logger  # the first one, MetricsFile
        metrics.write()
        trainer.save_checkpoint(self.run.checkpoints / "last.ckpt")
        self.saved = time.monotonic()

    def on_validation_batch_end(self, trainer: Trainer, *args) -> None:
        if not trainer.sanity_checking and self.is_turn(trainer):
            late = time.monotonic() - self.since > GRACE
            self.stop_if(late, trainer)

    def on_test_batch_end(self, trainer: Trainer, *args) -> None:
        if self.is_turn(trainer):
            self.stop_if(self.received, trainer)

    def is_turn(self, trainer: Trainer) -> bool:
        """Whether the processes ask one another after this batch."""
        self.batches += 1
        return trainer.world_size == 1 or self.batches % BATCHES == 0

    def stop_if(self, wish: object, trainer: Trainer) -> None:
        """Raises Preempted, on every process, if any has the wish."""
        if any_process(trainer, wish):
            last = None
            if trainer.is_global_zero:
                last = str if self.received == signal.SIGTERM else requeue  # str() is "": nothing to do or to add
            step = trainer.global_step
            raise Preempted(f"stopped by a signal at step {step}, saved in {self.run.checkpoints}", last)


def any_process(trainer: Trainer, wish: object) -> bool:
    """Whether any process has the wish. All must ask, as they wait for one another."""
    return trainer.strategy.reduce_boolean_decision(bool(wish), all=False)


def can_resume_from(trainer: Trainer) -> bool:
    """Whether Lightning goes on exactly from a checkpoint that is saved after this training batch."""
    batches = trainer.fit_loop.batch_idx + 1
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
