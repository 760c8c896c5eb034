"""The command line: names, overrides, classes of one's own, and errors of one line with exit status 2."""

import csv
import json
import os
import signal
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from conftest import ROOT, TINY, make_folder, script, train, write_image
from segmentation.errors import InputError
from segmentation.training.cli import SegmentationCLI
from segmentation.training.entry import run_job


def parse(*args: str) -> SegmentationCLI:
    return SegmentationCLI([*TINY, *args])


def refused(*args: str) -> str:
    with pytest.raises(InputError) as caught:
        parse(*args)
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_a_run_leaves_what_the_design_says(tmp_path: Path) -> None:
    train(*TINY, "--name", "run", "--pictures.images", "2")
    run = tmp_path / "runs/run"
    for name in ("config.yaml", "metrics.csv", "summary.json", "per_image.csv"):
        assert (run / name).is_file(), name
    assert {path.name for path in (run / "checkpoints").iterdir()} == {"best.ckpt", "last.ckpt"}
    assert {path.name for path in (run / "pictures").iterdir()} == {
        "epoch-0000.png",
        "epoch-0001.png",
        "test.png",
        "confusion.png",
    }
    summary = json.loads((run / "summary.json").read_text())
    figures = {"loss", "miou", "miou_per_image", "pixel_accuracy", "iou/disk", "dice/disk"}
    assert {f"{split}/{key}" for split in ("train", "val", "test") for key in figures} <= summary.keys()
    assert summary["split"] == "test"
    assert summary["images_per_second"] > 0
    assert (run / "per_image.csv").read_text().splitlines()[0] == "name,class,tp,fp,fn"
    assert len((run / "per_image.csv").read_text().splitlines()) == 1 + 5 * 5
    config = yaml.safe_load((run / "config.yaml").read_text())
    assert "name" not in config
    assert "resume" not in config
    # config.yaml reruns unchanged under a new name
    train("--config", str(run / "config.yaml"), "--name", "again")
    again = json.loads((tmp_path / "runs/again/summary.json").read_text())
    assert {k: v for k, v in again.items() if k.startswith("test/")} == {
        k: v for k, v in summary.items() if k.startswith("test/")
    }


def test_runs_may_lie_elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a scratch disk, beside a checkout that is read-only: nothing is written in the current folder."""
    scratch = tmp_path / "scratch/runs"
    (tmp_path / "checkout").mkdir()
    monkeypatch.chdir(tmp_path / "checkout")
    args = [*TINY, "--name", "a", "--runs", str(scratch)]
    train(*args, "--trainer.max_epochs", "1")
    cli = train(*args, "--resume")
    assert cli.trainer.global_step == 6
    assert json.loads((scratch / "a/summary.json").read_text())["epoch"] >= 0
    assert "runs" not in yaml.safe_load((scratch / "a/config.yaml").read_text())
    assert not any((tmp_path / "checkout").iterdir())
    assert not list(scratch.glob(".*.lock"))
    with pytest.raises(InputError, match=f"{scratch}/a exists"):
        train(*args)


def test_options_override_overlays_override_defaults(tmp_path: Path) -> None:
    (tmp_path / "overlay.yaml").write_text("trainer: {max_epochs: 7}\ndata: {batch_size: 3}\n")
    args = ["--config", "overlay.yaml", "--trainer.max_epochs", "50", "--model.net", "UNet"]
    args += ["--model.net.widths", "[8,16]", "--model.optimizer", "SGD", "--model.optimizer.lr", "0.1"]
    cli = SegmentationCLI(args)
    assert cli.trainer.max_epochs == 50
    assert cli.datamodule.batch_size == 3
    assert cli.model.net.num_classes == 5
    assert cli.model.net.stride == 2
    assert cli.config.model.optimizer.class_path == "torch.optim.SGD"


OWN = """
import torch
from segmentation.data import Labels, SegmentationData
from segmentation.nets import Heads, SegmentationNet


