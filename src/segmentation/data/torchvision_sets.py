"""Data sets that torchvision finds, checks and, where their licence allows it, downloads."""

from pathlib import Path
from typing import Any, Literal

from torchvision import datasets

from segmentation.data.file_data import FileData
from segmentation.data.folder import expand
from segmentation.data.layout import Files
from segmentation.data.splits import divide
from segmentation.data.values import Value
from segmentation.errors import InputError


class TorchvisionData(FileData):
    """A data set of torchvision's: its files, with the classes declared here (`configs/data/` has the official ones).

    - `OxfordIIITPet`: the official trainval, of which `val_fraction` is kept to validate on, and test.
    - `VOCSegmentation`: Pascal VOC 2012's train and val. Its test masks are not public.
    - `Cityscapes`: train and val of the fine masks (`*_labelIds.png`). Its test masks are not public.

    Args:
        name: of the class in torchvision.datasets.
        root: folder that the data set lies in, or is downloaded to; environment variables and ~ are expanded.
        classes: as in FolderData.
        ignore: mask values of pixels that count nowhere.
        download: fetch it if it is not there; Cityscapes wants an account, and cannot be fetched.
        val_fraction: of OxfordIIITPet.
        split_seed: seed of that division.

    Raises:
        InputError: the data set is not in root; says what belongs there.
    """

    def __init__(
        self,
        name: Literal["OxfordIIITPet", "VOCSegmentation", "Cityscapes"],
        root: str,
        classes: dict[str, int | str | list[Value] | dict[str, Any]],
        ignore: Value | list[Value] | None = None,
        download: bool = False,
        val_fraction: float = 0.2,
        split_seed: int = 0,
    ) -> None:
        folder = expand(root)
        if name == "OxfordIIITPet":
            train, test = (_open(name, folder, download, split=split) for split in ("trainval", "test"))
            pool = _files(train._images, train._segs)
            names = list(pool)
            val, rest = divide(names, [val_fraction], self.group, split_seed)
            chosen = {"train": rest, "val": val}
            files = {split: {names[i]: pool[names[i]] for i in indices} for split, indices in chosen.items()}
            files["test"] = _files(test._images, test._segs)
        elif name == "VOCSegmentation":
            found = {split: _open(name, folder, download, image_set=split) for split in ("train", "val")}
            files = {split: _files(data.images, data.masks) for split, data in found.items()}
        else:
            if download:
                raise InputError(f"Cityscapes wants an account: fetch it from cityscapes-dataset.com into {folder}")
            found = {
                split: _open(name, folder, False, split=split, target_type="semantic") for split in ("train", "val")
            }
            files = {split: _files(data.images, [t[0] for t in data.targets]) for split, data in found.items()}
        super().__init__(classes, ignore, 3, None, files, as_rgb=True)  # a few of the pets are GIFs, gray or RGBA


def _open(name: str, root: Path, download: bool, **options: str) -> Any:
    """torchvision's data set.

    Raises:
        InputError: it is not there, not whole, or cannot be fetched.
    """
    extra = {} if name == "Cityscapes" else {"download": download}
    try:
        return getattr(datasets, name)(root, **options, **extra)
    except (OSError, RuntimeError, ValueError) as error:
        fix = "" if download or name == "Cityscapes" else " Fix: data.dataset.download: true, where there is internet"
        raise InputError(f"{root}: torchvision finds no {name} there ({' '.join(str(error).split())}).{fix}") from error


def _files(images: list[Any], masks: list[Any]) -> dict[str, Files]:
    """Image and mask of each sample, in the order of the names."""
    pairs = {
        Path(image).stem: {"image": [Path(image)], "mask": [Path(mask)]}
        for image, mask in zip(images, masks, strict=True)
    }
    return dict(sorted(pairs.items()))
