"""doctor.py: what it finds in data that is broken in every way, that its advice works, and its exit status."""

from pathlib import Path

import numpy as np
import pytest
import yaml

from conftest import TINY_RUN, make_folder, script, train, write_image
from segmentation.doctor import diagnose
from segmentation.errors import InputError

CLASSES = {"background": 0, "cell": 255}


def options(root: Path, classes: dict | None = CLASSES) -> list[str]:
    given = ["--data.dataset", "FolderData", "--data.dataset.root", str(root)]
    return given + (["--data.dataset.classes", yaml.safe_dump(classes)] if classes else [])


def test_nothing_is_wrong(place: Path, capsys: pytest.CaptureFixture) -> None:
    root = make_folder(place / "data", {"train": 4, "val": 2})
    assert diagnose(options(root)) == []
    out = capsys.readouterr().out
    for text in ("FolderData in", "train  4", "sizes 40x48", "uint8", "cell", "255", "nothing is wrong", "overlay"):
        assert text in out, text
    assert (place / "doctor/train.png").is_file()
    assert (place / "doctor/val.png").is_file()
    assert (place / "doctor/bad_files.txt").read_text() == ""
    assert "ignore" not in (place / "doctor/overlay.yaml").read_text()
    assert not (place / "runs").exists()


def break_everything(root: Path) -> None:
    make_folder(root, {"train": 9, "val": 3})
    (root / "train/images/00.png").write_bytes(b"")
    (root / "train/masks/01.png").write_bytes((root / "train/masks/01.png").read_bytes()[:60])
    write_image(root / "train/masks/02.png", np.zeros((8, 8), np.uint8))
    write_image(root / "train/masks/03.png", np.full((48, 40), 7, np.uint8))
    write_image(root / "train/images/04.png", np.zeros((48, 40), np.uint8))
    write_image(root / "train/images/05.png", np.zeros((48, 40, 3), np.uint16)[..., 0])
    (root / "val/masks/00.png").unlink()
    write_image(root / "train/images/lonely 100%.png", np.zeros((8, 8, 3), np.uint8))
    for kind in ("images", "masks"):
        (root / f"val/{kind}/01.png").write_bytes((root / f"train/{kind}/06.png").read_bytes())


def test_everything_that_is_wrong_is_found_at_once(place: Path, capsys: pytest.CaptureFixture) -> None:
    break_everything(place / "data")
    problems = diagnose(options(place / "data"))
    out = capsys.readouterr().out
    bad = (place / "doctor/bad_files.txt").read_text()
    for name in (
        "images/00",
        "masks/01",
        "masks/02",
        "masks/03",
        "images/04",
        "images/05",
        "val/images/00",
        "lonely 100%",
    ):
        assert name in bad, name
    assert len(bad.splitlines()) == 8
    texts = "\n".join(problem.text for problem in problems)
    assert "7 (1,920 pixels)" in texts
    assert "classes: {background: 0, cell: 255, class_7: 7}" in texts
    assert "6 files cannot be used" in texts
    assert texts.count("does not declare") == 1
    assert "data.on_bad_file: skip" in texts
    assert "as_rgb: true (2 files)" in texts
    assert "val images with a near twin in train: 1 of" in texts
    assert [problem.stops for problem in problems] == sorted((p.stops for p in problems), reverse=True)
    assert "✗ stops a run" in out
    # and train.py says so too, in one line, before it starts
    with pytest.raises(InputError, match=r"has no mask.*\(2 files"):
        train(*options(place / "data"), *TINY_RUN, "--name", "broken")


def test_skip_trains_on_the_rest_and_lists_what_was_left_out(place: Path, capsys: pytest.CaptureFixture) -> None:
    break_everything(place / "data")
    skip = ["--data.on_bad_file", "skip"]
    assert not any(problem.stops for problem in diagnose([*options(place / "data"), *skip]))
    capsys.readouterr()
    with pytest.warns(UserWarning, match="near twin in train"):
        cli = train(*options(place / "data"), *skip, *TINY_RUN, "--data.batch_size", "2", "--name", "rest")
    assert cli.datamodule.dataset.names("train") == ["06", "07", "08"]
    assert cli.datamodule.dataset.names("val") == ["01", "02"]
    listed = (place / "runs/rest/skipped_files.txt").read_text()
    assert sorted(listed.splitlines()) == sorted((place / "doctor/bad_files.txt").read_text().splitlines())
    assert "skipped   8 bad files, listed in runs/rest/skipped_files.txt" in capsys.readouterr().out
    rows = (place / "runs/rest/per_image.csv").read_text().splitlines()[1:]
    assert {row.split(",")[0] for row in rows} == {"01", "02"}
    from segmentation.inference.evaluate import evaluate

    again = evaluate(["runs/rest/checkpoints/best.ckpt"])  # the checkpoint's data skips them too
    assert again["miou"] == float(cli.trainer.callback_metrics["test/miou"])


