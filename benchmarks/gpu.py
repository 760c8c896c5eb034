"""What a GPU shows in half an hour: `benchmarks/gpu.sh STEP`, each step within nine minutes.

    benchmarks/gpu.sh wheels [DATA ...]             packs ./gpu: what the machine lacks, and data of SEG_DATA (camvid)
    benchmarks/gpu.sh check [PYTEST'S OPTION ...]
    benchmarks/gpu.sh nets [UNIT ...] [OPTION OF nets.py ...]
    benchmarks/gpu.sh feed [UNIT ...] [OPTION OF training.py ...]
    benchmarks/gpu.sh camvid [OPTION OF train.py ...]      or camvid_unet_plus_plus, camvid_unet_3plus, nuclei, isbi2012

A step that the time has stopped ends with status 143, and the same command goes on from there, on what lies in ./runs.
Its table comes last, and again, with a log and all that is small, in the folder that OUT names (./gpu_results).

Environment: SEG_DATA, else ./gpu/data; GPU_SECONDS, what a step may take (540); GPU_DEVICE=cpu to try it without one.
"""

import csv
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "src"))
from segmentation.errors import InputError, run_job

ROOT = Path(__file__).resolve().parents[1]
STARTED = time.monotonic()
SECONDS = float(os.environ.get("GPU_SECONDS", 540))
ENDING = min(40.0, SECONDS / 4)  # of these, to save, and to print
CPU = os.environ.get("GPU_DEVICE") == "cpu"
STOPPED = 143  # the status of a step that is not finished

PACK, SITE = Path("gpu"), Path(".venv_gpu")
LARGEST_PACK = 60.0  # MiB
STATE, RUNS = Path("runs/gpu"), Path("runs")
OUT = Path(os.environ.get("OUT") or "gpu_results")
LARGEST_CHECKPOINT = 16.0  # MiB

MODES = ("compiled", "eager") if CPU else ("compiled", "eager", "graphs")
GROUPS = {
    "unet_3plus": ["UNet3+, plain form", "UNet3+"],
    "resnet34": ["smp Unet, resnet34", "UNet, resnet34"],
    "resnet34_plus_plus": ["smp UnetPlusPlus, resnet34", "UNet++, resnet34"],
    "unet": ["UNet"],
    "unet_plus_plus": ["UNet++"],
}
#: Published figures, each by the unit of `nets` that measures its like here.
NVIDIA = "NVIDIA/DeepLearningExamples, TensorFlow2/Segmentation"
PUBLISHED = [
    ("mark_unet", "training", 141, f"572x572, A100 80 GB, mixed precision, unpadded; {NVIDIA}/UNet_Medical"),
    ("mark_unet", "inference", 463, f"572x572, A100 80 GB, mixed precision, unpadded; {NVIDIA}/UNet_Medical"),
    ("mark_unet_3plus", "training", 26, f"320x320, A100 80 GB, TF32, not mixed; {NVIDIA}/Contrib/UNet3P, contributed"),
]


@dataclass
class Run:
    """A run to the best figure: data set, overlays on top of it, options, and published marks."""

    data: str
    overlays: tuple[str, ...]
    options: tuple[str, ...]
    marks: tuple[str, ...]


CAMVID = (
    "0.7195 on val, this U-Net, 368x480 (Intel open_model_zoo, unet-camvid-onnx-0001)",
    "0.705 on test, LETNet, 360x480 (Xu et al. 2023)",
)
PLUS_PLUS = ("--trainer.max_epochs", "200")
THREE_PLUS = ("--model.net.classification_guided", "false", "--trainer.max_epochs", "150")
NUCLEI = ("IoU of nuclei 0.906 by U-Net, 0.925 by UNet++, on other splits (Zhou et al. 2019)",)
TRAINED = {
    "camvid": Run("camvid", ("experiment/camvid_gpu",), (), CAMVID),
    "camvid_unet_plus_plus": Run("camvid", ("experiment/camvid_gpu", "model/unet_plus_plus"), PLUS_PLUS, CAMVID),
    "camvid_unet_3plus": Run("camvid", ("experiment/camvid_gpu", "model/unet_3plus"), THREE_PLUS, CAMVID),
    "nuclei": Run("nuclei", ("experiment/nuclei_gpu",), (), NUCLEI),
    "isbi2012": Run("isbi2012", ("experiment/isbi2012_gpu",), (), ("none for these four images",)),
}


