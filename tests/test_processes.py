"""The same checkpoint gives the same figures on 1, 2 and 3 CPU processes and with batches of 1 and 4."""

import json
import random
from pathlib import Path

import pytest
import torch

from conftest import TINY, script, train
from segmentation.losses import CrossEntropy, Focal, WeightedSum
from segmentation.nets import UNet


def figures(checkpoint: str, processes: int, batch: int, *args: str) -> dict[str, float]:
    output = f"{processes}-{batch}.json"
    options = [
        "--trainer.accelerator",
        "cpu",
        "--trainer.devices",
        str(processes),
        "--data.eval_batch_size",
        str(batch),
        "--data.num_workers",  # three processes, and their launcher, are enough for two cores
        "0",
    ]
    port = str(random.randint(20000, 30000))  # below those that a system gives to outgoing connections
    done = script("eval", checkpoint, "--overwrite", "--output", output, *options, *args, timeout=900, MASTER_PORT=port)
    assert done.returncode == 0, done.stderr
    return json.loads(Path(output).read_text())["metrics"]


def exactly_equal(found: dict[str, float], expected: dict[str, float]) -> None:
    """Every figure is derived from integers: equal to the last digit."""
    one, other = ({key: repr(value) for key, value in x.items()} for x in (found, expected))  # NaN too
    assert one == other


@pytest.mark.slow
def test_split_smaller_than_the_number_of_processes() -> None:
    train(*TINY, "--name", "run", "--data.dataset.test", "2")
    checkpoint = "runs/run/checkpoints/best.ckpt"
    expected = figures(checkpoint, 1, 4)
    exactly_equal(figures(checkpoint, 3, 1), expected)


@pytest.mark.slow
def test_other_numbers_of_processes() -> None:
    train(*TINY, "--name", "run", "--data.dataset.test", "2")
    checkpoint = "runs/run/checkpoints/best.ckpt"
    more = ["--surface-distances", "--ensemble", checkpoint]
    exactly_equal(figures(checkpoint, 3, 4, *more), figures(checkpoint, 1, 4, *more))
    # an odd number of images on an even number of processes
    exactly_equal(figures(checkpoint, 2, 4, "--split", "val"), figures(checkpoint, 1, 1, "--split", "val"))


@pytest.mark.slow
def test_nuclei_of_mixed_sizes(seg_data: Path) -> None:
    from conftest import ROOT

    overlay = ["--config", str(ROOT / "configs/data/nuclei.yaml"), "--name", "run", "--trainer.accelerator", "cpu"]
    train(*overlay, "--model.net.widths", "[4,8]", "--trainer.max_steps", "5", "--pictures.images", "0")
    checkpoint = "runs/run/checkpoints/last.ckpt"
    expected = figures(checkpoint, 1, 1)
    for processes, batch in ((1, 4), (2, 1), (2, 4), (3, 1), (3, 4)):
        exactly_equal(figures(checkpoint, processes, batch), expected)


@pytest.mark.slow
def test_training_in_two_processes(tmp_path: Path) -> None:
    """DDP through the script: one run folder, one W&B run, one last.ckpt, the steps of a batch twice as large, and
    figures that one process finds again, of an odd number of images too."""
    options = ["--trainer.devices", "2", "--name", "ddp", "--data.dataset.train", "16"]
    done = script("train", *TINY, *options, WANDB_MODE="offline")
    assert done.returncode == 0, done.stderr
    assert len(list(Path("runs/ddp/wandb").glob("offline-run-*"))) == 1
    assert [path.name for path in Path("runs").iterdir()] == ["ddp"]
    checkpoint = torch.load("runs/ddp/checkpoints/last.ckpt", weights_only=True)
    assert checkpoint["global_step"] == 2 * 16 // (4 * 2)
    logged = json.loads(Path("runs/ddp/summary.json").read_text())
    for split in ("test", "val"):  # the best epoch's validation, and the test of the best checkpoint
        found = figures("runs/ddp/checkpoints/best.ckpt", 1, 4, "--split", split)
        for key, value in found.items():
            if f"{split}/{key}" in logged:
                assert repr(logged[f"{split}/{key}"]) == repr(value), key
        assert f"{split}/miou" in logged


def gradients_of(rank: int, world: int, folder: str) -> None:
    """Of a share of a batch, on one of `world` processes; averaged over them by DDP."""
    torch.manual_seed(0)
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/meet{world}", rank=rank, world_size=world
    )
    net = UNet(num_classes=3, widths=(4, 8), norm="group", deep_supervision=True)
    loss = WeightedSum([CrossEntropy(class_weights=[1.0, 2.0, 5.0]), Focal(gamma=1.0)])
    image, mask = torch.randn(4, 3, 24, 24), torch.randint(0, 3, (4, 24, 24))
    mask[:2, :, 4:] = -100  # the first process has a sixth of the second's pixels
    mine = slice(rank * 4 // world, (rank + 1) * 4 // world)
    module = torch.nn.parallel.DistributedDataParallel(net)
    pixels = torch.bincount(mask[mask >= 0], minlength=3).float() / world
    sum(loss(logits, mask[mine], step_pixels=pixels) for logits in module(image[mine]).logits).backward()
    if rank == 0:
        torch.save([p.grad for p in net.parameters()], f"{folder}/gradients{world}.pt")
    torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_gradients_of_two_processes_are_those_of_one(tmp_path: Path) -> None:
    """Of the same global batch, though the processes differ in valid pixels (and, with weights, in mass)."""
    for world in (1, 2):
        torch.multiprocessing.spawn(gradients_of, (world, str(tmp_path)), nprocs=world)
    one, two = (torch.load(tmp_path / f"gradients{world}.pt") for world in (1, 2))
    assert max(float(gradient.abs().max()) for gradient in one) > 1e-3
    for a, b in zip(two, one, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)
