"""Tiny data sets in the layouts in which the real ones are handed out, for the overlays in configs/data."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image

SIDE = 64


def picture(rng: np.random.Generator) -> Image.Image:
    return Image.fromarray(rng.integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8))


def blocks(rng: np.random.Generator, values: list[int]) -> np.ndarray:
    """A mask of blocks of all `values`."""
    picked = rng.permutation(np.resize(values, 64)).reshape(8, 8).astype(np.uint8)
    return picked.repeat(8, axis=0).repeat(8, axis=1)


def save(image: Image.Image, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path)


def voc2012(root: Path) -> None:
    rng, base = np.random.default_rng(0), root / "voc2012/VOCdevkit/VOC2012"
    palette = [0, 0, 0, 128, 0, 0, 0, 128, 0] + [0] * 756 + [224, 224, 192]
    (base / "ImageSets/Segmentation").mkdir(parents=True)
    for split, count in (("train", 9), ("val", 2)):
        names = [f"2007_{split}{index:04d}" for index in range(count)]
        (base / f"ImageSets/Segmentation/{split}.txt").write_text("\n".join(names) + "\n")
        for name in names:
            save(picture(rng), base / f"JPEGImages/{name}.jpg")
            mask = Image.fromarray(blocks(rng, [0, 1, 2, 15, 20, 255]))
            mask.putpalette(palette)  # "P", as VOC's own
            save(mask, base / f"SegmentationClass/{name}.png")


def cityscapes(root: Path) -> None:
    rng, base = np.random.default_rng(0), root / "cityscapes"
    for split, city, count in (("train", "aachen", 5), ("train", "bochum", 4), ("val", "lindau", 2)):
        for index in range(count):
            name = f"{city}_{index:06d}_000019"
            save(picture(rng), base / f"leftImg8bit/{split}/{city}/{name}_leftImg8bit.png")
            mask = Image.fromarray(blocks(rng, list(range(34))))
            save(mask, base / f"gtFine/{split}/{city}/{name}_gtFine_labelIds.png")
            save(mask, base / f"gtFine/{split}/{city}/{name}_gtFine_instanceIds.png")


def oxford_pet(root: Path) -> None:
    rng, base = np.random.default_rng(0), root / "pets/oxford-iiit-pet"
    (base / "annotations").mkdir(parents=True)
    for split, count in (("trainval", 11), ("test", 2)):
        names = [f"Egyptian_Mau_{split}_{index}" for index in range(count)]
        lines = "".join(f"{name} {1 + index % 2} 1 1\n" for index, name in enumerate(names))
        (base / f"annotations/{split}.txt").write_text(lines)
        for index, name in enumerate(names):
            # A few of the real ones are GIF, gray or RGBA, though they are called .jpg.
            image = [picture(rng), picture(rng).convert("P"), picture(rng).convert("RGBA"), picture(rng).convert("L")]
            path = base / f"images/{name}.jpg"
            path.parent.mkdir(exist_ok=True)
            image[index % 4].save(path, format=["JPEG", "GIF", "PNG", "JPEG"][index % 4])
            save(Image.fromarray(blocks(rng, [1, 2, 3])), base / f"annotations/trimaps/{name}.png")


def ade20k(root: Path) -> None:
    rng, base = np.random.default_rng(0), root / "ADEChallengeData2016"
    for split, short, count in (("training", "train", 9), ("validation", "val", 2)):
        for index in range(count):
            name = f"ADE_{short}_{index:08d}"
            image = picture(rng) if index else picture(rng).convert("L")
            save(image, base / f"images/{split}/{name}.jpg")
            save(Image.fromarray(blocks(rng, [0, 1, 2, 100, 150])), base / f"annotations/{split}/{name}.png")


def dsb2018(root: Path) -> None:
    rng = np.random.default_rng(0)
    for index in range(11):
        name = f"{index:064x}"
        folder = root / "dsb2018/stage1_train" / name
        save(picture(rng).convert("RGBA"), folder / f"images/{name}.png")
        for number in range(3):
            mask = np.zeros((SIDE, SIDE), np.uint8)
            mask[8:16, 8 + 16 * number : 20 + 16 * number] = 255
            save(Image.fromarray(mask), folder / f"masks/{number:064x}.png")


#: Name of an overlay in configs/data -> what writes its data below a folder: 9 images to train on at least.
MAKERS: dict[str, Callable[[Path], None]] = {
    make.__name__: make for make in (voc2012, cityscapes, oxford_pet, ade20k, dsb2018)
}
