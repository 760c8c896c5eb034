"""Time and memory of the nets, side by side: `python benchmarks/nets.py`; about an hour on 2 CPU cores. On a
GPU most of the time is compiling: where a run is short of it, give some nets at a time.

    python benchmarks/nets.py --size 64 --batch 1 --repeats 1 --modes eager          # does it work? a minute
    python benchmarks/nets.py --nets UNet3+ "UNet3+, plain form" --modes eager       # one question

Every row takes a turn, as many rounds as `--repeats`, all in one process on the same images, so that what else the
machine does hits all rows alike (but `kept`, which come last: eager, with freed memory kept between steps as train.py
does; they cannot be mixed with the others). The table has medians. Ratios are to the first row of the same net: with
the defaults on a CPU float32, contiguous, eager. For UNet3+, UNet++ and the bilinear UNet that is the plain form, as
public code has it: it convolves the concatenation, after up-sampling. For nets with resnet34 it is
segmentation-models-pytorch's, for pruned nets the whole. MONAI's UNet++, which
up-samples by transposed convolutions, has a row where `pip install --no-deps monai` was run. Beside other work
`OMP_NUM_THREADS=1` and `--cpu-time`, the time of the process, disturb the figures least.

A training step is forward, backward and SGD on `--batch` images; inference is `predict` of `--infer-batch`. On CUDA a
turn is ten in a row, waited for at their end, as in training; cuDNN has tried its algorithms before. Mode `graphs`, on
CUDA alone, is compiled and replayed as CUDA graphs (torch.compile's mode reduce-overhead). Memory is the peak of a
training step beyond what the process held before it: activations, gradients and workspace, not the weights (nan with
graphs, which hold theirs all the time).

The machine's limits are measured in the same run. `of peak`: operations of the net's convolutions and matrix products,
over time, over the rate of a large matrix product. `of limit`: the least time that these need, each by its operations
or its bytes, with everything else for nothing, over the time taken.
"""

import argparse
import importlib.util
import itertools
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch._dynamo
import torch._inductor.config
import torch.nn.functional as F
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1] / "src"))
from limits import Limits, Work, count_work, measure_limits
from segmentation.nets import Heads, SegmentationNet, SmpNet, UNet, UNet3Plus, UNetPlusPlus, unet_3plus
from segmentation.nets.blocks import DoubleConv, upsample
from segmentation.training.entry import keep_freed_memory
from timing import machine, peak_memory, seconds


class MonaiNet(SegmentationNet):
    """MONAI's UNet++ at the paper's widths, with batch norm, ReLU and four heads."""

    def __init__(self) -> None:
        from monai.networks.nets import BasicUNetPlusPlus

        super().__init__(num_heads=4)
        self.stride = 16
        features = (32, 64, 128, 256, 512, 32)
        self.model = BasicUNetPlusPlus(
            2, 3, 1, features, deep_supervision=True, act=("relu", {"inplace": True}), norm="batch"
        )

    def compute(self, image: Tensor, level: int | None = None) -> Heads:
        return Heads(tuple(self.model(image)))


