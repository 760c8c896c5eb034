"""report.html: what a run or a data set is like, on one page that needs no server and no network.

Its template is page.html: plots are SVG that it draws from numbers, and the confusion matrix is a table.
"""

import base64
import io
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment
from PIL import Image
from torch import Tensor

from segmentation.data.labels import Labels
from segmentation.data.writing import write_text
from segmentation.errors import readable
from segmentation.metrics import class_scores
from segmentation.visualize import OVERALL, Shown, legend_colors, panels

TEMPLATE = Path(__file__).with_name("page.html")
COLUMNS = ("IoU", "Dice", "precision", "recall", "pixels", "images")


def write_page(path: Path, **sections: Any) -> None:
    """Fill the template, and write the page.

    Args:
        path: of the page.
        sections: what is shown, by the names that the template has for it. What is not given is left out.
    """
    from matplotlib.ticker import MaxNLocator

    environment = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    template = environment.from_string(TEMPLATE.read_text(encoding="utf-8"))
    page = template.render(ticks=MaxNLocator(4).tick_values, **sections)
    write_text(path, page.encode("utf-8", errors="backslashreplace").decode())  # names need not be UTF-8


def test_figures(metrics: dict[str, float], matrix: Tensor, counts: Tensor, labels: Labels) -> dict[str, Any]:
    """The sections of a test's figures.

    Args:
        metrics: by their logged keys.
        matrix: counts of pixels, (K, K).
        counts: true positives, false positives and false negatives of each image, (images, 3, K).
        labels: K classes.
    """
    *scores, support = class_scores(matrix).values()
    shares = (support / support.sum()).tolist()
    images = (counts[:, 0] + counts[:, 2]).count_nonzero(dim=0)
    values = [column.tolist() for column in (*scores, images)]
    values.insert(-1, [f"{share:.2%}" for share in shares])
    return {
        "metrics": {name: metrics[f"test/{key}"] for key, name in OVERALL.items() if f"test/{key}" in metrics},
        "labels": labels,
        "columns": dict(zip(COLUMNS, values, strict=True)),
        "confusion": (100 * matrix / matrix.sum(dim=1, keepdim=True)).tolist(),
    }


def curves(rows: Sequence[dict[str, Any]]) -> dict[str, dict[str, list[Any]]]:
    """The finite values of rows of metrics.csv: of each plot and line [step, epoch, value]."""
    plots: dict[str, dict[str, list[Any]]] = {}
    for row in rows:
        for metric in ("loss", "miou"):
            for split in ("train", "val"):
                value = float(row.get(f"{split}/{metric}", "nan"))
                if math.isfinite(value):
                    line = plots.setdefault(metric, {}).setdefault(split, [])
                    line.append([int(row["step"]) + 1, int(row["epoch"]) + 1, value])
    return plots


def gallery(samples: Sequence[Shown], labels: Labels) -> dict[str, Any]:
    """The sections of some images, with what to lay over them.

    Args:
        samples: as `sample_grid` takes them.
        labels: names and colours of the classes.
    """
    if not samples:
        return {}
    shown = []
    for sample in samples:
        drawn = panels(sample["image"], sample["mask"], sample.get("prediction"), labels)
        images = {name: data_uri(panel, lossless=name in ("Truth", "Prediction")) for name, panel in drawn.items()}
        shown.append({"name": readable(sample["name"]), "miou": sample.get("miou"), "images": images})
    return {"samples": shown, "legend": legend_colors(samples, labels)}


def data_uri(pixels: np.ndarray, lossless: bool) -> str:
    """An image (H, W, 3) as an address that holds it."""
    written = io.BytesIO()
    Image.fromarray(pixels).save(written, "webp", quality=85, lossless=lossless)
    return f"data:image/webp;base64,{base64.b64encode(written.getvalue()).decode()}"
