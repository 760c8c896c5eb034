"""benchmarks/results.py: its tables, of two tiny runs, and the commands that it gives."""

import csv
import json
import sys
from pathlib import Path

import pytest
import yaml

from conftest import ROOT
from test_configs import fake_data

sys.path.insert(0, str(ROOT / "benchmarks"))
import equal_time
import results


def make_run(name: str, *tables: tuple[str, list[tuple[int, int, int]]]) -> None:
    """A run's folder with tables of two images and two classes: (tp, fp, fn) of each class, the same in both images."""
    folder = Path("runs") / name
    folder.mkdir(parents=True)
    for file, counts in tables:
        with (folder / file).open("w", newline="") as opened:
            writer = csv.writer(opened)
            writer.writerow(["name", "class", "tp", "fp", "fn"])
            writer.writerows(
                (image, label, *c) for image in "ab" for label, c in zip(("rock", "ore"), counts, strict=True)
            )


def test_tables_of_two_runs(capsys: pytest.CaptureFixture[str]) -> None:
    make_run("budget-nuclei-unet", ("per_image.csv", [(8, 1, 1), (3, 1, 0)]))  # IoU 0.8, 0.75
    make_run("budget-nuclei-unet-seed1", ("per_image.csv", [(8, 2, 0), (1, 1, 0)]))  # 0.8, 0.5
    make_run(
        "budget-nuclei-unet_plus_plus_deep",
        ("per_image.csv", [(9, 1, 0), (7, 1, 2)]),  # 0.9, 0.7
        ("L1_per_image.csv", [(1, 1, 0), (1, 2, 1)]),  # 0.5, 0.25
    )
    cost = {"parameters": 1_234_567, "gflops": 1.5, "images_per_second": 20.04, "ms": 12.34, "gib": 0.256}
    about = {"machine": "Abacus", "shape": [4, 3, 128, 128], "costs": {"… pruned to L1": cost}}
    Path("runs/measured.json").write_text(json.dumps(about))
    results.print_tables(["nuclei", "camvid"], list(results.ROWS))
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "Abacus; 3x128x128; training steps of 4, inference of 1; medians"
    assert [line for line in lines if line.startswith("| UNet |")] == [
        # images alike: a bootstrap finds no spread. 0.775 and 0.65: their standard deviation is 0.125 / sqrt(2)
        "| UNet | 0.713 ± 0.088 [0.713, 0.713] |  |  |  |  |  |  |",
        "| UNet | 0.800 | 0.625 |",
    ]
    assert "| … pruned to L1 | 0.375 [0.375, 0.375] |  | 1.23 M | 1.50 | 20.0 | 12.3 | 0.26 |" in lines
    assert "| net | rock | ore |" in lines
    assert not any(title in line for line in lines for title in ("L2", "UNet3+", "smp")), "rows without a run"


@pytest.mark.parametrize("row", results.ROWS)
def test_header_of_an_overlay_has_its_command(row: str) -> None:
    """Word for word, on any number of lines; and the epochs of each data set."""
    header = (ROOT / f"configs/experiment/{row}.yaml").read_text().split("\nmodel:")[0].replace("\n#", " ")
    header = " ".join(header.split())
    assert " ".join(["python", *results.command("nuclei", row)]).replace(f"{ROOT}/", "") in header
    assert all(f"{data}, {epochs} epochs" in header for data, epochs in results.EPOCHS.items())


def test_a_row_is_its_overlay_and_every_overlay_a_row() -> None:
    found = {path.stem for path in (ROOT / "configs/experiment").glob("*.yaml")}
    assert found == {*results.ROWS, "budget", "nuclei_instances", "camvid_gpu", "nuclei_gpu", "isbi2012_gpu"}
    for row in results.ROWS:  # a row may differ in net and loss alone, or it would have another budget
        overlay = yaml.safe_load((ROOT / f"configs/experiment/{row}.yaml").read_text())
        assert list(overlay) == ["model"]
        assert {*overlay["model"]} <= {"net", "loss"}


@pytest.mark.slow
def test_nets_of_equal_time(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    """A small net and a baseline, each trained as long as the other, then their table and plot."""
    monkeypatch.setenv("SEG_DATA", str(Path("data").resolve()))
    monkeypatch.setattr(equal_time, "MINUTES", 0.02)
    fake_data(Path("data"), yaml.safe_load((ROOT / "configs/data/nuclei.yaml").read_text()))
    for words in (["--measure"], [], ["--plot", "plot.png"]):
        monkeypatch.setattr(sys, "argv", ["equal_time.py", "--data", "nuclei", "--rows", "unet", "smp_small", *words])
        equal_time.main()
    costs = json.loads(Path("runs/equal_time.json").read_text())["costs"]["nuclei"]
    assert costs["unet"]["parameters"] == 486_553  # one head
    rows = {line.split(" | ")[0]: line for line in capfd.readouterr().out.splitlines()}
    for row, title in (("unet", "| UNet"), ("smp_small", "| smp Unet, mobilenetv3_small_050")):
        summary = json.loads(Path(f"runs/equal-nuclei-{row}-seed0/summary.json").read_text())
        curve = equal_time.curve(Path(f"runs/equal-nuclei-{row}-seed0"))
        steps = curve[-1][0]
        assert len(curve) == 4
        assert steps * costs[row]["ms"] / 60e3 == pytest.approx(0.02, abs=2 * costs[row]["ms"] / 60e3)
        assert f"{summary['test/miou']:.3f}" in rows[title]
        assert f"({steps:,})" in rows[title]
    assert Path("plot.png").stat().st_size > 10_000
