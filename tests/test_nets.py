"""The contract, for every net: a new one is a row in NETS."""

import pytest
import torch
from sklearn.metrics import jaccard_score

from segmentation.data import ShapesData
from segmentation.errors import InputError
from segmentation.nets import Heads, SmpNet, UNet, UNet3Plus, UNetPlusPlus
from segmentation.nets.base import CLOSED, gate
from segmentation.training.trainer import SyncBatchNorm

WIDTHS = (4, 6, 8, 8, 8)
NETS = {
    "unet": lambda **options: UNet(**{"widths": WIDTHS, **options}),
    "unet++": lambda **options: UNetPlusPlus(**{"widths": WIDTHS, **options}),
    "unet3+": lambda **options: UNet3Plus(**{"widths": WIDTHS, "skip_channels": 4, **options}),
}
SMALL = {"unet3+": {"skip_channels": 16}}
HEADS = {"unet": 4, "unet++": 4, "unet3+": 5}
# an encoder of the library's own, one without a stage at stride 2, one with a map at full size, one that needs 32
ENCODERS = [None, "resnet18", "tu-convnext_atto", "vgg11", "mit_b0", "efficientnet-b0"]
SIZES = [(1, 1), (17, 40), (31, 2)]


def nets_of_all_settings():
    for name in NETS:
        for deep in (False, True):
            for encoder in ENCODERS:
                yield pytest.param(name, deep, encoder, id=f"{name}-{'deep' if deep else 'one'}-{encoder or 'own'}")


@pytest.mark.parametrize(("name", "deep", "encoder"), nets_of_all_settings())
def test_contract(name, deep, encoder):
    net = NETS[name](in_channels=2, num_classes=3, deep_supervision=deep, encoder=encoder)
    check_contract(net, heads=HEADS[name] if deep else 1)


@pytest.mark.parametrize("name", ["unet", "unet++"])
@pytest.mark.parametrize("encoder", ["resnet18", "tu-convnext_atto"])
def test_contract_without_the_full_size_skip(name, encoder):
    net = NETS[name](in_channels=2, num_classes=3, deep_supervision=True, encoder=encoder, full_size_skip=False)
    check_contract(net, heads=4)


@pytest.mark.parametrize("architecture", ["Unet", "UnetPlusPlus", "DeepLabV3Plus", "FPN", "PAN", "Segformer"])
def test_contract_of_baselines(architecture):
    check_contract(SmpNet(in_channels=2, num_classes=3, architecture=architecture, encoder="resnet18"), heads=1)


def test_further_options_of_a_baseline():
    narrow = [16, 8, 8, 4, 4]
    net = SmpNet(encoder="resnet18", options={"decoder_channels": narrow})
    assert [block.conv2[0].out_channels for block in net.model.decoder.blocks] == narrow


