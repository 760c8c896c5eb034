"""A checkpoint that anyone may have written is data: no job runs what it names, and what is wrong is one line."""

import copy
import json
import math
import shutil
import sys
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from conftest import TINY, TINY_RUN, make_folder, script, train, write_image
from segmentation.checkpoint import read_checkpoint
from segmentation.data import SegmentationDataModule
from segmentation.errors import InputError
from segmentation.inference.evaluate import evaluate
from segmentation.inference.export import export
from segmentation.inference.predict import predict
from segmentation.inference.prune import prune
from segmentation.module import SegmentationModule
from segmentation.nets import UNetPlusPlus

HEADS = ["--model.net.widths", "[4,8,8]"]
CPU = ["--trainer.accelerator", "cpu", "--data.num_workers", "0", "--trainer.enable_progress_bar", "false"]
SECTIONS = ("hyper_parameters", "datamodule_hyper_parameters")

#: What tells that code ran: a file in the folder where the command is typed.
OWNED = "owned"
WRITES = f"open({OWNED!r}, 'w').close()\n"
CLASS = "from segmentation.nets import UNet\nclass Thing(UNet): pass\n"
CALL = {"class_path": "os.mkdir", "init_args": {"path": OWNED}}

#: What is planted in the place of a text.
GADGETS: dict[str, Any] = {
    "a function": CALL,
    "a function, as YAML": yaml.safe_dump(CALL, default_flow_style=True).strip(),
    "a script of this folder": "gadget_script.Thing",
    "a module of a sub-folder": {"class_path": "gadget_folder.inside.Thing", "init_args": {}},
    "an installed module": "gadget_installed.Thing",
    "an installed module, as a class": {"class_path": "gadget_installed.Thing"},
    "a transform that calls": {
        "class_path": "torchvision.transforms.v2.Lambda",
        "init_args": {"lambd": "gadget_script.Thing"},
    },
    "a module that ours imports": "segmentation.nets.base.torch.nn.Identity",
}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run whose options have many texts: data in files, a sum of losses, heads to prune."""
    folder = tmp_path_factory.mktemp("untrusted")
    make_folder(folder / "data", {"train": 4, "val": 2, "test": 2}, values=(0, 100, 255))
    classes = {"ground": 0, "wall": 100, "door": {"value": 255, "color": "#FF0000"}}
    patterns = {"images": "{split}/images", "masks": "{split}/masks/{name}.png", "splits": {"val": "val"}}
    dataset = {"root": str(folder / "data"), "classes": classes, "group": "^[^_]+", **patterns}
    losses = [{"class_path": "CrossEntropy", "init_args": {"class_weights": "auto"}}, {"class_path": "Dice"}]
    net = {"class_path": "UNetPlusPlus", "init_args": {"deep_supervision": True}}
    overlay = {
        "data": {"dataset": {"class_path": "FolderData", "init_args": dataset}, "crop": 32},
        "model": {"net": net, "loss": {"class_path": "WeightedSum", "init_args": {"losses": losses}}},
    }
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("WANDB_MODE", "disabled")
        patch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
        Path("own.yaml").write_text(yaml.safe_dump(overlay, sort_keys=False))
        train("--config", "own.yaml", *TINY_RUN, *HEADS, "--name", "run")
    return folder / "runs" / "run"


@pytest.fixture
def gadgets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Modules that write when they are imported: a script beside the user, a package below, and an installed one."""
    for file, text in (
        ("gadget_script.py", WRITES),
        ("gadget_folder/__init__.py", WRITES),
        ("gadget_folder/inside.py", CLASS),
        ("site/gadget_installed.py", WRITES + CLASS),
    ):
        Path(file).parent.mkdir(exist_ok=True)
        Path(file).write_text(text)
    monkeypatch.syspath_prepend(tmp_path / "site")
    write_image(Path("photos/a.png"), np.random.default_rng(0).integers(0, 256, (40, 48, 3), dtype=np.uint8))
    yield
    for name in [name for name in sys.modules if name.startswith("gadget_")]:
        del sys.modules[name]


def predicted(path: str) -> bytes:
    predict([path, "photos", "out", "--overwrite", "--accelerator", "cpu"])
    with Image.open("out/a.png") as mask:
        return mask.tobytes()


