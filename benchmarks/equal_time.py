"""Small and large nets, each trained for the same time. On a CPU, with SEG_DATA set:

    python benchmarks/equal_time.py --measure                    # the steps that fit into the time: takes minutes
    python benchmarks/equal_time.py --seeds 0 1 2                # trains what runs/ lacks, then prints the table
    python benchmarks/equal_time.py --plot docs/equal_time.png   # mIoU against minutes and against parameters

Of each row `--measure` times a training step of one thread by its CPU time, and writes the number of steps that fit
into MINUTES to `runs/equal_time.json`. So other work on the machine takes no steps away. A run is
`runs/equal-DATA-ROW-seedN`; interrupted, the same command goes on. Samples come from memory (`data.cache`): reading
costs all nets the same. Four nets have about half a million parameters, two have about fourteen million. mIoU is that
of the validation split, whole images, at the end; on the way it is computed after a quarter, a half and three quarters.
"""

import argparse
import csv
import itertools
import json
import statistics
import sys
import time
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import torch

from results import RUNS, call, heading, iou, miou_of_seeds, prepared, print_row, read_counts, training_step
from timing import machine, seconds

ROOT = Path(__file__).parents[1]
DATA = {"nuclei": "nuclei", "isbi2012": "ISBI 2012", "camvid": "CamVid"}
MINUTES = 2
MEASURED = RUNS / "equal_time.json"
SMALL = ["--model.net.widths", "[8,16,32,64,128]"]
LARGE = ["--model.net.widths", "[44,88,176,352,704]"]
ONE_HEAD = ["--model.net.deep_supervision", "false"]
HEADS = ["--model.net.deep_supervision", "true"]
#: title, colour, and the options that make the net
ROWS: dict[str, tuple[str, str, list[str]]] = {
    "unet": ("UNet", "#0072B2", ["--model.net", "UNet", *SMALL, *ONE_HEAD]),
    "unet_plus_plus": (
        "UNet++, deep supervision",
        "#009E73",
        ["--model.net", "UNetPlusPlus", *SMALL, *HEADS],
    ),
    "unet_3plus": (
        "UNet3+, deep supervision",
        "#D55E00",
        ["--model.net", "UNet3Plus", *SMALL, "--model.net.skip_channels", "8", *HEADS],
    ),
    "smp_small": (
        "smp Unet, mobilenetv3_small_050",
        "#CC79A7",
        [
            "--model.net",
            "SmpNet",
            "--model.net.encoder",
            "tu-mobilenetv3_small_050",
            "--model.net.options",
            "{decoder_channels: [64,48,32,16,16]}",
        ],
    ),
    "unet_large": ("UNet, large", "#56B4E9", ["--model.net", "UNet", *LARGE, *ONE_HEAD]),
    "smp_large": ("smp Unet, resnet18", "#7F7F7F", ["--model.net", "SmpNet", "--model.net.encoder", "resnet18"]),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", nargs="+", choices=DATA, default=list(DATA))
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=list(ROWS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--measure", action="store_true", help="train nothing: time the steps of every row")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="train nothing: draw the runs that there are")
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.measure:
        measure(args.data, args.rows)
        return
    if not MEASURED.is_file():
        sys.exit(f"{MEASURED} is missing: first python benchmarks/equal_time.py --measure")
    if args.plot:
        plot(args.data, args.plot)
        return
    for seed, data, row in itertools.product(args.seeds, args.data, args.rows):
        train(data, row, seed)
    print_table(args.data)


def command(data: str, row: str, seed: int, steps: int, name: str) -> list[str]:
    """What trains a row, as it could be typed."""
    overlays = [word for overlay in (f"data/{data}", "experiment/budget") for word in ("--config", path_of(overlay))]
    seeds = ["--seed_everything", str(seed), "--data.seed", str(seed)]
    length = ["--trainer.max_steps", str(steps), "--trainer.max_epochs", "1000", "--data.cache", "true"]
    curve = ["--trainer.check_val_every_n_epoch", "null", "--trainer.val_check_interval", str(max(1, steps // 4))]
    return [str(ROOT / "src/train.py"), *overlays, *ROWS[row][2], *seeds, *length, *curve, "--name", name]


def path_of(overlay: str) -> str:
    return str(ROOT / f"configs/{overlay}.yaml")


def measure(sets: list[str], rows: list[str]) -> None:
    """Write parameters, and for each data set milliseconds of a training step: the medians of rows timed in turn."""
    costs: dict[str, dict[str, dict[str, float]]] = {}
    for data in sets:
        steps = {}
        for row in rows:
            name = f"equal-{data}-{row}-try"
            if not (RUNS / name / "summary.json").is_file():
                limits = ["--trainer.limit_val_batches", "1", "--trainer.limit_test_batches", "1"]
                call([*command(data, row, 0, 1, name), *limits, "--resume"])
            module = prepared(RUNS / name / "checkpoints/best.ckpt", "cpu")
            image = torch.randint(0, 256, (8, module.labels.channels, 128, 128), dtype=torch.uint8)
            mask = torch.randint(0, module.labels.num_classes, (8, 128, 128))
            steps[row] = training_step(module, {"image": image, "mask": mask}, "cpu")
            parameters = sum(parameter.numel() for parameter in module.net.parameters())
            costs.setdefault(data, {})[row] = {"parameters": parameters}
        times: dict[str, list[float]] = {row: [] for row in rows}
        for _ in range(12):
            for row, step in steps.items():
                times[row].append(seconds(step, "cpu", time.process_time))
        for row, each in times.items():
            costs[data][row]["ms"] = statistics.median(each[2:]) * 1e3
    MEASURED.write_text(json.dumps({"machine": machine("cpu"), "costs": costs}, indent=1))


def train(data: str, row: str, seed: int) -> None:
    if not (RUNS / run_name(data, row, seed) / "summary.json").is_file():
        call([*command(data, row, seed, steps_of(data, row), run_name(data, row, seed)), "--resume"])


def run_name(data: str, row: str, seed: int) -> str:
    return f"equal-{data}-{row}-seed{seed}"


def cost(data: str, row: str) -> dict[str, float]:
    return json.loads(MEASURED.read_text())["costs"][data][row]


def steps_of(data: str, row: str) -> int:
    """A multiple of four, so that the last validation comes with the last step."""
    return 4 * max(1, round(MINUTES * 60e3 / cost(data, row)["ms"] / 4))


def runs_of(data: str, row: str) -> list[Path]:
    """Folders of the finished runs of all seeds."""
    return [path.parent for path in sorted(RUNS.glob(f"{run_name(data, row, 0)[:-1]}*/per_image.csv"))]


def print_table(sets: list[str]) -> None:
    measured = json.loads(MEASURED.read_text())
    print(f"{measured['machine']}; {MINUTES} minutes of training steps\n")
    heading("net", "parameters", *(f"mIoU, {data} (steps)" for data in sets))
    for row in measured["costs"][sets[0]]:
        scores = []
        for data in sets:
            counts = [read_counts(run / "per_image.csv") for run in runs_of(data, row)]
            scores.append(f"{miou_of_seeds(counts)} ({steps_of(data, row):,})" if counts else "")
        print_row(ROWS[row][0], f"{cost(sets[0], row)['parameters'] / 1e6:.2f} M", *scores)


def curve(run: Path) -> list[tuple[int, float]]:
    """(step, mIoU) of each validation."""
    with (run / "metrics.csv").open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["val/miou"]]
    return [(int(row["step"]) + 1, float(row["val/miou"])) for row in rows]


def plot(sets: list[str], path: Path) -> None:
    """Above, mIoU against minutes of training, below against parameters: means over the seeds, and their range."""
    figure, axes = plt.subplots(2, len(sets), figsize=(3.4 * len(sets), 6.2), layout="constrained", squeeze=False)
    for column, data in enumerate(sets):
        above, below = axes[:, column]
        for row, (title, colour, _) in ROWS.items():
            curves = np.array([curve(run) for run in runs_of(data, row)])
            if not curves.size:
                continue
            minutes, values = curves[0, :, 0] * cost(data, row)["ms"] / 60e3, curves[..., 1]
            style = {"color": colour, "marker": "o" if cost(data, row)["parameters"] < 2e6 else "s", "markersize": 5}
            above.plot(minutes, values.mean(0), label=title, **style)
            above.fill_between(minutes, values.min(0), values.max(0), color=colour, alpha=0.12, linewidth=0)
            last = [float(iou(read_counts(run / "per_image.csv")[2].sum(axis=0))[-1]) for run in runs_of(data, row)]
            mean = statistics.mean(last)
            reach = [[mean - min(last)], [max(last) - mean]]
            below.errorbar(cost(data, row)["parameters"], mean, reach, capsize=3, **style)
        above.set(title=DATA[data], xlabel="minutes of training", xlim=(0, MINUTES * 1.05))
        below.set(xlabel="parameters", xscale="log", xlim=(2e5, 3e7))
        for each in (above, below):
            each.grid(alpha=0.25)
            each.spines[["top", "right"]].set_visible(False)
    for each in axes[:, 0]:
        each.set_ylabel("mIoU, validation split")
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=3, frameon=False)
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    main()
