"""Deployment: ONNX in fewer bits, all levels of a UNet++ in one file, and another runtime on the same file."""

import json
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch

from conftest import TINY, train
from segmentation.data import ShapesData
from segmentation.errors import InputError
from segmentation.inference.evaluate import evaluate
from segmentation.inference.export import export
from segmentation.inference.prune import prune
from segmentation.module import SegmentationModule

QUIET = ["--data.num_workers", "0"]
CPU = ["--trainer.accelerator", "cpu", *QUIET]


def images(height: int = 45, width: int = 53) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (3, 3, height, width), dtype=np.uint8)


def run(path: Path, **inputs: np.ndarray) -> list[np.ndarray]:
    """Logits and mask by onnxruntime."""
    return onnxruntime.InferenceSession(path).run(None, {"image": images(), **inputs})


@pytest.fixture(scope="module")
def levels_file(trained: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("levels") / "levels.onnx"
    return export([str(trained), "--levels", "all", "--output", str(path), *QUIET])


@pytest.mark.slow
def test_one_file_holds_every_level(trained: Path, levels_file: Path) -> None:
    """Each is the pruned net, exported alone; what it reaches is what eval says of that."""
    path = levels_file
    levels = json.loads(onnxruntime.InferenceSession(path).get_modelmeta().custom_metadata_map["levels"])
    assert [each["level"] for each in levels] == [1, 2]
    for each in levels:
        level = each["level"]
        prune([str(trained), "--level", str(level), "--output", "small"])
        alone = export([f"small_L{level}.ckpt", "--output", f"L{level}.onnx", *QUIET])
        for found, expected in zip(run(path, level=np.array(level)), run(alone), strict=True):
            np.testing.assert_array_equal(found, expected)
        assert each["miou"] == pytest.approx(evaluate([f"small_L{level}.ckpt", *CPU])["miou"], abs=1e-3)
        assert each["ms"] > 0
    assert not np.array_equal(run(path, level=np.array(1))[0], run(path, level=np.array(2))[0])


@pytest.mark.slow
@pytest.mark.parametrize("level", [1, 2])
def test_openvino_predicts_what_onnxruntime_does(level: int, levels_file: Path) -> None:
    openvino = pytest.importorskip("openvino", reason="pip install openvino")
    compiled = openvino.compile_model(levels_file, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    found = compiled({"image": images(), "level": np.array(level)})
    assert (found["mask"] == run(levels_file, level=np.array(level))[1]).mean() > 0.9999


@pytest.fixture(scope="module")
def decided(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The checkpoint of a net that has learnt something: `trained` is hardly sure of any pixel."""
    folder = tmp_path_factory.mktemp("decided")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("WANDB_MODE", "disabled")
        patch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
        train(*TINY, "--name", "run", "--model.net.widths", "[8,16,32]", "--trainer.max_epochs", "30")
    return folder / "runs" / "run" / "checkpoints" / "best.ckpt"


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp16", "int8"])
def test_fewer_bits(precision: str, decided: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Convolutions have them; images and results keep their types; both files' mIoU are printed."""
    path = export([str(decided), "--quantize", precision, "--output", "small.onnx", *QUIET])
    logits, mask = run(path)
    assert (logits.dtype, mask.dtype) == (np.float32, np.uint8)
    module = SegmentationModule.load_from_checkpoint(decided)
    image = ShapesData(train=12, val=5, test=5, size=48).load("test", 0)["image"][None]
    _, mask = onnxruntime.InferenceSession(path).run(None, {"image": image.numpy()})
    with torch.inference_mode():
        expected = module.classify(module(image)).numpy()
    assert (mask == expected).mean() > 0.97
    graph = onnx.load(path).graph
    kinds = {tensor.data_type for tensor in graph.initializer if np.prod(tensor.dims) > 100}
    assert kinds == {{"fp16": onnx.TensorProto.FLOAT16, "int8": onnx.TensorProto.INT8}[precision]}
    about = onnxruntime.InferenceSession(path).get_modelmeta().custom_metadata_map
    assert len(json.loads(about["classes"])) == logits.shape[1]
    said = capsys.readouterr().out
    for name in ("float32", precision):
        assert f"\n{name:<10} test mIoU 0." in said


@pytest.mark.slow
def test_eight_bits_that_change_the_mask_are_not_kept(trained: Path) -> None:
    with pytest.raises(InputError, match=r"of pixels are equal.*--quantize"):
        export([str(trained), "--quantize", "int8", "--output", "out/small.onnx", *QUIET])
    assert not list(Path("out").iterdir())


def test_what_cannot_be_exported_is_refused(trained: Path) -> None:
    with pytest.raises(InputError, match="--format onnx"):
        export([str(trained), "--quantize", "int8", "--format", "torch_export"])
    with pytest.raises(InputError, match="not allowed with"):
        export([str(trained), "--quantize", "int8", "--levels", "all"])
    with pytest.raises(InputError, match="needs training images"):
        export([str(trained), "--quantize", "int8", "--data.dataset.train", "0", *QUIET])
    prune([str(trained), "--level", "1", "--output", "small"])
    with pytest.raises(InputError, match="deep_supervision: true"):
        export(["small_L1.ckpt", "--levels", "all", *QUIET])
    assert not list(Path().glob("*.onnx"))
