"""predict.py: masks of images, whatever their number and size."""

import glob
import os
from argparse import Namespace
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext, suppress
from functools import partial
from itertools import product
from pathlib import Path
from threading import Lock

import numpy as np
from PIL import Image
from rich.progress import Progress

from segmentation.data.io import IMAGE_SUFFIXES, LARGE, check_file
from segmentation.data.layout import walk
from segmentation.errors import InputError, plural
from segmentation.inference.predictor import Predictor, add_options
from segmentation.inference.results import Results
from segmentation.nets.base import probabilities
from segmentation.training.entry import JobParser, start_job

#: What follows the image's name and _ in the name of its mask.
MASK_ENDINGS = ("mask", "masks", "label", "labels", "gt", "seg")

#: Bytes of a file that counts as large where Pillow cannot read its header.
LARGE_FILE = 16 * 2**20


def predict(args: list[str] | None = None) -> int:
    """Write a mask for each image, under the image's name and at its size; return the number of images predicted now.

    Raises:
        InputError: nothing to predict; results of another checkpoint are in the way; or, when all others are done,
            some images could not be read.
    """
    start_job()
    options = parse(args)
    output = Path(options.output)
    images = find_images(options.input, output)
    predictor = Predictor(
        [options.checkpoint, *options.ensemble],
        options.accelerator,
        tile=options.tile,
        tta=options.tta,
        from_disk=options.from_disk,
    )
    results = Results(images, options, predictor.labels)
    todo = results.begin()
    bar = Progress(transient=True)
    advance = partial(bar.advance, bar.add_task("predict", total=len(todo)))
    net = Lock()  # images are read and written by other threads while the net predicts one
    large = Lock()  # of large images, memory holds one

    def predict_one(file: Path) -> str:
        """Read, predict and write an image; return what is wrong with it."""
        try:
            with large if is_large(file) else nullcontext():
                image = predictor.read(file)
                height, width = image.shape[-2:]
                if height * width > LARGE and {"instances", "probabilities"} & set(results.kinds):
                    raise InputError(f"{file}: is too large for --instances and for probabilities. Cut it into pieces")
                with net:
                    mask, chances = predict_strips(predictor, image, "probabilities" in results.kinds, advance)
                results.save(todo[file], image, mask, chances)
        except InputError as error:
            return str(error)
        return ""

    pool = ThreadPoolExecutor(4)
    try:
        with bar:
            bad = [error for error in pool.map(predict_one, todo) if error]
    finally:
        pool.shutdown(cancel_futures=True)
    done = len(todo) - len(bad)
    print(f"predicted  {done:,} of {plural(len(todo), 'image')} to {output}, on {predictor.device}")
    if len(images) > len(todo):
        count = plural(len(images) - len(todo), "image")
        print(f"left out   {count} with a mask already; --overwrite predicts them again")
    results.end(bad)
    if bad:
        raise InputError(
            f"{bad[0]} ({len(bad)} of {plural(len(images), 'image')} left out, listed in {results.unreadable})"
        )
    return done


def predict_strips(
    predictor: Predictor,
    image: np.ndarray,
    with_probabilities: bool,
    advance: Callable[[float], None],
) -> tuple[np.ndarray, list[np.ndarray]]:
    """Predict an image strip by strip, as a large one may take minutes.

    Args:
        predictor: the net.
        image: (C, H, W).
        with_probabilities: whether they are wanted.
        advance: called after each strip with its share of the image.

    Returns:
        class indices (H, W), and the probabilities of each strip, float16, if they are wanted.
    """
    masks = []
    chances = []
    for logits in predictor.strips(image):
        mask = predictor.module.classify(logits).cpu().numpy()
        masks.append(mask.astype(np.uint8 if predictor.labels.num_classes <= 256 else np.uint16))
        if with_probabilities:
            calibrated = predictor.module.calibrated(logits)
            chances.append(probabilities(calibrated).half().cpu().numpy())
        advance(logits.shape[1] / image.shape[1])
    return np.concatenate(masks), chances


