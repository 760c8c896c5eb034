"""The output folder of predict.py: which results are there, and what made them; each is written whole or not at all."""

import hashlib
import json
import os
from argparse import Namespace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from segmentation.data.labels import Labels
from segmentation.data.writing import atomic_write, remove_stale, write_json, write_text
from segmentation.errors import InputError
from segmentation.inference.geotiff import is_geotiff, save_geotiff
from segmentation.inference.instances import separate
from segmentation.training.entry import check_folder
from segmentation.visualize import mask_overlay, save_png

OVERLAY_SIDE = 2048  # pixels of a mask overlay's longest side at most
COMPARED = ("checkpoint", "--format", "--tta", "--tile")  # what one folder holds masks of

#: Kind of result -> its folder in the output folder, and its ending.
PLACES = {
    "mask": ("", ".png"),
    "probabilities": ("", ".npy"),
    "overlay": ("overlays", ".png"),
    "instances": ("instances", ".png"),
}


class Results:
    """The results of some images in an output folder.

    Args:
        images: the files and their names.
        options: those of the command line.
        labels: the classes.

    Raises:
        InputError: a PNG cannot hold the classes, or a result would replace an image or another result.
    """

    def __init__(
        self,
        images: dict[Path, str],
        options: Namespace,
        labels: Labels,
    ) -> None:
        self.output = Path(options.output)
        self.images = images
        self.options = options
        self.labels = labels
        self.record = self.output / "predict.json"  # what made the masks, and of which images
        self.unreadable = self.output / "unreadable.txt"
        #: Name -> file of the images whose masks are GeoTIFFs, too.
        self.geotiffs = {name: file for file, name in images.items() if is_geotiff(file)}
        self.kinds = ["probabilities"]
        if options.format != "probabilities":
            self.kinds = ["mask"]
            mask_image(
                np.zeros((1, 1), np.uint8),
                labels,
                options.format,
            )  # a PNG may not hold the classes
        for kind in ("overlay", "instances"):
            if getattr(options, kind):
                self.kinds.append(kind)
        check_folder(self.output)
        taken = {os.path.realpath(file) for file in images}
        for name in images.values():
            for kind in self.kinds:
                path = self.path(name, kind)
                place = os.path.realpath(path)
                if place in taken:
                    raise InputError(f"{path} would replace an image or a result: use several OUTPUTs")
                taken.add(place)

    def path(self, name: str, kind: str) -> Path:
        """The file of a result of an image."""
        folder, suffix = PLACES[kind]
        if kind == "mask" and name in self.geotiffs:
            suffix = ".tif"
        return self.output / folder / f"{name}{suffix}"

    def begin(self) -> dict[Path, str]:
        """Write the record, remove what is to be replaced, and return the images that are still to be predicted.

        Raises:
            InputError: results of another checkpoint, of other options or of other images are there.
        """
        known = self._read_record()
        before = known.pop("images", {})
        made_by = self._made_by()
        differ = []
        for key in COMPARED:
            if known and known.get(key) != made_by[key]:
                differ.append(key)
        fix = "choose another OUTPUT, or add --overwrite"
        if differ and not self.options.overwrite:
            raise InputError(f"{self.output} holds masks of another {' and '.join(differ)}: {fix}")
        images = {} if differ else dict(before)
        todo = {}
        for file, name in self.images.items():
            images[name] = os.path.realpath(file)
            paths = [self.path(name, kind) for kind in self.kinds]
            there = [path for path in paths if path.exists()]
            is_same = before.get(name) == images[name]
            if self.options.overwrite or there != paths:
                todo[file] = name
            if there and not self.options.overwrite and not is_same:
                raise InputError(f"{self.output} has {there[0]} of another image: {fix}")
        # Of every kind: a mask overlay of another checkpoint is none of this one's.
        for name in before.keys() & todo.values():
            for kind in PLACES:
                self.path(name, kind).unlink(missing_ok=True)
        self.output.mkdir(parents=True, exist_ok=True)
        remove_stale(self.output, idle=600)
        write_json(self.record, {**made_by, "images": images})
        return todo

    def save(
        self,
        name: str,
        image: np.ndarray,
        index: np.ndarray,
        probabilities: list[np.ndarray],
    ) -> None:
        """Write the results of an image (C, H, W): of class indices (H, W), and probabilities in strips (K, h, W)."""
        if "probabilities" in self.kinds:
            path = self.path(name, "probabilities")
            whole = np.concatenate(probabilities, axis=1)
            with atomic_write(path) as aside:
                np.save(aside, whole)
        if "overlay" in self.kinds:
            side = max(index.shape)
            step = -(-side // OVERLAY_SIDE)
            overlay = mask_overlay(
                image[:, ::step, ::step],
                index[::step, ::step],
                self.labels,
            )
            picture = Image.fromarray(overlay)
            save_png(picture, self.path(name, "overlay"))
        if "instances" in self.kinds:
            ids = separate(index, self.labels)
            path = self.path(name, "instances")
            if ids.max() > 65535:
                raise InputError(f"{path}: {ids.max()} instances are more than 16 bits can number")
            numbers = ids.astype(np.uint16)
            picture = Image.fromarray(numbers)
            save_png(picture, path)
        if "mask" in self.kinds:
            path = self.path(name, "mask")
            picture = mask_image(index, self.labels, self.options.format)
            if name in self.geotiffs:
                save_geotiff(
                    picture,
                    path,
                    source=self.geotiffs[name],
                    image=image,
                    labels=self.labels,
                )
            else:
                save_png(picture, path)

    def end(self, bad: list[str]) -> None:
        """Write the list of images that were left out; none of an earlier run stays."""
        self.unreadable.unlink(missing_ok=True)
        if bad:
            write_text(self.unreadable, "\n".join([*bad, ""]))

    def _read_record(self) -> dict[str, Any]:
        if not self.record.is_file():
            return {}
        try:
            known = json.loads(self.record.read_bytes())
            return {**known, "images": dict(known["images"])}
        except (ValueError, TypeError, KeyError) as error:
            raise InputError(
                f"{self.record}: is damaged, and nothing else says what made the masks beside it. Choose another "
                f"OUTPUT, or remove {self.output}"
            ) from error

    def _made_by(self) -> dict[str, Any]:
        with open(self.options.checkpoint, "rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        classes = {}
        for described in describe_classes(self.labels):
            classes[described.pop("name")] = described
        return {
            "checkpoint": digest,
            "--format": self.options.format,
            "--tta": self.options.tta,
            "--tile": self.options.tile,
            "classes": classes,
        }


def describe_classes(labels: Labels) -> list[dict[str, Any]]:
    """Name, mask value and colour of each class, in the order of their indices."""
    described = []
    for index, name in enumerate(labels.names):
        one = {
            "name": name,
            "value": labels.values[index][0],
            "color": labels.colors[index],
        }
        described.append(one)
    return described


def mask_image(index: np.ndarray, labels: Labels, form: str) -> Image.Image:
    """A mask for saving, of class indices (H, W). `index`: the data set's own values, 8 or 16 bits, or its colours.
    `palette`: the same values (class indices, where those are colours or of 16 bits), shown in the classes' colours.

    Raises:
        InputError: a PNG cannot hold the classes.
    """
    values = labels.decode(index)
    if form == "index":
        if values.dtype not in (np.uint8, np.uint16):
            raise InputError(f"--format index: a PNG holds 0 to 65535, not {labels.values}: take --format palette")
        return Image.fromarray(values)
    if labels.num_classes > 256:
        raise InputError(f"--format palette holds 256 colours, for {labels.num_classes} classes: take index")
    palette = np.zeros((256, 3), np.uint8)
    if values.ndim == 2 and values.dtype == np.uint8:
        own = [int(of_class[0]) for of_class in labels.values]
        palette[own] = labels.palette
    else:
        values = index
        palette[: labels.num_classes] = labels.palette
    image = Image.fromarray(values)  # gray, until it has a palette
    image.putpalette(palette.tobytes())
    return image
