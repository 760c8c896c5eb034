"""report.html: what a run or a data set is like, on one page that needs no server and no network.

Its template is page.html, which asks for what it shows: plots are SVG, masks are images within the page.
"""

import base64
import io
import math
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment
from PIL import Image

from segmentation.data.writing import write_text
from segmentation.errors import readable
from segmentation.metrics import class_scores
from segmentation.visualize import OVERALL, legend_colors, panels, shorten

TEMPLATE = Path(__file__).with_name("page.html")


def write_page(path: Path, **sections: Any) -> None:
    """Fill the template, and write the page.

    Args:
        path: of the page.
        sections: what there is to show, by the names that the template has for it.
    """
    from matplotlib.ticker import MaxNLocator

    environment = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    page = environment.from_string(TEMPLATE.read_text(encoding="utf-8")).render(
        sections,
        overall=OVERALL,
        class_scores=class_scores,
        legend_colors=legend_colors,
        panels=panels,
        readable=readable,
        shorten=shorten,
        data_uri=data_uri,
        curve=curve,
        ticks=MaxNLocator(4).tick_values,
    )
    write_text(path, page.encode("utf-8", errors="backslashreplace").decode())  # a name need not be UTF-8


def curve(rows: list[dict], key: str) -> list[tuple[int, int, float]]:
    """Step and epoch, counted from 1, and value of a logged key in rows of metrics.csv; of what is finite."""
    points = []
    for row in rows:
        value = float(row.get(key, "nan"))
        if math.isfinite(value):
            points.append((int(row["step"]) + 1, int(row["epoch"]) + 1, value))
    return points


def data_uri(pixels: np.ndarray, lossless: bool) -> str:
    """An image (H, W, 3) as an address that holds it."""
    written = io.BytesIO()
    Image.fromarray(pixels).save(written, "webp", quality=85, lossless=lossless)
    return f"data:image/webp;base64,{base64.b64encode(written.getvalue()).decode()}"