PLAIN = ", plain form"
MONAI = "MONAI BasicUNetPlusPlus"
R34 = {"encoder": "resnet34", "widths": (16, 32, 64, 128, 256, 512)}
NETS: dict[str, Callable[[], SegmentationNet]] = {
    "UNet": UNet,
    f"UNet, bilinear{PLAIN}": lambda: UNet(upsample="bilinear"),
    "UNet, bilinear": lambda: UNet(upsample="bilinear"),
    f"UNet++{PLAIN}": lambda: UNetPlusPlus(deep_supervision=True),
    MONAI: MonaiNet,
    "UNet++": lambda: UNetPlusPlus(deep_supervision=True),
    "UNet++ pruned to L3": lambda: UNetPlusPlus(deep_supervision=True).prune(3),
    "UNet++ pruned to L2": lambda: UNetPlusPlus(deep_supervision=True).prune(2),
    "UNet++ pruned to L1": lambda: UNetPlusPlus(deep_supervision=True).prune(1),
    f"UNet3+{PLAIN}": lambda: UNet3Plus(deep_supervision=True),
    "UNet3+": lambda: UNet3Plus(deep_supervision=True),
    "UNet, resnet34": lambda: UNet(**R34),
    "UNet, resnet34, from stride 2": lambda: UNet(**R34, full_size_skip=False),
    "UNet++, resnet34": lambda: UNetPlusPlus(**R34),
    "UNet++, resnet34, from stride 2": lambda: UNetPlusPlus(**R34, full_size_skip=False),
    "smp Unet, resnet34": lambda: SmpNet(architecture="Unet"),
    "smp UnetPlusPlus, resnet34": lambda: SmpNet(architecture="UnetPlusPlus"),
    "UNet3+, vgg19": lambda: UNet3Plus(encoder="vgg19"),  # beside a published figure of benchmarks/gpu.py
}
#: The net whose first row a ratio is to; others: their own. Ours beside what a user can install, with one encoder.
BASE = {
    "UNet, bilinear": f"UNet, bilinear{PLAIN}",
    "UNet++": f"UNet++{PLAIN}",
    MONAI: f"UNet++{PLAIN}",
    "UNet3+": f"UNet3+{PLAIN}",
    "UNet, resnet34": "smp Unet, resnet34",
    "UNet, resnet34, from stride 2": "smp Unet, resnet34",
    "UNet++, resnet34": "smp UnetPlusPlus, resnet34",
    "UNet++, resnet34, from stride 2": "smp UnetPlusPlus, resnet34",
} | dict.fromkeys([name for name in NETS if name.startswith("UNet++ ")], "UNet++")
#: What is measured unless asked for: on CUDA the setting to train in, and no variants of one net.
DEFAULTS = {
    "cpu": {
        "nets": [name for name in NETS if "vgg19" not in name],
        "modes": ["eager", "kept", "compiled"],
        "layouts": ["contiguous", "channels_last"],
        "dtypes": ["float32", "bf16"],
        "size": 256,
        "batch": 4,
        "infer_batch": 1,
        "repeats": 5,
    },
    "cuda": {
        "nets": [name for name in NETS if not any(word in name for word in ("pruned", "vgg19", "bilinear", "MONAI"))],
        "modes": ["eager", "compiled", "graphs"],
        "layouts": ["channels_last"],
        "dtypes": ["bf16"],
        "size": 512,
        "batch": 8,
        "infer_batch": 8,
        "repeats": 10,
    },
}
DTYPES = {"float32": torch.float32, "bf16": torch.bfloat16}
FORMATS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}


@dataclass
class Row:
    """One net in one setting, the work of its two passes, and what was measured: seconds, seconds, GiB."""

    name: str
    dtype: str
    layout: str
    mode: str
    net: SegmentationNet
    works: dict[str, list[Work]]
    train: list[float] = field(default_factory=list)
    inference: list[float] = field(default_factory=list)
    memory: float = float("nan")

    def __post_init__(self) -> None:
        self.optimizer = torch.optim.SGD(self.net.parameters(), lr=1e-4)


def main() -> None:
    args = arguments()
    torch.manual_seed(0)
    torch.backends.cudnn.benchmark = True
    limits = measure_limits([DTYPES[dtype] for dtype in args.dtypes], args.device)
    images = torch.randn(max(args.batch, args.infer_batch), 3, args.size, args.size, device=args.device)
    rows = [
        Row(name, dtype, layout, mode, build(name, layout, mode, args.device), works(name, dtype, args))
        for name, mode, layout, dtype in itertools.product(args.nets, args.modes, args.layouts, args.dtypes)
    ]
    run_rows([row for row in rows if row.mode != "kept"], images, args)
    if "kept" in args.modes:  # last: it cannot be undone in a process
        keep_freed_memory()
        run_rows([row for row in rows if row.mode == "kept"], images, args)
    print_table(rows, limits, args)


