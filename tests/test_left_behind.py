"""What killed or damaged files leave to the next start of the same command."""

import multiprocessing
import os
import shutil
from pathlib import Path

import numpy as np
import pytest

from conftest import TINY, train, write_image
from segmentation.data.writing import atomic_write
from segmentation.errors import InputError
from segmentation.inference.evaluate import evaluate
from segmentation.inference.predict import predict
from segmentation.training.cli import SegmentationCLI
from segmentation.training.run_folder import RunFolder


def killed_while_it_writes(path: Path) -> None:
    with atomic_write(path) as aside:
        aside.write_text("half")
        os._exit(9)


def kill(path: Path) -> None:
    """Leave what `kill -9` would, in the middle of writing a file."""
    process = multiprocessing.get_context("fork").Process(target=killed_while_it_writes, args=(path,))
    process.start()
    process.join()
    assert process.exitcode == 9


def hidden(folder: str) -> list[Path]:
    return list(Path(folder).rglob(".*"))


def test_a_killed_writer_leaves_the_file_of_before() -> None:
    Path("file").write_text("whole")
    kill(Path("file"))
    with Path("file").open() as reader:
        with atomic_write(Path("file")) as aside:
            aside.write_text("new")
        assert reader.read() == "whole"  # never a mixture, though the file is new now
    assert Path("file").read_text() == "new"


@pytest.mark.parametrize("lost", ["config.yaml", "checkpoints/last.ckpt"])
def test_a_run_without_its_config_or_checkpoint_begins_anew(lost: str) -> None:
    for name in ("config.yaml", "checkpoints/last.ckpt"):
        path = Path("runs/run") / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    assert RunFolder("run", resume=True).last
    (Path("runs/run") / lost).unlink()
    assert not RunFolder("run", resume=True).last


def test_a_resumed_run_has_no_half_written_files() -> None:
    run = Path("runs/run")
    train(*TINY, "--name", "run", "--trainer.max_epochs", "1")
    names = ("metrics.csv", "config.yaml", "summary.json", "pictures/test.png", "checkpoints/last.ckpt", "wandb/run_id")
    for name in names:
        kill(run / name)
    assert len(hidden("runs/run")) == len(names)
    train(*TINY, "--name", "run", "--trainer.max_epochs", "2", "--resume")
    assert hidden("runs/run") == []


def test_predict_leaves_none_but_what_others_write(trained: Path) -> None:
    write_image(Path("photos/a.png"), np.zeros((20, 20, 3), np.uint8))
    kill(Path("out/a.png"))
    kill(Path("out/overlays/a.png"))
    (old,) = Path("out/overlays").iterdir()
    os.utime(old, (0, 0))
    assert predict([str(trained), "photos", "out", "--accelerator", "cpu"]) == 1
    assert [path.parent for path in hidden("out")] == [Path("out")]  # another process may be writing that one


@pytest.mark.parametrize(
    ("file", "contents"),
    [
        ("metrics.csv", b"\xff\xfe\0"),
        ("metrics.csv", b"step,train/loss\n0,0.5\nx,0.4\n"),
        ("config.yaml", b"\xff\xfe\0"),
        ("config.yaml", b"data: [1, 2"),
        ("config.yaml", b""),
        ("checkpoints/last.ckpt", b""),
    ],
)
def test_a_damaged_file_of_a_run_is_one_line(file: str, contents: bytes, trained: Path) -> None:
    shutil.copytree(trained.parents[1], "runs/run")
    (Path("runs/run") / file).write_bytes(contents)
    with pytest.raises(InputError, match=f"^runs/run/{file}: [^\n]*$"):
        SegmentationCLI(["--name", "run", "--resume", "--trainer.max_epochs", "5"])


@pytest.mark.parametrize("command", [["--config", "latin.yaml"], ["--data", "latin.yaml"]])
def test_an_overlay_that_is_no_utf8(command: list[str], trained: Path) -> None:
    Path("latin.yaml").write_bytes("data: {dataset: {init_args: {classes: {forêt: 1}}}}".encode("latin-1"))
    with pytest.raises(InputError, match=r"^[^\n]*utf-8[^\n]*$"):
        evaluate([str(trained), *command]) if command[0] == "--data" else SegmentationCLI(command)


def test_runs_without_a_name_have_folders_of_their_own() -> None:
    """Though they begin in one second."""
    names = {SegmentationCLI(TINY).run_folder.name for _ in range(4)}
    assert len(names) == 4
