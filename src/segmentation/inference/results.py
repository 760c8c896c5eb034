"""What predict.py writes: masks, overlays, instances; each whole or not at all, while the next image is predicted."""

import hashlib
import json
import os
from argparse import Namespace
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from segmentation.data.io import LARGE
from segmentation.data.labels import Labels
from segmentation.data.writing import atomic_write, remove_stale, write_json, write_text
from segmentation.errors import InputError
from segmentation.inference.instances import separate
from segmentation.losses.region import probabilities
from segmentation.module import SegmentationModule
from segmentation.training.entry import check_folder
from segmentation.visualize import overlay, save_png

RECORD = "predict.json"  # in an output folder: what made the masks in it, and of which images
SHOWN = 2048  # pixels of an overlay's longest side at most


class Results:
    """The output folder: where each image's results go, which of them are there, and what made them. `images` are the
    files by name, `options` those of the command line."""

    def __init__(self, output: Path, images: dict[str, Path], options: Namespace, labels: Labels) -> None:
        self.output, self.images, self.options, self.labels = output, images, options, labels
        self.unreadable, self.record = output / "unreadable.txt", output / RECORD
        asked = {kind for kind in ("overlay", "instances") if vars(options)[kind]}
        self.kinds = asked | {"probabilities" if options.format == "probabilities" else "mask"}

    def paths(self, name: str) -> dict[str, Path]:
        """Kind of result -> its file, of the kinds that the options ask for."""
        return {kind: path for kind, path in self.every(name).items() if kind in self.kinds}

    def every(self, name: str) -> dict[str, Path]:
        """Kind of result -> its file, of all kinds: what an earlier run may have made of an image."""
        return {
            "mask": self.output / f"{name}.png",
            "probabilities": self.output / f"{name}.npy",
            "overlay": self.output / "overlays" / f"{name}.png",
            "instances": self.output / "instances" / f"{name}.png",
        }

    def begin(self) -> dict[str, Path]:
        """Images still to be predicted; the record of them is written, what they replace is removed. Raises InputError
        if results would lie among the images or on one another, or others are there already."""
        self._check_places()
        made_by, known = self._made_by(), self._known()
        before, files = known.get("images", {}), {name: os.path.realpath(file) for name, file in self.images.items()}
        differ = [
            key for key in ("checkpoint", "--format", "--tta", "--tile") if known and known.get(key) != made_by[key]
        ]
        todo = self.images
        if not self.options.overwrite:
            there = {name: [path for path in self.paths(name).values() if path.exists()] for name in self.images}
            others = [str(paths[0]) for name, paths in there.items() if paths and before.get(name) != files[name]]
            if differ or others:
                what = (
                    f"holds masks of another {' and '.join(differ)}" if differ else f"has {others[0]} of another image"
                )
                raise InputError(f"{self.output} {what}: choose another OUTPUT, or add --overwrite")
            todo = {name: file for name, file in self.images.items() if len(there[name]) < len(self.kinds)}
        # Away with what is to be replaced, of every kind: a half-done second run must not pass for a whole one, nor an
        # overlay of another checkpoint for one of this.
        for path in (path for name in todo if name in before for path in self.every(name).values()):
            path.unlink(missing_ok=True)
        self.output.mkdir(parents=True, exist_ok=True)
        remove_stale(self.output, idle=600)
        write_json(self.record, {**made_by, "images": ({} if differ else before) | files})
        return todo

    def _known(self) -> dict[str, Any]:
        """What is recorded of the results that are there; nothing where there are none."""
        if not self.record.is_file():
            return {}
        try:
            known = json.loads(self.record.read_text(encoding="utf-8"))
            if not isinstance(known["images"], dict):
                raise TypeError("images is no table")
        except (ValueError, TypeError, KeyError) as error:
            raise InputError(
                f"{self.record}: is damaged ({error}), and nothing else says what made the masks beside it. Choose "
                f"another OUTPUT, or remove {self.output}"
            ) from error
        return known

    def end(self, bad: list[str]) -> None:
        """Keep the list of images that could not be read; none of an earlier try stays."""
        self.unreadable.unlink(missing_ok=True)
        if bad:
            write_text(self.unreadable, "".join(f"{message}\n" for message in bad))

    def _check_places(self) -> None:
        """Refuse results that would lie among the images (a second run would take them for images) or in one place."""
        if self.options.format == "palette" and self.labels.num_classes > 256:
            raise InputError(f"--format palette holds 256 colours, for {self.labels.num_classes} classes: take index")
        if self.options.format == "index" and not self.labels.by_color:
            for name, values in zip(self.labels.names, self.labels.values, strict=True):
                if not 0 <= int(values[0]) <= 65535:
                    raise InputError(
                        f"--format index: class {name!r} has the mask value {values[0]}, but a PNG holds 0 to 65535: "
                        "take --format palette, which writes class indices"
                    )
        check_folder(self.output)
        made: dict[Path, str] = {}
        inputs = set(map(os.path.realpath, self.images.values()))
        for name, file in self.images.items():
            for path in self.paths(name).values():
                among = os.path.realpath(path.parent) == os.path.realpath(file.parent)
                if among or os.path.realpath(path) in inputs:
                    raise InputError(f"{path} would lie among the images: choose another OUTPUT")
                if path in made:
                    raise InputError(f"{made[path]} and {name} would both be written to {path}: predict one elsewhere")
                made[path] = name

    def _made_by(self) -> dict[str, Any]:
        with Path(self.options.checkpoint).open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        classes = zip(self.labels.names, self.labels.values, self.labels.colors, strict=True)
        return {
            "checkpoint": digest,
            **{f"--{key}": getattr(self.options, key) for key in ("format", "tta", "tile")},
            "classes": {name: {"value": values[0], "color": color} for name, values, color in classes},
        }


