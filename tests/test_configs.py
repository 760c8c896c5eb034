"""Every YAML in configs/, through the real command line, for a batch: a config cannot rot."""

from pathlib import Path

import numpy as np
import pytest
import yaml
from jsonargparse import Namespace

from conftest import ROOT, make_folder, train, write_image
from official_sets import MAKERS
from segmentation.data import SegmentationDataModule
from segmentation.module import SegmentationModule
from segmentation.training.cli import SegmentationCLI

SWEEP = ROOT / "configs/sweep.yaml"  # no overlay, but what `wandb sweep` reads
#: tests/test_loggers.py runs those of loggers.
CONFIGS = [
    path for path in sorted((ROOT / "configs").rglob("*.yaml")) if path != SWEEP and path.parent.name != "logger"
]
ONE_BATCH = ["--trainer.max_epochs", "1", "--trainer.accelerator", "cpu", "--trainer.devices", "1"]
ONE_BATCH += ["--data.num_workers", "0", "--pictures.images", "1", "--trainer.check_val_every_n_epoch", "1"]


def fake_data(root: Path, config: dict) -> None:
    """Files as the config's FolderData declares them: folders, mask values, bands."""
    options = config["data"]["dataset"]["init_args"]
    values = tuple(spec["value"] if isinstance(spec, dict) else spec for spec in options["classes"].values())
    folder = root / Path(options["root"]).name
    make_folder(folder, {"train": 9, "val": 2}, size=(64, 64), values=values)
    for path in folder.rglob("masks/*.png"):
        if options.get("instances"):
            write_image(path.parents[1] / "instances" / path.name, _pixels(path))
        if options.get("channels", 3) == 1:
            image = path.parents[1] / "images" / path.name
            write_image(image, _pixels(image)[..., 0])


def _pixels(path: Path):
    from PIL import Image

    return np.array(Image.open(path))


def slow_part(path: Path) -> object:
    """Those of models, data sets and experiments take minutes together."""
    slow = path.parent.name in ("model", "data", "experiment")
    return pytest.param(path, id=str(path.relative_to(ROOT / "configs")), marks=[pytest.mark.slow] * slow)


@pytest.mark.parametrize("path", map(slow_part, CONFIGS))
def test_runs_one_batch(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = yaml.safe_load(path.read_text())
    monkeypatch.setenv("SEG_DATA", str(tmp_path / "data"))
    args = ["--config", str(path), "--name", "run"]
    if path.stem == "pos_weight":  # for two classes
        binary = ROOT / "configs/data/nuclei.yaml"
        config |= yaml.safe_load(binary.read_text())
        args = ["--config", str(binary), *args]
    if "dataset" in config.get("data", {}) and "root" in config["data"]["dataset"]["init_args"]:
        MAKERS.get(path.stem, lambda root: fake_data(root, config))(tmp_path / "data")
        args += ["--data.crop", "32", "--data.batch_size", "8"]  # of nine images
    else:
        args += ["--data.dataset.train", "4", "--data.dataset.val", "2", "--data.dataset.test", "2"]
        crop = config.get("data", {}).get("crop") or 0
        size = max(48, int(np.max(crop)) // 3)  # a crop of four times the images is refused
        args += ["--data.dataset.size", str(size), "--data.batch_size", "4"]
    if path.parent.name != "trainer":  # the net in a size for a test: as deep, but narrow
        net = config.get("model", {}).get("net", {}).get("init_args", {})
        if "architecture" not in net:
            args += ["--model.net.widths", str([2 * 2**level for level in range(len(net.get("widths", [0] * 3)))])]
        if "encoder_weights" in net:  # no download in a test
            args += ["--model.net.encoder_weights", "null"]
    if config.get("model", {}).get("compile"):  # half a minute; of other tests
        args += ["--model.compile", "false"]
    cli = train(*args, *ONE_BATCH)
    assert cli.trainer.global_step == 1
    if not cli.trainer.overfit_batches:  # debug.yaml does not test
        assert (tmp_path / "runs/run/summary.json").is_file()
    assert (tmp_path / "runs/run/checkpoints/best.ckpt").is_file()


def test_every_choice_of_the_sweep_is_one(capsys: pytest.CaptureFixture[str]) -> None:
    """Its options and their values are taken, as the agent gives them: --option=value."""
    sweep = yaml.safe_load(SWEEP.read_text())
    assert (ROOT / sweep["program"]).is_file()
    choices = {key: one.get("values", [one.get("min")]) for key, one in sweep["parameters"].items()}
    for number in range(max(map(len, choices.values()))):
        words = [f"--{key}={values[number % len(values)]}" for key, values in choices.items()]
        with pytest.raises(SystemExit, match="0"):
            SegmentationCLI([*words, "--print_config"])
    assert sweep["metric"]["name"] == "val/miou"


def test_overlays_hold_differences_only() -> None:
    """No overlay repeats what default.yaml says already, but where it names the class whose options it gives."""
    default = _flat(yaml.safe_load((ROOT / "configs/default.yaml").read_text()))
    for path in CONFIGS:
        if path.name == "default.yaml":
            continue
        overlay = _flat(yaml.safe_load(path.read_text()))
        same = [k for k, v in overlay.items() if k in default and default[k] == v and not k.endswith("class_path")]
        explicit = {
            "trainer.devices",
            "data.batch_size",
            *(f"model.net.init_args.{key}" for key in ("upsample", "deep_supervision")),  # data/ has other ones
            *(f"model.loss.init_args.{key}" for key in ("class_weights", "pos_weight")),
        }
        assert set(same) <= explicit, f"{path}: {same}"  # but for what an overlay's name promises


def test_default_is_complete() -> None:
    """Every option of data and model stands in default.yaml."""
    import inspect

    config = yaml.safe_load((ROOT / "configs/default.yaml").read_text())
    for section, cls in (("data", SegmentationDataModule), ("model", SegmentationModule)):
        options = set(inspect.signature(cls).parameters) - {"labels"}  # linked from the data
        assert options == set(config[section]), section


def _flat(config: dict) -> dict:
    def walk(node: object, prefix: str):
        if isinstance(node, dict):
            for key, value in node.items():
                yield from walk(value, f"{prefix}.{key}" if prefix else key)
        else:
            yield prefix, node

    assert isinstance(config, dict | Namespace)
    return dict(walk(config, ""))
