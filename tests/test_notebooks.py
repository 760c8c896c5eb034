"""The notebooks: committed as executed, and run again from a copy, where each must show what it promises."""

import os
import re
import subprocess
import sys
from pathlib import Path
from textwrap import dedent

import nbformat
import pytest
from nbclient import NotebookClient

from conftest import ROOT

NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))

#: What must hold when a notebook has run, in its own namespace.
SHOWN = {
    "1_quickstart": """
        summary = json.loads((run / "summary.json").read_text())
        assert summary["test/miou"] > 0.45, summary["test/miou"]  # single pixels by their colour: under 0.35
        assert mask.shape == truth.shape == (96, 192)
        assert (mask == truth).float().mean() > 0.8
        own_summary = json.loads(Path("runs/own/summary.json").read_text())
        assert own_summary["test/miou"] > 0.5, own_summary["test/miou"]
    """,
    "2_losses_and_metrics": """
        from sklearn.metrics import jaccard_score
        flat = truth.flatten(), predicted.flatten()
        assert np.allclose(by_hand, jaccard_score(*flat, average=None), atol=1e-12)
        assert np.allclose(by_hand, theirs, atol=1e-6)
        assert abs(logged["test/miou"] - by_hand.mean()) < 1e-3  # the loader's batches, the notebook's single images
        precision, recall = ({name: each[f"test/{key}/spot"] for name, each in summaries.items()} for key in scores[:2])
        for weighted, without in (("pos_weight", "plain"), ("focal-alpha", "focal")):
            assert recall[weighted] > recall[without] + 0.1, recall
            assert precision[weighted] < precision[without] - 0.1, precision
        share = is_spot.float().mean()
        assert abs(chance["plain"].mean() - share) < share < 0.1, (chance["plain"].mean(), share)
        assert chance["pos_weight"].mean() > 2 * share
        assert means[1][-1] > 1.2 * means[0][-1], means
        p, value, gradient = of_pixel(losses["cross-entropy"], 1)
        assert torch.allclose(value, -p.log(), atol=1e-5)
        assert torch.allclose(gradient, 1 - p, atol=1e-5)
    """,
    "3_architectures": """
        edges = {name: len([e for e in graph.edges if not e[1].startswith("heads")]) for name, graph in graphs.items()}
        assert edges == {"UNet": 4 + 4 + 4, "UNet++": 4 + 20 + 10, "UNet3+": 4 + 4 * 5}, edges
        into = {source for source, end in graphs["UNet++"].edges if end == "nodes.0_3"}
        assert into == {"encoder.levels.0", "nodes.0_1", "nodes.0_2", "nodes.1_2"}, into
        assert place(graphs["UNet++"])["nodes.0_4"] == (8, 0)
        sides = {name: reach(seen)[1] - reach(seen)[0] + 1 for name, seen in sights.items()}
        assert sides["UNet"] == 188, sides  # 8 pixels at stride 16, and 4 (8 + 4 + 2 + 1) of the encoder's convolutions
        assert sides["UNet"] < sides["UNet++"] < SIDE
        assert [level.level for level in levels] == [1, 2, 3, 4]
        assert levels[0].gflops < levels[1].gflops < levels[2].gflops < levels[3].gflops
    """,
    "4_compare_runs": """
        assert summaries["dice"]["test/miou"] > 0.45, summaries["dice"]["test/miou"]  # background everywhere: 0.15
        for name, run in read.items():
            assert abs(np.nanmean(iou(run.counts.sum(axis=0))[:-1]) - summaries[name]["test/miou"]) < 1e-9
        one = found["difference"]["dice"]["mIoU"]
        assert one.low < one.value < one.high
        assert np.ptp(drawn_second - drawn_first) < np.ptp(apart[:, -1] - drawn_first)
    """,
}


def texts(notebook: nbformat.NotebookNode) -> str:
    """Everything that the outputs of a notebook say."""
    outputs = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    said = [output.get("text", "") for output in outputs]
    said += [value for output in outputs for key, value in output.get("data", {}).items() if key.startswith("text/")]
    return "\n".join(said)


