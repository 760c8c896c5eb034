"""Data sets that torchvision downloads, where their licence allows it."""

from typing import Any, Literal

from torchvision import datasets

from segmentation.data.folder import FolderData, expand
from segmentation.errors import InputError, one_line


class TorchvisionData(FolderData):
    """A FolderData that torchvision can fetch (`configs/data/` has layout, official classes and colours of each).

    Args:
        name: of the class in torchvision.datasets.
        root: folder that the data set lies in, or is downloaded to.
        download: fetch it first.
        options: those of FolderData.

    Raises:
        InputError: the data set is not in root, or cannot be fetched.
    """

    def __init__(
        self, name: Literal["OxfordIIITPet", "VOCSegmentation"], root: str, download: bool = False, **options: Any
    ) -> None:
        folder = expand(root)
        if download:
            try:
                getattr(datasets, name)(folder, download=True)
            except (OSError, RuntimeError, ValueError) as error:
                raise InputError(f"{folder}: {name} cannot be fetched ({one_line(error)})") from error
        elif not folder.is_dir():
            raise InputError(f"{folder}: no such folder. Fix: data.dataset.download: true, where there is internet")
        super().__init__(root, **options)
