"""A run with W&B offline: exactly one run, with the expected keys, config and images; read from its own record."""

import json
from pathlib import Path
from typing import Any

import pytest
from conftest import TINY, train
from wandb.proto import wandb_internal_pb2
from wandb.sdk.internal.datastore import DataStore

from segmentation.run import WandbOptions


def read(path: Path) -> dict[str, Any]:
    """History keys, summary, config and identity of an offline run."""
    store = DataStore()
    store.open_for_scan(str(path))
    found: dict[str, Any] = {"history": set(), "summary": {}, "config": {}, "runs": set(), "metrics": {}}
    while (data := store.scan_data()) is not None:
        record = wandb_internal_pb2.Record()
        record.ParseFromString(data)
        kind = record.WhichOneof("record_type")
        if kind == "run":
            found["runs"].add(record.run.run_id)
            found["group"], found["tags"] = record.run.run_group, list(record.run.tags)
            found["config"] |= {item.key: json.loads(item.value_json) for item in record.run.config.update}
        elif kind == "config":
            found["config"] |= {item.key or item.nested_key[0]: json.loads(item.value_json) for item in record.config.update}
        elif kind == "history":
            found["history"] |= {item.key or ".".join(item.nested_key) for item in record.history.item}
        elif kind == "summary":
            found["summary"] |= {item.key or ".".join(item.nested_key): item.value_json for item in record.summary.update}
        elif kind == "metric":
            found["metrics"][record.metric.name] = record.metric
    return found


def test_offline_run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    extra = ["--pictures.images", "2", "--wandb.group", "nets", "--wandb.tags", "[a,b]"]
    train(*TINY, *extra, "--name", "run")
    import wandb

    wandb.finish()
    records = list(Path("runs/run/wandb").glob("offline-run-*/*.wandb"))
    assert len(records) == 1
    found = read(records[0])
    assert len(found["runs"]) == 1
    expected = {f"{s}/{k}" for s in ("train", "val", "test") for k in ("loss", "miou", "iou/disk", "pixel_accuracy")}
    expected |= {"train/images_per_second", "val/images", "test/images", "test/confusion", "epoch"}
    assert expected <= found["history"]
    assert any(key.startswith("lr-") for key in found["history"])
    assert found["metrics"]["val/miou"].summary.max
    assert found["group"] == "nets"
    assert found["tags"] == ["a", "b"]
    config = found["config"]
    assert config["classes"] == ["background", *[c for c in config["classes"] if c != "background"]]
    assert config["model"]["net"]["init_args"]["widths"] == [4, 8]
    assert "git_commit" in config
    media = records[0].parent / "files/media/images"
    assert len(list((media / "val").glob("images_*.png"))) == 2 * 2
    assert len(list((media / "mask/val").glob("*.png"))) == 2 * 2 * 2


def test_resumed_run_is_one_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    import wandb

    train(*TINY, "--name", "run", "--trainer.max_epochs", "1")
    wandb.finish()
    train(*TINY, "--name", "run", "--resume")
    wandb.finish()
    ids = {path.stem.removeprefix("run-") for path in Path("runs/run/wandb").glob("offline-run-*/*.wandb")}
    assert len(ids) == 1


def test_mode(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Online only when a key is at hand; WANDB_MODE counts; the config counts most."""
    monkeypatch.delenv("WANDB_MODE")
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    assert WandbOptions().resolved_mode() == "offline"
    (tmp_path / "netrc").write_text("machine api.wandb.ai login user password 0123\n")
    assert WandbOptions().resolved_mode() == "online"
    monkeypatch.setenv("WANDB_MODE", "disabled")
    assert WandbOptions().resolved_mode() == "disabled"
    assert WandbOptions(mode="offline").resolved_mode() == "offline"
