"""How every script starts and ends: set-up of the process, the short command lines, exit status, the line of error.

Exit status: 0 done, 2 bad input, 130 Ctrl-C, 143 preempted (saved, to be resumed); anything else, with its stack trace,
is a bug of this project. Nothing here imports torch: that takes seconds, in which Ctrl-C must count already.
"""

import argparse
import ctypes
import errno
import logging
import os
import pkgutil
import signal
import sys
import warnings
from collections.abc import Callable
from contextlib import suppress
from difflib import get_close_matches
from pathlib import Path
from typing import NoReturn, TextIO

from segmentation.errors import ENLARGE_SHARED_MEMORY, InputError, readable

PACKAGE = Path(__file__).parents[1]

PR_SET_PDEATHSIG = 1  # prctl(2)
M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # malloc.h

#: Warnings that a user can do nothing about.
SMALL_TALK = (
    ".*LeafSpec.*is deprecated.*",
    '.*install "ipywidgets" for Jupyter support.*',
    ".*`srun` command is available.*",
    ".*does not have many workers.*",
    ".*your dataloader is not resumable.*",
    ".*sync_dist=True.*",
    ".*is already saved during checkpointing.*",
    r"\s*Unable to serialize instance.*",
    ".*removed from hparams because it cannot be pickled.*",
    ".*is smaller than the logging interval.*",
    ".*Checkpoint directory .* exists and is not empty.*",
)

OUT_OF_MEMORY = (
    "out of memory. Turn down, in this order: data.batch_size (and data.eval_batch_size), data.crop, "
    "model.net.widths, data.num_workers; or use --trainer.precision bf16-mixed"
)
SHARED_MEMORY_FULL = f"shared memory (/dev/shm), which workers use for batches, is full. {ENLARGE_SHARED_MEMORY}"
WORKER_KILLED = (
    "a worker of the data loader was killed: most likely the memory has run out. Turn down data.num_workers or "
    "data.batch_size, or set data.cache: false; then start again with --resume"
)
WORKER_DIED = "a worker of the data loader has died. Start again with --resume; if it dies again, --data.num_workers 0"
LOST_PEER = "another process of this run has died; its message is above. Start again with --resume"
FUSED = (
    "a fused optimizer cannot clip its gradient in mixed precision. Fix: --trainer.gradient_clip_val null, or "
    "--model.optimizer.fused false"
)
ONE_VALUE = (
    "batch norm needs more than one value of each channel, but at the net's coarsest level a batch is one pixel. Turn "
    "up data.batch_size or data.crop, or set --model.net.norm group"
)
NOT_DETERMINISTIC = (
    "--trainer.deterministic true: this net or loss uses a kernel without a deterministic version. Take another "
    "encoder (--config configs/model/unet_resnet34.yaml), or --trainer.deterministic warn"
)

#: Part of a library's error, in small letters -> exit status and message. The first that fits counts.
KNOWN = {
    "memory(shm)": (2, SHARED_MEMORY_FULL),
    "signal: bus error": (2, SHARED_MEMORY_FULL),
    "signal: killed": (2, WORKER_KILLED),
    "exited unexpectedly": (1, WORKER_DIED),
    "dataloader timed out": (1, "no batch came: a worker of the data loader hangs. Start again with --resume"),
    "too many open files": (2, "too many open files. Fix: ulimit -n 65536, or turn down data.num_workers"),
    "eaddrinuse": (2, "the port at which the processes meet is in use. Fix: unset MASTER_PORT, or set another"),
    "by peer": (1, LOST_PEER),  # gloo: connection closed, or reset
    "ncclremoteerror": (1, LOST_PEER),
    "nccl communicator was aborted": (1, LOST_PEER),
    "does not allow for gradient clipping": (2, FUSED),
    "expected more than 1 value per channel": (2, ONE_VALUE),
    "deterministic implementation": (2, NOT_DETERMINISTIC),
    "memoryerror": (2, OUT_OF_MEMORY),
    "out of memory": (2, OUT_OF_MEMORY),
    "allocate memory": (2, OUT_OF_MEMORY),
    "not enough memory": (2, OUT_OF_MEMORY),
    "alloc_failed": (2, OUT_OF_MEMORY),  # cuBLAS and cuDNN
}

