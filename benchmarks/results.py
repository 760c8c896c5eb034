"""The README's table of results: every net of configs/experiment/ on the same budget. With SEG_DATA set:

    python benchmarks/results.py --data nuclei isbi2012 camvid    # trains what runs/ lacks, then prints the tables
    python benchmarks/results.py --measure                        # times and memory, on a quiet machine
    python benchmarks/results.py --data nuclei --rows unet unet_3plus --seeds 0 1 2

A run is `runs/budget-DATA-ROW`, made by the command that is printed before it; interrupted, the same command goes on.
All rows of a data set see as many crops of the same images in the same order. mIoU is that of the validation split,
over the whole images, its interval a bootstrap over them; of several seeds it is their mean, ± the standard deviation.
The levels of UNet++ are `src/prune.py`'s, tested by `src/eval.py`.

`--measure` writes `runs/measured.json`: every net takes a training step (forward, its loss, backward, AdamW) and
predicts an image in turn, as many rounds as `--repeats`, in one process, so that what else the machine does hits all
alike; figures are medians. Memory is the peak of a training step beyond what the process held before it.
"""

import argparse
import itertools
import json
import statistics
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "src"))
from segmentation.checkpoint import load_module, read_checkpoint
from segmentation.inference.bootstrap import Estimate, bootstrap, intervals, iou
from segmentation.inference.compare import read_counts
from segmentation.module import SegmentationModule
from segmentation.training.callbacks import count_flops
from segmentation.training.entry import keep_freed_memory
from segmentation.training.trainer import has_bf16
from timing import machine, peak_memory, seconds

ROOT = Path(__file__).parents[1]
#: Epochs of each data set: with one thread of a CPU minutes a row, and about an hour for CamVid's last.
EPOCHS = {"nuclei": 5, "isbi2012": 40, "camvid": 30}
ROWS = {
    "unet": "UNet",
    "unet_plus_plus": "UNet++",
    "unet_plus_plus_deep": "UNet++, deep supervision",
    "unet_3plus": "UNet3+",
    "unet_3plus_deep": "UNet3+, deep supervision",
    "unet_3plus_cgm": "… + classification-guided module",
    "unet_3plus_hybrid": "… + hybrid loss",
    "smp_unet": "smp Unet, resnet18",
    "smp_unet_plus_plus": "smp UnetPlusPlus, resnet18",
}
DEEP, LEVELS = "unet_plus_plus_deep", (3, 2, 1)  # to which it can be pruned
RUNS = Path("runs")
MEASURED = RUNS / "measured.json"


