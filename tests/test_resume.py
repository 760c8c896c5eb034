"""A run that was interrupted and resumed, at an epoch's end or in the middle of one, is the run it would have been."""

import csv
import json
import shlex
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import Checkpoint

from conftest import ROOT, TINY, script, train
from segmentation.errors import InputError
from segmentation.training.cli import SegmentationCLI

#: Augmentation that draws random numbers, dropout in no net yet, three epochs of three steps.
ARGS = [*TINY, "--trainer.max_epochs", "3", "--checkpoint.every_minutes", "0"]
TIMES = {"train/images_per_second", "train/data_wait"}  # what no two runs share


class Pull(Callback):
    """Pulls the plug after so many batches, as a power cut would: no handler, no saving."""

    def __init__(self, batches: int) -> None:
        self.batches = batches

    def on_train_batch_start(self, *args: Any) -> None:
        if not self.batches:
            raise RuntimeError("plug pulled")
        self.batches -= 1


class PullInValidation(Callback):
    """Pulls it before a validation within an epoch."""

    def on_validation_start(self, trainer: Any, pl_module: Any) -> None:
        if trainer.global_step == 5:
            raise RuntimeError("plug pulled")


class PullAfterTheLastStep(Callback):
    """Pulls it before the figures of an epoch that max_steps ends."""

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        if trainer.global_step == 5:
            raise RuntimeError("plug pulled")


def interrupted(name: str, batches: int, *args: str) -> None:
    cli = SegmentationCLI([*ARGS, *args, "--name", name])
    cli.trainer.callbacks.insert(0, Pull(batches))
    with pytest.raises(RuntimeError, match="plug pulled"):
        cli.run()


def weights(name: str) -> dict[str, torch.Tensor]:
    return torch.load(Path("runs") / name / "checkpoints/last.ckpt", weights_only=True)["state_dict"]