def evaluated(path: str) -> dict[str, float]:
    return evaluate([path, *CPU])


def pruned(path: str) -> dict[str, torch.Tensor]:
    prune([path, "--level", "1", "--output", "small", "--overwrite"])
    return {key: value.tolist() for key, value in read_checkpoint("small_L1.ckpt")["state_dict"].items()}


def exported(path: str) -> list:
    file = export([path, "--format", "torch_export", "--output", "net.pt2", "--overwrite", "--data.num_workers", "0"])
    image = torch.arange(3 * 40 * 48, dtype=torch.uint8).view(1, 3, 40, 48)
    return torch.export.load(file).module()(image)[0].tolist()


#: What a job must build of a checkpoint. It takes no notice of the rest.
NET = ["hyper_parameters net", "hyper_parameters labels"]
LOSS = [f"hyper_parameters {key}" for key in ("loss", "head_weights", "threshold", "boundary_iou")]
OPTIONS = ("dataset", "batch_size", "eval_batch_size", "num_workers", "cache", "folds", "fold", "on_bad_file", "seed")
DATA = [f"datamodule_hyper_parameters {key}" for key in OPTIONS]
BUILDS: dict[Callable, list[str]] = {
    predicted: NET,
    pruned: NET,
    evaluated: [*NET, *DATA, *LOSS],
    exported: [*NET, *DATA],
}
JOBS = [predicted, pruned, *(pytest.param(job, marks=pytest.mark.slow) for job in (evaluated, exported))]


def leaves(value: Any, place: tuple = ()) -> Iterator[tuple[tuple, Any]]:
    """Every value of a checkpoint's options that holds no other, with the keys that lead to it."""
    if isinstance(value, dict | list) and value:
        for key, inside in value.items() if isinstance(value, dict) else enumerate(value):
            yield from leaves(inside, (*place, key))
    else:
        yield place, value


def options_of(checkpoint: dict[str, Any]) -> list[tuple[tuple, Any]]:
    return [pair for section in SECTIONS for pair in leaves(checkpoint[section], (section,))]


def plant(checkpoint: dict[str, Any], place: tuple, gadget: Any) -> None:
    """Put a gadget in the place of a value; one with arguments in the place of a class with its arguments."""
    *way, last = place[:-1] if place[-1] == "class_path" and isinstance(gadget, dict) else place
    for key in way:
        checkpoint = checkpoint[key]
    checkpoint[last] = copy.deepcopy(gadget)


def outcome(job: Callable, path: str, where: Any) -> Any:
    """What a job gives, or None where it refuses a checkpoint in one line. Nothing that the file names may have run."""
    found, refusal = None, ""
    try:
        found = job(path)
    except InputError as error:
        refusal = str(error)
    assert "\n" not in refusal, where
    assert not Path(OWNED).exists(), where
    return found


