"""What touches the device: on a GPU where there is one (`benchmarks/gpu.sh check`), else on the CPU where that says
something too."""

import csv
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from lightning.pytorch import Callback
from PIL import Image
from torch import nn

from conftest import ROOT, TINY_SHAPES, make_folder, script, train
from segmentation.errors import InputError
from segmentation.inference.evaluate import evaluate
from segmentation.inference.export import export
from segmentation.inference.predict import predict
from segmentation.inference.predictor import Predictor
from segmentation.losses import CrossEntropy
from segmentation.nets import SegmentationNet, SmpNet, UNet, UNet3Plus, UNetPlusPlus
from segmentation.training.cli import SegmentationCLI
from segmentation.training.trainer import SyncBatchNorm

CUDA = torch.cuda.is_available()
DEVICE, ACCELERATOR = ("cuda", "gpu") if CUDA else ("cpu", "cpu")
ON = ["--trainer.accelerator", ACCELERATOR, "--trainer.devices", "1"]
RUN = [*ON, "--data.batch_size", "4", "--data.num_workers", "0", "--pictures.images", "0", "--trainer.max_epochs", "2"]
SHAPES = [*TINY_SHAPES, *RUN]
HEADS = ["--model.net.deep_supervision", "true"]
NETS = {
    "UNet": ["--model.net", "UNet", "--model.net.widths", "[8,16,16]", *HEADS],
    "UNet++": ["--model.net", "UNetPlusPlus", "--model.net.widths", "[8,16,16]", *HEADS],
    "UNet3+": [
        *("--model.net", "UNet3Plus", "--model.net.widths", "[8,16,16]", "--model.net.skip_channels", "8", *HEADS),
        *("--model.net.classification_guided", "true"),
    ],
    "UNet, resnet18": [
        *("--model.net", "UNet", "--model.net.widths", "[8,8,8,8,8,8]", "--model.net.encoder", "resnet18")
    ],
    "smp Unet": ["--model.net", "SmpNet", "--model.net.architecture", "Unet", "--model.net.encoder", "resnet18"],
}

pytestmark = pytest.mark.slow
needs_a_gpu = pytest.mark.skipif(not CUDA, reason="needs a GPU")


def folder_overlay(root: Path) -> list[str]:
    """Images and masks of two classes in files, of two sizes where it is validated."""
    make_folder(root, {"train": 8, "val": 3}, size=(64, 80))
    for name, size in (("images/wide.png", (96, 48)), ("masks/wide.png", (96, 48))):
        part, _, file = name.partition("/")
        with Image.open(root / "val" / part / "00.png") as image:
            image.resize(size, Image.Resampling.NEAREST).save(root / "val" / part / file)
    options = {"root": str(root), "images": "{split}/images", "masks": "{split}/masks"}
    options["classes"] = {"ground": 0, "thing": 255}
    data = {"dataset": {"class_path": "FolderData", "init_args": options}, "crop": 32, "eval_batch_size": 1}
    Path("folder.yaml").write_text(yaml.safe_dump({"data": data}))
    return ["--config", "folder.yaml", *RUN]


def metrics(name: str, key: str) -> list[float]:
    """The logged values of a run, in their order."""
    with (Path("runs") / name / "metrics.csv").open() as file:
        return [float(row[key]) for row in csv.DictReader(file) if row.get(key)]


def weights(name: str) -> dict[str, torch.Tensor]:
    return torch.load(Path("runs") / name / "checkpoints/last.ckpt", weights_only=True)["state_dict"]


