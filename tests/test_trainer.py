"""What Lightning's trainer offers works through the command line, or is refused in one line before the first step."""

import csv
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from conftest import ROOT, TINY, script, train
from segmentation.errors import InputError
from segmentation.inference.evaluate import evaluate
from segmentation.training.cli import SegmentationCLI

CALLBACKS = "lightning.pytorch.callbacks"
BATCH_SIZE = f"--trainer.callbacks+={CALLBACKS}.BatchSizeFinder"
RATE = f"--trainer.callbacks+={{class_path: {CALLBACKS}.LearningRateFinder, init_args: {{num_training_steps: 20}}}}"


def weights(name: str) -> dict[str, torch.Tensor]:
    return torch.load(f"runs/{name}/checkpoints/last.ckpt", weights_only=True)["state_dict"]


def equal(one: str, other: str) -> bool:
    return all(torch.equal(value, weights(other)[key]) for key, value in weights(one).items())


def summary(name: str) -> dict[str, Any]:
    return json.loads(Path(f"runs/{name}/summary.json").read_text())


def rows(name: str) -> list[dict[str, str]]:
    with open(f"runs/{name}/metrics.csv", newline="") as file:
        return list(csv.DictReader(file))


@pytest.mark.slow
def test_the_batch_size_that_was_found_is_used(capsys: pytest.CaptureFixture) -> None:
    """The run is the one that has it as an option: the search leaves no trace in it, and a resumed one goes on so."""
    cli = train(*TINY, "--name", "found", BATCH_SIZE)
    found = cli.datamodule.batch_size
    assert found == 16  # the first power of two that holds the 12 images
    assert f"steps of {found} images" in capsys.readouterr().out
    assert len(cli.datamodule.val_dataloader()) == 1  # five images; of the 4 that were given, two batches
    assert summary("found")["test/miou"] >= 0
    assert [path.name for path in Path("runs/found").glob(".*")] == []
    train(*TINY, "--name", "given", "--data.batch_size", str(found))
    assert equal("found", "given")
    assert [row["train/loss"] for row in rows("found")] == [row["train/loss"] for row in rows("given")]
    for name in ("found", "given"):
        for epochs in ("3", "4"):  # again and again
            train("--name", name, "--trainer.max_epochs", epochs, "--resume")
    assert equal("found", "given")


@pytest.mark.slow
def test_the_learning_rate_that_was_found_is_used(capsys: pytest.CaptureFixture) -> None:
    options = ["--trainer.max_epochs", "8", "--trainer.check_val_every_n_epoch", "3"]
    cli = train(*TINY, *options, "--name", "found", RATE)
    rate = cli.trainer.optimizers[0].param_groups[0]["initial_lr"]
    assert rate != 0.003
    assert f"learning rate {rate:g}, as LearningRateFinder found it" in capsys.readouterr().out
    train(*TINY, *options, "--name", "given", "--model.optimizer.lr", str(rate))
    assert equal("found", "given")
    for key in ("train/loss", "val/miou", "lr-AdamW"):
        assert [row.get(key) for row in rows("found")] == [row.get(key) for row in rows("given")], key


def test_one_callback_that_is_no_list() -> None:
    train(*TINY, "--name", "run", "--trainer.callbacks", f"{CALLBACKS}.DeviceStatsMonitor", *EVERY_STEP)
    assert any("DeviceStatsMonitor" in key for row in rows("run") for key in row)


EVERY_STEP = ["--trainer.log_every_n_steps", "1"]
AVERAGING = f"{{class_path: {CALLBACKS}.StochasticWeightAveraging, init_args: {{swa_lrs: 0.01}}}}"
STOPPING = f"{{class_path: {CALLBACKS}.EarlyStopping, init_args: {{monitor: val_loss}}}}"


