"""Loggers beside metrics.csv and W&B, by overlays: what they were given is read back."""

import csv
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest
import yaml

from conftest import ROOT, TINY, train
from segmentation.errors import InputError

OVERLAYS = ROOT / "configs" / "logger"
RUN = [*TINY, "--pictures.images", "2", "--pictures.every_n_epochs", "1", "--wandb.mode", "disabled", "--name", "run"]


def logged(metric: str) -> list[float]:
    """The values of a metric in metrics.csv."""
    with Path("runs/run/metrics.csv").open(newline="") as file:
        return [float(row[metric]) for row in csv.DictReader(file) if row[metric]]


@pytest.mark.slow
def test_tensorboard(tmp_path: Path) -> None:
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    overlay = ["--config", str(OVERLAYS / "tensorboard.yaml")]
    train(*RUN, *overlay)
    train(*RUN, *overlay, "--resume", "--trainer.max_epochs", "3")
    found = events.EventAccumulator("runs/run/tensorboard", {events.SCALARS: 0, events.IMAGES: 0})
    found.Reload()
    assert len(list(Path("runs/run/tensorboard").glob("events*"))) > 1  # a part of the run each
    for metric in ("val/miou", "train/loss"):
        values = [event.value for event in found.Scalars(metric)]
        assert len(values) == 3
        assert values == pytest.approx(logged(metric)), metric
    assert found.Scalars("test/miou")[-1].value == pytest.approx(logged("test/miou")[-1])
    assert len(found.Images("val/images")) == 3
    (grid,) = found.Images("test/images")[-1:]
    assert grid.encoded_image_string.startswith(b"\x89PNG")
    assert found.Images("test/confusion")
    hparams = yaml.unsafe_load(Path("runs/run/tensorboard/hparams.yaml").read_text())
    assert hparams["model"]["net"]["class_path"].endswith("UNet")


@pytest.fixture
def server(tmp_path: Path) -> Iterator[str]:
    """A real MLflow server with a store in the test's folder."""
    pytest.importorskip("mlflow")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    words = [sys.executable, "-m", "mlflow", "server", "--port", str(port), "--workers", "1"]
    words += [
        "--backend-store-uri",
        f"sqlite:///{tmp_path}/store.db",
        "--artifacts-destination",
        str(tmp_path / "files"),
    ]
    url = f"http://127.0.0.1:{port}"
    with open("server.log", "w") as log, subprocess.Popen(words, stdout=log, stderr=log) as process:
        try:
            for _ in range(600):
                with suppress(OSError), urllib.request.urlopen(f"{url}/health") as answer:
                    if answer.status == 200:
                        break
                assert process.poll() is None, Path("server.log").read_text()
                time.sleep(0.2)
            yield url
        finally:
            process.terminate()


@pytest.mark.slow
def test_mlflow(server: str) -> None:
    from mlflow import MlflowClient

    overlay = yaml.safe_load((OVERLAYS / "mlflow.yaml").read_text())
    overlay["trainer"]["logger"]["init_args"]["tracking_uri"] = server
    Path("mine.yaml").write_text(yaml.safe_dump(overlay))
    train(*RUN, "--config", "mine.yaml")
    client = MlflowClient(server)
    experiment = client.get_experiment_by_name("unet-family")
    (found,) = client.search_runs([experiment.experiment_id])
    assert found.info.run_name == "run"
    assert found.info.status == "FINISHED"
    for metric in ("val/miou", "test/miou"):
        history = [each.value for each in client.get_metric_history(found.info.run_id, metric)]
        assert history == pytest.approx(logged(metric))
    assert "UNet" in found.data.params["model/net/class_path"]
    assert [file.path for file in client.list_artifacts(found.info.run_id, "test/images")] == ["test/images/test.png"]
    assert len(client.list_artifacts(found.info.run_id, "val/images")) == 2


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("false", "metrics.csv is always written.*configs/logger/tensorboard.yaml"),
        ("CometLogger", "cannot be used: Requirement .comet[^:]*HINT"),
        ("TensorBordLogger", "did you mean TensorBoardLogger"),
    ],
)
def test_what_is_no_logger_here(tmp_path: Path, given: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        train(*RUN, "--trainer.logger", given)
    assert not Path("runs/run").exists()
