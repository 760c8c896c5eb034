"""On a cluster: how processes were started, and what happens when the scheduler takes the machine away."""

import ctypes
import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint

from segmentation.errors import InputError, Preempted
from segmentation.run import RunFolder
from segmentation.tracking import metrics_file

#: SLURM's warning (`#SBATCH --signal=USR1@120`) before the time is up, and what precedes every kill.
SIGNALS = tuple(getattr(signal, name) for name in ("SIGUSR1", "SIGTERM") if hasattr(signal, name))

#: Processes agree on what to do every so many steps, as each time they wait for one another; where steps are slow,
#: after about so many seconds: a warning comes some two minutes before the end.
STEPS, SECONDS = 10, 5.0

#: Seconds after a signal for which the end of a validation is awaited, with the epoch's checkpoint after it.
GRACE = 45.0

#: Names of jobs that Lightning takes for a terminal: their processes it starts by itself.
INTERACTIVE = ("bash", "interactive")

PR_SET_PDEATHSIG = 1  # prctl(2)


def watch_processes() -> None:
    """No process of a run outlives the others, and none goes without a word.

    A process that torchrun or Lightning has started is killed with the one that started it (Linux): else it would
    train on, and write into the run folder that the next start goes on with. Lightning's rank 0 looks after those that
    it has started, every few seconds, and ends all when one has died; what it says of that is not shown by default.
    """
    if "LOCAL_RANK" in os.environ and sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    observer = logging.getLogger("lightning.fabric.strategies.launchers.subprocess_script")
    observer.setLevel(logging.INFO)
    observer.addFilter(_death)


def _death(record: logging.LogRecord) -> bool:
    what = record.getMessage().partition(". ")[0]  # [rank: 1] Child process with PID 123 terminated with code -9
    record.msg, record.args = f"error: {what}; the others are ended. Start again with --resume", ()
    if what.endswith("-9"):
        record.msg += ". (-9 is a kill; by the system, where memory has run out.)"
    return True


