"""Encoders: the papers' own, or one of segmentation-models-pytorch's with a stem at full size."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from segmentation.errors import InputError
from segmentation.nets.blocks import DoubleConv, Norm, init_he


class Encoder(nn.Module):
    """Maps of the image, one for each of the `widths`, each at half the size of the one before.

    In all three papers two 3x3 convolutions make each level, with max-pooling between the levels. The body of an
    encoder of segmentation-models-pytorch takes the place of the levels that it has. Most encoders lack the level at
    full size: here convolutions see the image itself, where the library's nets up-sample from half the size. Encoders
    that start at stride 4 (convnext, mit) lack the level at stride 2 as well.

    Args:
        in_channels: channels of the image.
        widths: channels of each level, the finest first; they count where the body lacks a level.
        norm: of the levels that the body lacks.
        name: null for the paper's encoder, or as `library_encoder` has it.
        weights: of `library_encoder`.
        freeze: no gradients for the body; `SegmentationNet.train` then keeps its statistics too.
        full_size: whether there is a level at full size; else the first one has no channels, and the image stands in
            its place.

    Raises:
        InputError: fewer than two widths, an option that needs a name without one, or what `library_encoder` says.
    """

    body: nn.Module | None  # None if it gives no level

    def __init__(
        self,
        in_channels: int,
        widths: Sequence[int],
        norm: Norm,
        name: str | None = None,
        weights: str | None = None,
        freeze: bool = False,
        full_size: bool = True,
    ) -> None:
        super().__init__()
        if len(widths) < 2 or min(widths) < 1:
            raise InputError(
                f"model.net.widths {list(widths)}: give at least two, each 1 or more, the finest level first"
            )
        deepest = len(widths) - 1
        self.stride = 2**deepest
        maps: Sequence[Tensor] = ()  # that the body gives
        if name is not None:
            from segmentation.nets.pretrained import library_encoder  # takes seconds to import

            body = library_encoder(name, in_channels, depth=max(deepest, 3), weights=weights)
            maps = probe(body, f"encoder: {name}", in_channels, self.stride, len(widths))
            if freeze:
                body.requires_grad_(False)
            self.stride = maps[0].shape[-1]
        elif weights is not None or freeze or not full_size:
            raise InputError(
                "encoder_weights, freeze_encoder and full_size_skip: false need an encoder, e.g. encoder: resnet34"
            )
        self.channels = list(widths)
        self.full_size = full_size
        self.levels = nn.ModuleDict()
        self.body = None
        before = in_channels
        for level, width in enumerate(widths):
            if level == 0 and not full_size:
                self.channels[level] = 0
                continue
            if maps and maps[level].grad_fn is not None:  # no placeholder, nor the image itself
                self.channels[level] = maps[level].shape[1]
                self.body = body
            else:
                self.levels[str(level)] = DoubleConv(before, width, norm)
            before = self.channels[level]
        init_he(self.levels)

    def forward(self, image: Tensor, levels: int | None = None) -> list[Tensor]:
        """The first `levels` maps (all by default): map i is (N, channels[i], H / 2^i, W / 2^i)."""
        given = [] if self.body is None else self.body(image)
        maps = []
        for level in range(levels or len(self.channels)):
            if level == 0 and not self.full_size:
                maps.append(image)
            elif str(level) in self.levels:
                finer = F.max_pool2d(maps[-1], 2) if maps else image
                maps.append(self.levels[str(level)](finer))
            else:
                maps.append(given[level])
        return maps


class Unused(nn.Module):
    """In the place of a part that no output depends on."""

    def forward(self, x: Tensor, *_) -> Tensor:
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


def probe(
    module: nn.Module,
    name: str,
    in_channels: int,
    stride: int,
    count: int | None = None,
) -> list[Tensor]:
    """Run a library's module on a small image, and remove what its first `count` outputs do not depend on.

    The side of the image is the first of `stride`, 2 * `stride`, ... that the module takes; returns these outputs.

    Raises:
        InputError: the module takes no image of up to 128 pixels a side.
    """
    module.eval()  # batch norms gather no statistics
    try:
        with torch.enable_grad():
            outputs = module(torch.ones(1, in_channels, stride, stride))
            maps = [outputs] if isinstance(outputs, Tensor) else outputs[:count]
            total = torch.stack([x.sum() for x in maps]).sum()
    except (AssertionError, RuntimeError, ValueError) as error:
        if stride >= 128:
            raise InputError(f"{name} does not run on images of any size ({error}); choose another encoder") from error
        return probe(module, name, in_channels, 2 * stride, count)
    finally:
        module.train()
    if total.requires_grad:  # else no map is the module's own
        total.backward()
    used = set()
    for parameter in module.parameters():
        if parameter.grad is None:
            parameter.requires_grad_(False)
        else:
            used.add(parameter)
    module.zero_grad()
    if "hrnet" not in name:  # it adds up maps that nobody asked for
        remove_unused(module, used)
    return maps
