"""A checkpoint is enough by itself, and cannot run code."""

import csv
import json
import os
from pathlib import Path

import pytest
import torch
import yaml

from conftest import TINY, TINY_RUN, make_folder, train
from segmentation.checkpoint import read_checkpoint
from segmentation.errors import InputError
from segmentation.inference.evaluate import evaluate
from segmentation.module import SegmentationModule
from segmentation.training.cli import SegmentationCLI


@pytest.fixture
def trained(tmp_path: Path) -> SegmentationCLI:
    return train(*TINY, "--name", "run")


def test_eval_gives_the_test_figures_again(trained: SegmentationCLI) -> None:
    summary = json.loads(Path("runs/run/summary.json").read_text())
    evaluate(["runs/run/checkpoints/best.ckpt", "--output", "eval.json", "--trainer.accelerator", "cpu"])
    found = json.loads(Path("eval.json").read_text())
    assert found["split"] == "test"
    assert found["metrics"] == {k.removeprefix("test/"): v for k, v in summary.items() if k.startswith("test/")}
    assert Path("eval_per_image.csv").read_text() == Path("runs/run/per_image.csv").read_text()
    # another batch size: the same counts
    one = ["--data.eval_batch_size", "1", "--trainer.accelerator", "cpu", "--output", "one.json"]
    evaluate(["runs/run/checkpoints/best.ckpt", *one])
    again = json.loads(Path("one.json").read_text())["metrics"]
    assert again.pop("loss") == pytest.approx(found["metrics"].pop("loss"), rel=1e-5)
    assert again == found["metrics"]
    # the validation split, as validation counted it
    val = evaluate(["runs/run/checkpoints/best.ckpt", "--split", "val", "--trainer.accelerator", "cpu"])
    assert val["miou"] == summary["val/miou"]


def test_the_loss_does_not_depend_on_the_batch_size(tmp_path: Path) -> None:
    """With class weights a batch's loss is divided by the sum of its weights, not by its pixels."""
    train(*TINY, "--name", "run", "--model.loss.class_weights", "[1,20,3,4,5]", "--data.dataset.test", "5")
    found = [
        evaluate(["runs/run/checkpoints/best.ckpt", "--data.eval_batch_size", str(n), "--trainer.accelerator", "cpu"])
        for n in (1, 2, 5)
    ]
    assert found[0]["loss"] == pytest.approx(found[1]["loss"], rel=1e-5)
    assert found[0]["loss"] == pytest.approx(found[2]["loss"], rel=1e-5)


def test_checkpoint_is_enough(trained: SegmentationCLI) -> None:
    """Net, labels, normalisation and threshold come back from the file; the output is the same."""
    checkpoint = read_checkpoint("runs/run/checkpoints/last.ckpt")
    module = SegmentationModule.load_from_checkpoint("runs/run/checkpoints/last.ckpt")
    image = trained.datamodule.dataset.load("test", 0)["image"][None]
    with torch.no_grad():
        assert module(image).isfinite().all()
    assert all(torch.equal(value, checkpoint["state_dict"][key]) for key, value in module.state_dict().items())
    assert module.labels == trained.datamodule.labels
    assert checkpoint["precision"] == "32-true"
    assert checkpoint["datamodule_hyper_parameters"]["dataset"]["class_path"].endswith("ShapesData")
    assert torch.equal(module.mean, torch.tensor(trained.datamodule.statistics("train").mean))


def test_the_threshold_is_kept() -> None:
    """From a threshold of 0.9 up less is foreground; what was trained with one is predicted and tested with it."""
    Path("two.py").write_text(
        "from segmentation.data import Labels, ShapesData\n"
        "class Two(ShapesData):\n"
        "    def __init__(self):\n"
        "        super().__init__(12, 5, 5, 48)\n"
        "        self.labels = Labels.parse({'background': 0, 'shape': 1})\n"
        "    def load(self, split, index):\n"
        "        sample = super().load(split, index)\n"
        "        return {**sample, 'mask': sample['mask'].clamp(max=1)}\n"
    )
    options = [*TINY_RUN, "--data.dataset", "two.Two", "--name", "run", "--model.threshold", "0.9"]
    cli = train(*options)
    module = SegmentationModule.load_from_checkpoint("runs/run/checkpoints/best.ckpt")
    sample = cli.datamodule.dataset.load("test", 0)
    with torch.no_grad():
        logits = module(sample["image"][None])
    assert torch.equal(module.classify(logits)[0] == 1, logits[0, 0].sigmoid() > 0.9)
    assert (module.classify(logits) == 1).sum() < (logits > 0).sum()


def test_malicious_pickle_does_not_run(tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self) -> tuple:
            return os.mkdir, (str(tmp_path / "owned"),)

    torch.save({"state_dict": {}, "hyper_parameters": Evil()}, tmp_path / "evil.ckpt")
    with pytest.raises(InputError, match=r"evil\.ckpt"):
        read_checkpoint(tmp_path / "evil.ckpt")
    assert not (tmp_path / "owned").exists()


