"""What benchmarks/gpu.py takes to a machine without internet: wheels for Python 3.12 on manylinux x86-64, and data."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "src"))
from segmentation.errors import InputError

ROOT = Path(__file__).resolve().parents[1]
PACK, SITE = Path("gpu").resolve(), Path(".venv_gpu").resolve()
LARGEST = 60.0  # MiB


def pack(names: list[str]) -> dict[str, float]:
    """Pack wheels and these data sets of SEG_DATA into PACK; the MiB of each."""
    place = os.environ.get("SEG_DATA")
    if not place or not all((Path(place) / name).is_dir() for name in names):
        raise InputError(f"no data: SEG_DATA ({place or 'not set'}) must name a folder that has {', '.join(names)}")
    data = {f"data/{name}": size(Path(place) / name) for name in names}
    refuse_large(data)
    for part in ("wheels", "data"):
        shutil.rmtree(PACK / part, ignore_errors=True)
    words = ["-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--implementation", "cp"]
    words += ["--python-version", "3.12", "--dest", str(PACK / "wheels"), "-r", str(ROOT / "benchmarks/gpu_wheels.txt")]
    for version in ("manylinux_2_28", "manylinux_2_17", "manylinux2014", "manylinux1"):
        words += ["--platform", f"{version}_x86_64"]
    if subprocess.run([sys.executable, *words]).returncode:
        raise InputError("pip could not fetch the wheels of benchmarks/gpu_wheels.txt: it says why above")
    sizes = {path.name: size(path) for path in sorted((PACK / "wheels").iterdir())} | data
    refuse_large(sizes)
    for name in names:
        shutil.copytree(Path(place) / name, PACK / "data" / name, copy_function=shutil.copy)
    return sizes


def unpack() -> None:
    """Install the wheels into SITE, beside what the machine has. Of Python alone, a wheel is a zip file of packages."""
    shutil.rmtree(SITE, ignore_errors=True)
    for wheel in sorted((PACK / "wheels").glob("*.whl")):
        shutil.unpack_archive(wheel, SITE, "zip")


def refuse_large(sizes: dict[str, float]) -> None:
    total = sum(sizes.values())
    if total > LARGEST:
        listed = ", ".join(f"{name} {mib:.1f}" for name, mib in sizes.items() if mib >= 0.1)
        raise InputError(f"gpu/ would have {total:.1f} MiB, {LARGEST:g} is the most ({listed}): name fewer data sets")


def size(path: Path) -> float:
    """MiB of a file, or of all files in a folder."""
    files = [path] if path.is_file() else [file for file in path.rglob("*") if file.is_file()]
    return sum(file.stat().st_size for file in files) / 2**20