def check_launch(devices: Any, num_nodes: int) -> None:
    """Compare what started this process with what the trainer is told, before anything can wait for ever.

    Raises:
        InputError: they do not fit; the message says which line to change.
    """
    env = os.environ
    if "LOCAL_RANK" in env and not {"WORLD_SIZE", "MASTER_PORT"} & set(env):
        raise InputError(
            "LOCAL_RANK is set, but WORLD_SIZE is not: this process would wait for others that nobody has started. "
            "Fix: unset LOCAL_RANK, or start by torchrun"
        )
    given = int(devices) if str(devices).isdigit() else None
    if "TORCHELASTIC_RUN_ID" in env:
        local, world = int(env["LOCAL_WORLD_SIZE"]), int(env["WORLD_SIZE"])
        if given is not None and given != local:
            raise InputError(
                f"torchrun starts {local} processes a node, but trainer.devices is {given}. "
                f"Fix: --nproc-per-node {given}, or --trainer.devices {local}"
            )
        if num_nodes * local != world:
            raise InputError(
                f"torchrun starts {world} processes, {local} a node, but trainer.num_nodes is {num_nodes}. "
                f"Fix: --trainer.num_nodes {world // local}"
            )
    elif "SLURM_NTASKS" in env and env.get("SLURM_JOB_NAME") not in INTERACTIVE and "SLURM_PROCID" in env:
        nodes = int(env.get("SLURM_NNODES", env.get("SLURM_JOB_NUM_NODES", "1")))
        tasks = int(env["SLURM_NTASKS"])
        if nodes != num_nodes:
            raise InputError(
                f"the job has {nodes} nodes, but trainer.num_nodes is {num_nodes}. "
                f"Fix: --trainer.num_nodes {nodes}, or #SBATCH --nodes={num_nodes}"
            )
        if given is not None and tasks != nodes * given:
            raise InputError(
                f"the job has {tasks} tasks on {nodes} nodes, but trainer.devices is {given}: a task is a device. "
                f"Fix: #SBATCH --ntasks-per-node={given}, or --trainer.devices {tasks // nodes}"
            )
        if tasks > 1 and "SLURM_STEP_ID" not in env:
            raise InputError(
                f"the job has {tasks} tasks, but the script starts one: this process would wait for the others. "
                "Fix: srun python src/train.py, as in slurm/train.sbatch"
            )
    elif env.get("SLURM_JOB_NAME") in INTERACTIVE and int(env.get("SLURM_STEP_NUM_TASKS", "1")) > 1:
        raise InputError(
            f"srun starts {env['SLURM_STEP_NUM_TASKS']} tasks in an interactive job, where Lightning takes each for a "
            "run of its own. Fix: srun --job-name=train --kill-on-bad-exit=1 ..."
        )
    elif num_nodes > 1 and not {"MASTER_ADDR", "LSB_JOBID", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE"} & set(env):
        raise InputError(
            f"trainer.num_nodes is {num_nodes}, but nothing here starts processes on other nodes: this one would wait "
            "for them. Fix: --trainer.num_nodes 1, or start by slurm/train.sbatch or torchrun"
        )


class MidEpoch(Checkpoint):
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
        self.begin()

    @contextmanager
    def listening(self) -> Iterator[None]:
        """While a run lasts: what a signal did before, in a notebook, it does again when the run is finished. (One that
        is stopped has a W&B run to close and a job to requeue yet, and a second signal must not end it there.)"""
        before = {number: signal.getsignal(number) for number in SIGNALS}
        self.listen()
        yield
        for number, handler in before.items():
            signal.signal(number, handler)

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self.listen()

    def on_sanity_check_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.listen()  # again: since `setup` Lightning has set its own, by which SIGTERM ends a run with status 0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.listen()  # and again: a resumed run has no sanity check

    def listen(self) -> None:
        for number in SIGNALS:
            signal.signal(number, self.note)

    def note(self, number: int, frame: FrameType | None) -> None:
        """The handler. A warning that was followed by the end stays a warning."""
        if not self.received:
            self.received, self.since = number, time.monotonic()

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.begin()
        self.saved = time.monotonic()  # last.ckpt, at the end of the epoch before
        if trainer.current_epoch and self.agreed(trainer, 0, stop=bool(self.received))[1]:
            self.stop(trainer, f"stopped by a signal at step {trainer.global_step}")
        self.begin()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        fit, loop = trainer.fit_loop, trainer.fit_loop.epoch_loop
        ends = trainer.is_last_batch or loop._is_training_done  # by max_steps
        validates = loop._should_check_val_fx(fit._data_fetcher)  # type: ignore[arg-type]  # an epoch has one
        if ends or fit._should_accumulate() or validates:
            return
        due = time.monotonic() - self.saved >= self.every_seconds
        save, stop = self.agreed(trainer, batch_idx, save=due, stop=bool(self.received))
        if save or stop:
            metrics_file(trainer).write()
            trainer.save_checkpoint(self.run.checkpoints / "last.ckpt")
            self.saved = time.monotonic()
        if stop:
            self.stop(trainer, f"stopped by a signal at step {trainer.global_step}")

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.begin()

    def on_validation_batch_end(self, trainer: Trainer, pl_module: LightningModule, *batch: Any) -> None:
        if trainer.sanity_checking:
            return
        late = bool(self.received) and time.monotonic() - self.since > GRACE
        if self.agreed(trainer, batch[2], stop=late)[1]:
            self.stop(trainer, "stopped by a signal in a validation that would not end in time")

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.begin()

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.listen()
        self.begin()

    def on_test_batch_end(self, trainer: Trainer, pl_module: LightningModule, *batch: Any) -> None:
        if self.agreed(trainer, batch[2], stop=bool(self.received))[1]:
            self.stop(trainer, "stopped by a signal in the test")

    def begin(self) -> None:
        """Of a loop over batches, as many on each process: when they last agreed, after which batch, when they will."""
        self.asked, self.at, self.next = time.monotonic(), -1, 0

    def agreed(self, trainer: Trainer, batch_idx: int, save: bool = False, stop: bool = False) -> tuple[bool, bool]:
        """Whether to save, and to stop: what any process wants, asked of all after the same batch."""
        if trainer.world_size == 1:
            return save, stop
        if batch_idx < self.next:
            return False, False
        now = time.monotonic()
        pace = (now - self.asked) / max(1, batch_idx - self.at)  # seconds a batch
        wishes = torch.tensor([save, stop, pace], dtype=torch.float32, device=trainer.strategy.root_device)
        save, stop, pace = trainer.strategy.reduce(wishes, reduce_op="max").tolist()
        self.asked, self.at = now, batch_idx
        self.next = batch_idx + max(1, min(STEPS, int(SECONDS / max(pace, 1e-3))))
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
