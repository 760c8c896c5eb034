"""`--trainer.deterministic true`: kernels that torch would refuse on a GPU, found without one."""

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from conftest import ROOT, TINY, script, train
from segmentation.losses import CrossEntropy, Dice, Focal, Hybrid, Jaccard, Lovasz, MsSsim, Tversky
from segmentation.nets import SmpNet, UNet, UNet3Plus, UNetPlusPlus
from test_resume import weights

#: Operators that are refused on a GPU (torch.use_deterministic_algorithms lists them), as far as a net of two
#: dimensions can use them, most in the backward pass. Cross-entropy's is deterministic where it is not reduced
#: (NLLLoss2d.cu).
REFUSED = re.compile(
    r"_?(upsample_(linear|bilinear|bicubic)|adaptive_|reflection_pad|fractional|grid_sampler)\w*_backward|max_unpool|histc"
)

NETS: dict[str, Callable[[], nn.Module]] = {
    "UNet": lambda: UNet(widths=(4, 8, 8), deep_supervision=True),
    "UNet, bilinear": lambda: UNet(widths=(4, 8, 8), upsample="bilinear"),
    "UNet++": lambda: UNetPlusPlus(widths=(4, 8, 8), deep_supervision=True),
    "UNet3+": lambda: UNet3Plus(widths=(4, 8, 8), deep_supervision=True, classification_guided=True),
    "UNet, resnet18": lambda: UNet(encoder="resnet18", widths=(4, 8, 8, 8, 8, 8)),
    "smp Unet": lambda: SmpNet(architecture="Unet", encoder="resnet18"),
    "smp PSPNet": lambda: SmpNet(architecture="PSPNet", encoder="resnet18"),
}


class Operators(TorchDispatchMode):
    """Names of the operators that run."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen.add(func.name().removeprefix("aten::"))
        return func(*args, **(kwargs or {}))


@pytest.fixture
def deterministic() -> Any:
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def refused(run: Callable[[], Tensor]) -> set[str]:
    with Operators() as operators:
        run().backward()
    return {name for name in operators.seen if REFUSED.match(name)}


@pytest.mark.parametrize("name", NETS)
def test_kernels_of_nets(name: str, deterministic: None) -> None:
    """On the meta device, for which torch takes the same path as for a GPU."""
    tiny = torch.ones(1, 1, 2, 2, device="meta", requires_grad=True)
    if refused(lambda: nn.functional.interpolate(tiny, scale_factor=2, mode="bilinear").sum()):
        pytest.skip("this torch takes it for a GPU alone")
    net = NETS[name]().to("meta")
    found = refused(lambda: sum(head.mean() for head in net(torch.empty(2, 3, 64, 64, device="meta")).logits))
    assert bool(found) == (name == "smp PSPNet")  # and the error says so


@pytest.mark.parametrize("loss", [CrossEntropy, Focal, Dice, Jaccard, Tversky, Lovasz, MsSsim, Hybrid])
@pytest.mark.parametrize("channels", [1, 3])
def test_kernels_of_losses(loss: type[nn.Module], channels: int, deterministic: None) -> None:
    logits, mask = torch.randn(2, channels, 48, 48, requires_grad=True), torch.randint(0, max(2, channels), (2, 48, 48))
    assert not refused(lambda: loss()(logits, mask))


@pytest.mark.slow
def test_a_refused_kernel_is_one_line(tmp_path: Any) -> None:
    (tmp_path / "refusing.py").write_text(
        "from segmentation.losses import Dice\n\n\nclass Refusing(Dice):\n    def compute(self, *args):\n"
        "        raise RuntimeError('adaptive_avg_pool2d_backward_cuda does not have a deterministic implementation')\n"
    )
    done = script(
        "train", *TINY, "--name", "run", "--model.loss", "refusing.Refusing", "--trainer.deterministic", "true"
    )
    assert done.returncode == 2
    line = done.stderr.strip().splitlines()[-1]
    assert line.startswith("error: ")
    assert "adaptive_avg_pool2d_backward_cuda" in line
    overlay = re.search(r"configs/\S+\.yaml", line)
    assert (ROOT / overlay[0]).is_file()


@pytest.mark.slow
@pytest.mark.parametrize("net", ["UNet", "UNetPlusPlus", "UNet3Plus", "SmpNet"])
@pytest.mark.parametrize("loss", ["CrossEntropy", "Lovasz", "Hybrid"])
def test_twice_the_same(net: str, loss: str) -> None:
    """Two processes' worth of threads, an option that is on, the same weights to the last bit."""
    size = [] if net != "SmpNet" else ["--model.net.encoder", "resnet18"]
    args = [word for word in TINY if net != "SmpNet" or word not in ("--model.net.widths", "[4,8]")]
    for name in ("one", "other"):
        extra = ["--trainer.deterministic", "true", "--trainer.max_epochs", "1", "--data.dataset.size", "64"]
        train(*args, "--model.net", net, *size, "--model.loss", loss, *extra, "--name", name)
    torch.use_deterministic_algorithms(False)
    one, other = weights("one"), weights("other")
    assert all(torch.equal(one[key], other[key]) for key in one)
