"""From a checkpoint to every job: the chain train -> eval -> predict -> prune -> export -> compare."""

import errno
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch
from PIL import Image

from conftest import TINY, TINY_RUN, make_folder, script, train, write_image
from segmentation.errors import InputError
from segmentation.inference.evaluate import evaluate
from segmentation.inference.export import Deployed, export, parity
from segmentation.inference.prune import Level, choose, prune
from segmentation.module import SegmentationModule
from segmentation.nets import UNet
from segmentation.nets.base import CLOSED

CPU = ["--trainer.accelerator", "cpu", "--data.num_workers", "0"]
NO_BAR = ["--trainer.enable_progress_bar", "false"]


def test_eval_with_symmetries_and_tiles(trained: Path) -> None:
    """The loss and the metrics are those of the mean probabilities; without either they are training's own."""
    plain = evaluate([str(trained), *CPU])
    summary = json.loads((trained.parents[1] / "summary.json").read_text())
    assert plain["miou"] == summary["test/miou"]
    flips = evaluate([str(trained), "--tta", *CPU, *NO_BAR])
    assert flips["miou"] != plain["miou"]
    assert flips["loss"] < 1.05 * plain["loss"]  # of a mean of four opinions
    tiled = evaluate([str(trained), "--tile", "32", *CPU])
    assert tiled["miou"] != plain["miou"]
    assert tiled["miou"] == pytest.approx(plain["miou"], abs=0.1)
    assert evaluate([str(trained), "--tile", "512", *CPU])["miou"] == plain["miou"]  # one tile holds the image


def test_what_training_tests_are_the_averaged_weights_of_the_checkpoint() -> None:
    """Lightning's callback goes back to the weights it averaged when the trainer loads a checkpoint of its own; and it
    copies the module before Lightning sets it up, which fills in the loss's class weights."""
    average = "[{class_path: lightning.pytorch.callbacks.EMAWeightAveraging, init_args: {decay: 0.9}}]"
    train(*TINY, "--name", "run", "--trainer.callbacks", average, "--model.loss.class_weights", "auto")
    summary = json.loads(Path("runs/run/summary.json").read_text())
    found = evaluate(["runs/run/checkpoints/best.ckpt", *CPU])
    assert (found["loss"], found["miou"]) == (summary["test/loss"], summary["test/miou"])


def test_eval_writes_metrics_counts_and_a_grid_once(trained: Path) -> None:
    found = evaluate([str(trained), "--instances", "--output", "out/val.json", *CPU])
    assert set(map(str, Path("out").iterdir())) == {
        f"out/{name}" for name in ("val.json", "val_per_image.csv", "val_worst_and_best.png", "val_report.html")
    }
    assert 0 <= found["instances/ap"] <= found["instances/ap50"] <= 1
    assert found["instances/true"] > 5
    assert json.loads(Path("out/val.json").read_text())["metrics"]["instances/pq"] == found["instances/pq"]
    with pytest.raises(InputError, match="--overwrite"):
        evaluate([str(trained), "--output", "out/val.json", *CPU])
    evaluate([str(trained), "--output", "out/val.json", "--overwrite", *CPU])


