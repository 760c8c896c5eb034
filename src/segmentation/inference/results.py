"""The output folder of predict.py: which results are there, and what made them; each is written whole or not at all."""

import hashlib
import json
import os
from argparse import Namespace
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from segmentation.data.labels import Labels
from segmentation.data.writing import atomic_write, remove_stale, write_json, write_text
from segmentation.errors import InputError
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


@dataclass
class Results:
    """The results of some images in an output folder.

    Args:
        output: the folder.
        images: the files by name.
        options: those of the command line.
        labels: the classes.

    Raises:
        InputError: a PNG cannot hold the classes, or results would lie among the images or on one another.
    """

    output: Path
    images: dict[str, Path]
    options: Namespace
    labels: Labels

    def __post_init__(self) -> None:
        self.record = self.output / "predict.json"  # what made the masks, and of which images
        self.unreadable = self.output / "unreadable.txt"
        self.kinds = [kind for kind in ("overlay", "instances") if getattr(self.options, kind)]
        if self.options.format == "probabilities":
            self.kinds.append("probabilities")
        else:
            self.kinds.append("mask")
            one_pixel = np.zeros((1, 1), np.uint8)
            mask_image(one_pixel, self.labels, self.options.format)
        check_folder(self.output)
        owners: dict[Path, str] = {}
        for name, file in self.images.items():
            for kind in self.kinds:
                path = self.path(name, kind)
                if path.parent.resolve() == file.parent.resolve():  # a second run would take it for an image
                    raise InputError(f"{path} would lie among the images: choose another OUTPUT")
                owner = owners.setdefault(path, name)
                if owner != name:
                    raise InputError(f"{owner} and {name} would both be written to {path}: predict one elsewhere")

    def path(self, name: str, kind: str) -> Path:
        """The file of a result of an image."""
        folder, suffix = PLACES[kind]
        return self.output / folder / f"{name}{suffix}"

    def begin(self) -> dict[str, Path]:
        """Write the record, remove what is to be replaced, and return the images that are still to be predicted.

        Raises:
            InputError: results of another checkpoint, of other options or of other images are there.
        """
        made_by = self._made_by()
        known = self._read_record()
        before = known.get("images", {})
        files = {}
        for name, file in self.images.items():
            files[name] = os.path.realpath(file)
        differ = []
        if known:
            differ = [key for key in COMPARED if known.get(key) != made_by[key]]
        todo = self.images
        if not self.options.overwrite:
            todo = {}
            fix = "choose another OUTPUT, or add --overwrite"
            if differ:
                raise InputError(f"{self.output} holds masks of another {' and '.join(differ)}: {fix}")
            for name, file in self.images.items():
                paths = [self.path(name, kind) for kind in self.kinds]
                there = [path for path in paths if path.exists()]
                if there and before.get(name) != files[name]:
                    raise InputError(f"{self.output} has {there[0]} of another image: {fix}")
                if there != paths:
                    todo[name] = file
        # Of every kind: a mask overlay of another checkpoint is none of this one's.
        for name in todo.keys() & before.keys():
            for kind in PLACES:
                self.path(name, kind).unlink(missing_ok=True)
        self.output.mkdir(parents=True, exist_ok=True)
        remove_stale(self.output, idle=600)
        made_by["images"] = files if differ else before | files
        write_json(self.record, made_by)
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
        if "overlay" in self.kinds:
            step = -(-max(index.shape) // OVERLAY_SIDE)
            shown = torch.from_numpy(image[:, ::step, ::step].copy())
            mask = index[::step, ::step]
            picture = Image.fromarray(mask_overlay(shown, mask, self.labels))
            save_png(picture, self.path(name, "overlay"))
        if "instances" in self.kinds:
            ids = separate(index, self.labels)
            path = self.path(name, "instances")
            if ids.max() > 65535:
                raise InputError(f"{path}: {ids.max()} instances are more than 16 bits can number")
            save_png(Image.fromarray(ids.astype(np.uint16)), path)
        if "mask" in self.kinds:
            picture = mask_image(index, self.labels, self.options.format)
            save_png(picture, self.path(name, "mask"))

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
        labels = self.labels
        with open(self.options.checkpoint, "rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        classes = zip(
            labels.names,
            labels.values,
            labels.colors,
            strict=True,
        )
        return {
            "checkpoint": digest,
            "--format": self.options.format,
            "--tta": self.options.tta,
            "--tile": self.options.tile,
            "classes": {
                name: {
                    "value": values[0],
                    "color": color,
                }
                for name, values, color in classes
            },
        }


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
