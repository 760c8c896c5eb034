"""export.py: one file that predicts without this project, checked against the net on real images before it is kept."""

import io
import json
import math
import warnings
from argparse import Namespace
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from segmentation.data.writing import atomic_write
from segmentation.errors import InputError
from segmentation.inference.predictor import TILE
from segmentation.inference.source import open_trained
from segmentation.module import SegmentationModule
from segmentation.nets.base import CLOSED
from segmentation.training.entry import JobParser, file_name, refuse_existing, start_job
from segmentation.visualize import evenly

IMAGES = 8  # to check it on
SUFFIX = {"onnx": ".onnx", "torch_export": ".pt2"}
LARGEST_DIFFERENCE = 1e-2  # of logits, as a share of their largest
FEWEST_EQUAL = 0.9999  # share of pixels of equal class
DYNAMIC = dict.fromkeys((0, 2, 3), torch.export.Dim.DYNAMIC)  # any number of images, any height and width


class Deployed(nn.Module):
    """What is exported: normalisation, padding, net, inference rule and threshold, from pixels to classes."""

    def __init__(self, module: SegmentationModule) -> None:
        super().__init__()
        self.module = module
        self.mask_type = torch.uint8 if module.labels.num_classes <= 256 else torch.int32

    def predict(self, image: Tensor) -> tuple[Tensor, Tensor]:
        """(N, C, H, W) as a file has it -> logits (N, K, H, W) and class indices (N, H, W) int64."""
        logits = self.module(image)
        return logits, self.module.classify(logits)

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor]:
        """Likewise, but class indices in the smallest type that the formats take."""
        logits, mask = self.predict(image)
        return logits, mask.to(self.mask_type)


def export(args: list[str] | None = None) -> Path:
    """Write the file. Raises InputError where it does not predict what the net predicts; then none is left."""
    start_job()
    options, rest = _parser().parse_known_args(args)
    path = Path(options.output or Path(options.checkpoint).with_suffix(SUFFIX[options.format]))
    if path.suffix != SUFFIX[options.format]:
        raise InputError(f"--output {path}: a file of --format {options.format} ends in {SUFFIX[options.format]}")
    refuse_existing([path], options.overwrite)
    warnings.filterwarnings("ignore", category=UserWarning, module=r"torch\.onnx|torch\.export")
    module, data, _ = open_trained("export", options, rest)
    module.channels_last = False
    model = Deployed(module.requires_grad_(False)).eval()
    chosen = evenly(len(data.dataset.names(data.test_split)), IMAGES)
    images = [data.dataset.load(data.test_split, i)["image"][None] for i in chosen]
    with atomic_write(path) as aside:
        run = FORMATS[options.format](model, images[0], aside, metadata(model, options))
        differences, equals = zip(*(compare(model.predict, run, image) for image in images), strict=True)
        found = f"logits differ by {max(differences):.1e} of the largest at most, {min(equals):.3%} of pixels are equal"
        if max(differences) > LARGEST_DIFFERENCE or min(equals) < FEWEST_EQUAL:
            raise InputError(
                f"the exported file does not predict what the net does: {found}. It was not kept; try another --format"
            )
    print(f"checked    on {len(images)} images, in float32: {found}")
    print(f"exported   {path}: {path.stat().st_size / 2**20:.1f} MiB")
    return path


def _parser() -> JobParser:
    parser = JobParser("export")
    parser.add_checkpoint()
    parser.add_argument("--format", choices=tuple(SUFFIX), default="onnx", help="default: onnx")
    parser.add_argument("--output", metavar="FILE", type=file_name, help="default: beside the checkpoint")
    return parser


def metadata(model: Deployed, options: Namespace) -> dict[str, Any]:
    """What a user of the file must know to prepare an image and to read the answer."""
    module = model.module
    labels = module.labels
    mask_type = str(model.mask_type).removeprefix("torch.")
    classes = zip(labels.names, labels.values, labels.colors, strict=True)
    return {
        "task": labels.task,
        "classes": [{"name": name, "value": values[0], "color": color} for name, values, color in classes],
        "input": f"image: (N, {labels.channels}, H, W), {labels.dtype or 'uint8'}, as a file has it",
        "outputs": f"logits: (N, {labels.num_outputs}, H, W) float32; mask: (N, H, W) {mask_type}, index of the class",
        "probabilities": "sigmoid of logits" if labels.num_outputs == 1 else "softmax of logits over axis 1",
        "threshold": torch.tensor(module.logit_threshold).sigmoid().item(),
        "tile": TILE,
        "stride": module.net.stride,
        "net": type(module.net).__name__,
        "checkpoint": str(options.checkpoint),
    }


def to_onnx(model: Deployed, image: Tensor, path: Path, about: dict[str, Any]) -> Callable[[Tensor], Sequence[Tensor]]:
    """Write ONNX, and give what runs it: onnxruntime."""
    import onnx
    import onnxruntime

    program = torch.onnx.export(
        model,
        (_example(image),),
        input_names=["image"],
        output_names=["logits", "mask"],
        dynamo=True,
        dynamic_shapes=(DYNAMIC,),
        verbose=False,
    )
    assert program is not None  # with dynamo there is one
    texts = {key: value if isinstance(value, str) else json.dumps(value) for key, value in about.items()}
    proto = program.model_proto  # made anew whenever it is asked for
    onnx.helper.set_model_props(proto, texts)
    onnx.save(proto, path)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return lambda x: [torch.from_numpy(found) for found in session.run(["logits", "mask"], {"image": x.numpy()})]


def to_torch(model: Deployed, image: Tensor, path: Path, about: dict[str, Any]) -> Callable[[Tensor], Sequence[Tensor]]:
    """Write torch.export's archive, and give what runs it: the file, loaded again."""
    program = torch.export.export(model, (_example(image),), dynamic_shapes=(DYNAMIC,))
    archive = io.BytesIO()  # torch's own writer of files ends the process where the disk is full
    torch.export.save(program, archive, extra_files={"metadata.json": json.dumps(about)})
    path.write_bytes(archive.getbuffer())
    return torch.export.load(path).module()


FORMATS = {"onnx": to_onnx, "torch_export": to_torch}


def _example(image: Tensor) -> Tensor:
    """An input to trace with: two images, odd sides, so that nothing is taken for a constant."""
    height, width = (max(65, min(side, 161) - (side % 2 == 0)) for side in image.shape[-2:])
    return image[..., :1, :1].expand(2, -1, height, width + 2 * (height == width)).contiguous()


def compare(
    model: Callable[[Tensor], Sequence[Tensor]], run: Callable[[Tensor], Sequence[Tensor]], image: Tensor
) -> tuple[float, float]:
    """Largest difference of logits, as a share of the largest logit; share of pixels of equal class."""
    with torch.inference_mode():
        logits, mask = model(image)
        found, classes = run(image)
    opened, also = (each > CLOSED / 2 for each in (logits, found))  # what a gate has closed is no measure of logits
    largest = lambda values: float(torch.where(opened, values, 0).abs().max())  # noqa: E731
    difference = largest(found - logits) if torch.equal(opened, also) else math.inf
    return difference / max(largest(logits), 1e-6), float((classes == mask).double().mean())
