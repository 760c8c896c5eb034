"""Encoders: the papers' own, or one of segmentation-models-pytorch's with a stem at full size."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from segmentation.errors import InputError
from segmentation.nets.blocks import DoubleConv, Norm, init_he


class ConvEncoder(nn.Module):
    """The encoder of all three papers: two 3x3 convolutions a level, max-pooling between the levels."""

    def __init__(self, in_channels: int, widths: Sequence[int], norm: Norm) -> None:
        super().__init__()
        self.channels = list(widths)
        self.stride = 2 ** (len(widths) - 1)
        self.levels = nn.ModuleList()
        for width in widths:
            self.levels.append(DoubleConv(in_channels, width, norm))
            in_channels = width
        init_he(self)

    def forward(self, image: Tensor, levels: int | None = None) -> list[Tensor]:
        """The first `levels` maps (all by default): map i is (N, channels[i], H / 2^i, W / 2^i)."""
        first, *others = list(self.levels)[:levels]
        maps = [first(image)]
        for block in others:
            maps.append(block(F.max_pool2d(maps[-1], 2)))
        return maps


class LibraryEncoder(nn.Module):
    """An encoder of segmentation-models-pytorch, and two convolutions for each level that it lacks.

    Most encoders lack the level at full size: here a small stem sees the image itself, where the library's nets
    up-sample from half the size. Encoders that start at stride 4 (convnext, mit) lack the level at stride 2 as well.

    Args:
        in_channels: channels of the image.
        widths: one for each map; they count where the encoder lacks a level.
        norm: of the stem.
        name: as segmentation-models-pytorch has it, `resnet34`, or `tu-` and a name of timm's, `tu-convnext_tiny`.
        weights: see `library_encoder`.
        freeze: no gradients for the encoder; `SegmentationNet.train` then keeps its statistics too.

    Raises:
        InputError: more than 6 widths, or an encoder without a map at each stride.
    """

    body: nn.Module | None  # the library's encoder; None if the stem makes every level

    def __init__(
        self,
        in_channels: int,
        widths: Sequence[int],
        norm: Norm,
        name: str,
        weights: str | None,
        freeze: bool,
    ) -> None:
        from segmentation.nets.pretrained import library_encoder  # takes seconds to import

        super().__init__()
        if len(widths) > 6:
            raise InputError(f"encoder: {name} goes down to stride 32, which 6 widths need; got {len(widths)}")
        deepest = len(widths) - 1
        body = library_encoder(name, in_channels, depth=max(deepest, 3), weights=weights)
        maps = probe(body, f"encoder: {name}", in_channels, 2**deepest, count=len(widths))
        self.stride = maps[0].shape[-1]
        self.channels: list[int] = []
        self.stem = nn.ModuleDict()  # by level
        for level, width in enumerate(widths):
            channels = maps[level].shape[1]
            if channels == 0 or maps[level].grad_fn is None:  # a placeholder, or the image itself
                before = self.channels[-1] if level else in_channels
                self.stem[str(level)] = DoubleConv(before, width, norm)
                channels = width
            elif maps[level].shape[-1] * 2**level != self.stride:
                raise InputError(f"encoder: {name} has no map at stride {2**level}; choose resnet34 or another pyramid")
            self.channels.append(channels)
        init_he(self.stem)
        self.body = body if len(self.stem) < len(widths) else None
        if freeze and self.body is not None:
            self.body.requires_grad_(False)

    def forward(self, image: Tensor, levels: int | None = None) -> list[Tensor]:
        """The first `levels` maps (all by default): map i is (N, channels[i], H / 2^i, W / 2^i)."""
        given = [] if self.body is None else self.body(image)
        maps: list[Tensor] = []
        for level in range(levels or len(self.channels)):
            if str(level) not in self.stem:
                maps.append(given[level])
                continue
            finer = F.max_pool2d(maps[-1], 2) if maps else image
            maps.append(self.stem[str(level)](finer))
        return maps


def build_encoder(
    in_channels: int,
    widths: Sequence[int],
    norm: Norm,
    name: str | None,
    weights: str | None,
    freeze: bool,
) -> ConvEncoder | LibraryEncoder:
    """The paper's encoder, or the one that has `name`. Both give one map for each of the `widths`.

    Raises:
        InputError: fewer than two widths, weights or freezing without a name, or what `LibraryEncoder` says.
    """
    if len(widths) < 2:
        raise InputError(f"widths: {list(widths)} has no level to go down to; give at least two, the finest first")
    if name is not None:
        return LibraryEncoder(in_channels, widths, norm, name, weights, freeze)
    if weights is not None or freeze:
        raise InputError("encoder_weights and freeze_encoder need an encoder by name, e.g. encoder: resnet34")
    return ConvEncoder(in_channels, widths, norm)


class Unused(nn.Module):
    """In the place of a part that no output depends on."""

    def forward(self, x: Tensor, *_: Any) -> Tensor:
        return x


def remove_unused(module: nn.Module, used: set[nn.Parameter]) -> None:
    """Remove the parts without a parameter in `used`: DDP fails on parameters that get no gradient."""
    for name, child in module.named_children():
        parameters = list(child.parameters())
        is_container = isinstance(child, nn.Sequential | nn.ModuleList | nn.ModuleDict)
        if parameters and used.isdisjoint(parameters) and not is_container:
            setattr(module, name, Unused())
        else:
            remove_unused(child, used)


def probe(module: nn.Module, name: str, in_channels: int, stride: int, count: int | None = None) -> list[Tensor]:
    """Run a library's module on a small image, and remove what its first `count` outputs do not depend on.

    The side of the image is the first of `stride`, 2 * `stride`, ... that the module takes; returns these outputs.

    Raises:
        InputError: the module takes no image of up to 128 pixels a side.
    """
    was_training = module.training
    module.eval()  # batch norms gather no statistics
    try:
        with torch.enable_grad():
            outputs = module(torch.ones(1, in_channels, stride, stride))
    except (AssertionError, RuntimeError, ValueError) as error:
        if stride >= 128:
            raise InputError(f"{name} does not run on images of any size ({error}); choose another encoder") from error
        return probe(module, name, in_channels, 2 * stride, count)
    finally:
        module.train(was_training)
    maps = [outputs] if isinstance(outputs, Tensor) else list(outputs[:count])
    computed = [x for x in maps if x.requires_grad]
    parameters = list(module.parameters())
    used = set()
    if computed:
        ones = [torch.ones_like(x) for x in computed]
        gradients = torch.autograd.grad(computed, parameters, ones, allow_unused=True)
        used = {p for p, gradient in zip(parameters, gradients, strict=True) if gradient is not None}
    if "hrnet" not in name:  # it adds up maps that nobody asked for
        remove_unused(module, used)
    for parameter in module.parameters():
        parameter.requires_grad_(parameter in used)
    return maps
