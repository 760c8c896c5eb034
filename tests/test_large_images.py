"""Images that go by tiles: validation, test, eval.py and predict.py say one thing of them."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from conftest import TINY_RUN, train, write_image
from segmentation.inference.evaluate import evaluate
from segmentation.inference.predict import predict
from segmentation.inference.predictor import Predictor
from segmentation.losses import CrossEntropy, Dice
from segmentation.module import SegmentationModule
from segmentation.nets import tiles

CPU = ["--trainer.accelerator", "cpu", "--data.num_workers", "0"]
BEST = "runs/run/checkpoints/best.ckpt"
HEADS = ["--model.net", "UNetPlusPlus", "--model.net.deep_supervision", "true", "--model.net.widths", "[4,8,8]"]


@pytest.fixture
def small_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    """Images of more than 2,000 pixels are large, and cut into tiles of 32."""
    monkeypatch.setattr(tiles, "WHOLE", 2000)
    monkeypatch.setattr(tiles, "TILE", 32)


def options(values: list[int]) -> list[str]:
    """A run on four images that are large, and one that is not."""
    rng = np.random.default_rng(0)
    for number, (height, width) in enumerate([(100, 81)] * 2 + [(75, 90)] * 2 + [(40, 36)]):
        mask = rng.choice(np.array(values, np.uint8), (height // 5 + 1, width // 5 + 1))
        mask = mask.repeat(5, axis=0).repeat(5, axis=1)[:height, :width]
        image = rng.integers(0, 80, (height, width, 3), dtype=np.uint8) + mask[..., None] * np.uint8(60)
        for split in ("train", "val"):
            write_image(Path(f"data/{split}/images/{number}.png"), image)
            write_image(Path(f"data/{split}/masks/{number}.png"), mask)
    classes = json.dumps({f"c{value}": value for value in values})
    data = ["--data.dataset", "FolderData", "--data.dataset.root", "data", "--data.dataset.classes", classes]
    return [*TINY_RUN, *data, "--data.crop", "32", "--trainer.max_epochs", "1", "--name", "run"]


def pixels(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        return np.array(image)


@pytest.mark.usefixtures("small_limit")
@pytest.mark.parametrize(
    ("values", "model"),
    [
        ([0, 1], HEADS),
        pytest.param([0, 1, 2], [*HEADS, "--model.net.inference", "mean"], marks=pytest.mark.slow),
    ],
)
def test_train_eval_and_predict_agree(values: list[int], model: list[str]) -> None:
    train(*options(values), *model, "--data.eval_batch_size", "3")
    summary = json.loads(Path("runs/run/summary.json").read_text())
    for size in ("1", "4"):
        found = evaluate([BEST, *CPU, "--data.eval_batch_size", size])
        for key, value in found.items():
            assert repr(value) == repr(summary[f"test/{key}"]), key
    predict([BEST, "data/val/images", "masks", "--accelerator", "cpu"])
    counts = np.zeros((len(values), len(values)))
    for file in sorted(Path("masks").glob("*.png")):
        np.add.at(counts, (pixels(Path("data/val/masks", file.name)), pixels(file)), 1)
    tp = counts.diagonal()
    iou = tp / (counts.sum(axis=0) + counts.sum(axis=1) - tp)
    assert summary["test/miou"] == pytest.approx(np.nanmean(iou), rel=1e-12)
    assert summary["val/miou"] == summary["test/miou"]
    assert summary["val/head2/miou"] != summary["val/head1/miou"]


@pytest.mark.usefixtures("small_limit")
@pytest.mark.parametrize(("name", "given"), [("CrossEntropy", ["--model.loss.class_weights", "auto"]), ("Dice", [])])
def test_the_loss_is_that_of_the_whole_image(name: str, given: list[str]) -> None:
    """Of a mean over pixels, whose weights differ, and of an overlap, which is no mean."""
    train(*options([0, 1, 2]), "--model.loss", name, *given)
    loss = SegmentationModule.load_from_checkpoint(BEST).loss
    assert isinstance(loss, CrossEntropy | Dice)
    predictor = Predictor(BEST, "cpu")
    losses = []
    weights = []
    for number in range(5):
        logits = predictor.logits(predictor.read(Path(f"data/val/images/{number}.png")))[None]
        mask = torch.from_numpy(pixels(Path(f"data/val/masks/{number}.png"))).long()[None]
        losses.append(loss(logits, mask).item())
        weights.append(loss.weight_sum(torch.bincount(mask.flatten(), minlength=3), channels=3).item())
    assert evaluate([BEST, *CPU])["loss"] == pytest.approx(np.average(losses, weights=weights), rel=1e-5)
