"""Exports beyond plain ONNX: 16 and 8 bits, all levels of a UNet++ in one file, OpenVINO."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest

from conftest import TINY, train
from segmentation.data import ShapesData
from segmentation.errors import InputError
from segmentation.inference.export import TOLERANCES, export
from segmentation.inference.prune import prune
from test_readme import GUIDES, blocks

CPU = ["--data.num_workers", "0"]


@pytest.fixture
def image() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (2, 3, 37, 110), dtype=np.uint8)


def guide(name: str, *args: str) -> str:
    """What an example of docs/deploy.md prints."""
    Path(name).write_text(blocks(GUIDES["deploy.md"], "python")[name])
    return subprocess.run([sys.executable, name, *args], capture_output=True, text=True, check=True).stdout


def run(path: str, **inputs: np.ndarray) -> list[np.ndarray]:
    """Logits and mask, as a caller gets them who has the file alone."""
    return onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"]).run(None, inputs)


@pytest.fixture(scope="module")
def learnt(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The best checkpoint of a net that tells background from shapes: few pixels lie on the fence."""
    folder = tmp_path_factory.mktemp("learnt")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("WANDB_MODE", "disabled")
        train(*TINY, "--trainer.max_epochs", "40", "--model.net.widths", "[8,16,32]", "--name", "run")
    return folder / "runs/run/checkpoints/best.ckpt"


@pytest.mark.slow
@pytest.mark.parametrize(("precision", "equal"), [("fp16", 0.995), ("int8", 0.95)])
def test_fewer_bits(
    precision: str,
    equal: float,
    learnt: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    export([str(learnt), "--output", "whole.onnx", *CPU])
    quantize = [str(learnt), "--quantize", precision, *CPU]
    path = export([*quantize, "--output", "small.onnx"])
    assert path.stat().st_size < 0.8 * Path("whole.onnx").stat().st_size
    said = capsys.readouterr().out
    before, after = (float(line.split("mIoU")[1].split(",")[0]) for line in said.splitlines() if "mIoU" in line)
    assert after == pytest.approx(before, abs=0.03)
    test = ShapesData(train=12, val=5, test=5, size=48)
    image = test.load("test", 0)["image"][None].numpy()
    logits, mask = run("small.onnx", image=image)
    expected, classes = run("whole.onnx", image=image)
    assert logits.dtype == np.float32
    assert not np.array_equal(logits, expected)
    assert (mask == classes).mean() > equal
    weights = {tensor.data_type for tensor in onnx.load("small.onnx").graph.initializer if np.prod(tensor.dims) > 100}
    assert weights == {{"fp16": onnx.TensorProto.FLOAT16, "int8": onnx.TensorProto.INT8}[precision]}
    # A file that differs by more than it may is not kept.
    monkeypatch.setitem(TOLERANCES, precision, (0.0, 1.0))
    with pytest.raises(InputError, match="does not predict what the net does"):
        export([*quantize, "--output", "exact.onnx"])
    assert not Path("exact.onnx").exists()


@pytest.mark.slow
def test_one_file_of_all_levels(trained: Path, image: np.ndarray) -> None:
    """Each level predicts what the pruned net does; what it reaches and costs is in the file."""
    export([str(trained), "--levels", "all", "--output", "all.onnx", *CPU])
    for level in (1, 2):
        prune([str(trained), "--level", str(level), "--output", "pruned"])
        export([f"pruned_L{level}.ckpt", "--output", f"{level}.onnx", *CPU])
        expected, classes = run(f"{level}.onnx", image=image)
        logits, mask = run("all.onnx", image=image, level=np.array(level))
        np.testing.assert_allclose(logits, expected, atol=1e-4)
        assert (mask == classes).mean() > 0.999
    assert guide("anytime.py", "all.onnx", "1e9") == "2 (1, 256, 256)\n"
    about = onnxruntime.InferenceSession("all.onnx").get_modelmeta().custom_metadata_map
    summary = json.loads((trained.parents[1] / "summary.json").read_text())
    levels = json.loads(about["levels"])
    assert [each["level"] for each in levels] == [1, 2]
    assert levels[1]["miou"] == pytest.approx(summary["test/miou"], abs=1e-3)
    assert all(each["ms"] > 0 for each in levels)


def test_what_cannot_be_exported_is_refused(trained: Path) -> None:
    with pytest.raises(InputError, match="--format onnx"):
        export([str(trained), "--quantize", "int8", "--format", "torch_export"])
    with pytest.raises(InputError, match="not allowed with"):
        export([str(trained), "--quantize", "int8", "--levels", "all"])
    with pytest.raises(InputError, match="needs training images"):
        export([str(trained), "--quantize", "int8", "--data.dataset.train", "0", *CPU])
    prune([str(trained), "--level", "1", "--output", "small"])
    with pytest.raises(InputError, match="deep_supervision: true"):
        export(["small_L1.ckpt", "--levels", "all", *CPU])
    assert not list(Path().glob("*.onnx"))


@pytest.mark.slow
def test_openvino_predicts_the_same(image: np.ndarray) -> None:
    openvino = pytest.importorskip("openvino", reason="pip install openvino")
    train(*TINY, "--model.net", "UNet3Plus", "--name", "run", "--trainer.max_epochs", "4")
    export(["runs/run/checkpoints/best.ckpt", "--output", "net.onnx", *CPU])
    model = openvino.convert_model("net.onnx")
    openvino.save_model(model, "net.xml")  # weights in 16 bits, as `ovc` writes them
    found = openvino.Core().compile_model("net.xml", "CPU")({"image": image})
    _, expected = run("net.onnx", image=image)
    assert (found["mask"] == expected).mean() > 0.99
    assert guide("run_openvino.py", "net.xml") == "(1, 256, 256)\n"
