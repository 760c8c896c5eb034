"""A folder of share.py: the checkpoint again for every job, a card whose figures eval.py repeats, nothing that runs."""

import json
import math
import os
import re
import shlex
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import huggingface_hub
import numpy as np
import pytest
import torch
from huggingface_hub import ModelCard
from safetensors.torch import load_file

from conftest import ROOT, TINY, script, train, write_image
from hub_server import hub
from segmentation.checkpoint import read_checkpoint
from segmentation.errors import InputError
from segmentation.inference.evaluate import evaluate
from segmentation.inference.export import export
from segmentation.inference.predict import predict
from segmentation.inference.predictor import Predictor
from segmentation.inference.prune import prune
from segmentation.inference.share import share

CPU = ["--trainer.accelerator", "cpu", "--data.num_workers", "0", "--trainer.enable_progress_bar", "false"]
FILES = {"model.safetensors", "config.json", "README.md"}
WEIGHTS = sorted(path.parent for path in (ROOT / "weights").glob("*/model.safetensors"))


@pytest.fixture(scope="module")
def shared(trained: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of the checkpoint `trained`. Do not change it."""
    folder = tmp_path_factory.mktemp("shared") / "shapes"
    licences = ["--license", "mit", "--data-license", "cc0-1.0", "--about", "Shapes, generated."]
    share([str(trained), str(folder), *licences, *CPU])
    return folder


@pytest.fixture
def folder(shared: Path) -> Path:
    """A copy of it, here."""
    shutil.copytree(shared, "shapes")
    return Path("shapes")


def change(folder: Path, *place: str, value: Any) -> None:
    """Put another value into config.json."""
    config = json.loads((folder / "config.json").read_text())
    section = config
    for key in place[:-1]:
        section = section[key]
    section[place[-1]] = value
    (folder / "config.json").write_text(json.dumps(config))


def test_the_folder_is_the_checkpoint(trained: Path, shared: Path) -> None:
    assert {path.name for path in shared.iterdir()} == FILES
    before, after = read_checkpoint(trained), read_checkpoint(shared)
    assert before["state_dict"].keys() == after["state_dict"].keys() == load_file(shared / "model.safetensors").keys()
    for name, weight in before["state_dict"].items():
        assert weight.equal(after["state_dict"][name]), name
    assert {"mean", "std"} < after["state_dict"].keys()  # normalisation goes with the net
    for section in ("hyper_parameters", "datamodule_hyper_parameters", "precision", "epoch"):
        assert json.dumps(before[section]) == json.dumps(after[section])


def test_eval_repeats_the_card(trained: Path, shared: Path, capsys: pytest.CaptureFixture) -> None:
    capsys.readouterr()
    figures = evaluate([str(shared), *CPU])
    assert "every figure is the card's, to the last digit" in capsys.readouterr().out
    assert evaluate([str(trained), *CPU]) == pytest.approx(figures, rel=0, abs=0, nan_ok=True)
    assert "card" not in capsys.readouterr().out
    card = ModelCard.load(shared / "README.md")
    assert card.data.license == "mit"
    rows = dict(re.findall(r"^\| (\w+) \| (\S+) \[0\.\d+, [01]\.\d+\] \|$", card.text, re.MULTILINE))
    assert rows.pop("mIoU") == f"{figures['miou']:.3f}"
    assert rows == {name: f"{figures[f'iou/{name}']:.3f}" for name in rows}
    assert len(rows) == 5
    summary = json.loads((trained.parents[1] / "summary.json").read_text())
    trained_for = f"{summary['minutes']:.1f} minutes on {summary['hardware']}, code of commit {summary['commit']}"
    for text in (trained_for, "Shapes, generated.", "data: cc0-1.0", "Licence of the weights: mit", "The worst images"):
        assert text in card.text


def test_eval_says_what_differs(folder: Path, capsys: pytest.CaptureFixture) -> None:
    evaluate([str(folder), *CPU, "--data.dataset.seed", "1"])
    (line,) = re.findall("^card .*$", capsys.readouterr().out, re.MULTILINE)
    assert re.search(
        r"\d+ of \d+ figures are others: miou \(card: .*What else differs: data \(card: \w{64}, here: \w{64}\)", line
    )
    change(folder, "evaluation", "metrics", "miou", value=0.5)
    change(folder, "evaluation", "precision", value="bf16-mixed")
    evaluate([str(folder), *CPU])
    said = capsys.readouterr().out
    assert re.search(r"1 of \d+ figures are others: miou \(card: 0\.5, here: [\d.]+\)\. What else differs: prec", said)
    assert "precision (card: bf16-mixed, here: 32-true)" in said
    change(folder, "evaluation", value=["junk"])
    with pytest.raises(InputError, match=r"^shapes: [^\n]*$"):
        evaluate([str(folder), *CPU])


def test_every_job_takes_a_folder(trained: Path, folder: Path) -> None:
    image = np.random.default_rng(0).integers(0, 256, (40, 48, 3), dtype=np.uint8)
    write_image(Path("photos/a.png"), image)
    assert (Predictor(folder)(image).probabilities == Predictor(trained)(image).probabilities).all()
    assert predict([f"{folder}/", "photos", "masks", "--accelerator", "cpu"]) == 1
    assert predict([f"{folder}/", "photos", "masks", "--accelerator", "cpu"]) == 0
    with pytest.raises(InputError, match="masks of another checkpoint"):
        predict([str(trained), "photos", "masks", "--accelerator", "cpu"])
    change(folder, "calibration", value={"temperature": 2, "logit_threshold": 0})
    with pytest.raises(InputError, match="masks of another checkpoint"):  # though the weights are the same
        predict([f"{folder}/", "photos", "masks", "--accelerator", "cpu"])
    prune([str(folder), "--level", "1"])
    assert Path("shapes_L1.ckpt").is_file()


@pytest.mark.slow
def test_the_long_jobs_take_a_folder(folder: Path) -> None:
    assert export([str(folder), "--format", "torch_export", "--data.num_workers", "0"]) == Path("shapes.pt2")
    options = ["--model.net", "UNetPlusPlus", "--model.net.deep_supervision", "true", "--model.net.widths", "[4,8,8]"]
    train(*TINY, *options, "--model.init_from", str(folder), "--trainer.max_epochs", "1", "--name", "warm")


NET = ("hyper_parameters", "net")
#: In YAML a list of 9^12 numbers.
UNFOLDS = "[&a0 [x,x,x,x,x,x,x,x,x], " + ", ".join(f"&a{n} [{f'*a{n - 1},' * 9}]" for n in range(1, 12)) + "]"
GADGETS = {
    "a function": (*NET, {"class_path": "os.mkdir", "init_args": {"path": "owned"}}),
    "a function that opens a shell": (*NET, {"class_path": "os.system", "init_args": {"command": "touch owned"}}),
    "an installed net": (*NET, {"class_path": "torchvision.models.segmentation.FCN", "init_args": {}}),
    "a loss": ("hyper_parameters", "loss", {"class_path": "gadget.Thing"}),
    "a data set": (
        "datamodule_hyper_parameters",
        "dataset",
        {"class_path": "os.mkdir", "init_args": {"path": "owned"}},
    ),
    "a precision": ("precision", "abc"),
    "labels": ("hyper_parameters", "labels", "os.system"),
    "no options": ("hyper_parameters", None),
    "a text that YAML unfolds": (*NET, "init_args", "widths", UNFOLDS),
    "a temperature of 0": ("calibration", {"temperature": 0, "logit_threshold": 0}),
    "a threshold that is none": ("calibration", {"temperature": 1, "logit_threshold": math.nan}),
    "a card that is none": ("evaluation", "abc"),
}


@pytest.mark.parametrize("kind", GADGETS)
def test_config_json_runs_nothing(kind: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Path("site").mkdir()
    Path("site/gadget.py").write_text("open('owned', 'w')\nclass Thing: pass\n")
    monkeypatch.syspath_prepend(tmp_path / "site")
    *place, value = GADGETS[kind]
    change(folder, *place, value=value)
    with pytest.raises(InputError, match=r"^shapes: [^\n]*$"):
        evaluate([str(folder), *CPU])
    assert not Path("owned").exists()


def test_a_damaged_folder_is_one_line(folder: Path) -> None:
    config = (folder / "config.json").read_text()
    weights = (folder / "model.safetensors").read_bytes()
    for text in ("", "[1]", "{}", "[" * 100_000, '"x"', config[:-10], json.dumps({"x": "y" * 11_000_000})):
        (folder / "config.json").write_text(text)
        with pytest.raises(InputError, match=r"^shapes[^\n]*$"):
            read_checkpoint(folder)
    (folder / "config.json").unlink()
    os.mkfifo(folder / "config.json")
    with pytest.raises(InputError, match=r"^shapes[^\n]*no file"):
        read_checkpoint(folder)
    (folder / "config.json").unlink()
    (folder / "config.json").write_text(config)
    # Cut off; a header of 10 GB; weights of a pickle.
    for content in (weights[:-10], b"", (10**10).to_bytes(8, "little") + weights[8:], b"\x80\x02c__builtin__\nexit\n."):
        (folder / "model.safetensors").write_bytes(content)
        with pytest.raises(InputError, match=r"^shapes[^\n]*$"):
            read_checkpoint(folder)
    (folder / "model.safetensors").unlink()
    with pytest.raises(InputError, match=r"^shapes: no such checkpoint[^\n]*$"):
        read_checkpoint(folder)


def test_share_refuses_before_it_evaluates(trained: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match=r"README\.md: there already; [^\n]*--overwrite"):
        share([str(trained), str(folder)])
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setattr(huggingface_hub.constants, "HF_TOKEN_PATH", "nowhere")
    with pytest.raises(InputError, match=r"^--push user/name: [^\n]*Type: hf auth login$"):
        share([str(trained), "new", "--push", "user/name"])
    assert not Path("new").exists()
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(InputError, match=r"^hf://user/none: was not fetched [^\n]*$"):
        read_checkpoint("hf://user/none")


@pytest.mark.slow
def test_by_way_of_a_hub(trained: Path, tmp_path: Path) -> None:
    """Pushed to a server, fetched from it into the library's cache, and then found there without it."""
    write_image(Path("photo.png"), np.zeros((40, 48, 3), np.uint8))
    with hub() as server:
        server.files = {"evil.py": b"open('owned', 'w')", "pytorch_model.bin": b"x"}
        env = {"HF_ENDPOINT": server.url, "HF_HOME": str(tmp_path / "home"), "HF_HUB_DISABLE_TELEMETRY": "1"}
        done = script("share", str(trained), "shapes", "--push", "user/name", *CPU, HF_TOKEN="hf_secret", **env)
        assert done.returncode == 0, done.stderr
        assert server.tokens == {"Bearer hf_secret"}
        assert {path.name for path in Path("shapes").iterdir()} == FILES
        assert server.files.keys() == {*FILES, "evil.py", "pytorch_model.bin"}
        assert "predict.py hf://user/name" in server.files["README.md"].decode()
        server.asked.clear()
        done = script("eval", "hf://user/name", *CPU, **env)
        assert "to the last digit" in done.stdout, done.stderr
        assert set(server.asked) == FILES
    done = script("predict", "hf://user/name@main", "photo.png", "masks", HF_HUB_OFFLINE="1", **env)
    assert done.returncode == 0, done.stderr
    assert Path("masks/photo.png").is_file()
    done = script("prune", "hf://user/name", "--level", "1", HF_HUB_OFFLINE="1", **env)
    assert Path("name_L1.ckpt").is_file(), done.stderr
    done = script("predict", "hf://user/other", "photo.png", "masks", HF_HUB_OFFLINE="1", **env)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)


