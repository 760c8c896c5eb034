"""Time and memory of the nets, side by side: `python benchmarks/nets.py`; about an hour on 2 CPU cores.

    python benchmarks/nets.py --size 64 --batch 1 --repeats 1 --modes eager          # does it work? a minute
    python benchmarks/nets.py --nets UNet3+ "UNet3+, plain form" --modes eager       # one question

Every row takes one step in turn, as many rounds as `--repeats`, all in one process on the same images, so that what
else the machine does hits all rows alike (but `kept`, which come last: eager, with freed memory kept between steps as
train.py does; they cannot be mixed with the others). The table has medians. Ratios are to the first row of the same
net: float32, contiguous, eager. For UNet3+ that is the plain form, which convolves after up-sampling as the paper
writes it; for nets with resnet34 that of segmentation-models-pytorch's; for pruned nets that of the whole. A training
step is forward, backward and SGD on `--batch` images; inference is `predict` of one image. Memory is the peak of a
training step beyond what the process held before it: activations, gradients and workspace, not the weights.
"""

import argparse
import itertools
import statistics
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch._dynamo
import torch.nn.functional as F
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1] / "src"))
from segmentation.machine import machine, peak_memory, seconds
from segmentation.memory import keep_freed_memory
from segmentation.nets import SegmentationNet, SmpNet, UNet, UNet3Plus, UNetPlusPlus, unet_3plus
from segmentation.nets.blocks import enlarge

PLAIN = "UNet3+, plain form"
NETS: dict[str, Callable[[], SegmentationNet]] = {
    "UNet": UNet,
    "UNet++": lambda: UNetPlusPlus(deep_supervision=True),
    "UNet++ pruned to L3": lambda: UNetPlusPlus(deep_supervision=True).prune(3),
    "UNet++ pruned to L2": lambda: UNetPlusPlus(deep_supervision=True).prune(2),
    "UNet++ pruned to L1": lambda: UNetPlusPlus(deep_supervision=True).prune(1),
    "UNet++, checkpointing": lambda: UNetPlusPlus(deep_supervision=True, checkpointing=True),
    PLAIN: lambda: UNet3Plus(deep_supervision=True),
    "UNet3+": lambda: UNet3Plus(deep_supervision=True),
    "UNet3+, checkpointing": lambda: UNet3Plus(deep_supervision=True, checkpointing=True),
    "UNet, resnet34": lambda: UNet(encoder="resnet34", widths=(16, 32, 64, 128, 256, 512)),
    "UNet++, resnet34": lambda: UNetPlusPlus(encoder="resnet34", widths=(16, 32, 64, 128, 256, 512)),
    "smp Unet, resnet34": lambda: SmpNet(architecture="Unet"),
    "smp UnetPlusPlus, resnet34": lambda: SmpNet(architecture="UnetPlusPlus"),
}
#: The net whose first row a ratio is to; others: their own. Ours beside what a user can install, with one encoder.
BASE = {
    "UNet3+": PLAIN,
    "UNet3+, checkpointing": PLAIN,
    "UNet, resnet34": "smp Unet, resnet34",
    "UNet++, resnet34": "smp UnetPlusPlus, resnet34",
} | dict.fromkeys([name for name in NETS if name.startswith("UNet++ ") or name == "UNet++, checkpointing"], "UNet++")
DTYPES = {"float32": torch.float32, "bf16": torch.bfloat16}
FORMATS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}


@dataclass
class Row:
    """One net in one setting, and what was measured: seconds, seconds, GiB."""

    name: str
    dtype: str
    layout: str
    mode: str
    net: SegmentationNet
    train: list[float] = field(default_factory=list)
    inference: list[float] = field(default_factory=list)
    memory: float = float("nan")


def main() -> None:
    args = arguments()
    torch.manual_seed(0)
    images = torch.randn(args.batch, 3, args.size, args.size, device=args.device)
    rows = [
        Row(name, dtype, layout, mode, build(name, layout, mode, args.device))
        for name, mode, layout, dtype in itertools.product(args.nets, args.modes, FORMATS, DTYPES)
    ]
    run_rows([row for row in rows if row.mode != "kept"], images, args)
    if "kept" in args.modes:  # last: it cannot be undone in a process
        keep_freed_memory()
        run_rows([row for row in rows if row.mode == "kept"], images, args)
    print_table(rows, args)