@pytest.mark.parametrize(
    ("values", "classes", "sizes"),
    [
        ((0, 255), None, [(48, 40)]),
        ((0, 1), {"ground": 0, "crack": 255}, [(48, 40)]),  # saved otherwise than declared
        ((0, 1, 5), {"ground": 0, "crack": 1}, [(72, 96), (104, 72)]),  # a class too few, unequal sizes
    ],
)
def test_the_suggested_overlay_trains(place: Path, values: tuple, classes: dict | None, sizes: list) -> None:
    for number, size in enumerate(sizes):
        make_folder(place / f"part{number}", {"train": 6, "val": 2}, size=size, values=values)
        for path in (place / f"part{number}").rglob("*.png"):
            target = place / "data" / path.relative_to(place / f"part{number}").parent / f"{number}{path.name}"
            target.parent.mkdir(parents=True, exist_ok=True)
            path.rename(target)
    assert any(problem.stops for problem in diagnose(options(place / "data", classes)))
    cli = train("--config", "doctor/overlay.yaml", *TINY_RUN, "--name", "advised")
    assert cli.datamodule.labels.num_classes == len(values)
    assert (place / "runs/advised/summary.json").is_file()


def test_groups_across_given_splits_are_a_leak(place: Path) -> None:
    for split, names in (("train", ["a_1", "b_1", "b_2"]), ("val", ["b_3", "c_1"])):
        for index, name in enumerate(names):
            write_image(
                place / f"data/{split}/images/{name}.png", np.full((8, 8, 3), 20 * index + len(split), np.uint8)
            )
            write_image(place / f"data/{split}/masks/{name}.png", np.eye(8, dtype=np.uint8) * 255)
    problems = diagnose([*options(place / "data"), "--data.dataset.group", "^[a-z]"])
    assert any("groups that are in train and in val: 1, e.g. b" in problem.text for problem in problems)


def test_what_is_missing_altogether(place: Path, capsys: pytest.CaptureFixture) -> None:
    problems = diagnose(options(place / "nowhere"))
    assert problems[0].stops
    assert "no such folder" in problems[0].text
    assert "machine" in capsys.readouterr().out  # the machine is examined all the same


@pytest.mark.slow
def test_the_machine(place: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(place / "hub"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    net = ["--model.net", "UNet", "--model.net.encoder", "resnet18", "--model.net.encoder_weights", "imagenet"]
    shapes = ["--data.dataset.train", "16", "--data.dataset.val", "16", "--data.dataset.test", "16"]
    problems = diagnose([*net, *shapes])
    assert any("imagenet of resnet18 are not on this machine" in problem.text for problem in problems)
    out = capsys.readouterr().out
    for fact in ("devices", "bf16", "cores", "disk", "W&B", "encoder"):
        assert fact in out
    from safetensors.torch import save_file
    from segmentation_models_pytorch.encoders import encoders, get_encoder

    revision = encoders["resnet18"]["pretrained_settings"]["imagenet"]["revision"]
    path = place / f"hub/models--smp-hub--resnet18.imagenet/snapshots/{revision}/model.safetensors"
    path.parent.mkdir(parents=True)
    save_file(get_encoder("resnet18", weights=None).state_dict(), path)
    assert diagnose([*net, *shapes]) == []
    assert str(path) in capsys.readouterr().out.replace("\n", "")


@pytest.mark.slow
def test_exit_status_and_help(place: Path) -> None:
    root = make_folder(place / "data", {"train": 4, "val": 2})
    assert script("doctor", *options(root)).returncode == 0
    (root / "train/images/00.png").write_bytes(b"no image")
    done = script("doctor", *options(root))
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    helped = script("doctor", "--help")
    assert helped.returncode == 0
    assert "--prefetch" in helped.stdout
