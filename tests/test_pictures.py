"""Grids, tables and plots: known pixels, known numbers, and every size, channel count and class count of a user."""

import io
import os
import subprocess
import sys
from pathlib import Path

import matplotlib.style
import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console
from skimage.color import deltaE_ciede2000, rgb2lab

from conftest import ROOT
from segmentation.data.labels import IGNORE_INDEX, Labels
from segmentation.visualize import (
    IGNORED,
    MISSED,
    WRONG,
    confusion_figure,
    iou_table,
    panels,
    sample_grid,
    save_png,
    to_rgb,
)

BINARY = Labels.parse({"background": {"value": 0, "color": "#102030"}, "cell": {"value": 255, "color": "#F0C040"}})
THREE = Labels.parse({"sky": 0, "road": 1, "car": 2})
MANY = Labels.parse({f"class {index}": index for index in range(150)})


def gray_image(height: int, width: int) -> torch.Tensor:
    return torch.full((3, height, width), 90, dtype=torch.uint8)


def reopened(path: Path) -> Image.Image:
    return Image.open(io.BytesIO(path.read_bytes()))


def count_color(picture: np.ndarray, color: tuple[int, int, int]) -> int:
    return int((picture == color).all(-1).sum())


# to_rgb


def test_uint8_is_shown_as_it_is() -> None:
    image = torch.randint(0, 256, (3, 5, 7), dtype=torch.uint8)
    assert np.array_equal(to_rgb(image), image.permute(1, 2, 0).numpy())


@pytest.mark.parametrize(("channels", "shown"), [(1, [0, 0, 0]), (2, [0, 1, 0]), (3, [0, 1, 2]), (5, [0, 1, 2])])
@pytest.mark.parametrize("dtype", [torch.uint8, torch.uint16, torch.float32])
def test_any_number_of_channels_of_any_type(channels: int, shown: list[int], dtype: torch.dtype) -> None:
    image = torch.stack([torch.arange(12).reshape(3, 4) * (channel + 1) for channel in range(channels)]).to(dtype)
    rgb = to_rgb(image)
    assert rgb.shape == (3, 4, 3)
    assert rgb.dtype == np.uint8
    for color, channel in enumerate(shown):
        assert np.array_equal(rgb[..., color], to_rgb(image[channel : channel + 1])[..., 0])


@pytest.mark.parametrize("scale", [1, 1000])
def test_stretch_runs_from_the_first_to_the_last_percentile(scale: int) -> None:
    channel = torch.arange(0, 101 * scale, scale, dtype=torch.float32).reshape(1, 1, 101)
    row = to_rgb(channel)[0, :, 0]
    assert row[:2].tolist() == [0, 0]
    assert row[-2:].tolist() == [255, 255]
    assert row[50] == 128  # half-way, 127.5, rounded to even


def test_constant_sparse_and_undefined_floats() -> None:
    assert to_rgb(torch.full((1, 4, 4), 7.0)).max() == 0
    sparse = torch.zeros(1, 50, 50)
    sparse[0, 3, 3] = 2.0
    assert to_rgb(sparse)[3, 3, 0] == 255
    holes = torch.tensor([[[float("nan"), 0.0, 1.0, float("inf")]]])
    assert to_rgb(holes)[0, :, 0].tolist() == [0, 0, 255, 255]
    assert to_rgb(torch.full((1, 2, 2), float("nan"))).max() == 0


# panels


def quadrants() -> tuple[np.ndarray, np.ndarray]:
    """2x2: right, false positive; false negative, ignored (and predicted as foreground)."""
    return np.array([[1, 0], [1, IGNORE_INDEX]]), np.array([[1, 1], [0, 1]])


def test_masks_have_the_class_colours_and_errors_theirs() -> None:
    image, truth, prediction, errors = panels(gray_image(2, 2), *quadrants(), BINARY).values()
    background, cell = (0x10, 0x20, 0x30), (0xF0, 0xC0, 0x40)
    assert (image == 90).all()
    assert truth.reshape(-1, 3).tolist() == [[*cell], [*background], [*cell], [*IGNORED]]
    assert prediction.reshape(-1, 3).tolist() == [[*cell], [*cell], [*background], [*cell]]
    assert errors[0, 1].tolist() == [*WRONG]
    assert errors[1, 0].tolist() == [*MISSED]
    for at in ((0, 0), (1, 1)):  # right; ignored
        red, green, blue = errors[at].tolist()
        assert red == green == blue < 128


