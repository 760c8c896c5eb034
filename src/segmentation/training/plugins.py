"""What replaces a part of Lightning's trainer."""

from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.pytorch.plugins.layer_sync import TorchSyncBatchNorm

from segmentation.data.writing import atomic_write
from segmentation.errors import InputError


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes a checkpoint beside its place and renames it: Lightning's own goes by the way of the temporary folder,
    and between file systems that is a copy, which a full disk or a kill can cut off."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        path = Path(path)
        try:
            with atomic_write(path) as aside:
                torch.save(checkpoint, aside)
        except (OSError, RuntimeError) as error:  # a full disk is a RuntimeError in torch's writer
            reason = getattr(error, "strerror", None) or " ".join(str(error).split())[:160]
            raise InputError(
                f"{path}: cannot be written ({reason}). What was saved before is intact: make room, and go on"
            ) from error


class SyncBatchNorm(TorchSyncBatchNorm):
    """One batch norm over all processes, in timm's encoders too: theirs hold the activation, which torch would drop."""

    def apply(self, model: torch.nn.Module) -> torch.nn.Module:
        from timm.layers import convert_sync_batchnorm

        return convert_sync_batchnorm(model)

    def revert(self, model: torch.nn.Module) -> torch.nn.Module:
        return model  # in eval mode it is plain batch norm