def main() -> None:
    steps: dict[str, Callable[[str, list[str]], int]] = {"wheels": wheels, "check": check, "nets": nets, "feed": feed}
    steps |= dict.fromkeys(TRAINED, train)
    step, options = (sys.argv[1:2] or [""])[0], sys.argv[2:]
    if step not in steps:
        raise InputError(f"{step!r} is no step; benchmarks/gpu.sh takes {', '.join(steps)}")
    if step in ("feed", *TRAINED):
        os.environ["SEG_DATA"] = str(find_data(TRAINED[step].data if step in TRAINED else "camvid"))
    if step != "wheels":
        check_device()
        install()
    OUT.mkdir(parents=True, exist_ok=True)
    STATE.mkdir(parents=True, exist_ok=True)
    status = steps[step](step, options)
    if status == STOPPED:
        print("\nThe time is up: the same command goes on from here.")
    elif status:
        print(f"\nThe step has failed: {OUT / step}.log says where.")
    sys.exit(status)


def check_device() -> None:
    import torch

    if not CPU and not torch.cuda.is_available():
        raise InputError("no CUDA device is here; to try the kit on a CPU, with small options: GPU_DEVICE=cpu")


def install() -> None:
    """Install what `wheels` has packed, beside what the machine has."""
    wheels = [str(path) for path in sorted((PACK / "wheels").glob("*.whl"))]
    if wheels:
        options = ["--quiet", "--no-index", "--no-deps", "--no-compile", "--upgrade", "--target", str(SITE)]
        done = subprocess.run(
            [sys.executable, "-m", "pip", "install", *options, *wheels], capture_output=True, text=True
        )
        if done.returncode:
            raise InputError(f"{PACK / 'wheels'}: pip cannot install them: {done.stderr.strip().splitlines()[-1]}")


def find_data(name: str) -> Path:
    """The folder of data sets, which has the one of this name."""
    place = Path(os.environ.get("SEG_DATA") or PACK / "data").resolve()
    if not (place / name).is_dir():
        raise InputError(
            f"no data: {place / name} is no folder. Set SEG_DATA, or pack: benchmarks/gpu.sh wheels {name}"
        )
    return place


def left() -> float:
    """Seconds until what runs must be ended."""
    return STARTED + SECONDS - ENDING - time.monotonic()