@pytest.mark.parametrize("job", JOBS)
def test_no_text_of_a_checkpoint_runs_code(job: Callable, run: Path, gadgets: None) -> None:
    clean = read_checkpoint(run / "checkpoints/best.ckpt")
    torch.save(clean, "clean.ckpt")
    right = job("clean.ckpt")
    texts = [place for place, value in options_of(clean) if isinstance(value, str)]
    built = [place for place in texts if " ".join(place[:2]) in BUILDS[job]]
    assert len(built) >= 10
    assert len(texts) - len(built) >= 6
    kinds = list(GADGETS.items())
    for number, place in enumerate(built):
        for turn in range(2):
            kind, gadget = kinds[(number + turn * len(kinds) // 2) % len(kinds)]
            changed = copy.deepcopy(clean)
            plant(changed, place, gadget)
            torch.save(changed, "changed.ckpt")
            found = outcome(job, "changed.ckpt", (place, kind))
            assert found is None or found == right, (place, kind)
    # What a job does not need cannot stop it either.
    changed = copy.deepcopy(clean)
    others = [place for place in texts if place not in built]
    for number, place in enumerate(sorted(others, key=len, reverse=True)):  # a section after what it holds
        plant(changed, place, kinds[number % len(kinds)][1])
    torch.save(changed, "changed.ckpt")
    assert outcome(job, "changed.ckpt", others) == right
    outcome(SegmentationModule.load_from_checkpoint, "changed.ckpt", others)  # as users of Lightning do


def test_data_of_a_checkpoint_is_not_built_by_lightning(run: Path, gadgets: None) -> None:
    """As users of Lightning may try: its own way imports what the file names."""
    checkpoint = read_checkpoint(run / "checkpoints/best.ckpt")
    checkpoint["datamodule_hyper_parameters"]["augment"] = [GADGETS["a transform that calls"]]
    torch.save(checkpoint, "changed.ckpt")
    with pytest.raises(InputError, match=r"^changed\.ckpt: [^\n]*SegmentationDataModule\(dataset"):
        SegmentationDataModule.load_from_checkpoint("changed.ckpt", weights_only=True)
    assert not Path(OWNED).exists()


def change(path: Path, **options: Any) -> dict[str, Any]:
    """A checkpoint with other options of the model."""
    checkpoint = read_checkpoint(path)
    checkpoint["hyper_parameters"].update(options)
    return checkpoint


def test_training_takes_weights_of_a_checkpoint_and_runs_nothing(
    run: Path, gadgets: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To go on with a run, and to start from the weights of another."""
    shutil.copytree(run, "runs/run")
    last = Path("runs/run/checkpoints/last.ckpt")
    changed = read_checkpoint(last)
    texts = [place for place, value in options_of(changed) if isinstance(value, str)]
    for number, place in enumerate(sorted(texts, key=len, reverse=True)):
        plant(changed, place, list(GADGETS.values())[number % len(GADGETS)])
    torch.save(changed, last)
    longer = ["--resume", "--trainer.max_epochs", "3"]
    resumed = train("--config", str(run.parents[1] / "own.yaml"), *TINY_RUN, *HEADS, "--name", "run", *longer)
    assert resumed.trainer.current_epoch == 3
    started = train(*TINY, *HEADS, "--name", "new", "--model.init_from", str(last), "--trainer.max_epochs", "1")
    assert started.trainer.current_epoch == 1
    assert not Path(OWNED).exists()
    weights = changed["state_dict"]
    nowhere = {key: torch.empty_like(value, device="meta") for key, value in weights.items()}
    sparse = {key: value.to_sparse() for key, value in weights.items()}
    for number, wrong in enumerate(({"net.heads.1.weight": "xx"}, nowhere, sparse)):
        torch.save({**changed, "state_dict": wrong}, f"wrong{number}.ckpt")
        with pytest.raises(InputError, match=r"^wrong\d\.ckpt: [^\n]*$"):
            train(*TINY, *HEADS, "--name", "never", "--model.init_from", f"wrong{number}.ckpt")


@pytest.mark.slow
def test_a_run_that_goes_on_removes_nothing_that_its_checkpoint_names(run: Path, gadgets: None) -> None:
    """Callbacks note files of theirs there, to replace them later."""
    shutil.copytree(run, "runs/run")
    last = Path("runs/run/checkpoints/last.ckpt")
    Path("precious").mkdir()
    victim = str(last.parent / "../../../precious")
    for paths in ({"best_model_path": victim}, {"best_model_path": ""}):
        changed = read_checkpoint(last)
        for state in changed["callbacks"].values():
            if "best_model_path" in state:
                also = {"kth_best_model_path": victim, "last_model_path": victim, "best_k_models": {victim: -1.0}}
                state.update({**also, "dirpath": str(last.parent.resolve()), **paths})
        torch.save(changed, last)
        epochs = str(changed["epoch"] + 2)
        config = ["--config", str(run.parents[1] / "own.yaml")]
        train(*config, *TINY_RUN, *HEADS, "--name", "run", "--resume", "--trainer.max_epochs", epochs)
        assert Path("precious").is_dir()


@pytest.mark.parametrize("job", [predicted, pytest.param(evaluated, marks=pytest.mark.slow)])
def test_values_that_cannot_be_are_one_line(job: Callable, run: Path, gadgets: None) -> None:
    """Of the options of net and labels, and of the data's: each is replaced by values of other types."""
    clean = read_checkpoint(run / "checkpoints/best.ckpt")
    places = [place for place, _ in options_of(clean) if " ".join(place[:2]) in BUILDS[job]]
    for number, place in enumerate([*places, ("precision",), ("state_dict",), ("hyper_parameters", "labels")]):
        junk = ("xx", -1, [["a"]], None, {}, 1e30, math.nan)[number % 7]
        changed = copy.deepcopy(clean)
        plant(changed, place, junk)
        torch.save(changed, "changed.ckpt")
        outcome(job, "changed.ckpt", (place, junk))
    for wrong in (
        {"labels": {**clean["hyper_parameters"]["labels"], "values": "xx"}},
        {"labels": {**clean["hyper_parameters"]["labels"], "names": ["a", "b"]}},
        {"labels": {**clean["hyper_parameters"]["labels"], "colors": ["xx"] * 3}},
    ):
        torch.save(change(run / "checkpoints/best.ckpt", **wrong), "changed.ckpt")
        with pytest.raises(InputError, match=r"^changed\.ckpt: [^\n]*$"):
            job("changed.ckpt")
    torch.save({**clean, "precision": "abc"}, "changed.ckpt")
    with pytest.raises(InputError, match=r"^changed\.ckpt: [^\n]*precision[^\n]*'abc'[^\n]*$"):
        job("changed.ckpt")


class Zeros:
    def __reduce__(self) -> tuple:
        return bytearray, (2**30,)


def test_a_text_that_is_there_many_times_does_not_hang_a_job(run: Path) -> None:
    """Pickle keeps it once."""
    best = run / "checkpoints/best.ckpt"
    checkpoint = torch.load(best, weights_only=True)
    checkpoint["hyper_parameters"]["labels"] = ["x" * 1_000_000] * 100_000
    torch.save(checkpoint, "many.ckpt")
    with pytest.raises(InputError, match=r"^many\.ckpt: is not a checkpoint"):
        read_checkpoint("many.ckpt")


@pytest.mark.slow
def test_a_file_that_would_fill_the_memory_is_not_loaded(run: Path, gadgets: None) -> None:
    """Packed: zeros of 256 MiB in a file of less than one, of which the size is said before it is loaded. Zeros that
    are asked for by their number. And options that hold one list twice, and that another twice, and so on: few bytes,
    and billions of values."""
    checkpoint = run / "checkpoints/best.ckpt"
    with zipfile.ZipFile(checkpoint) as whole, zipfile.ZipFile("packed.ckpt", "w", zipfile.ZIP_DEFLATED) as packed:
        for part in whole.namelist():
            packed.writestr(part, whole.read(part))
        with packed.open(f"{part.partition('/')[0]}/data/999", "w", force_zip64=True) as large:
            for _ in range(256):
                large.write(bytes(2**20))
    value: Any = "x"
    for _ in range(60):
        value = [value, value]
    torch.save(change(checkpoint, head_weights=value), "twice.ckpt")
    torch.save({**read_checkpoint(checkpoint), "precision": value}, "precision.ckpt")
    zeros = {**read_checkpoint(checkpoint), "zeros": Zeros()}
    torch.save(zeros, "zeros.ckpt")
    torch.save(zeros, "unzipped.ckpt", _use_new_zipfile_serialization=False)  # as torch wrote files before 1.6
    shutil.copy("zeros.ckpt", "hidden.ckpt")
    with zipfile.ZipFile("zeros.ckpt") as whole, zipfile.ZipFile("upper.ckpt", "w") as upper:
        pickle = next(part for part in whole.namelist() if part.endswith("/data.pkl"))
        for part in whole.namelist():
            upper.writestr(part.replace("data.pkl", "DATA.PKL"), whole.read(part))
    with zipfile.ZipFile("hidden.ckpt", "a") as hidden, pytest.warns(UserWarning, match="Duplicate name"):
        hidden.writestr(pickle, b"")  # torch reads the first of that name, Python's zipfile the last
    for job in (predicted, pruned, evaluated, exported):
        for name in ("zeros", "hidden", "upper"):
            with pytest.raises(InputError, match=rf"^{name}\.ckpt: holds more than weights[^\n]*$"):
                job(f"{name}.ckpt")
        with pytest.raises(InputError, match=r"^precision\.ckpt: [^\n]*$"):
            job("precision.ckpt")
        with pytest.raises(InputError, match=r"^unzipped\.ckpt: [^\n]*no checkpoint$"):
            job("unzipped.ckpt")
        with pytest.raises(InputError, match=r"^packed\.ckpt: [^\n]* would unpack to 256\.\d MiB[^\n]*$"):
            job("packed.ckpt")
        with pytest.raises(InputError, match=r"^twice\.ckpt: [^\n]*$"):
            job("twice.ckpt")


def test_a_weight_that_is_larger_than_its_file(gadgets: None) -> None:
    """One number, seen as 4 GB of them: a loss takes as many weights of classes as there are."""
    train(*TINY, "--model.loss.class_weights", "auto", "--name", "run", "--trainer.max_epochs", "1")
    changed = read_checkpoint("runs/run/checkpoints/best.ckpt")
    changed["state_dict"]["loss.class_weights"] = torch.ones(1).expand(10**9)
    torch.save(changed, "expanded.ckpt")
    for job in (predicted, evaluated):
        with pytest.raises(InputError, match=r"^expanded\.ckpt: [^\n]*$"):
            job("expanded.ckpt")


#: Nets of gigabytes, by their options alone.
HUGE: dict[str, dict[str, Any]] = {
    "wide": {
        "class_path": "segmentation.nets.unet_plus_plus.UNetPlusPlus",
        "init_args": {"widths": [9000, 9000, 9000]},
    },
    "wider than any memory": {"class_path": "segmentation.nets.unet.UNet", "init_args": {"widths": [10**9, 10**9]}},
    "many skip channels": {
        "class_path": "segmentation.nets.unet_3plus.UNet3Plus",
        "init_args": {"skip_channels": 6000},
    },
    "of a library": {"class_path": "segmentation.nets.smp.SmpNet", "init_args": {"encoder": "tu-convnext_large"}},
    "with an encoder that reads numbers back": {
        "class_path": "segmentation.nets.unet.UNet",
        "init_args": {"encoder": "mit_b0", "widths": [9000, 9000, 9000]},
    },
}


def peak() -> int:
    """The most memory that this process has had, in MiB."""
    resource = pytest.importorskip("resource")  # Windows has none
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 2**10


@pytest.mark.parametrize("kind", HUGE)
def test_a_net_that_is_larger_than_its_file(kind: str, run: Path, gadgets: None) -> None:
    net = copy.deepcopy(HUGE[kind])
    net["init_args"] |= {"in_channels": 3, "num_classes": 3}
    torch.save(change(run / "checkpoints/best.ckpt", net=net), "huge.ckpt")
    before = peak()
    for job in (predicted, evaluated, exported, pruned) if kind == "wide" else (predicted,):
        with pytest.raises(
            InputError,
            match=r"^huge\.ckpt: [^\n]*$"
            if "memory" in kind
            else r"^huge\.ckpt: [^\n]*: (size mismatch|Missing key|Unexpected key)[^\n]*$",
        ):
            job("huge.ckpt")
    assert peak() < before + 400


def test_a_net_whose_weights_are_one_tensor_many_times(run: Path, gadgets: None) -> None:
    """Such a tensor is once in the file, and would be as often in memory as the net has weights."""
    net = UNetPlusPlus(num_classes=3, widths=[16] * 8)
    checkpoint = change(
        run / "checkpoints/best.ckpt",
        net={
            "class_path": "segmentation.nets.unet_plus_plus.UNetPlusPlus",
            "init_args": {"in_channels": 3, "num_classes": 3, "widths": [16] * 8},
        },
    )
    once = torch.zeros(max(weight.numel() for weight in net.parameters()))
    weights = {name: once[: weight.numel()].view(weight.shape) for name, weight in net.state_dict().items()}
    checkpoint["state_dict"] = {f"net.{name}": weight for name, weight in weights.items()}
    checkpoint["state_dict"] |= {"mean": torch.zeros(3), "std": torch.ones(3)}
    torch.save(checkpoint, "many.ckpt")
    with pytest.raises(InputError, match=r"^many\.ckpt: is not a checkpoint"):
        predicted("many.ckpt")


@pytest.mark.parametrize("options", [{"train": 10**12}, {"test": 10**12}, {"size": 10**9}, {"size": 10**5}])
def test_generated_images_without_end(options: dict[str, int], trained: Path) -> None:
    """In a checkpoint, and as a user may type them."""
    checkpoint = read_checkpoint(trained)
    checkpoint["datamodule_hyper_parameters"]["dataset"]["init_args"].update(options)
    torch.save(checkpoint, "endless.ckpt")
    with pytest.raises(InputError, match=r"^endless\.ckpt: [^\n]*1,000,000[^\n]*$"):
        evaluated("endless.ckpt")


def test_classes_without_end(run: Path, gadgets: None) -> None:
    """A confusion matrix has the square of their number."""
    number = 40_000
    labels = {"names": list(map(str, range(number))), "values": [[value] for value in range(number)]}
    labels["colors"] = ["#000000"] * number
    clean = read_checkpoint(run / "checkpoints/best.ckpt")
    torch.save(
        change(run / "checkpoints/best.ckpt", labels={**clean["hyper_parameters"]["labels"], **labels}), "many.ckpt"
    )
    with pytest.raises(InputError, match=r"^many\.ckpt: is not a checkpoint"):
        predicted("many.ckpt")


def test_a_tensor_in_the_place_of_anything_is_one_line(run: Path, gadgets: None) -> None:
    for place in ((), ("hyper_parameters",), ("datamodule_hyper_parameters",), ("hyper_parameters", "net")):
        changed: Any = read_checkpoint(run / "checkpoints/best.ckpt")
        if place:
            plant(changed, place, torch.zeros(3))
        torch.save(changed if place else torch.zeros(3), "changed.ckpt")
        for job in (predicted, evaluated):
            with pytest.raises(InputError, match=r"^changed\.ckpt: [^\n]*$"):
                job("changed.ckpt")


OWN = """
from pathlib import Path
import torch
from segmentation.data import Labels, ShapesData
from segmentation.losses import CrossEntropy
from segmentation.nets import Heads, SegmentationNet

class Shapes(ShapesData):
    def __init__(self, where: Path, count=6):
        assert where == Path("some/where")
        super().__init__(count, 4, 4, 48)

class Net(SegmentationNet):
    def __init__(self, in_channels=3, num_classes=1, widths: tuple[int, ...] = (4,), name="sum", *, bias=True):
        super().__init__(in_channels, num_classes)
        assert widths + (1,) and name == "os.system"
        self.convs = torch.nn.ModuleList(torch.nn.Conv2d(in_channels, num_classes, 1, bias=bias) for _ in widths)

    def compute(self, image, level=None):
        return Heads((sum(conv(image) for conv in self.convs),))

class Loss(CrossEntropy):
    pass
"""


def test_classes_of_the_users_own_file(gadgets: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """They are built as in training, with types declared or not, in the folder of their file. Elsewhere, and once the
    file has no such class any more, they are refused, and the file is not even imported."""
    Path("own_classes.py").write_text(OWN)
    options = [
        "--data.dataset",
        "own_classes.Shapes",
        "--data.dataset.where",
        "some/where",
        "--data.dataset.count",
        "8",
    ]
    options += ["--model.net", "own_classes.Net", "--model.net.widths", "[4,4]", "--model.net.name", "os.system"]
    cli = train(*options, "--model.loss", "own_classes.Loss", *TINY_RUN[:4], *TINY_RUN[6:], "--name", "run")
    best = str(tmp_path / "runs/run/checkpoints/best.ckpt")
    summary = json.loads(Path("runs/run/summary.json").read_text())
    assert evaluated(best)["miou"] == summary["test/miou"]
    assert evaluated(best)["loss"] == summary["test/loss"]
    assert evaluate([best, *CPU, "--data.dataset.count", "2", "--split", "train"])["miou"] >= 0
    assert predicted(best)
    assert SegmentationModule.load_from_checkpoint(best).net.convs[0].weight.equal(cli.model.net.convs[0].weight.cpu())
    Path("own_classes.py").write_text(WRITES)
    del sys.modules["own_classes"]
    refused = r"^\S*best\.ckpt: 'own_classes\.Net' is no SegmentationNet [^\n]*folder of its file$"
    for job in (predicted, evaluated):
        with pytest.raises(InputError, match=refused):
            job(best)
    assert not Path(OWNED).exists()
    Path("elsewhere").mkdir()
    monkeypatch.chdir("elsewhere")
    shutil.copytree("../photos", "photos")
    with pytest.raises(InputError, match=refused):
        predicted(best)


def test_training_says_which_classes_no_job_will_build(gadgets: None) -> None:
    Path("own_folder").mkdir()
    Path("own_folder/nets.py").write_text(CLASS)
    with pytest.warns(UserWarning, match=r"will not load the checkpoint: 'own_folder\.nets\.Thing' is no"):
        train(*TINY, "--model.net", "own_folder.nets.Thing", "--name", "run", "--trainer.max_epochs", "1")
    with pytest.raises(InputError, match=r"'own_folder\.nets\.Thing' is no SegmentationNet"):
        predicted("runs/run/checkpoints/best.ckpt")


#: Files of one's own that are no module with a net called Thing.
OWN_FILES = {
    "own_broken": "class Thing(:\n",
    "own_lacking": "import no_such_module\n" + CLASS,
    "own_other": WRITES + CLASS.replace("Thing", "Other"),
    "own_class": f"class Thing:\n    def __init__(self, **_): {WRITES}",
    "own_loss": "from segmentation.losses import Dice as Thing\nclass Other:\n    class Thing: pass\n",
    "gadget_installed": CLASS,  # Python finds the installed one first
}


@pytest.mark.parametrize("name", OWN_FILES)
def test_a_file_of_ones_own_that_has_no_such_net(name: str, run: Path, gadgets: None) -> None:
    Path(f"{name}.py").write_text(OWN_FILES[name])
    torch.save(change(run / "checkpoints/best.ckpt", net={"class_path": f"{name}.Thing"}), "changed.ckpt")
    with pytest.raises(InputError, match=r"^changed\.ckpt: [^\n]*$"):
        predicted("changed.ckpt")
    assert not Path(OWNED).exists()


def test_a_net_of_a_notebook(run: Path, gadgets: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is there already: nothing is imported for it."""
    monkeypatch.setattr(sys.modules["__main__"], "Thing", type("Thing", (UNetPlusPlus,), {}), raising=False)
    checkpoint = read_checkpoint(run / "checkpoints/best.ckpt")
    checkpoint["hyper_parameters"]["net"]["class_path"] = "__main__.Thing"
    torch.save(checkpoint, "changed.ckpt")
    assert predicted("changed.ckpt") == predicted(str(run / "checkpoints/best.ckpt"))


def test_a_job_fetches_nothing(run: Path, gadgets: None) -> None:
    """Weights of an encoder that a checkpoint asks for are in the checkpoint, or nowhere."""
    checkpoint = read_checkpoint(run / "checkpoints/best.ckpt")
    checkpoint["hyper_parameters"]["net"]["init_args"]["encoder_weights"] = "imagenet"
    torch.save(checkpoint, "changed.ckpt")
    assert predicted("changed.ckpt") == predicted(str(run / "checkpoints/best.ckpt"))


@pytest.mark.slow
def test_as_a_user_types_it(run: Path, gadgets: None) -> None:
    torch.save(change(run / "checkpoints/best.ckpt", optimizer=CALL, schedule=CALL), "ignored.ckpt")
    torch.save(change(run / "checkpoints/best.ckpt", net=CALL), "refused.ckpt")
    done = script("predict", "ignored.ckpt", "photos", "out", "--accelerator", "cpu")
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    for job, args in (("predict", ["photos", "out2"]), ("eval", []), ("prune", []), ("export", [])):
        done = script(job, "refused.ckpt", *args)
        assert done.returncode == 2
        assert done.stderr.startswith("error: refused.ckpt: 'os.mkdir' is no SegmentationNet")
        assert done.stderr.count("\n") == 1
    assert not Path(OWNED).exists()
