"""A scheduler's signals: the run saves, stops, and goes on as if nothing had been. What starts it fits its options."""

import os
import shutil
import signal
import subprocess
import sys
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback

from conftest import ROOT, TINY, train
from segmentation.errors import InputError
from segmentation.training.cli import SegmentationCLI
from segmentation.training.entry import Preempted
from segmentation.training.preemption import check_launch, check_processes
from segmentation.training.trainer import make_trainer

#: A minute of steps, were it not for the kills: slow enough to be hit, in the middle of an epoch too.
RUN = [*TINY, "--trainer.max_epochs", "4", "--data.dataset.train", "160", "--checkpoint.every_minutes", "0.02"]


def start(name: str, *args: str, **env: str) -> subprocess.Popen:
    command = [sys.executable, str(ROOT / "src/train.py"), *RUN, "--name", name, "--resume", *args]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **env}
    pipe = subprocess.PIPE
    return subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True, env=environment, start_new_session=True)


def weights(name: str) -> dict[str, torch.Tensor]:
    return torch.load(Path("runs") / name / "checkpoints/last.ckpt", weights_only=True)["state_dict"]


def wait_for(path: Path, seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not path.exists():
        assert time.monotonic() < end, f"{path} never came"
        time.sleep(0.02)


def same(name: str, other: str) -> bool:
    a, b = weights(name), weights(other)
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGTERM], ids=lambda n: n.name)
def test_a_signal_saves_and_stops(number: signal.Signals) -> None:
    """To the whole group, as schedulers do: workers of the loader get it too."""
    workers = ["--data.num_workers", "1"]
    process = start("run", *workers, WANDB_MODE="offline")  # it too must be closed without a word
    wait_for(Path("runs/run/checkpoints/last.ckpt"))
    time.sleep(0.3)
    os.killpg(process.pid, number)
    stdout, stderr = process.communicate(timeout=60)
    assert process.returncode == 143, stdout + stderr
    assert stderr.strip().splitlines()[-1].startswith("preempted: stopped by a signal at step ")
    assert "Traceback" not in stderr
    step = torch.load("runs/run/checkpoints/last.ckpt", weights_only=True)["global_step"]
    assert f"at step {step}," in stderr
    assert start("run", *workers, WANDB_MODE="offline").wait(120) == 0
    pieces = [path.name.rpartition("-")[2] for path in Path("runs/run/wandb").glob("offline-run-*")]
    assert len(pieces) == 2
    assert len(set(pieces)) == 1  # one W&B run
    train(*RUN, *workers, "--name", "whole")
    assert same("run", "whole")


@pytest.mark.parametrize(("sanity_check", "step"), [(True, 1), (False, 3)])
def test_a_signal_in_a_validation(sanity_check: bool, step: int) -> None:
    """Lightning's own handler would end the run in the sanity check with status 0, or wait for the other processes. A
    short validation is finished, so that the epoch's best checkpoint is known."""

    class Signal(Callback):
        def on_validation_start(self, trainer: Any, pl_module: Any) -> None:
            if trainer.sanity_checking == sanity_check:
                os.kill(os.getpid(), signal.SIGTERM)

    cli = SegmentationCLI([*TINY, "--name", "run"])
    cli.trainer.callbacks.insert(0, Signal())
    with pytest.raises(Preempted, match=f"at step {step},"):
        cli.run()


