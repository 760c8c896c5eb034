"""A run that was interrupted and resumed, at an epoch's end or in the middle of one, is the run it would have been."""

import csv
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback

from conftest import ROOT, TINY, train
from segmentation.cli import SegmentationCLI
from segmentation.errors import InputError

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


def test_a_lengthened_run_that_was_interrupted_is_not_finished() -> None:
    train(*TINY, "--name", "run", "--trainer.max_epochs", "1")
    longer = [*TINY, "--name", "run", "--trainer.max_epochs", "3", "--resume"]
    cli = SegmentationCLI(longer)
    cli.trainer.callbacks.insert(0, Pull(4))
    with pytest.raises(RuntimeError, match="plug pulled"):
        cli.run()
    assert train(*longer).trainer.global_step == 3 * 3


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


@pytest.mark.parametrize("ema", [[], ["--config", str(ROOT / "configs/trainer/ema.yaml")]], ids=["plain", "ema"])
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
    [(3, 0), (4, 0), (5, 2), (8, 0)],
    ids=["epoch end", "mid-epoch", "mid-epoch, workers", "late"],
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
