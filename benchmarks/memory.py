"""What a run on large photographs needs of memory: `python benchmarks/memory.py`, four PNGs of 4000x3000 in a temporary
folder; some ten minutes on 2 CPU cores.

    python benchmarks/memory.py --classes 19 --model.loss Dice --model.net UNetPlusPlus    # any option of train.py

train.py trains, validates and tests on them, on crops of 128. Several times a second the memory of all its processes is
added up, what they share counted once (PSS). Linux only.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path

import numpy as np
from PIL import Image

ROOT = Path(__file__).parents[1]
GIB = 2**20  # KiB
OPTIONS = {
    "dataset": "FolderData",
    "dataset.val_fraction": "0.25",
    "dataset.test_fraction": "0.25",
    "crop": "128",
    "batch_size": "1",
    "eval_batch_size": "1",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, default=4000)
    parser.add_argument("--height", type=int, default=3000)
    parser.add_argument("--images", type=int, default=4)
    parser.add_argument("--classes", type=int, default=2)
    args, others = parser.parse_known_args()
    with tempfile.TemporaryDirectory() as folder:
        write_images(Path(folder), args)
        classes = {f"class {index}": index for index in range(args.classes)}
        command = [sys.executable, str(ROOT / "src/train.py"), "--name", "memory"]
        for option, value in OPTIONS.items():
            command += [f"--data.{option}", value]
        command += ["--data.dataset.root", folder, "--data.dataset.classes", json.dumps(classes)]
        command += ["--model.net.widths", "[8,16,32,64,128]", "--trainer.max_epochs", "1", *others]
        start = time.perf_counter()
        peak = watch(command, folder)
        minutes = (time.perf_counter() - start) / 60
    print("| images | classes | peak of all processes | minutes |\n|---|---|---|---|")
    print(f"| {args.images} of {args.width}x{args.height} | {args.classes} | {peak:.2f} GiB | {minutes:.1f} |")


def write_images(folder: Path, args: argparse.Namespace) -> None:
    """Noise, brighter where the class is a higher one, in squares of 100 pixels."""
    rng = np.random.default_rng(0)
    shape = (args.height // 100 + 1, args.width // 100 + 1)
    for kind in ("images", "masks"):
        (folder / kind).mkdir()
    for number in range(args.images):
        mask = rng.integers(0, args.classes, shape, dtype=np.uint8)
        mask = mask.repeat(100, axis=0).repeat(100, axis=1)[: args.height, : args.width]
        noise = rng.integers(0, 100, (*mask.shape, 3), dtype=np.uint8)
        image = noise + (mask * (150 // args.classes))[..., None]
        Image.fromarray(image).save(folder / f"images/{number}.png", compress_level=1)
        Image.fromarray(mask).save(folder / f"masks/{number}.png")


def watch(command: list[str], folder: str) -> float:
    """Run a command to its end; return the peak memory of all its processes, in GiB."""
    process = subprocess.Popen(command, cwd=folder, start_new_session=True)
    peak = 0
    while process.poll() is None:
        peak = max(peak, memory_of(process.pid))
        time.sleep(0.3)
    if process.returncode:
        sys.exit(process.returncode)
    return peak / GIB


def memory_of(group: int) -> int:
    """KiB of a group of processes."""
    total = 0
    for status in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):  # it has just ended
            if int(status.read_text().rpartition(")")[2].split()[2]) == group:
                rollup = status.with_name("smaps_rollup").read_text()
                total += int(rollup.partition("\nPss:")[2].split()[0])
    return total


if __name__ == "__main__":
    main()
