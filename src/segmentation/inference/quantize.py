"""An ONNX file in 16 or 8 bits, by onnxruntime's own converters."""

from pathlib import Path

import onnx
from onnxruntime.quantization import CalibrationDataReader, quantize_static
from onnxruntime.quantization.shape_inference import quant_pre_process
from onnxruntime.transformers.float16 import convert_float_to_float16

from segmentation.data import SegmentationDataModule
from segmentation.visualize import evenly

CALIBRATION = 64  # training images that the ranges of int8 are taken from


class TrainingImages(CalibrationDataReader):
    """Images of the training split, evenly spaced, whole and as files have them, one at a time."""

    def __init__(self, data: SegmentationDataModule) -> None:
        indices = evenly(len(data.dataset.names("train")), CALIBRATION)
        images = (data.dataset.load("train", index)["image"] for index in indices)
        self.inputs = ({"image": image[None].numpy()} for image in images)

    def get_next(self) -> dict | None:
        return next(self.inputs, None)


def to_fp16(path: Path, data: SegmentationDataModule) -> None:
    """Weights and activations in float16."""
    model = onnx.load(path)
    half = convert_float_to_float16(model, keep_io_types=True, node_block_list=in_float32(model))
    onnx.save(half, path)


def to_int8(path: Path, data: SegmentationDataModule) -> None:
    """Weights and activations in 8 bits (QuantizeLinear, DequantizeLinear): weights on a scale for each channel,
    activations between the smallest and the largest value on training images."""
    quant_pre_process(path, path, skip_symbolic_shape=True)
    quantize_static(
        path,
        path,
        TrainingImages(data),
        per_channel=True,
        nodes_to_exclude=in_float32(onnx.load(path)),
    )


QUANTIZERS = {"fp16": to_fp16, "int8": to_int8}


def in_float32(model: onnx.ModelProto) -> list[str]:
    """Names of the nodes before the first convolution (normalisation, padding) and from the last one on (logits,
    classes): images of 16 bits would overflow float16, and logits of 8 bits would tie."""
    nodes = list(model.graph.node)
    convolutions = [index for index, node in enumerate(nodes) if node.op_type == "Conv"]
    outside = nodes[: convolutions[0]] + nodes[convolutions[-1] :]
    return [node.name for node in outside]