def table(name: str) -> list[dict[str, str]]:
    with (Path("runs") / name / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    return [{k: v for k, v in row.items() if v and k not in TIMES} for row in rows]


def test_a_finished_run_stays_as_it_is(capsys: pytest.CaptureFixture) -> None:
    train(*TINY, "--name", "run", "--trainer.max_epochs", "1")
    before = weights("run")
    cli = train(*TINY, "--name", "run", "--trainer.max_epochs", "1", "--resume")
    assert cli.trainer.global_step == 0
    assert "finished" in capsys.readouterr().out
    assert all(torch.equal(before[key], value) for key, value in weights("run").items())


@pytest.mark.slow
def test_a_lengthened_run_that_was_interrupted_is_not_finished() -> None:
    train(*TINY, "--name", "run", "--trainer.max_epochs", "1")
    longer = [*TINY, "--name", "run", "--trainer.max_epochs", "3", "--resume"]
    cli = SegmentationCLI(longer)
    cli.trainer.callbacks.insert(0, Pull(4))
    with pytest.raises(RuntimeError, match="plug pulled"):
        cli.run()
    assert train(*longer).trainer.global_step == 3 * 3


@pytest.mark.slow
@pytest.mark.parametrize(
    "extra",
    [
        ["--trainer.accumulate_grad_batches", "2"],
        ["--trainer.check_val_every_n_epoch", "2"],
        ["--model.loss.class_weights", "auto", "--trainer.limit_train_batches", "2"],
        ["--config", str(ROOT / "configs/trainer/ema.yaml")],
    ],
    ids=" ".join,
)
def test_other_settings_resume_exactly(extra: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    train(*ARGS, *extra, "--name", "whole")
    interrupted("broken", 5, *extra)
    train(*ARGS, *extra, "--name", "broken", "--resume")
    whole, broken = weights("whole"), weights("broken")
    assert all(torch.equal(whole[key], broken[key]) for key in whole)
    assert table("whole") == table("broken")


@pytest.mark.slow
def test_max_steps_in_mid_epoch() -> None:
    """Interrupted after the last step, before the figures of the epoch that it ends: they are not lost."""
    args = [*ARGS, "--trainer.max_steps", "5"]
    train(*args, "--name", "whole")
    cli = SegmentationCLI([*args, "--name", "broken"])
    cli.trainer.callbacks.insert(0, PullAfterTheLastStep())
    with pytest.raises(RuntimeError, match="plug pulled"):
        cli.run()
    train(*args, "--name", "broken", "--resume")
    assert all(torch.equal(value, weights("broken")[key]) for key, value in weights("whole").items())
    assert table("whole") == table("broken")


@pytest.mark.parametrize(
    "ema",
    [
        pytest.param([], id="plain"),
        pytest.param(["--config", str(ROOT / "configs/trainer/ema.yaml")], id="ema", marks=pytest.mark.slow),
    ],
)
def test_no_validation_is_lost_between_checkpoint_and_death(ema: list[str]) -> None:
    args = [*ARGS, *ema, "--trainer.val_check_interval", "2"]
    train(*args, "--name", "whole")
    cli = SegmentationCLI([*args, "--name", "broken"])
    cli.trainer.callbacks.insert(0, PullInValidation())
    with pytest.raises(RuntimeError, match="plug pulled"):
        cli.run()
    train(*args, "--name", "broken", "--resume")
    assert all(torch.equal(value, weights("broken")[key]) for key, value in weights("whole").items())
    assert table("whole") == table("broken")


@pytest.mark.parametrize(
    ("batches", "workers"),
    [
        pytest.param(3, 0, id="epoch end", marks=pytest.mark.slow),
        pytest.param(4, 0, id="mid-epoch", marks=pytest.mark.slow),
        pytest.param(5, 2, id="mid-epoch, workers"),
        pytest.param(8, 0, id="late", marks=pytest.mark.slow),
    ],
)
def test_same_weights_and_figures_as_unbroken(batches: int, workers: int) -> None:
    extra = ["--data.num_workers", str(workers)]
    train(*ARGS, *extra, "--name", "whole")
    interrupted("broken", batches, *extra)
    train(*ARGS, *extra, "--name", "broken", "--resume")
    whole, broken = weights("whole"), weights("broken")
    assert whole.keys() == broken.keys()
    for key in whole:
        assert torch.equal(whole[key], broken[key]), key
    assert table("whole") == table("broken")
    summaries = [json.loads((Path("runs") / name / "summary.json").read_text()) for name in ("whole", "broken")]
    for summary in summaries:
        for key in ("minutes", "images_per_second", *TIMES):
            del summary[key]
    assert summaries[0] == summaries[1]


def test_resume_starts_a_run_that_has_not_begun() -> None:
    cli = train(*TINY, "--name", "new", "--resume")
    assert cli.trainer.global_step == 2 * 3


def test_resume_may_lengthen() -> None:
    train(*TINY, "--name", "longer", "--trainer.max_epochs", "1")
    cli = train(*TINY, "--name", "longer", "--trainer.max_epochs", "2", "--resume")
    assert cli.trainer.global_step == 2 * 3
    # and only an option that the command line gives counts: the rest is the run's own config
    cli = train("--name", "longer", "--trainer.max_epochs", "3", "--resume")
    assert cli.trainer.global_step == 3 * 3
    assert len(table("longer")) == 2 * 3 + 1  # train and val of three epochs, and the last test


def test_resume_as_another_run_is_refused() -> None:
    train(*TINY, "--name", "run", "--trainer.max_epochs", "1")
    for option in (["--model.net.widths", "[4,8,16]"], ["--data.batch_size", "2"], ["--model.net", "UNet3Plus"]):
        with pytest.raises(InputError) as caught:
            SegmentationCLI([*TINY, "--trainer.max_epochs", "1", *option, "--name", "run", "--resume"])
        assert option[0].removeprefix("--").rpartition(".")[2] in str(caught.value)
        assert "another --name" in str(caught.value)
    with pytest.raises(InputError, match="max_epochs"):
        SegmentationCLI(["--trainer.max_epochs", "0", "--name", "run", "--resume"])


class PullAt(Checkpoint):
    """Pulls the plug when an epoch's checkpoint is written or in a validation, and in any case in the test. (A
    Checkpoint, as Lightning calls these last, in the order of the list.)"""

    def __init__(self, place: str) -> None:
        self.place = place

    def pull(self, place: str) -> None:
        if place in (self.place, "test"):
            raise RuntimeError("plug pulled")

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        self.pull(f"epoch {trainer.current_epoch}")

    def on_validation_batch_end(self, trainer: Any, pl_module: Any, *batch: Any) -> None:
        if not trainer.sanity_checking:
            self.pull(f"validation {trainer.current_epoch}")

    def on_test_batch_end(self, *args: Any) -> None:
        self.pull("test")


def cut(place: str, *args: str) -> None:
    """Start a run, or go on with it, as far as `place`: a number of batches, or what PullAt says."""
    cli = SegmentationCLI([*args, "--resume"])
    cli.trainer.callbacks.append(PullAt(place))
    if place.isdigit():
        cli.trainer.callbacks.insert(0, Pull(int(place)))
    with pytest.raises(RuntimeError, match="plug pulled"):
        cli.run()


def figures(name: str) -> dict[str, Any]:
    """What a run has found, but for its times."""
    summary = json.loads((Path("runs") / name / "summary.json").read_text())
    return {key: value for key, value in summary.items() if key not in {"minutes", "images_per_second", *TIMES}}


def sheets(name: str) -> list[str]:
    return sorted(path.name for path in (Path("runs") / name / "pictures").glob("*.png"))


ADDED = "--trainer.callbacks+=lightning.pytorch.callbacks."
OF = "--trainer.callbacks."
SCHEDULE = "--model.schedule=torch.optim.lr_scheduler."
PLATEAU = "--model.schedule=lightning.pytorch.cli.ReduceLROnPlateau --model.schedule.monitor=val/loss"
#: Schedules and callbacks that change their state when an epoch ends, or on its way.
CHANGING = {
    "plateau": f"{PLATEAU} --model.schedule.patience=0 --model.schedule.threshold=10",
    "one cycle": f"{SCHEDULE}OneCycleLR --model.schedule.max_lr=0.01 --model.schedule.total_steps=12",
    "warm restarts": f"{SCHEDULE}CosineAnnealingWarmRestarts --model.schedule.T_0=5",
    "epochs": f"{SCHEDULE}StepLR --model.schedule.step_size=1 --model.schedule_interval=epoch",
    "early stopping": f"{ADDED}EarlyStopping {OF}monitor=val/miou {OF}mode=max {OF}patience=1 {OF}min_delta=2",
    "ema": f"{ADDED}EMAWeightAveraging {OF}update_starting_at_epoch=1 {OF}decay=0.9",
    "accumulation by epoch": f"{ADDED}GradientAccumulationScheduler {OF}scheduling='{{1: 3}}'",
    "validations and sheets": "--trainer.val_check_interval=1 --pictures.images=1",
    "every third epoch": "--trainer.check_val_every_n_epoch=3",
}


@pytest.mark.slow
@pytest.mark.parametrize("given", [pytest.param(given, id=name) for name, given in CHANGING.items()])
def test_what_changes_at_an_epochs_end_is_not_lost(given: str) -> None:
    """Cut off after an epoch's checkpoint, in a validation, within an epoch, and in the test: one run, the unbroken."""
    args = [*ARGS, "--trainer.max_epochs", "4", *shlex.split(given)]
    train(*args, "--name", "whole")
    for place in ("epoch 0", "validation 1", "epoch 1", "1", "1", "test"):
        cut(place, *args, "--name", "broken")
    train(*args, "--name", "broken", "--resume")
    whole, broken = weights("whole"), weights("broken")
    assert all(torch.equal(whole[key], broken[key]) for key in whole)
    assert table("whole") == table("broken")
    assert figures("whole") == figures("broken")
    assert sheets("whole") == sheets("broken")


@pytest.mark.slow
def test_a_run_folder_that_was_moved_keeps_its_best(monkeypatch: pytest.MonkeyPatch, place: Path) -> None:
    """By a copy, and where a folder of another name is mounted: the best score and its checkpoint go with it."""
    still = ["--model.optimizer.lr", "0", "--model.net.norm", "group"]  # all epochs are alike: the first is the best
    args = [*ARGS, *still, "--name", "run"]
    train(*args)
    expected = figures("run")
    shutil.rmtree("runs/run")
    cut("epoch 1", *args)
    best = torch.load("runs/run/checkpoints/best.ckpt", weights_only=True)["epoch"]
    (place / "elsewhere").mkdir()
    shutil.copytree("runs", "elsewhere/runs")
    shutil.rmtree("runs/run/checkpoints")  # nothing of the old place may be asked for
    monkeypatch.chdir(place / "elsewhere")
    cut("test", *args)
    shutil.copytree("runs", place / "third/runs")
    shutil.rmtree("runs/run/checkpoints")
    monkeypatch.chdir(place / "third")
    train(*args, "--resume")
    assert figures("run") == expected
    assert expected["epoch"] == best == 0


def test_the_summary_is_of_the_validation_whose_checkpoint_was_tested() -> None:
    """Of several in an epoch."""
    train(*TINY, "--trainer.val_check_interval", "1", "--name", "run", "--trainer.max_epochs", "1")
    logged = [float(row["val/miou"]) for row in table("run") if "val/miou" in row]
    assert len(logged) == 3
    step = torch.load("runs/run/checkpoints/best.ckpt", weights_only=True)["global_step"]
    (tested,) = (row for row in table("run") if "val/miou" in row and int(row["step"]) == step - 1)
    assert figures("run")["val/miou"] == float(tested["val/miou"])
    assert figures("run")["val/loss"] == float(tested["val/loss"])


@pytest.mark.slow
def test_what_cannot_change_a_result_may_change() -> None:
    cut("epoch 0", *ARGS, "--name", "run")
    free = ["--data.num_workers", "1", "--pictures.images", "2", "--trainer.enable_progress_bar", "false"]
    train(*ARGS, *free, "--checkpoint.every_minutes", "9", "--name", "run", "--resume")
    config = yaml.safe_load(Path("runs/run/config.yaml").read_text())
    assert config["data"]["num_workers"] == 1
    assert config["pictures"]["images"] == 2
    train(*ARGS, "--name", "whole")
    assert all(torch.equal(value, weights("run")[key]) for key, value in weights("whole").items())


@pytest.mark.slow
def test_the_checkpoint_that_a_run_began_with_is_not_needed_again() -> None:
    train(*TINY, "--name", "first", "--trainer.max_epochs", "1")
    args = [*ARGS, "--model.init_from", "runs/first/checkpoints/best.ckpt", "--name", "run"]
    cut("1", *args)
    shutil.rmtree("runs/first")
    assert train(*args, "--resume").trainer.global_step == 3 * 3


NET = """
from pathlib import Path
import torch
from torch import nn
from segmentation.nets import Heads, SegmentationNet

class Dropping(SegmentationNet):
    '''Notes what each training step drops.'''
    def __init__(self, in_channels: int = 3, num_classes: int = 1):
        super().__init__(in_channels, num_classes)
        self.conv = nn.Conv2d(in_channels, num_classes, 3, padding=1)

    def compute(self, image, level=None):
        if self.training:
            kept = nn.functional.dropout(torch.ones(image.shape[:2] + (1, 1)), 0.5)
            rank = torch.distributed.get_rank() if torch.distributed.is_initialized() else 0
            with Path(f"drawn-{rank}").open("a") as file:
                file.write("".join("01"[int(x > 0)] for x in kept.flatten()) + "\\n")
            image = image * kept
        return Heads((self.conv(image),))
"""


def test_what_a_step_draws_is_drawn_again(place: Path) -> None:
    """Dropout is a function of seed, step and process: another one each step, the same when resumed."""
    (place / "dropping.py").write_text(NET)
    args = [*ARGS, "--model.net", "dropping.Dropping"]
    args.remove("--model.net.widths")
    args.remove("[4,8]")
    train(*args, "--name", "whole")
    drawn = Path("drawn-0").read_text().splitlines()
    assert len(drawn) == len(set(drawn)) == 9
    Path("drawn-0").unlink()
    for place_ in ("epoch 0", "2"):
        cut(place_, *args, "--name", "broken")
    train(*args, "--name", "broken", "--resume")
    assert Path("drawn-0").read_text().splitlines() == drawn
    assert all(torch.equal(value, weights("broken")[key]) for key, value in weights("whole").items())


@pytest.mark.slow
def test_each_process_draws_for_itself(place: Path) -> None:
    (place / "dropping.py").write_text(NET)
    args = [*TINY, "--model.net", "dropping.Dropping", "--trainer.devices", "2", "--name", "run"]
    args.remove("--model.net.widths")
    args.remove("[4,8]")
    done = script("train", *args)
    assert done.returncode == 0, done.stderr
    drawn = [Path(f"drawn-{rank}").read_text().splitlines() for rank in (0, 1)]
    assert len(drawn[0]) == len(drawn[1]) > 1
    assert all(mine != other for mine, other in zip(*drawn, strict=True))