def is_large(file: Path) -> bool:
    """Whether an image may take gigabytes: by its header, as a small file may hold any number of equal pixels."""
    check_file(file)
    pixels = 0
    with suppress(Exception), Image.open(file) as image:  # reading it says what is wrong
        pixels = image.width * image.height
    return pixels > LARGE or file.stat().st_size > LARGE_FILE


def parse(args: list[str] | None) -> Namespace:
    parser = JobParser("predict")
    parser.add_argument(
        "checkpoint", metavar="CHECKPOINT", help="a .ckpt file, a folder of share.py, or hf://user/name"
    )
    parser.add_argument(
        "input",
        metavar="INPUT",
        nargs="+",
        help="images, folders (with all below), or quoted globs",
    )
    parser.add_argument("output", metavar="OUTPUT", help="folder for the masks, in the sub-folders of their images")
    parser.add_argument(
        "--format",
        choices=("index", "palette", "probabilities"),
        default="index",
        help="index: PNG (of a GeoTIFF: GeoTIFF) of the data set's own mask values (default); palette: of class "
        "indices, shown in the classes' colours; probabilities: .npy, float16 (K, H, W), of one channel for two "
        "classes",
    )
    parser.add_argument("--overlay", action="store_true", help="also OUTPUT/overlays: the mask laid over the image")
    parser.add_argument(
        "--instances",
        action="store_true",
        help="also OUTPUT/instances: 16-bit PNG, 0 for none and one id per instance",
    )
    add_options(parser)
    parser.add_argument(
        "--accelerator",
        metavar="NAME",
        default="auto",
        help="auto (default), cpu, gpu, mps",
    )
    parser.add_argument(
        "--overwrite",
        action="store_true",
        help="predict again; results of every kind of these images go",
    )
    return parser.parse_args(args)


def without_masks(files: list[Path]) -> list[Path]:
    """Of the files of a folder those that are no masks by their names: x_mask.png beside x.png."""
    stems = {file.with_suffix("") for file in files}
    masks = {f"{stem}_{end}" for stem, end in product(stems, MASK_ENDINGS)}
    images = [file for file in files if str(file.with_suffix("")) not in masks]
    if len(images) < len(files):
        count = plural(len(files) - len(images), "mask")
        print(f"left out   {count} by name, beside images. To predict such files, name them")
    return images


def find_images(inputs: list[str], output: Path) -> dict[Path, str]:
    """The images of the command line and their names: the path below the folder given, without the ending.

    Raises:
        InputError: there is none (an image in OUTPUT is none: it may be an earlier run's mask), or OUTPUT is a file.
    """
    if output.suffix.lower() in IMAGE_SUFFIXES and not output.is_dir():
        raise InputError(f"OUTPUT, {output}, is a folder for the masks, not a file. Fix: {output.parent / output.stem}")
    found = {}  # file -> its path below what was given
    for text in inputs:
        folder = Path(text)
        if folder.is_dir():
            files = without_masks(list(walk(folder)))
        elif os.path.lexists(folder):
            files = [folder]
            folder = folder.parent
        elif glob.has_magic(text):
            matches = map(Path, sorted(glob.glob(text, recursive=True)))
            files = [file for file in matches if file.suffix.lower() in IMAGE_SUFFIXES and not file.is_dir()]
            while glob.has_magic(str(folder)):
                folder = folder.parent
        else:
            raise InputError(f"{text}: no such file or folder")
        for file in files:
            if not file.parent.resolve().is_relative_to(output.resolve()):
                found[file] = file.relative_to(folder)
    if not found:
        suffixes = ", ".join(sorted(IMAGE_SUFFIXES))
        raise InputError(f"{' '.join(inputs)}: no image here ({suffixes}) outside of OUTPUT, {output}")
    stems = Counter(path.with_suffix("") for path in found.values())
    images = {}
    for file, path in found.items():
        stem = path.with_suffix("")
        images[file] = str(path if stems[stem] > 1 else stem)  # a.jpg and a.png: the ending tells them apart
    return images
