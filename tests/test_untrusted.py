"""A checkpoint that anyone may have written is data: no job runs what it names, and what is wrong is one line."""

import copy
import shutil
import sys
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from conftest import TINY, TINY_RUN, make_folder, script, train, write_image
from segmentation.checkpoint import read_checkpoint
from segmentation.errors import InputError
from segmentation.inference.evaluating import evaluate
from segmentation.inference.exporting import export
from segmentation.inference.predicting import predict
from segmentation.inference.pruning import prune

CPU = ["--trainer.accelerator", "cpu", "--data.num_workers", "0", "--trainer.enable_progress_bar", "false"]
SECTIONS = ("hyper_parameters", "datamodule_hyper_parameters")

#: What tells that code ran: a file in the folder where the command is typed.
OWNED = "owned"
WRITES = f"open({OWNED!r}, 'w').close()\n"
CLASS = "from segmentation.nets import UNet\nclass Thing(UNet): pass\n"
CALL = {"class_path": "os.mkdir", "init_args": {"path": OWNED}}

#: What is planted in the place of a text.
GADGETS: dict[str, Any] = {
    "a function": CALL,
    "a function, as YAML": yaml.safe_dump(CALL, default_flow_style=True).strip(),
    "a script of this folder": "gadget_script.Thing",
    "a module of a sub-folder": {"class_path": "gadget_folder.inside.Thing", "init_args": {}},
    "an installed module": "gadget_installed.Thing",
    "an installed module, as a class": {"class_path": "gadget_installed.Thing"},
    "a transform that calls": {
        "class_path": "torchvision.transforms.v2.Lambda",
        "init_args": {"lambd": "gadget_script.Thing"},
    },
    "a module that ours imports": "segmentation.nets.base.torch.nn.Identity",
}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run whose options have many texts: data in files, a sum of losses, heads to prune."""
    folder = tmp_path_factory.mktemp("untrusted")
    make_folder(folder / "data", {"train": 4, "val": 2, "test": 2}, values=(0, 100, 255))
    classes = {"ground": 0, "wall": 100, "door": {"value": 255, "color": "#FF0000"}}
    patterns = {"images": "{split}/images", "masks": "{split}/masks/{name}.png", "splits": {"val": "val"}}
    dataset = {"root": str(folder / "data"), "classes": classes, "group": "^[^_]+", **patterns}
    losses = [{"class_path": "CrossEntropy", "init_args": {"class_weights": "auto"}}, {"class_path": "Dice"}]
    net = {"class_path": "UNetPlusPlus", "init_args": {"deep_supervision": True}}
    overlay = {
        "data": {"dataset": {"class_path": "FolderData", "init_args": dataset}, "crop": 32},
        "model": {"net": net, "loss": {"class_path": "WeightedSum", "init_args": {"losses": losses}}},
    }
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("WANDB_MODE", "disabled")
        patch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
        Path("own.yaml").write_text(yaml.safe_dump(overlay, sort_keys=False))
        train("--config", "own.yaml", *TINY_RUN, "--model.net.widths", "[4,8,8]", "--name", "run")
    return folder / "runs" / "run"


@pytest.fixture
def gadgets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Modules that write when they are imported: a script beside the user, a package below, and an installed one."""
    for file, text in (
        ("gadget_script.py", WRITES),
        ("gadget_folder/__init__.py", WRITES),
        ("gadget_folder/inside.py", CLASS),
        ("site/gadget_installed.py", WRITES + CLASS),
    ):
        Path(file).parent.mkdir(exist_ok=True)
        Path(file).write_text(text)
    monkeypatch.syspath_prepend(tmp_path / "site")
    write_image(Path("photos/a.png"), np.random.default_rng(0).integers(0, 256, (40, 48, 3), dtype=np.uint8))
    yield
    for name in [name for name in sys.modules if name.startswith("gadget_")]:
        del sys.modules[name]


def predicted(path: str) -> bytes:
    predict([path, "photos", "out", "--overwrite", "--accelerator", "cpu"])
    with Image.open("out/a.png") as mask:
        return mask.tobytes()


def evaluated(path: str) -> dict[str, float]:
    return evaluate([path, *CPU])


