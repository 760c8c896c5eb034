"""predict.py: masks of images, whatever their number and size."""

import functools
import glob
import itertools
import os
import re
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import numpy as np
from PIL import Image
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor

from segmentation.data.files import IMAGE_SUFFIXES, LARGE
from segmentation.data.layout import walk
from segmentation.errors import InputError
from segmentation.inference.predictor import Predictor, add_options
from segmentation.inference.results import RECORD, Results, Writer
from segmentation.job import JobParser, number, start_job

EXAMPLES = """examples:
  python src/predict.py runs/camvid/checkpoints/best.ckpt photos/ predicted/
  python src/predict.py best.ckpt "scans/**/*.tif" predicted/ --format palette --overlay --tta
  python src/predict.py best.ckpt slide.tif predicted/ --tile 1024

The same command goes on where it was stopped: images that have their mask are left out."""


def predict(args: list[str] | None = None) -> int:
    """predict.py: a mask for each image, under the image's name and at its size.

    Args:
        args: the command line, by default the process's own.

    Returns:
        The number of images predicted now.

    Raises:
        InputError: nothing to predict; results of another checkpoint are in the way; or, when all others are done,
            some images could not be read.
    """
    start_job()
    options = _parser().parse_args(args)
    output = Path(options.output)
    images = find_images(options.input, output)
    predictor = Predictor(
        options.checkpoint, options.accelerator, options.precision, options.tile, options.tta, options.batch_size
    )
    results = Results(output, images, options, predictor.labels)
    todo = results.begin()
    bad: list[str] = []
    started, pixels, done = time.perf_counter(), 0, 0
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, TextColumn("{task.fields[name]}"), transient=True) as bar:
        task = bar.add_task("predict", total=len(todo), name="")
        say = lambda text: bar.update(task, name=text)  # noqa: E731
        with Writer(results, predictor.module) as writer:
            for name, image in _read_ahead(predictor, todo, bad):
                try:
                    writer.write(name, image, _announced(predictor.strips(image), name, image.shape[1], say))
                    done, pixels = done + 1, pixels + image.shape[-2] * image.shape[-1]
                except InputError as error:
                    bad.append(str(error))
                bar.advance(task)
                del image  # before the next one is taken: a large one counts
    seconds = time.perf_counter() - started
    rate = f"{done / seconds:.3g} images/s, {pixels / seconds / 1e6:.3g} megapixels/s on {predictor.device}"
    print(f"predicted  {done:,} of {len(todo):,} images to {output}" + (f" ({rate})" if done else ""))
    if len(images) > len(todo):
        print(f"left out   {len(images) - len(todo):,} images that have their mask already")
    results.end(bad)
    if bad:
        raise InputError(f"{bad[0]} ({len(bad)} of {len(images)} images were left out, listed in {results.unreadable})")
    return done


def _parser() -> JobParser:
    parser = JobParser("predict", "Predict the masks of images from a checkpoint alone.", EXAMPLES)
    parser.add_argument("checkpoint", metavar="CHECKPOINT", help="a .ckpt file of train.py")
    parser.add_argument("input", metavar="INPUT", nargs="+", help="images, folders (with all below), or quoted globs")
    parser.add_argument("output", metavar="OUTPUT", help="folder for the masks, in the sub-folders of their images")
    parser.add_argument(
        "--format",
        choices=("index", "palette", "probabilities"),
        default="index",
        help="index: PNG of the data set's own mask values (default); palette: the same, shown in the classes' "
        "colours; probabilities: .npy, float16 (K, H, W), of one band for two classes",
    )
    parser.add_argument("--overlay", action="store_true", help="also OUTPUT/overlays: the mask laid over the image")
    parser.add_argument(
        "--instances",
        action="store_true",
        help="also OUTPUT/instances: 16-bit PNG, 0 for none and one id an individual",
    )
    add_options(parser)
    parser.add_argument(
        "--batch-size", metavar="N", type=number(int, 1), default=1, help="tiles of one forward pass (default: 1)"
    )
    parser.add_argument("--accelerator", metavar="NAME", default="auto", help="auto (default), cpu, gpu, mps")
    parser.add_argument(
        "--precision", metavar="NAME", help="default: that of training, e.g. bf16-mixed; else 32-true, 16-mixed"
    )
    parser.add_argument(
        "--overwrite", action="store_true", help="predict again; results of every kind of these images go"
    )
    return parser


