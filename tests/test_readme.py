"""Every command of the README and the guides, as it stands there, shortened by options appended to it."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from PIL import Image

from conftest import ROOT, TINY, make_folder, script, train
from test_configs import fake_data

README, CHINESE = ((ROOT / name).read_text(encoding="utf-8") for name in ("README.md", "README.zh-CN.md"))
GUIDES = {path.name: path.read_text(encoding="utf-8") for path in sorted((ROOT / "docs").glob("*.md"))}
TEXT = "\n".join([README, *GUIDES.values()])
SHORT = ["--trainer.max_epochs", "1", "--trainer.limit_train_batches", "1", "--trainer.limit_val_batches", "2"]
SHORT += ["--trainer.limit_test_batches", "2", "--trainer.accelerator", "cpu", "--trainer.devices", "1"]
SHORT += ["--data.num_workers", "0", "--pictures.images", "1", "--trainer.check_val_every_n_epoch", "1"]


def commands(text: str) -> list[str]:
    """As typed, on one line, without the comment behind them; each once."""
    found = re.findall(r"python src/\w+\.py[^`\n|&]*", text.replace("\\\n", ""))
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
    for folder, text in [(ROOT, README), (ROOT, CHINESE), *((ROOT / "docs", guide) for guide in GUIDES.values())]:
        for target in re.findall(r"\]\(([^)#:]+)\)", text):
            assert (folder / target).exists(), target


def test_examples_are_short() -> None:
    for name, code in blocks(TEXT, "python").items():
        assert len(code.splitlines()) <= 24, name


def run_onnx(exported: str, image: Path) -> str:
    """The README's example, on a file that one of its commands has written."""
    Path("run_onnx.py").write_text(blocks(TEXT, "python")["run_onnx.py"])
    done = subprocess.run([sys.executable, "run_onnx.py", exported, str(image)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture
def clone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where a user stands: a clone, and SEG_DATA with small data in the real formats."""
    for folder in ("src", "configs", "slurm", "weights"):
        (tmp_path / folder).symlink_to(ROOT / folder)
    monkeypatch.setenv("SEG_DATA", str(tmp_path / "data"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")  # nothing is fetched
    for name in ("camvid", "isbi2012", "nuclei"):
        fake_data(tmp_path / "data", yaml.safe_load((ROOT / f"configs/data/{name}.yaml").read_text()))
    return tmp_path


@pytest.mark.slow
def test_every_command(clone: Path) -> None:
    tmp_path = clone
    make_folder(tmp_path / "pool", {"train": 12, "val": 4}, size=(64, 64))
    own = blocks(README, "yaml")["my_data.yaml"]
    (tmp_path / "my_data.yaml").write_text(own.replace("/path/to/my_data", str(tmp_path / "pool")))
    for name, code in blocks(TEXT, "python").items():
        (tmp_path / name).write_text(code)

    for number, command in enumerate(commands(TEXT)):
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
                args += ["--name", f"unnamed-{number}"]
            if "--resume" not in args:
                args += SHORT
            if any(overlay in command for overlay in ("configs/data", "configs/exp", "my_data", "doctor/overlay")):
                args += ["--data.crop", "32"]
            args += [] if "--resume" in args else ["--data.batch_size", "2"]
            if "camvid" in command:
                args += ["--model.net.widths", "[4,8,16]"]
        if job in ("eval", "share"):
            args += ["--trainer.limit_test_batches", "2", "--data.num_workers", "0"]
        if "--max-missed" in args:
            args += ["--max-missed", "0.9", "--confidence", "0.5"]  # of three images
        args += {
            "predict": ["--accelerator", "cpu"],
            "prune": ["--overwrite", "--data.num_workers", "0", "--trainer.accelerator", "cpu"],
        }.get(job, [])
        done = script(job, *args)
        # No classes yet would stop a run, and so would weights that cannot be fetched.
        expected = 2 if job == "doctor" and {"--data.dataset.root", "--prefetch"} & set(args) else 0
        if done.returncode and "--quantize" in args:  # a net of one step may be too unsure of its pixels for fewer bits
            assert "of pixels are equal" in done.stderr
            continue
        assert done.returncode == expected, f"{command}\n{done.stdout[-2000:]}\n{done.stderr[-3000:]}"
    more = ["--data.dataset.root", str(tmp_path / "pool"), "--data.crop", "32", "--name", "binary", *SHORT]
    done = script("train", "--config", "my_data.yaml", "--model.loss", "my_loss.Smoothed", *more)
    assert done.returncode == 0, done.stderr
    image = next((tmp_path / "pool/train/images").iterdir())
    said = run_onnx("runs/unetpp/checkpoints/best.onnx", image)
    assert [line.split()[0] for line in said.splitlines()] == ["background", "disk", "ring", "triangle", "star"]
    assert Path("mask.png").is_file()
    command = [sys.executable, "predict_one.py", "runs/unetpp/checkpoints/best.ckpt", str(image)]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": "src"})
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("(64, 64) (5, 64, 64) ['background', 'disk'")


#: A run of a moment, in words without a space.
MOMENT = [*SHORT, "--data.crop", "32", "--data.batch_size", "2", "--model.net.widths", "[4,8,16]"]


@pytest.mark.slow
def test_the_command_of_torchrun(clone: Path) -> None:
    (words,) = re.findall(r"`torchrun ([^`]*)`", README)
    assert words.count(" 8") == 2
    words, args = words.replace(" 8", " 2"), [*MOMENT, "--trainer.devices", "2"]
    command = [sys.executable, "-m", "torch.distributed.run", *shlex.split(words), *args]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    assert "1 step of 4 images" in done.stdout
    assert Path("runs/wide/summary.json").is_file()


@pytest.mark.slow
def test_the_commands_of_sbatch(clone: Path) -> None:
    """As SLURM runs the scripts, by a srun that runs its command once; tests/test_preemption.py has a real SLURM."""
    (clone / "srun").write_text('#!/bin/bash\nshift\nexec "$@" $MOMENT\n')
    (clone / "srun").chmod(0o755)
    (lines,) = re.findall(r"printf '%s\\n' (.*) > nets.txt", (ROOT / "slurm/array.sbatch").read_text())
    Path("nets.txt").write_text("".join(f"{line}\n" for line in shlex.split(lines)))
    slurm = {"SLURM_SUBMIT_DIR": str(clone), "SLURM_JOB_NUM_NODES": "1", "SLURM_NTASKS_PER_NODE": "1"}
    slurm |= {"SLURM_JOB_ID": "7", "SLURM_ARRAY_TASK_ID": "3"}
    places = [f"{clone}", str(Path(sys.executable).parent), os.environ["PATH"]]
    env = {**os.environ, **slurm, "MOMENT": " ".join(MOMENT), "PATH": os.pathsep.join(places)}
    found = re.findall(r"`sbatch (?:-\S+ )*([^`]*)`", README)
    assert len(found) == 2
    for words in found:
        done = subprocess.run(["bash", *shlex.split(words)], env=env, capture_output=True, text=True, timeout=200)
        assert done.returncode == 0, done.stderr
    assert Path("runs/slurm-7/summary.json").is_file()
    assert "UNet3Plus" in Path("runs/nets-3/config.yaml").read_text()


@pytest.mark.slow
def test_the_line_of_a_notebook(clone: Path) -> None:
    (line,) = re.findall(r"From a notebook: `([^`]*)`", README)
    short = line.replace('"3"', '"1", "--model.net.widths", "[4,8,16]", "--trainer.accelerator", "cpu"')
    assert short != line
    done = subprocess.run([sys.executable, "-c", f"import sys; sys.path.insert(0, 'src'); {short}"], timeout=200)
    assert done.returncode == 0


@pytest.fixture
def fork(tmp_path: Path) -> Path:
    """A clone that may be changed."""
    folder = tmp_path / "fork"
    files = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for name in files.strip("\0").split("\0"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, folder / name)
    subprocess.run(["git", "init", "-q"], cwd=folder, check=True)
    subprocess.run(["git", "add", "."], cwd=folder, check=True)
    return folder


def test_a_fork_has_its_own_address(fork: Path) -> None:
    """The command of CONTRIBUTING.md gives it to badges, first cells of the notebooks and citation."""
    (command,) = re.findall(r"^git grep -lI .* perl .*$", (fork / "CONTRIBUTING.md").read_text(), re.MULTILINE)
    ((old, new),) = re.findall(r"s\{(\S+?)\}\{(\S+?)\}g", command)
    files = [*fork.glob("notebooks/*.ipynb"), fork / "CITATION.cff"]
    before = [path.read_text().count(f"https://github.com/{old}") for path in files]
    assert min(before) == 1
    subprocess.run(["bash", "-ec", command.replace(new, "me/crackseg")], cwd=fork, check=True)
    for path in files:
        assert path.read_text().count("https://github.com/me/crackseg") == 1
        assert old not in path.read_text()
    assert all(json.loads(path.read_text())["cells"] for path in files[:-1])


@pytest.mark.slow
def test_a_fork_with_a_metric_more_and_another_name(fork: Path) -> None:
    """What docs/extend.md tells to type, in a clone."""
    guide = GUIDES["extend.md"]
    (patch,) = re.findall(r"```diff\n(.*?)```", guide, re.DOTALL)
    (commands,) = re.findall(r"```bash\n(git mv .*?)```", guide, re.DOTALL)
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    for command in ("git apply -", commands, f"python src/train.py {shlex.join([*TINY, '--name', 'kappa'])}"):
        done = subprocess.run(
            ["bash", "-ec", command], cwd=fork, env=environment, input=patch, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
    summary = json.loads((fork / "runs/kappa/summary.json").read_text())
    assert -1 <= summary["test/kappa"] <= 1
    command = [sys.executable, "-m", "pytest", "-n", "0", "-x", "tests/test_house.py", "tests/test_checkpoint.py"]
    done = subprocess.run(command, cwd=fork, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


@pytest.mark.slow
def test_the_script_of_the_pictures() -> None:
    options = ["--data.dataset.test", "26", "--pictures.images", "2", "--trainer.log_every_n_steps", "1"]
    train(*TINY, *options, "--name", "run")
    for words in ("predictions shown.png runs/run:0,1 runs/run:2:32x24:Cut", "logged shown.png runs/run"):
        command = [sys.executable, str(ROOT / "docs/pictures.py"), *words.split()]
        done = subprocess.run(command, capture_output=True, text=True, timeout=200)
        assert done.returncode == 0, done.stderr
        with Image.open("shown.png") as picture:
            assert len(picture.convert("RGB").getcolors(2**24)) > 100
        Path("shown.png").unlink()


def test_the_tables_of_results_agree() -> None:
    """Both READMEs have the same numbers, in rows of the table of docs/results.md."""
    english, chinese, whole = (rows_of_results(text) for text in (README, CHINESE, GUIDES["results.md"]))
    assert len(whole) >= 12
    assert english == chinese
    assert all(row in whole for row in english)


def rows_of_results(text: str) -> list[list[str]]:
    """The numbers of each row that has an interval."""
    rows = re.findall(r"^\|.* \[0\.\d+, .*$", text, re.MULTILINE)
    return [re.findall(r"\d[\d.,]*", row.partition("|")[2].partition("|")[2]) for row in rows]
