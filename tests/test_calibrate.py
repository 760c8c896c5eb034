"""eval.py --calibrate: known temperatures, calibration errors by the formula, a guarantee tried by repetition."""

import json
import math
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch
from PIL import Image
from scipy.optimize import brentq

from conftest import TINY_RUN, make_folder, train
from segmentation.data.labels import Labels
from segmentation.errors import InputError
from segmentation.inference.calibrate import (
    THRESHOLDS,
    calibration_errors,
    choose_threshold,
    fit_temperature,
    is_controlled,
)
from segmentation.inference.evaluate import evaluate
from segmentation.inference.export import export
from segmentation.inference.predict import predict
from segmentation.inference.predictor import Predictor
from segmentation.inference.prune import prune
from segmentation.inference.share import share
from segmentation.module import SegmentationModule

CPU = ["--trainer.accelerator", "cpu", "--data.num_workers", "0", "--trainer.enable_progress_bar", "false"]
BINARY = Labels.parse({"background": 0, "nucleus": 255})


def drawn(classes: int, pixels: int = 30_000) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits of a calibrated net, (pixels, K), and classes that were drawn from their probabilities."""
    random = torch.Generator().manual_seed(0)
    logits = 2 * torch.randn(pixels, classes, generator=random, dtype=torch.double)
    target = torch.multinomial(logits.softmax(dim=1), 1, generator=random)[:, 0]
    return logits, target


@pytest.mark.parametrize("classes", [2, 5])
@pytest.mark.parametrize("factor", [3.0, 1.0, 0.25])
def test_the_temperature_of_a_calibrated_net_is_what_its_logits_were_multiplied_by(classes: int, factor: float) -> None:
    logits, target = drawn(classes)
    assert fit_temperature(logits * factor, target) == pytest.approx(factor, rel=0.03)


def test_calibration_error_is_that_of_the_formula() -> None:
    logits, target = drawn(3, pixels=5000)
    logits *= 2
    labels = Labels.parse({"a": 0, "b": 1, "c": 2})
    found = calibration_errors(logits, target, labels, "ece")
    for index, name in enumerate("abc"):
        probability = logits.softmax(dim=1)[:, index].numpy()
        truth = target.numpy() == index
        expected = 0.0
        for low in np.arange(15) / 15:
            inside = (probability >= low) & (probability < low + 1 / 15)
            if inside.any():
                expected += inside.mean() * abs(truth[inside].mean() - probability[inside].mean())
        assert found[f"ece/{name}"] == pytest.approx(expected, abs=1e-9)
        assert expected > 0.05
    after = calibration_errors(logits / 2, target, labels, "ece")
    assert max(after.values()) < 0.02  # of 5000 pixels
    assert list(calibration_errors(logits[:, :2], target.clamp(max=1), BINARY, "ece")) == ["ece/nucleus"]


def test_the_bound_is_that_of_the_paper() -> None:
    """The upper bound itself, found as the root of the capital, image by image."""
    losses = np.random.default_rng(0).beta(0.3, 9, 120)
    confidence = 0.9

    def capital(risk: float) -> float:
        logs, means, spread, variance = [0.0], [], 0.25, 0.25
        for i, loss in enumerate(losses, start=1):
            bet = min(1, math.sqrt(2 * math.log(1 / (1 - confidence)) / (len(losses) * variance)))
            logs.append(logs[-1] + math.log(1 - bet * (loss - risk)))
            means.append((0.5 + losses[:i].sum()) / (1 + i))
            spread += (loss - means[-1]) ** 2
            variance = spread / (1 + i)
        return max(logs) + math.log(1 - confidence)

    bound = brentq(capital, 1e-6, 1)
    assert losses.mean() < bound < losses.mean() + 0.05
    assert is_controlled(losses[:, None], bound + 1e-6, confidence)[0]
    assert not is_controlled(losses[:, None], bound - 1e-6, confidence)[0]


@pytest.mark.parametrize(
    ("images", "confidence", "draws"), [(200, 0.8, 60), pytest.param(1000, 0.9, 120, marks=pytest.mark.slow)]
)
def test_the_guarantee_holds_as_often_as_it_says(images: int, confidence: float, draws: int) -> None:
    """What an image of difficulty u misses at each threshold is known, and so is its mean over all u. Among many draws
    of calibration images the promise is broken as seldom as it says, but not never: it is not empty."""
    random = np.random.default_rng(1)
    exact = what_is_missed((np.arange(4000) + 0.5) / 4000).mean(axis=0)
    risks = []
    for _ in range(draws):
        missed = what_is_missed(random.random(images))
        threshold = choose_threshold(torch.from_numpy(missed), 0.05, confidence)
        risks.append(exact[threshold == THRESHOLDS][0])
    broken = np.mean(np.array(risks) > 0.05)
    assert 0 < broken <= 1 - confidence
    assert np.median(risks) > 0.035  # most of what may be missed


def what_is_missed(difficulty: np.ndarray) -> np.ndarray:
    """(images, thresholds): from 0 to 1, the earlier the more difficult an image is."""
    shares = 1 / (1 + np.exp(-THRESHOLDS - 1))
    return shares ** (1 / (0.2 + 3 * difficulty[:, None] ** 2))


@pytest.fixture
def binary() -> str:
    """A checkpoint of two classes, of which 8 validation and 6 test images are there."""
    make_folder(Path("data"), {"train": 8, "val": 8, "test": 6})
    options = ["--data.dataset", "FolderData", "--data.dataset.root", "data", "--data.crop", "32", "--name", "run"]
    classes = ["--data.dataset.classes.background", "0", "--data.dataset.classes.spot", "255"]
    train(*TINY_RUN, *options, *classes, "--trainer.max_epochs", "8")
    return "runs/run/checkpoints/best.ckpt"


@pytest.mark.slow
def test_a_calibrated_copy_in_every_job(binary: str) -> None:
    guarantee = ["--max-missed", "0.2", "--confidence", "0.7"]
    found = evaluate([binary, "--calibrate", "copy.ckpt", *guarantee, "--output", "copy.json", *CPU])
    assert json.loads(Path("copy.json").read_text())["metrics"] == pytest.approx(found)
    assert found["ece/spot"] < found["ece_before/spot"]
    assert 0 <= found["missed"] < 0.3
    assert found["miou"] == evaluate(["copy.ckpt", *CPU])["miou"] != evaluate([binary, *CPU])["miou"]

    image = Path("data/test/images/00.png")
    plain, calibrated = (Predictor(path, "cpu") for path in (binary, "copy.ckpt"))
    logits = plain.logits(plain.read(image))
    _, probabilities, _ = calibrated(image)
    np.testing.assert_allclose(probabilities, torch.sigmoid(logits / found["temperature"]), atol=1e-6)
    mask = (probabilities[0] > found["threshold"]) * 255
    assert (mask == calibrated(image).mask).all()
    assert (mask != plain(image).mask).any()

    predict(["copy.ckpt", str(image), "masks", "--accelerator", "cpu"])
    assert (np.array(Image.open("masks/00.png")) == mask).all()
    predict(["copy.ckpt", str(image), "probabilities", "--format", "probabilities", "--accelerator", "cpu"])
    np.testing.assert_allclose(np.load("probabilities/00.npy"), probabilities, atol=1e-3)

    session = onnxruntime.InferenceSession(export(["copy.ckpt", *CPU]))
    about = session.get_modelmeta().custom_metadata_map
    assert float(about["threshold"]) == pytest.approx(found["threshold"])
    calibration = json.loads(about["calibration"])
    assert calibration["temperature"] == found["temperature"]
    assert (calibration["split"], calibration["max_missed"], calibration["confidence"]) == ("val", 0.2, 0.7)
    logits, exported = session.run(None, {"image": np.array(Image.open(image)).transpose(2, 0, 1)[None].copy()})
    np.testing.assert_allclose(1 / (1 + np.exp(-logits[0])), probabilities, atol=1e-3)
    assert (exported[0] * 255 == mask).mean() > 0.999

    share(["copy.ckpt", "shared", *CPU])
    assert SegmentationModule.load_from_checkpoint("shared").calibration == calibration
    with pytest.raises(InputError, match="is calibrated alone"):
        Predictor([binary, "copy.ckpt"], "cpu")
    with pytest.raises(InputError, match="--overwrite"):
        evaluate([binary, "--calibrate", "copy.ckpt", *CPU])
    with pytest.raises(InputError, match="48 val images with foreground"):
        evaluate([binary, "--calibrate", "strict.ckpt", "--max-missed", "0.05", *CPU])
    with pytest.raises(InputError, match="Validate on more"):
        evaluate([binary, "--calibrate", "strict.ckpt", "--max-missed", "1e-4", "--confidence", "1e-5", *CPU])
    assert not Path("strict.ckpt").exists()


def test_of_several_classes_each_has_its_calibration_error(trained: Path) -> None:
    found = evaluate([str(trained), "--calibrate", "copy.ckpt", *CPU])
    assert found["ece/background"] < found["ece_before/background"]
    assert found["miou"] == evaluate([str(trained), *CPU])["miou"]
    with pytest.raises(InputError, match="two classes"):
        evaluate([str(trained), "--calibrate", "other.ckpt", "--max-missed", "0.5", *CPU])
    prune(["copy.ckpt", "--level", "1", "--output", "small"])
    assert SegmentationModule.load_from_checkpoint("copy.ckpt").temperature == found["temperature"]
    assert SegmentationModule.load_from_checkpoint("small_L1.ckpt").temperature == 1  # it is another net


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (["--max-missed", "0.1"], "--calibrate"),
        (["--calibrate", "copy.ckpt", "--max-missed", "5"], "--max-missed"),
        (["--calibrate", "copy.ckpt", "--max-missed", "0"], "--max-missed"),
        (["--max-missed", "0"], "--calibrate"),
        (["--calibrate", "one.json", "--output", "one.json"], "are one file"),
        (["--calibrate", "copy.ckpt", "--ensemble", "other.ckpt"], "--ensemble"),
    ],
)
def test_options_that_do_not_go_together(options: list[str], named: str) -> None:
    with pytest.raises(InputError, match=named):
        evaluate(["best.ckpt", *options])
