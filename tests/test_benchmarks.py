"""The benchmarks: each runs with its smallest options and prints its table; what they compute from times is right."""

import importlib
import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from conftest import ROOT
from segmentation.nets import Heads, SegmentationNet, UNet3Plus


@pytest.fixture
def limits(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return importlib.import_module("limits")


def run(name: str, *args: str) -> subprocess.CompletedProcess:
    command = [sys.executable, str(ROOT / "benchmarks" / f"{name}.py"), *args]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)


def table(stdout: str, first: str) -> list[dict[str, str]]:
    """Rows of the Markdown table whose header begins with `first`; of equal headings the last one's cell."""
    lines = stdout.splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith(f"| {first} "))
    rows = []
    for line in (lines[start], *lines[start + 2 :]):
        if not line.startswith("|"):
            break
        rows.append([cell.strip() for cell in line.strip("|").split("|")])
    header, *body = rows
    assert all(len(row) == len(header) for row in body)
    return [dict(zip(header, row, strict=True)) for row in body]


class OneConv(SegmentationNet):
    """A 3x3 convolution of 3 bands to 8 classes."""

    def __init__(self) -> None:
        super().__init__(3, 8)
        self.conv = nn.Conv2d(3, 8, kernel_size=3, padding=1, bias=False)

    def compute(self, image: Tensor, level: int | None = None) -> Heads:
        return Heads((self.conv(image),))


def test_work_of_a_convolution_by_hand(limits) -> None:
    """2 x 16 x 16 pixels, 8 results of 27 products each; the image needs no gradient, so backward is as much again."""
    shape, flops = (2, 3, 16, 16), 2 * (2 * 16 * 16) * 8 * 27
    image, weight, result = 2 * 3 * 16 * 16, 8 * 27, 2 * 8 * 16 * 16
    forward = (flops, 2 * (image + weight + result))
    assert limits.count_work(OneConv(), shape, torch.bfloat16, train=False) == [forward]
    assert limits.count_work(OneConv(), shape, torch.float32, train=True) == [
        (flops, 2 * forward[1]),
        (flops, 4 * (result + image + weight + weight)),  # the gradient and the image in, that of the weights out
    ]


def test_shares_by_hand(limits) -> None:
    machine = limits.Limits({torch.float32: 1e9}, bandwidth=1e8)
    works = [limits.Work(flops=10**9, bytes=10**7), limits.Work(flops=10**8, bytes=10**8)]  # a second each
    assert machine.of_peak(works, torch.float32, time=4.0) == pytest.approx(1.1 / 4)
    assert machine.of_limit(works, torch.float32, time=4.0) == pytest.approx(2.0 / 4)


def test_work_of_a_net_is_torchs_own_count(limits) -> None:
    net, shape = UNet3Plus(widths=[4, 8, 8], skip_channels=4, deep_supervision=True), (2, 3, 32, 32)
    with FlopCounterMode(display=False) as counter:
        torch.stack([logits.sum() for logits in net(torch.rand(shape)).logits]).sum().backward()
    works = limits.count_work(net, shape, torch.float32, train=True)
    assert sum(work.flops for work in works) == counter.get_total_flops()


def test_rates_are_those_of_the_machine(limits) -> None:
    found = limits.measure_limits([torch.float32], "cpu", repeats=1)
    assert 1e9 < found.flops[torch.float32] < 1e15
    assert 1e8 < found.bandwidth < 1e14
    assert re.fullmatch(r"[\d.,]+ TFLOP/s in float32 \(.*\); [\d,]+ GB/s read and written \(.*\)", str(found))


@pytest.mark.slow
def test_nets() -> None:
    small = ["--size", "64", "--batch", "1", "--repeats", "1"]
    nets = ["smp Unet, resnet34", "UNet, resnet34"]  # light: a CPU without bf16 emulates it slowly
    done = run("nets", *small, "--nets", *nets, "--modes", "eager", "--layouts", "channels_last")
    assert done.returncode == 0, done.stderr
    assert "TFLOP/s in float32" in done.stdout
    assert "TFLOP/s in bfloat16" in done.stdout
    rows = table(done.stdout, "net")
    assert [(row["net"], row["precision"]) for row in rows] == [
        (net, dtype) for net in nets for dtype in ("float32", "bf16")
    ]
    for row in rows:
        assert re.fullmatch(r"[\d,.]+ ms", row["training step"])
        assert re.fullmatch(r"[\d,.]+ ms", row["inference"])
        assert 0 < float(row["of peak"].rstrip("%")) <= float(row["of limit"].rstrip("%"))


@pytest.mark.slow
def test_nets_of_other_packages() -> None:
    net = "MONAI BasicUNetPlusPlus"
    small = ["--size", "64", "--batch", "1", "--repeats", "1", "--cpu-time", "--dtypes", "float32"]
    ours = ["UNet++", "UNet++, plain form"]
    done = run("nets", *small, "--nets", net, *ours, "--modes", "eager", "--layouts", "contiguous")
    assert done.returncode == 0, done.stderr
    has_monai = importlib.util.find_spec("monai") is not None
    assert [row["net"] for row in table(done.stdout, "net")] == ([net, *ours] if has_monai else ours)
    assert ("pip install --no-deps monai" in done.stderr) is not has_monai


@pytest.mark.slow
def test_nets_refuses_graphs_without_a_gpu() -> None:
    done = run("nets", "--modes", "graphs")
    assert done.returncode == 2
    assert done.stderr == "nets.py: --modes graphs needs a GPU: on a CPU leave it out\n"


@pytest.mark.slow
def test_memory(place: Path) -> None:
    """Whole, an image of 4 megapixels would need 2.3 GiB with this net."""
    large = ["--width", "2400", "--height", "1800", "--data.num_workers", "0", "--model.net.widths", "[16,32]"]
    done = run("memory", *large, "--trainer.accelerator", "cpu", "--trainer.precision", "32-true")
    assert done.returncode == 0, done.stderr
    (row,) = table(done.stdout, "images")
    assert row["images"] == "4 of 2400x1800"
    assert 0.3 < float(row["peak of all processes"].removesuffix(" GiB")) < 1.6


@pytest.mark.slow
def test_training(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SEG_DATA", raising=False)
    small = ["--data.dataset.train", "12", "--data.dataset.size", "48", "--model.net.widths", "[4,8]"]
    done = run("training", "--epochs", "2", "--steps", "2", "--batch-size", "4", "--workers", "0", *small)
    assert done.returncode == 0, done.stderr
    assert "SEG_DATA is not set" in done.stdout
    assert "workers: 0; UNet in " in done.stdout
    assert "batches of 4x3x48x48, 3 steps per epoch, epochs: 2" in done.stdout
    (whole,) = table(done.stdout, "whole epoch")
    rates = [float(whole[key].split()[0].replace(",", "")) for key in ("whole epoch", "step alone")]
    assert float(whole["ratio"].rstrip("%")) == pytest.approx(100 * rates[0] / rates[1], rel=0.05)
    rows = table(done.stdout, "part of an epoch")
    parts = {row["part of an epoch"]: float(row["ms per step"].replace(",", "")) for row in rows}
    names = "data wait, transfer, step, counting, finite check, logging, callbacks, last.ckpt, rest"
    assert list(parts) == names.split(", ")
    assert min(parts.values()) > 0
    assert sum(float(row["share"].rstrip("%")) for row in rows) == pytest.approx(100, abs=0.5)
    assert not list((place / "runs").iterdir())  # it leaves no run behind