def pruned(path: str) -> dict[str, torch.Tensor]:
    prune([path, "--level", "1", "--output", "small", "--overwrite"])
    return {key: value.tolist() for key, value in read_checkpoint("small_L1.ckpt")["state_dict"].items()}


def exported(path: str) -> list:
    file = export([path, "--format", "torch_export", "--output", "net.pt2", "--overwrite", "--data.num_workers", "0"])
    image = torch.arange(3 * 40 * 48, dtype=torch.uint8).view(1, 3, 40, 48)
    return torch.export.load(file).module()(image)[0].tolist()


#: What a job must build of a checkpoint. It takes no notice of the rest.
NET = (("hyper_parameters", "net"), ("hyper_parameters", "labels"))
DATA = tuple(
    ("datamodule_hyper_parameters", key)
    for key in (*("dataset", "batch_size", "eval_batch_size", "num_workers", "cache"), *("folds", "fold"))
) + (("datamodule_hyper_parameters", "on_bad_file"), ("datamodule_hyper_parameters", "seed"))
LOSS = (
    *(("hyper_parameters", "loss"), ("hyper_parameters", "head_weights")),
    *(("hyper_parameters", "threshold"), ("hyper_parameters", "boundary_iou")),
)
BUILDS: dict[Callable, tuple] = {
    predicted: NET,
    pruned: NET,
    evaluated: (*NET, *DATA, *LOSS),
    exported: (*NET, *DATA),
}
JOBS = [predicted, pruned, evaluated, pytest.param(exported, marks=pytest.mark.slow)]


def leaves(value: Any, place: tuple = ()) -> Iterator[tuple[tuple, Any]]:
    """Every value of a checkpoint's options that holds no other, with the keys that lead to it."""
    if isinstance(value, dict | list) and value:
        for key, inside in value.items() if isinstance(value, dict) else enumerate(value):
            yield from leaves(inside, (*place, key))
    else:
        yield place, value


def options_of(checkpoint: dict[str, Any]) -> list[tuple[tuple, Any]]:
    return [pair for section in SECTIONS for pair in leaves(checkpoint[section], (section,))]


def plant(checkpoint: dict[str, Any], place: tuple, gadget: Any) -> None:
    """Put a gadget in the place of a value; one with arguments in the place of a class with its arguments."""
    *way, last = place[:-1] if place[-1] == "class_path" and isinstance(gadget, dict) else place
    for key in way:
        checkpoint = checkpoint[key]
    checkpoint[last] = copy.deepcopy(gadget)


def outcome(job: Callable, path: str, where: Any) -> Any:
    """What a job gives, or None where it refuses a checkpoint in one line. Nothing that the file names may have run."""
    try:
        return job(path)
    except InputError as error:
        assert "\n" not in str(error), where
        return None
    finally:
        assert not Path(OWNED).exists(), where


@pytest.mark.parametrize("job", JOBS)
def test_no_text_of_a_checkpoint_runs_code(job: Callable, run: Path, gadgets: None) -> None:
    clean = read_checkpoint(run / "checkpoints/best.ckpt")
    torch.save(clean, "clean.ckpt")
    right = job("clean.ckpt")
    texts = [place for place, value in options_of(clean) if isinstance(value, str)]
    built = [place for place in texts if place[:2] in BUILDS[job]]
    assert len(built) >= 10
    assert len(texts) - len(built) >= 6
    kinds = list(GADGETS.items())
    for number, place in enumerate(built):
        for turn in range(2):
            kind, gadget = kinds[(number + turn * len(kinds) // 2) % len(kinds)]
            changed = copy.deepcopy(clean)
            plant(changed, place, gadget)
            torch.save(changed, "changed.ckpt")
            found = outcome(job, "changed.ckpt", (place, kind))
            assert found is None or found == right, (place, kind)
    # What a job does not need cannot stop it either.
    changed = copy.deepcopy(clean)
    others = [place for place in texts if place not in built]
    for number, place in enumerate(sorted(others, key=len, reverse=True)):  # a section after what it holds
        plant(changed, place, kinds[number % len(kinds)][1])
    torch.save(changed, "changed.ckpt")
    assert outcome(job, "changed.ckpt", others) == right


