"""The output folder of predict.py: which results are there, and what made them; each is written whole or not at all."""

import hashlib
import json
import os
from argparse import Namespace
from collections import Counter
from itertools import chain
from pathlib import Path

import numpy as np
from PIL import Image

from segmentation.checkpoint import weights_of
from segmentation.data.labels import Labels
from segmentation.data.writing import atomic_write, remove_stale, write_json, write_text
from segmentation.errors import InputError
from segmentation.inference.geotiff import is_geotiff, save_geotiff
from segmentation.inference.instances import separate
from segmentation.nets.weights import SHARED
from segmentation.visualize import mask_overlay, save_png

OVERLAY_SIDE = 2048  # pixels of a mask overlay's longest side at most
COMPARED = ("checkpoint", "--format", "--tta", "--tile")  # what one folder holds masks of

#: Kind of result -> its file in the output folder, of an image's name.
PLACES = {
    "mask": "{}.png",
    "probabilities": "{}.npy",
    "overlay": "overlays/{}.png",
    "instances": "instances/{}.png",
}


class Results:
    """The results of some images in an output folder.

    Args:
        images: the files and their names.
        options: those of the command line.
        labels: the classes.

    Raises:
        InputError: a PNG cannot hold the classes, or two results would have one file.
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
        self.kinds = [kind for kind in ("overlay", "instances") if getattr(options, kind)]
        self.kinds.append("probabilities" if options.format == "probabilities" else "mask")
        if "mask" in self.kinds:  # a PNG may not hold the classes
            mask_image(np.zeros((1, 1), np.uint8), labels, options.format)
        written = Counter(chain.from_iterable(map(self.paths, images.values())))
        for path, images_of_it in written.items():
            if images_of_it > 1:
                raise InputError(f"{path} would be the result of two images: use several OUTPUTs")

    def path(self, name: str, kind: str) -> Path:
        """The file of a result of an image."""
        path = self.output / PLACES[kind].format(name)
        if kind == "mask" and name in self.geotiffs:
            return path.with_name(f"{path.stem}.tif")
        return path

    def paths(self, name: str) -> list[Path]:
        """The files of all results of an image."""
        return [self.path(name, kind) for kind in self.kinds]

    def begin(self) -> dict[Path, str]:
        """Write the record, remove what is to be replaced, and return the images that are still to be predicted.

        Raises:
            InputError: results of another checkpoint, of other options or of other images are there.
        """
        known = self._read_record()
        before = known.pop("images", {})
        made_by = self._made_by()
        differ = [key for key in COMPARED if known.get(key, made_by[key]) != made_by[key]]
        fix = "choose another OUTPUT, or add --overwrite"
        if differ and not self.options.overwrite:
            raise InputError(f"{self.output} holds masks of another {' and '.join(differ)}: {fix}")
        images = {} if differ else dict(before)
        todo = {}
        for file, name in self.images.items():
            source = os.path.realpath(file)
            paths = self.paths(name)
            there = [path for path in paths if path.exists()]
            if there and not self.options.overwrite and before.get(name) != source:
                raise InputError(f"{self.output} has {there[0]} of another image: {fix}")
            if self.options.overwrite or there != paths:
                todo[file] = name
            images[name] = source
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
            with atomic_write(self.path(name, "probabilities")) as aside:
                np.save(aside, np.concatenate(probabilities, axis=1))
        pictures = {}
        if "mask" in self.kinds:
            pictures["mask"] = mask_image(index, self.labels, self.options.format)
        if "overlay" in self.kinds:
            step = -(-max(index.shape) // OVERLAY_SIDE)
            overlay = mask_overlay(
                image[:, ::step, ::step],
                index[::step, ::step],
                self.labels,
            )
            pictures["overlay"] = Image.fromarray(overlay)
        if "instances" in self.kinds:
            ids = separate(index, self.labels)
            if ids.max() > 65535:
                raise InputError(f"{name}: {ids.max()} instances are more than 16 bits can number")
            pictures["instances"] = Image.fromarray(ids.astype(np.uint16))
        if name in self.geotiffs and "mask" in pictures:
            save_geotiff(
                pictures.pop("mask"),
                self.path(name, "mask"),
                source=self.geotiffs[name],
                image=image,
                labels=self.labels,
            )
        for kind, picture in pictures.items():
            save_png(picture, self.path(name, kind))

    def end(self, bad: list[str]) -> None:
        """Write the list of images that were left out; none of an earlier run stays."""
        self.unreadable.unlink(missing_ok=True)
        if bad:
            write_text(self.unreadable, "\n".join([*bad, ""]))

    def _read_record(self) -> dict:
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

    def _made_by(self) -> dict:
        files = [weights_of(path) for path in (self.options.checkpoint, *self.options.ensemble)]
        shared = [file.with_name(SHARED[1]) for file in files if file.name == SHARED[0]]  # has the threshold, say
        digests = []
        for file in files + shared:
            with file.open("rb") as opened:
                digests.append(hashlib.file_digest(opened, "sha256").hexdigest())
        return {
            "checkpoint": " ".join(digests),
            "--format": self.options.format,
            "--tta": self.options.tta,
            "--tile": self.options.tile,
            "classes": describe_classes(self.labels),
        }


def describe_classes(labels: Labels) -> list[dict]:
    """Name, mask value and colour of each class, in the order of their indices."""
    classes = zip(labels.names, labels.values, labels.colors, strict=True)
    return [{"name": name, "value": values[0], "color": color} for name, values, color in classes]


def mask_image(index: np.ndarray, labels: Labels, form: str) -> Image.Image:
    """A mask for saving, of class indices (H, W). `index`: the data set's own values, 8 or 16 bits, or its colours.
    `palette`: class indices, shown in the classes' colours.

    Raises:
        InputError: a PNG cannot hold the classes.
    """
    if form == "index":
        values = labels.decode(index)
        if values.dtype not in (np.uint8, np.uint16):
            raise InputError(f"--format index: a PNG holds 0 to 65535, not {labels.values}: take --format palette")
        return Image.fromarray(values)
    if labels.num_classes > 256:
        raise InputError(f"--format palette holds 256 colours, for {labels.num_classes} classes: take index")
    image = Image.fromarray(index)  # gray, until it has a palette
    image.putpalette(labels.palette.tobytes())
    return image
