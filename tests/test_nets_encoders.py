"""Encoders by name: weights from a file, freezing, errors that say what to do."""

import os
import zipfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from segmentation_models_pytorch.encoders import encoders

from conftest import ROOT
from segmentation.errors import InputError
from segmentation.nets import SmpNet, UNet, UNetPlusPlus
from segmentation.nets.pretrained import library_encoder

WIDTHS = (4, 6, 8, 8, 8)


@pytest.fixture(autouse=True)
def hub(tmp_path, monkeypatch):
    """An empty cache of the Hugging Face hub, and no network."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    return tmp_path / "hub"


def saved(encoder, file):
    file.parent.mkdir(parents=True, exist_ok=True)
    save_file({key: value.contiguous() for key, value in encoder.state_dict().items()}, file)
    return file


def test_weights_from_a_file_and_from_the_hubs_cache(tmp_path, hub):
    source = library_encoder("resnet18", 3, 5, None)
    file = saved(source, tmp_path / "resnet18.safetensors")
    revision = encoders["resnet18"]["pretrained_settings"]["imagenet"]["revision"]
    saved(source, hub / f"models--smp-hub--resnet18.imagenet/snapshots/{revision}/model.safetensors")
    for weights in (str(file), "imagenet"):
        for net in (
            UNet(widths=WIDTHS, encoder="resnet18", encoder_weights=weights),
            SmpNet(encoder="resnet18", encoder_weights=weights),
        ):
            loaded = net.backbone.state_dict()
            assert torch.equal(loaded["layer2.0.conv1.weight"], source.state_dict()["layer2.0.conv1.weight"])


def test_weights_of_timm_from_a_file(tmp_path):
    import timm

    source = timm.create_model("convnext_atto")
    file = saved(source, tmp_path / "atto.safetensors")
    net = UNet(in_channels=4, widths=WIDTHS, encoder="tu-convnext_atto", encoder_weights=str(file))
    loaded, given = net.encoder.body.model.state_dict(), source.state_dict()
    key = "stages_1.blocks.0.conv_dw.weight"
    assert torch.equal(loaded[key], given[key.replace("stages_", "stages.")])
    assert loaded["stem_0.weight"].shape[1] == 4  # adapted to the bands


def test_bands_of_pretrained_weights(tmp_path):
    file = saved(library_encoder("resnet18", 3, 5, None), tmp_path / "resnet18.safetensors")
    net = UNet(in_channels=5, widths=WIDTHS, encoder="resnet18", encoder_weights=str(file))
    assert net.encoder.body.conv1.weight.shape[1] == 5


@pytest.mark.parametrize("encoder", ["resnet18", "tu-convnext_atto"])
def test_no_network_says_how_to_prefetch(encoder):
    with pytest.raises(InputError, match="--prefetch"):
        UNet(widths=WIDTHS, encoder=encoder, encoder_weights="imagenet")


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"encoder": "resnet43"}, "resnet34"),
        ({"encoder": "tu-convnxt_tiny"}, "tu-convnext_tiny"),
        ({"encoder": "tu-vit_tiny_patch16_224"}, "strides 2, 4, 8"),
        ({"encoder": "resnet18", "encoder_weights": "imagnet"}, "choose imagenet"),
        ({"encoder": "resnet18", "encoder_weights": "/nowhere/a.safetensors"}, "no file /nowhere/a.safetensors"),
        ({"encoder": "resnet18", "widths": (4,) * 7}, r"\[1, 5\]"),
    ],
)
def test_errors_say_the_fix(options, says):
    with pytest.raises(InputError, match=says):
        UNet(**{"widths": WIDTHS, **options})


def test_wrong_file(tmp_path):
    file = saved(library_encoder("vgg11", 3, 5, None), tmp_path / "vgg.safetensors")
    with pytest.raises(InputError, match="is not for resnet18"):
        UNet(widths=WIDTHS, encoder="resnet18", encoder_weights=str(file))


class Bomb:
    def __reduce__(self):
        return os.mkdir, ("owned",)


@pytest.mark.parametrize(("build", "encoder"), [(UNet, "resnet18"), (SmpNet, "tu-convnext_atto")])
def test_a_file_of_weights_runs_no_code(build, encoder, tmp_path):
    """Whatever is wrong with the file, one line names it, and says nothing of the encoder."""
    options = {"widths": WIDTHS} if build is UNet else {}
    torch.save({"conv1.weight": Bomb()}, "pickled.pth")
    torch.save([1, 2], "list.pth")
    torch.save({"conv1.weight": "xx"}, "texts.pth")
    torch.save({"conv1.weight": torch.zeros(2)}, "other.pth")
    Path("cut.pth").write_bytes(Path("other.pth").read_bytes()[:300])
    Path("text.safetensors").write_text("not one")
    with zipfile.ZipFile("other.pth") as whole, zipfile.ZipFile("packed.pth", "w", zipfile.ZIP_DEFLATED) as packed:
        for part in whole.namelist():
            packed.writestr(part, whole.read(part))
        packed.writestr("other/data/999", bytes(2**22))
    names = ["pickled.pth", "list.pth", "cut.pth", "text.safetensors", "packed.pth"]
    if encoder == "resnet18":  # timm takes of a file what it knows
        names += ["texts.pth", "other.pth"]
    for name in names:
        with pytest.raises(InputError, match=f"^encoder_weights: {name} (cannot be used|is not for)[^\n]*$"):
            build(encoder=encoder, encoder_weights=name, **options)
        assert not Path("owned").exists()
    with pytest.raises(InputError, match=r"packed\.pth[^\n]* would unpack to 4\.0 MiB"):
        build(encoder=encoder, encoder_weights="packed.pth", **options)


@pytest.mark.parametrize(
    "build",
    [
        lambda: UNet(widths=WIDTHS, encoder="resnet18", freeze_encoder=True),
        lambda: SmpNet(encoder="resnet18", freeze_encoder=True),
    ],
)
def test_frozen_encoder_stays_as_it_is(build):
    net = build().train()
    before = {key: value.clone() for key, value in net.backbone.state_dict().items()}
    net(torch.randn(2, 3, 64, 64)).logits[0].sum().backward()
    assert all(torch.equal(before[key], value) for key, value in net.backbone.state_dict().items())
    assert all(parameter.grad is None for parameter in net.backbone.parameters())
    assert all(p.grad is not None for p in net.parameters() if p.requires_grad)
    assert net.train().training
    assert not net.backbone.training


def test_a_pruned_net_can_be_frozen():
    """At level 1 nothing of an encoder that starts at stride 4 is left to freeze."""
    net = UNetPlusPlus(widths=WIDTHS, encoder="tu-convnext_atto", freeze_encoder=True, deep_supervision=True)
    assert net.prune(1).backbone is None
    assert not any(parameter.requires_grad for parameter in net.prune(3).backbone.parameters())


def test_the_library_is_not_imported_without_need():
    import subprocess
    import sys

    code = (
        "import sys, segmentation.nets; sys.exit('segmentation_models_pytorch' in sys.modules or 'timm' in sys.modules)"
    )
    env = {"PYTHONPATH": str(ROOT / "src")}
    assert subprocess.run([sys.executable, "-c", code], env=env, check=False).returncode == 0