#: Errors of a disk or a folder that the user can mend.
UNWRITABLE = ("ENOSPC", "EDQUOT", "EROFS", "EACCES", "EPERM", "ENAMETOOLONG", "EEXIST", "ENOTDIR", "EISDIR")


class Preempted(Exception):
    """The scheduler takes the machine away, and the run is saved. The message says where.

    Args:
        message: one line.
        last: what rank 0 does when all else is done; it returns what to add to the message. None on the other
            processes: these end with status 0, since srun kills the rest of a job when one of its tasks fails.
    """

    def __init__(self, message: str, last: Callable[[], str] | None) -> None:
        super().__init__(message)
        self.last = last


def run_job(job: str | Callable[[], object]) -> None:
    """Run the main function of a script and turn its outcome into an exit status and at most one line of error.

    After an error the process ends by `os._exit`: a rank that failed must not wait in a library's exit handler for the
    ranks that still run.

    Args:
        job: a function, or "module:function", which is imported here.
    """
    end_with_launcher()
    warnings.showwarning = show_warning
    try:
        function = pkgutil.resolve_name(job) if isinstance(job, str) else job
        function()
    except BaseException as error:
        status, line = outcome(error)
        if status and not line:  # a bug of ours
            raise
        if isinstance(error, Preempted) and error.last:
            line += error.last()
        if line:
            print(line, file=sys.stderr, flush=True)
        with suppress(OSError):  # a pipe whose reader has gone
            sys.stdout.flush()
        os._exit(status)


def outcome(error: BaseException) -> tuple[int, str]:
    """The exit status of an error, and the line to print; a bug of ours has none."""
    if isinstance(error, Preempted):
        if error.last is None:
            return 0, ""
        status = 0 if "WANDB_SWEEP_ID" in os.environ else 143  # a sweep's agent gives up after five failed runs
        return status, f"preempted: {error}. The same command, with --resume, goes on"
    if isinstance(error, InputError):
        # An error in a worker of the data loader holds that process's stack trace, then the message.
        message = error.args[0].rpartition("InputError: ")[2].strip()
        return 2, f"error: {readable(message)}"
    # Lightning leaves by sys.exit after Ctrl-C.
    if isinstance(error, KeyboardInterrupt) or isinstance(error.__context__, KeyboardInterrupt):
        return 130, "interrupted: finished files are kept. train.py goes on by --name and --resume, predict.py as it is"
    if isinstance(error, OSError) and errno.errorcode.get(error.errno or 0) in UNWRITABLE:
        fix = "Give another place, or make room, and run the same command again"
        if error.filename is None:
            fix += f". If there is room, shared memory is full. {ENLARGE_SHARED_MEMORY}"
        return 2, f"error: {error.filename or 'writing'}: {error.strerror}. {fix}"
    if isinstance(error, MemoryError | OSError | RuntimeError | ValueError):
        # The data loader names the signal that ended a worker in the cause of its error.
        words = f"{type(error).__name__} {error} {error.__cause__}".lower()
        for part, (status, message) in KNOWN.items():
            if part in words:
                reason = str(error).strip().rpartition("\n")[2]  # an error in a worker begins with its stack trace
                return status, f"error: {message} ({readable(reason)[:200]})"
    return 1, ""


