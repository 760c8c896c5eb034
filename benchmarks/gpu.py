"""What a GPU shows in half an hour: `benchmarks/gpu.sh STEP`, each step within nine minutes.

    benchmarks/gpu.sh wheels [DATA ...]             packs ./gpu: what the machine lacks, and data of SEG_DATA (camvid)
    benchmarks/gpu.sh check [PYTEST'S OPTION ...]
    benchmarks/gpu.sh nets [UNIT ...] [OPTION OF nets.py ...]
    benchmarks/gpu.sh feed [UNIT ...] [OPTION OF training.py ...]
    benchmarks/gpu.sh camvid [OPTION OF train.py ...]      or camvid_unet_plus_plus, camvid_unet_3plus, nuclei, isbi2012

A step that the time has stopped ends with status 143, and the same command goes on from there, on what lies in ./runs.
Its tables come last, and again, with a log and all that is small, in the folder that OUT names (./gpu_results).

Environment: SEG_DATA, else ./gpu/data; GPU_SECONDS, what a step may take (540); GPU_DEVICE=cpu to try it without one.
"""

import json
import os
import shutil
import subprocess
import sys
import time
from itertools import takewhile
from pathlib import Path
from typing import Any

import gpu_tables
from gpu_pack import PACK, SITE, pack, unpack

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "src"))
from segmentation.errors import InputError
from segmentation.training.entry import run_job

ROOT = Path(__file__).resolve().parents[1]
STARTED = time.monotonic()
SECONDS = float(os.environ.get("GPU_SECONDS", 540))
ENDING = min(40.0, SECONDS / 4)  # of these, to save, and to print
STOPPED = 143  # the status of a step that is not finished
CPU = os.environ.get("GPU_DEVICE") == "cpu"
KIND = "cpu" if CPU else "gpu"  # what was tried on a CPU is not done on a GPU
STATE = Path("runs") / KIND  # where a step goes on from
OUT = Path(os.environ.get("OUT") or "gpu_results")


def main() -> None:
    step, *options = sys.argv[1:] or [""]
    if step not in STEPS:
        raise InputError(f"{step!r} is no step; benchmarks/gpu.sh takes {', '.join(STEPS)}")
    if step in ("feed", *TRAINED):
        os.environ["SEG_DATA"] = str(find_data("camvid" if step == "feed" else data_of(step)))
    if step != "wheels":
        check_device()
        unpack()
    OUT.mkdir(parents=True, exist_ok=True)
    STATE.mkdir(parents=True, exist_ok=True)
    sys.exit(STEPS[step](step, options))


def check_device() -> None:
    import torch

    if not CPU and not torch.cuda.is_available():
        raise InputError("no CUDA device is here; to try the kit on a CPU, with small options: GPU_DEVICE=cpu")


def find_data(name: str) -> Path:
    """The folder of data sets, which has the one of this name."""
    place = Path(os.environ.get("SEG_DATA") or PACK / "data").resolve()
    if not (place / name).is_dir():
        fix = f"Set SEG_DATA, or pack: benchmarks/gpu.sh wheels {name}"
        raise InputError(f"no data: {place / name} is no folder. {fix}")
    return place


def left() -> float:
    """Seconds until what runs must be ended."""
    return STARTED + SECONDS - ENDING - time.monotonic()