def test_truth_over_image_is_half_of_each() -> None:
    rows = torch.tensor([0, 255], dtype=torch.uint8).view(1, 2, 1).expand(3, 2, 2)  # black above white
    image, truth, both = panels(rows, np.array([[0, 1], [0, 1]]), None, BINARY).values()
    assert np.array_equal(both, image // 2 + truth // 2)


def test_what_is_right_is_gray_among_the_errors() -> None:
    red = torch.tensor([255, 0, 0], dtype=torch.uint8).view(3, 1, 1).expand(3, 2, 2)
    truth = torch.tensor([[0, 1], [1, 0]])
    errors = panels(red, truth, torch.tensor([[0, 0], [1, 0]]), THREE)["Errors"]
    right = errors[(truth == torch.tensor([[0, 0], [1, 0]])).numpy()]
    assert (right == right[:, :1]).all()
    assert errors[0, 1].tolist() == [*WRONG]


def test_multiclass_errors_have_one_colour_whatever_the_class() -> None:
    truth = torch.tensor([[0, 1], [2, 2]])
    errors = panels(gray_image(2, 2), truth, torch.tensor([[1, 0], [0, 2]]), THREE)["Errors"]
    assert count_color(errors, WRONG) == 3


@pytest.mark.parametrize(
    ("height", "width", "shown"),
    [(16, 16, (16, 16)), (1500, 2000, (375, 500)), (400, 100, (400, 100)), (1, 700, (1, 350))],
)
def test_large_ones_are_thinned_out_and_classes_never_blended(height: int, width: int, shown: tuple[int, int]) -> None:
    truth = np.random.default_rng(0).integers(0, 3, (height, width))
    found = panels(gray_image(height, width), truth, truth, THREE)
    assert [panel.shape for panel in found.values()] == [(*shown, 3)] * 4
    step = -(-max(height, width) // 600)
    assert np.array_equal(found["Truth"], THREE.palette[truth[::step, ::step]])


# sample_grid


def made(sizes: list[tuple[int, int]], truth: int = 0, prediction: int = 1) -> list[dict]:
    """Samples of these sizes, each of one class."""
    return [
        {
            "image": gray_image(*size),
            "mask": np.full(size, truth),
            "prediction": torch.full(size, prediction),
            "name": f"name {number}",
            "miou": 0.5,
        }
        for number, size in enumerate(sizes)
    ]


def test_grid_of_uneven_images() -> None:
    samples = made([(16, 16), (90, 30), (600, 800), (1, 2000)])
    for sample, name, miou in zip(samples, ("a", "b" * 500, "c", "$d$"), (0.5, float("nan"), 1.0, 0.25), strict=True):
        sample |= {"name": name, "miou": miou}
    grid = np.asarray(sample_grid(samples, BINARY, "title"))
    side = 3 * 110  # pixels of a square panel
    areas = side**2 * np.array([1, 1 / 3, 3 / 4])
    for color in (90, 90, 90), tuple(BINARY.palette[0]), tuple(BINARY.palette[1]), WRONG:
        assert count_color(grid, color) == pytest.approx(areas.sum(), rel=0.06)  # and a square of the legend
    assert 0 < count_color(grid, MISSED) < 900  # the legends' alone


@pytest.mark.slow
def test_rows_have_one_width_and_height() -> None:
    """A tall grid has its legend twice."""
    one, two, six, nine = (sample_grid(made([(8, 8)] * number), THREE) for number in (1, 2, 6, 9))
    assert one.width == two.width == nine.width
    assert nine.height - six.height == pytest.approx(3 * (two.height - one.height), abs=8)
    lowest = []
    for grid in (two, six):
        widths = (np.asarray(grid) == WRONG).all(axis=-1).sum(axis=1)  # of the red in each line of pixels
        lowest.append(widths[widths > 0][-1])
    assert lowest[0] > 300 > lowest[1]  # a panel; a legend


def test_the_users_style_changes_no_grid() -> None:
    samples = made([(40, 40)] * 2)
    with matplotlib.style.context(ROOT / "notebooks/notebook.mplstyle"):
        styled = np.asarray(sample_grid(samples, THREE, "a title"))
    assert (styled == np.asarray(sample_grid(samples, THREE, "a title"))).all()


def test_the_legend_lists_the_classes_shown() -> None:
    few = np.arange(4).reshape(2, 2)
    every = np.arange(150).reshape(10, 15)
    short, long = (
        sample_grid([{"image": gray_image(*m.shape), "mask": m, "prediction": m, "name": "x"}], MANY)
        for m in (few, every)
    )
    assert count_color(np.asarray(short), (*MANY.palette[3],)) > 100
    assert count_color(np.asarray(short), (*MANY.palette[140],)) == 0
    assert count_color(np.asarray(long), (*MANY.palette[140],)) > 100
    assert long.height > short.height + 200


def test_long_names_stay_apart_in_the_legend() -> None:
    """They are cut in the middle, and a grid is no wider for them."""
    short, long = (
        sample_grid(
            [{"image": gray_image(1, 19), "mask": np.arange(19)[None], "name": "x", "prediction": np.arange(19)[None]}],
            Labels.parse({f"{start} {index}": index for index in range(19)}),
        )
        for start in ("name", "name " * 12)
    )
    assert long.width == short.width
    assert long.height > short.height
    labels = Labels.parse({f"{'name ' * 12}{index:02d}": index for index in range(19)})
    ticks = [text.get_text() for text in confusion_figure(np.eye(19), labels).axes[0].get_yticklabels()]
    assert len(set(ticks)) == 19
    assert {len(text) for text in ticks} == {41}
    assert all("…" in text for text in ticks)


def test_letters_without_a_font_are_said_once_in_one_line(tmp_path: Path) -> None:
    """Where no font is but Matplotlib's own."""
    code = (
        "import numpy as np, matplotlib.font_manager as fonts\n"
        "fonts.get_font_names = lambda: []\n"
        "from segmentation.data.labels import Labels\n"
        "from segmentation.visualize import confusion_figure, save_png\n"
        "from pathlib import Path\n"
        "labels = Labels.parse({'道路': 0, '하늘': 1})\n"
        "for name in 'ab': save_png(confusion_figure(np.eye(2), labels), Path(name))\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src")}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("fonts-noto-cjk") == 1
    assert "Glyph" not in done.stderr


# the palette

RED = np.array(WRONG) / 255

#: Simulation of colour blindness, in linear RGB (Machado et al. 2009, severity 1).
BLINDNESS = {
    "protanopia": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
    "deuteranopia": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]],
}