def find_images(inputs: Iterable[str], output: Path) -> dict[str, Path]:
    """The images of the command line by name: the path below the folder given, without the ending.

    Raises:
        InputError: there is none.
    """
    found: list[tuple[Path, Path]] = []
    # What this run or an earlier one has put below a folder of images is none of them.
    written = os.path.realpath(output)
    has_record = functools.cache(lambda folder: (folder / RECORD).is_file())
    for text in inputs:
        path = Path(text)
        if path.is_dir():
            if has_record(path):
                raise InputError(f"{path}: holds masks that predict.py wrote ({RECORD}): give the folder of the images")
            below = [(file, file.relative_to(path)) for file in walk(path)]
        elif path.is_file():
            found.append((path, Path(path.name)))
            continue
        elif glob.has_magic(text):
            path = Path(re.split(r"[*?\[]", text)[0] + "x").parent
            files = map(Path, sorted(glob.glob(text, recursive=True)))
            below = [(f, f.relative_to(path)) for f in files if f.is_file() and f.suffix.lower() in IMAGE_SUFFIXES]
        else:
            raise InputError(f"{text}: no such file or folder")
        apart = written == os.path.realpath(path)
        for file, name in below:
            made = any(map(has_record, itertools.islice(file.parents, len(name.parents) - 1)))
            if not made and (apart or not os.path.realpath(file).startswith(written + os.sep)):
                found.append((file, name))
    if not found:
        raise InputError(f"{' '.join(inputs)}: no image here ({', '.join(sorted(IMAGE_SUFFIXES))})")
    stems = [str(name.with_suffix("")) for _, name in found]
    twice = {stem for stem in stems if stems.count(stem) > 1} if len(set(stems)) < len(stems) else set()
    images: dict[str, Path] = {}
    for (file, name), stem in zip(found, stems, strict=True):
        own = str(name) if stem in twice else stem  # a.jpg and a.png: the ending tells them apart
        if own in images and images[own] != file:
            raise InputError(f"{file} and {images[own]} would get one name, {own}: predict them into two folders")
        images[own] = file
    return images


def _read_ahead(predictor: Predictor, todo: dict[str, Path], bad: list[str]) -> Iterator[tuple[str, np.ndarray]]:
    """Images that can be read, each with its name; the next ones are being read meanwhile, large ones one at a time."""
    waiting: deque[tuple[str, Future]] = deque()
    rest, large = iter(todo.items()), False
    with ThreadPoolExecutor(2) as pool:
        try:
            while True:
                while len(waiting) < 4 and not large and (item := next(rest, None)) is not None:
                    waiting.append((item[0], pool.submit(predictor.read, item[1])))
                    large = _is_large(item[1])
                if not waiting:
                    return
                name, image = waiting.popleft()
                large = large and bool(waiting)
                try:
                    yield name, image.result()
                except InputError as error:
                    bad.append(str(error))
                del image
        finally:
            pool.shutdown(cancel_futures=True)


def _announced(
    strips: Iterator[tuple[int, Tensor]], name: str, height: int, say: Callable[[str], None]
) -> Iterator[tuple[int, Tensor]]:
    """The strips; how far they are is said, as one image may take minutes."""
    for top, logits in strips:
        yield top, logits
        say(f"{name} {(top + logits.shape[1]) / height:.0%}")


def _is_large(path: Path) -> bool:
    try:
        with Image.open(path) as image:
            return image.width * image.height > LARGE
    except (OSError, ValueError, Image.DecompressionBombError):
        return path.is_file() and path.stat().st_size > LARGE
