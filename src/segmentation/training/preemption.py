"""On a cluster: how processes were started, and what happens when the scheduler takes the machine away."""

import logging
import os
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from types import FrameType
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint

from segmentation.errors import InputError
from segmentation.training.entry import Preempted
from segmentation.training.loggers import metrics_file
from segmentation.training.run_folder import RunFolder

#: SLURM's warning (`#SBATCH --signal=USR1@120`) before the time is up, and what precedes every kill.
SIGNALS = tuple(getattr(signal, name) for name in ("SIGUSR1", "SIGTERM") if hasattr(signal, name))

#: Processes agree on what to do every so many batches, as each time they wait for one another.
BATCHES = 5

#: Seconds after a signal for which the end of a validation is awaited, with the epoch's checkpoint after it.
GRACE = 45.0


def watch_processes() -> None:
    """No process of a run goes without a word. (`entry.die_with_launcher`: and none outlives rank 0.)

    Lightning's rank 0 looks after those that it has started, every few seconds, and ends all when one has died; what it
    says of that is not shown by default.
    """
    observer = logging.getLogger("lightning.fabric.strategies.launchers.subprocess_script")
    observer.setLevel(logging.INFO)
    observer.addFilter(_death)


def _death(record: logging.LogRecord) -> bool:
    what = record.getMessage().partition(". ")[0]  # [rank: 1] Child process with PID 123 terminated with code -9
    record.msg, record.args = f"error: {what}; the others are ended. Start again with --resume", ()
    if what.endswith("-9"):
        record.msg += ". (-9 is a kill; by the system, where memory has run out.)"
    return True


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
    """last.ckpt within an epoch: by the clock; and on SIGUSR1 or SIGTERM, whereupon the run stops, and after SLURM's
    warning is requeued.

    A handler only sets a flag, and the step is finished. Lightning's own save within the signal, perhaps in the middle
    of a step of the optimizer, and speak to the other processes, who may be elsewhere. An epoch's last step leaves the
    saving to the epoch's end, since Lightning cannot go on from between the two, nor from between accumulated batches;
    a step before a validation leaves it to the next, since Lightning would go on behind that validation.
    (A Checkpoint, as Lightning calls these after all others: a moving average has then taken the step in.)

    Args:
        run: the run folder.
        every_minutes: how often to save.
    """

    def __init__(self, run: RunFolder, every_minutes: float) -> None:
        self.run, self.every_seconds = run, 60 * every_minutes
        self.received, self.since = 0, 0.0  # the signal, and when it came
        self.saved = time.monotonic()

    @contextmanager
    def listening(self, trainer: Trainer) -> Iterator[None]:
        """While a run lasts: what a signal did before, in a notebook, it does again when the run is finished. (One that
        is stopped has a W&B run to close and a job to requeue yet, and a second signal must not end it there.)"""
        trainer._signal_connector.register_signal_handlers = nullcontext  # type: ignore  # none of Lightning's
        before = {number: signal.signal(number, self.note) for number in SIGNALS}
        yield
        for number, handler in before.items():
            signal.signal(number, handler)

    def note(self, number: int, frame: FrameType | None) -> None:
        """The handler. A warning that was followed by the end stays a warning."""
        if not self.received:
            self.received, self.since = number, time.monotonic()

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.saved = time.monotonic()  # last.ckpt, at the end of the epoch before
        if trainer.current_epoch and self.agreed(trainer, 0, stop=bool(self.received))[1]:
            self.stop(trainer, f"stopped by a signal at step {trainer.global_step}")

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        fit, loop = trainer.fit_loop, trainer.fit_loop.epoch_loop
        ends = trainer.is_last_batch or loop._is_training_done  # by max_steps
        validates = loop._should_check_val_fx(fit._data_fetcher)  # type: ignore[arg-type]  # an epoch has one
        if ends or fit._should_accumulate() or validates:
            return
        due = time.monotonic() - self.saved >= self.every_seconds
        save, stop = self.agreed(trainer, trainer.global_step, save=due, stop=bool(self.received))
        if save or stop:
            metrics_file(trainer).write()
            trainer.save_checkpoint(self.run.checkpoints / "last.ckpt")
            self.saved = time.monotonic()
        if stop:
            self.stop(trainer, f"stopped by a signal at step {trainer.global_step}")

    def on_validation_batch_end(self, trainer: Trainer, pl_module: LightningModule, *batch: Any) -> None:
        late = bool(self.received) and time.monotonic() - self.since > GRACE
        if not trainer.sanity_checking and self.agreed(trainer, batch[2], stop=late)[1]:
            self.stop(trainer, "stopped by a signal in a validation that would not end in time")

    def on_test_batch_end(self, trainer: Trainer, pl_module: LightningModule, *batch: Any) -> None:
        if self.agreed(trainer, batch[2], stop=bool(self.received))[1]:
            self.stop(trainer, "stopped by a signal in the test")

    def agreed(self, trainer: Trainer, number: int, save: bool = False, stop: bool = False) -> tuple[bool, bool]:
        """Whether to save, and to stop: what any process wants, asked of all after the same batch or step."""
        if trainer.world_size > 1:
            if number % BATCHES:
                return False, False
            wishes = torch.tensor([save, stop], dtype=torch.float32, device=trainer.strategy.root_device)
            save, stop = trainer.strategy.reduce(wishes, reduce_op="max").tolist()
        return bool(save), bool(stop)

    def stop(self, trainer: Trainer, why: str) -> None:
        """Raises Preempted, on every process."""
        last = None
        if trainer.is_global_zero:
            last = str if self.received == signal.SIGTERM else requeue
        raise Preempted(f"{why}, saved in {self.run.checkpoints}", last)


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