def distances(colors: np.ndarray, others: np.ndarray) -> np.ndarray:
    """CIEDE2000 between all pairs of colours in 0..1; 1 is just visible."""
    found = deltaE_ciede2000(rgb2lab(colors)[:, None], rgb2lab(others)[None])
    found[found == 0] = np.inf
    return found


def seen(colors: np.ndarray, matrix: list[list[float]]) -> np.ndarray:
    linear = np.where(colors <= 0.04045, colors / 12.92, ((colors + 0.055) / 1.055) ** 2.4) @ np.transpose(matrix)
    linear = linear.clip(0, 1)
    return np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)


@pytest.mark.parametrize("classes", [2, 8, 20, 40])
def test_own_classes_have_colours_apart(classes: int) -> None:
    colors = MANY.palette[:classes] / 255
    assert distances(colors, RED[None]).min() > 30
    assert distances(colors, colors).min() > 13
    assert len({tuple(color) for color in MANY.palette}) == 150
    assert distances(MANY.palette / 255, RED[None]).min() > 15


@pytest.mark.parametrize("kind", BLINDNESS)
def test_colour_blind_readers_tell_the_first_eight_apart(kind: str) -> None:
    colors = seen(MANY.palette[:8] / 255, BLINDNESS[kind])
    assert distances(colors, colors).min() > 11


# confusion_figure


def cell_texts(figure) -> dict[tuple[int, int], str]:
    """(row, column) -> text."""
    return {text.get_position()[::-1]: text.get_text() for text in figure.axes[0].texts}


def test_percentages_and_mean_iou_of_a_known_matrix() -> None:
    figure = confusion_figure(torch.tensor([[90, 10, 0], [25, 75, 0], [0, 0, 0]]), THREE)  # IoU 90/125, 75/110
    assert cell_texts(figure) == {(0, 0): "90.0", (0, 1): "10.0", (1, 0): "25.0", (1, 1): "75.0"}
    shares = figure.axes[0].images[0].get_array()
    assert np.ma.getmaskarray(shares)[2].all()
    assert "0.701" in figure.axes[0].get_title(loc="left")  # the absent class is not part of the mean