def end_with_launcher() -> None:
    """Let the kernel kill this process with the torchrun or Lightning process that started it (Linux): else it would
    train on, and write into the run folder that the next start uses.

    The kernel sends nothing if the launcher is dead already, so that is checked too.
    """
    if "LOCAL_RANK" not in os.environ:
        os.environ["SEGMENTATION_LAUNCHER"] = str(os.getpid())  # for the processes that Lightning starts from here
        return
    if sys.platform != "linux":
        return
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    parent = os.getppid()
    if "TORCHELASTIC_RUN_ID" in os.environ:
        # Orphans get process 1 as parent. In a container that may be torchrun itself.
        orphan = parent == 1 and b"python" not in Path("/proc/1/cmdline").read_bytes()
    else:
        orphan = os.environ.get("SEGMENTATION_LAUNCHER", str(parent)) != str(parent)
    if orphan:
        os._exit(1)


def start_job() -> None:
    """Set up the process of a job: find the user's own classes in the current folder, keep memory, print little."""
    sys.path.append(os.getcwd())
    keep_freed_memory()
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")  # a log in latin-1 has no box characters
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    logging.getLogger("lightning.fabric").setLevel(logging.WARNING)
    logging.getLogger("matplotlib.font_manager").setLevel(logging.ERROR)
    for message in SMALL_TALK:
        warnings.filterwarnings("ignore", message)


def show_warning(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: TextIO | None = None,
    line: str | None = None,
) -> None:
    """Print a warning; one of this project in one line, without the place in the source."""
    text = f"warning: {message}\n"
    if PACKAGE not in Path(filename).parents:
        text = warnings.formatwarning(message, category, filename, lineno, line)
    print(text, end="", file=file or sys.stderr)


def keep_freed_memory() -> None:
    """On Linux, keep what a training step frees for the next one.

    By default glibc gives large blocks back at once, and the kernel clears them again for the next activation:
    `python benchmarks/nets.py --modes eager kept` shows what that costs.
    """
    with suppress(OSError, AttributeError):  # no glibc
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(ctypes.c_int(M_MMAP_MAX), ctypes.c_int(0))
        libc.mallopt(ctypes.c_int(M_TRIM_THRESHOLD), ctypes.c_int(2**31 - 1))


class JobParser(argparse.ArgumentParser):
    """The parser of the jobs after training: help from the docstring of the script, errors of one line.

    Args:
        script: name of the file in src/.
    """

    def __init__(self, script: str) -> None:
        source = (Path(__file__).parents[2] / f"{script}.py").read_text(encoding="utf-8")
        description, _, examples = source.split('"""')[1].partition("\n\n")
        super().__init__(
            prog=f"python src/{script}.py",
            description=description,
            epilog=examples,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )

    def error(self, message: str) -> NoReturn:
        options = [word.strip("[]") for word in self.format_usage().split() if "--" in word]
        for word in message.split():
            close = get_close_matches(word, options, n=1, cutoff=0.8)
            if close and word != close[0]:
                message += f" (did you mean {close[0]}?)"
        raise InputError(f"{message}. See --help")

    def add_checkpoint(self) -> None:
        """Add the options of every job that opens a checkpoint with its data."""
        self.add_argument(
            "checkpoint",
            metavar="CHECKPOINT",
            help="a .ckpt file of train.py, with the data's config; a folder of share.py; or hf://user/name",
        )
        self.add_argument("--data", metavar="OVERLAY", help="YAML whose data section replaces the checkpoint's")
        self.add_argument("--overwrite", action="store_true", help="replace results that are there")


def file_name(text: str) -> Path:
    """Type of an option that names a file to write."""
    if Path(text).name in ("", ".."):
        raise argparse.ArgumentTypeError(f"{text!r} is a folder: give the name of a file in it")
    return Path(text)


def refuse_existing(paths: list[Path], overwrite: bool) -> None:
    """Check the files to be written before any work is done.

    Raises:
        InputError: one is there already, unless told to overwrite; or it cannot be written.
    """
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.is_dir():
            raise InputError(f"{path} is a folder: give the name of a file")
    there = [str(path) for path in paths if path.exists()]
    if there and not overwrite:
        raise InputError(f"{', '.join(there)}: there already; give another place, or add --overwrite")