class Stripes(SegmentationData):
    def __init__(self, length: int = 6):
        super().__init__(Labels.parse({"dark": 0, "gray": 1, "bright": 2}, channels=1))
        self.length = length

    def names(self, split):
        return [f"{split}{i}" for i in range(self.length)] if split != "test" else []

    def load(self, split, index):
        mask = (torch.arange(16) // 4 % 3).expand(16, 16).contiguous()
        return {"image": (mask * 100).to(torch.uint8)[None], "mask": mask}

    def fingerprint(self, split):
        return f"stripes {self.length}"


class Linear(SegmentationNet):
    stride = 1

    def __init__(self, in_channels: int = 3, num_classes: int = 1, bias: bool = True):
        super().__init__(in_channels, num_classes)
        self.conv = torch.nn.Conv2d(in_channels, num_classes, 1, bias=bias)

    def compute(self, image, level=None):
        return Heads((self.conv(image),))
"""


@pytest.mark.slow
def test_classes_of_ones_own(tmp_path: Path) -> None:
    """A data set and a net in a file where the command is typed, by class_path, through the script itself."""
    (tmp_path / "own.py").write_text(OWN)
    (tmp_path / "own.yaml").write_text(
        "data: {dataset: {class_path: own.Stripes, init_args: {length: 8}}, batch_size: 4, augment: null}\n"
        "model: {net: {class_path: own.Linear, init_args: {bias: true}}}\n"
    )
    args = ["--config", "own.yaml", "--name", "own", "--trainer.max_epochs", "1", "--data.num_workers", "0"]
    done = script("train", *args)
    assert done.returncode == 0, done.stderr
    summary = json.loads((tmp_path / "runs/own/summary.json").read_text())
    assert summary["split"] == "val"  # a data set without a test split
    done = script("eval", "runs/own/checkpoints/best.ckpt", "--output", "eval.json")
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "eval.json").read_text())
    assert found["split"] == "val"
    assert found["metrics"] == {k.removeprefix("test/"): v for k, v in summary.items() if k.startswith("test/")}


@pytest.mark.parametrize(
    ("args", "parts"),
    [
        (["--model.net", "UNt"], ["model.net", "did you mean UNet?"]),
        (["--model.net", "Unet"], ["UNetPlusPlus or a class of your own", "did you mean UNet?"]),
        (["--model.net", "UNet++"], ["did you mean UNetPlusPlus?"]),
        (["--model.net", "UNet3+"], ["did you mean UNet3Plus?"]),
        (["--model.loss", "DiceLoss"], ["CrossEntropy, Focal, Dice"]),
        (["--model", "UNet"], ["model is a section", "--model.net"]),
        (["--loss", "Dice"], ["did you mean model.loss?"]),
        (["--device", "cpu"], ["did you mean trainer.accelerator?"]),
        (["--data.root", "x"], ["did you mean data.dataset.root?"]),
        (["--data.dataset.root", "x"], ["root is an option of FolderData"]),
        (["configs/data/nuclei.yaml"], ["did you mean --config configs/data/nuclei.yaml?"]),
        (["--model.net.widths", "[4,-8]"], ["model.net.widths [4, -8]", "1 or more"]),
        (["--data.dataset", "FolderData", "--data.dataset.classes", "{a:0,b:255}"], ["a space after each colon"]),
        (["--data.dataset", "FolderDat"], ["data.dataset", "did you mean FolderData?"]),
        (["--model.optimizer", "AdamWW"], ["model.optimizer", "did you mean AdamW?"]),
        (["--model.net.wdths", "[1]"], ["model.net", "UNet", "wdths", "did you mean widths?"]),
        (["--data.dataset.sizee", "4"], ["data.dataset", "ShapesData", "did you mean size?"]),
        (["--model.loss", "WeightedSum", "--model.loss.losses", "[Dicee]"], ["model.loss", "did you mean Dice?"]),
        (["--trainer.callbacks", "EarlyStoppin"], ["trainer.callbacks", "did you mean EarlyStopping?"]),
        (["--data.augment", "[{class_path: RandomRotation, init_args: {degrees: [3]}}]"], ["option", "degrees"]),
        (
            ["--data.augment", "[{class_path: RandomRotation, init_args: {degrees: 30}}]"],
            ["config.yaml", "[-180, 180]"],
        ),
        (["--trainer.max_epoch", "3"], ["did you mean trainer.max_epochs?"]),
        (["--nam", "x"], ["did you mean name?"]),
        (["--model.lr", "0.1"], ["did you mean model.optimizer.lr?"]),
        (["--lr=0.1"], ["did you mean model.optimizer.lr?"]),
        (["--model.optimizer.learning_rate", "0.1"], ["model.optimizer", "AdamW", "did you mean model.optimizer.lr?"]),
        (["--epochs", "3"], ["did you mean trainer.max_epochs?"]),
        (["--batch-size", "3"], ["did you mean data.batch_size?"]),
        (["--model.net.pretrained", "true"], ["UNet", "did you mean model.net.encoder_weights?"]),
        (["--model.net.num_classes", "7"], ["--model.net.num_classes", "data.dataset.classes"]),
        (["--trainer.max_epochs", "0"], ["trainer.max_epochs", "src/eval.py"]),
        (
            ["--model.net", "UNet", "--model.net.skip_channels", "3"],
            ["model.net", "UNet", "skip_channels", "widths"],
        ),
        (["--model.loss", "Dice", "--model.loss.gamma", "3"], ["model.loss", "Dice", "gamma", "class_weights"]),
        (["--config", "nowhere.yaml"], ["nowhere.yaml", "does not exist"]),
        (["--data.batch_size", "many"], ["data.batch_size cannot be many", "a whole number, e.g. 8"]),
        (["--trainer.precision", "fp16"], ["trainer.precision cannot be fp16", "16-mixed or bf16-true or bf16-mixed"]),
        (["--trainer.max_epochs", "ten"], ["trainer.max_epochs cannot be ten", "a whole number or null, e.g. 15"]),
        (["--trainer.deterministic", "yess"], ["trainer.deterministic cannot be yess", "true or false or warn"]),
        (["--trainer.devices", "two"], ["devices", "int > 0"]),
        (["--trainer.accumulate_grad_batches", "0"], ["trainer.accumulate_grad_batches is 0", "1 or more"]),
        (["--trainer.limit_train_batches", "0"], ["trainer.limit_train_batches is 0", "1 or more"]),
        (["--trainer.logger", "tensorboard"], ["trainer.logger", "takes a Logger or [a Logger, ...] or null"]),
        (["--data.augment", "Flip"], ["data.augment cannot be Flip", "[a Transform, ...] or null"]),
        (["--data.crop", "a"], ["data.crop cannot be a", "a whole number or [a whole number, ...] or null"]),
        (["--data.cache", "maybe"], ["data.cache cannot be maybe", "true or false"]),
        (["--model.net.widths", "16,32"], ["model.net.widths cannot be 16,32", "e.g. [16,32]"]),
        (["--model.net.widths", "16"], ["model.net.widths cannot be 16", "[a whole number, ...]"]),
        (["--model.net.norm", "layer"], ["model.net.norm cannot be layer", "batch or group"]),
        (["--model.optimizer.lr", "fast"], ["model.optimizer.lr cannot be fast", "a number"]),
        (["--model.loss.class_weights", "autoo"], ["model.loss.class_weights", "did you mean auto?"]),
        (["--model.schedule.decay", "linear"], ["model.schedule.decay cannot be linear", "poly or cosine or constant"]),
        (["--model.schedule", "ReduceLROnPlateau"], ["lightning.pytorch.cli.ReduceLROnPlateau", "monitor val/loss"]),
        (["--wandb.tags", "a,b"], ["wandb.tags cannot be a,b", "e.g. [a,b]"]),
        (["--seed_everything", "x"], ["seed_everything", "x"]),
        (
            ["--model.loss", "WeightedSum", "--model.loss.losses", "[{class_path: Dice, init_args: {max_weight: x}}]"],
            ["model.loss.losses.max_weight cannot be x", "a number"],
        ),
        (["--data.batch_size", "0"], ["data.batch_size 0", "1 or more"]),
        (["--model.threshold", "2"], ["threshold", "between 0 and 1"]),
        (["--model.net.class_path", "nowhere.Net"], ["model.net", "nowhere"]),
        (["--model.mean", "[0.5]", "--model.std", "[0.5]"], ["model.mean", "3", "1"]),
        (["--trainer.accelerator", "gpu", "--trainer.devices", "64"], ["trainer", "options"]),
        (["--name", "a/b"], ["--name", "slashes"]),
        (["--resume"], ["--resume", "--name"]),
        (["--data.dataset", "FolderData", "--data.dataset.ignore", "#010101"], ["'[\"#010101\"]'"]),
    ],
    ids=lambda value: " ".join(value) if value[0].startswith("--") else "",
)
def test_refused_in_one_line(args: list[str], parts: list[str]) -> None:
    message = refused(*args)
    for part in parts:
        assert part in message


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("trainer: {max_epoch: 3}", "did you mean trainer.max_epochs?"),
        ("modl: {loss: Dice}", "did you mean model.loss?"),
        ("model: {net: {init_args: {wdths: [4]}}}", "did you mean widths?"),
        ("model: {net: {class_path: UNet, init_args: {skip_channels: 4}}}", "widths"),
        ("trainer: {callbacks: [{class_path: EarlyStopping, init_args: {monitr: x}}]}", "did you mean monitor?"),
        ("crop: 48", "did you mean data.crop?"),
        ("crop: 48", "wrong.yaml: "),
        ("trainer: {max_epoch: 3}", "wrong.yaml: "),
        ("data: {dataset: {class_path: FolderData, init_args: {root: ., clases: {a: 0}}}}", "did you mean classes?"),
        ("data: {dataset: {class_path: FolderData, init_arg: {root: .}}}", "did you mean init_args?"),
        ("data: {dataset: {classpath: FolderData, init_args: {root: .}}}", "write class_path: NAME"),
        ("data:\n  dataset:\n    class_path:FolderData\n    init_args: {root: .}\n", "A colon needs a space after it"),
        ("data: [1, 2\n", "wrong.yaml: Problems parsing config"),
        ("data: [1, 2\n", "line 2"),
        ("trainer:\n\tmax_epochs: 3\n", "wrong.yaml: Problems parsing config"),
        ("trainer:\n\tmax_epochs: 3\n", "by spaces, never by tabs"),
        ("trainer:\n\tmax_epochs: 3\n", "line 2"),
        ("model: {net: {init_args: {widths: 16,32}}}", "wrong.yaml: "),
        ("", "wrong.yaml: holds no options"),
        ("- data\n- model\n", "wrong.yaml: holds no options"),
        ("trainer: {max_epochs: ten}", "wrong.yaml: trainer.max_epochs cannot be ten"),
        ("data: {dataset: {class_path: FolderData, init_args: {root: ., classes: [a, b]}}}", "classes: {a: 0, b: 1}"),
        (
            "model: {schedule: {class_path: torch.optim.lr_scheduler.ReduceLROnPlateau}}",
            "--model.schedule.monitor val/loss",
        ),
    ],
)
def test_refused_in_yaml(text: str, words: str) -> None:
    make_folder(Path(), {"train": 1, "val": 1})
    Path("wrong.yaml").write_text(text)
    with pytest.raises(InputError) as caught:
        train(*TINY, "--config", "wrong.yaml")
    message = str(caught.value)
    assert "\n" not in message
    assert words in message


def test_a_missing_folder_names_those_that_are_there(tmp_path: Path) -> None:
    for name in ("Images", "labels"):
        (tmp_path / "data" / name).mkdir(parents=True)
    options = ["--data.dataset", "FolderData", "--data.dataset.classes", "{a: 0, b: 255}", "--data.dataset.root"]
    assert "Images, labels" in refused(*options, "data")
    assert "this folder holds data" in refused(*options, "dat")


def test_a_run_that_failed_may_begin_anew() -> None:
    """A number that torch refuses is one line, and the same name, with --resume, takes the mended command."""
    with pytest.raises(InputError, match=r"model\.optimizer.*learning rate"):
        train(*TINY, "--name", "run", "--model.optimizer.lr", "-1")
    assert train(*TINY, "--name", "run", "--resume").trainer.global_step == 2 * 3


def test_the_last_epoch_is_validated(capsys: pytest.CaptureFixture) -> None:
    train(*TINY, "--name", "run", "--trainer.max_epochs", "3", "--trainer.check_val_every_n_epoch", "2")
    with open("runs/run/metrics.csv", newline="") as file:
        assert [row["epoch"] for row in csv.DictReader(file) if row["val/miou"]] == ["1", "2"]
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("epoch") and "images/s" in line]
    assert [("val mIoU" in line) for line in lines] == [False, True, True]


def test_a_name_that_is_taken(tmp_path: Path) -> None:
    (tmp_path / "runs/taken").mkdir(parents=True)
    message = refused("--name", "taken")
    assert "taken" in message
    assert "--resume" in message


class TestBadData:
    """One line, which the script gives on standard error with exit status 2, and no run folder."""

    def fails(self, *args: str) -> str:
        with pytest.raises(InputError) as caught:
            train("--name", "bad", *args)
        assert "\n" not in str(caught.value)
        assert not Path("runs/bad").exists()
        return str(caught.value)

    def script_fails(self, *args: str) -> str:
        done = script("train", "--name", "bad", *args, WANDB_MODE="offline")
        assert done.returncode == 2, done.stderr
        lines = [line for line in done.stderr.splitlines() if line.strip()]
        assert len(lines) == 1, done.stderr
        assert not Path("runs/bad").exists()
        return lines[0]

    def overlay(self, root: Path, classes: str = "{background: 0, nucleus: 255}") -> list[str]:
        Path("overlay.yaml").write_text(
            f"data: {{dataset: {{class_path: FolderData, init_args: {{root: {root}, classes: {classes}}}}},"
            " crop: 32, num_workers: 0}\n"
        )
        return ["--config", "overlay.yaml"]

    def test_undeclared_mask_value(self, tmp_path: Path) -> None:
        make_folder(tmp_path / "data", {"train": 3, "val": 2})
        line = self.script_fails(*self.overlay(tmp_path / "data", "{background: 0, nucleus: 1}"))
        assert "masks/00.png" in line
        assert "255" in line
        assert "classes: {background: 0, nucleus: [1, 255]}" in line

    def test_image_without_mask(self, tmp_path: Path) -> None:
        make_folder(tmp_path / "data", {"train": 3, "val": 2})
        (tmp_path / "data/train/masks/01.png").unlink()
        assert "train/images/01.png" in self.fails(*self.overlay(tmp_path / "data"))

    def test_truncated_image(self, tmp_path: Path) -> None:
        make_folder(tmp_path / "data", {"train": 3, "val": 2})
        path = tmp_path / "data/val/images/01.png"
        path.write_bytes(path.read_bytes()[:200])
        assert "val/images/01.png" in self.fails(*self.overlay(tmp_path / "data"))

    def test_missing_folder(self, tmp_path: Path) -> None:
        assert "no such folder" in self.fails(*self.overlay(tmp_path / "nowhere"))

    def test_mask_of_another_size(self, tmp_path: Path) -> None:
        make_folder(tmp_path / "data", {"train": 3, "val": 2})
        path = tmp_path / "data/train/masks/02.png"
        write_image(path, np.array(Image.open(path))[:32])
        line = self.fails(*self.overlay(tmp_path / "data"))
        assert "masks/02.png" in line
        assert "40x32" in line
        assert "40x48" in line

    def test_other_bands_than_declared(self, tmp_path: Path) -> None:
        make_folder(tmp_path / "data", {"train": 3, "val": 2})
        line = self.fails(*self.overlay(tmp_path / "data"), "--data.dataset.channels", "4")
        assert "images/00.png" in line
        assert "channels: 3" in line

    def test_empty_split(self, tmp_path: Path) -> None:
        make_folder(tmp_path / "data", {"train": 3, "val": 2})
        for path in (tmp_path / "data/val/images").iterdir():
            path.unlink()
        assert "data/val/images" in self.fails(*self.overlay(tmp_path / "data"))

    def test_unequal_sizes_without_crop(self, tmp_path: Path) -> None:
        make_folder(tmp_path / "data", {"train": 3, "val": 2})
        for kind in ("images", "masks"):
            path = tmp_path / "data/train" / kind / "01.png"
            write_image(path, np.array(Image.open(path))[:32])
        line = self.fails(*self.overlay(tmp_path / "data"), "--data.crop", "null")
        assert "data.crop: 32" in line


# After step 6, the last of the second epoch, there is no other one to look at it.
@pytest.mark.parametrize(
    ("what", "step", "expression"), [("loss", 5, "loss * nan"), ("gradient", 6, "loss + (loss * 0).sqrt()")]
)
def test_what_is_not_finite_names_the_files_and_keeps_the_checkpoint(what: str, step: int, expression: str) -> None:
    (Path("exploding.py")).write_text(
        "from math import nan\nfrom segmentation.losses import CrossEntropy\n"
        "class Exploding(CrossEntropy):\n"
        "    calls = 0\n"
        "    def compute(self, logits, mask, weight):\n"
        "        Exploding.calls += logits.requires_grad\n"
        "        loss = super().compute(logits, mask, weight)\n"
        f"        return {expression} if logits.requires_grad and Exploding.calls == {step} else loss\n"
    )
    done = script("train", *TINY, "--name", "run", "--model.loss", "exploding.Exploding", PYTHONPATH=".")
    assert done.returncode == 2
    lines = [line for line in done.stderr.splitlines() if line.startswith("error:")]
    assert len(lines) == 1
    assert f"the {what} is not finite in epoch 2, step {step - 1}," in lines[0]
    assert lines[0].count("train-") == 4  # the batch's four names
    assert done.stdout.count("images/s") == 1  # the first epoch's line
    for name in ("last", "best"):
        checkpoint = torch.load(f"runs/run/checkpoints/{name}.ckpt", weights_only=True)
        assert checkpoint["global_step"] == 3
        assert all(value.isfinite().all() for value in checkpoint["state_dict"].values() if value.is_floating_point())


def test_collapse_to_one_class_warns_once_with_causes() -> None:
    with pytest.warns(UserWarning, match="predicted as one class") as caught:
        train(*TINY, "--name", "run", "--model.optimizer.lr", "1", "--model.loss.class_weights", "[1,0,0,0,0]")
    assert sum("predicted as one class" in str(warning.message) for warning in caught) == 1


@pytest.mark.slow
def test_debug_overlay_says_whether_one_batch_could_be_overfitted(capsys: pytest.CaptureFixture) -> None:
    debug = ["--config", "configs/trainer/debug.yaml"]
    debug[1] = str(ROOT / debug[1])
    train(*debug, *TINY, "--trainer.max_epochs", "2", "--trainer.check_val_every_n_epoch", "1", "--name", "two")
    assert "could not" in capsys.readouterr().out.lower()
    args = ["--trainer.max_epochs", "250", "--model.net.widths", "[16,32,64]", "--model.schedule.decay", "cosine"]
    train(*debug, *TINY, *args, "--name", "many", "--trainer.check_val_every_n_epoch", "50", "--data.batch_size", "2")
    assert "learnt by heart" in capsys.readouterr().out


def test_a_finished_debug_run_has_no_second_verdict(capsys: pytest.CaptureFixture) -> None:
    """Nothing is validated where nothing is left to train."""
    debug = [*TINY, "--config", str(ROOT / "configs/trainer/debug.yaml"), "--trainer.max_epochs", "2", "--name", "run"]
    train(*debug, "--resume")
    assert "could not learn" in capsys.readouterr().out
    train(*debug, "--resume")
    assert "could not learn" not in capsys.readouterr().out


def test_a_run_that_never_validated_tests_its_last_checkpoint(capsys: pytest.CaptureFixture) -> None:
    options = ["--trainer.check_val_every_n_epoch", "9", "--trainer.max_epochs", "5", "--trainer.max_steps", "4"]
    train(*TINY, "--name", "run", *options)
    assert "tested checkpoint: runs/run/checkpoints/last.ckpt" in " ".join(capsys.readouterr().out.split())


def test_help_reads(tmp_path: Path) -> None:
    done = script("train", "--help")
    assert done.returncode == 0
    for option in ("--name", "--resume", "--data.batch_size", "--model.net", "--trainer.max_epochs", "--wandb.project"):
        assert option in done.stdout
    assert "--trainer.default_root_dir" not in done.stdout  # no option that does nothing


def test_ctrl_c_ends_with_130_and_the_run_can_go_on(tmp_path: Path) -> None:
    args = [*TINY, "--name", "run", "--trainer.max_epochs", "10000"]
    command = [sys.executable, str(ROOT / "src/train.py"), *args]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    for line in process.stdout:  # once an epoch is through
        if line.startswith("epoch   2/"):
            break
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130, errors
    assert "--resume" in errors
    assert "Traceback" not in errors
    torch.load(tmp_path / "runs/run/checkpoints/last.ckpt", weights_only=True)


class TestRunJob:
    """Exit status and the one line, for what can end a job."""

    @pytest.mark.parametrize(
        ("error", "status", "words"),
        [
            (InputError("a.png: wrong"), 2, "error: a.png: wrong"),
            (
                InputError("Caught InputError in DataLoader worker\nTraceback\nx.InputError: b.png: bad\n"),
                2,
                "b.png: bad",
            ),
            (torch.OutOfMemoryError("CUDA out of memory"), 2, "data.batch_size"),
            (
                RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory"),
                2,
                "data.crop",
            ),
            (KeyboardInterrupt(), 130, "--resume"),
        ],
        ids=["input", "worker", "cuda memory", "cpu memory", "ctrl-c"],
    )
    def test_status(
        self,
        error: BaseException,
        status: int,
        words: str,
        monkeypatch: pytest.MonkeyPatch,
        capsys: pytest.CaptureFixture,
    ) -> None:
        def job() -> None:
            raise error

        monkeypatch.setattr(os, "_exit", sys.exit)  # this process goes on
        with pytest.raises(SystemExit) as stop:
            run_job(job)
        assert stop.value.code == status
        text = capsys.readouterr().err
        assert words in text
        assert text.count("\n") == 1

    def test_ctrl_c_while_the_job_is_imported(
        self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
    ) -> None:
        Path("slow_import.py").write_text("raise KeyboardInterrupt")
        monkeypatch.syspath_prepend(".")
        monkeypatch.setattr(os, "_exit", sys.exit)
        with pytest.raises(SystemExit, match="130"):
            run_job("slow_import:main")
        assert capsys.readouterr().err.startswith("interrupted: ")

    def test_a_bug_keeps_its_trace(self) -> None:
        def job() -> None:
            raise RuntimeError("a bug of ours")

        with pytest.raises(RuntimeError, match="a bug of ours"):
            run_job(job)


def test_declared_colours_arrive(tmp_path: Path) -> None:
    """Through YAML, where an unquoted "#808080" is a comment: to display a class, as masks' values, to be ignored."""
    make_folder(tmp_path / "data", {"train": 2, "val": 2})
    start = f"data: {{dataset: {{class_path: FolderData, init_args: {{root: {tmp_path / 'data'}, "
    Path("index.yaml").write_text(
        start + 'classes: {sky: {value: 0, color: "#808080"}, road: {value: [1, 255], color: "#804080"}}}}}\n'
    )
    cli = SegmentationCLI(["--config", "index.yaml"])
    assert cli.datamodule.labels.colors == cli.model.labels.colors == ["#808080", "#804080"]
    Path("colour.yaml").write_text(
        start + 'ignore: "#000000", classes: {sky: "#808080", road: ["#804080", "#FFFFFF"]}}}}\n'
    )
    labels = SegmentationCLI(["--config", "colour.yaml"]).datamodule.labels
    assert labels.values == [["#808080"], ["#804080", "#FFFFFF"]]
    assert labels.colors == ["#808080", "#804080"]
    assert labels.ignore == ["#000000"]
    ignored = SegmentationCLI(["--config", "index.yaml", "--data.dataset.ignore", "7"]).datamodule.labels
    assert ignored.ignore == [7]
    Path("none.yaml").write_text("data: {dataset: {init_args: {ignore: null}}}")
    none = ["--config", "colour.yaml", "--config", "none.yaml"]
    assert SegmentationCLI(none).datamodule.labels.ignore == []
    typed = ["--config", "colour.yaml", "--data.dataset.ignore", '["#010101"]']
    assert SegmentationCLI(typed).datamodule.labels.ignore == ["#010101"]


def test_warnings_are_one_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """This project's say no place in the source; those of libraries do."""
    monkeypatch.setattr(warnings, "showwarning", warnings.showwarning)  # put back afterwards
    for path, said in {ROOT / "src/segmentation/module.py": "warning: rare\n", Path("a.py"): "a.py:1: "}.items():
        run_job(lambda path=path: warnings.warn_explicit("rare", UserWarning, str(path), 1))
        assert capsys.readouterr().err.startswith(said)
