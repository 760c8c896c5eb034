"""More classes than a byte can hold, and mask values beyond that, through every job."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from conftest import write_image
from segmentation.checkpoint import read_checkpoint
from segmentation.data import Labels
from segmentation.errors import InputError
from segmentation.inference.evaluate import evaluate
from segmentation.inference.export import export
from segmentation.inference.predict import predict
from segmentation.module import SegmentationModule

CPU = ["--trainer.accelerator", "cpu", "--data.num_workers", "0"]


def checkpoint_of(values: dict[str, int | str], trained: Path, folder: Path) -> Path:
    """`trained` with other classes, name -> mask value, and heads of random weights that predict them all; and data of
    these classes. (To train with hundreds of classes takes a minute.)"""
    rng = np.random.default_rng(0)
    labels = Labels.parse(values)
    (folder / "data/masks").mkdir(parents=True)
    for number in range(4):
        index = rng.integers(0, len(values), (32, 32))
        write_image(folder / f"data/images/{number}.png", rng.integers(0, 256, (32, 32, 3), dtype=np.uint8))
        if labels.by_color:
            write_image(folder / f"data/masks/{number}.png", labels.decode(index))
        else:
            np.save(folder / f"data/masks/{number}.npy", np.array(list(values.values()))[index])
    checkpoint = read_checkpoint(trained)
    hparams, state = checkpoint["hyper_parameters"], checkpoint["state_dict"]
    hparams["labels"] = {**labels.as_dict(), "dtype": "uint8"}
    hparams["net"]["init_args"]["num_classes"] = labels.num_outputs
    torch.manual_seed(0)
    for key in state:
        if key.startswith("net.heads"):
            state[key] = torch.randn(labels.num_outputs, *state[key].shape[1:])
    options = {"root": str(folder / "data"), "classes": values}
    checkpoint["datamodule_hyper_parameters"]["dataset"] = {
        "class_path": "segmentation.data.FolderData",
        "init_args": options,
    }
    torch.save(checkpoint, folder / "model.ckpt")
    return folder / "model.ckpt"


def indices(checkpoint: Path, image: str) -> np.ndarray:
    """Class indices (H, W) that the net says."""
    module = SegmentationModule.load_from_checkpoint(checkpoint)
    with Image.open(image) as picture, torch.inference_mode():
        pixels = torch.from_numpy(np.array(picture)).permute(2, 0, 1)
        return module.classify(module(pixels[None]))[0].numpy()


def read(path: str) -> np.ndarray:
    with Image.open(path) as image:
        return np.array(image)


@pytest.fixture(scope="module")
def three_hundred(trained: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return checkpoint_of({f"c{number}": number for number in range(300)}, trained, tmp_path_factory.mktemp("many"))


def test_a_predicted_mask_holds_every_class(three_hundred: Path) -> None:
    images = str(three_hundred.parent / "data/images")
    predict([str(three_hundred), images, "out", "--instances", "--overlay", "--accelerator", "cpu"])
    expected = indices(three_hundred, f"{images}/0.png")
    assert expected.max() > 255
    assert (read("out/0.png") == expected).all()
    with pytest.raises(InputError, match="--format palette holds 256 colours, for 300 classes"):
        predict([str(three_hundred), images, "other", "--format", "palette", "--accelerator", "cpu"])


@pytest.mark.slow
def test_evaluation_counts_every_class(three_hundred: Path) -> None:
    evaluate([str(three_hundred), "--output", "out.json", *CPU])
    rows = Path("out_per_image.csv").read_text().splitlines()
    predicted = {row.split(",")[1] for row in rows[1:] if int(row.split(",")[3])}  # false positives
    assert any(int(name[1:]) > 255 for name in predicted)


@pytest.mark.slow
@pytest.mark.parametrize("form", ["torch_export", "onnx"])
def test_an_exported_mask_holds_every_class(three_hundred: Path, form: str) -> None:
    path = export([str(three_hundred), "--format", form, "--output", {"onnx": "a.onnx"}.get(form, "a.pt2"), *CPU[2:]])
    image = str(three_hundred.parent / "data/images/0.png")
    pixels = torch.from_numpy(read(image)).permute(2, 0, 1)[None].contiguous()
    if form == "onnx":
        import onnxruntime

        logits, mask = onnxruntime.InferenceSession(path).run(None, {"image": pixels.numpy()})
        assert mask.dtype == np.int32
    else:
        logits, mask = (found.numpy() for found in torch.export.load(path).module()(pixels))
    assert mask.max() > 255
    assert (mask == logits.argmax(axis=1)).all()
    assert (mask == indices(three_hundred, image)).mean() > 0.999


@pytest.mark.parametrize(
    "values", [{f"c{n}": n for n in range(256)}, {f"c{n}": f"#{n:02X}0000" for n in range(256)}, {"a": 7, "b": 1000}]
)
def test_a_palette_of_as_many_as_it_holds(trained: Path, tmp_path: Path, values: dict[str, int | str]) -> None:
    checkpoint = checkpoint_of(values, trained, tmp_path)
    predict([str(checkpoint), "data/images", "palette", "--format", "palette", "--accelerator", "cpu"])
    predict([str(checkpoint), "data/images", "index", "--accelerator", "cpu"])
    labels, index = Labels.parse(values), indices(checkpoint, "data/images/0.png")
    with Image.open("palette/0.png") as picture:
        assert picture.mode == "P"
        assert (np.array(picture) == index).all()
        assert (np.array(picture.convert("RGB")) == labels.palette[index]).all()
    assert (read("index/0.png") == labels.decode(index)).all()


def test_mask_values_that_no_png_holds(trained: Path, tmp_path: Path) -> None:
    """Floor plans and land parcels have such. The masks of a palette hold class indices, which fit."""
    checkpoint = checkpoint_of({"water": -1, "road": 70000, "house": 4}, trained, tmp_path)
    with pytest.raises(InputError, match=r"^[^\n]*--format index[^\n]*-1[^\n]*--format palette[^\n]*$"):
        predict([str(checkpoint), "data/images", "index", "--accelerator", "cpu"])
    predict([str(checkpoint), "data/images", "palette", "--format", "palette", "--accelerator", "cpu"])
    assert (read("palette/0.png") == indices(checkpoint, "data/images/0.png")).all()


@pytest.mark.parametrize("values", [[0, 255], [0, 256], [-1, 255], [0, 70000], [-70000, 2**33]])
def test_values_come_back_as_they_are(values: list[int]) -> None:
    labels = Labels.parse({"a": values[0], "b": values[1]})
    index = np.array([[0, 1], [1, 0]], np.uint8)
    assert labels.decode(index).tolist() == [values, values[::-1]]