def call(step: str, words: list[str], ending: signal.Signals = signal.SIGTERM, **environment: str) -> int:
    """The exit status of `python WORDS`, whose output goes on the terminal and into the log; STOPPED where the time was
    up: it is then told by a signal, and may save what it has."""
    path = os.pathsep.join([str(SITE.resolve()), str(ROOT / "benchmarks"), os.environ.get("PYTHONPATH", "")])
    own = {
        "PYTHONPATH": path.rstrip(os.pathsep),
        "WANDB_MODE": "disabled",
        "MPLBACKEND": "agg",
        "PYTHONUNBUFFERED": "1",
    }
    print("python", *words, flush=True)
    process = subprocess.Popen(
        [sys.executable, *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        env={**os.environ, **own, **({"CUDA_VISIBLE_DEVICES": ""} if CPU else {}), **environment},
    )
    assert process.stdout is not None
    log = (OUT / f"{step}.log").open("a")
    copying = threading.Thread(target=copy, args=(process.stdout, log), daemon=True)
    copying.start()
    stopped = False
    try:
        process.wait(max(1.0, left()))
    except subprocess.TimeoutExpired:
        stopped = True
        process.send_signal(ending)
        try:
            process.wait(ENDING * 0.8)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
    copying.join(timeout=2)  # a process that it has left behind may hold the pipe
    return STOPPED if stopped and process.returncode else process.returncode


def copy(source: IO[str], log: IO[str]) -> None:
    for line in source:
        print(line, end="", flush=True)
        log.write(line)
        log.flush()


def show(step: str, *tables: str) -> None:
    """The step's tables, last on the terminal, and in OUT, with what they were made of."""
    text = "\n\n".join(tables)
    print(f"\n{text}")
    (OUT / f"{step}.md").write_text(text + "\n")
    state = STATE / f"{step}.json"
    if state.is_file():
        shutil.copy(state, OUT)


def table(*rows: tuple[Any, ...]) -> str:
    """Markdown; the first row is the heading."""
    heading, *body = (f"| {' | '.join(map(str, row))} |" for row in rows)
    return "\n".join([heading, "|---" * len(rows[0]) + "|", *body])


# check


def check(step: str, options: list[str]) -> int:
    kept = STATE / f"{step}.json"
    words = ["-m", "pytest", str(ROOT / "tests/test_device.py"), "-p", "gpu_check", "-p", "no:cacheprovider"]
    words += ["-o", "addopts=--strict-markers", "-v", "--durations=5"]
    status = call(step, [*words, *options], signal.SIGINT, GPU_CHECK=str(kept.resolve()))
    outcomes = json.loads(kept.read_text()) if kept.is_file() else {}
    rows = [(name, one["outcome"], f"{one['seconds']:.1f}") for name, one in outcomes.items()]
    passed = sum(one["outcome"] == "passed" for one in outcomes.values())
    show(step, table(("test", "outcome", "seconds"), *rows), f"{passed} of {len(rows)} tests passed on {device()}.")
    return 0 if status == 5 and rows else status  # 5: no test was left to run


def device() -> str:
    import torch

    return "the CPU" if CPU else f"{torch.cuda.get_device_name()}, torch {torch.__version__}"


# nets


def net_units() -> dict[str, list[str]]:
    """Options of nets.py by the name of a unit, the most important first."""
    same = ["--layouts", "channels_last", "--size", "512", "--batch", "8", "--infer-batch", "8", "--repeats", "10"]
    bf16 = ["--dtypes", "bf16"]
    units = {}
    for mode in MODES:
        for group, names in GROUPS.items():
            units[f"{group}-{mode}"] = ["--nets", *names, "--modes", mode, *bf16, *same]
        if mode == "compiled":
            both = ["--modes", "eager", "compiled", *same]
            units["mark_unet"] = ["--nets", "UNet", *bf16, *both, "--size", "572"]
            vgg = ["--nets", "UNet3+, vgg19", "--dtypes", "float32", "bf16", *both]
            units["mark_unet_3plus"] = [*vgg, "--size", "320", "--batch", "16", "--infer-batch", "16"]
    return units


def nets(step: str, options: list[str]) -> int:
    own = [str(ROOT / "benchmarks/nets.py"), "--device", "cpu" if CPU else "cuda"]
    status, found = each_unit(step, {name: [*own, *words] for name, words in net_units().items()}, options)
    about = [f"{one['machine']}; limits: {one['limits']}" for one in found.values()][:1]  # each unit measures its own
    heading = ("net", "size", "precision", "mode", "training", "of peak", "of limit", "ratio")
    rows = [(*heading, "inference", "of peak", "of limit", "ratio", "memory")]
    for one in found.values():
        for row in one["rows"]:
            cells = [row["net"], one["size"], row["precision"], row["mode"]]
            for key in ("training", "inference"):
                cells.append(f"{rate(one, row, key):,.1f} images/s")
                cells += [f"{row[key]['of_peak']:.1%}", f"{row[key]['of_limit']:.1%}", f"{row[key]['ratio']:.2f}x"]
            rows.append((*cells, f"{row['gib']:.2f} GiB"))
    show(step, *about, table(*rows), goals(found), marks(found), todo(net_units(), found))
    return status


def rate(one: dict[str, Any], row: dict[str, Any], key: str) -> float:
    """Images a second of a row of a unit."""
    return one["batches"][key] / row[key]["ms"] * 1e3


def goals(found: dict[str, Any]) -> str:
    rows = [row for name, one in found.items() if not name.startswith("mark") for row in one["rows"]]
    cells = [("goal", "best here", "met")]
    for net, key, what, goal in (
        ("UNet3+", "of_peak", "training at the bf16 matrix rate", 0.6),
        ("UNet3+", "ratio", "training against its plain form, same mode", 1.0),
        ("UNet, resnet34", "ratio", "training against smp Unet's, same mode", 1.0),
        ("UNet++, resnet34", "ratio", "training against smp UnetPlusPlus's, same mode", 1.0),
    ):
        best = max((row["training"][key] for row in rows if row["net"] == net), default=None)
        if best is not None:
            cells.append((f"{net}: {what}, at least {goal:g}", f"{best:.2f}", "yes" if best >= goal else "no"))
    return table(*cells)


def marks(found: dict[str, Any]) -> str:
    cells = [("published", "images/s", "on", "here, images/s: precision, mode")]
    for unit, key, published, where in PUBLISHED:
        if unit in found:
            one = found[unit]
            rates = [f"{rate(one, row, key):,.1f} {row['precision']}, {row['mode']}" for row in one["rows"]]
            what = f"{one['rows'][0]['net']} at {one['size']}x{one['size']}, {key}"
            cells.append((what, published, where, "; ".join(rates)))
    return table(*cells)


def each_unit(step: str, units: dict[str, list[str]], options: list[str]) -> tuple[int, dict[str, Any]]:
    """Run the units that have not been run (or those that the options begin with, again), as far as the time goes.

    Returns:
        The status of the step, and what each unit has written, in the order of the units.
    """
    kept = STATE / f"{step}.json"
    found: dict[str, Any] = json.loads(kept.read_text()) if kept.is_file() else {}
    chosen = []
    while options and not options[0].startswith("-"):
        name, *options = options
        if name not in units:
            raise InputError(f"{step} has no unit {name!r}; its units: {', '.join(units)}")
        chosen.append(name)
    status = 0
    for name in chosen or [name for name in units if name not in found]:
        output = STATE / f"{step}.part.json"
        result = call(step, [*units[name], *options, "--output", str(output)]) if left() > 5 else STOPPED
        if result == STOPPED:
            return STOPPED, found
        if result:
            status = result
            continue
        found[name] = json.loads(output.read_text())
        found = {name: found[name] for name in units if name in found}
        kept.write_text(json.dumps(found, indent=1))
    return status, found


def todo(units: dict[str, list[str]], found: dict[str, Any]) -> str:
    missing = [name for name in units if name not in found]
    return f"{len(found)} of {len(units)} units measured{'; not yet: ' + ', '.join(missing) if missing else ''}."


# feed


def feed(step: str, options: list[str]) -> int:
    own = [str(ROOT / "benchmarks/training.py"), "--epochs", "8", *overlays("data/camvid", "experiment/camvid_gpu")]
    units = {
        "unet": [*own, *device_options()],
        "unet_plus_plus": [*own, *overlays("model/unet_plus_plus"), *device_options()],
        "unet_3plus": [*own, *overlays("model/unet_3plus"), *device_options()],
    }
    status, found = each_unit(step, units, options)
    parts = list(next(iter(found.values()))["shares"]) if found else []
    rows: list[tuple[Any, ...]] = [("net", "batch", "whole epoch", "step alone", "kept (goal: 90 %)", *parts)]
    for one in found.values():
        rates = (f"{one['epoch']:,.1f} images/s", f"{one['alone']:,.1f} images/s", f"{one['epoch'] / one['alone']:.1%}")
        rows.append((one["net"], one["batch"], *rates, *(f"{one['shares'][part]:.1%}" for part in parts)))
    machines = {f"{one['machine']}, {one['cores']} cores, {one['workers']} workers" for one in found.values()}
    show(step, *sorted(machines), table(*rows), todo(units, found))
    return status


def overlays(*names: str) -> list[str]:
    return [word for name in names for word in ("--config", str(ROOT / f"configs/{name}.yaml"))]


def device_options() -> list[str]:
    return ["--trainer.accelerator", "cpu", "--trainer.precision", "32-true"] if CPU else []


# camvid and the other runs


def train(step: str, options: list[str]) -> int:
    run, name = TRAINED[step], f"gpu-{step}"
    words = [str(ROOT / "src/train.py"), *overlays(f"data/{run.data}", *run.overlays), *run.options]
    words += ["--trainer.enable_progress_bar", "false", *device_options(), *options, "--name", name, "--resume"]
    status = call(step, words)
    folder = RUNS / name
    kept = keep(folder)
    rows = read_metrics(folder / "metrics.csv")
    scores = [(float(row["val/miou"]), int(row["epoch"]) + 1) for row in rows if row.get("val/miou")]
    ended = [row for row in rows if row.get("train/images_per_second")]
    best = "{:.4f} after epoch {}".format(*max(scores)) if scores else "none yet"
    summary = json.loads((folder / "summary.json").read_text()) if (folder / "summary.json").is_file() else {}
    tested = f"{summary['test/miou']:.4f} on {summary['split']}" if summary else "not yet"
    cells = (step, device(), len(ended), best, tested)
    heading = ("run", "on", "epochs", "best val mIoU", "tested", "training images/s", "minutes")
    minutes = f"{summary['minutes']:.1f}" if summary else ""
    found = table(heading, (*cells, f"{float(ended[-1]['train/images_per_second']):,.1f}" if ended else "", minutes))
    show(step, found, table(("published mIoU",), *((mark,) for mark in run.marks)), kept)
    return status


def keep(folder: Path) -> str:
    """Copy what is small of a run into OUT, in a form that is a run folder again, and say what was too large."""
    large = []
    checkpoints = ("checkpoints/best.ckpt", "checkpoints/last.ckpt")
    for name in ("config.yaml", "metrics.csv", "summary.json", "per_image.csv", *checkpoints):
        source, target = folder / name, OUT / folder.name / name
        if source.is_file() and source.stat().st_size <= LARGEST_CHECKPOINT * 2**20:
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(source, target)
        elif source.is_file():
            large.append(f"{source} ({source.stat().st_size / 2**20:.0f} MiB)")
    if not large:
        return f"To go on elsewhere, put {OUT / folder.name} into runs/ there."
    return f"Too large for {OUT}: {', '.join(large)}. Only this machine, while it is here, can go on with the run."


def read_metrics(path: Path) -> list[dict[str, str]]:
    if not path.is_file():
        return []
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


# wheels


def wheels(step: str, options: list[str]) -> int:
    """Pack ./gpu: wheels for Python 3.12 on manylinux x86-64, and data sets of SEG_DATA."""
    place = os.environ.get("SEG_DATA")
    names = options or ["camvid"]
    if not place or not all((Path(place) / name).is_dir() for name in names):
        raise InputError(f"no data: SEG_DATA ({place or 'not set'}) must name a folder that has {', '.join(names)}")
    data = [(f"data/{name}", size(Path(place) / name)) for name in names]
    refuse_large(data)
    for part in ("wheels", "data"):
        shutil.rmtree(PACK / part, ignore_errors=True)
    words = ["-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--implementation", "cp"]
    words += ["--python-version", "3.12", "--dest", str(PACK / "wheels"), "-r", str(ROOT / "benchmarks/gpu_wheels.txt")]
    for version in ("manylinux_2_28", "manylinux_2_17", "manylinux2014", "manylinux1"):
        words += ["--platform", f"{version}_x86_64"]
    if call(step, words):
        raise InputError(f"pip could not fetch the wheels: {OUT / step}.log says why")
    rows = [*((path.name, size(path)) for path in sorted((PACK / "wheels").iterdir())), *data]
    refuse_large(rows)
    for name in names:
        shutil.copytree(Path(place) / name, PACK / "data" / name, copy_function=shutil.copy)
    total = ("all", sum(mib for _, mib in rows))
    show(step, table((f"in {PACK}/", "MiB"), *((name, f"{mib:.2f}") for name, mib in [*rows, total])))
    return 0


def refuse_large(rows: list[tuple[str, float]]) -> None:
    total = sum(mib for _, mib in rows)
    if total > LARGEST_PACK:
        listed = ", ".join(f"{name} {mib:.1f}" for name, mib in rows if mib >= 0.1)
        raise InputError(
            f"{PACK}/ would have {total:.1f} MiB, {LARGEST_PACK:g} is the most ({listed}): name fewer data sets"
        )


def size(path: Path) -> float:
    """MiB of a file, or of all files in a folder."""
    files = [path] if path.is_file() else [file for file in path.rglob("*") if file.is_file()]
    return sum(file.stat().st_size for file in files) / 2**20


if __name__ == "__main__":
    run_job(main)
