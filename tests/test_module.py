"""The module: deep supervision, class presence, learning rates, weights of pixels."""

import csv
import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import Callback
from safetensors.torch import save_file
from torch.utils._python_dispatch import TorchDispatchMode

from conftest import TINY, train
from segmentation.data import Labels
from segmentation.data.labels import IGNORE_INDEX
from segmentation.errors import InputError
from segmentation.inference.evaluate import evaluate
from segmentation.losses.classification import presence_loss
from segmentation.module import SegmentationModule
from segmentation.nets import UNet
from segmentation.nets.pretrained import library_encoder
from segmentation.training.cli import SegmentationCLI

STEPS = ["--trainer.log_every_n_steps", "1", "--model.net.widths", "[4,8,8]"]
LABELS = Labels.parse({"background": 0, "disk": 1, "ring": 2}).as_dict()


def module(**options) -> SegmentationModule:
    torch.manual_seed(0)
    net = UNet(num_classes=3, widths=[4, 8, 8, 8], deep_supervision=True)
    return SegmentationModule(net, LABELS, **options)


def batch() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    image = torch.randint(0, 256, (2, 3, 16, 16), generator=generator, dtype=torch.uint8)
    return {"image": image, "mask": torch.randint(0, 3, (2, 16, 16), generator=generator)}


@pytest.mark.parametrize(
    ("head_weights", "factors"), [(None, [1, 1, 1]), ("halving", [0.25, 0.5, 1]), ([0.0, 3.0, 2.0], [0, 3, 2])]
)
def test_the_heads_losses_are_summed_with_their_weights(head_weights, factors) -> None:
    subject, given = module(head_weights=head_weights), batch()
    heads = subject.net(subject.normalize(given["image"]))
    each = [F.cross_entropy(logits, given["mask"]) for logits in heads.logits]
    total, terms = subject.compute_loss(heads, given)
    assert total.item() == pytest.approx(sum(f * loss.item() for f, loss in zip(factors, each, strict=True)), rel=1e-5)
    assert [terms[f"head{k}/loss"].item() for k in (1, 2, 3)] == pytest.approx([loss.item() for loss in each])


def test_head_weights_of_another_number() -> None:
    with pytest.raises(InputError, match="head_weights has 2 numbers for 3 heads"):
        module(head_weights=[1.0, 2.0])


def test_a_batchs_pixel_weights_reach_the_loss() -> None:
    subject, given = module(), batch()
    heads = subject.net(subject.normalize(given["image"]))
    half = torch.full(given["mask"].shape, 0.5)
    plain, weighted = (subject.compute_loss(heads, x)[0].item() for x in (given, {**given, "weight": half}))
    assert weighted == pytest.approx(plain / 2)


