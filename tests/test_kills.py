"""Real processes, real kills at seeded moments: nothing goes on alone, and the same command ends with the weights and
the metrics.csv of an unbroken run."""

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from uuid import uuid4

import pytest
import torch

from conftest import ROOT, TINY, train
from test_resume import table, weights

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform != "linux", reason="reads /proc, and asks the kernel to end orphans"),
]

#: Steps for half a minute, a checkpoint every second: each kill hits another place, in the middle of an epoch too.
RUN = [*TINY, "--data.dataset.train", "160", "--checkpoint.every_minutes", "0.02"]


class Started:
    """`python src/train.py` by a launcher, and all processes that come of it, known by a word in their environment."""

    def __init__(self, launcher: list[str], *args: str, **env: str) -> None:
        self.word, self.begun = uuid4().hex, time.time()
        command = [sys.executable, *launcher, str(ROOT / "src/train.py"), *RUN, *args, "--resume"]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "FAMILY": self.word, **env}
        with open("out.txt", "w") as out, open("err.txt", "w") as err:
            self.process = subprocess.Popen(
                command, stdout=out, stderr=err, text=True, env=environment, start_new_session=True
            )

    def family(self) -> dict[int, dict[str, str]]:
        """Environment of each process alive, with its parent's id as PARENT."""
        found = {}
        for folder in Path("/proc").glob("[0-9]*"):
            try:
                lines = (folder / "environ").read_bytes().decode(errors="replace").split("\0")
                env = dict(line.partition("=")[::2] for line in lines)
                state, parent = (folder / "stat").read_text().rpartition(")")[2].split()[:2]
            except OSError:
                continue  # gone meanwhile
            if env.get("FAMILY") == self.word and state != "Z":
                found[int(folder.name)] = {**env, "PARENT": parent}
        return found

    def rank(self, number: int) -> int:
        """Process id of a rank that this launcher has started."""
        started = {pid: env for pid, env in self.family().items() if int(env["PARENT"]) == self.process.pid}
        return next(pid for pid, env in started.items() if env.get("LOCAL_RANK") == str(number))

    def ends_within(self, seconds: float) -> str:
        """Wait until no process is left, and return what they wrote to standard error."""
        end = time.monotonic() + seconds
        while self.process.poll() is None or self.family():  # just after its start /proc shows no environment yet
            if time.monotonic() > end:
                left, text = self.family(), Path("err.txt").read_text()
                self.kill()
                raise AssertionError(f"still alive after {seconds} s: {list(left)}\n{text}")
            time.sleep(0.1)
        return Path("err.txt").read_text()

    def kill(self) -> None:
        for pid in self.family():
            os.kill(pid, signal.SIGKILL)


def wait_for_steps(name: str, started: Started) -> None:
    """Until this start of the run has saved a checkpoint."""
    last, end = Path("runs") / name / "checkpoints/last.ckpt", time.monotonic() + 90
    while not (last.exists() and last.stat().st_mtime > started.begun):
        assert started.process.poll() is None, Path("err.txt").read_text()
        assert time.monotonic() < end, f"no new {last}\n{Path('out.txt').read_text()}"
        time.sleep(0.05)


def assert_same(name: str, other: str) -> None:
    a, b = weights(name), weights(other)
    assert a.keys() == b.keys()
    assert all(torch.equal(a[key], b[key]) for key in a)
    for row, expected in zip(table(name), table(other), strict=True):
        loss, expected_loss = (float(each.pop("train/loss", 0)) for each in (row, expected))
        assert loss == pytest.approx(expected_loss, rel=1e-6)  # a sum of floats, which processes share in another order
        assert row == expected


def test_sudden_deaths() -> None:
    """SIGKILL of all processes, as a power cut would, at a seeded random moment after a new checkpoint, five times."""
    rng, longer = random.Random(0), ["--name", "run", "--trainer.max_epochs", "40"]
    for _ in range(5):
        started = Started([], *longer)
        wait_for_steps("run", started)
        time.sleep(rng.uniform(0, 1))
        assert started.process.poll() is None, "the run ended before its fifth death: give it more epochs"
        started.kill()
        started.process.wait()
    Started([], *longer).ends_within(240)
    train(*RUN, *longer[2:], "--name", "whole")
    assert_same("run", "whole")


TORCHRUN = ["-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port"]


