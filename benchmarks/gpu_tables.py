"""The tables of benchmarks/gpu.py, from what its steps have written."""

import csv
import json
from collections import Counter
from pathlib import Path
from typing import Any

#: Published by NVIDIA's DeepLearningExamples (TensorFlow 2), each by the unit of `nets` that measures its like here.
PUBLISHED = [
    ("mark_unet", "training", 141, "A100 80 GB, 572x572, mixed precision, unpadded (NVIDIA's UNet_Medical)"),
    ("mark_unet", "inference", 463, "A100 80 GB, 572x572, mixed precision, unpadded (NVIDIA's UNet_Medical)"),
    ("mark_unet_3plus", "training", 26, "A100 80 GB, 320x320, TF32 (NVIDIA's Contrib/UNet3P, contributed)"),
]
MARKS = {
    "camvid": [
        "0.7195 on val, this U-Net, 368x480 (Intel open_model_zoo, unet-camvid-onnx-0001)",
        "0.705 on test, LETNet, 360x480 (Xu et al. 2023)",
    ],
    "nuclei": ["IoU of nuclei 0.906 by U-Net, 0.925 by UNet++, on other splits (Zhou et al. 2019)"],
    "isbi2012": ["none for these four images"],
}
#: Nets, and what they must not be slower than.
AGAINST = {
    "UNet3+": "UNet3+, plain form",
    "UNet, resnet34": "smp Unet, resnet34",
    "UNet++, resnet34": "smp UnetPlusPlus, resnet34",
}
OF_PEAK = 0.6
LEGEND = (
    "`of peak`: of the measured matrix rate. `of limit`: of what that rate and the bandwidth allow. `ratio`: speed "
    "against UNet3+'s plain form, or the net of segmentation-models-pytorch (smp), in the same mode. "
    "Goals: each net in its fastest mode."
)


def table(heading: list[str], rows: list[list[Any]]) -> str:
    """Markdown."""
    lines = [f"| {' | '.join(map(str, row))} |" for row in [heading, *rows]]
    lines.insert(1, "|---" * len(heading) + "|")
    return "\n".join(lines)


def of_pack(sizes: dict[str, float]) -> list[str]:
    rows = [[name, f"{mib:.2f}"] for name, mib in sizes.items()]
    return [table(["in gpu/", "MiB"], [*rows, ["all", f"{sum(sizes.values()):.2f}"]])]


def of_check(outcomes: dict[str, Any], device: str) -> list[str]:
    rows = [[name, one["outcome"], f"{one['seconds']:.1f}"] for name, one in outcomes.items()]
    counts = Counter(one["outcome"] for one in outcomes.values())
    said = ", ".join(f"{count} {outcome}" for outcome, count in counts.items())
    return [f"{len(rows)} tests on {device}: {said}.", table(["test", "outcome", "seconds"], rows)]


def of_nets(found: dict[str, Any]) -> list[str]:
    rows = []
    for unit in found.values():
        for row in unit["rows"]:
            cells = [row["net"], unit["size"], row["precision"], row["mode"]]
            for key in ("training", "inference"):
                shares = [f"{row[key]['of_peak']:.1%}", f"{row[key]['of_limit']:.1%}", f"{row[key]['ratio']:.2f}x"]
                cells += [f"{rate(unit, row, key):,.1f} images/s", *shares]
            rows.append([*cells, f"{row['gib']:.2f} GiB"])
    heading = ["net", "size", "precision", "mode", "training", "of peak", "of limit", "ratio"]
    heading += ["inference", "of peak", "of limit", "ratio", "memory"]
    limits = {unit["machine"]: unit["limits"] for unit in found.values()}  # each unit measures its own
    machines = [f"{machine}; limits: {limit}" for machine, limit in limits.items()]
    return [*machines, LEGEND, table(heading, rows), published(found), goals(found)]


def rate(unit: dict[str, Any], row: dict[str, Any], key: str) -> float:
    """Images a second of a row of a unit."""
    return unit["batches"][key] / row[key]["ms"] * 1e3


def published(found: dict[str, Any]) -> str:
    rows = []
    for name, key, figure, where in PUBLISHED:
        if name not in found:
            continue
        unit = found[name]
        side = f"{unit['size']}x{unit['size']}"
        here = [f"{rate(unit, row, key):,.1f} ({side}, {row['precision']}, {row['mode']})" for row in unit["rows"]]
        rows.append([f"{unit['rows'][0]['net']}, {key}", figure, where, "; ".join(here)])
    return table(["published", "images/s", "on", "here, images/s"], rows)


def goals(found: dict[str, Any]) -> str:
    """Each net in its fastest mode."""
    best: dict[tuple[str, str], tuple[float, float]] = {}
    for name, unit in found.items():
        if name.startswith("mark"):
            continue
        for row in unit["rows"]:
            for key in ("training", "inference"):
                figures = rate(unit, row, key), row[key]["of_peak"]
                best[row["net"], key] = max(figures, best.get((row["net"], key), figures))
    rows = []
    if ("UNet3+", "training") in best:
        share = best["UNet3+", "training"][1]
        rows.append([f"UNet3+: training at {OF_PEAK:.0%} of the matrix rate", f"{share:.1%}", yes(share >= OF_PEAK)])
    for net, base in AGAINST.items():
        for key in ("training", "inference"):
            if (net, key) in best:
                ratio = best[net, key][0] / best[base, key][0]
                rows.append([f"{net}: {key} as fast as {base}", f"{ratio:.2f}x", yes(ratio >= 1)])
    return table(["goal", "here", "met"], rows)


def yes(met: bool) -> str:
    return "yes" if met else "no"


def of_feed(found: dict[str, Any]) -> list[str]:
    heading = ["net", "batch", "whole epoch", "step alone", "kept (goal: 90 %)"]
    rows = []
    for unit in found.values():
        shares = unit["shares"]
        rates = [f"{unit['epoch']:,.1f} images/s", f"{unit['alone']:,.1f} images/s"]
        rows.append([unit["net"], unit["batch"], *rates, f"{unit['epoch'] / unit['alone']:.1%}"])
        rows[-1] += [f"{share:.1%}" for share in shares.values()]
        heading[5:] = shares
    machines = {f"{unit['machine']}, {unit['cores']} cores, {unit['workers']} workers" for unit in found.values()}
    return [*sorted(machines), table(heading, rows)]


def of_run(folder: Path, device: str, data: str) -> list[str]:
    rows = []
    if (folder / "metrics.csv").is_file():
        with (folder / "metrics.csv").open(newline="") as file:
            rows = list(csv.DictReader(file))
    rates = [float(row["train/images_per_second"]) for row in rows if row.get("train/images_per_second")]
    scores = [(float(row["val/miou"]), int(row["epoch"]) + 1) for row in rows if row.get("val/miou")]
    run = {"run": folder.name, "on": device, "epochs": len(rates), "best val mIoU": "none yet", "tested": "not yet"}
    if scores:
        run["best val mIoU"] = "{:.4f} after epoch {}".format(*max(scores))
    if rates:
        run["training images/s"] = f"{rates[-1]:,.1f}"
    if (folder / "summary.json").is_file():
        summary = json.loads((folder / "summary.json").read_text())
        run["tested"] = f"{summary['test/miou']:.4f} on {summary['split']}"
        run["minutes"] = f"{summary['minutes']:.1f}"
    return [table(["published mIoU"], [[mark] for mark in MARKS[data]]), table(list(run), [list(run.values())])]