def check_contract(net, heads):
    """Every parameter gets a gradient, every size its logits, every level what the whole pass gives."""
    assert net.num_heads == heads
    net.train()
    result = net(torch.randn(2, 2, 33, 48))
    sum(logits.square().mean() for logits in result.logits).backward()
    assert [name for name, parameter in net.named_parameters() if parameter.grad is None] == []

    net.eval()
    with torch.no_grad():
        for height, width in SIZES:
            image = torch.randn(1, 2, height, width)
            result = net(image)
            assert isinstance(result, Heads)
            assert len(result.logits) == heads
            assert all(logits.shape == (1, 3, height, width) for logits in result.logits)
            assert net.predict(image).shape == (1, 3, height, width)
        for level in range(1, heads + 1):
            alone = net(image, level=level).logits
            assert len(alone) == 1
            torch.testing.assert_close(alone[0], result.logits[level - 1])
        torch.testing.assert_close(net.predict(image), result.logits[-1])
        last = net.to(memory_format=torch.channels_last)(image.to(memory_format=torch.channels_last)).logits[-1]
        torch.testing.assert_close(last, result.logits[-1], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", NETS)
@pytest.mark.parametrize("options", [{"norm": "group"}, {"widths": (4, 4)}, {"widths": (4, 4, 4, 4, 4, 4)}], ids=str)
def test_other_settings(name, options):
    net = NETS[name](in_channels=2, num_classes=3, **options)
    check_contract(net, heads=1)


@pytest.mark.parametrize("name", ["unet", "unet++"])
@pytest.mark.parametrize("upsample", ["transposed", "bilinear"])
def test_upsampling(name, upsample):
    check_contract(NETS[name](in_channels=2, num_classes=3, upsample=upsample, deep_supervision=True), heads=4)


@pytest.mark.parametrize("name", NETS)
def test_inference_rules(name):
    image = torch.randn(1, 3, 20, 20)
    mean = NETS[name](deep_supervision=True, inference="mean").eval()
    torch.testing.assert_close(mean.predict(image), torch.stack(mean(image).logits).mean(0))
    second = NETS[name](deep_supervision=True, inference=2).eval()
    torch.testing.assert_close(second.predict(image), second(image).logits[1])
    torch.testing.assert_close(second.combine(second(image)), second(image).logits[1])


@pytest.mark.parametrize(
    ("build", "says"),
    [
        (lambda: UNet(widths=(4,)), "at least two"),
        (lambda: UNet(widths=WIDTHS, inference="mean"), "deep_supervision: true"),
        (lambda: UNet(widths=WIDTHS, inference=5, deep_supervision=True), "1, 2, 3, 4"),
        (lambda: UNet(widths=WIDTHS, encoder_weights="imagenet"), "need an encoder"),
        (lambda: UNet(widths=WIDTHS, freeze_encoder=True), "need an encoder"),
        (lambda: UNet(widths=WIDTHS, full_size_skip=False), "need an encoder"),
        (lambda: UNet(widths=WIDTHS).prune(1), "UNetPlusPlus"),
        (lambda: UNetPlusPlus(widths=WIDTHS).prune(1), "deep_supervision: true"),
        (lambda: UNetPlusPlus(widths=WIDTHS, deep_supervision=True).prune(5), "which has 1 to 4"),
        (lambda: SmpNet(architecture="Unett"), "Unett .*'unet'"),
        (
            lambda: SmpNet(encoder="resnet18", options={"decoder_channel": [4]}),
            "decoder_channel: .*decoder_channels",
        ),
    ],
)
def test_errors_say_the_fix(build, says):
    with pytest.raises(InputError, match=says):
        build()


def test_gate_for_classes():
    logits = torch.tensor([[1.0, 5.0, 2.0]]).repeat(2, 1)[:, :, None, None]
    presence = torch.tensor([[3.0, -1.0, 0.5], [-3.0, -1.0, -0.5]])
    gated = gate(logits, presence)
    assert gated[0, 1] == CLOSED  # absent
    assert gated[0].argmax() == 2
    assert torch.equal(gated[1], logits[1])  # all absent is no answer


def test_gate_for_binary():
    gated = gate(torch.full((2, 1, 2, 2), 7.0), torch.tensor([[0.1], [-0.1]]))
    assert (gated[0].sigmoid() > 0.5).all()
    assert (gated[1].sigmoid() == 0).all()


@pytest.mark.parametrize("deep", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["one", "deep"])
@pytest.mark.parametrize(
    "name", ["unet", *(pytest.param(name, marks=pytest.mark.slow) for name in ("unet++", "unet3+"))]
)
def test_overfits_a_batch(name, deep):
    """Shapes of all classes, learnt by heart; in eval mode, with the statistics that training gathered."""
    torch.manual_seed(0)
    data = ShapesData(train=2, size=48)
    samples = [data.load("train", index) for index in range(2)]
    image = torch.stack([sample["image"] for sample in samples]) / 255 - 0.5
    mask = torch.stack([sample["mask"] for sample in samples])
    net = NETS[name](num_classes=5, deep_supervision=deep, widths=(16, 16, 32, 32), **SMALL.get(name, {})).train()
    optimizer = torch.optim.Adam(net.parameters(), lr=5e-3)
    for _ in range(150):
        loss = sum(torch.nn.functional.cross_entropy(logits, mask) for logits in net(image).logits)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        found = net.eval().predict(image).argmax(1)
    assert jaccard_score(mask.flatten(), found.flatten(), average="macro") > 0.98


def test_syncbatchnorm_is_the_same_function_in_eval():
    """timm's batch norm holds an activation, which torch's own conversion would drop."""
    for encoder in (None, "resnet18", "tu-mobilenetv3_small_050"):
        net = NETS["unet"](encoder=encoder).eval()
        image = torch.randn(1, 3, 64, 64)
        with torch.no_grad():
            before = net(image).logits[0]
            converted = SyncBatchNorm().apply(net).eval()
            assert any(isinstance(module, torch.nn.SyncBatchNorm) for module in converted.modules())
            assert torch.equal(converted(image).logits[0], before)


def test_an_encoder_whose_unused_parts_take_part_in_sums():
    """HRNet adds up maps that nobody asked for: they stay, without gradients."""
    net = NETS["unet"](encoder="tu-hrnet_w18_small")
    logits = net(torch.randn(2, 3, 40, 40)).logits[0]
    assert logits.shape == (2, 1, 40, 40)
    logits.sum().backward()
    assert all(p.grad is not None for p in net.parameters() if p.requires_grad)


@pytest.mark.parametrize("make", [UNet, UNetPlusPlus, UNet3Plus])
def test_weights_begin_as_he_et_al_have_them(make) -> None:
    """Normal, of variance 2 / fan-in (He et al. 2015, eq. 10), which keeps the signal's size through a deep net."""
    torch.manual_seed(0)
    net = make(widths=(16, 32, 64))
    convolutions = [m for m in net.modules() if isinstance(m, torch.nn.Conv2d) and m.kernel_size == (3, 3)]
    assert len(convolutions) > 5
    for convolution in convolutions:
        fan_in = convolution.weight[0].numel()
        assert convolution.weight.std().item() == pytest.approx((2 / fan_in) ** 0.5, rel=0.15)