def test_a_class_that_is_only_predicted_has_iou_zero() -> None:
    figure = confusion_figure(np.array([[60, 40, 0], [0, 0, 0], [0, 0, 50]]), THREE)
    assert "0.533" in figure.axes[0].get_title(loc="left")  # of 0.6, 0 and 1


@pytest.mark.parametrize("classes", [2, 21, 40])
def test_an_empty_matrix_is_drawn(classes: int, tmp_path: Path) -> None:
    labels = Labels.parse({f"class ${index}$": index for index in range(classes)})  # not read as mathematics
    figure = confusion_figure(np.zeros((classes, classes)), labels)
    save_png(figure, tmp_path / "confusion.png")
    assert not figure.axes[0].texts


def test_cells_of_many_classes_hold_no_text() -> None:
    figure = confusion_figure(np.eye(150), MANY)
    assert not figure.axes[0].texts
    assert [label.get_text() for label in figure.axes[0].get_yticklabels()] == MANY.names


# iou_table


def rendered(table) -> dict[str, list[str]]:
    """First cell -> the other cells."""
    console = Console(file=io.StringIO(), width=120)
    console.print(table)
    lines = [[part.strip() for part in line.strip("│").split("│")] for line in console.file.getvalue().splitlines()]
    return {cells[0].removeprefix("■ "): cells[1:] for cells in lines if len(cells) > 1}


def test_table_of_a_binary_task() -> None:
    """Both classes, of which mIoU is the mean."""
    metrics = {"test/miou": 0.6, "test/pixel_accuracy": 0.8, "test/miou_per_image": float("nan")}
    rows = rendered(iou_table(metrics, BINARY, "test", torch.tensor([[60, 0], [20, 20]])))
    assert rows["background"] == ["0.7500", "0.8571", "0.7500", "1.0000", "60.00%", "█" * 7 + "▌"]
    assert rows["cell"] == ["0.5000", "0.6667", "1.0000", "0.5000", "40.00%", "█" * 5]
    assert rows["mIoU"][0] == "0.6000"
    assert rows["mIoU per image"][0] == "-"
    assert rows["pixel accuracy"][0] == "0.8000"


def test_table_of_absent_classes() -> None:
    labels = Labels.parse({"[red]sky": 0, "road": 1, "car": 2})  # a name is never read as markup
    rows = rendered(iou_table({}, labels, "val", torch.tensor([[75, 0, 0], [0, 0, 0], [25, 0, 0]])))
    assert rows["[red]sky"] == ["0.7500", "0.8571", "0.7500", "1.0000", "75.00%", "█" * 7 + "▌"]
    assert rows["road"] == ["-", "-", "-", "-", "0.00%", ""]
    assert rows["car"] == ["0.0000", "0.0000", "-", "0.0000", "25.00%", ""]
    assert rows.keys() == {*labels.names}


def test_long_names_do_not_split_numbers() -> None:
    labels = Labels.parse({f"a class whose name is longer than others' are {index}": index for index in range(19)})
    console = Console(file=io.StringIO(), width=80)
    console.print(iou_table({}, labels, "val", torch.eye(19)))
    assert console.file.getvalue().count("1.0000 │ 1.0000 │ 1.0000 │ 1.0000 │") == 19
    assert max(map(len, console.file.getvalue().splitlines())) <= 80


# save_png


def test_save_replaces_and_leaves_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "pictures" / "grid.png"
    save_png(Image.new("RGB", (4, 4), "red"), path)
    save_png(Image.new("RGB", (6, 5), "blue"), path)
    assert reopened(path).size == (6, 5)
    save_png(confusion_figure(np.eye(2), BINARY), path)
    assert reopened(path).format == "PNG"
    assert [file.name for file in path.parent.iterdir()] == ["grid.png"]


def test_a_failed_save_keeps_the_old_picture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "grid.png"
    save_png(Image.new("RGB", (4, 4)), path)

    def fail(self, file, **options) -> None:
        Path(file).write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(Image.Image, "save", fail)
    with pytest.raises(OSError, match="disk full"):
        save_png(Image.new("RGB", (9, 9)), path)
    assert reopened(path).size == (4, 4)
    assert [file.name for file in tmp_path.iterdir()] == ["grid.png"]