def alone(call: str) -> None:
    """Call a function of this file in a process of its own: what a library asks once a process is asked anew."""
    path = os.pathsep.join([str(ROOT / "tests"), str(ROOT / "src"), os.environ.get("PYTHONPATH", "")])
    command = [sys.executable, "-c", f"import test_device; test_device.{call}"]
    done = subprocess.run(command, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Distance, as a share of what is expected."""
    return float((found.double() - expected.double()).norm() / expected.double().norm())


@pytest.mark.parametrize("net", NETS)
def test_a_net_trains_and_predicts(net: str) -> None:
    """A step in the device's own precision, and the logits that the CPU has in float32, but for rounding."""
    train(*SHAPES, *NETS[net], "--trainer.limit_train_batches", "1", "--trainer.max_epochs", "1", "--name", "run")
    checkpoint = Path("runs/run/checkpoints/last.ckpt")
    image = torch.randint(0, 256, (3, 75, 50), dtype=torch.uint8)
    expected = Predictor(checkpoint, "cpu", "32-true").logits(image)
    for precision, most in (("32-true", 1e-2), ("bf16-mixed", 1e-1)):  # on a GPU the first is TensorFloat32
        found = Predictor(checkpoint, ACCELERATOR, precision).logits(image)
        assert relative(found, expected) < most, precision


def test_bf16_learns_what_float32_learns() -> None:
    for precision in ("32-true", "bf16-mixed"):
        options = ["--trainer.precision", precision, "--data.dataset.train", "32", "--trainer.max_epochs", "6"]
        train(*SHAPES, *NETS["UNet"], *options, "--name", precision)
    expected, found = (metrics(name, "train/loss") for name in ("32-true", "bf16-mixed"))
    assert found == pytest.approx(expected, rel=0.1)
    assert found[-1] < 0.8 * found[0]


@needs_a_gpu
@pytest.mark.parametrize(
    "net",
    [UNet(widths=(8, 16)), UNetPlusPlus(widths=(8, 16)), UNet3Plus(widths=(8, 16))],
    ids=lambda net: type(net).__name__,
)
def test_cuda_graphs(net: SegmentationNet) -> None:
    """Steps that are replayed have the losses of steps that are not."""
    images = torch.randn(4, 3, 64, 64, device=DEVICE)
    masks = (images.mean(dim=1) > 0).long()
    losses: dict[str, list[float]] = {}
    start = {key: value.clone() for key, value in net.state_dict().items()}
    for mode in ("eager", "graphs"):
        net.load_state_dict(start)
        net.to(DEVICE).train()
        if mode == "graphs":
            net.compile(mode="reduce-overhead", dynamic=False)
        optimizer = torch.optim.SGD(net.parameters(), lr=0.02)
        losses[mode] = []
        for _ in range(6):
            torch.compiler.cudagraph_mark_step_begin()
            loss = CrossEntropy()(net(images).logits[-1], masks)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses[mode].append(loss.item())
    assert losses["graphs"] == pytest.approx(losses["eager"], rel=0.02)
    assert losses["eager"][-1] < losses["eager"][0]


def train_twice(net: str) -> None:
    for name in ("one", "other"):
        train(*SHAPES, *NETS[net], "--trainer.deterministic", "true", "--data.num_workers", "1", "--name", name)


@pytest.mark.parametrize("net", ["UNet3+", *(pytest.param(net, marks=needs_a_gpu) for net in ("UNet", "smp Unet"))])
def test_deterministic(net: str) -> None:
    """The same weights to the last bit, in a process of its own: cuBLAS asks once how it is to work."""
    alone(f"train_twice({net!r})")
    one, other = weights("one"), weights("other")
    assert all(torch.equal(one[key], other[key]) for key in one)


@needs_a_gpu
def test_a_kernel_that_cannot_be_deterministic_is_one_line() -> None:
    net = ["--model.net", "SmpNet", "--model.net.architecture", "PSPNet", "--model.net.encoder", "resnet18"]
    done = script(
        "train", *SHAPES, *net, "--data.dataset.size", "64", "--trainer.deterministic", "true", "--name", "run"
    )
    assert done.returncode == 2, done.stderr
    assert "cannot be deterministic on this device" in done.stderr.strip().splitlines()[-1]


class Pull(Callback):
    """Pulls the plug after so many batches."""

    def __init__(self, batches: int) -> None:
        self.batches = batches

    def on_train_batch_start(self, *args: Any) -> None:
        if not self.batches:
            raise RuntimeError("plug pulled")
        self.batches -= 1


def train_interrupted() -> None:
    options = [*SHAPES, *NETS["UNet3+"], "--config", str(ROOT / "configs/trainer/ema.yaml"), "--data.num_workers", "1"]
    options += ["--trainer.deterministic", "true", "--trainer.max_epochs", "3", "--checkpoint.every_minutes", "0"]
    train(*options, "--name", "unbroken")
    cli = SegmentationCLI([*options, "--name", "broken"])
    cli.trainer.callbacks.insert(0, Pull(5))
    with pytest.raises(RuntimeError, match="plug pulled"):
        cli.run()
    train(*options, "--name", "broken", "--resume")


def test_resumed() -> None:
    """In the middle of an epoch, with averaged weights: the weights of the unbroken run, to the last bit."""
    alone("train_interrupted()")
    unbroken, broken = weights("unbroken"), weights("broken")
    assert all(torch.equal(unbroken[key], broken[key]) for key in unbroken)


class Whereabouts(Callback):
    """Where a callback that copies the module finds it, as one that averages its weights does."""

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        self.found = pl_module.device.type


def test_weights_are_averaged_on_the_device() -> None:
    cli = SegmentationCLI([*SHAPES, "--name", "run", "--trainer.max_epochs", "1"])
    cli.trainer.callbacks.append(Whereabouts())
    cli.run()
    assert cli.trainer.callbacks[-1].found == DEVICE


def test_batches_are_pinned() -> None:
    cli = train(*SHAPES, "--data.num_workers", "1", "--trainer.max_epochs", "1", "--name", "run")
    batch = next(iter(cli.datamodule.val_dataloader()))
    assert batch["image"].is_pinned() == batch["mask"].is_pinned() == CUDA


def test_miou_is_that_of_the_predicted_masks(tmp_path: Path) -> None:
    """Counted on the device, and again by hand, of masks in files."""
    train(*folder_overlay(tmp_path / "data"), "--trainer.max_epochs", "4", "--name", "run")
    checkpoint = "runs/run/checkpoints/best.ckpt"
    found = evaluate([checkpoint, "--split", "val", "--trainer.accelerator", ACCELERATOR, "--data.num_workers", "0"])
    assert predict([checkpoint, "data/val/images", "masks", "--accelerator", ACCELERATOR]) == 4
    counts = np.zeros((2, 2), dtype=np.int64)
    for path in Path("data/val/masks").iterdir():
        with Image.open(path) as mask, Image.open(Path("masks") / path.name) as predicted:
            truth, answer = np.asarray(mask) > 0, np.asarray(predicted) > 0
        np.add.at(counts, (truth.astype(int), answer.astype(int)), 1)
    hits = counts.diagonal()
    iou = hits / (counts.sum(axis=0) + counts.sum(axis=1) - hits)
    assert found["miou"] == pytest.approx(iou.mean(), rel=1e-7)


@pytest.mark.parametrize("form", ["onnx", "torch_export"])
def test_an_export_predicts_what_the_net_does(form: str) -> None:
    """Of a net that was trained on the device, in its precision."""
    train(*SHAPES, *NETS["UNet3+"], "--name", "run")
    assert export(["runs/run/checkpoints/best.ckpt", "--format", form]).is_file()


def test_a_loss_that_is_not_finite_ends_the_run() -> None:
    with pytest.raises(InputError, match="not finite"):
        train(*SHAPES, *NETS["UNet"], "--model.optimizer.lr", "1e30", "--trainer.max_epochs", "4", "--name", "run")


@needs_a_gpu
def test_a_gpu_that_is_full_is_one_line() -> None:
    large = ["--data.crop", "8192", "--model.net.widths", "[256,256]", "--trainer.max_epochs", "1"]
    done = script("train", *SHAPES, *large, "--name", "run")
    assert done.returncode == 2, done.stderr
    assert done.stderr.strip().splitlines()[-1].startswith("error: out of memory. Turn down")


@needs_a_gpu
def test_one_gpu_as_of_several() -> None:
    """DDP by NCCL, with SyncBatchNorm: one process, and the run goes through."""
    done = script("train", *SHAPES, "--trainer.strategy", "ddp", "--trainer.sync_batchnorm", "true", "--name", "run")
    assert done.returncode == 0, done.stderr
    assert json.loads(Path("runs/run/summary.json").read_text())["test/miou"] > 0


def normed(rank: int, world: int, folder: str) -> None:
    """A step of a net on a share of a batch, on one of `world` processes of the same GPU, by gloo."""
    torch.manual_seed(0)
    torch.backends.cudnn.allow_tf32 = False
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/meet{world}", rank=rank, world_size=world
    )
    net: nn.Module = SmpNet(architecture="Unet", encoder="resnet18") if CUDA else UNet()
    net = SyncBatchNorm().apply(net).to(DEVICE).train()
    image = torch.randn(4, 3, 64, 64)
    mine = slice(rank * 4 // world, (rank + 1) * 4 // world)
    module = nn.parallel.DistributedDataParallel(net)
    module(image[mine].to(DEVICE)).logits[-1].square().mean().backward()
    if rank == 0:
        kept = {name: parameter.grad.cpu() for name, parameter in net.named_parameters()}
        torch.save(kept | {name: buffer.cpu() for name, buffer in net.named_buffers()}, f"{folder}/normed{world}.pt")
    torch.distributed.destroy_process_group()


@needs_a_gpu
def test_batch_norm_over_processes(tmp_path: Path) -> None:
    """Gradients and running statistics of two processes are those of one on the whole batch."""
    for world in (1, 2):
        torch.multiprocessing.spawn(normed, (world, str(tmp_path)), nprocs=world)
    one, two = (torch.load(tmp_path / f"normed{world}.pt") for world in (1, 2))
    for name, value in one.items():
        assert relative(two[name] + 1e-6, value + 1e-6) < 1e-2, name


@pytest.mark.parametrize("net", ["UNet", pytest.param("UNet3+", marks=needs_a_gpu)])
def test_compiled(net: str, tmp_path: Path) -> None:
    """Crops of one size, validation images of two: compiled, the run is the one it is uncompiled, but for rounding."""
    overlay = folder_overlay(tmp_path / "data")
    for compiled in ("true", "false"):
        options = ["--trainer.precision", "32-true", "--model.optimizer.lr", "1e-4", "--model.compile", compiled]
        train(*overlay, *NETS[net], *options, "--name", f"compiled-{compiled}")
    for key in ("train/loss", "val/loss"):
        expected, found = (metrics(f"compiled-{compiled}", key) for compiled in ("false", "true"))
        assert len(expected) == 2
        assert found == pytest.approx(expected, rel=0.02), key
