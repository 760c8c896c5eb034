"""What the papers say: counts, connections, pruning, and UNet3+'s fast form against its plain one."""

import pytest
import segmentation_models_pytorch as smp
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from segmentation.nets import SegmentationNet, UNet, UNet3Plus, UNetPlusPlus, unet_3plus
from segmentation.nets.base import CLOSED
from segmentation.nets.blocks import DoubleConv, conv3x3_after_upsample

WIDTHS = (4, 6, 8, 10, 12)


def size(net):
    return sum(parameter.numel() for parameter in net.parameters())


def plain_form(x, weight, factor):
    """The oracle: up-sample, then convolve, as the paper writes it."""
    return F.conv2d(F.interpolate(x, scale_factor=factor, mode="bilinear", align_corners=False), weight, padding=1)


def plain_with_upsampled(self, left, below, up):
    return self(torch.cat([*left, up(below)], dim=1))


@pytest.mark.parametrize(
    ("build", "count"),
    [
        (lambda: UNet(), 31_037_633),
        (lambda: UNetPlusPlus(deep_supervision=True), 9_163_428 - 3_648),
        (lambda: UNet3Plus(), 26_971_777 - 6_528),
        (lambda: UNet3Plus(deep_supervision=True), 26_989_637 - 6_528),
        (lambda: UNet3Plus(deep_supervision=True, classification_guided=True), 26_991_687 - 6_528 - 1_025),
    ],
    ids=["UNet", "UNet++", "UNet3+", "UNet3+ deep", "UNet3+ guided"],
)
def test_parameter_counts(build, count):
    with torch.device("meta"):
        assert size(build()) == count


def test_without_the_full_size_skip_the_nets_are_those_of_segmentation_models_pytorch():
    """But for the head: a 3x3 convolution there, 128 weights more than 1x1. UNet++ there has the encoder's channels in
    the nodes on the way, so its decoder is given the same."""
    with torch.device("meta"):
        theirs = smp.Unet("resnet34", encoder_weights=None)
        ours = UNet(encoder="resnet34", widths=(16, 32, 64, 128, 256, 512), upsample="bilinear", full_size_skip=False)
        assert size(ours) == size(theirs) - 128 == 24_436_241
        theirs = smp.UnetPlusPlus("resnet34", encoder_weights=None, decoder_channels=(256, 128, 64, 64, 16))
        ours = UNetPlusPlus(encoder="resnet34", widths=(16, 64, 64, 128, 256, 512), full_size_skip=False)
        assert size(ours) == size(theirs) - 128


def test_the_differences_are_biases_before_a_norm():
    """As many biases as norm channels: the numbers that the docstrings give."""
    with torch.device("meta"):
        for net, biases in ((UNetPlusPlus(), 3_648), (UNet3Plus(), 6_528)):
            assert sum(m.num_features for m in net.modules() if isinstance(m, torch.nn.BatchNorm2d)) == biases
        keras = UNetPlusPlus(in_channels=1, upsample="transposed")  # a bias for each norm's weight and bias
        assert size(keras) - 3_648 == 9_041_601


@pytest.mark.parametrize("upsample", ["bilinear", "transposed"])
def test_unet_plus_plus_connections(upsample):
    """Head L sees X(i, j) if and only if i + j <= L."""
    net = UNetPlusPlus(widths=WIDTHS, deep_supervision=True, upsample=upsample).eval()
    image = torch.randn(1, 3, 32, 32)
    whole = net(image).logits
    for name, node in net.nodes.items():
        i, j = map(int, name.split("_"))
        changed = heads_that_change(net, node, image, whole)
        assert changed == [level for level in (1, 2, 3, 4) if i + j <= level], name


