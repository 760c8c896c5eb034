"""export.py: a trained net as one file that predicts without this project, checked against the net on real images."""

import io
import json
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from segmentation.checkpoint import results_of
from segmentation.data.writing import atomic_write
from segmentation.errors import InputError, plural
from segmentation.inference.results import describe_classes
from segmentation.inference.source import open_trained
from segmentation.module import SegmentationModule
from segmentation.nets.base import probabilities
from segmentation.nets.tiles import TILE
from segmentation.training.entry import JobParser, file_name, refuse_existing, start_job
from segmentation.visualize import evenly

IMAGES = 8  # to check the file on
MAX_DIFFERENCE = 1e-3  # of a probability
MIN_EQUAL = 0.9999  # share of pixels of equal class
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
    parser = JobParser("export")
    parser.add_checkpoint()
    parser.add_argument(
        "--format",
        choices=FORMATS,
        default="onnx",
        help="default: onnx",
    )
    parser.add_argument(
        "--output",
        metavar="FILE",
        type=file_name,
        help="default: beside the checkpoint",
    )
    options, rest = parser.parse_known_args(args)
    suffix, write = FORMATS[options.format]
    path = options.output or results_of(options.checkpoint).with_suffix(suffix)
    refuse_existing([path], options.overwrite)

    warnings.filterwarnings(
        "ignore",
        category=UserWarning,
        module=r"torch\.onnx|torch\.export",
    )
    module, data, _ = open_trained("export", options, rest)
    module.channels_last = False
    model = Deployed(module.requires_grad_(False)).eval()
    indices = evenly(len(data.dataset.names(data.test_split)), IMAGES)
    images = [data.dataset.load(data.test_split, index)["image"][None] for index in indices]
    # Two images of odd, unequal sides, so that no dimension is taken for a constant.
    example = images[0].new_zeros(2, module.labels.channels, 129, 161)
    with atomic_write(path) as aside:
        exported = write(
            model,
            example,
            aside,
            metadata(model, options.checkpoint),
        )
        measured = [parity(model, exported, image) for image in images]
        differences, shares = torch.tensor(measured).T
        found = f"probabilities differ by {differences.max():.1e} at most, {shares.min():.3%} of pixels are equal"
        if not (differences.max() <= MAX_DIFFERENCE and shares.min() >= MIN_EQUAL):
            raise InputError(f"the exported file does not predict what the net does: {found}. Try another --format")
    print(f"checked    on {plural(len(images), 'image')}, in float32: {found}")
    print(f"exported   {path}: {path.stat().st_size / 2**20:.1f} MiB")
    return path


def metadata(model: Deployed, checkpoint: str) -> dict[str, Any]:
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
    about: dict[str, Any],
) -> Exported:
    """Write ONNX, and run it by onnxruntime."""
    import onnxruntime

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
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])

    def run(image: Tensor) -> list[Tensor]:
        outputs = session.run(None, {"image": image.numpy()})
        return [torch.from_numpy(output) for output in outputs]

    return run


def to_torch(
    model: Deployed,
    example: Tensor,
    path: Path,
    about: dict[str, Any],
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
