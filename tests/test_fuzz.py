"""The readers on files that were damaged at random: an array or one line, never a crash, a hang, or all the memory."""

import io
import resource
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from conftest import ROOT

FORMATS = ["png", "png16", "jpg", "bmp", "webp", "gif", "tif", "tif16", "tiled", "npy"]


def valid(kind: str) -> bytes:
    import imagecodecs
    import tifffile

    rng, out = np.random.default_rng(1), io.BytesIO()
    rgb = rng.integers(0, 256, (40, 56, 3), dtype=np.uint8)
    deep = rng.integers(0, 65536, (48, 64, 3), dtype=np.uint16)
    if kind == "png16":
        return imagecodecs.png_encode(deep)
    if kind == "tif16":
        tifffile.imwrite(out, deep, photometric="rgb", compression="zlib")
    elif kind == "tiled":
        tifffile.imwrite(
            out, np.concatenate([deep, deep], 2), photometric="minisblack", tile=(16, 16), compression="lzw"
        )
    elif kind == "npy":
        np.save(out, rgb)
    else:
        Image.fromarray(rgb).save(out, format={"jpg": "jpeg", "tif": "tiff"}.get(kind, kind))
    return out.getvalue()


def damaged(data: bytes, rng: np.random.Generator) -> bytes:
    changed = bytearray(data)
    match rng.integers(4):
        case 0:  # cut off
            return bytes(changed[: rng.integers(len(changed))])
        case 1:  # a few bytes anywhere
            for at in rng.integers(len(changed), size=rng.integers(1, 9)):
                changed[at] = rng.integers(256)
        case 2:  # the head, where sizes and offsets are
            for at in rng.integers(min(160, len(changed)), size=rng.integers(1, 5)):
                changed[at] = rng.choice([0, 1, 127, 128, 255])
        case 3:  # a piece twice
            start, length = rng.integers(len(changed)), rng.integers(1, 200)
            changed[start:start] = changed[start : start + length]
    return bytes(changed)


def main(kind: str, rounds: int) -> None:
    """Run in a process of its own, whose memory is bounded."""
    from segmentation.data.io import read_image, read_mask
    from segmentation.errors import InputError

    held = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(
        resource.RLIMIT_AS, (held + 2**30, resource.RLIM_INFINITY)
    )  # a GiB beyond what the libraries hold
    rng, data = np.random.default_rng(0), valid(kind)
    path = Path(f"damaged.{kind.rstrip('16').replace('tiled', 'tif')}")
    read = refused = 0
    for _ in range(rounds):
        path.write_bytes(damaged(data, rng))
        for reader in (lambda: read_image(path, None), lambda: read_image(path, 3), lambda: read_mask(path)):
            start = time.perf_counter()
            try:
                assert reader().size
                read += 1
            except InputError as error:
                line, refused = str(error), refused + 1
                assert line.startswith(str(path)) and "\n" not in line, line  # noqa: PT018
            assert time.perf_counter() - start < 10
    print(f"{kind}: {read} read, {refused} refused")
    assert refused


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="bounds memory as Linux does")
def test_damaged_files(place: Path) -> None:
    code = f"import sys; sys.path[:0] = [{str(ROOT / 'src')!r}, {str(ROOT / 'tests')!r}]; import test_fuzz; "
    code += f"[test_fuzz.main(kind, 60) for kind in {FORMATS}]"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, f"{done.returncode} {done.stdout} {done.stderr[-2000:]}"
