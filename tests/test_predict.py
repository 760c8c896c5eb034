"""predict.py: masks at the images' own names, sizes and values, and nothing lost or half-written."""

import errno
import json
import os
import re
import shutil
import sys
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import tifffile
import torch
from PIL import Image

from conftest import TINY_RUN, script, train, write_image
from segmentation.checkpoint import read_checkpoint
from segmentation.data.io import read_image
from segmentation.data.writing import atomic_write
from segmentation.errors import InputError
from segmentation.inference.compare import compare
from segmentation.inference.evaluate import evaluate
from segmentation.inference.export import export
from segmentation.inference.predict import find_images, predict
from segmentation.inference.predictor import Predictor
from segmentation.inference.prune import prune
from segmentation.inference.results import Results
from segmentation.module import SegmentationModule
from segmentation.training.entry import run_job

CPU = ["--accelerator", "cpu"]


@pytest.fixture
def photos() -> Path:
    rng = np.random.default_rng(0)
    for name, size in (("a.png", (40, 56)), ("deep/er/b c.jpg", (33, 70)), ("deep/é%d.tif", (17, 90))):
        write_image(Path("photos") / name, rng.integers(0, 256, (*size, 3), dtype=np.uint8))
    return Path("photos")


def read(path: str) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(image)


def test_masks_are_what_the_net_says_at_the_images_own_size(trained: Path, photos: Path) -> None:
    assert predict([str(trained), "photos", "out", *CPU]) == 3
    module = SegmentationModule.load_from_checkpoint(trained)
    predictor, tiled = Predictor(trained, "cpu"), Predictor(trained, "cpu", tile=32)
    for name, file in (("a", "a.png"), ("deep/er/b c", "deep/er/b c.jpg"), ("deep/é%d", "deep/é%d.tif")):
        image = torch.from_numpy(read(f"photos/{file}").copy()).permute(2, 0, 1)
        with torch.inference_mode():
            expected = module.classify(module(image[None]))[0].numpy()
        assert (read(f"out/{name}.png") == module.labels.decode(expected)).all()
        assert (module.classify(predictor.logits(image)).numpy() == expected).all()
        assert tiled.logits(image).shape == (module.labels.num_outputs, *expected.shape)
    record = json.loads(Path("out/predict.json").read_text())
    assert record["classes"][0]["value"] == 0
    left = {path.name for path in Path("out").rglob("*") if path.is_file()}
    assert left == {"a.png", "b c.png", "é%d.png", "predict.json"}


