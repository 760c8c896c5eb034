"""A run with W&B offline: exactly one run, with the expected keys, config and images; read from its own record."""

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from wandb.proto import wandb_internal_pb2

from conftest import TINY, train
from segmentation.errors import InputError
from segmentation.training.wandb_run import WandbOptions
from wandb_server import KEY, serve


def records(path: Path) -> Iterator[wandb_internal_pb2.Record]:
    """Records of a .wandb file: LevelDB's log format, 32 KiB blocks of (crc 4, length 2, kind 1, data)."""
    data, at, parts = path.read_bytes(), 7, b""  # the file's own header is 7 bytes
    while at + 7 <= len(data):
        if (left := 32768 - at % 32768) < 7:  # too little room for another header in this block
            at += left
            continue
        length, kind = int.from_bytes(data[at + 4 : at + 6], "little"), data[at + 6]
        parts += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # whole, or the last part
            record = wandb_internal_pb2.Record()
            record.ParseFromString(parts)
            parts = b""
            yield record


def read(path: Path) -> dict[str, Any]:
    """History keys, summary, config and identity of an offline run."""
    found: dict[str, Any] = {
        "history": set(),
        "summary": {},
        "config": {},
        "artifacts": [],
        "runs": set(),
        "metrics": {},
    }
    for record in records(path):
        kind = record.WhichOneof("record_type")
        if kind == "run":
            found["runs"].add(record.run.run_id)
            found["group"], found["tags"] = record.run.run_group, list(record.run.tags)
            found["config"] |= {item.key: json.loads(item.value_json) for item in record.run.config.update}
        elif kind == "config":
            found["config"] |= {
                item.key or item.nested_key[0]: json.loads(item.value_json) for item in record.config.update
            }
        elif kind == "history":
            found["history"] |= {item.key or item.nested_key[0] for item in record.history.item}
        elif kind == "summary":
            found["summary"] |= {
                item.key or ".".join(item.nested_key): item.value_json for item in record.summary.update
            }
        elif kind == "artifact":
            found["artifacts"].append((record.artifact.name, record.artifact.type))
        elif kind == "metric":
            found["metrics"][record.metric.name] = record.metric
    return found


def test_offline_run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    extra = [
        "--trainer.log_every_n_steps",
        "1",
        "--pictures.images",
        "2",
        "--wandb.group",
        "nets",
        "--wandb.tags",
        "[a,b]",
    ]
    train(*TINY, *extra, "--name", "run", "--wandb.log_checkpoint", "true")
    import wandb

    wandb.finish()
    found_records = list(Path("runs/run/wandb").glob("offline-run-*/*.wandb"))
    assert len(found_records) == 1
    for _ in range(40):  # W&B's own process writes, and on a busy machine later
        found = read(found_records[0])
        if "test/confusion" in found["history"]:
            break
        time.sleep(0.5)
    assert len(found["runs"]) == 1
    expected = {f"{s}/{k}" for s in ("train", "val", "test") for k in ("loss", "miou", "iou/disk", "pixel_accuracy")}
    expected |= {"train/images_per_second", "train/data_wait", "val/images", "test/images", "test/confusion", "epoch"}
    assert expected <= found["history"]
    assert any(key.startswith("lr-") for key in found["history"])
    assert found["metrics"]["val/miou"].summary.max
    assert found["artifacts"] == [("run", "model")]
    assert found["group"] == "nets"
    assert found["tags"] == ["a", "b"]
    config = found["config"]
    assert config["classes"] == ["background", *[c for c in config["classes"] if c != "background"]]
    assert config["model"]["net"]["init_args"]["widths"] == [4, 8]
    media = found_records[0].parent / "files/media/images"
    assert len(list((media / "val").glob("images_*.png"))) == 2 * 2
    assert len(list((media / "mask/val").glob("*.png"))) == 2 * 2 * 2


def test_resumed_run_is_one_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    train(*TINY, "--name", "run", "--trainer.max_epochs", "1")
    train(*TINY, "--name", "run", "--resume")
    ids = {path.stem.removeprefix("run-") for path in Path("runs/run/wandb").glob("offline-run-*/*.wandb")}
    assert len(ids) == 1


@pytest.mark.slow
def test_two_runs_of_one_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a notebook: each is a W&B run of its own; a name that W&B would refuse for an artifact is no obstacle."""
    monkeypatch.setenv("WANDB_MODE", "offline")
    names = ("one", "another run")
    for name in names:
        train(*TINY, "--name", name, "--trainer.max_epochs", "1", "--wandb.log_checkpoint", "true")
    ids = [[path.stem for path in Path("runs", name, "wandb").glob("offline-run-*/*.wandb")] for name in names]
    assert [len(each) for each in ids] == [1, 1]
    assert ids[0] != ids[1]


@pytest.mark.slow
def test_mode(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capfd: pytest.CaptureFixture) -> None:
    """Online only with a key that the server takes; WANDB_MODE counts; the config counts most."""
    import wandb

    wandb.teardown()  # it reads the environment once
    monkeypatch.delenv("WANDB_MODE")
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    with serve() as server:
        monkeypatch.setenv("WANDB_BASE_URL", server.url)
        assert WandbOptions().resolved_mode() == "offline"
        assert capfd.readouterr().out == ""  # nobody is logged in: nothing to tell
        with pytest.raises(InputError, match=r"no key for .* is at hand \(wandb login\)"):
            WandbOptions(mode="online").resolved_mode()
        address = server.url.removeprefix("http://")  # its port belongs to it
        (tmp_path / "netrc").write_text(f"machine {address} login user password {KEY}\n")
        assert WandbOptions().resolved_mode() == "online"
        wandb.teardown()  # whoever is logged in stays so in this process
        (tmp_path / "netrc").write_text(f"machine {address} login user password {KEY[1:]}1\n")
        assert WandbOptions().resolved_mode() == "offline"
        assert "refuses the key (wandb login --relogin): this run is offline" in capfd.readouterr().out
    for mode, meant in (("disabled", "disabled"), ("offline", "offline"), ("", "offline")):
        monkeypatch.setenv("WANDB_MODE", mode)
        assert WandbOptions().resolved_mode() == meant
    assert WandbOptions(mode="disabled").resolved_mode() == "disabled"
    for mode in ("shared", "foo"):
        monkeypatch.setenv("WANDB_MODE", mode)
        with pytest.raises(InputError, match=f"WANDB_MODE={mode} .* set it to online, offline or disabled"):
            WandbOptions(mode="offline").resolved_mode()
    wandb.teardown()