def main() -> None:
    args = arguments()
    if args.measure:
        measure(args)
    else:
        for data, seed, row in itertools.product(args.data, args.seeds, args.rows):
            train(data, row, seed)
    print_tables(args.data, args.rows)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", nargs="+", choices=EPOCHS, default=list(EPOCHS))
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=list(ROWS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--measure", action="store_true", help="train nothing: measure the first data set's nets")
    parser.add_argument("--repeats", type=int, default=15, help="rounds of measuring; the table has medians")
    return parser.parse_args()


def run_name(data: str, row: str, seed: int = 0) -> str:
    return f"budget-{data}-{row}" + (f"-seed{seed}" if seed else "")


def command(data: str, row: str, seed: int = 0) -> list[str]:
    """What trains a row, as it could be typed."""
    overlays = (f"data/{data}", "experiment/budget", f"experiment/{row}")
    words = [word for overlay in overlays for word in ("--config", str(ROOT / f"configs/{overlay}.yaml"))]
    seeds = ["--seed_everything", str(seed), "--data.seed", str(seed)] if seed else []
    name = run_name(data, row, seed)
    return [str(ROOT / "src/train.py"), *words, "--trainer.max_epochs", str(EPOCHS[data]), *seeds, "--name", name]


def train(data: str, row: str, seed: int) -> None:
    """Train a row, and test the levels that it can be pruned to, where that has not been done."""
    folder = RUNS / run_name(data, row, seed)
    if not (folder / "summary.json").is_file():
        call([*command(data, row, seed), "--resume"])
    for level in LEVELS if row == DEEP else ():
        pruned, figures = folder / f"checkpoints/best_L{level}.ckpt", folder / f"L{level}.json"
        if not pruned.is_file():
            call([str(ROOT / "src/prune.py"), str(folder / "checkpoints/best.ckpt"), "--level", str(level)])
        if not figures.is_file():
            call([str(ROOT / "src/eval.py"), str(pruned), "--output", str(figures)])


def call(words: list[str]) -> None:
    print("python", *words, file=sys.stderr, flush=True)
    subprocess.run([sys.executable, *words], check=True, stdout=sys.stderr)


def places(data: str, rows: list[str]) -> list[tuple[str, Path, Path]]:
    """(title, checkpoint, table of its tested images) of each row that there is, the levels of UNet++ among them."""
    found = []
    for row in rows:
        folder = RUNS / run_name(data, row)
        found.append((ROWS[row], folder / "checkpoints/best.ckpt", folder / "per_image.csv"))
        if row == DEEP:
            for level in LEVELS:
                pruned, table = folder / f"checkpoints/best_L{level}.ckpt", folder / f"L{level}_per_image.csv"
                found.append((f"… pruned to L{level}", pruned, table))
    return [(title, checkpoint, table) for title, checkpoint, table in found if table.is_file()]


def measure(args: argparse.Namespace) -> None:
    """Write what each row costs, by the nets of the first data set's runs, on crops of its budget."""
    rows = places(args.data[0], args.rows)
    if not rows:
        sys.exit(f"{RUNS.resolve()} has no finished run of {args.data[0]}: first without --measure")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    modules = {title: prepared(checkpoint, device) for title, checkpoint, _ in rows}
    budget, labels = read_checkpoint(rows[0][1])["datamodule_hyper_parameters"], next(iter(modules.values())).labels
    shape = (budget["batch_size"], labels.channels, budget["crop"], budget["crop"])
    image = torch.randint(0, 256, shape, dtype=torch.uint8, device=device)
    mask = torch.randint(0, labels.num_classes, (shape[0], *shape[2:]), device=device)
    predictions = {title: prediction(module, image[:1], device) for title, module in modules.items()}
    steps = {  # what is pruned has been trained as a whole
        title: training_step(module, {"image": image, "mask": mask}, device)
        for title, module in modules.items()
        if "pruned" not in title
    }
    found: dict[str, dict[str, float]] = {}
    for title, module in modules.items():
        parameters = sum(parameter.numel() for parameter in module.net.parameters())
        found[title] = {"parameters": parameters, "gflops": count_flops(module.net, (1, *shape[1:])) / 1e9}
    for title, step in steps.items():  # before memory is kept, which cannot be counted
        step()
        found[title]["gib"] = peak_memory(step, device)
    keep_freed_memory()  # as train.py does
    rates, ms = ({title: [] for title in modules} for _ in range(2))
    for _ in range(args.repeats + 1):
        for title, predict in predictions.items():
            rates[title].append(shape[0] / seconds(steps.get(title, predict), device))
            predict()  # the first after a training step is slower
            ms[title].append(seconds(predict, device) * 1e3)
    for title, cost in found.items():  # the first round warms up
        cost["ms"] = statistics.median(ms[title][1:])
        if title in steps:
            cost["images_per_second"] = statistics.median(rates[title][1:])
    where = f"{machine(device)}, {'bf16' if has_bf16(device) else 'float32'}"
    MEASURED.write_text(json.dumps({"machine": where, "shape": shape, "costs": found}, indent=1))


def prepared(checkpoint: Path, device: str) -> SegmentationModule:
    module = load_module(SegmentationModule, read_checkpoint(checkpoint), str(checkpoint)).to(device)
    if module.channels_last:
        module.net.to(memory_format=torch.channels_last)
    return module


def training_step(module: SegmentationModule, batch: dict[str, torch.Tensor], device: str) -> Callable[[], None]:
    optimizer = torch.optim.AdamW(module.parameters(), lr=1e-6)

    def step() -> None:
        module.train()
        with torch.autocast(device, torch.bfloat16, enabled=has_bf16(device)):
            loss = module.compute_loss(module.net(module.normalize(batch["image"])), batch)[0]
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def prediction(module: SegmentationModule, image: torch.Tensor, device: str) -> Callable[[], None]:
    @torch.inference_mode()
    def predict() -> None:
        module.eval()
        with torch.autocast(device, torch.bfloat16, enabled=has_bf16(device)):
            module(image)

    return predict


def print_tables(sets: list[str], rows: list[str]) -> None:
    """The README's tables, in Markdown, of the runs that there are."""
    measured = json.loads(MEASURED.read_text()) if MEASURED.is_file() else {"costs": {}}
    tables = {data: {title: table for title, _, table in places(data, rows)} for data in sets}
    titles = list(dict.fromkeys(title for each in tables.values() for title in each))
    if measured["costs"]:
        batch, *shape = measured["shape"]
        size = "x".join(map(str, shape))
        print(f"{measured['machine']}; {size}; training steps of {batch}, inference of 1; medians\n")
    heading("net", *(f"mIoU, {data}" for data in sets), *SHOWN)
    for title in titles:
        scores = (miou_of_seeds(counts_of_seeds(tables[data][title])) if title in tables[data] else "" for data in sets)
        cost = measured["costs"].get(title, {})
        print_row(title, *scores, *(show(cost[key]) if key in cost else "" for key, show in SHOWN.values()))
    for data in sets:
        print(f"\nIoU of each class, {data}\n")
        for number, (title, table) in enumerate(tables[data].items()):
            *each, _ = score(counts_of_seeds(table)).items()
            if not number:
                heading("net", *(name for name, _ in each))
            print_row(title, *(f"{one.value:.3f}" for _, one in each))


#: What is measured: heading -> key, and how it is shown.
SHOWN: dict[str, tuple[str, Callable[[float], str]]] = {
    "parameters": ("parameters", lambda count: f"{count / 1e6:.2f} M"),
    "GFLOPs": ("gflops", "{:.2f}".format),
    "training images/s": ("images_per_second", "{:.1f}".format),
    "inference, ms": ("ms", "{:.1f}".format),
    "memory of a step, GiB": ("gib", "{:.2f}".format),
}


#: Names, classes and counts of a tested run's images.
Counts = tuple[list[str], list[str], np.ndarray]


def miou_of_seeds(seeds: list[Counts]) -> str:
    """mIoU and its interval; of several seeds, the mean and its interval, and the standard deviation between them."""
    each, found = [iou(counts.sum(axis=0))[-1] for *_, counts in seeds], score(seeds)["mIoU"]
    return f"{found}" if len(each) == 1 else f"{found}".replace(" ", f" ± {statistics.stdev(each):.3f} ", 1)


def score(seeds: list[Counts]) -> dict[str, Estimate]:
    """IoU of each class and, last, mIoU, with intervals; means over seeds, for which the same images are drawn."""
    counts = [each for *_, each in seeds]
    values, drawn = [iou(each.sum(axis=0)) for each in counts], bootstrap(counts)
    return intervals([*seeds[0][1], "mIoU"], np.mean(values, axis=0), np.mean(drawn, axis=0))


def counts_of_seeds(table: Path) -> list[Counts]:
    """A tested run and its like with other seeds."""
    seeds = [table, *sorted(table.parent.parent.glob(f"{table.parent.name}-seed*/{table.name}"))]
    return [read_counts(path) for path in seeds]


def print_row(*cells: str) -> None:
    print("|", " | ".join(cells), "|")


def heading(*cells: str) -> None:
    print_row(*cells)
    print_row(*["---"] * len(cells))


if __name__ == "__main__":
    main()
