"""How a script ends: an exit status, and at most one line of error.

Exit status: 0 done, 2 bad input, 130 Ctrl-C, 143 preempted (saved, to be resumed); anything else, with its stack trace,
is a bug of this project. Nothing here imports torch.
"""

import ctypes
import errno
import os
import pkgutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path

from segmentation.errors import ENLARGE_SHARED_MEMORY, InputError, readable


class Preempted(Exception):
    """The scheduler takes the machine away; all that counts is saved. The message says where.

    Args:
        message: one line.
        last: what rank 0 does when all else is done; it returns what to add to the message. None on the other
            processes: these end with status 0, since srun kills the rest of a job when one of its tasks fails.
    """

    def __init__(self, message: str, last: Callable[[], str] | None) -> None:
        super().__init__(message)
        self.last = last


OUT_OF_MEMORY = (
    "out of memory. Turn down, in this order: data.batch_size (and data.eval_batch_size), data.crop, "
    "model.net.widths, data.num_workers; or use --trainer.precision bf16-mixed, which halves the memory of activations."
)
INTERRUPTED = (
    "interrupted: what was finished is kept. predict.py goes on from it by the same command, train.py by the run's "
    "--name and --resume; the other jobs begin anew."
)
#: What the system says of a place that cannot be written to, because of its room or its name.
FULL = {errno.ENOSPC, errno.EDQUOT}
EXHAUSTED = {errno.ENOMEM, errno.EMFILE, errno.ENFILE}
UNWRITABLE = FULL | {
    *(errno.EROFS, errno.EACCES, errno.EPERM, errno.ENAMETOOLONG, errno.EEXIST, errno.ENOTDIR, errno.EISDIR)
}

PR_SET_PDEATHSIG = 1  # prctl(2)

NO_SHARED_MEMORY = (
    f"shared memory (/dev/shm), through which workers hand over batches, is full. {ENLARGE_SHARED_MEMORY}"
)
WORKER_KILLED = (
    "a worker of the loader was killed, by the system where memory has run out. Turn down data.num_workers or "
    "data.batch_size, or set data.cache: false; then start again with --resume"
)
WORKER_DIED = (
    "a worker of the loader has died. Start again with --resume; if it dies again, --data.num_workers 0 shows where"
)
TOO_MANY_FILES = "too many open files. Fix: ulimit -n 65536 before the start, or turn down data.num_workers"
PORT_IN_USE = "the port at which the processes meet is in use. Fix: unset MASTER_PORT, or set it to another"
LOST_PEER = "another process of this run has died; its message is above. Start again with --resume"

#: Words in an error of a library, in small letters -> exit status and message. The first that fit count.
KNOWN = {
    "memory(shm)": (2, NO_SHARED_MEMORY),
    "signal: bus error": (2, NO_SHARED_MEMORY),
    "signal: killed": (2, WORKER_KILLED),
    "exited unexpectedly": (1, WORKER_DIED),
    "too many open files": (2, TOO_MANY_FILES),
    "eaddrinuse": (2, PORT_IN_USE),
    # what gloo and NCCL say when the process at the other end is gone
    "connection closed by peer": (1, LOST_PEER),
    "connection reset by peer": (1, LOST_PEER),
    "ncclremoteerror": (1, LOST_PEER),
    "nccl communicator was aborted": (1, LOST_PEER),
    # that a device, or the machine, has no memory left
    "memoryerror": (2, OUT_OF_MEMORY),
    "out of memory": (2, OUT_OF_MEMORY),
    "not allocate memory": (2, OUT_OF_MEMORY),
    "can't allocate memory": (2, OUT_OF_MEMORY),
    "not enough memory": (2, OUT_OF_MEMORY),
    "alloc_failed": (2, OUT_OF_MEMORY),
}

#: What uses the kernels that --trainer.deterministic refuses on a GPU, and what to take instead.
NOT_DETERMINISTIC = {
    "adaptive_": "a library's net pools by it: take another architecture or encoder, "
    "--config configs/model/unet_resnet34.yaml",
    "": "or go on with a warning where it is used: --trainer.deterministic warn",
}