def run_rows(rows: list[Row], images: Tensor, args: argparse.Namespace) -> None:
    for number, row in enumerate(rows, start=1):  # warm up: compile, try algorithms, record graphs; then measure memory
        began = time.perf_counter()
        for _ in range(3 if args.device == "cuda" else 1):
            measure(row, images, args)
        if row.mode != "graphs":  # a graph holds its memory between steps too
            row.memory = peak_memory(lambda row=row: train_step(row, images[: args.batch]), args.device)
        took = f"warm after {time.perf_counter() - began:.0f} s"
        print(
            f"{number}/{len(rows)} {row.name}, {row.dtype}, {row.layout}, {row.mode}: {took}",
            file=sys.stderr,
            flush=True,
        )
    for row in rows:
        row.train, row.inference = [], []
    for _ in range(args.repeats):
        for row in rows:
            measure(row, images, args)
        print("+", end="", file=sys.stderr, flush=True)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=DEFAULTS, default="cuda" if torch.cuda.is_available() else "cpu")
    defaults = DEFAULTS[
        parser.parse_known_args([word for word in sys.argv[1:] if word not in ("-h", "--help")])[0].device
    ]
    choices = {"nets": NETS, "modes": ["eager", "kept", "compiled", "graphs"], "layouts": FORMATS, "dtypes": DTYPES}
    for name, options in choices.items():
        parser.add_argument(f"--{name}", nargs="+", choices=options, default=defaults[name])
    for name, what in {
        "size": "sides of the images in pixels",
        "batch": "images of a training step",
        "infer_batch": "images of a prediction",
        "repeats": "rounds; the table has medians",
    }.items():
        parser.add_argument(
            f"--{name.replace('_', '-')}", type=int, default=defaults[name], help=f"{what} (%(default)s)"
        )
    parser.add_argument("--cpu-time", action="store_true", help="of the process, not of the clock on the wall")
    parser.add_argument("--output", type=Path, metavar="FILE.json", help="write the table there too")
    args = parser.parse_args()
    if "graphs" in args.modes and args.device != "cuda":
        parser.exit(2, "nets.py: --modes graphs needs a GPU: on a CPU leave it out\n")
    if MONAI in args.nets and importlib.util.find_spec("monai") is None:
        args.nets = [name for name in args.nets if name != MONAI]
        print(f"left out: {MONAI}; pip install --no-deps monai", file=sys.stderr)
    return args


def works(name: str, dtype: str, args: argparse.Namespace) -> dict[str, list[Work]]:
    """The work of a training step and of an inference."""
    net, side = NETS[name](), args.size
    with form(name):
        return {
            key: count_work(net, (batch, 3, side, side), DTYPES[dtype], train=key == "train")
            for key, batch in (("train", args.batch), ("inference", args.infer_batch))
        }


def build(name: str, layout: str, mode: str, device: str) -> SegmentationNet:
    net = NETS[name]().to(device, memory_format=FORMATS[layout])
    if mode in ("compiled", "graphs"):
        # All nets share `SegmentationNet.forward`: beyond eight compiled versions of it torch runs the rest eagerly.
        torch._dynamo.config.recompile_limit = torch._dynamo.config.accumulated_recompile_limit = 1000
        torch._dynamo.config.fail_on_recompile_limit_hit = True
        # Where a graph cannot be recorded the compiler goes on without, and a row of graphs would be none.
        torch._inductor.config.triton.cudagraph_or_error = mode == "graphs"
        net.compile(dynamic=False, mode="reduce-overhead" if mode == "graphs" else None)
    return net


@contextmanager
def form(name: str) -> Iterator[None]:
    """The plain form of a net while its row runs: the convolution after the up-sampling and the concatenation."""
    fast = unet_3plus.conv3x3_after_upsample, DoubleConv.with_upsampled
    if name.endswith(PLAIN):
        unet_3plus.conv3x3_after_upsample = lambda x, weight, factor: F.conv2d(upsample(x, factor), weight, padding=1)
        DoubleConv.with_upsampled = lambda conv, left, below, up: conv(torch.cat([*left, up(below)], dim=1))
    try:
        yield
    finally:
        unet_3plus.conv3x3_after_upsample, DoubleConv.with_upsampled = fast


