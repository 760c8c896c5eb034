"""On a cluster: how processes were started, and what happens when the scheduler takes the machine away."""

import os
import signal
import subprocess
from types import FrameType
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from segmentation.errors import InputError, Preempted
from segmentation.run import RunFolder

#: SLURM's warning (`#SBATCH --signal=USR1@120`) before the time is up, and what precedes every kill.
SIGNALS = tuple(getattr(signal, name) for name in ("SIGUSR1", "SIGTERM") if hasattr(signal, name))

#: Steps between two moments at which processes tell one another of a signal: each costs one small exchange.
STEPS = 10


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
    elif "SLURM_NTASKS" in env and env.get("SLURM_JOB_NAME") not in ("bash", "interactive") and "SLURM_PROCID" in env:
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


class Preemption(Callback):
    """On SIGUSR1 or SIGTERM: finish the step, save last.ckpt, and stop; after SLURM's warning, requeue the job.

    A handler only sets a flag. Lightning's own save within the signal, perhaps in the middle of a step of the
    optimizer, and speak to the other processes, who may be elsewhere.

    Args:
        run: the run folder.
    """

    def __init__(self, run: RunFolder) -> None:
        self.run, self.received = run, 0

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self.listen()

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.listen()  # again: since `setup` Lightning has set its own

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.listen()

    def listen(self) -> None:
        for number in SIGNALS:
            signal.signal(number, self.note)

    def note(self, number: int, frame: FrameType | None) -> None:
        """The handler. A warning that was followed by the end stays a warning."""
        self.received = self.received or number

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        # An epoch's last step leaves the saving to the epoch's end, and Lightning cannot go on from within a step.
        if trainer.is_last_batch or trainer.fit_loop._should_accumulate() or not self.agreed(trainer, batch_idx):
            return
        trainer.save_checkpoint(self.run.checkpoints / "last.ckpt")
        self.stop(trainer)

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.current_epoch and self.agreed(trainer, 0):  # last.ckpt has just been saved
            self.stop(trainer)

    def on_test_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int, *others: Any
    ) -> None:
        if trainer.world_size == 1 and self.received:  # shares of a test may differ in length, so no agreement there
            self.stop(trainer)

    def agreed(self, trainer: Trainer, step: int) -> bool:
        """Whether any process has received a signal: asked every few steps, of all at the same one."""
        if trainer.world_size == 1:
            return bool(self.received)
        if step % STEPS:
            return False
        return trainer.strategy.reduce_boolean_decision(bool(self.received), all=False)

    def stop(self, trainer: Trainer) -> None:
        """Raises Preempted, on every process."""
        last = None
        if trainer.is_global_zero:
            last = str if self.received == signal.SIGTERM else requeue
        raise Preempted(f"stopped by a signal at step {trainer.global_step}, saved in {self.run.checkpoints}", last)


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
