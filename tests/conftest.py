"""What the tests share: a quiet, private place to run in, and small data sets in the real on-disk format."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from forked import run_forked

if TYPE_CHECKING:
    from segmentation.training.cli import SegmentationCLI

ROOT = Path(__file__).resolve().parents[1]
torch.set_num_threads(1)  # two cores, and subprocesses beside: threads would wait for one another
signal.signal(signal.SIGINT, signal.default_int_handler)  # background jobs of a shell, and their children, ignore it


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Each test runs in a folder of its own, with a cache of its own, and without W&B. It leaves nothing behind: DDP in
    this process sets LOCAL_RANK, and a later script would take itself for a process that another one has started."""
    before = dict(os.environ)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("WANDB_MODE", "disabled")
    monkeypatch.delenv("SEGMENTATION_RUN", raising=False)
    yield tmp_path
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
    os.environ.clear()
    os.environ.update(before)


@pytest.fixture
def exit_raises(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a job would end this process, SystemExit is raised; workers of a loader end as ever."""
    this, leave = os.getpid(), os._exit
    monkeypatch.setattr(os, "_exit", lambda status: sys.exit(status) if os.getpid() == this else leave(status))


@pytest.fixture
def seg_data() -> Path:
    """The folder of real images, or a skip."""
    path = os.environ.get("SEG_DATA")
    if not path:
        pytest.skip("SEG_DATA is not set: no real images here")
    return Path(path)


def write_image(path: Path, array: np.ndarray) -> None:
    """Save an array as an image file, its folders made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array).save(path)


def make_folder(
    root: Path, counts: dict[str, int], size: tuple[int, int] = (48, 40), values: tuple[int, ...] = (0, 255)
) -> Path:
    """A data set in split folders: RGB images, brighter where the mask has the last of `values`."""
    rng = np.random.default_rng(0)
    for split, count in counts.items():
        for index in range(count):
            mask = rng.choice(np.array(values, dtype=np.uint8), size=(size[0] // 8, size[1] // 8))
            mask = mask.repeat(8, axis=0).repeat(8, axis=1)
            image = rng.integers(0, 100, (*mask.shape, 3), dtype=np.uint8) + (mask == values[-1])[..., None] * np.uint8(
                80
            )
            write_image(root / split / "images" / f"{index:02d}.png", image)
            write_image(root / split / "masks" / f"{index:02d}.png", mask)
    return root


def documented_options(row: str) -> dict:
    """The YAML at the end of a row of a table in docs/data.md, which begins so."""
    lines = (ROOT / "docs/data.md").read_text(encoding="utf-8").splitlines()
    (line,) = [line for line in lines if line.startswith(f"| {row}")]
    return yaml.safe_load("{" + line.rsplit("`", 2)[1] + "}")


#: A run of seconds: few small images, a narrow net, no pictures.
TINY_SHAPES = [
    *("--data.dataset.train", "12", "--data.dataset.val", "5", "--data.dataset.test", "5", "--data.dataset.size", "48")
]
TINY_RUN = [  # of any data set
    *("--data.batch_size", "4", "--data.num_workers", "0", "--model.net.widths", "[4,8]", "--trainer.max_epochs", "2"),
    *("--pictures.images", "0", "--trainer.accelerator", "cpu", "--trainer.precision", "32-true"),
]
TINY = [*TINY_SHAPES, *TINY_RUN]


def train(*args: str) -> "SegmentationCLI":
    """`python src/train.py *args`, in this process."""
    from segmentation.training.cli import SegmentationCLI

    cli = SegmentationCLI(list(args))
    cli.run()
    return cli


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The best checkpoint of a UNet++ with two heads, trained for a moment on generated images. Do not change it."""
    folder = tmp_path_factory.mktemp("trained")
    options = ["--model.net", "UNetPlusPlus", "--model.net.deep_supervision", "true", "--model.net.widths", "[4,8,8]"]
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("WANDB_MODE", "disabled")
        patch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
        train(*TINY, *options, "--name", "run", "--trainer.max_epochs", "4")
    return folder / "runs" / "run" / "checkpoints" / "best.ckpt"


def script(name: str, *args: str, timeout: float = 300, **env: str) -> subprocess.CompletedProcess:
    """`python src/NAME.py *args`, in a process of its own, with `env` added to the environment."""
    command = [str(ROOT / "src" / f"{name}.py"), *args]
    return run_forked(command, {**os.environ, "OMP_NUM_THREADS": "1", **env}, timeout)
