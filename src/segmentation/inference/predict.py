"""predict.py: masks of images, whatever their number and size."""

import glob
import os
import re
import time
from collections import Counter, deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import numpy as np
from PIL import Image
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor

from segmentation.data.io import IMAGE_SUFFIXES, LARGE
from segmentation.data.layout import walk
from segmentation.errors import InputError
from segmentation.inference.predictor import Predictor, add_options
from segmentation.inference.results import Results, Writer
from segmentation.training.entry import JobParser, start_job


def predict(args: list[str] | None = None) -> int:
    """A mask for each image, under the image's name and at its size; the number of images predicted now.

    Raises:
        InputError: nothing to predict; results of another checkpoint are in the way; or, when all others are done,
            some images could not be read.
    """
    start_job()
    options = _parser().parse_args(args)
    output = Path(options.output)
    images = find_images(options.input, output)
    predictor = Predictor(options.checkpoint, options.accelerator, tile=options.tile, tta=options.tta)
    results = Results(output, images, options, predictor.labels)
    todo = results.begin()
    bad: list[str] = []
    started, pixels = time.perf_counter(), 0
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, TextColumn("{task.fields[at]}", markup=False), transient=True) as bar:
        task = bar.add_task("predict", total=len(todo), at="")

        def strips(name: str, image: np.ndarray) -> Iterator[tuple[int, Tensor]]:
            for top, logits in predictor.strips(image):
                yield top, logits
                bar.update(task, at=f"{name} {(top + logits.shape[1]) / image.shape[1]:.0%}")  # one may take minutes

        with Writer(results, predictor.module) as writer:
            for name, reading in _read_ahead(predictor, todo):
                try:
                    image = reading.result()
                    writer.write(name, image, strips(name, image))
                    pixels += image.shape[-2] * image.shape[-1]
                    del image, reading  # before the next one is taken: a large one counts
                except InputError as error:
                    bad.append(str(error))
                bar.advance(task)
    seconds, done = time.perf_counter() - started, len(todo) - len(bad)
    rate = f" ({done / seconds:.3g} images/s, {pixels / seconds / 1e6:.3g} megapixels/s on {predictor.device})"
    print(f"predicted  {done:,} of {len(todo):,} images to {output}{rate if done else ''}")
    if len(images) > len(todo):
        print(f"left out   {len(images) - len(todo):,} images that have their mask already")
    results.end(bad)
    if bad:
        raise InputError(f"{bad[0]} ({len(bad)} of {len(images)} images were left out, listed in {results.unreadable})")
    return done


def _parser() -> JobParser:
    parser = JobParser("predict")
    add = parser.add_argument
    add("checkpoint", metavar="CHECKPOINT", help="a .ckpt file of train.py")
    add("input", metavar="INPUT", nargs="+", help="images, folders (with all below), or quoted globs")
    add("output", metavar="OUTPUT", help="folder for the masks, in the sub-folders of their images")
    formats = (
        "index: PNG of the data set's own mask values (default); palette: the same, shown in the classes' colours; "
        "probabilities: .npy, float16 (K, H, W), of one band for two classes"
    )
    add("--format", choices=("index", "palette", "probabilities"), default="index", help=formats)
    add("--overlay", action="store_true", help="also OUTPUT/overlays: the mask laid over the image")
    ids = "also OUTPUT/instances: 16-bit PNG, 0 for none and one id an individual"
    add("--instances", action="store_true", help=ids)
    add_options(parser)
    add("--accelerator", metavar="NAME", default="auto", help="auto (default), cpu, gpu, mps")
    add("--overwrite", action="store_true", help="predict again; results of every kind of these images go")
    return parser


def find_images(inputs: Iterable[str], output: Path) -> dict[str, Path]:
    """The images of the command line by name: the path below the folder given, without the ending.

    Raises:
        InputError: there is none.
    """
    found: list[tuple[Path, Path]] = []  # file, and its path below what was given
    written = os.path.realpath(output)  # what an earlier run has put there is none of them
    for text in inputs:
        path = Path(text)
        if path.is_dir():
            files = walk(path)
        elif os.path.lexists(path):
            found.append((path, Path(path.name)))
            continue
        elif glob.has_magic(text):
            path = Path(re.split(r"[*?\[]", text)[0] + "x").parent
            matches = map(Path, sorted(glob.glob(text, recursive=True)))
            files = (file for file in matches if not file.is_dir() and file.suffix.lower() in IMAGE_SUFFIXES)
        else:
            raise InputError(f"{text}: no such file or folder")
        apart = written == os.path.realpath(path)  # refused, later
        for file in files:
            if apart or not os.path.realpath(file).startswith(written + os.sep):
                found.append((file, file.relative_to(path)))
    if not found:
        raise InputError(f"{' '.join(inputs)}: no image here ({', '.join(sorted(IMAGE_SUFFIXES))})")
    times = Counter(name.with_suffix("") for _, name in found)
    images: dict[str, Path] = {}
    for file, name in found:
        stem = name.with_suffix("")
        own = str(name if times[stem] > 1 else stem)  # a.jpg and a.png: the ending tells them apart
        if images.setdefault(own, file) != file:
            raise InputError(f"{file} and {images[own]} would get one name, {own}: predict them into two folders")
    return images


def _read_ahead(predictor: Predictor, todo: dict[str, Path]) -> Iterator[tuple[str, Future[np.ndarray]]]:
    """Images by name, in order; the next ones are being read meanwhile, but a large one is alone in memory."""
    waiting: deque[tuple[str, Future[np.ndarray]]] = deque()
    alone = False
    with ThreadPoolExecutor(2) as pool:
        for name, file in todo.items():
            before, alone = alone, _is_large(file)
            while len(waiting) > (0 if alone or before else 3):
                yield waiting.popleft()
            waiting.append((name, pool.submit(predictor.read, file)))
        while waiting:
            yield waiting.popleft()


def _is_large(path: Path) -> bool:
    if not path.is_file():
        return False
    try:
        with Image.open(path) as image:
            return image.width * image.height > LARGE
    except (OSError, ValueError, Image.DecompressionBombError):
        return path.stat().st_size > LARGE
