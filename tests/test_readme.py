"""Every command of the README and the guides, as it stands there, shortened by options appended to it."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from conftest import ROOT, make_folder, script
from test_configs import fake_data

README, CHINESE = ((ROOT / name).read_text(encoding="utf-8") for name in ("README.md", "README.zh-CN.md"))
GUIDES = [path.read_text(encoding="utf-8") for path in sorted((ROOT / "docs").glob("*.md"))]
TEXT = "\n".join([README, *GUIDES])
SHORT = ["--trainer.max_epochs", "1", "--trainer.limit_train_batches", "1", "--trainer.limit_val_batches", "2"]
SHORT += ["--trainer.limit_test_batches", "2", "--trainer.accelerator", "cpu", "--trainer.devices", "1"]
SHORT += ["--data.num_workers", "0", "--pictures.images", "1", "--trainer.check_val_every_n_epoch", "1"]


def commands(text: str) -> list[str]:
    """As typed, without the comment behind them; each once."""
    found = re.findall(r"python src/\w+\.py[^`\n|&]*", text)
    return list(dict.fromkeys(command.partition("  #")[0].strip() for command in found))


def blocks(text: str, language: str) -> dict[str, str]:
    """Blocks of code that say in their first line what file they are."""
    found = re.findall(rf"```{language}\n# (\S+)\n(.*?)```", text, re.DOTALL)
    return dict(found)


def test_the_chinese_readme_says_the_same() -> None:
    """Its commands, its code and its pictures, word for word."""
    assert commands(README) == commands(CHINESE)
    for language in ("python", "yaml"):
        ours, theirs = blocks(README, language), blocks(CHINESE, language)
        assert ours.keys() == theirs.keys()
        for name in ours:
            assert without_comments(ours[name]) == without_comments(theirs[name])
    assert links(README) == links(CHINESE)
    assert re.findall(r"^#+", README, re.MULTILINE) == re.findall(r"^#+", CHINESE, re.MULTILINE)


def links(text: str) -> list[str]:
    return re.findall(r"\((docs/[^)\s]+|notebooks/[^)\s]+)\)", text)


def without_comments(code: str) -> str:
    return re.sub(r'\s*(#|""")[^\n"]*("""|(?=\n))', "", re.sub(r'"#\w+"', "", code))


def test_links_lead_somewhere() -> None:
    for folder, text in [(ROOT, README), (ROOT, CHINESE), *((ROOT / "docs", guide) for guide in GUIDES)]:
        for target in re.findall(r"\]\(([^)#:]+)\)", text):
            assert (folder / target).exists(), target


def test_examples_are_short() -> None:
    for name, code in blocks(TEXT, "python").items():
        assert len(code.splitlines()) <= 22, name


def run_onnx(exported: str, image: Path) -> str:
    """The README's example, on a file that one of its commands has written."""
    Path("run_onnx.py").write_text(blocks(TEXT, "python")["run_onnx.py"])
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
    own = blocks(README, "yaml")["my_data.yaml"]
    (tmp_path / "my_data.yaml").write_text(own.replace("/path/to/my_data", str(tmp_path / "pool")))
    for name, code in blocks(README, "python").items():
        (tmp_path / name).write_text(code)

    for command in commands(TEXT):
        words = shlex.split(command)[1:]
        job = Path(words[0]).stem
        stands_for = {
            "/path/to/my_data": tmp_path / "pool",
            "${SEG_DATA}": tmp_path / "data",
            "CHECKPOINT": "runs/unetpp/checkpoints/best.ckpt",
            "photos": tmp_path / "pool/val/images",
        }
        args = words[1:]
        for text, place in stands_for.items():
            args = [word.replace(text, str(place)) for word in args]
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
            "prune": ["--overwrite", "--data.num_workers", "0", "--trainer.accelerator", "cpu"],
        }.get(job, [])
        done = script(job, *args)
        expected = 2 if job == "doctor" and "--data.dataset.root" in args else 0  # no classes yet would stop a run
        assert done.returncode == expected, f"{command}\n{done.stdout[-2000:]}\n{done.stderr[-3000:]}"
    image = next((tmp_path / "pool/train/images").iterdir())
    said = run_onnx("runs/unetpp/checkpoints/best.onnx", image)
    assert [line.split()[0] for line in said.splitlines()] == ["background", "disk", "ring", "triangle", "star"]
    assert Path("mask.png").is_file()