def die_with_launcher() -> None:
    """Let a process that torchrun or Lightning has started be killed with the one that started it (Linux): else it
    would train on, and write into the run folder that the next start goes on with.

    This comes before the import of torch, which takes seconds in which the launcher may die as well. The kernel sends
    nothing for one that is dead already.
    """
    if "LOCAL_RANK" not in os.environ:
        os.environ["SEGMENTATION_LAUNCHER"] = str(os.getpid())  # Lightning may start others from this process
        return
    if sys.platform != "linux":
        return
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    parent = os.getppid()
    if "TORCHELASTIC_RUN_ID" in os.environ:
        # Orphans go to process 1. In a container that may be torchrun itself, with whom all processes end.
        orphan = parent == 1 and b"python" not in Path("/proc/1/cmdline").read_bytes()
    else:
        orphan = os.environ.get("SEGMENTATION_LAUNCHER") not in (None, str(parent))
    if orphan:
        os._exit(1)


def run_job(job: str | Callable[[], object]) -> None:
    """Run the main function of a script and turn its outcome into an exit status and at most one line of error.

    Args:
        job: a function, or "module:function": that is imported here, since importing torch takes seconds in which a
            user may type Ctrl-C.

    The process ends by `os._exit` after an error: a rank that failed must not wait, in some library's exit handler,
    for the ranks that still run.
    """
    die_with_launcher()
    try:
        (pkgutil.resolve_name(job) if isinstance(job, str) else job)()
    except InputError as error:
        # In a worker of a DataLoader, torch puts that process's stack trace before the message.
        message = error.args[0].rpartition("InputError: ")[2].strip()
        _stop(2, f"error: {readable(message)}")
    except Preempted as stop:
        if stop.last is None:
            os._exit(0)
        status = 0 if "WANDB_SWEEP_ID" in os.environ else 143  # five runs that "failed", and a sweep's agent gives up
        close_wandb(status)
        _stop(status, f"preempted: {stop}{stop.last()}. The same command, with --resume, goes on from there")
    except KeyboardInterrupt:
        _stop(130, INTERRUPTED)
    except SystemExit as stop:
        if not isinstance(stop.__context__, KeyboardInterrupt):
            raise
        _stop(130, INTERRUPTED)  # Lightning has caught Ctrl-C and left by sys.exit(1)
    except OSError as error:
        if error.errno in EXHAUSTED:
            _stop_if_known(error)
        if error.errno not in UNWRITABLE:
            raise
        where = f"{error.filename}: " if error.filename else ""
        remedy = "make room, and run the same command again" if error.errno in FULL else "give another place"
        if error.errno in FULL and not error.filename:
            remedy += f". (Where no disk is full, shared memory is. {ENLARGE_SHARED_MEMORY})"
        _stop(2, f"error: {where}{error.strerror}. What was finished is kept; {remedy}")
    except (MemoryError, RuntimeError) as error:
        _stop_if_known(error)
        raise


def _stop_if_known(error: Exception) -> None:
    """End the process if the machine, and no bug, is the reason of a library's error."""
    kernel, refused, _ = str(error).partition(" does not have a deterministic implementation")
    if refused:
        remedy = next(text for sign, text in NOT_DETERMINISTIC.items() if sign in kernel)
        _stop(2, f"error: {kernel.split()[-1]} cannot be deterministic on this device; {remedy}")
    if "DataLoader timed out" in str(error):
        _stop(1, f"error: no batch came for {str(error).split()[-2]} s: a worker hangs. Start again with --resume")
    # The loader says by which signal a worker has died in the cause of its error.
    text = f"{type(error).__name__} {error} {error.__cause__}".lower()
    for sign, (status, message) in KNOWN.items():
        if sign in text:
            _stop(status, f"error: {message}")


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


def _stop(status: int, line: str) -> None:
    close_wandb(status)
    print(line, file=sys.stderr, flush=True)
    os._exit(status)
