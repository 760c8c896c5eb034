"""Public data sets in the form in which their owners keep them, tiny: brought in by YAML alone."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from scipy.io import savemat

from conftest import TINY_RUN, documented_options, train, write_image
from segmentation.doctor import diagnose
from segmentation.inference.predict import predict

RNG = np.random.default_rng(0)


def write_livecell(root: Path) -> None:
    """Gray TIFFs of two splits in one folder, of the third in another; a COCO file for each split."""
    for split, folder in (("train", "train_val"), ("val", "train_val"), ("test", "test")):
        images, annotations = [], []
        for number in range(4 if split == "train" else 2):
            name = f"{'A172' if number % 2 else 'BV2'}_Phase_{split}_{number}.tif"
            pixels = RNG.integers(90, 160, (52, 70), dtype=np.uint8)
            write_image(root / f"images/livecell_{folder}_images/{name}", pixels)
            images.append({"id": number, "file_name": name, "height": 52, "width": 70})
            for left in (5, 25, 45):
                outline = [left, 5, left + 14, 8, left + 16, 30, left + 4, 28]
                one = {"id": len(annotations), "image_id": number, "category_id": 1, "iscrowd": 0}
                annotations.append({**one, "segmentation": [outline], "bbox": [left, 5, 16, 25], "area": 300.0})
        categories = [{"id": 1, "name": "cell", "supercategory": "cell"}]
        content = {"images": images, "annotations": annotations, "categories": categories}
        path = root / f"annotations/LIVECell/livecell_coco_{split}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(content))


def write_sbd(root: Path) -> None:
    """Photographs, classes and instances as fields of MATLAB structures, lists of names."""
    for folder in ("img", "cls", "inst"):
        (root / folder).mkdir(parents=True)
    names = [f"2008_00000{number}" for number in range(6)]
    for name in names:
        Image.fromarray(RNG.integers(0, 255, (50, 64, 3), dtype=np.uint8)).save(root / f"img/{name}.jpg")
        mask = np.zeros((50, 64), np.uint8)
        mask[10:30, 5:40] = 15
        mask[30:45, 30:60] = 7
        edges = np.empty((20, 1), object)
        edges[:] = [[np.zeros((2, 2))]] * 20
        fields = {"Boundaries": edges, "CategoriesPresent": np.array([[7], [15]], np.uint8)}
        savemat(root / f"cls/{name}.mat", {"GTcls": {"Segmentation": mask, **fields}})
        ids = (mask == 15) + 2 * (mask == 7)
        savemat(root / f"inst/{name}.mat", {"GTinst": {"Segmentation": ids.astype(np.uint8), **fields}})
    (root / "train.txt").write_text("\n".join(names[:4]) + "\n")
    (root / "val.txt").write_text("\n".join(names[4:]) + "\n")


#: As in the table of docs/data.md.
SETS: dict[str, tuple[Callable[[Path], None], list[int]]] = {
    "LIVECell": (write_livecell, [0, 1]),
    "SBD": (write_sbd, [0, 7, 15]),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", SETS)
def test_the_doctors_overlay_trains_and_predicts(name: str, place: Path) -> None:
    write, values = SETS[name]
    write(place / "data")
    options = []
    for key, value in documented_options(name).items():
        options += [f"--data.dataset.{key}", json.dumps(value) if isinstance(value, dict) else str(value)]
    problems = diagnose(["--data.dataset", "FolderData", "--data.dataset.root", "data", *options])
    stops = [problem.text for problem in problems if problem.stops]
    assert len(stops) == 1, stops
    assert "Fix: classes:" in stops[0]
    train("--config", "doctor/overlay.yaml", *TINY_RUN, "--trainer.max_epochs", "1", "--name", "run")
    images = next(path for path in (Path("data/img"), Path("data/images/livecell_test_images")) if path.is_dir())
    predict(["runs/run/checkpoints/best.ckpt", str(images), "out", "--accelerator", "cpu"])
    for path in Path("out").glob("*.png"):
        assert set(np.unique(np.asarray(Image.open(path))).tolist()) <= set(values)