def test_unet_3plus_connections():
    """De_i reaches the head on itself and those on finer maps; each encoder map reaches every decoder node."""
    net = UNet3Plus(widths=WIDTHS, skip_channels=4, deep_supervision=True).eval()
    image = torch.randn(1, 3, 32, 32)
    whole = net(image).logits
    for i, node in enumerate(net.nodes):  # De1 .. De4
        assert heads_that_change(net, node, image, whole) == list(range(5 - i, 6))
        inputs = [branch.in_channels for branch in node.branches]
        assert inputs == [*WIDTHS[: i + 1], *[20] * (3 - i), WIDTHS[4]]  # En_1 .. En_i, De_i+1 .. De_4, En_5
        for branch in node.branches:
            before = branch.weight.detach().clone()
            branch.weight.data.zero_()
            assert not torch.equal(net(image).logits[4 - i], whole[4 - i])
            branch.weight.data.copy_(before)


def heads_that_change(net, node, image, whole):
    hook = node.register_forward_hook(lambda module, inputs, output: torch.zeros_like(output))
    changed = [k for k, (a, b) in enumerate(zip(net(image).logits, whole, strict=True), 1) if not torch.equal(a, b)]
    hook.remove()
    return changed


@pytest.mark.parametrize(
    ("encoder", "full_size_skip"),
    [
        (None, True),
        ("resnet18", True),
        ("tu-convnext_atto", True),
        ("efficientnet-b0", True),
        ("resnet18", False),
        ("tu-convnext_atto", False),
    ],
)
@pytest.mark.parametrize("level", [1, 2, 3, 4])
def test_pruned_net_is_the_parents_head(level, encoder, full_size_skip):
    torch.manual_seed(0)
    net = UNetPlusPlus(
        widths=WIDTHS, deep_supervision=True, encoder=encoder, full_size_skip=full_size_skip, num_classes=2
    )
    with torch.no_grad():
        net(torch.randn(2, 3, 64, 64))  # statistics that are not 0 and 1
        net.eval()
        small = net.prune(level)
        assert isinstance(small, SegmentationNet)
        assert not small.training
        assert small.stride == net.stride
        assert size(small) < size(net)
        image = torch.randn(1, 3, 37, 50)
        torch.testing.assert_close(small.predict(image), net(image).logits[level - 1], rtol=0, atol=1e-6)
        rebuilt = UNetPlusPlus(**net.pruned_arguments(level))
        rebuilt.load_state_dict(small.state_dict())
        assert torch.equal(rebuilt.eval().predict(image), small.predict(image))
    small.train()(torch.randn(2, 3, 32, 32)).logits[0].square().mean().backward()
    assert all(parameter.grad is not None for parameter in small.parameters())


def test_pruning_saves_what_the_paper_promises(monkeypatch):
    with torch.device("meta"):
        net = UNetPlusPlus(deep_supervision=True).eval()
        fast = [flops_of(net.prune(level)) / 1e9 for level in (1, 2, 3, 4)]
        monkeypatch.setattr(DoubleConv, "with_upsampled", plain_with_upsampled)
        flops = [flops_of(net.prune(level)) / 1e9 for level in (1, 2, 3, 4)]
        assert [size(net.prune(level)) for level in (1, 2, 3, 4)] == [102_785, 518_401, 2_234_497, 9_159_681]
    assert flops == pytest.approx([8.0, 20.7, 40.6, 69.0], abs=0.1)
    assert fast == pytest.approx([8.0, 18.8, 35.1, 58.1], abs=0.1)


def test_a_pruned_net_keeps_the_memory_format():
    for layout in (torch.contiguous_format, torch.channels_last):
        small = UNetPlusPlus(deep_supervision=True).to(memory_format=layout).prune(2)
        convolutions = [p for p in small.parameters() if p.ndim == 4 and min(p.shape) > 1]
        assert convolutions
        assert all(p.is_contiguous(memory_format=layout) for p in convolutions)


def test_a_level_costs_what_the_pruned_net_costs():
    """`level=k` computes nothing that head k does not need; an encoder by name always runs whole."""
    net = UNetPlusPlus(widths=WIDTHS, deep_supervision=True).eval()
    for level in (1, 2, 3, 4):
        assert flops_of(net, level) == flops_of(net.prune(level))


def flops_of(net, level=None):
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        net(torch.zeros(1, 3, 256, 256, device=next(net.parameters()).device), level=level)
    return counter.get_total_flops()


