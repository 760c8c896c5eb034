"""What bounds a net on a machine: the work it cannot avoid, and the rates at which the machine can do it at best."""

import statistics
from copy import deepcopy
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from segmentation.nets import SegmentationNet
from segmentation.training.trainer import has_bf16
from timing import seconds


class Work(NamedTuple):
    """One convolution or matrix product: floating-point operations (2 x multiply-adds), and bytes if each operand is
    read once and each result written once."""

    flops: int
    bytes: int


@dataclass
class Limits:
    """Measured rates of a machine.

    Attributes:
        flops: operations a second of a large matrix product, by type.
        bandwidth: bytes a second, read and written, of a large copy.
    """

    flops: dict[torch.dtype, float]
    bandwidth: float

    def of_peak(self, works: list[Work], dtype: torch.dtype, time: float) -> float:
        """Share of the matrix rate at which `works` were done in so many seconds; the field's MFU."""
        return sum(work.flops for work in works) / time / self.flops[dtype]

    def of_limit(self, works: list[Work], dtype: torch.dtype, time: float) -> float:
        """The least time that `works`, done one after another, can take (each as long as its operations or its bytes
        need, whichever is longer; all else, norms say, for nothing), over the time they took: the roofline."""
        return sum(max(w.flops / self.flops[dtype], w.bytes / self.bandwidth) for w in works) / time

    def __str__(self) -> str:
        rates = ", ".join(f"{rate / 1e12:,.2f} TFLOP/s in {str(dtype)[6:]}" for dtype, rate in self.flops.items())
        return f"{rates} (large matrix product); {self.bandwidth / 1e9:,.0f} GB/s read and written (large copy)"


def measure_limits(dtypes: list[torch.dtype], device: str, repeats: int = 10) -> Limits:
    """Measure them on random numbers: zeros draw less power, and so run faster than data does.

    On CUDA float32 stands for TensorFloat32 where convolutions may use it, which is torch's default.
    """
    cuda = device == "cuda"
    side, length = (8192, 2**29) if cuda else (2048, 2**26)
    sides = dict.fromkeys(dtypes, side)
    if not cuda and not has_bf16("cpu"):
        sides[torch.bfloat16] = 512  # emulated: a large product would take minutes
    flops = {}
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32
    for dtype in dtypes:
        a, b = (torch.randn(sides[dtype], sides[dtype], device=device).to(dtype) for _ in range(2))
        flops[dtype] = 2 * sides[dtype] ** 3 / _median(lambda a=a, b=b: a @ b, device, repeats)
    torch.backends.cuda.matmul.allow_tf32 = before
    source = torch.rand(length, device=device)
    target = torch.empty_like(source)
    return Limits(flops, 2 * source.nbytes / _median(lambda: target.copy_(source), device, repeats))


def _median(job: Any, device: str, repeats: int) -> float:
    """Seconds of `job`, after two runs to warm up; on CUDA each sample is of ten in a row."""
    many = 10 if device == "cuda" else 1
    times = [seconds(lambda: [job() for _ in range(many)] and None, device) / many for _ in range(repeats + 2)]
    return statistics.median(times[2:])


def count_work(net: SegmentationNet, shape: tuple[int, ...], dtype: torch.dtype, train: bool) -> list[Work]:
    """The convolutions and matrix products of one pass, in order, on torch's meta device: nothing is run.

    Args:
        net: any net.
        shape: (N, C, H, W) of its input.
        dtype: what it computes in.
        train: forward and backward; else `predict`.
    """
    twin = deepcopy(net).to("meta", dtype).train(train)
    image = torch.empty(shape, device="meta", dtype=dtype)
    with _Recorder() as recorder, torch.set_grad_enabled(train):
        if train:
            torch.stack([logits.sum() for logits in twin(image).logits]).sum().backward()
        else:
            twin.predict(image)
    return recorder.works


class _Recorder(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.works: list[Work] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        count = flop_registry.get(func._overloadpacket)
        if count is not None:
            moved = [leaf.nbytes for leaf in tree_leaves((args, out)) if isinstance(leaf, Tensor)]
            self.works.append(Work(count(*args, **(kwargs or {}), out_val=out), sum(moved)))
        return out
