"""One graph: torch.compile without breaks, torch.export with dynamic batch, height and width."""

import copy

import pytest
import torch

from segmentation.nets import SmpNet, UNet, UNet3Plus, UNetPlusPlus

WIDTHS = (4, 6, 8, 8, 8)
NETS = {
    "unet": lambda: UNet(widths=WIDTHS, deep_supervision=True),
    "unet++": lambda: UNetPlusPlus(widths=WIDTHS, deep_supervision=True),
    "unet++ checkpointing": lambda: UNetPlusPlus(widths=WIDTHS, deep_supervision=True, checkpointing=True),
    "unet3+": lambda: UNet3Plus(widths=WIDTHS, skip_channels=4, deep_supervision=True, classification_guided=True),
    "unet++ resnet18": lambda: UNetPlusPlus(widths=WIDTHS, deep_supervision=True, encoder="resnet18"),
    "unet convnext": lambda: UNet(widths=WIDTHS, encoder="tu-convnext_atto"),
    "unet3+ checkpointing": lambda: UNet3Plus(widths=WIDTHS, skip_channels=4, checkpointing=True),
    "unet3+ group norm": lambda: UNet3Plus(widths=WIDTHS, skip_channels=4, norm="group"),
    "unet++ pruned": lambda: UNetPlusPlus(widths=WIDTHS, deep_supervision=True).prune(2),
    "smp": lambda: SmpNet(encoder="resnet18"),
}
SLOW_BUT_UNET_PLUS_PLUS = [
    pytest.param(name, marks=[] if name == "unet++" else pytest.mark.slow) for name in NETS
]  # seconds each: one in the default run


@pytest.mark.parametrize("name", SLOW_BUT_UNET_PLUS_PLUS)
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


@pytest.mark.parametrize("name", SLOW_BUT_UNET_PLUS_PLUS)
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
        (loss if heads.presence is None else loss + heads.presence.square().mean()).backward()
    for (key, a), b in zip(eager.named_parameters(), compiled.parameters(), strict=True):
        torch.testing.assert_close(b.grad, a.grad, rtol=1e-3, atol=1e-4 * float(a.grad.abs().max() + 1), msg=key)
    for (key, a), b in zip(eager.named_buffers(), compiled.buffers(), strict=True):
        torch.testing.assert_close(b, a, rtol=1e-4, atol=1e-5, msg=key)
    with torch.no_grad():
        expected = eager.eval().predict(image)
        torch.testing.assert_close(compiled.eval().predict(image), expected, rtol=1e-3, atol=1e-4)


@pytest.mark.slow
def test_compiles_with_inductor():
    net = NETS["unet3+"]().eval()
    image = torch.randn(1, 3, 40, 51)
    with torch.no_grad():
        expected = net(image).logits[-1]
        net.compile(fullgraph=True)
        torch.testing.assert_close(net(image).logits[-1], expected, rtol=1e-3, atol=1e-3)