@pytest.fixture
def photo(place: Path) -> Iterator[Path]:
    """Bright disks on a dark ground, as nuclei in fluorescence are."""
    rows, columns = np.mgrid[:160, :200]
    image = np.full((160, 200, 3), 10, np.uint8)
    for row, column in ((40, 50), (100, 60), (70, 150)):
        image[(rows - row) ** 2 + (columns - column) ** 2 < 15**2] = 120
    write_image(place / "photo.png", image)
    return place / "photo.png"


@pytest.mark.parametrize("weights", WEIGHTS, ids=[path.name for path in WEIGHTS])
def test_weights_of_the_repository(weights: Path, photo: Path, capsys: pytest.CaptureFixture) -> None:
    assert sum(path.stat().st_size for path in weights.iterdir()) <= 2_000_000
    predict([str(weights), str(photo), "out", "--overlay", "--accelerator", "cpu"])
    assert Path("out/overlays/photo.png").is_file()
    mask = Predictor(weights, "cpu")(photo).mask
    assert (mask[40, 50], mask[100, 60], mask[70, 150], mask[10, 100], mask[150, 180]) == (255, 255, 255, 0, 0)


@pytest.mark.slow
@pytest.mark.parametrize("weights", WEIGHTS[:1], ids=[path.name for path in WEIGHTS[:1]])
def test_weights_of_the_repository_give_their_cards_figures(
    weights: Path, seg_data: Path, capsys: pytest.CaptureFixture
) -> None:
    figures = evaluate([str(weights), *CPU])
    card = json.loads((weights / "config.json").read_text())["evaluation"]
    assert figures["miou"] == pytest.approx(card["metrics"]["miou"], abs=1e-4)  # another processor may round otherwise
    assert "card  " in capsys.readouterr().out
    assert (weights / "README.md").read_text().count("0.") > 5


@pytest.mark.slow
@pytest.mark.parametrize("weights", WEIGHTS[-1:], ids=[path.name for path in WEIGHTS[-1:]])
def test_training_starts_from_weights_of_the_repository(weights: Path, capsys: pytest.CaptureFixture) -> None:
    """The error of a first try has the options to type."""
    shapes = [*TINY[:8], *TINY[8:12], "--trainer.max_epochs", "1", *TINY[-6:], "--model.init_from", str(weights)]
    with pytest.raises(InputError, match="the options of the other: ") as error:
        train(*shapes, "--name", "never")
    options = shlex.split(str(error.value).partition("the options of the other: ")[2])
    train(*shapes, *options, "--name", "warm")
    took, of = map(int, re.search(r"took (\d+) of (\d+) tensors", capsys.readouterr().out).groups())
    assert took > 0.9 * of
    assert torch.isfinite(read_checkpoint("runs/warm/checkpoints/best.ckpt")["state_dict"]["mean"]).all()
