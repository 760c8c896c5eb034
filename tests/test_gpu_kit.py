"""benchmarks/gpu.sh: every step in a small size, on a CPU; stopped by the time, and going on."""

import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import yaml

from conftest import ROOT
from test_benchmarks import table
from test_configs import fake_data

TINY = [*("--data.crop", "32", "--data.batch_size", "4", "--data.num_workers", "1", "--pictures.images", "0")]
TINY += ["--model.net.widths", "[4,8]", "--model.compile", "false"]


def kit(*args: str, **env: str) -> subprocess.CompletedProcess:
    """`benchmarks/gpu.sh ARGS`, without a GPU."""
    own = {"PYTHON": sys.executable, "OMP_NUM_THREADS": "1", "OUT": "out", "CUDA_VISIBLE_DEVICES": ""}
    command = ["bash", str(ROOT / "benchmarks/gpu.sh"), *args]
    environment = {**os.environ, **own, "GPU_DEVICE": "cpu", **env}
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=600)


@pytest.fixture
def camvid(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A few images in CamVid's format."""
    monkeypatch.setenv("SEG_DATA", str(place / "data"))
    fake_data(place / "data", yaml.safe_load((ROOT / "configs/data/camvid.yaml").read_text()))


def is_one_line(done: subprocess.CompletedProcess, *words: str) -> None:
    assert done.returncode == 2, done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert all(word in done.stderr for word in words)


def test_bad_use_is_one_line(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SEG_DATA", raising=False)
    is_one_line(kit("chekc"), "'chekc'", "check, nets, feed")
    is_one_line(kit(), "check, nets, feed")
    is_one_line(kit("camvid"), "gpu/data/camvid", "SEG_DATA", "wheels")
    is_one_line(kit("wheels"), "SEG_DATA")
    is_one_line(kit("nets", GPU_DEVICE="cuda"), "no CUDA device", "GPU_DEVICE=cpu")
    (place / "data/large").mkdir(parents=True)
    with (place / "data/large/image.png").open("wb") as file:
        file.truncate(61 * 2**20)
    is_one_line(kit("wheels", "large", SEG_DATA="data"), "61.0 MiB", "60", "data/large")
    assert not Path("gpu").exists()


@pytest.mark.slow
def test_check_runs_what_has_not_passed() -> None:
    finite = "test_a_loss_that_is_not_finite_ends_the_run"
    first = kit("check", "-k", "not_finite")
    assert first.returncode == 0, first.stdout
    assert [row["outcome"] for row in table(first.stdout, "test")] == ["passed"]
    kept = json.loads(Path("out/check.json").read_text())
    kept["test_batches_are_pinned"] = {"outcome": "failed", "seconds": 1.0}
    Path("runs/cpu/check.json").write_text(json.dumps(kept))
    second = kit("check", "-k", "pinned or not_finite or cuda_graphs")
    assert second.returncode == 0, second.stdout
    assert second.stdout.count(finite) == 1, "in the table alone"
    outcomes = {row["test"]: row["outcome"] for row in table(Path("out/check.md").read_text(), "test")}
    assert outcomes.pop(finite) == outcomes.pop("test_batches_are_pinned") == "passed"
    assert set(outcomes.values()) == {"skipped"}, "no CUDA device is seen"
    third = kit("check", "-k", "pinned or not_finite or cuda_graphs")
    assert third.returncode == 0, "nothing is left to run"


@pytest.mark.slow
def test_nets_goes_on_unit_by_unit() -> None:
    small = [*("--size", "64", "--batch", "1", "--infer-batch", "1", "--repeats", "1")]
    small += ["--modes", "eager", "--dtypes", "float32"]
    first = kit("nets", "mark_unet", *small, "--size", "32")
    assert first.returncode == 0, first.stdout
    assert "TFLOP/s in float32" in first.stdout
    assert kit("nets", *small, GPU_SECONDS="15").returncode == 143, "the time is up before all others are measured"
    last = kit("nets", "resnet34-eager", *small)
    assert last.returncode == 0, last.stdout
    shown = Path("out/nets.md").read_text()
    assert last.stdout.rstrip().endswith(shown.rstrip()), "the tables come last"
    nets = [row["net"] for row in table(shown, "net")]
    assert {"UNet", "smp Unet, resnet34", "UNet, resnet34"} <= set(nets)
    (goal,) = [row for row in table(shown, "goal") if row["goal"].startswith("UNet, resnet34: training")]
    assert (goal["met"] == "yes") == (float(goal["here"].rstrip("x")) >= 1) or goal["here"] == "1.00x"
    marks = table(shown, "published")
    assert [row["images/s"] for row in marks[:2]] == ["141", "463"]
    assert all("float32, eager" in row["here, images/s"] for row in marks[:2])
    assert json.loads(Path("out/nets.json").read_text()).keys() >= {"mark_unet", "resnet34-eager"}
    assert kit("nets", "no_such_unit").returncode == 2


@pytest.mark.slow
def test_feed(camvid: None) -> None:
    done = kit("feed", "unet", *TINY, "--epochs", "2", "--steps", "1")
    assert done.returncode == 0, done.stdout
    assert "2 steps per epoch, epochs: 2" in done.stdout
    (row,) = table(done.stdout, "net")
    rates = [float(row[key].split()[0].replace(",", "")) for key in ("whole epoch", "step alone")]
    assert float(row["kept (goal: 90 %)"].rstrip("%")) == pytest.approx(100 * rates[0] / rates[1], rel=0.05)
    assert "1 of 3 units measured; not yet: unet_plus_plus, unet_3plus." in done.stdout
    assert not [path for path in Path("runs").iterdir() if path.name != "cpu"]


@pytest.mark.slow
def test_a_run_in_pieces(camvid: None) -> None:
    """Stopped by the time, and finished by the same command."""
    epochs = "400"  # more than the quickest machine does in the first 20 seconds
    options = [*TINY, "--trainer.max_epochs", epochs]
    first = kit("camvid", *options, GPU_SECONDS="20")
    assert first.returncode == 143, first.stdout + first.stderr
    assert "the same command goes on from here" in first.stdout
    (row,) = table(first.stdout, "run")
    assert 0 <= int(row["epochs"]) < int(epochs)
    assert row["tested"] == "not yet"
    for _ in range(8):
        done = kit("camvid", *options, GPU_SECONDS="60")
        if done.returncode != 143:
            break
    assert done.returncode == 0, done.stdout
    (last,) = table(done.stdout, "run")
    assert last["epochs"] == epochs
    assert any("0.7195 on val" in row["published mIoU"] for row in table(done.stdout, "published"))
    summary = json.loads(Path("out/cpu-camvid/summary.json").read_text())
    assert last["tested"] == f"{summary['test/miou']:.4f} on val"
    written = {path.name for path in Path("out").rglob("*") if path.is_file()}
    assert written == {"camvid.log", "camvid.md", "config.yaml", "metrics.csv", "summary.json", "per_image.csv"}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("step", "net"), [("camvid_unet_plus_plus", "UNetPlusPlus"), ("camvid_unet_3plus", "UNet3Plus")]
)
def test_other_nets(step: str, net: str, camvid: None) -> None:
    done = kit(step, *TINY, "--trainer.max_epochs", "1")
    assert done.returncode == 0, done.stdout
    assert f"net       {net}" in done.stdout
    assert len(table(done.stdout, "run")) == 1


@pytest.mark.slow
def test_nuclei(place: Path) -> None:
    fake_data(place / "data", yaml.safe_load((ROOT / "configs/data/nuclei.yaml").read_text()))
    done = kit("nuclei", *TINY, "--trainer.max_epochs", "1", SEG_DATA="data")
    assert done.returncode == 0, done.stdout
    assert len(table(done.stdout, "run")) == 1


@pytest.mark.slow
def test_what_is_packed_is_used() -> None:
    """The wheels, and the data where SEG_DATA is not set."""
    Path("gpu/wheels").mkdir(parents=True)
    with zipfile.ZipFile("gpu/wheels/lacking-1.0-py3-none-any.whl", "w") as wheel:
        wheel.writestr("lacking.py", "HERE = True\n")
    fake_data(Path("gpu/data"), yaml.safe_load((ROOT / "configs/data/isbi2012.yaml").read_text()))
    Path("own.py").write_text("import lacking\nfrom segmentation.nets import UNet\n\n\nclass Own(UNet):\n    pass\n")
    net = ["--model.net", "own.Own", "--model.net.widths", "[4,8]"]
    done = kit("isbi2012", *TINY, *net, "--trainer.max_epochs", "1", SEG_DATA="")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "net       Own" in done.stdout
    assert len(table(done.stdout, "run")) == 1
