"""What predict.py writes: masks, overlays, instances; each whole or not at all, while the next image is predicted."""

import hashlib
import json
import os
from argparse import Namespace
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from segmentation.data.files import LARGE
from segmentation.data.labels import Labels
from segmentation.errors import InputError
from segmentation.inference.instances import separate
from segmentation.job import check_folder
from segmentation.losses.overlap import probabilities
from segmentation.module import SegmentationModule
from segmentation.pictures import overlay, save_png
from segmentation.writing import write_json, write_text, written_whole

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
        made_by, known = self._made_by(), {}
        if self.record.is_file():
            known = json.loads(self.record.read_text(encoding="utf-8"))
        before = known.get("images", {})
        self._check_makers(known, made_by, before)
        sources = {name: _source(file) for name, file in self.images.items()}
        todo = {}
        for name, file in self.images.items():
            done = before.get(name) == sources[name] and all(path.exists() for path in self.paths(name).values())
            if done and not self.options.overwrite:
                continue
            todo[name] = file
            # Away with what is to be replaced, of every kind: a half-done second run must not pass for a whole one, nor
            # an overlay of another checkpoint for one of this.
            for path in (self.every(name) if name in before else self.paths(name)).values():
                path.unlink(missing_ok=True)
        self.output.mkdir(parents=True, exist_ok=True)
        write_json(self.record, {**made_by, "images": before | sources})
        return todo

    def end(self, bad: list[str]) -> None:
        """Keep the list of images that could not be read; none of an earlier try stays."""
        self.unreadable.unlink(missing_ok=True)
        if bad:
            write_text(self.unreadable, "".join(f"{message}\n" for message in bad))

    def _check_places(self) -> None:
        """Refuse results that would lie among the images (a second run would take them for images) or in one place."""
        if self.options.format == "palette" and self.labels.num_classes > 256:
            raise InputError(f"--format palette holds 256 colours, for {self.labels.num_classes} classes: take index")
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
            "checkpoint": str(self.options.checkpoint),
            "sha256": digest,
            **{key: getattr(self.options, key) for key in ("format", "tta", "tile")},
            "classes": {name: {"value": values[0], "color": color} for name, values, color in classes},
        }

    def _check_makers(self, known: dict[str, Any], made_by: dict[str, Any], before: dict[str, Any]) -> None:
        """Refuse to mix results of another checkpoint or option with those of this run, and to replace, unless told to,
        those of another image of the same name or of unknown make."""
        differ = [key for key in ("sha256", "format", "tta", "tile") if known and known.get(key) != made_by[key]]
        what = "another checkpoint" if "sha256" in differ else " and ".join(f"another --{key}" for key in differ)
        if self.options.overwrite:
            others = sorted(before.keys() - self.images.keys())
            if differ and others:
                raise InputError(
                    f"{self.output} holds masks of {what} for {len(others)} images that are not among these "
                    f"({', '.join(others[:3])}): choose another OUTPUT, or predict all of them"
                )
            return
        if differ:
            raise InputError(f"{self.output} holds masks of {what}: choose another OUTPUT, or add --overwrite")
        for name, file in self.images.items():
            there = next((path for path in self.paths(name).values() if path.exists()), None)
            whose = before[name]["file"] if name in before else None
            if there and whose != os.path.realpath(file):
                what = f"is that of {whose}" if whose else "exists"
                raise InputError(f"{there} {what}: choose another OUTPUT, or add --overwrite")


def _source(file: Path) -> dict[str, Any]:
    """What tells whether a mask is that of a file: an image that has changed since is predicted again."""
    found = file.stat() if file.exists() else None  # a link to nowhere; reading it says so
    state = {"bytes": found.st_size, "modified_ns": found.st_mtime_ns} if found else {}
    return {"file": os.path.realpath(file), **state}


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
        before this returns. Raises InputError if it is too large for instances, which need all of it in memory."""
        height, width = image.shape[-2:]
        paths, large = self.results.paths(name), height * width > LARGE
        if "instances" in paths and large:
            raise InputError(f"{self.results.images[name]}: is too large to tell individuals apart. Cut it into pieces")
        index = np.empty((height, width), np.uint8 if self.labels.num_classes < 256 else np.uint16)
        shape = self.labels.num_outputs, height, width
        with _table(paths["probabilities"], shape) if "probabilities" in paths else nullcontext() as write_strip:
            for top, logits in strips:
                index[top : top + logits.shape[1]] = self.module.classify(logits).cpu().numpy()
                if write_strip:
                    write_strip(top, probabilities(logits).half().cpu().numpy())
        self.pending.append(self.pool.submit(self._save, paths, image, index))
        while len(self.pending) > (0 if large else 4):
            self.pending.popleft().result()

    def _save(self, paths: dict[str, Path], image: np.ndarray, index: np.ndarray) -> None:
        """Write an image's files; the mask last, as it is what says that an image is done."""
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


@contextmanager
def _table(path: Path, shape: tuple[int, int, int]) -> Iterator[Callable[[int, np.ndarray], None]]:
    """What writes a `.npy` file of float16 (K, H, W), by the first row of a strip and the strip (K, h, W). Not by
    numpy's memory map, for which a full disk would be a signal."""
    with written_whole(path) as aside, aside.open("wb") as file:
        np.lib.format.write_array_header_1_0(file, {"descr": "<f2", "fortran_order": False, "shape": shape})
        begin = file.tell()

        def write_strip(top: int, strip: np.ndarray) -> None:
            for k, band in enumerate(strip):
                file.seek(begin + 2 * (k * shape[1] + top) * shape[2])
                file.write(np.ascontiguousarray(band, "<f2").data)

        yield write_strip


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
