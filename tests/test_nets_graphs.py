"""One graph: torch.compile without breaks, torch.export with dynamic batch, height and width."""

import copy
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from conftest import TINY_RUN, make_folder, train, write_image
from segmentation.nets import Heads, SegmentationNet, SmpNet, UNet, UNet3Plus, UNetPlusPlus

WIDTHS = (4, 6, 8, 8, 8)
NETS = {
    "unet": lambda: UNet(widths=WIDTHS, deep_supervision=True),
    "unet++": lambda: UNetPlusPlus(widths=WIDTHS, deep_supervision=True),
    "unet3+": lambda: UNet3Plus(widths=WIDTHS, skip_channels=4, deep_supervision=True, classification_guided=True),
    "unet++ resnet18": lambda: UNetPlusPlus(widths=WIDTHS, deep_supervision=True, encoder="resnet18"),
    "unet++ without full size": lambda: UNetPlusPlus(widths=WIDTHS, encoder="resnet18", full_size_skip=False),
    "unet convnext": lambda: UNet(widths=WIDTHS, encoder="tu-convnext_atto"),
    "unet3+ group norm": lambda: UNet3Plus(widths=WIDTHS, skip_channels=4, norm="group"),
    "unet++ pruned": lambda: UNetPlusPlus(widths=WIDTHS, deep_supervision=True).prune(2),
    "smp": lambda: SmpNet(encoder="resnet18"),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", NETS)
def test_export_is_dynamic(name):
    """A padded side must stay over one stride: torch.export takes a map of 1x1 for another graph."""
    net = NETS[name]().eval()
    dynamic = torch.export.Dim.DYNAMIC
    shapes = ({0: dynamic, 2: dynamic, 3: dynamic},)
    program = torch.export.export(net, (torch.randn(2, 3, 40, 51),), dynamic_shapes=shapes).module()
    for shape in ((1, 3, 33, 70), (3, 3, 96, 64)):
        image = torch.randn(shape)
        expected, found = net(image), program(image)
        for a, b in zip(found.logits, expected.logits, strict=True):
            torch.testing.assert_close(a, b)


@pytest.mark.slow
@pytest.mark.parametrize("name", NETS)
def test_compiles_into_one_graph(name):
    """Training step and prediction, with the gradients and batch-norm statistics of the eager net."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    eager = NETS[name]().train()
    compiled = copy.deepcopy(eager)
    compiled.compile(fullgraph=True, backend="aot_eager")
    image = torch.randn(2, 3, 40, 51)
    for net in (eager, compiled):
        torch.manual_seed(1)
        heads = net(image)
        loss = sum(logits.square().mean() for logits in heads.logits)
        (loss if heads.class_logits is None else loss + heads.class_logits.square().mean()).backward()
    for (key, a), b in zip(eager.named_parameters(), compiled.parameters(), strict=True):
        torch.testing.assert_close(b.grad, a.grad, rtol=1e-3, atol=1e-4 * float(a.grad.abs().max() + 1), msg=key)
    for (key, a), b in zip(eager.named_buffers(), compiled.buffers(), strict=True):
        torch.testing.assert_close(b, a, rtol=1e-4, atol=1e-5, msg=key)
    with torch.no_grad():
        expected = eager.eval().predict(image)
        torch.testing.assert_close(compiled.eval().predict(image), expected, rtol=1e-3, atol=1e-4)


class Small(SegmentationNet):
    """Norm and up-sampling, which compilers write in terms of the sides."""

    stride = 4

    def __init__(self):
        super().__init__()
        self.down = nn.Sequential(nn.Conv2d(3, 4, 4, stride=4), nn.BatchNorm2d(4))
        self.up = nn.ConvTranspose2d(4, 1, 4, stride=4)

    def compute(self, image, level=None):
        return Heads((self.up(self.down(image)),))


@pytest.mark.slow
@pytest.mark.parametrize("make", [Small, pytest.param(NETS["unet3+"], id="unet3+")])
def test_compiles_for_sides_that_change(make):
    """A crop to train on, images of two sizes to validate: by inductor's own decompositions, without its C++."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    eager = make().train()
    compiled = copy.deepcopy(eager)
    compiled.compile(fullgraph=True, backend="aot_eager_decomp_partition")
    for sides in ((32, 32), (40, 51)):
        image = torch.randn(2, 3, *sides)
        for net in (eager, compiled):
            torch.manual_seed(1)
            net(image).logits[-1].square().mean().backward()
    for (key, a), b in zip(eager.named_parameters(), compiled.parameters(), strict=True):
        if a.grad is not None:
            torch.testing.assert_close(b.grad, a.grad, rtol=1e-3, atol=1e-4 * float(a.grad.abs().max() + 1), msg=key)
    eager.eval()
    compiled.eval()
    with torch.no_grad():
        for sides in ((40, 51), (37, 66), (64, 32)):
            image = torch.randn(1, 3, *sides)
            torch.testing.assert_close(compiled.predict(image), eager.predict(image), rtol=1e-3, atol=1e-3)


@pytest.mark.slow
def test_a_compiled_run_with_a_crop_and_validation_images_of_two_sizes():
    torch._dynamo.reset()
    make_folder(Path("data"), {"train": 4, "val": 2})
    for kind in ("images", "masks"):
        bands = (3,) if kind == "images" else ()
        write_image(Path("data/val") / kind / "wide.png", np.zeros((40, 72, *bands), np.uint8))
    data = ["--data.dataset", "FolderData", "--data.dataset.root", "data", "--data.crop", "32"]
    data += ["--data.dataset.classes", "{background: 0, foreground: 255}"]
    cli = train(*TINY_RUN, *data, "--name", "run", "--model.compile", "true")
    assert cli.trainer.global_step == 2
    assert Path("runs/run/summary.json").is_file()


@pytest.mark.slow
def test_compiles_with_inductor():
    net = NETS["unet3+"]().eval()
    image = torch.randn(1, 3, 40, 51)
    with torch.no_grad():
        expected = net(image).logits[-1]
        net.compile(fullgraph=True)
        torch.testing.assert_close(net(image).logits[-1], expected, rtol=1e-3, atol=1e-3)