@pytest.mark.parametrize(
    ("args", "parts"),
    [
        ([f"--trainer.callbacks+={AVERAGING}"], ["StochasticWeightAveraging", "configs/trainer/ema.yaml"]),
        ([f"--trainer.callbacks+={STOPPING}"], ["EarlyStopping", "val_loss", "val/miou"]),
        (["--trainer.precision", "bf16-true"], ["trainer.precision bf16-true", "--trainer.precision bf16-mixed"]),
        (["--trainer.precision", "16-true"], ["trainer.precision 16-true", "--trainer.precision bf16-mixed"]),
        (["--trainer.precision", "transformer-engine"], ["transformer"]),
        (["--trainer.strategy", "ddp_fork", "--trainer.devices", "2"], ["trainer.strategy", "python src/train.py"]),
        (["--trainer.strategy", "ddp_notebook", "--trainer.devices", "2"], ["trainer.strategy", "python src/train.py"]),
        (["--trainer.strategy", "ddp_spawn", "--trainer.devices", "2"], ["trainer.strategy", "python src/train.py"]),
    ],
    ids=lambda value: value[-1] if value[0].startswith("--") else "",
)
def test_refused_before_anything_is_written(args: list[str], parts: list[str]) -> None:
    with pytest.raises(InputError) as caught:
        SegmentationCLI([*TINY, "--name", "run", *args])
    message = str(caught.value)
    assert "\n" not in message
    for part in parts:
        assert part in message
    assert not Path("runs/run").exists()


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--trainer.limit_val_batches", "0.01"], "limit_val_batches"),
        (["--trainer.val_check_interval", "100"], "val_check_interval. \\(100\\)"),
        ([f"--trainer.callbacks+={STOPPING.replace('val_loss', 'val/iou')}"], "val/iou.*val/miou"),
        (["--model.optimizer", "LBFGS"], "LBFGS.*--model.optimizer AdamW"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_what_lightning_refuses_in_a_run_is_one_line(args: list[str], message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        train(*TINY, "--name", "run", *args)
    assert "\n" not in str(caught.value)


def test_a_net_of_ones_own_with_an_encoder_but_no_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(Path.cwd())
    lines = ["from segmentation.nets import UNet", "class Mine(UNet):"]
    lines += ["    def __init__(self, in_channels=3, num_classes=2, widths: tuple = (4, 8), encoder: str = 'mine'):"]
    lines += ["        super().__init__(in_channels, num_classes, widths)"]
    Path("my_encoder.py").write_text("\n".join(lines))
    train(*TINY, "--name", "run", "--model.net", "my_encoder.Mine")
    assert Path("runs/run/summary.json").is_file()


def test_an_error_of_ones_own_code_is_not_lightnings(monkeypatch: pytest.MonkeyPatch) -> None:
    """It keeps its stack trace."""
    monkeypatch.syspath_prepend(Path.cwd())
    lines = ["from segmentation.nets import UNet", "class Wrong(UNet):", "    def compute(self, image, level=None):"]
    Path("my_wrong.py").write_text("\n".join([*lines, "        raise ValueError('mine')"]))
    with pytest.raises(ValueError, match=r"^mine$"):
        train(*TINY, "--name", "run", "--model.net", "my_wrong.Wrong")


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["--trainer.precision", "bf16-true"], "trainer.precision bf16-true"),
        (["--trainer.strategy", "ddp_fork", "--trainer.devices", "2"], "trainer.strategy"),
        (["--trainer.limit_test_batches", "0"], "trainer.limit_test_batches"),
        (["--trainer.limit_test_batches", "0.01"], "limit_test_batches"),
        (["--trainer.accelerator", "cpu", "--trainer.devices", "0"], "devices"),
    ],
    ids=lambda value: "" if isinstance(value, str) else " ".join(value),
)
def test_eval_refuses_in_one_line(trained: Path, args: list[str], words: str) -> None:
    with pytest.raises(InputError, match=words):
        evaluate([str(trained), "--trainer.accelerator", "cpu", *args])


def test_a_run_without_a_test_has_its_summary(capsys: pytest.CaptureFixture) -> None:
    train(*TINY, "--name", "run", "--trainer.limit_test_batches", "0")
    found = summary("run")
    assert found["val/miou"] >= 0
    assert not any(key.startswith("test/") for key in found)
    assert "run folder runs/run" in capsys.readouterr().out


@pytest.mark.slow
def test_averaged_weights_on_two_devices() -> None:
    config = str(ROOT / "configs/trainer/ema.yaml")
    done = script("train", *TINY, "--config", config, "--trainer.devices", "2", "--name", "run")
    assert done.returncode == 0, done.stderr
    assert summary("run")["test/miou"] >= 0


@pytest.mark.slow
def test_the_learning_rate_is_found_on_two_devices() -> None:
    options = [*TINY, "--trainer.devices", "2", "--trainer.max_epochs", "4", "--data.dataset.train", "40"]
    done = script("train", *options, RATE, "--name", "run")
    assert done.returncode == 0, done.stderr
    assert "as LearningRateFinder found it" in done.stdout
    rate = float(done.stdout.partition("learning rate ")[2].partition(",")[0])
    done = script("train", *options, "--model.optimizer.lr", str(rate), "--name", "given")
    assert done.returncode == 0, done.stderr
    losses = [[float(row["train/loss"]) for row in rows(name) if row["train/loss"]] for name in ("run", "given")]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


@pytest.mark.parametrize("monitor", ["miou", "val/mIoU"])
def test_a_plateau_of_what_is_not_logged_is_refused(monitor: str) -> None:
    plateau = ["--model.schedule", "lightning.pytorch.cli.ReduceLROnPlateau", "--model.schedule.monitor", monitor]
    with pytest.raises(InputError, match=f"model.schedule.monitor {monitor} is not logged.* val/miou"):
        train(*TINY, "--name", "run", *plateau)


@pytest.mark.slow
def test_a_fused_optimizer_that_would_clip_is_one_line() -> None:
    mixed = ["--model.optimizer.fused", "true", "--trainer.precision", "bf16-mixed"]
    done = script("train", *TINY, "--name", "run", *mixed)
    assert done.returncode == 2
    assert "Fix: --trainer.gradient_clip_val null" in done.stderr
    assert done.stderr.count("\n") == 1
    script("train", *TINY, "--name", "other", *mixed, "--trainer.gradient_clip_val", "null").check_returncode()