@pytest.mark.parametrize("content", [b"", b"not a checkpoint", None], ids=["empty", "text", "another project's"])
def test_not_a_checkpoint(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "wrong.ckpt"
    torch.save({"state_dict": {}}, path) if content is None else path.write_bytes(content)
    with pytest.raises(InputError, match=r"wrong\.ckpt"):
        read_checkpoint(path)


def test_cut_off_checkpoint(trained: SegmentationCLI) -> None:
    path = Path("runs/run/checkpoints/best.ckpt")
    path.write_bytes(path.read_bytes()[:5000])
    with pytest.raises(InputError, match=r"best\.ckpt.*cut off"):
        read_checkpoint(path)


def test_warm_start_takes_what_fits_and_says_what_did_not(
    trained: SegmentationCLI, capsys: pytest.CaptureFixture, tmp_path: Path
) -> None:
    start = "runs/run/checkpoints/last.ckpt"
    saved = torch.load(start, weights_only=True)["state_dict"]
    cli = SegmentationCLI([*TINY, "--model.init_from", start, "--model.net.widths", "[4,10]", "--name", "warm"])
    cli.trainer.fit_loop.epoch_loop.max_steps = 0  # set up, but not a step
    cli.trainer.fit(cli.model, datamodule=cli.datamodule)
    own = cli.model.net.state_dict()
    fitting = [k for k in own if f"net.{k}" in saved and saved[f"net.{k}"].shape == own[k].shape]
    assert len(fitting) > 10
    assert all(torch.equal(own[key], saved[f"net.{key}"]) for key in fitting)
    out = capsys.readouterr().out
    assert f"took {len(fitting)} of {len(own)}" in out
    assert all(key in out.split("newly initialised")[1] for key in set(own) - set(fitting))


def test_warm_start_of_another_net_asks_for_its_options(trained: SegmentationCLI) -> None:
    for options in (["--model.net.widths", "[8,16,16]"], ["--model.net", "UNet3Plus", "--model.net.widths", "[6,10]"]):
        args = ["--model.init_from", "runs/run/checkpoints/last.ckpt", "--name", "warm"]
        with pytest.raises(
            InputError, match=r"tensors of this net.*Fix: .*--model.net UNet --model.net.widths '.4, 8.'$"
        ):
            train(*TINY, *options, *args)
    assert not Path("runs/warm").exists()


def test_warm_start_where_nothing_fits(trained: SegmentationCLI, tmp_path: Path) -> None:
    checkpoint = torch.load("runs/run/checkpoints/last.ckpt", weights_only=True)
    checkpoint["state_dict"] = {"net.other": torch.zeros(3)}
    torch.save(checkpoint, "other.ckpt")
    cli = SegmentationCLI([*TINY, "--model.init_from", "other.ckpt", "--name", "warm"])
    with pytest.raises(InputError, match=r"other\.ckpt"):
        cli.run()


def test_eval_refuses_other_classes(trained: SegmentationCLI, tmp_path: Path) -> None:
    from conftest import make_folder

    make_folder(tmp_path / "data", {"train": 2, "val": 2})
    Path("other.yaml").write_text(
        f"data: {{dataset: {{class_path: FolderData, init_args: {{root: {tmp_path}/data, "
        "classes: {a: 0, b: 255}}}}"
    )
    with pytest.raises(InputError, match="classes"):
        evaluate(["runs/run/checkpoints/best.ckpt", "--data", "other.yaml"])


def test_eval_keeps_the_order_of_the_classes(tmp_path: Path) -> None:
    """The order of declaration is the order of the indices, whatever the alphabet says."""
    make_folder(tmp_path / "data", {"train": 4, "val": 3}, values=(0, 100, 255))
    dataset = {"root": str(tmp_path / "data"), "classes": {"wall": 0, "door": 100, "arch": 255}}
    Path("own.yaml").write_text(
        yaml.safe_dump({"data": {"dataset": {"class_path": "FolderData", "init_args": dataset}}}, sort_keys=False)
    )
    train("--config", "own.yaml", *TINY_RUN, "--data.crop", "32", "--name", "run")
    summary = json.loads(Path("runs/run/summary.json").read_text())
    assert read_checkpoint("runs/run/checkpoints/best.ckpt")["hyper_parameters"]["labels"]["names"][2] == "arch"
    for extra in ([], ["--data", "own.yaml"]):
        found = evaluate(["runs/run/checkpoints/best.ckpt", *extra, "--trainer.accelerator", "cpu"])
        assert [found[f"iou/{name}"] for name in ("wall", "door", "arch")] == pytest.approx(
            [summary[f"test/iou/{name}"] for name in ("wall", "door", "arch")], rel=0, abs=0
        )


def test_the_best_is_the_epoch_of_the_highest_miou(trained: SegmentationCLI) -> None:
    with Path("runs/run/metrics.csv").open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["val/miou"]]
    best = max(rows, key=lambda row: float(row["val/miou"]))
    assert len({row["val/miou"] for row in rows}) == len(rows) > 1
    assert torch.load("runs/run/checkpoints/best.ckpt", weights_only=True)["epoch"] == int(best["epoch"])
