"""Runs against a W&B server, one that is not there, and one that goes away: what it is told, and what a user reads."""

import itertools
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from conftest import ROOT, TINY, script
from segmentation.errors import InputError
from segmentation.training.wandb_run import WandbOptions
from wandb_server import KEY, Run, Server, serve

ROWS = [*TINY, "--trainer.log_every_n_steps", "1"]
#: Many seconds of them.
LONG = [*ROWS, "--data.dataset.train", "160", "--trainer.max_epochs", "200"]
QUICK = {
    "WANDB_FINISH_TIMEOUT": "5",
    "WANDB__FILE_STREAM_TRANSMIT_INTERVAL": "1",
    "WANDB__TRANSACTION_LOG_FLUSH_INTERVAL": "1",
}


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    """A server that is W&B to this test's processes; they are logged in to it."""
    for key in [key for key in os.environ if key.startswith("WANDB_")]:
        monkeypatch.delenv(key)
    with serve() as server:
        for key, value in {"WANDB_BASE_URL": server.url, "WANDB_API_KEY": KEY, "OMP_NUM_THREADS": "1", **QUICK}.items():
            monkeypatch.setenv(key, value)
        yield server


def start(*args: str, **env: str) -> subprocess.Popen:
    """`python src/train.py *args`, under way, in a process group of its own."""
    command = [sys.executable, str(ROOT / "src/train.py"), *args]
    pipe = subprocess.PIPE
    return subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=pipe,
        stderr=pipe,
        text=True,
        env={**os.environ, **env},
        start_new_session=True,
    )