@pytest.mark.slow
def test_eval_on_a_full_disk_leaves_no_part_of_its_results(trained: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    module = sys.modules["segmentation.inference.evaluate"]
    for writer in ("write_csv", "save_png", "write_json"):
        with monkeypatch.context() as patch:
            patch.setattr(module, writer, full)
            with pytest.raises(OSError, match=r"No space left on device: 'out/"):
                evaluate([str(trained), "--output", "out/val.json", *CPU])
        assert not list(Path("out").iterdir())


@pytest.mark.parametrize(
    ("job", "option", "meant"),
    [(evaluate, "--out=x.json", "--output"), (prune, "--max-mss", "--max-ms"), (export, "--quantise", "--quantize")],
)
def test_a_slip_in_an_option_of_a_job(job: Callable, option: str, meant: str, trained: Path) -> None:
    with pytest.raises(InputError, match=rf"did you mean {meant}\?.* src/\w+\.py --help") as caught:
        job([str(trained), option])
    assert "train.py" not in str(caught.value)


def test_data_that_has_moved_is_said_to_be_that_of_training(monkeypatch: pytest.MonkeyPatch) -> None:
    make_folder(Path("data"), {"train": 4, "val": 2})
    options = [
        "--data.dataset",
        "FolderData",
        "--data.dataset.root",
        "data",
        "--data.dataset.classes.foreground",
        "255",
    ]
    train(*TINY_RUN, *options, "--data.crop", "32", "--name", "run", "--data.dataset.classes.background", "0")
    Path("data").rename("moved")
    best = "runs/run/checkpoints/best.ckpt"
    with pytest.raises(InputError, match=r"--data OVERLAY gives another\)$"):
        evaluate([best, *CPU])
    assert evaluate([best, "--data.dataset.root", "moved", *CPU])["miou"] >= 0


@pytest.mark.slow
def test_eval_of_instances_on_two_processes(trained: Path) -> None:
    one = evaluate([str(trained), "--instances", *CPU])
    two = ["--trainer.devices", "2", "--trainer.strategy", "ddp", "--instances", "--output", "two.json", *CPU]
    done = script("eval", str(trained), *two)
    assert done.returncode == 0, done.stderr
    metrics = json.loads(Path("two.json").read_text())["metrics"]
    for key in ("instances/ap", "instances/pq", "instances/found", "miou"):
        assert metrics[key] == one[key], key


def test_a_pruned_checkpoint_is_an_ordinary_one(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    prune([str(trained), "--level", "1", "--output", "small"])
    parent, small = (SegmentationModule.load_from_checkpoint(path) for path in (trained, "small_L1.ckpt"))
    image = torch.randint(0, 256, (1, 3, 45, 53), dtype=torch.uint8)
    with torch.inference_mode():
        expected = parent.net(parent.normalize(image), level=1).logits[-1]
        assert torch.equal(small(image), expected)
    assert Path("small_L1.ckpt").stat().st_size < trained.stat().st_size / 2
    assert sum(p.numel() for p in small.parameters()) < sum(p.numel() for p in parent.parameters())
    miou = evaluate(["small_L1.ckpt", "--split", "val", *CPU])["miou"]
    assert miou == json.loads((trained.parents[1] / "summary.json").read_text())["val/head1/miou"]
    with pytest.raises(InputError, match="--overwrite"):
        prune([str(trained), "--level", "1", "--output", "small"])
    with pytest.raises(InputError, match="level 3 is no head"):
        prune([str(trained), "--level", "3", "--output", "small"])
    with pytest.raises(InputError, match="deep_supervision"):
        prune(["small_L1.ckpt", "--level", "1"])


def test_prune_measures_and_chooses(trained: Path) -> None:
    levels = prune([str(trained), "--output", "out/x", "--max-drop", "1", *CPU, *NO_BAR])
    summary = json.loads((trained.parents[1] / "summary.json").read_text())
    assert [level.miou for level in levels] == [summary[f"val/head{k}/miou"] for k in (1, 2)]
    assert levels[0].parameters < levels[1].parameters
    assert levels[0].gflops < levels[1].gflops
    assert all(level.ms > 0 for level in levels)
    assert Path("out/x_levels.png").is_file()
    assert len(list(Path("out").glob("x_L?.ckpt"))) == 1


def test_which_level_is_chosen() -> None:
    levels = [Level(k, miou, 0, 0, ms) for k, miou, ms in ((1, 0.7, 5), (2, 0.81, 10), (3, 0.8, 20), (4, 0.82, 40))]
    assert choose(levels, None, None) is None
    assert choose(levels, 25, None) == levels[1]  # better than the slower third
    assert choose(levels, None, 0.01) == levels[1]
    assert choose(levels, None, 0.005) == levels[3]
    assert choose(levels, None, 0) == levels[3]
    with pytest.raises(InputError, match="level 1 takes 5"):
        choose(levels, 4, None)


@pytest.mark.slow
@pytest.mark.parametrize("form", ["onnx", "torch_export"])
def test_the_exported_file_runs_alone(form: str, trained: Path) -> None:
    """Other sizes and batches than it was traced with, and none of our code."""
    path = export([str(trained), "--format", form, "--output", f"net.{ {'onnx': 'onnx'}.get(form, 'pt2') }", *CPU[2:]])
    image = torch.randint(0, 256, (3, 3, 37, 110), dtype=torch.uint8)
    torch.save(image, "image.pt")
    alone = {
        "onnx": "import onnxruntime as o; s = o.InferenceSession('net.onnx'); "
        "y = [torch.from_numpy(v) for v in s.run(None, {'image': x.numpy()})]; "
        "about = s.get_modelmeta().custom_metadata_map; about['classes'] = json.loads(about['classes'])",
        "torch_export": "f = {'metadata.json': ''}; y = torch.export.load('net.pt2', extra_files=f).module()(x); "
        "about = json.loads(f['metadata.json'])",
    }[form]
    code = f"import json, sys, torch; x = torch.load('image.pt'); {alone}; torch.save(y, 'y.pt'); "
    code += (
        f"assert '{UNet.__module__.partition('.')[0]}' not in sys.modules; json.dump(about, open('about.json', 'w'))"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
    logits, mask = torch.load("y.pt")
    module = SegmentationModule.load_from_checkpoint(trained)
    with torch.inference_mode():
        expected = module(image)
    torch.testing.assert_close(logits, expected, rtol=1e-3, atol=1e-4)
    assert (mask == module.classify(expected)).double().mean() > 0.999
    about = json.loads(Path("about.json").read_text())
    assert [one["name"] for one in about["classes"]] == module.labels.names
    if form == "onnx":
        session = onnxruntime.InferenceSession(path)
        assert session.get_inputs()[0].shape == ["batch", 3, "height", "width"]
        assert session.get_outputs()[1].shape == ["batch", "height", "width"]


def test_an_export_that_predicts_something_else_is_not_kept(trained: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(model: Deployed, example: torch.Tensor, path: Path, about: dict) -> object:
        path.write_bytes(b"wrong")
        return lambda x: [model(x)[0] * 1.1, model(x)[1]]

    monkeypatch.setitem(sys.modules["segmentation.inference.export"].FORMATS, "torch_export", (".pt2", wrong))
    with pytest.raises(InputError, match=r"probabilities differ by .*--format"):
        export([str(trained), "--format", "torch_export", "--output", "out/net.pt2", *CPU[2:]])
    assert not list(Path("out").iterdir())


def test_parity_is_measured() -> None:
    module = load_module_of(UNet(widths=(4, 8)))
    model, image = Deployed(module).eval(), torch.randint(0, 256, (1, 3, 20, 20), dtype=torch.uint8)
    with torch.inference_mode():
        logits, mask = model(image)
        expected = float(((logits + 0.5).sigmoid() - logits.sigmoid()).abs().max())
        wrong = parity(model, lambda x: [logits + 0.5, 1 - mask], image)
    assert wrong == (pytest.approx(expected, rel=1e-5), 0)
    assert parity(model, model, image) == (0, 1)


def test_parity_beside_what_a_gate_has_closed() -> None:
    """Logits of -1e4 do not hide a difference of the others, nor does a gate closed by mistake pass."""
    logits, mask = torch.rand(1, 3, 8, 8), torch.zeros(1, 8, 8, dtype=torch.uint8)
    logits[:, 1] = CLOSED
    difference = lambda found: parity(lambda _: (logits, mask), lambda _: [found, mask], logits)[0]  # noqa: E731
    assert difference(logits.clone()) == 0
    assert difference(torch.where(logits > CLOSED, 2 * logits, logits)) > 0.1
    other = logits.clone()
    other[:, 2] = CLOSED
    assert difference(other) > 0.5


def load_module_of(net: UNet):
    from segmentation.data.labels import Labels

    return SegmentationModule(net, Labels.parse({"background": 0, "thing": 1}).as_dict())


@pytest.mark.slow
def test_the_chain_as_a_user_types_it() -> None:
    options = ["--model.net", "UNetPlusPlus", "--model.net.deep_supervision", "true", "--model.net.widths", "[4,8,8]"]
    for name, seed in (("one", "0"), ("two", "1")):
        train(*TINY, *options, "--name", name, "--seed_everything", seed)
    best = "runs/one/checkpoints/best.ckpt"
    write_image(Path("photos/x.png"), np.random.default_rng(0).integers(0, 256, (70, 90, 3), dtype=np.uint8))
    chain = {
        "eval": [best, "--output", "eval.json", "--tta", *CPU],
        "predict": [best, "photos", "masks", "--overlay", "--instances", "--accelerator", "cpu"],
        "prune": [best, "--max-drop", "1", *CPU],
        "export": [best, "--format", "onnx", *CPU[2:]],
        "compare": ["one", "two"],
    }
    for job, args in chain.items():
        done = script(job, *args)
        assert done.returncode == 0, f"{job}\n{done.stdout}\n{done.stderr}"
        assert "Traceback" not in done.stderr
        assert "Warning" not in done.stderr, done.stderr
    made = ("eval.json", "masks/x.png", "masks/overlays/x.png", "masks/instances/x.png", "comparison.png")
    made += ("runs/one/checkpoints/best_levels.png", "runs/one/checkpoints/best.onnx")
    assert all(Path(path).is_file() for path in made)
    with Image.open("masks/x.png") as mask:
        assert mask.size == (90, 70)
    (pruned,) = Path("runs/one/checkpoints").glob("best_L?.ckpt")
    for job, args in (("eval", CPU), ("predict", ["photos", "small", *["--accelerator", "cpu"]])):
        assert script(job, str(pruned), *args).returncode == 0
