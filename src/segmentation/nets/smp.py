"""Models of segmentation-models-pytorch behind our contract, so that a run is compared by changing one line."""

from inspect import signature
from typing import Any

from torch import Tensor, nn

from segmentation.errors import InputError
from segmentation.nets.base import Heads, SegmentationNet
from segmentation.nets.encoders import probe


class SmpNet(SegmentationNet):
    """Any architecture of segmentation-models-pytorch, with one head.

    Args:
        in_channels: channels of the image.
        num_classes: channels of the output: 1 for a binary task, K for K classes.
        architecture: `Unet`, `UnetPlusPlus`, `DeepLabV3Plus`, `FPN`, `Segformer`, ... as the library spells it.
        encoder: a name that the library knows: resnet34, tu-convnext_tiny.
        encoder_weights: null for random ones, a name such as imagenet, or a file.
        freeze_encoder: keep the encoder's weights as they are.
        options: the architecture's arguments of its decoder, such as `{decoder_channels: [64, 48, 32, 16, 16]}`.

    Raises:
        InputError: the library knows no such architecture, encoder or option.
    """

    def __init__(
        self,
        in_channels: int = 3,
        num_classes: int = 1,
        architecture: str = "Unet",
        encoder: str = "resnet34",
        encoder_weights: str | None = None,
        freeze_encoder: bool = False,
        options: dict[str, Any] | None = None,
    ) -> None:
        import segmentation_models_pytorch as smp  # takes seconds

        from segmentation.nets.pretrained import check_encoder_name, library_encoder

        super().__init__(in_channels, num_classes)
        check_encoder_name(encoder)
        try:
            self.model = smp.create_model(
                architecture,
                encoder,
                encoder_weights=None,
                in_channels=in_channels,
                classes=num_classes,
                **(options or {}),
            )
        except (AttributeError, KeyError, RuntimeError, TypeError, ValueError) as error:
            raise InputError(f"{architecture} cannot be built with encoder {encoder}: {error}") from error
        known = [name for name in signature(type(self.model)).parameters if name.startswith("decoder_")]
        for option in options or {}:  # the library lets unknown ones pass
            if option not in known:
                raise InputError(f"model.net.options {option}: {architecture} takes {', '.join(known)}")
        if encoder_weights is not None:
            pretrained = library_encoder(encoder, in_channels, 5, encoder_weights)
            state = pretrained.state_dict()
            # Some architectures take a part of the encoder only.
            self.model.encoder.load_state_dict({key: state[key] for key in self.model.encoder.state_dict()})
            self.model.encoder.statistics = pretrained.statistics
        logits = probe(self.model, f"{architecture} with encoder {encoder}", in_channels, stride=32)
        self.stride = logits[0].shape[-1]
        if freeze_encoder:
            self.backbone.requires_grad_(False)

    @property
    def backbone(self) -> nn.Module:
        return self.model.encoder

    def compute(self, image: Tensor, level: int | None = None) -> Heads:
        return Heads((self.model(image),))