def measure(row: Row, images: Tensor, args: argparse.Namespace) -> None:
    many = 10 if args.device == "cuda" else 1
    for job, count, times in ((train_step, args.batch, row.train), (infer, args.infer_batch, row.inference)):
        clock = time.process_time if args.cpu_time else time.perf_counter
        turn = seconds(lambda job=job, count=count: [job(row, images[:count]) for _ in range(many)], args.device, clock)
        times.append(turn / many)


def train_step(row: Row, images: Tensor) -> None:
    net = row.net.train()
    if row.mode == "graphs":
        torch.compiler.cudagraph_mark_step_begin()  # what a graph wrote in the step before may go
    images = images.contiguous(memory_format=FORMATS[row.layout])
    with form(row.name), torch.autocast(images.device.type, torch.bfloat16, enabled=row.dtype == "bf16"):
        heads = net(images)
        targets = [torch.ones_like(logits, dtype=torch.float32) for logits in heads.logits]
        loss = sum(F.binary_cross_entropy_with_logits(*pair) for pair in zip(heads.logits, targets, strict=True))
        loss.backward()
    row.optimizer.step()
    row.optimizer.zero_grad()


def infer(row: Row, images: Tensor) -> None:
    net = row.net.eval()
    if row.mode == "graphs":
        torch.compiler.cudagraph_mark_step_begin()
    images = images.contiguous(memory_format=FORMATS[row.layout])
    with (
        form(row.name),
        torch.inference_mode(),
        torch.autocast(images.device.type, torch.bfloat16, enabled=row.dtype == "bf16"),
    ):
        net.predict(images)


def print_table(rows: list[Row], limits: Limits, args: argparse.Namespace) -> None:
    print(f"\n{machine(args.device)}; training steps of {args.batch}, inference of {args.infer_batch}, ", end="")
    print(f"at 3x{args.size}x{args.size}; medians of {args.repeats}\nlimits: {limits}\n")
    columns = "training step | | of peak | of limit | inference | | of peak | of limit | peak memory | |"
    print(f"| net | precision | layout | mode | {columns}\n{'|---' * 14}|")
    first = {row.name: row for row in reversed(rows)}
    found = [figures(row, first.get(BASE.get(row.name, row.name), first[row.name]), limits) for row in rows]
    for each in found:
        cells = [each["net"], each["precision"], each["layout"], each["mode"]]
        for one in (each["training"], each["inference"]):
            cells += [f"{one['ms']:,.1f} ms", f"{one['ratio']:.2f}x", f"{one['of_peak']:.1%}", f"{one['of_limit']:.1%}"]
        print("|", " | ".join([*cells, f"{each['gib']:.2f} GiB", f"{each['gib_ratio']:.2f}"]), "|")
    if args.output:
        about = {"machine": machine(args.device), "limits": str(limits), "size": args.size}
        batches = {"training": args.batch, "inference": args.infer_batch}
        args.output.write_text(json.dumps({**about, "batches": batches, "rows": found}, indent=1))


def figures(row: Row, base: Row, limits: Limits) -> dict[str, Any]:
    """What the table says of a row; ratios are to `base`."""
    dtype = DTYPES[row.dtype]
    found: dict[str, Any] = {"net": row.name, "precision": row.dtype, "layout": row.layout, "mode": row.mode}
    for key, times, times_base, works in (
        ("training", row.train, base.train, row.works["train"]),
        ("inference", row.inference, base.inference, row.works["inference"]),
    ):
        time = statistics.median(times)
        found[key] = {
            "ms": time * 1e3,
            "ratio": statistics.median(times_base) / time,
            "of_peak": limits.of_peak(works, dtype, time),
            "of_limit": limits.of_limit(works, dtype, time),
        }
    return {**found, "gib": row.memory, "gib_ratio": row.memory / base.memory}


if __name__ == "__main__":
    main()
