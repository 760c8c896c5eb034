"""What a run shows on its way: a summary before the first step, one line per epoch, throughput, a loss that is NaN.

Hooks say no types: Lightning's classes do not declare the datamodule and the attributes of our module.
"""

import math
import time
from copy import deepcopy
from itertools import chain

import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import Checkpoint, RichProgressBar
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from segmentation.data.base import SPLITS
from segmentation.errors import InputError, plural
from segmentation.nets import SegmentationNet
from segmentation.training.run_folder import RunFolder

#: An epoch that waited for data for fewer seconds is no reason for a warning.
PATIENCE = 5.0


class EpochPrinter(Checkpoint):
    """Prints one line per epoch. It is a Checkpoint, as Lightning calls these after the module has logged the epoch."""

    validated = False

    def on_validation_end(self, trainer, pl_module) -> None:
        self.validated = not trainer.sanity_checking

    def on_train_epoch_end(self, trainer, pl_module) -> None:
        if not trainer.is_global_zero:
            return
        metrics = trainer.callback_metrics
        of = f"/{trainer.max_epochs}" if trainer.max_epochs > 0 else ""
        line = f"epoch {trainer.current_epoch + 1:>3}{of}  loss {metrics['train/loss']:.4f}"
        if self.validated:
            line += f"  val loss {metrics['val/loss']:.4f}  val mIoU {metrics['val/miou']:.4f}"
        print(f"{line}  {metrics['train/images_per_second']:.1f} images/s", flush=True)
        self.validated = False


class CountFromOne(RichProgressBar):
    """Lightning's progress bar, with the epochs numbered as EpochPrinter does, from 1, and without the run's id."""

    def get_metrics(self, trainer, pl_module) -> dict:
        metrics = super().get_metrics(trainer, pl_module)
        metrics.pop("v_num", None)
        return metrics

    def on_train_epoch_start(self, trainer, pl_module) -> None:
        super().on_train_epoch_start(trainer, pl_module)
        if self.progress is not None and self.train_progress_bar_id is not None:
            self.progress.update(self.train_progress_bar_id, description=f"epoch {trainer.current_epoch + 1}")


class RunSummary(Callback):
    """Prints, before the first step, what is about to run: data, net with parameters and FLOPs, device."""

    def __init__(self, run: RunFolder) -> None:
        self.run = run

    def setup(self, trainer, pl_module, stage: str) -> None:
        if stage == "fit":  # before a callback of the user's copies the module, to average its weights
            pl_module.configure_from_data()
            pl_module.to(trainer.strategy.root_device)  # the copy stays where the module is now: not on the CPU

    def on_train_start(self, trainer, pl_module) -> None:
        if not trainer.is_global_zero:
            return
        data = trainer.datamodule
        labels = pl_module.labels
        net = pl_module.net
        images = ", ".join(f"{len(data.dataset.names(split)):,} {split}" for split in SPLITS)
        print(f"run       {self.run.path}")
        print(f"data      {data.description}: {images} images; {labels.task}, {labels.num_classes} classes")

        millions = sum(parameter.numel() for parameter in net.parameters()) / 1e6
        shape = (1, labels.channels, *data.train_size())
        try:
            gflops = f"{count_flops(net, shape) / 1e9:.1f}"
        except (RuntimeError, NotImplementedError):  # a net that looks at its data cannot run on the meta device
            gflops = "?"
        print(f"net       {type(net).__name__}: {millions:.2f} M parameters, {gflops} GFLOPs for {shape}")

        step_size = data.batch_size * trainer.world_size * trainer.accumulate_grad_batches
        epochs = plural(trainer.max_epochs, "epoch")
        steps = plural(trainer.estimated_stepping_batches, "step")
        print(f"training  {epochs}, {steps} of {plural(step_size, 'image')}")

        rates = [f"{group.get('initial_lr', group['lr']):g}" for group in trainer.optimizers[0].param_groups]
        origin = "as LearningRateFinder found it" if pl_module.lr else "as given"
        print(
            f"          on {pl_module.device.type} in {trainer.precision}, learning rate {', '.join(rates)}, {origin}",
            flush=True,
        )


def count_flops(net: SegmentationNet, shape: tuple[int, ...]) -> int:
    """Count the floating-point operations (2 x multiply-adds) of one prediction on an input of shape (N, C, H, W).
    Nothing is computed: the net is copied to torch's meta device."""
    with torch.device("meta"):
        twin = deepcopy(net).to("meta").eval()
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            twin.predict(torch.empty(shape))
    return counter.get_total_flops()


