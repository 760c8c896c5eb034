"""Ensembles: several checkpoints predict and are tested as one net, whose probabilities are their mean."""

import copy
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from conftest import ROOT, TINY, train, write_image
from segmentation.checkpoint import read_checkpoint
from segmentation.data import ShapesData
from segmentation.errors import InputError
from segmentation.inference.evaluate import evaluate
from segmentation.inference.predict import predict
from segmentation.inference.predictor import Predictor
from segmentation.metrics import confusion_counts, mean_iou

CPU = ["--trainer.accelerator", "cpu", "--data.num_workers", "0", "--trainer.enable_progress_bar", "false"]


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A net of another kind and stride, trained on fewer images, and so normalised otherwise."""
    folder = tmp_path_factory.mktemp("other")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("WANDB_MODE", "disabled")
        patch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
        train(*TINY, "--data.dataset.train", "4", "--name", "run")
    return folder / "runs/run/checkpoints/best.ckpt"


@pytest.fixture
def image() -> np.ndarray:
    """Of sides at which the tiles of both nets lie alike: multiples of the larger stride."""
    return np.random.default_rng(0).integers(0, 256, (56, 92, 3), dtype=np.uint8)


@pytest.mark.parametrize("options", [{}, {"tile": 32}, {"tta": "flips"}])
def test_probabilities_are_the_mean_of_the_nets(options: dict, trained: Path, other: Path, image: np.ndarray) -> None:
    both = Predictor([trained, str(other)], "cpu", **options)(image)
    first = Predictor(trained, "cpu", **options)(image)
    second = Predictor(other, "cpu", **options)(image)
    assert not np.allclose(first.probabilities, second.probabilities, atol=0.01)
    mean = (first.probabilities + second.probabilities) / 2
    np.testing.assert_allclose(both.probabilities, mean, atol=1e-6)
    clear = np.diff(np.sort(mean, axis=0)[-2:], axis=0)[0] > 1e-5  # rounding decides between classes that are as likely
    assert clear.mean() > 0.5
    assert np.array_equal(both.mask[clear], mean.argmax(axis=0)[clear])  # these classes stand for their own indices


@pytest.mark.parametrize("name", ["nuclei-unet", "nuclei-unet3plus", "nuclei-unet-plus-plus"])
def test_any_net_is_read_from_disk(name: str, image: np.ndarray) -> None:
    paths = [ROOT / "weights" / name, ROOT / "weights/nuclei-unet"]
    held = Predictor(paths, "cpu", "32-true")(image)
    read = Predictor(paths, "cpu", "32-true", from_disk=True)(image)
    np.testing.assert_allclose(read.probabilities, held.probabilities, atol=1e-6)


def test_nets_from_disk_predict_the_same(trained: Path, other: Path, image: np.ndarray) -> None:
    held = Predictor([trained, other], "cpu", tta="flips")(image)
    predictor = Predictor([trained, other], "cpu", tta="flips", from_disk=True)
    np.testing.assert_allclose(predictor(image).probabilities, held.probabilities, atol=1e-6)
    assert not any(weight.numel() for weight in predictor.module.net.parameters())  # nothing is held
    options = [str(trained), *CPU, "--tile", "32", "--ensemble", str(other)]
    assert evaluate([*options, "--from-disk"]) == pytest.approx(evaluate(options), abs=1e-6, nan_ok=True)
    write_image(Path("photos/a.png"), image)
    predict([str(trained), "photos", "masks", "--accelerator", "cpu", "--from-disk", "--ensemble", str(other)])
    assert Path("masks/a.png").is_file()
    for job in (predict, evaluate):
        with pytest.raises(InputError, match="--from-disk belongs to --ensemble"):
            job([str(trained), *(["photos", "new"] if job is predict else CPU), "--from-disk"])


@pytest.mark.parametrize("options", [{}, {"tile": 32}])
def test_a_checkpoint_twice_is_the_checkpoint(options: dict, trained: Path, image: np.ndarray) -> None:
    once = Predictor(trained, "cpu", **options)(image)
    twice = Predictor([trained, trained], "cpu", **options)(image)
    assert np.array_equal(once.mask, twice.mask)
    np.testing.assert_allclose(once.probabilities, twice.probabilities, atol=1e-6)


def test_a_checkpoint_twice_has_the_same_figures(other: Path) -> None:
    once = evaluate([str(other), *CPU])
    twice = evaluate([str(other), "--ensemble", str(other), *CPU])
    assert twice.pop("loss") == pytest.approx(once.pop("loss"), rel=1e-5)  # of the logarithms of probabilities
    assert repr(twice) == repr(once)


def test_eval_has_the_figures_of_the_masks_that_predict_writes(trained: Path, other: Path) -> None:
    data = ShapesData(train=12, val=5, test=5, size=48)
    samples = [data.load("test", index) for index in range(5)]
    for index, sample in enumerate(samples):
        write_image(Path(f"photos/{index}.png"), sample["image"].permute(1, 2, 0).numpy())
    ensemble = ["--ensemble", str(other), str(trained)]
    assert predict([str(trained), "photos", "masks", "--accelerator", "cpu", *ensemble]) == 5
    masks = [torch.from_numpy(np.array(Image.open(f"masks/{index}.png"))).long() for index in range(5)]
    truth = torch.stack([sample["mask"] for sample in samples])
    counts = confusion_counts(torch.stack(masks), truth, 5)

    found = evaluate([str(trained), *CPU, "--surface-distances", *ensemble])
    assert found["miou"] == float(mean_iou(counts.sum(dim=0)))
    assert found["miou"] != evaluate([str(trained), *CPU])["miou"]
    assert found["mean_hd95"] >= found["mean_assd"] > 0

    assert predict([str(trained), "photos", "masks", "--accelerator", "cpu", *ensemble]) == 0
    with pytest.raises(InputError, match="masks of another checkpoint"):
        predict([str(trained), "photos", "masks", "--accelerator", "cpu"])


def test_nets_of_other_data_are_refused(trained: Path, image: np.ndarray) -> None:
    checkpoint = read_checkpoint(trained)
    for key, value in (
        ("names", ["a", "b", "c", "d", "e"]),
        ("dtype", "uint16"),
        ("values", [[5], [6], [7], [8], [9]]),
    ):
        changed = copy.deepcopy(checkpoint)
        changed["hyper_parameters"]["labels"][key] = value
        torch.save(changed, "changed.ckpt")
        with pytest.raises(InputError, match=rf"^changed\.ckpt: was trained with other {key} than the first"):
            Predictor([trained, "changed.ckpt"], "cpu")
    write_image(Path("photos/a.png"), image)
    with pytest.raises(InputError, match=r"^changed\.ckpt: "):
        predict([str(trained), "photos", "masks", "--ensemble", "changed.ckpt"])
    with pytest.raises(InputError, match=r"^none\.ckpt: no such checkpoint"):
        evaluate([str(trained), "--ensemble", "none.ckpt", *CPU])
    assert not Path("masks").exists()
