"""Accumulated batches, and processes, make the step that one large batch would make."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from conftest import TINY_RUN, make_folder, train, write_image
from segmentation.errors import InputError

#: Plain steps: the weights say what the gradient was.
PLAIN = ["--model.optimizer", "torch.optim.SGD", "--model.optimizer.lr", "0.1", "--model.net.norm", "group"]
PLAIN += ["--model.schedule.decay", "constant", "--model.schedule.warmup", "0", "--trainer.gradient_clip_val", "null"]


@pytest.fixture
def unequal(place: Path) -> list[str]:
    """Ten images, of which some have hardly a pixel that counts."""
    root = make_folder(place / "data", {"train": 10, "val": 2}, values=(0, 1, 2))
    for number in (0, 3, 4, 8):
        mask = np.full((48, 40), 255, np.uint8)
        mask[:6, :6] = 1
        write_image(root / f"train/masks/{number:02d}.png", mask)
    classes = "{background: 0, one: 1, two: 2}"
    data = ["--data.dataset", "FolderData", "--data.dataset.root", str(root), "--data.dataset.classes", classes]
    return [*data, "--data.dataset.ignore", "255", *TINY_RUN, *PLAIN]


def run(name: str, *args: str) -> tuple[dict[str, torch.Tensor], Any]:
    cli = train(*args, "--name", name)
    weights = torch.load(f"runs/{name}/checkpoints/last.ckpt", weights_only=True)["state_dict"]
    return {key: value for key, value in weights.items() if key.startswith("net.")}, cli


LOSSES = {
    "cross-entropy": [],
    "weighted": ["--model.loss.class_weights", "[1.0,2.0,7.0]"],
    "heads": ["--model.net.deep_supervision", "true"],
}


@pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)
def test_accumulated_batches_are_one_large_batch(unequal: list[str], loss: list[str]) -> None:
    """With other numbers of valid pixels in each, too, and other weights of these."""
    large, _ = run("large", *unequal, *loss, "--data.batch_size", "4")
    parts, _ = run("parts", *unequal, *loss, "--data.batch_size", "2", "--trainer.accumulate_grad_batches", "2")
    for key, value in large.items():
        torch.testing.assert_close(parts[key], value, rtol=1e-4, atol=1e-6)
    logged = [torch.load(f"runs/{name}/checkpoints/last.ckpt", weights_only=True) for name in ("large", "parts")]
    assert logged[0]["global_step"] == logged[1]["global_step"] == 4


@pytest.mark.parametrize(("batches", "steps"), [(4, 1), (20, 1), (2, 2)])
def test_an_epoch_is_whole_steps(unequal: list[str], batches: int, steps: int) -> None:
    """Five batches of two images: none of a step's accumulated batches is missing."""
    _, cli = run("run", *unequal, "--data.batch_size", "2", "--trainer.accumulate_grad_batches", str(batches))
    assert cli.trainer.global_step == 2 * steps
    assert cli.trainer.num_training_batches == steps * batches


@pytest.mark.parametrize("option", ["--trainer.limit_train_batches", "--trainer.overfit_batches"])
def test_a_limit_that_breaks_a_step_is_refused(option: str, unequal: list[str]) -> None:
    accumulated = [*unequal, "--data.batch_size", "2", "--trainer.accumulate_grad_batches", "2"]
    with pytest.raises(InputError, match=f"Fix: {option} 4$"):
        run("run", *accumulated, option, "3")
    run("whole", *accumulated, option, "4")
