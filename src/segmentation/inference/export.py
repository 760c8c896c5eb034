"""export.py: a trained net as one file that predicts without this project, checked against the net on real images."""

import io
import json
import statistics
import time
import warnings
from argparse import Namespace
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from segmentation.checkpoint import results_of
from segmentation.data import SegmentationDataModule
from segmentation.data.writing import atomic_write
from segmentation.errors import InputError, plural
from segmentation.inference.results import describe_classes
from segmentation.inference.source import open_trained
from segmentation.metrics import confusion_counts, mean_iou
from segmentation.module import SegmentationModule
from segmentation.nets.base import probabilities
from segmentation.nets.tiles import TILE
from segmentation.training.entry import JobParser, file_name, refuse_existing, start_job
from segmentation.visualize import evenly

IMAGES = 8  # to check the file on

#: Largest difference of a probability, and smallest share of pixels of equal class, that a file is kept with.
TOLERANCES = {
    "float32": (1e-3, 0.9999),
    "fp16": (0.02, 0.998),
    "int8": (0.5, 0.98),
}
AXES = {0: "batch", 2: "height", 3: "width"}  # of any size
DYNAMIC = dict.fromkeys(AXES, torch.export.Dim.DYNAMIC)

Exported = Callable[[Tensor], Sequence[Tensor]]  # runs a written file


class Deployed(nn.Module):
    """What is exported: normalisation, padding, net, inference rule and threshold.

    Shape:
        (N, C, H, W) as files have it -> logits (N, K, H, W) float32, class indices (N, H, W) uint8 or int32
    """

    def __init__(self, module: SegmentationModule) -> None:
        super().__init__()
        self.module = module
        self.mask_type = torch.uint8 if module.labels.num_classes <= 256 else torch.int32

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor]:
        logits = self.module(image)
        return self.module.calibrated(logits), self.module.classify(logits).to(self.mask_type)


def export(args: list[str] | None = None) -> Path:
    """Write the file and check it. Raises InputError, and keeps no file, if it does not predict what the net does."""
    start_job()
    options, rest = parse(args)
    suffix, write = FORMATS[options.format]
    path = options.output or results_of(options.checkpoint).with_suffix(suffix)
    refuse_existing([path], options.overwrite)

    warnings.filterwarnings(
        "ignore",
        category=UserWarning,
        module=r"torch\.onnx|torch\.export",
    )
    module, data, *_ = open_trained("export", options, rest)
    if options.quantize == "int8" and not data.dataset.names("train"):
        raise InputError("--quantize int8 needs training images: give a data set that has some, by --data OVERLAY")
    if options.levels:
        module.net.prune(1)  # refuses a net without levels
    module.channels_last = False
    model = Deployed(module.requires_grad_(False)).eval()
    image = data.dataset.load(data.test_split, 0)["image"]
    # Two images of odd, unequal sides, so that no dimension is taken for a constant.
    example = image.new_zeros(2, module.labels.channels, 129, 161)
    about = metadata(model, options.checkpoint)
    with atomic_write(path) as aside:
        if options.levels:
            write_levels(model, example, aside, about, data)
        else:
            exported = write(model, example, aside, about)
            check(model, exported, data, "float32")
        if options.quantize:
            write_quantized(model, exported, aside, data, options.quantize)
    print(f"exported   {path}: {path.stat().st_size / 2**20:.1f} MiB")
    return path


def parse(args: list[str] | None) -> tuple[Namespace, list[str]]:
    parser = JobParser("export")
    parser.add_checkpoint()
    parser.add_argument(
        "--format",
        choices=FORMATS,
        default="onnx",
        help="default: onnx",
    )
    group = parser.add_mutually_exclusive_group()
    group.add_argument(
        "--quantize",
        choices=("fp16", "int8"),
        help="ONNX in 16 or 8 bits; int8 is calibrated on the training split",
    )
    group.add_argument(
        "--levels",
        choices=("all",),
        help="one ONNX of all levels of a UNet++, with an input that chooses one",
    )
    parser.add_argument(
        "--output",
        metavar="FILE",
        type=file_name,
        help="default: beside the checkpoint",
    )
    options, rest = parser.parse_known_args(args)
    if options.format != "onnx" and (options.quantize or options.levels):
        raise InputError("--quantize and --levels need --format onnx")
    return options, rest


def write_quantized(
    model: Deployed,
    exported: Exported,
    path: Path,
    data: SegmentationDataModule,
    precision: str,
) -> None:
    """Replace an ONNX file by one of another precision, and say what both reach and cost."""
    from segmentation.inference.quantize import QUANTIZERS

    print(f"float32    {path.stat().st_size / 2**20:.1f} MiB")
    measure("float32", exported, data)
    QUANTIZERS[precision](path, data)
    quantized = open_onnx(path)
    check(model, quantized, data, precision)
    measure(precision, quantized, data)