class Throughput(Callback):
    """Logs `train/images_per_second`, of all processes and without validation, and `train/data_wait`, the share of that
    time that this process waited for batches. Checkpoints keep the sums, so that a resumed run reports the whole."""

    def __init__(self) -> None:
        self.images = 0  # of the run
        self.seconds = 0.0  # of the run
        self.minutes = 0.0  # of the run's earlier processes
        self.started = time.perf_counter()
        self.warned = False

    def state_dict(self) -> dict:
        return {
            "images": self.images,
            "seconds": self.seconds,
            **self.metrics(),
        }

    def load_state_dict(self, state_dict: dict) -> None:
        self.images = state_dict["images"]
        self.seconds = state_dict["seconds"]
        self.minutes = state_dict["minutes"]

    def metrics(self) -> dict:
        """Minutes and throughput of the whole run."""
        seconds = time.perf_counter() - self.started
        return {
            "minutes": self.minutes + seconds / 60,
            "images_per_second": self.images / (self.seconds or math.inf),
        }

    def on_train_start(self, *args) -> None:
        self.epoch_images = 0
        self.epoch_seconds = 0.0
        self.waited = 0.0
        self.last = time.perf_counter()  # end of the last batch

    def on_train_batch_start(
        self,
        trainer,
        pl_module,
        batch,
        batch_idx: int,
    ) -> None:
        if batch_idx:  # an epoch's first batch waits for the workers to start
            self.waited += time.perf_counter() - self.last

    def on_train_batch_end(
        self,
        trainer,
        pl_module,
        outputs,
        batch,
        batch_idx: int,
    ) -> None:
        now = time.perf_counter()
        self.epoch_images += len(batch["image"]) * trainer.world_size
        self.epoch_seconds += now - self.last
        self.last = now

    def on_validation_end(self, *args) -> None:
        self.last = time.perf_counter()

    def on_train_epoch_end(self, trainer, pl_module) -> None:
        self.images += self.epoch_images
        self.seconds += self.epoch_seconds
        seconds = self.epoch_seconds or math.inf
        wait = self.waited / seconds
        metrics = {
            "train/images_per_second": self.epoch_images / seconds,
            "train/data_wait": wait,
        }
        # The module gives them to the loggers, with the epoch's other metrics.
        pl_module.log_dict(metrics, logger=False, rank_zero_only=True)
        if wait > 0.1 and self.waited > PATIENCE and not self.warned:
            self.warned = True
            rank_zero_warn(
                f"{wait:.0%} of the training time went into waiting for data. Remedies: data.num_workers, up to the "
                "machine's cores, data.cache: true for data that fits into memory, fewer transforms"
            )
        self.on_train_start()


class StopAtNonFinite(Callback):
    """Ends the run on a loss or gradient that is not finite, before a checkpoint keeps what it made of the weights.

    It looks at every step a step late, and at all of them before a validation and a checkpoint: to ask at once would
    hold up a GPU at every step, which gets no work while the answer is waited for.
    """

    def __init__(self) -> None:
        self.batch: list[str] = []  # names of the images of the batch that is under way
        self.names: list[list[str]] = []  # names of the batches of the step that is under way
        self.losses: list[Tensor] = []
        #: The step that nobody has looked at yet: names of each batch; whether the gradient and the losses are finite,
        #: perhaps still on its way to the CPU; when it is there, None on a CPU.
        self.last: tuple[list[list[str]], Tensor, torch.cuda.Event | None] | None = None

    def on_train_batch_start(
        self,
        trainer,
        pl_module,
        batch,
        batch_idx: int,
    ) -> None:
        self.batch = batch["name"]

    def on_before_backward(self, trainer, pl_module, loss: Tensor) -> None:
        self.names.append(self.batch)
        self.losses.append(loss.detach())

    def on_before_optimizer_step(self, trainer, pl_module, optimizer) -> None:
        self.check(trainer)
        gradients = [parameter.grad for parameter in pl_module.parameters() if parameter.grad is not None]
        norm = torch.nn.utils.get_total_norm(gradients)
        finite = torch.stack([norm, *self.losses]).isfinite()
        finite = finite.to("cpu", non_blocking=norm.is_cuda)
        arrived = None
        if norm.is_cuda:
            arrived = torch.cuda.current_stream(norm.device).record_event()
        self.last = self.names, finite, arrived
        self.names = []
        self.losses = []

    def check(self, trainer, *args, **kwargs) -> None:
        """Raises InputError if the last step was not finite, on every process: gradients are the same on all."""
        if self.last is None:
            return
        batches, finite, arrived = self.last
        self.last = None
        if arrived is not None:
            arrived.synchronize()
        gradient, *losses = finite.tolist()
        if gradient:
            return
        found = []
        for loss, names in zip(losses, batches, strict=True):
            if not loss:
                found += names
        if trainer.world_size > 1:
            everywhere: list[list[str]] = [[]] * trainer.world_size
            torch.distributed.all_gather_object(everywhere, found)
            found = [*chain(*everywhere)]
        # A gradient scaler skips such a step by itself. Asked after the gathering: losses differ between processes.
        if getattr(trainer.precision_plugin, "scaler", None) is not None and not found:
            return
        what = "loss" if found else "gradient"
        where = f"epoch {trainer.current_epoch + 1}, step {trainer.global_step - 1}"
        files = ", ".join(found or chain(*batches))
        raise InputError(
            f"the {what} is not finite in {where}, on {files}. "
            "Look at these files, lower model.optimizer.lr, or use --trainer.precision 32-true. "
            "Checkpoints of finished epochs are kept"
        )

    on_validation_start = on_train_epoch_end = on_save_checkpoint = check
