"""Runs compared from their files: metrics against a bootstrap written the slow way."""

import csv
import json
from pathlib import Path

import numpy as np
import pytest
import yaml
from sklearn.metrics import jaccard_score

from segmentation.errors import InputError
from segmentation.inference.bootstrap import bootstrap, iou
from segmentation.inference.compare import compare, read_run

RNG = np.random.default_rng(0)
TRUTH = [RNG.integers(0, 3, 200) for _ in range(12)]


def make_run(name: str, errors: float, **config: object) -> list[np.ndarray]:
    """A finished run's folder, and its predictions."""
    folder = Path("runs") / name
    folder.mkdir(parents=True)
    guesses = [np.where(RNG.random(200) < errors * RNG.random() * 2, RNG.integers(0, 3, 200), t) for t in TRUTH]
    with (folder / "per_image.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["name", "class", "tp", "fp", "fn"])
        for number, (truth, guess) in enumerate(zip(TRUTH, guesses, strict=True)):
            for k, label in enumerate("abc"):
                counts = [(truth == k) & (guess == k), (truth != k) & (guess == k), (truth == k) & (guess != k)]
                writer.writerow([f"{number:02d}", label, *(int(c.sum()) for c in counts)])
    summary = {"split": "val", "minutes": 2.0, "images_per_second": 10.0, "parameters": 1_000_000, "epoch": 3}
    (folder / "summary.json").write_text(json.dumps(summary))
    text = yaml.safe_dump({"model": {"net": {"class_path": "x.UNet"}, **config}, "wandb": {"mode": "disabled"}})
    (folder / "config.yaml").write_text(text)
    return guesses


def test_iou_is_that_of_scikit_learn() -> None:
    one, two = make_run("one", 0.4), make_run("two", 0.1)
    found = compare(["one", "two"])
    for name, guesses in (("one", one), ("two", two)):
        expected = jaccard_score(np.concatenate(TRUTH), np.concatenate(guesses), average=None)
        got = [found["iou"][name][label].value for label in "abc"]
        assert got == pytest.approx(expected.tolist())
        assert found["iou"][name]["mIoU"].value == pytest.approx(expected.mean())
    # resample by resample, the images drawn one by one
    runs = [read_run(name) for name in ("one", "two")]
    counts = [run.counts for run in runs]
    drawn = dict(zip(("one", "two"), bootstrap(counts, 20, seed=3), strict=True))
    times = np.random.default_rng(3).multinomial(12, np.full(12, 1 / 12), 20)
    for row, drawings in enumerate(times):
        chosen = np.repeat(np.arange(12), drawings)
        truth = np.concatenate([TRUTH[i] for i in chosen])
        for name, guesses in (("one", one), ("two", two)):
            expected = jaccard_score(truth, np.concatenate([guesses[i] for i in chosen]), average="macro")
            assert drawn[name][row, -1] == pytest.approx(expected)
    many = dict(zip(("one", "two"), bootstrap(counts), strict=True))
    low, high = np.percentile(many["two"][:, -1] - many["one"][:, -1], (2.5, 97.5))
    difference = found["difference"]["two"]["mIoU"]
    assert (difference.low, difference.high) == pytest.approx((low, high))
    assert 0 < low < difference.value < high
    assert Path("comparison.png").is_file()
    assert Path("comparison.png").stat().st_size > 10_000


def test_an_absent_class_is_no_zero() -> None:
    counts = np.array([[5, 0], [5, 0], [0, 0]])
    each = iou(counts)
    assert each[0] == each[2] == 0.5
    assert np.isnan(each[1])


def test_only_what_differs_is_listed(capsys: pytest.CaptureFixture[str]) -> None:
    make_run("one", 0.4, lr=1e-3, seed=1)
    make_run("two", 0.2, lr=1e-2, seed=1)
    compare(["one", "two"])
    out = capsys.readouterr().out.splitlines()
    assert [line for line in out if line.startswith("-  ")] == ["-  lr: 0.001"]
    assert [line for line in out if line.startswith("+  ")] == ["+  lr: 0.01"]


def test_what_cannot_be_compared_says_so() -> None:
    make_run("one", 0.4)
    make_run("two", 0.1)
    with pytest.raises(InputError, match=r"no-such/config\.yaml: is missing"):
        compare(["one", "no-such"])
    path = Path("runs/two/per_image.csv")
    whole = path.read_text()
    path.write_text("\n".join(whole.splitlines()[:-3]) + "\n")
    with pytest.raises(InputError, match="same images, classes and masks"):
        compare(["one", "two"])
    path.write_text(whole.replace("00,a,", "00,a,1"))
    with pytest.raises(InputError, match="same images, classes and masks"):
        compare(["one", "two"])
    Path("runs/two/summary.json").unlink()
    with pytest.raises(InputError, match=r"summary\.json: .* --resume"):
        compare(["one", "two"])
    assert not Path("comparison.png").exists()


def test_damaged_files_and_names_alike_are_said_in_a_line() -> None:
    make_run("one", 0.4)
    make_run("two", 0.1)
    for file, text in (("summary.json", "[]"), ("per_image.csv", "name,class,tp,fp,fn\n")):
        path = Path("runs/two") / file
        whole = path.read_text()
        path.write_text(text)
        with pytest.raises(InputError, match=r"runs/two: .*damaged"):
            compare(["one", "two"])
        path.write_text(whole)
    Path("other").mkdir()
    Path("runs/two").rename("other/one")
    assert set(compare(["one", "other/one/"])["iou"]) == {"one", "other/one"}


def test_nothing_is_overwritten_unless_told() -> None:
    make_run("one", 0.4)
    compare(["one"])
    compare(["one"])  # comparison.png is its own
    compare(["one", "--output", "mine.png"])
    with pytest.raises(InputError, match="--overwrite"):
        compare(["one", "--output", "mine.png"])
    compare(["one", "--output", "mine.png", "--overwrite"])