def until(met: object, seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not met():
        assert time.monotonic() < end, "it never came"
        time.sleep(0.1)


def sync(*args: str, **env: str) -> subprocess.CompletedProcess:
    command = ["bash", str(ROOT / "slurm/sync.sh"), *args]
    return subprocess.run(command, capture_output=True, text=True, env={**os.environ, **env}, timeout=120)


def only(server: Server) -> Run:
    """The one run that the server has."""
    (run,) = server.runs.values()
    return run


def whole(run: Run) -> bool:
    """Whether its rows follow one another, none lost."""
    return list(run.rows) == list(range(len(run.rows)))


@pytest.mark.slow
def test_two_processes_are_one_run(server: Server) -> None:
    """Online, under the names that the environment gives."""
    names = {"WANDB_PROJECT": "cells", "WANDB_ENTITY": "lab", "WANDB_RUN_GROUP": "nets", "WANDB_TAGS": "a,b"}
    done = script("train", *ROWS, "--trainer.devices", "2", **names, WANDB_NAME="first try", timeout=180)
    assert (done.returncode, done.stderr) == (0, "")
    assert f"W&B       {server.url}/lab/cells/runs/" in done.stdout
    run = only(server)
    assert run.exitcode == 0
    assert {"val/miou", "test/miou", "train/loss"} <= set().union(*run.history)
    summary = json.loads(next(Path("runs").glob("*/summary.json")).read_text())
    assert run.summary["test/miou"] == pytest.approx(summary["test/miou"])
    told = {"project": "cells", "entity": "lab", "groupName": "nets", "tags": ["a", "b"], "displayName": "first try"}
    assert told.items() <= run.told.items()


@pytest.mark.slow
def test_config_counts_more_than_the_environment(server: Server) -> None:
    names = {"WANDB_PROJECT": "cells", "WANDB_NAME": "first try", "WANDB_RUN_ID": "abcd", "WANDB_DIR": "elsewhere"}
    options = ["--wandb.project", "mine", "--name", "run", "--trainer.max_epochs", "1"]
    done = script("train", *TINY, *options, **names)
    assert (done.returncode, done.stderr) == (0, "")
    assert list(server.runs) == ["abcd"]
    assert {"project": "mine", "displayName": "run"}.items() <= only(server).told.items()
    assert len(list(Path("elsewhere/wandb").glob("run-*-abcd"))) == 1


@pytest.fixture(params=["unknown", "closed", "silent"])
def nobody(request: pytest.FixtureRequest) -> Iterator[str]:
    """An address where nobody listens; one that takes calls and never answers; one that is none."""
    import wandb

    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        if request.param == "silent":
            listener.listen()
        host = "nobody.invalid" if request.param == "unknown" else "127.0.0.1"
        yield f"http://{host}:{listener.getsockname()[1]}"
    wandb.teardown()  # only now: its process waits for an answer as long as there is a connection


@pytest.mark.slow
@pytest.mark.usefixtures("server")
def test_without_an_answer(nobody: str, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture) -> None:
    """Offline, and said so, where W&B is not asked for by name."""
    import wandb

    wandb.teardown()  # it reads the environment once
    monkeypatch.setenv("WANDB_BASE_URL", nobody)
    begun = time.monotonic()
    assert WandbOptions().resolved_mode() == "offline"
    out, err = capfd.readouterr()
    assert out.startswith(f"W&B       {nobody} does not answer")
    assert out.endswith("this run is offline, and slurm/sync.sh uploads it later\n")
    assert (out.count("\n"), err) == (1, "")
    with pytest.raises(InputError, match=r"does not answer.* To go on without: --wandb.mode offline"):
        WandbOptions(mode="online").resolved_mode()
    monkeypatch.setenv("WANDB_MODE", "online")
    with pytest.raises(InputError, match="does not answer"):
        WandbOptions().resolved_mode()
    assert time.monotonic() - begun < 60


@pytest.mark.slow
def test_a_run_without_an_answer(server: Server) -> None:
    server.down = True
    done = script("train", *TINY, "--name", "run", timeout=120)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith(f"W&B       {server.url} does not answer")
    refused = script("train", *TINY, "--name", "other", "--wandb.mode", "online", timeout=60)
    assert refused.returncode == 2
    assert re.fullmatch("error: W&B is to be online, but .* does not answer.*\n", refused.stderr)
    failed = sync(WANDB__GRAPHQL_RETRY_MAX="1")
    assert failed.returncode == 1
    assert re.fullmatch(r"error: runs/run/wandb/offline-run-.*\.wandb: .*\n", failed.stderr)
    server.down = False
    assert sync().stdout == "runs/run: 1 piece(s), 1 uploaded, 0 empty\n"
    assert "test/miou" in only(server).summary


@pytest.mark.slow
@pytest.mark.parametrize("number", [None, signal.SIGINT, signal.SIGTERM])
def test_server_goes_away(server: Server, number: signal.Signals | None) -> None:
    """In mid-run, for good: training goes on, the end waits no longer than it is told to, and nothing is lost."""
    process = start(*LONG, "--trainer.max_epochs", "2" if number is None else "200", "--name", "run")
    until(lambda: server.runs and only(server).rows)
    server.down = True
    until(Path("runs/run/checkpoints/last.ckpt").exists)
    if number:
        process.send_signal(number)
    begun = time.monotonic()
    out, err = process.communicate(timeout=90)
    assert time.monotonic() - begun < 60
    assert process.returncode == {None: 0, signal.SIGINT: 130, signal.SIGTERM: 143}[number]
    assert len(err.splitlines()) == (number is not None)
    assert out.endswith("W&B       the server has not taken all of the run: slurm/sync.sh uploads the rest\n")
    before = len(only(server).rows)
    server.down = False
    assert sync("runs/run").stdout == "runs/run: 1 piece(s), 1 uploaded, 0 empty\n"
    assert len(only(server).rows) > before
    assert whole(only(server))
    assert ("test/miou" in only(server).summary) == (number is None)
    assert sync("runs/run").stdout == "runs/run: 1 piece(s), 0 uploaded, 0 empty\n"


@pytest.mark.slow
def test_sync(server: Server) -> None:
    """A run while it is written; then stopped, and requeued; a record that is empty and one that is spoilt."""
    options = [*LONG, "--name", "run", "--resume", "--trainer.check_val_every_n_epoch", "1000"]
    process = start(*options, WANDB_MODE="offline")
    until(lambda: sync("runs/run").returncode == 0 and server.runs and only(server).rows)
    rows = len(only(server).rows)
    until(lambda: sync("runs/run").returncode == 0 and len(only(server).rows) > rows)
    assert whole(only(server))
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 143, out + err
    assert sync().stdout == "runs/run: 1 piece(s), 1 uploaded, 0 empty\n"
    rows, received = len(only(server).rows), only(server).received

    process = start(*options, WANDB_MODE="offline")
    begun = time.time()
    last = Path("runs/run/checkpoints/last.ckpt")
    until(lambda: last.stat().st_mtime > begun)  # an epoch's end
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 143, out + err
    for name in ("run/wandb/offline-run-20200101_000000-x", "spoilt/wandb/offline-run-20200101_000000-y"):
        Path("runs", name).mkdir(parents=True)
    Path("runs/run/wandb/offline-run-20200101_000000-x/run-x.wandb").touch()
    Path("runs/spoilt/wandb/offline-run-20200101_000000-y/run-y.wandb").write_text(1000 * "no record")
    for uploaded in (1, 0):
        done = sync("runs/spoilt", "runs/run")
        assert done.returncode == 1
        assert re.fullmatch("error: runs/spoilt/.*Failed to read.*\n", done.stderr)
        assert done.stdout.splitlines()[-1] == f"runs/run: 3 piece(s), {uploaded} uploaded, 1 empty"
        run = only(server)
        assert whole(run)
        assert len(run.rows) > rows
        assert run.received - received == len(run.rows) - rows  # of the first piece nothing went again
    steps = [row["trainer/global_step"] for row in run.history if "trainer/global_step" in row]
    assert all(b >= a for a, b in itertools.pairwise(steps))


@pytest.mark.slow
def test_sweep(server: Server) -> None:
    """`wandb sweep` and `wandb agent` with configs/sweep.yaml, on small images: two runs, and one stopped early."""
    Path("src").symlink_to(ROOT / "src")
    sweep = yaml.safe_load((ROOT / "configs/sweep.yaml").read_text())
    data = sweep["command"].index("--config")
    sweep["command"][data : data + 2] = ROWS
    Path("sweep.yaml").write_text(yaml.safe_dump(sweep))
    made = subprocess.run(
        ["wandb", "sweep", "--project", "p", "sweep.yaml"], capture_output=True, text=True, timeout=60
    )
    assert "wandb agent someone/p/swept" in made.stderr
    longer = {"trainer.max_epochs": 200, "data.dataset.train": 160}
    chosen = [("UNetPlusPlus", 0.001, "Dice", {}), ("UNet", 0.002, "Focal", {}), ("UNet", 0.003, "Dice", longer)]
    for name, (*values, more) in zip(("one", "two", "three"), chosen, strict=True):
        values = {**dict(zip(sweep["parameters"], values, strict=True)), **more}
        args = {key: {"value": value} for key, value in values.items()}
        server.commands.append([{"type": "run", "run_id": name, "program": sweep["program"], "args": args}])
    with Path("agent.txt").open("w") as said:
        agent = subprocess.Popen(
            ["wandb", "agent", "someone/p/swept"], stdout=said, stderr=said, start_new_session=True
        )
        until(lambda: "three" in server.runs and any("val/miou" in row for row in server.runs["three"].history), 200)
        server.runs["three"].stop = True
        assert agent.wait(60) == 0
    assert "Traceback" not in Path("agent.txt").read_text()
    assert [path.name for path in sorted(Path("runs").iterdir())] == ["sweep-one", "sweep-three", "sweep-two"]
    assert list(server.runs) == ["one", "two", "three"]
    for (name, run), (net, rate, loss, _) in zip(server.runs.items(), chosen, strict=True):
        assert run.told["sweep"] == "swept"
        assert run.config["model"]["net"]["class_path"].endswith(f".{net}")
        assert run.config["model"]["loss"]["class_path"].endswith(f".{loss}")
        assert run.config["model"]["optimizer"]["init_args"]["lr"] == rate
        assert run.exitcode == 0  # the stopped one too: an agent gives up after five that failed
        assert any("val/miou" in row for row in run.history)
        assert Path(f"runs/sweep-{name}/checkpoints/last.ckpt").exists()
        assert Path(f"runs/sweep-{name}/wandb/run_id").read_text() == f"{name}\n"
        assert Path(f"runs/sweep-{name}/summary.json").exists() == (name != "three")
