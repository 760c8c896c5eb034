"""Every command of the README, as it stands there, shortened by options appended to it."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from conftest import ROOT, make_folder, script
from test_configs import fake_data

README = (ROOT / "README.md").read_text(encoding="utf-8")
COMMANDS = re.findall(r"python src/\w+\.py[^`\n]*", README)
SHORT = ["--trainer.max_epochs", "1", "--trainer.limit_train_batches", "1", "--trainer.limit_val_batches", "2"]
SHORT += ["--trainer.limit_test_batches", "2", "--trainer.accelerator", "cpu", "--trainer.devices", "1"]
SHORT += ["--data.num_workers", "0", "--pictures.images", "1", "--trainer.check_val_every_n_epoch", "1"]


def test_yaml_and_numbers_are_complete() -> None:
    assert "@" not in README.replace("@media", "")
    assert len(COMMANDS) >= 10


def run_onnx(exported: str, image: Path) -> str:
    """The README's example, on a file that one of its commands has written."""
    code = next(block for block in re.findall(r"```python\n(.*?)```", README, re.DOTALL) if "run_onnx.py" in block)
    assert len(code.splitlines()) <= 22
    Path("run_onnx.py").write_text(code)
    done = subprocess.run([sys.executable, "run_onnx.py", exported, str(image)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
def test_every_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for folder in ("src", "configs"):
        (tmp_path / folder).symlink_to(ROOT / folder)
    monkeypatch.setenv("SEG_DATA", str(tmp_path / "data"))
    for name in ("camvid", "isbi2012", "nuclei"):
        fake_data(tmp_path / "data", yaml.safe_load((ROOT / f"configs/data/{name}.yaml").read_text()))
    make_folder(tmp_path / "pool", {"train": 12, "val": 4}, size=(64, 64))
    own = next(block for block in re.findall(r"```yaml\n(.*?)```", README, re.DOTALL) if "my_data.yaml" in block)
    (tmp_path / "my_data.yaml").write_text(own.replace("/path/to/my_data", str(tmp_path / "pool")))

    seen = set()
    for command in COMMANDS:
        words = shlex.split(command)[1:]
        job = Path(words[0]).stem
        stands_for = {
            "/path/to/my_data": tmp_path / "pool",
            "${SEG_DATA}": tmp_path / "data",
            "CHECKPOINT": "runs/unetpp/checkpoints/best.ckpt",
        }
        args = words[1:]
        for text, place in stands_for.items():
            args = [word.replace(text, str(place)) for word in args]
        if command in seen:
            continue
        seen.add(command)
        if job == "train" and not any("help" in word for word in args):
            if "--name" not in args:
                args += ["--name", "unnamed"]
            if "--resume" not in args:
                args += SHORT
            if any(overlay in command for overlay in ("configs/data", "configs/exp", "my_data", "doctor/overlay")):
                args += ["--data.crop", "32"]
            args += [] if "--resume" in args else ["--data.batch_size", "2"]
            if "camvid" in command:
                args += ["--model.net.widths", "[4,8,16]"]
        if job == "eval":
            args += ["--trainer.limit_test_batches", "2", "--data.num_workers", "0"]
        args += {
            "predict": ["--accelerator", "cpu"],
            "prune": ["--repeats", "1", "--overwrite", "--data.num_workers", "0", "--trainer.accelerator", "cpu"],
            "export": ["--images", "1"],
        }.get(job, [])
        done = script(job, *args)
        expected = 2 if job == "doctor" and "--data.dataset.root" in args else 0  # no classes yet would stop a run
        assert done.returncode == expected, f"{command}\n{done.stdout[-2000:]}\n{done.stderr[-3000:]}"
    image = next((tmp_path / "pool/train/images").iterdir())
    said = run_onnx("runs/unetpp/checkpoints/best.onnx", image)
    assert [line.split()[0] for line in said.splitlines()] == ["background", "disk", "ring", "triangle", "star"]
    assert Path("mask.png").is_file()