def test_a_kill_that_follows_the_warning_still_requeues(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """SLURM sends SIGUSR1, and SIGTERM when the time is up."""

    class Signals(Callback):
        def on_train_batch_start(self, *args: Any) -> None:
            os.kill(os.getpid(), signal.SIGUSR1)
            os.kill(os.getpid(), signal.SIGTERM)

    scontrol = tmp_path / "bin/scontrol"
    scontrol.parent.mkdir()
    scontrol.write_text(f'#!/bin/sh\necho "$@" > {tmp_path}/asked\n')
    scontrol.chmod(0o755)
    monkeypatch.setenv("PATH", f"{scontrol.parent}:{os.environ['PATH']}")
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    cli = SegmentationCLI([*TINY, "--name", "run"])
    cli.trainer.callbacks.insert(0, Signals())
    with pytest.raises(Preempted, match="at step 1,") as stopped:
        cli.run()
    assert stopped.value.last() == "; job 7 is requeued"
    assert (tmp_path / "asked").read_text() == "requeue 7\n"


def test_a_process_that_would_wait_for_others(monkeypatch: pytest.MonkeyPatch) -> None:
    check_launch(1)
    with monkeypatch.context() as env:
        with pytest.raises(InputError, match=r"--trainer.num_nodes 1, or start by slurm/train.sbatch"):
            check_launch(2)
        env.setenv("MASTER_ADDR", "127.0.0.1")  # started by hand on each node, or by torchrun
        check_launch(2)
    for key, value in (("SLURM_NTASKS", "4"), ("SLURM_PROCID", "0"), ("SLURM_JOB_NAME", "x")):
        monkeypatch.setenv(key, value)
    with pytest.raises(InputError, match=r"4 tasks, but the script starts one.* Fix: srun python"):
        check_launch(2)
    for key in ("SLURM_STEP_ID", "TORCHELASTIC_RUN_ID"):  # by srun, or by torchrun
        with monkeypatch.context() as env:
            env.setenv(key, "0")
            check_launch(2)
    monkeypatch.setenv("SLURM_JOB_NAME", "interactive")
    check_launch(1)


PEER = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29999", "RANK": "0", "LOCAL_RANK": "0", "GROUP_RANK": "0"}
TORCHRUN = {**PEER, "TORCHELASTIC_RUN_ID": "x", "WORLD_SIZE": "4"}
TASK = {"SLURM_NTASKS": "4", "SLURM_NNODES": "2", "SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NODEID": "0"}
JOB = {**TASK, "SLURM_NTASKS_PER_NODE": "2", "SLURM_JOB_NAME": "x", "SLURM_STEP_ID": "0"}


@pytest.mark.parametrize(
    ("env", "devices", "num_nodes", "words"),
    [
        (TORCHRUN, 2, 2, None),
        (TORCHRUN, 1, 1, "4 processes are started.* is 1"),
        (TORCHRUN, 4, 2, "4 processes are started.* is 8"),
        (JOB, 2, 2, None),
        (JOB, 2, 1, "4 processes are started.* is 2"),
        (TASK, 2, 2, "Use `--ntasks-per-node=4`"),
        ({**JOB, "SLURM_NTASKS": "1"}, 1, 1, None),  # srun --ntasks=1 in a job of more
        ({**JOB, "SLURM_JOB_NAME": "interactive"}, 1, 1, None),
    ],
)
def test_processes_and_trainer_must_agree(
    env: dict[str, str], devices: int, num_nodes: int, words: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    for key, value in env.items():
        monkeypatch.setenv(key, value)
    options = {"accelerator": "cpu", "devices": devices, "num_nodes": num_nodes, "logger": False}
    with pytest.raises(InputError, match=words) if words else nullcontext():
        check_processes(make_trainer(**options))


def test_after_a_run_signals_do_what_they_did_before() -> None:
    """In a notebook, which a later SIGTERM must be able to end."""
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1)}
    train(*TINY, "--name", "run", "--trainer.max_epochs", "1")
    assert {number: signal.getsignal(number) for number in before} == before


@pytest.mark.skipif(not shutil.which("bash"), reason="no bash")
@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("--model.net UNet --wandb.tags '[a, b]'", ["--model.net", "UNet", "--wandb.tags", "[a, b]"]),
        ("--data.dataset.root /it's/here", None),
        ("", None),
    ],
)
def test_a_line_of_a_sweep(line: str, expected: list[str] | None, tmp_path: Path) -> None:
    """array.sbatch gives srun the words of its line as a shell would split them, or says what is wrong with it."""
    (tmp_path / "lines.txt").write_text(f"--first\n{line}\n")
    (tmp_path / "srun").write_text('#!/bin/bash\nprintf "%s\\n" "$@"\n')
    (tmp_path / "srun").chmod(0o755)
    slurm = {"SLURM_SUBMIT_DIR": str(tmp_path), "SLURM_ARRAY_TASK_ID": "2", "SLURM_JOB_NUM_NODES": "1"}
    env = {**os.environ, **slurm, "SLURM_NTASKS_PER_NODE": "1", "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    command = ["bash", str(ROOT / "slurm/array.sbatch"), "lines.txt", "--wandb.group", "all"]
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    if expected is None:
        assert done.returncode == 2
        assert done.stderr.startswith("error: ")
    else:
        words = done.stdout.splitlines()
        assert words[words.index("--name") :] == ["--name", "lines-2", "--resume", "--wandb.group", "all", *expected]
