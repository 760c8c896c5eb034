"""What feeds the skips: the papers' own encoder, or one of segmentation-models-pytorch's with a stem at full size."""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from segmentation.errors import InputError
from segmentation.nets.blocks import DoubleConv, Norm, init_he, run


class ConvEncoder(nn.Module):
    """The encoder of all three papers: two 3x3 convolutions a level, max-pooling between the levels.

    `channels` are those of the maps, the finest first; sides of the image are multiples of `stride`.
    """

    def __init__(self, in_channels: int, widths: Sequence[int], norm: Norm, checkpointing: bool = False) -> None:
        super().__init__()
        self.channels = list(widths)
        self.stride = 2 ** (len(widths) - 1)
        self.checkpointing = checkpointing
        before = [in_channels, *widths]
        self.levels = nn.ModuleList(DoubleConv(b, w, norm) for b, w in zip(before, widths, strict=False))
        init_he(self)

    def forward(self, image: Tensor, levels: int | None = None) -> list[Tensor]:
        """The first `levels` maps (all by default): map i is (N, channels[i], H / 2^i, W / 2^i)."""
        maps: list[Tensor] = []
        for block in list(self.levels)[:levels]:
            maps.append(run(block, F.max_pool2d(maps[-1], 2) if maps else image, checkpointing=self.checkpointing))
        return maps


class LibraryEncoder(nn.Module):
    """An encoder of segmentation-models-pytorch, and two convolutions for each level that it lacks.

    Most lack the one at full size: here a small stem sees the image itself, where segmentation-models-pytorch's nets
    up-sample from half the size. Those that start at stride 4 (convnext, mit) lack the one at stride 2 as well. What no
    map needs of the encoder is not kept.

    Args:
        in_channels: bands of the image.
        widths: one for each map; they count where the encoder lacks a level.
        norm: of the levels by hand.
        name: as segmentation-models-pytorch has it, `resnet34`, or `tu-` and a name of timm's, `tu-convnext_tiny`.
        weights: see `library_encoder`.
        freeze: no gradients for the encoder; `SegmentationNet.train` then keeps its statistics too.

    Raises:
        InputError: more than 6 widths, or an encoder that gives no such maps, or not of images of any size.
    """

    body: nn.Module | None  # the library's encoder, all that can be pretrained; None if nothing of it is needed

    def __init__(
        self, in_channels: int, widths: Sequence[int], norm: Norm, name: str, weights: str | None, freeze: bool
    ) -> None:
        from segmentation.nets.pretrained import library_encoder

        super().__init__()
        levels = len(widths)
        if levels > 6:
            raise InputError(f"encoder: {name} goes down to stride 32, which 6 widths need; got {levels}")
        body = library_encoder(name, in_channels, depth=max(levels - 1, 3), weights=weights)
        sides = [2**i for i in range(levels - 1, 7)]
        image, maps = drop_unused(body, lambda image: body(image)[:levels], in_channels, sides, name)

        self.stride = image.shape[-1]
        self.channels: list[int] = []
        self.stem = nn.ModuleDict()  # the levels by hand, by their number
        for i, (x, width) in enumerate(zip(maps, widths, strict=True)):
            if x is image or x.shape[1] == 0:
                self.stem[str(i)] = DoubleConv(self.channels[-1] if i else in_channels, width, norm)
            elif x.shape[-1] != self.stride >> i:
                raise InputError(f"encoder: {name} has no map at stride {1 << i}; choose resnet34 or another pyramid")
            self.channels.append(width if str(i) in self.stem else x.shape[1])
        init_he(self.stem)
        self.body = body if len(self.stem) < levels else None
        if freeze and self.body is not None:
            self.body.requires_grad_(False).eval()

    def forward(self, image: Tensor, levels: int | None = None) -> list[Tensor]:
        """The first `levels` maps (all by default): map i is (N, channels[i], H / 2^i, W / 2^i).

        The library's own encoders stop after the last map asked for; timm's (`tu-`) run whole, until a net is pruned.
        """
        count = len(self.channels) if levels is None else levels
        given: list[Tensor] = []
        if self.body is not None:
            self.body._depth = count - 1  # type: ignore[assignment]  # read by the library's encoders as they run
            given = self.body(image)
        maps: list[Tensor] = []
        for i in range(count):
            by_hand = str(i) in self.stem
            maps.append(self.stem[str(i)](F.max_pool2d(maps[-1], 2) if maps else image) if by_hand else given[i])
        return maps


def build_encoder(
    in_channels: int,
    widths: Sequence[int],
    norm: Norm,
    name: str | None,
    weights: str | None,
    freeze: bool,
    checkpointing: bool = False,
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
    return ConvEncoder(in_channels, widths, norm, checkpointing)


class Dropped(nn.Module):
    """In the place of a part that no output depends on."""

    def forward(self, x: Tensor, *args: object, **kwargs: object) -> Tensor:
        return x


def drop_unused(
    module: nn.Module, outputs: Callable[[Tensor], list[Tensor]], in_channels: int, sides: Sequence[int], name: str
) -> tuple[Tensor, list[Tensor]]:
    """Drop the parts of `module` that no output depends on: DDP fails on parameters without a gradient.

    Encoders at less than full depth keep the stages that they skip. Which those are is asked of autograd, not of each
    encoder's code: by `outputs`, which runs it on an image (1, in_channels, side, side), of the first of the `sides`
    that it takes. Returns that image and the outputs.

    Raises:
        InputError: it runs on none of them.
    """
    was_training = module.training
    module.eval()  # batch norms count nothing
    parameters = list(module.parameters())
    reason: Exception | None = None
    for side in sides:
        image = torch.ones(1, in_channels, side, side)
        try:
            with torch.enable_grad():
                maps = outputs(image)
                total = torch.stack([x.sum() for x in maps]).sum()
            break
        except (AssertionError, RuntimeError, ValueError) as error:
            reason = error
    else:
        raise InputError(f"{name} does not run on images of any size ({reason}); choose another encoder") from reason
    gradients = torch.autograd.grad(total, parameters, allow_unused=True) if total.requires_grad else ()
    used = {id(p) for p, gradient in zip(parameters, gradients, strict=False) if gradient is not None}
    dropped = _drop(module, used)
    try:
        outputs(image)
    except (AssertionError, RuntimeError, TypeError, ValueError):  # HRNet adds what it then throws away
        for parent, child_name, child in dropped:
            setattr(parent, child_name, child)
            child.requires_grad_(False)
    module.train(was_training)
    return image, maps


def _drop(module: nn.Module, used: set[int]) -> list[tuple[nn.Module, str, nn.Module]]:
    """Drop what holds no parameter in `used`; returns what was dropped: its parent, its name, itself."""
    dropped = []
    for name, child in module.named_children():
        ids = {id(parameter) for parameter in child.parameters()}
        container = isinstance(child, nn.Sequential | nn.ModuleList | nn.ModuleDict)  # some code loops over these
        if ids and not ids & used and not container:
            setattr(module, name, Dropped())
            dropped.append((module, name, child))
        else:
            dropped += _drop(child, used)
    for parameter in module.parameters(recurse=False):
        parameter.requires_grad_(id(parameter) in used)
    return dropped