def test_what_each_head_is_worth_is_logged() -> None:
    train(*TINY, "--name", "run", "--model.net.deep_supervision", "true", *STEPS)
    with open("runs/run/metrics.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    for key in ("train/head1/loss", "train/head2/loss", "val/head1/miou", "val/head2/miou"):
        assert sum(bool(row[key]) for row in rows) >= 2, key


def test_presence() -> None:
    mask = torch.tensor([[[0, 2]], [[IGNORE_INDEX, 0]], [[IGNORE_INDEX, IGNORE_INDEX]]])
    # an image where all is unknown says nothing of what is absent
    logits = torch.randn(3, 3, generator=torch.Generator().manual_seed(0))
    expected = F.binary_cross_entropy_with_logits(logits[:2], torch.tensor([[1.0, 0, 1], [1, 0, 0]]))
    assert presence_loss(logits, mask).item() == pytest.approx(expected.item())
    assert presence_loss(logits[2:], mask[2:]) == 0
    foreground = F.binary_cross_entropy_with_logits(logits[:2, :1], torch.tensor([[1.0], [0]]))
    assert presence_loss(logits[:, :1], mask.clamp(max=1)).item() == pytest.approx(foreground.item())


@pytest.mark.slow
def test_a_pretrained_encoder_learns_at_its_own_rate_and_is_fetched_once(tmp_path) -> None:
    """The file is needed to begin; the checkpoint has the weights, for a resumed run and for every other job."""
    file = tmp_path / "resnet18.safetensors"
    save_file({k: v.contiguous() for k, v in library_encoder("resnet18", 3, 5, None).state_dict().items()}, file)
    options = [*TINY, "--name", "run", "--model.net.encoder", "resnet18", "--model.net.widths", "[4,8,8,8]"]
    options += ["--model.net.encoder_weights", str(file), "--model.encoder_lr", "0.1"]
    cli = train(*options, "--trainer.max_epochs", "1")
    decoder, encoder = cli.trainer.optimizers[0].param_groups
    assert encoder["initial_lr"] == pytest.approx(decoder["initial_lr"] / 10)
    assert {id(p) for p in encoder["params"]} == {id(p) for p in cli.model.net.backbone.parameters()}
    file.unlink()
    cli = train(*options, "--trainer.max_epochs", "2", "--resume")
    assert cli.trainer.global_step == 2 * 3
    SegmentationModule.load_from_checkpoint("runs/run/checkpoints/last.ckpt", weights_only=True)
    assert str(file) in Path("runs/run/config.yaml").read_text()  # the config says where the run came from


@pytest.mark.parametrize(
    ("decay", "factors"),
    [
        ("cosine", [1 / 2, 1, 1, 0.853553, 0.5, 0.146447]),  # (1 + cos(pi x)) / 2
        ("poly", [1 / 2, 1, 1, 0.75**0.9, 0.5**0.9, 0.25**0.9]),
        ("constant", [1 / 2, 1, 1, 1, 1, 1]),
    ],
)
def test_the_learning_rate_of_every_step(decay: str, factors: list[float]) -> None:
    """Six steps, two of them to warm up in."""
    schedule = ["--model.schedule.warmup", str(1 / 3), "--model.schedule.decay", decay, "--model.optimizer.lr", "0.01"]
    options = ["--data.dataset.train", "24", "--trainer.max_epochs", "1", "--trainer.log_every_n_steps", "1"]
    train(*TINY, *options, *schedule, "--name", "run")
    with open("runs/run/metrics.csv", newline="") as file:
        rates = [float(row["lr-AdamW"]) for row in csv.DictReader(file) if row["lr-AdamW"]]
    assert rates == pytest.approx([0.01 * factor for factor in factors], rel=1e-4)


def test_encoder_lr_without_an_encoder() -> None:
    with pytest.raises(InputError, match="encoder_lr needs an encoder"):
        module(encoder_lr=0.1).configure_optimizers()


SUM = ["--model.loss", "WeightedSum", "--model.loss.losses", "[CrossEntropy, Focal, Dice, Lovasz, MsSsim]"]


@pytest.mark.parametrize(
    ("net", "loss"),
    [
        pytest.param("[16,32,64,128,256]", SUM, marks=pytest.mark.slow),
        ("[4,8,8]", ["--model.loss.class_weights", "auto"]),
    ],
)
def test_evaluation_does_not_depend_on_the_batch(net: str, loss: list[str]) -> None:
    """Not in the last digit, the loss neither, though a convolution over a batch is rounded otherwise than over one
    image, and sums of floats depend on their order."""
    options = ["--model.net.widths", net, "--model.net.deep_supervision", "true", "--trainer.max_epochs", "1"]
    train(*TINY, *options, *loss, "--name", "run", "--data.dataset.test", "7")
    sizes = ("1", "2", "3", "7")
    cpu = ["--trainer.accelerator", "cpu", "--data.num_workers", "0"]
    found = [evaluate(["runs/run/checkpoints/best.ckpt", "--data.eval_batch_size", size, *cpu]) for size in sizes]
    for figures in found[1:]:
        assert {key: repr(value) for key, value in figures.items()} == {k: repr(v) for k, v in found[0].items()}
    assert found[0]["loss"] == json.loads(Path("runs/run/summary.json").read_text())["test/loss"]


class Questions(TorchDispatchMode, Callback):
    """Notes what a training step, up to the optimizer's, does that makes the host wait for a GPU."""

    ASKING = {"_local_scalar_dense", "nonzero", "bincount", "equal", "masked_select", "is_nonzero"}  # noqa: RUF012

    def __init__(self) -> None:
        super().__init__()
        self.asked, self.steps = [], 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.overloadpacket.__name__ in self.ASKING:
            self.asked.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))

    def on_train_batch_start(self, *_) -> None:
        self.__enter__()

    def on_before_optimizer_step(self, *_) -> None:
        self.__exit__(None, None, None)
        self.steps += 1


def test_a_training_step_asks_the_device_nothing() -> None:
    """Each answer would hold up a GPU, which gets no work meanwhile."""
    losses = "[{class_path: CrossEntropy, init_args: {class_weights: sqrt_inverse}}, {class_path: Dice}]"
    cli = SegmentationCLI([*TINY, "--name", "run", "--model.loss", "WeightedSum", "--model.loss.losses", losses])
    questions = Questions()
    cli.trainer.callbacks.append(questions)
    cli.run()
    assert questions.steps == 6
    assert questions.asked == []


def test_images_are_scaled_to_one_and_standardised() -> None:
    labels = Labels.parse({"background": 0, "thing": 1}, channels=2)
    module = SegmentationModule(UNet(2, 1, widths=(4, 8)), labels.as_dict(), mean=[0.5, 0.25], std=[0.5, 2.0])
    image = torch.tensor([0, 51, 255], dtype=torch.uint8).view(1, 1, 1, 3).expand(1, 2, 1, 3)
    found = module.normalize(image)
    assert found[0, :, 0].tolist() == [pytest.approx([-1, -0.6, 1]), pytest.approx([-0.125, -0.025, 0.375])]
