"""How fast data comes: `python benchmarks/loading.py`, with SEG_DATA set; about five minutes on 2 CPU cores.

    python benchmarks/loading.py --config my_data.yaml --config configs/data/augment_light.yaml     data of your own

First each stage by itself, in one thread and in its CPU time: reading the files, decoding (reading included), examining
(what is done once before training and by the doctor: decoding, checks, statistics), augmenting (crop and transforms),
collating, and the transfer to a GPU where there is one. Then whole loaders with so many workers, side by side in one
run: `decode alone` decodes in the workers and throws the result away, the limit that no loader beats;
`loader` is what training gets: decoded, augmented, collated, handed over. Medians over rounds.
"""

import argparse
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterable
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "src"))
from segmentation.data import SegmentationDataModule
from segmentation.data.loading import SplitDataset, collate
from segmentation.data.sampler import TrainBatches, TrainLoader
from segmentation.data.statistics import examine
from segmentation.doctor import DoctorCLI, build_data

ROOT = Path(__file__).parents[1]
LIGHT = str(ROOT / "configs/data/augment_light.yaml")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", action="append", help="overlays of one data set; default: CamVid, then nuclei")
    parser.add_argument("--images", type=int, default=128, help="of a round")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--workers", type=int, nargs="+", default=[0, 1, 2, 4])
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    sets = (
        [args.config]
        if args.config
        else [[str(ROOT / f"configs/data/{name}.yaml"), LIGHT] for name in ("camvid", "nuclei")]
    )
    torch.set_num_threads(1)  # as in a worker
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    print(f"cores: {cores}, torch {torch.__version__}; batches of {args.batch}, medians of {args.repeats} rounds")
    for overlays in sets:
        words = [word for overlay in overlays for word in ("--config", overlay)]
        module = build_data(DoctorCLI(words).config)
        print(f"\n{' + '.join(Path(overlay).stem for overlay in overlays)}, images/s\n")
        stages(module, args)
        loaders(module, args)


def stages(module: SegmentationDataModule, args: argparse.Namespace) -> None:
    """A table of each stage by itself."""
    data = module.dataset
    indices = range(min(args.images, len(data.names("train"))))
    device = "cuda" if torch.cuda.is_available() else None
    print("| stage | images/s | ms per image |\n|---|---|---|")

    def read() -> Iterable[None]:
        for name in list(data.files["train"])[: len(indices)]:
            for paths in data.files["train"][name].values():
                for path in paths:
                    path.read_bytes()

    samples = [data.load("train", index) for index in indices]
    split = SplitDataset(data, "train", module.augment, module.seed)
    items = [split[index] for index in indices]
    batches = [items[first : first + args.batch] for first in range(0, len(items), args.batch)]
    jobs: dict[str, Callable[[], Any]] = {
        "decode": lambda: [data.load("train", index) for index in indices],
        "examine": lambda: [examine(data, "train", index, str(index)) for index in indices],
        "augment": lambda: [module.augment(sample, number) for number, sample in enumerate(samples)],
        "collate": lambda: [collate(batch) for batch in batches],
    }
    if hasattr(data, "files"):
        jobs = {"read": read} | jobs
    if device:
        ready = [collate(batch)["image"].pin_memory() for batch in batches]
        jobs["transfer"] = lambda: [image.to(device, non_blocking=True) for image in ready] and torch.cuda.synchronize()
    taken: dict[str, list[float]] = {name: [] for name in jobs}
    for _ in range(args.repeats):  # side by side, as a machine is not always equally fast
        for name, job in jobs.items():
            clock = time.perf_counter if name == "transfer" else time.process_time
            taken[name].append(timed(job, clock))
    for name, times in taken.items():
        seconds = statistics.median(times)
        print(f"| {name} | {len(indices) / seconds:,.0f} | {seconds / len(indices) * 1e3:.2f} |")


def loaders(module: SegmentationDataModule, args: argparse.Namespace) -> None:
    """A table of whole loaders beside decoding alone."""
    whole = SplitDataset(module.dataset, "train", module.augment, module.seed)
    plain = SplitDataset(module.dataset, "train")
    print("\n| workers | decode alone | loader | share |\n|---|---|---|---|")
    for workers in args.workers:
        options = {"num_workers": workers, "persistent_workers": workers > 0}
        made = [
            TrainLoader(
                split,
                batch_sampler=TrainBatches(len(split), args.batch, 0),
                progress=epochs(),
                collate_fn=how,
                **options,
            )
            for split, how in ((plain, counted), (whole, collate))
        ]
        rates: list[list[float]] = [[], []]
        for repeat in range(args.repeats + 1):
            for loader, rate in zip(made, rates, strict=True):
                seconds = timed(lambda loader=loader: [None for _ in loader])
                if repeat:  # the first round starts the workers
                    rate.append(len(loader) * args.batch / seconds)
        decode, loader = map(statistics.median, rates)
        print(f"| {workers} | {decode:,.0f} | {loader:,.0f} | {loader / decode:.0%} |", flush=True)


def epochs() -> Callable[[], tuple[int, int, int]]:
    """One epoch after another, from its beginning."""
    number = count()
    return lambda: (next(number), 0, 1)


def counted(items: list[dict[str, Any]]) -> dict[str, Any]:
    """A batch of next to nothing."""
    return {"pixels": np.array([item["pixels"] for item in items])}


def timed(job: Callable[[], Any], clock: Callable[[], float] = time.perf_counter) -> float:
    start = clock()
    job()
    return clock() - start


if __name__ == "__main__":
    main()