@pytest.fixture(scope="module")
def deep(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint for images of five channels of 16 bits."""
    folder = tmp_path_factory.mktemp("deep")
    rng = np.random.default_rng(0)
    for number in range(4):
        write_image(folder / f"data/masks/{number}.png", rng.integers(0, 2, (32, 32), dtype=np.uint8))
        (folder / "data/images").mkdir(exist_ok=True)
        np.save(folder / f"data/images/{number}.npy", rng.integers(0, 65536, (32, 32, 5), dtype=np.uint16))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("WANDB_MODE", "disabled")
        patch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
        data = ["--data.dataset", "FolderData", "--data.dataset.root", "data"]
        train(*TINY_RUN, *data, "--data.dataset.classes", "{background: 0, thing: 1}", "--name", "run")
    return folder / "runs/run/checkpoints/best.ckpt"


def test_images_that_their_tag_turns(deep: Path) -> None:
    """Every orientation that TIFF and EXIF know, of pixels that Pillow cannot read."""
    pixels = np.random.default_rng(1).integers(0, 65536, (40, 52, 5), dtype=np.uint16)
    for orientation in range(1, 9):
        tag = [(274, "H", 1, orientation, True)]
        options = {"photometric": "minisblack", "planarconfig": "contig", "extratags": tag}
        Path("photos").mkdir(exist_ok=True)
        tifffile.imwrite(f"photos/{orientation}.tif", pixels, **options)
        np.save(f"photos/{orientation}-upright.npy", read_image(Path(f"photos/{orientation}.tif"), 5))
    assert predict([str(deep), "photos", "out", "--overlay", *CPU]) == 16
    assert predict([str(deep), "photos", "tiles", "--tile", "16", *CPU]) == 16
    for orientation in range(1, 9):
        for folder in ("out", "out/overlays", "tiles"):
            assert (read(f"{folder}/{orientation}.png") == read(f"{folder}/{orientation}-upright.png")).all()
    assert read("out/6.png").shape == (52, 40)
    assert len({read(f"out/{orientation}.png").tobytes() for orientation in range(1, 9)}) == 8


def test_from_python_a_file_a_picture_and_an_array_give_what_predict_writes(trained: Path, photos: Path) -> None:
    exif = Image.Exif()
    exif[274] = 6
    with Image.open(photos / "a.png") as picture:
        picture.rotate(90, expand=True).save(photos / "a.png", exif=exif)
        picture.convert("P").save(photos / "palette.png")
    options = [str(trained), "photos", *CPU, "--tta", "flips"]
    predict([*options, "masks"])
    predict([*options, "chances", "--format", "probabilities"])
    predictor = Predictor(str(trained), "cpu", tta="flips")
    for name in ("a", "palette"):
        with Image.open(photos / f"{name}.png") as picture:
            array = read_image(photos / f"{name}.png", 3).transpose(1, 2, 0)
            for image in (f"photos/{name}.png", photos / f"{name}.png", picture, array):
                mask, probabilities, names = predictor(image)
                assert np.array_equal(mask, read(f"masks/{name}.png"))
                written = np.load(f"chances/{name}.npy")
                assert probabilities.dtype == np.float32
                assert np.allclose(probabilities, written, atol=1e-3)
                assert names == predictor.labels.names
    wrong = {
        "has 4 channels, where the data has 3": np.zeros((8, 8, 4), np.uint8),
        "has 8 channels": np.zeros((3, 8, 8), np.uint8),
        "is float32, but the net was trained on uint8": np.zeros((8, 8, 3), np.float32),
        r"give \(H, W\) or \(H, W, C\)": np.zeros((1, 8, 8, 3), np.uint8),
    }
    for message, image in wrong.items():
        with pytest.raises(InputError, match=message):
            predictor(image)


@pytest.mark.slow
def test_a_large_photograph_that_its_tag_turns(trained: Path) -> None:
    """Of more pixels than Pillow turns for us. A strip of it is enough."""
    exif = Image.Exif()
    exif[274] = 6
    pixels = np.zeros((8000, 8010, 3), np.uint8)
    pixels[-200:] = np.random.default_rng(0).integers(0, 256, (200, 8010, 3), dtype=np.uint8)
    Image.fromarray(pixels).save("large.png", exif=exif, compress_level=1)
    predictor = Predictor(trained, "cpu")
    image = predictor.read(Path("large.png"))
    upright = np.rot90(pixels, -1).transpose(2, 0, 1).copy()
    assert np.array_equal(image, upright)
    strips = predictor.strips(image)
    first = next(strips)
    assert not torch.is_inference_mode_enabled()  # between two strips the caller's code runs as it did
    assert torch.equal(first, next(predictor.strips(upright)))


@pytest.mark.parametrize("dtype", ["u1", ">u2", "<u2", ">f4"])
def test_arrays_of_any_layout(trained: Path, dtype: str) -> None:
    """As users cut them from their own: turned, read-only, of another byte order."""
    predictor = Predictor(trained, "cpu")
    pixels = np.random.default_rng(0).integers(0, 256, (60, 50, 3)).astype(dtype)
    expected = predictor.logits(pixels.astype(dtype.replace(">", "<"))[::-1, ::-1].transpose(2, 1, 0).copy())
    for writeable in (True, False):
        pixels.flags.writeable = writeable
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert torch.equal(predictor.logits(pixels[::-1, ::-1].transpose(2, 1, 0)), expected)


def test_the_declared_scale_changes_no_prediction() -> None:
    """Images are normalised by the statistics of what was trained on, on the same scale."""
    rng = np.random.default_rng(0)
    for number in range(6):
        mask = rng.integers(0, 2, (4, 4), dtype=np.uint8).repeat(8, axis=0).repeat(8, axis=1)
        write_image(Path(f"data/masks/{number}.png"), mask)
        write_image(
            Path(f"data/images/{number}.png"), (rng.integers(0, 2000, mask.shape) + 2000 * (mask > 0)).astype("u2")
        )
    data = ["--data.dataset", "FolderData", "--data.dataset.root", "data"]
    data += ["--data.dataset.classes", "{background: 0, thing: 1}"]
    chances = []
    for scale in ("null", "4095"):
        train(*TINY_RUN, *data, "--data.dataset.scale", scale, "--name", f"scale-{scale}")
        checkpoint = f"runs/scale-{scale}/checkpoints/best.ckpt"
        predict([checkpoint, "data/images", scale, "--format", "probabilities", *CPU])
        chances.append(np.stack([np.load(f"{scale}/{number}.npy") for number in range(6)]))
    assert chances[0].std() > 0.02
    np.testing.assert_allclose(chances[0], chances[1], atol=5e-3)


def test_every_format_and_the_pictures(trained: Path, photos: Path) -> None:
    predict([str(trained), "photos/a.png", "index", "--overlay", "--instances", *CPU])
    predict([str(trained), "photos/a.png", "palette", "--format", "palette", *CPU])
    predict([str(trained), "photos/a.png", "chances", "--format", "probabilities", "--instances", *CPU])
    index, labels = read("index/a.png"), SegmentationModule.load_from_checkpoint(trained).labels
    with Image.open("palette/a.png") as picture:
        assert picture.mode == "P"
        assert (np.asarray(picture) == index).all()
        assert (np.asarray(picture.convert("RGB")) == labels.palette[index]).all()
    chances = np.load("chances/a.npy")
    assert chances.dtype == np.float16
    assert chances.shape == (5, 40, 56)
    np.testing.assert_allclose(chances.astype(np.float32).sum(axis=0), 1, atol=2e-3)
    assert (chances.astype(np.float32).argmax(axis=0) == index).mean() > 0.99
    with Image.open("index/instances/a.png") as ids:
        assert ids.mode == "I;16"
        assert (np.asarray(ids) == read("chances/instances/a.png")).all()
    assert read("index/overlays/a.png").shape == (40, 56, 3)


def test_tiles_write_the_same_strip_by_strip(trained: Path) -> None:
    write_image(Path("large.png"), np.random.default_rng(0).integers(0, 256, (130, 101, 3), dtype=np.uint8))
    predict([str(trained), "large.png", "whole", "--format", "probabilities", *CPU])
    predict([str(trained), "large.png", "tiled", "--format", "probabilities", "--tile", "64", *CPU])
    whole, tiled = np.load("whole/large.npy").astype(np.float32), np.load("tiled/large.npy").astype(np.float32)
    assert whole.shape == tiled.shape
    assert np.abs(whole - tiled).mean() < 0.02
    assert (whole.argmax(axis=0) == tiled.argmax(axis=0)).mean() > 0.9


def test_it_goes_on_where_it_was_stopped(
    trained: Path, photos: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    predict([str(trained), "photos", "out", *CPU])
    Path("out/deep/er/b c.png").unlink()
    before = Path("out/a.png").stat().st_mtime_ns
    assert predict([str(trained), "photos", "out", *CPU]) == 1
    assert Path("out/a.png").stat().st_mtime_ns == before
    assert "left out   2 images" in capsys.readouterr().out
    with pytest.raises(InputError, match="another --format"):
        predict([str(trained), "photos", "out", "--format", "palette", *CPU])
    with monkeypatch.context() as patch:  # stopped after one image of the new format
        patch.setattr(Predictor, "strips", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            predict([str(trained), "photos", "out", "--format", "palette", "--overwrite", *CPU])
    assert predict([str(trained), "photos", "out", "--format", "palette", *CPU]) == 3  # none of the old ones is left


def test_a_folder_holds_the_masks_of_one_checkpoint_and_of_the_images_named(trained: Path, photos: Path) -> None:
    """Whatever is overwritten, and whatever else has the same name."""
    predict([str(trained), "photos", "out", *CPU])
    other = Path("other.ckpt")
    torch.save({**read_checkpoint(trained), "epoch": 99}, other)
    with pytest.raises(InputError, match="another checkpoint"):
        predict([str(other), "photos", "out", *CPU])
    assert predict([str(other), "photos", "out", "--overwrite", *CPU]) == 3
    assert predict([str(other), "photos/a.png", "out", *CPU]) == 0
    assert predict([str(other), "photos/a.png", "out", "--overwrite", *CPU]) == 1  # the others are as they were
    write_image(Path("b/a.png"), np.zeros((30, 30, 3), np.uint8))
    with pytest.raises(InputError, match=r"out has out/a\.png of another image"):
        predict([str(other), "b", "out", *CPU])
    assert predict([str(other), "b", "out", "--overwrite", *CPU]) == 1
    assert read("out/a.png").shape == (30, 30)


@pytest.mark.parametrize("text", [b"", b"{", b"[]", b"3", b"{}", b'{"images": 3}', b"\xff\xfe\0", b'{"images": {}'])
def test_a_damaged_record_is_named(text: bytes, trained: Path, photos: Path) -> None:
    """Even --overwrite does not know which of the files there were results."""
    Path("out").mkdir()
    Path("out/predict.json").write_bytes(text)
    for more in ([], ["--overwrite"]):
        with pytest.raises(InputError, match=r"^out/predict\.json: [^\n]*another OUTPUT[^\n]*$"):
            predict([str(trained), "photos", "out", *CPU, *more])


def test_no_result_of_another_kind_outlives_its_checkpoint(trained: Path, photos: Path) -> None:
    """An overlay made by another checkpoint is no overlay of this one's, though the mask is."""
    other = Path("other.ckpt")
    torch.save({**read_checkpoint(trained), "epoch": 99}, other)
    predict([str(trained), "photos", "out", "--overlay", "--instances", *CPU])
    predict([str(other), "photos", "out", "--overwrite", *CPU])
    assert len(list(Path("out").rglob("*.png"))) == 3
    assert predict([str(other), "photos", "out", "--overlay", *CPU]) == 3
    predict([str(other), "photos", "out", "--format", "probabilities", "--overwrite", *CPU])
    assert not list(Path("out").rglob("*.png"))
    write_image(Path("own/overlays/a.png"), np.zeros((4, 4), np.uint8))  # of the user's own
    with pytest.raises(InputError, match=r"own has own/overlays/a\.png of another image"):
        predict([str(trained), "photos", "own", "--overlay", *CPU])
    Path("links").mkdir()
    Path("links/a.jpg").symlink_to("../photos/a.png")
    with pytest.raises(InputError, match="no image here"):
        predict([str(trained), "links", "links", *CPU])


def test_results_have_places_of_their_own(trained: Path) -> None:
    image = np.zeros((20, 20, 3), np.uint8)
    for name in ("x.png", "overlays/x.png"):
        write_image(Path("photos") / name, image)
    with pytest.raises(InputError, match=r"^out/overlays/x\.png .*OUTPUT"):
        predict([str(trained), "photos", "out", "--overlay", *CPU])
    assert predict([str(trained), "photos", "photos/out", *CPU]) == 2
    assert predict([str(trained), "photos", "photos/out", *CPU]) == 0  # its masks are no images
    Path("file").touch()
    for output in ("file", "file/deeper"):
        with pytest.raises(OSError, match=f"'{output}'"):
            predict([str(trained), "photos", output, *CPU])


@pytest.mark.parametrize("begin", ["a" * 120, "長" * 80], ids=["ascii", "three bytes a letter"])
def test_long_names_that_begin_alike(begin: str, trained: Path) -> None:
    names = [f"{begin}{number}" for number in range(8)]
    with atomic_write(Path(names[0])) as one, atomic_write(Path(names[1])) as other:
        assert one != other
        one.touch()
        other.touch()
    for number, name in enumerate(names):
        write_image(Path("photos") / f"{name}.png", np.zeros((20, 20 + number, 3), np.uint8))
    assert predict([str(trained), "photos", "out", "--overlay", *CPU]) == 8
    for number, name in enumerate(names):
        assert read(f"out/{name}.png").shape == (20, 20 + number)


def test_bad_images_are_listed_and_the_others_done(
    trained: Path, photos: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (photos / "cut.png").write_bytes((photos / "a.png").read_bytes()[:200])
    write_image(photos / "gray.png", np.zeros((20, 20), np.uint8))
    tifffile.imwrite(photos / "deep16.tif", np.zeros((20, 20, 3), np.uint16), photometric="rgb")
    (photos / "empty.jpg").touch()
    (photos / "link.png").symlink_to("nowhere.png")
    with pytest.raises(InputError, match=r"5 of 8 images left out, listed in out/unreadable.txt"):
        predict([str(trained), "photos", "out", *CPU])
    listed = Path("out/unreadable.txt").read_text()
    for text in ("cut.png", "empty.jpg", "has 1 channel, where the data has 3", "is uint16, but the net"):
        assert text in listed
    assert len(list(Path("out").rglob("*.png"))) == 3
    assert "predicted  3 of 8 images" in capsys.readouterr().out
    for name in ("cut.png", "gray.png", "deep16.tif", "empty.jpg", "link.png"):
        (photos / name).unlink()
    assert predict([str(trained), "photos", "out", *CPU]) == 0
    assert not Path("out/unreadable.txt").exists()


def test_images_are_never_replaced(trained: Path, photos: Path) -> None:
    before = (photos / "a.png").read_bytes()
    for given in (["photos/a.png"], ["photos"], ["photos/*"]):
        with pytest.raises(InputError, match="no image here"):
            predict([str(trained), *given, "photos", "--overwrite", *CPU])
    assert not Path("photos/predict.json").exists()
    Path("masks").mkdir()
    shutil.copy(photos / "a.png", "masks/a.png")
    with pytest.raises(InputError, match=r"masks has masks/a\.png of another image"):
        predict([str(trained), "photos/a.png", "masks", *CPU])
    assert (photos / "a.png").read_bytes() == Path("masks/a.png").read_bytes() == before


def test_which_images(photos: Path) -> None:
    out = Path("photos/out")

    def names(inputs: list[str]) -> set[str]:
        return set(find_images(inputs, out).values())

    write_image(out / "a.png", np.zeros((4, 4), np.uint8))  # of an earlier run: no input
    for hidden in ("._a.png", "deep/.thumbnails/a.png"):
        write_image(Path("photos") / hidden, np.zeros((4, 4), np.uint8))
    assert names(["photos"]) == {"a", "deep/er/b c", "deep/é%d"}
    assert names(["photos/**/*.jpg"]) == {"deep/er/b c"}
    assert names(["photos/a.png", "photos/deep/er/b c.jpg"]) == {"a", "b c"}
    shutil.copy(photos / "a.png", photos / "a.bmp")
    assert names(["photos/a.*"]) == {"a.bmp", "a.png"}
    os.symlink("..", photos / "deep" / "loop")
    assert len(find_images(["photos"], out)) == 4
    Path("nothing").mkdir()
    for bad, message in (("nothing", "no image here"), ("missing.png", "no such file"), ("photos/*.xyz", "no image")):
        with pytest.raises(InputError, match=message):
            find_images([bad], out)


def test_memory_holds_one_large_image(trained: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """However well its file compresses, and whether Pillow knows the format or not."""
    for number in range(4):
        write_image(Path(f"photos/{number}.png"), np.zeros((60, 60, 3), np.uint8))
        np.save(f"photos/array{number}.npy", np.zeros((60, 60, 3), np.uint8))
    module = sys.modules["segmentation.inference.predict"]
    monkeypatch.setattr(module, "LARGE", 3000)
    monkeypatch.setattr(module, "LARGE_FILE", 3000)
    read, save = Predictor.read, Results.save
    held: list[Path] = []
    most = []

    def counted_read(self: Predictor, path: Path) -> np.ndarray:
        held.append(path)
        most.append(len(held))
        return read(self, path)

    def counted_save(self: Results, *args: object) -> None:
        save(self, *args)
        held.pop()

    monkeypatch.setattr(Predictor, "read", counted_read)
    monkeypatch.setattr(Results, "save", counted_save)
    assert predict([str(trained), "photos", "out", *CPU]) == 8
    assert most == [1] * 8


def test_a_full_disk_leaves_nothing_half_written(trained: Path, photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save = Image.Image.save

    def fails(self: Image.Image, path: Path, **options: object) -> None:
        save(self, path, **options)
        if "b c" in str(path):
            os.truncate(path, 10)
            raise OSError(errno.ENOSPC, "No space left on device", str(path))

    monkeypatch.setattr(Image.Image, "save", fails)
    with pytest.raises(OSError, match="No space left"):
        predict([str(trained), "photos", "out", *CPU])
    monkeypatch.undo()
    assert not list(Path("out").rglob(".*"))
    assert not Path("out/deep/er/b c.png").exists()
    for path in Path("out").rglob("*.png"):
        read(str(path))


@pytest.mark.parametrize("job", [predict, evaluate, prune, export])
def test_a_bad_checkpoint_is_one_line(job: Callable, trained: Path, photos: Path) -> None:
    Path("cut.ckpt").write_bytes(trained.read_bytes()[:5000])
    whole = read_checkpoint(trained)
    others = (
        *({"state_dict": {}}, [1], {**whole, "hyper_parameters": None}, {**whole, "hyper_parameters": {"labels": {}}}),
        *({k: v for k, v in whole.items() if k != key} for key in ("state_dict", "precision")),
        {**whole, "datamodule_hyper_parameters": [], "state_dict": {"net.x": 1}},
    )
    for number, contents in enumerate(others):
        torch.save(contents, f"other{number}.ckpt")
    Path("text.ckpt").write_text("not one\n")
    for name in ("missing.ckpt", "cut.ckpt", "text.ckpt", *(f"other{number}.ckpt" for number in range(len(others)))):
        with pytest.raises(InputError, match=f"^{name}: [^\n]*$"):
            job([name, *(["photos", "out"] if job is predict else [])])
    with pytest.raises(InputError, match=r"no such checkpoint.*checkpoints/best\.ckpt"):
        job([str(trained.parents[1]), *(["photos", "out"] if job is predict else [])])
    assert not Path("out").exists()


@pytest.mark.slow
def test_exit_status_and_message(trained: Path, photos: Path) -> None:
    (photos / "empty.jpg").touch()
    done = script("predict", str(trained), "photos", "out", *CPU)
    assert done.returncode == 2
    assert done.stderr.startswith("error: photos/empty.jpg: ")
    assert done.stderr.count("\n") == 1
    assert "predicted  3 of 4 images to out" in done.stdout


def test_a_malicious_checkpoint_runs_nothing(photos: Path) -> None:
    class Bomb:
        def __reduce__(self) -> tuple:
            return (os.system, ("touch exploded",))

    torch.save({"hyper_parameters": {"labels": {}}, "state_dict": {}, "bomb": Bomb()}, "bomb.ckpt")
    with pytest.raises(InputError, match=r"bomb\.ckpt: holds more than weights"):
        predict(["bomb.ckpt", "photos", "out", *CPU])
    assert not Path("exploded").exists()


@pytest.mark.parametrize(
    ("job", "args", "message"),
    [
        (evaluate, ["--tile", "0"], "--tile 0 is too small"),
        (predict, ["--tile", "x"], "invalid int value: 'x'"),
        (predict, ["--tta", "photos", "out"], "invalid choice: 'photos'"),
        (prune, ["--level", "0"], "level 0 is no head of this net"),
        (evaluate, ["--output", "."], "'.' is a folder"),
        (evaluate, ["--output", "folder"], "folder is a folder"),
        (evaluate, ["--data.num_worker", "0"], "train.py --help"),
    ],
)
def test_options_that_cannot_be_are_one_line(job: Callable, args: list[str], message: str, trained: Path) -> None:
    Path("folder").mkdir()
    Path("file").touch()
    given = [*args, "photos", "out"] if job is predict else args
    with pytest.raises(InputError, match=f"^[^\n]*{re.escape(message)}[^\n]*$"):
        job([str(trained), *given])


def test_the_output_is_a_folder(trained: Path, photos: Path) -> None:
    with pytest.raises(InputError, match=r"Fix: out/a$"):
        predict([str(trained), "photos", "out/a.png", *CPU])
    assert not Path("out").exists()


@pytest.mark.parametrize("job", [evaluate, prune, compare])
def test_a_file_where_a_folder_should_be(
    job: Callable, trained: Path, exit_raises: None, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("file").touch()
    with pytest.raises(SystemExit, match="2"):
        run_job(lambda: job([str(trained), "--output", "file/deep/x"]))
    assert capsys.readouterr().err.startswith("error: file/deep: Not a directory. Give another place")


@pytest.mark.parametrize("job", [evaluate, predict, prune, export, compare])
def test_help_reads_well(job: Callable, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        job(["--help"])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith(f"usage: python src/{job.__name__.replace('evaluate', 'eval')}.py ")
    assert max(map(len, lines)) <= 130
    assert len(lines) < 60


def test_masks_beside_images_are_no_images(trained: Path, capsys: pytest.CaptureFixture) -> None:
    for name in ("x", "x_mask", "one_mask"):
        write_image(Path(f"photos/{name}.png"), np.zeros((16, 16, 3), np.uint8))
    assert predict([str(trained), "photos", "out", *CPU]) == 2
    assert {path.name for path in Path("out").glob("*.png")} == {"x.png", "one_mask.png"}
    assert "1 mask by name" in capsys.readouterr().out
    assert predict([str(trained), "photos/x_mask.png", "named", *CPU]) == 1
