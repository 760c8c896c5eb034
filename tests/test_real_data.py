"""The overlays of the real data sets, on the real images, through the script: every file is read, two steps taken."""

import json
from pathlib import Path

import pytest

from conftest import ROOT, script


@pytest.mark.slow
@pytest.mark.parametrize(("name", "images"), [("camvid", 101), ("isbi2012", 4), ("nuclei", 77)])
def test_overlay(name: str, images: int, seg_data: Path) -> None:
    short = [
        "--trainer.max_steps",
        "2",
        "--data.batch_size",
        "2",
        "--pictures.images",
        "2",
        "--trainer.accelerator",
        "cpu",
    ]
    widths = ["--model.net.widths", "[4,8,16]"]
    done = script("train", "--config", str(ROOT / f"configs/data/{name}.yaml"), "--name", name, *short, *widths)
    assert done.returncode == 0, done.stderr
    summary = json.loads((Path("runs") / name / "summary.json").read_text())
    assert summary["split"] == "val"
    assert 0 < summary["test/miou"] < 1
    rows = (Path("runs") / name / "per_image.csv").read_text().splitlines()[1:]
    assert len({row.split(",")[0] for row in rows}) == images
    assert (Path("runs") / name / "pictures/test.png").is_file()
    # config.yaml reruns as it is
    again = script("train", "--config", f"runs/{name}/config.yaml", "--name", "again")
    assert again.returncode == 0, again.stderr