def write_levels(
    model: Deployed,
    example: Tensor,
    path: Path,
    about: dict,
    data: SegmentationDataModule,
) -> None:
    """Write one ONNX file of all levels of a UNet++. What each reaches and costs is its metadata's `levels`."""
    import onnx

    from segmentation.inference.anytime import join_levels

    net = model.module.net
    levels = range(1, net.num_heads + 1)
    models = []
    for level in levels:
        net.predicting_head = level
        to_onnx(model, example, path, about)
        models.append(onnx.load(path))
    joined = join_levels(models)
    onnx.save(joined, path)
    frontier = []
    for level in levels:
        net.predicting_head = level
        exported = open_onnx(path, level=np.array(level))
        check(model, exported, data, "float32")
        found = measure(f"L{level}", exported, data)
        frontier.append({"level": level, **found})
    joined.metadata_props.add(key="levels", value=json.dumps(frontier))
    onnx.save(joined, path)


def check(
    model: Exported,
    exported: Exported,
    data: SegmentationDataModule,
    precision: str,
) -> None:
    """Raise InputError if a file does not predict what the net does, on images of the tested split."""
    indices = evenly(len(data.dataset.names(data.test_split)), IMAGES)
    images = [data.dataset.load(data.test_split, index)["image"][None] for index in indices]
    measured = [parity(model, exported, image) for image in images]
    differences, shares = torch.tensor(measured).T
    difference, equal = TOLERANCES[precision]
    found = f"probabilities differ by {differences.max():.1e} at most, {shares.min():.3%} of pixels are equal"
    if not (differences.max() <= difference and shares.min() >= equal):
        raise InputError(
            f"the exported file does not predict what the net does: {found}; at most {difference:g} and at least "
            f"{equal:.2%} are asked for. Try another --format or --quantize"
        )
    print(f"checked    on {plural(len(images), 'image')}, in {precision}: {found}")


def measure(name: str, exported: Exported, data: SegmentationDataModule) -> dict[str, float]:
    """Print and return a file's mIoU over the tested split, of whole images, and its median time for one, in ms."""
    classes = data.labels.num_classes
    matrix = torch.zeros(classes, classes)
    times = []
    for index in range(len(data.dataset.names(data.test_split))):
        sample = data.dataset.load(data.test_split, index)
        begin = time.perf_counter()
        _, mask = exported(sample["image"][None])
        times.append(time.perf_counter() - begin)
        matrix += confusion_counts(mask.long(), sample["mask"][None], classes)[0]
    miou = float(mean_iou(matrix))
    ms = 1e3 * statistics.median(times)
    print(f"{name:<10} {data.test_split} mIoU {miou:.4f}, {ms:.1f} ms")
    return {"miou": miou, "ms": ms}


def metadata(model: Deployed, checkpoint: str) -> dict:
    """What a user of the file must know to prepare an image and to read the answer."""
    labels = model.module.labels
    return {
        "task": labels.task,
        "classes": describe_classes(labels),
        "input": f"image: (N, {labels.channels}, H, W) {labels.dtype or 'uint8'}, as a file has it",
        "threshold": torch.tensor(model.module.logit_threshold / model.module.temperature).sigmoid().item(),
        "calibration": model.module.calibration,
        "tile": TILE,
        "stride": model.module.net.stride,
        "checkpoint": checkpoint,
    }


def to_onnx(
    model: Deployed,
    example: Tensor,
    path: Path,
    about: dict,
) -> Exported:
    """Write ONNX, and run it by onnxruntime."""
    program = torch.onnx.export(
        model,
        (example,),
        input_names=["image"],
        output_names=["logits", "mask"],
        dynamo=True,
        dynamic_shapes=(AXES,),
        verbose=False,
    )
    assert program is not None  # with dynamo there is one
    for key, value in about.items():
        program.model.metadata_props[key] = value if isinstance(value, str) else json.dumps(value)
    program.save(path)
    return open_onnx(path)


def open_onnx(path: Path, **inputs: np.ndarray) -> Exported:
    """Run an ONNX file by onnxruntime, with other inputs than the image as given here."""
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])

    def run(image: Tensor) -> list[Tensor]:
        outputs = session.run(None, {"image": image.numpy(), **inputs})
        return [torch.from_numpy(output) for output in outputs]

    return run


def to_torch(
    model: Deployed,
    example: Tensor,
    path: Path,
    about: dict,
) -> Exported:
    """Write an archive of torch.export, and run it as loaded again."""
    program = torch.export.export(model, (example,), dynamic_shapes=(DYNAMIC,))
    archive = io.BytesIO()  # torch's own writer of files ends the process where the disk is full
    torch.export.save(
        program,
        archive,
        extra_files={"metadata.json": json.dumps(about)},
    )
    path.write_bytes(archive.getbuffer())
    return torch.export.load(path).module()


#: Suffix and writer.
FORMATS = {
    "onnx": (".onnx", to_onnx),
    "torch_export": (".pt2", to_torch),
}


@torch.inference_mode()
def parity(
    model: Exported,
    exported: Exported,
    image: Tensor,
) -> tuple[float, float]:
    """Largest difference of a probability, and the share of pixels of equal class."""
    logits, mask = model(image)
    found, classes = exported(image)
    difference = probabilities(found) - probabilities(logits)
    equal = classes == mask
    return float(difference.abs().max()), float(equal.double().mean())