@pytest.mark.parametrize("launcher", ["plain", "torchrun"])
def test_death_of_one_process_of_two(launcher: str) -> None:
    """Whichever process dies, the others end within seconds, none is left behind, and somebody says so."""
    rng = random.Random(launcher)
    # Long enough not to be done by the third kill, however quick the machine.
    args = ["--trainer.devices", "2", "--data.num_workers", "1", "--trainer.max_epochs", "30"]

    def start(name: str) -> Started:
        port = [*TORCHRUN, str(rng.randint(20000, 30000))] if launcher == "torchrun" else []
        return Started(port, *args, "--name", name)

    for victim in ("rank 1", "rank 0", "launcher")[: 2 if launcher == "plain" else 3]:  # plain: rank 0 is the launcher
        started = start("run")
        wait_for_steps("run", started)
        time.sleep(rng.uniform(0, 1.5))
        mine = victim == "launcher" or (launcher == "plain" and victim == "rank 0")
        os.kill(started.process.pid if mine else started.rank(int(victim[-1])), signal.SIGKILL)
        said = started.ends_within(30)
        if not mine:  # who is killed says nothing
            assert "Start again with --resume" in said
            assert started.process.returncode != 0
    start("run").ends_within(120)
    start("whole").ends_within(120)
    assert_same("run", "whole")