class Writer:
    """Turns logits into files in threads of its own, a few images behind the network."""

    def __init__(self, results: Results, module: SegmentationModule) -> None:
        self.results, self.labels, self.module = results, results.labels, module
        self.pool, self.pending = ThreadPoolExecutor(2), deque[Future]()

    def __enter__(self) -> "Writer":
        return self

    def __exit__(self, kind: type | None, *error: object) -> None:
        self.pool.shutdown(cancel_futures=kind is not None)
        while self.pending and kind is None:
            self.pending.popleft().result()

    def write(self, name: str, image: np.ndarray, strips: Iterator[tuple[int, Tensor]]) -> None:
        """Take the logits of an image (C, H, W) by strips: first row, and (K, h, W). Write its results, of a large one
        before this returns. Raises InputError if it is too large for results that need all of it in memory."""
        height, width = image.shape[-2:]
        paths, large = self.results.paths(name), height * width > LARGE
        if large and {"instances", "probabilities"} & paths.keys():
            raise InputError(
                f"{self.results.images[name]}: is too large for --instances and for probabilities. Cut it into pieces"
            )
        index = np.empty((height, width), np.uint8 if self.labels.num_classes <= 256 else np.uint16)
        chances = np.empty((self.labels.num_outputs, height, width) if "probabilities" in paths else 0, np.float16)
        for top, logits in strips:
            rows = slice(top, top + logits.shape[1])
            index[rows] = self.module.classify(logits).cpu().numpy()
            if chances.size:
                chances[:, rows] = probabilities(logits).cpu().numpy()
        self.pending.append(self.pool.submit(self._save, paths, image, index, chances))
        while len(self.pending) > (0 if large else 4):
            self.pending.popleft().result()

    def _save(self, paths: dict[str, Path], image: np.ndarray, index: np.ndarray, chances: np.ndarray) -> None:
        """Write an image's files."""
        if "probabilities" in paths:
            with atomic_write(paths["probabilities"]) as aside:
                np.save(aside, chances)
        if "overlay" in paths:
            step = -(-max(index.shape) // SHOWN)
            shown = torch.from_numpy(image[:, ::step, ::step].copy())
            save_png(Image.fromarray(overlay(shown, index[::step, ::step], self.labels)), paths["overlay"])
        if "instances" in paths:
            ids = separate(index, self.labels)
            if ids.max(initial=0) > 65535:
                raise InputError(f"{paths['instances']}: {ids.max()} individuals are more than 16 bits can number")
            save_png(Image.fromarray(ids.astype(np.uint16)), paths["instances"])
        if "mask" in paths:
            picture = mask_picture(index, self.labels, self.results.options.format)
            save_png(picture, paths["mask"], compress_level=1 if index.size > LARGE else 6)


def mask_picture(index: np.ndarray, labels: Labels, form: str) -> Image.Image:
    """A mask for saving, of class indices (H, W). `index`: the data set's own values, 8 or 16 bits, or its colours.
    `palette`: the same values (class indices, where those are colours or of 16 bits), shown in the classes' colours."""
    values = labels.decode(index)
    if form == "index":
        return Image.fromarray(values)
    own = values.ndim == 2 and values.dtype == np.uint8
    picture = Image.fromarray(values if own else index)  # gray, until it has a palette
    palette = np.zeros((256, 3), np.uint8)
    palette[[int(v[0]) for v in labels.values] if own else range(labels.num_classes)] = labels.palette
    picture.putpalette(palette.tobytes())
    return picture