@pytest.mark.parametrize("shape", [(1, 1), (1, 4), (3, 5), (6, 2)])
@pytest.mark.parametrize("factor", [2, 4, 8, 16])
def test_convolving_before_enlarging_is_exact(shape, factor):
    torch.manual_seed(0)
    x = torch.randn(2, 5, *shape, dtype=torch.double, requires_grad=True)
    weight = torch.randn(3, 5, 3, 3, dtype=torch.double, requires_grad=True)
    fast, plain = conv3x3_after_upsample(x, weight, factor), plain_form(x, weight, factor)
    torch.testing.assert_close(fast, plain, rtol=0, atol=1e-12)
    direction = torch.randn_like(plain)
    gradients = [torch.autograd.grad(y, (x, weight), direction) for y in (fast, plain)]
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-11)
    torch.testing.assert_close(
        conv3x3_after_upsample(x.float(), weight.float(), factor), plain.float(), atol=1e-4, rtol=1e-5
    )


@pytest.mark.parametrize("make", [UNet, UNetPlusPlus])
@pytest.mark.parametrize("options", [{}, {"encoder": "resnet18", "full_size_skip": False}], ids=["own", "resnet18"])
def test_bilinear_nets_equal_their_plain_form(make, options, monkeypatch):
    torch.manual_seed(0)
    widths = (8, 8, 64, 64, 64)  # convolved after, and before up-sampling
    net = make(widths=widths, upsample="bilinear", deep_supervision=True, **options).double()
    image = torch.randn(2, 3, 17, 50, dtype=torch.double)
    fast, fast_gradients = logits_and_gradients(net, image)
    monkeypatch.setattr(DoubleConv, "with_upsampled", plain_with_upsampled)
    plain, plain_gradients = logits_and_gradients(net, image)
    for a, b in zip([*fast, *fast_gradients], [*plain, *plain_gradients], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("shape", [(32, 32), (17, 50), (1, 1)])
def test_unet_3plus_equals_its_plain_form(shape, monkeypatch):
    torch.manual_seed(0)
    net = UNet3Plus(widths=WIDTHS, skip_channels=4, deep_supervision=True).double()
    image = torch.randn(2, 3, *shape, dtype=torch.double)
    fast, fast_gradients = logits_and_gradients(net, image)
    monkeypatch.setattr(unet_3plus, "conv3x3_after_upsample", plain_form)
    plain, plain_gradients = logits_and_gradients(net, image)
    for a, b in zip([*fast, *fast_gradients], [*plain, *plain_gradients], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-7, atol=1e-9)


def logits_and_gradients(net, image):
    net.zero_grad()
    logits = net(image).logits
    sum(x.square().mean() for x in logits).backward()
    return [x.detach() for x in logits], [parameter.grad.clone() for parameter in net.parameters()]


def test_unet_3plus_does_less_work(monkeypatch):
    """395 GFLOPs become 233 with two dense matrices, and fewer with `interpolate`, which is no multiplication here."""
    with torch.device("meta"):
        net = UNet3Plus(deep_supervision=True).eval()
        fast = flops_of(net)
        monkeypatch.setattr(unet_3plus, "conv3x3_after_upsample", plain_form)
        plain = flops_of(net)
    assert plain / 1e9 == pytest.approx(395, abs=1)
    assert fast < 0.6 * plain


@pytest.mark.parametrize("classes", [1, 3])
def test_classification_guided_module(classes):
    torch.manual_seed(0)
    net = UNet3Plus(widths=WIDTHS, skip_channels=4, num_classes=classes, classification_guided=True)
    image = torch.randn(2, 3, 32, 32)
    heads = net(image)
    assert heads.class_logits.shape == (2, classes)
    heads.class_logits.sum().backward()
    assert all(parameter.grad is not None for parameter in net.encoder.parameters())  # it teaches the encoder
    net.eval()
    net.presence[1].bias.data.fill_(100.0)
    net.presence[1].bias.data[-1] = -100.0
    heads = net(image)
    assert (heads.logits[-1] > CLOSED).all()  # the loss sees ungated logits
    assert (net.combine(heads)[:, -1] == CLOSED).all()  # and the last class gets no pixel
    assert torch.equal(net.combine(heads)[:, :-1], heads.logits[-1][:, :-1])