def names(notebook: nbformat.NotebookNode) -> set[str]:
    """The options, files and figures that its outputs name; numbers and times may differ from machine to machine."""
    return set(re.findall(r"\b[a-z]\w*(?:[._/][a-z]\w*)+", texts(notebook)))


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_committed_as_executed(path: Path) -> None:
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    kinds = [output.output_type for cell in cells for output in cell.outputs]
    data = [output.get("data", {}) for cell in cells for output in cell.outputs]
    assert "error" not in kinds
    assert sum(bool({"image/png", "image/jpeg"} & each.keys()) for each in data) >= 4
    said = texts(notebook)
    assert not re.search(r"(?<![\w.])/(home|work|root|tmp|Users|opt|usr)/|Warning|ipywidgets|[━╸]{20}\s+\d+/\d+", said)
    assert not [output.text for cell in cells for output in cell.outputs if output.get("name") == "stderr"]
    assert path.stat().st_size < 1_000_000


def run_first_cell(cell: str) -> subprocess.CompletedProcess:
    Path("cell.ipy").write_text(cell)
    command = [sys.executable, "-m", "IPython", "--quick", "--no-banner", "cell.ipy"]
    return subprocess.run(command, capture_output=True, text=True, check=True)


def test_the_first_cell_fetches_the_project_in_colab_and_does_nothing_elsewhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The repository's address stands for one on this machine, and pip notes what it is told to install."""
    first = []
    for path in NOTEBOOKS:
        title, cell = nbformat.read(path, as_version=4).cells[:2]
        (badge,) = re.findall(r"https://colab\.research\.google\.com/github/(\S+)/blob/main/(\S+)\)", title.source)
        assert f"https://github.com/{badge[0]} " in cell.source
        assert badge[1] == f"notebooks/{path.name}"
        first.append(cell.source)
    assert len(set(first)) == 1
    repository = tmp_path / "github" / badge[0]
    repository.mkdir(parents=True)
    (repository / "requirements.txt").write_text("torch\n# tests\npytest\n")
    author = ["-c", "user.name=a", "-c", "user.email=a@b"]
    for words in (["init", "-q"], ["add", "."], [*author, "commit", "-qm", "First"]):
        subprocess.run(["git", *words], cwd=repository, check=True)
    (tmp_path / "pip").write_text(f'#!/bin/sh\necho "$@" > {tmp_path}/words\ncat "$4" > {tmp_path}/packages\n')
    (tmp_path / "pip").chmod(0o755)
    (tmp_path / "google").mkdir()
    (tmp_path / "google/colab.py").touch()
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))
    monkeypatch.setenv("GIT_CONFIG_COUNT", "1")
    monkeypatch.setenv("GIT_CONFIG_KEY_0", f"url.file://{tmp_path}/github/.insteadOf")
    monkeypatch.setenv("GIT_CONFIG_VALUE_0", "https://github.com/")

    run_first_cell(first[0])
    assert not Path("project").exists()
    assert not Path("words").exists()
    run_first_cell("import google.colab\n" + first[0] + "\nassert sys.path and open('requirements.txt')")
    assert Path("project/.git").is_dir()
    assert Path("words").read_text() == "install --quiet -r /dev/stdin\n"
    assert Path("packages").read_text() == "torch\n"


def test_there_is_a_claim_for_each() -> None:
    assert [path.stem for path in NOTEBOOKS] == sorted(SHOWN)


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_runs_and_shows(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "clone" / "notebooks"
    folder.mkdir(parents=True)
    for name in ("src", "configs"):
        (folder.parent / name).symlink_to(ROOT / name)
    (folder / "notebook.mplstyle").symlink_to(ROOT / "notebooks/notebook.mplstyle")
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # as for every script of the tests: workers of the loader run beside
    monkeypatch.setenv("PYTHONPATH", "")  # a clone has none: the notebook finds the project by itself
    monkeypatch.delenv("MPLBACKEND", raising=False)

    notebook = nbformat.read(path, as_version=4)
    committed = names(notebook)
    notebook.cells.append(nbformat.v4.new_code_cell(dedent(SHOWN[path.stem])))
    # Odd ones start in the root of the clone, even ones in notebooks/, as both must do.
    where = folder.parent if int(path.stem[0]) % 2 else folder
    NotebookClient(notebook, timeout=600, resources={"metadata": {"path": str(where)}}).execute()
    assert names(notebook) == committed
    assert "not logged in" in texts(notebook) or path.stem != "4_compare_runs"
    assert sorted(entry.name for entry in folder.parent.iterdir()) == ["configs", "notebooks", "src"]  # nothing left