def run_rows(rows: list[Row], images: Tensor, args: argparse.Namespace) -> None:
    for row in rows:  # warm up, compile, and then measure memory
        measure(row, images)
        row.memory = peak_memory(lambda row=row: train_step(row, images), args.device)
        print(".", end="", file=sys.stderr, flush=True)
    for row in rows:
        row.train, row.inference = [], []
    for _ in range(args.repeats):
        for row in rows:
            measure(row, images)
        print("+", end="", file=sys.stderr, flush=True)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nets", nargs="+", choices=NETS, default=list(NETS))
    parser.add_argument(
        "--modes", nargs="+", choices=("eager", "kept", "compiled"), default=["eager", "kept", "compiled"]
    )
    parser.add_argument("--size", type=int, default=256, help="sides of the images in pixels")
    parser.add_argument("--batch", type=int, default=4, help="images of a training step")
    parser.add_argument("--repeats", type=int, default=5, help="rounds; the table has medians")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    return parser.parse_args()


def build(name: str, layout: str, mode: str, device: str) -> SegmentationNet:
    net = NETS[name]().to(device, memory_format=FORMATS[layout])
    if mode == "compiled":
        # All nets share `SegmentationNet.forward`: beyond eight compiled versions of it torch runs the rest eagerly.
        torch._dynamo.config.recompile_limit = torch._dynamo.config.accumulated_recompile_limit = 1000
        torch._dynamo.config.fail_on_recompile_limit_hit = True
        net.compile(dynamic=False)
    return net


@contextmanager
def form(name: str) -> Iterator[None]:
    """The plain form of UNet3+ while its row runs: the convolution after the up-sampling."""
    fast = unet_3plus.conv_of_enlarged
    if name == PLAIN:
        unet_3plus.conv_of_enlarged = lambda x, weight, factor: F.conv2d(enlarge(x, factor), weight, padding=1)
    try:
        yield
    finally:
        unet_3plus.conv_of_enlarged = fast


def measure(row: Row, images: Tensor) -> None:
    row.train.append(seconds(lambda: train_step(row, images), images.device.type))
    row.inference.append(seconds(lambda: infer(row, images[:1]), images.device.type))


def train_step(row: Row, images: Tensor) -> None:
    net = row.net.train()
    optimizer = torch.optim.SGD(net.parameters(), lr=1e-4)
    images = images.contiguous(memory_format=FORMATS[row.layout])
    with form(row.name), torch.autocast(images.device.type, torch.bfloat16, enabled=row.dtype == "bf16"):
        heads = net(images)
        targets = [torch.ones_like(logits, dtype=torch.float32) for logits in heads.logits]
        loss = sum(F.binary_cross_entropy_with_logits(*pair) for pair in zip(heads.logits, targets, strict=True))
        loss.backward()
    optimizer.step()
    optimizer.zero_grad()


def infer(row: Row, images: Tensor) -> None:
    net = row.net.eval()
    images = images.contiguous(memory_format=FORMATS[row.layout])
    with (
        form(row.name),
        torch.inference_mode(),
        torch.autocast(images.device.type, torch.bfloat16, enabled=row.dtype == "bf16"),
    ):
        net.predict(images)


def print_table(rows: list[Row], args: argparse.Namespace) -> None:
    print(f"\n{machine(args.device)}; training steps of {args.batch}, inference of 1, at 3x{args.size}x{args.size}; ")
    print(f"medians of {args.repeats}\n")
    print("| net | precision | layout | mode | training step | | inference | | peak memory | |")
    print("|---|---|---|---|---|---|---|---|---|---|")
    first = {row.name: row for row in reversed(rows)}
    for row in rows:
        base = first[BASE.get(row.name, row.name)] if BASE.get(row.name, row.name) in first else first[row.name]
        train, train_base = statistics.median(row.train), statistics.median(base.train)
        inference, inference_base = statistics.median(row.inference), statistics.median(base.inference)
        print(
            f"| {row.name} | {row.dtype} | {row.layout} | {row.mode} "
            f"| {train * 1e3:.0f} ms | {train_base / train:.2f}x "
            f"| {inference * 1e3:.0f} ms | {inference_base / inference:.2f}x "
            f"| {row.memory:.2f} GiB | {row.memory / base.memory:.2f} |"
        )


if __name__ == "__main__":
    main()