def call(step: str, words: list[str], ending: str = "TERM", **environment: str) -> int:
    """The exit status of `python WORDS`, whose output goes to the terminal and into the log; STOPPED where the time was
    up. It is told by the signal `ending`, and may save what it has."""
    if left() < 5:
        return STOPPED
    path = [str(SITE), str(ROOT / "benchmarks"), os.environ.get("PYTHONPATH", "")]
    own = {"PYTHONPATH": os.pathsep.join(filter(None, path)), "PYTHONUNBUFFERED": "1", "WANDB_MODE": "disabled"}
    if CPU:
        own["CUDA_VISIBLE_DEVICES"] = ""
    print("python", *words, flush=True)
    # --foreground: the signal is for the process alone, not for the workers of its loader
    timed = ["timeout", "--foreground", f"--signal={ending}", f"--kill-after={ENDING * 0.8}", str(left())]
    process = subprocess.Popen(
        [*timed, sys.executable, *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        env={**os.environ, **own, **environment},
    )
    assert process.stdout is not None
    with (OUT / f"{step}.log").open("a") as log:
        for line in process.stdout:
            print(line, end="", flush=True)
            print(line, end="", file=log, flush=True)
    status = process.wait()
    return STOPPED if status in (124, 137) else status  # timeout's own: told, killed


def show(step: str, status: int, tables: list[str]) -> int:
    """Print the step's tables and write them into OUT, with what they were made of; the status again."""
    if status == STOPPED:
        tables = ["The time is up: the same command goes on from here.", *tables]
    elif status:
        tables = [f"The step has failed: {OUT / step}.log says where.", *tables]
    text = "\n\n".join(tables)
    print(f"\n{text}")
    (OUT / f"{step}.md").write_text(text + "\n")
    state = STATE / f"{step}.json"
    if state.is_file():
        shutil.copy(state, OUT)
    return status


def read_json(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text()) if path.is_file() else {}


def overlays(*names: str) -> list[str]:
    return [word for name in names for word in ("--config", str(ROOT / f"configs/{name}.yaml"))]


def device() -> str:
    import torch

    return "the CPU" if CPU else f"{torch.cuda.get_device_name()}, torch {torch.__version__}"


def device_options() -> list[str]:
    return ["--trainer.accelerator", "cpu", "--trainer.precision", "32-true"] if CPU else []


# wheels, check


def wheels(step: str, names: list[str]) -> int:
    return show(step, 0, gpu_tables.of_pack(pack(names or ["camvid"])))


def check(step: str, options: list[str]) -> int:
    kept = STATE / f"{step}.json"
    words = ["-m", "pytest", str(ROOT / "tests/test_device.py"), "-p", "gpu_check", "-p", "no:cacheprovider"]
    words += ["-o", "addopts=--strict-markers", "-v", "--durations=5"]
    status = call(step, [*words, *options], "INT", GPU_CHECK=str(kept.resolve()))
    outcomes = read_json(kept)
    if status == 5 and outcomes:  # no test was left to run
        status = 0
    return show(step, status, gpu_tables.of_check(outcomes, device()))


# nets, feed: units, each a process of its own


def nets_units() -> dict[str, list[str]]:
    """Options of nets.py by the name of a unit, the most important first."""
    own = [str(ROOT / "benchmarks/nets.py"), "--device", "cpu" if CPU else "cuda", "--layouts", "channels_last"]
    own += ["--size", "512", "--batch", "8", "--infer-batch", "8", "--repeats", "10", "--dtypes", "bf16"]
    beside = [*own, "--modes", "eager", "compiled"]  # published figures
    vgg = [*beside, "--nets", "UNet3+, vgg19", "--dtypes", "float32", "bf16", "--size", "320"]
    units = {
        **in_mode("compiled", own),
        "mark_unet": [*beside, "--nets", "UNet", "--size", "572"],
        "mark_unet_3plus": [*vgg, "--batch", "16", "--infer-batch", "16"],
        **in_mode("eager", own),
    }
    return units if CPU else units | in_mode("graphs", own)


def in_mode(mode: str, own: list[str]) -> dict[str, list[str]]:
    """Units of one mode: each net with what it is compared with."""
    nets = {
        "unet_3plus": ["UNet3+, plain form", "UNet3+"],
        "resnet34": ["smp Unet, resnet34", "UNet, resnet34"],
        "resnet34_plus_plus": ["smp UnetPlusPlus, resnet34", "UNet++, resnet34"],
        "unet": ["UNet"],
        "unet_plus_plus": ["UNet++"],
    }
    return {f"{name}-{mode}": [*own, "--nets", *pair, "--modes", mode] for name, pair in nets.items()}


def feed_units() -> dict[str, list[str]]:
    own = [str(ROOT / "benchmarks/training.py"), "--epochs", "8", *CAMVID, *device_options()]
    return {
        "unet": own,
        "unet_plus_plus": [*own, *overlays("model/unet_plus_plus")],
        "unet_3plus": [*own, *overlays("model/unet_3plus")],
    }


def nets(step: str, options: list[str]) -> int:
    return measure(step, nets_units(), options, gpu_tables.of_nets)


def feed(step: str, options: list[str]) -> int:
    return measure(step, feed_units(), options, gpu_tables.of_feed)


def measure(step: str, units: dict[str, list[str]], options: list[str], tables: Any) -> int:
    """Run the units that have not been run, as far as the time goes; or, again, those that the options begin with."""
    chosen = list(takewhile(lambda word: not word.startswith("-"), options))
    options = options[len(chosen) :]
    for name in chosen:
        if name not in units:
            raise InputError(f"{step} has no unit {name!r}; its units: {', '.join(units)}")
    kept, output = STATE / f"{step}.json", STATE / f"{step}.part.json"
    found = read_json(kept)
    status = 0
    for name in chosen or [name for name in units if name not in found]:
        result = call(step, [*units[name], *options, "--output", str(output)])
        status = result or status
        if result == STOPPED:
            break
        if result == 0:
            found[name] = read_json(output)
            kept.write_text(json.dumps(found, indent=1))
    found = {name: found[name] for name in units if name in found}
    missing = [name for name in units if name not in found]
    said = f"{len(found)} of {len(units)} units measured{'; not yet: ' if missing else ''}{', '.join(missing)}."
    return show(step, status, [said, *tables(found)] if found else [said])


# camvid and the other runs

CAMVID = overlays("data/camvid", "experiment/camvid_gpu")
#: The larger nets have fewer epochs in the same two pieces; so few do not train the gate of UNet3+ (docs/results.md).
TRAINED = {
    "camvid": CAMVID,
    "camvid_unet_plus_plus": [*CAMVID, *overlays("model/unet_plus_plus"), "--trainer.max_epochs", "200"],
    "camvid_unet_3plus": [
        *(*CAMVID, *overlays("model/unet_3plus"), "--trainer.max_epochs", "150"),
        *("--model.net.classification_guided", "false"),
    ],
    "nuclei": overlays("data/nuclei", "experiment/nuclei_gpu"),
    "isbi2012": overlays("data/isbi2012", "experiment/isbi2012_gpu"),
}


def data_of(step: str) -> str:
    return step.partition("_")[0]


def train(step: str, options: list[str]) -> int:
    folder = Path("runs") / f"{KIND}-{step}"
    words = [str(ROOT / "src/train.py"), *TRAINED[step], "--trainer.enable_progress_bar", "false", *device_options()]
    status = call(step, [*words, *options, "--name", folder.name, "--resume"])
    (OUT / folder.name).mkdir(exist_ok=True)
    for name in ("config.yaml", "metrics.csv", "summary.json", "per_image.csv"):  # a checkpoint has 500 MB
        if (folder / name).is_file():
            shutil.copy(folder / name, OUT / folder.name)
    return show(step, status, gpu_tables.of_run(folder, device(), data_of(step)))


STEPS = {"wheels": wheels, "check": check, "nets": nets, "feed": feed, **dict.fromkeys(TRAINED, train)}

if __name__ == "__main__":
    run_job(main)