#: `src/train.py` that dies the moment its first worker exists, whose start takes a while.
DIES_AT_FORK = f"""
import os, runpy, signal, sys, time
os.register_at_fork(
    after_in_child=lambda: time.sleep(2),
    after_in_parent=lambda: os.kill(os.getpid(), signal.SIGKILL),
)
sys.argv = sys.argv[1:]
sys.path.insert(0, {str(ROOT / "src")!r})
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def test_death_in_the_start_of_a_worker() -> None:
    Path("dies.py").write_text(DIES_AT_FORK)
    started = Started(["dies.py"], "--data.num_workers", "1", "--name", "run")
    started.process.wait(60)
    assert started.process.returncode == -signal.SIGKILL
    assert started.family(), "no worker has outlived it"
    started.ends_within(15)


@pytest.mark.parametrize("launcher", ["plain", "torchrun"])
def test_death_of_the_launcher_before_the_first_step(launcher: str) -> None:
    """The others are importing torch, or wait for it to meet them."""
    rng = random.Random(launcher)
    for seconds in (0.0, 0.05, rng.uniform(0.5, 2), rng.uniform(2, 6)):
        port = [*TORCHRUN, str(rng.randint(20000, 30000))] if launcher == "torchrun" else []
        started = Started(port, "--trainer.devices", "2", "--data.num_workers", "1", "--name", "run")
        end = time.monotonic() + 60
        while not any("LOCAL_RANK" in env for env in started.family().values()):
            assert time.monotonic() < end
            time.sleep(0.01)
        time.sleep(seconds)
        os.kill(started.process.pid, signal.SIGKILL)
        started.ends_within(5)


def test_a_signal_to_every_process() -> None:
    """As SLURM's scancel does, which finds workers of the loader and W&B's own process, too."""
    args = ["--data.num_workers", "1", "--trainer.max_epochs", "40", "--trainer.log_every_n_steps", "1"]
    started = Started([], *args, "--name", "run", WANDB_MODE="offline")
    wait_for_steps("run", started)
    family = started.family()
    assert len(family) >= 3  # the run, a worker, W&B
    for pid in family:
        os.kill(pid, signal.SIGTERM)
    said = started.ends_within(60)
    assert started.process.returncode == 143, said
    assert "Traceback" not in said
    assert said.strip().splitlines()[-1].startswith("preempted: stopped by a signal at step ")


def test_a_signal_to_one_process_of_two() -> None:
    """Both finish the step, which takes four batches here, save, and stop; then they go on."""
    args = ["--trainer.devices", "2", "--trainer.accumulate_grad_batches", "4", "--trainer.max_epochs", "8"]
    started = Started([], *args, "--name", "run")
    wait_for_steps("run", started)
    os.kill(started.rank(1), signal.SIGUSR1)
    said = started.ends_within(60)
    assert started.process.returncode == 143
    assert said.strip().splitlines()[-1].startswith("preempted: stopped by a signal at step ")
    assert "Traceback" not in said
    for name in ("run", "whole"):
        Started([], *args, "--name", name).ends_within(120)
    assert_same("run", "whole")


def test_death_of_a_node() -> None:
    """Two torchrun agents, as on two nodes: one dies with all it started, the other ends too."""
    port, args = str(random.randint(20000, 30000)), ["--trainer.num_nodes", "2", "--trainer.max_epochs", "8"]
    node = ["-m", "torch.distributed.run", "--nnodes", "2", "--nproc-per-node", "1", "--rdzv-backend", "c10d"]
    node += ["--rdzv-endpoint", f"127.0.0.1:{port}", "--rdzv-id", "two"]

    def both(name: str) -> tuple[Started, Started]:
        return tuple(Started(node, *args, "--name", name) for _ in range(2))

    one, other = both("run")
    wait_for_steps("run", one)
    other.kill()
    other.process.wait()
    one.ends_within(60)
    assert one.process.returncode != 0
    for name in ("run", "whole"):
        for started in both(name):
            started.ends_within(120)
    assert_same("run", "whole")


@pytest.fixture
def small_disk() -> Iterator[Path]:
    """`runs/` on a file system of 8 MB, or a skip."""
    runs = Path("runs")
    runs.mkdir()
    if subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", runs.resolve()], capture_output=True
    ).returncode:
        pytest.skip("may not mount a file system here")
    yield runs.resolve()
    subprocess.run(["umount", "-l", runs.resolve()], check=True)


def test_full_disk(small_disk: Path) -> None:
    """One line, and the last good checkpoint intact; with room again the same command goes on."""
    args = ["--name", "run", "--trainer.max_epochs", "10"]
    started = Started([], *args, WANDB_MODE="offline")
    wait_for_steps("run", started)
    filler = small_disk / "filler"
    with pytest.raises(OSError, match="No space left"):
        filler.write_bytes(bytes(8 * 2**20))
    said = started.ends_within(60).strip().splitlines()
    assert started.process.returncode == 2
    assert said[-1].startswith("error: ")
    assert "make room" in said[-1]
    assert weights("run")  # it loads
    filler.unlink()
    for name in ("run", "whole"):
        Started([], "--name", name, *args[2:]).ends_within(120)
    assert_same("run", "whole")


@pytest.mark.parametrize("size", ["4k", "64k", "600k"])
def test_full_shared_memory(size: str) -> None:
    """As in a container of Docker, which has 64 MB of it: for the queues of the workers, for a batch, for several."""
    own = ["unshare", "--mount", "sh", "-c"]
    if subprocess.run([*own, "true"], capture_output=True).returncode:
        pytest.skip("may not mount a file system here")
    mounted = f'mount -t tmpfs -o size={size} tmpfs /dev/shm && echo > /dev/shm/one && exec "$@"'
    # batches of 8 images of 128 x 128: 0.6 MB
    run = [*RUN, "--data.num_workers", "2", "--data.dataset.size", "128", "--data.batch_size", "8", "--name", "run"]
    command = [*own, mounted, "sh", sys.executable, str(ROOT / "src/train.py"), *run]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    assert "--shm-size" in done.stderr.strip().splitlines()[-1]


def test_two_writers_of_one_run() -> None:
    """The second start of a run that still goes on is refused, and the first takes no harm."""
    endless = ["--name", "run", "--trainer.max_epochs", "4000"]
    first = Started([], *endless)
    try:
        wait_for_steps("run", first)
        second = subprocess.run(
            [sys.executable, str(ROOT / "src/train.py"), *RUN, *endless, "--resume"],
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert second.returncode == 2
        assert f"process {first.process.pid} on " in second.stderr
        first.process.terminate()
        first.ends_within(60)
        assert first.process.returncode == 143
    finally:
        first.kill()


HANGS = """
import time
from torch.utils.data import get_worker_info
from segmentation.data import ShapesData


class Hangs(ShapesData):
    def load(self, split, index):
        if get_worker_info() and split == "train":
            time.sleep(1000)
        return super().load(split, index)
"""


def test_a_worker_hangs() -> None:
    """No batch for as long as is waited for one, here three seconds: a line, and the end."""
    Path("my_data.py").write_text(HANGS)
    train = "import segmentation.data.datamodule as m; m.PATIENCE = 3.0; import segmentation.training.entry as e; "
    train += "e.run_job('segmentation.training.cli:train')"
    args = [*TINY, "--data.num_workers", "1", "--data.dataset", "my_data.Hangs", "--name", "run"]
    done = subprocess.run(
        [sys.executable, "-c", train, *args],
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, "PYTHONPATH": str(ROOT / "src")},
    )
    assert done.returncode == 1, done.stderr
    assert done.stderr.strip().splitlines()[-1].startswith("error: no batch came")
