"""The LightningModule: one step for fit, validate and test."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.callbacks import GradientAccumulationScheduler
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable, ReduceLROnPlateau
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor
from torch.optim import LBFGS
from torch.optim.lr_scheduler import OneCycleLR

from segmentation.checkpoint import load_module, read_checkpoint, warm_start
from segmentation.data import SegmentationDataModule
from segmentation.data.labels import Labels
from segmentation.data.sampler import derive_seed
from segmentation.data.statistics import scale_of
from segmentation.errors import InputError, plural
from segmentation.losses import CrossEntropy, SegmentationLoss
from segmentation.losses.classification import presence_loss
from segmentation.metrics import SegmentationMetrics
from segmentation.nets import Heads, SegmentationNet
from segmentation.nets.tiles import Tiles
from segmentation.schedulers import PLATEAU, PLATEAU_FIX, WarmupDecay, elapsed_share

#: Of N images: "image", "mask", and what `segmentation.data.loading.unpack` lists.
Batch = dict[str, Any]


def split_batch(batch: Batch) -> list[Batch]:
    """The images of a batch, each as a batch of its own."""
    images = []
    for i in range(len(batch["mask"])):
        images.append({key: values[i : i + 1] for key, values in batch.items()})
    return images


def factors_of_heads(given: list[float] | Literal["halving"] | None, heads: int) -> list[float]:
    """One factor per head on its loss, from the option `head_weights`."""
    if given == "halving":
        return [0.5**k for k in reversed(range(heads))]
    factors = given or [1.0] * heads
    if len(factors) != heads:
        raise InputError(f"model.head_weights has {plural(len(factors), 'number')} for {plural(heads, 'head')}")
    return factors


class SegmentationModule(LightningModule):
    """Trains, validates and tests a segmentation net.

    Args:
        net: the network, by class name; its channels and classes follow from the data.
        labels: `Labels.as_dict()` of the data set; the command line fills it in.
        loss: the loss, applied to every head.
        head_weights: one factor per head on its loss, head 1 first; null: 1 each; `halving`: 1 for the last head, 1/2
            for the one before it, then 1/4, ...
        optimizer: any torch optimizer.
        encoder_lr: factor on the learning rate of a net's pretrained encoder.
        schedule: any torch learning-rate scheduler; WarmupDecay learns the number of steps by itself.
        schedule_interval: whether the scheduler steps with every `step` or every `epoch`.
        mean: of each channel, scaled to 0..1 (integer images); null means that of the training split, or the one that a
            pretrained encoder wants.
        std: standard deviation, likewise.
        threshold: binary tasks: probability from which a pixel is foreground.
        boundary_iou: report boundary IoU too, of pixels within this share of the diagonal (the paper's: 0.02) of a
            class's boundary; null: no.
        surface_distances: report HD95 and the average symmetric surface distance too, in pixels.
        channels_last: keep images and weights channels last, which convolutions like better.
        compile: compile the net with torch.compile.
        init_from: checkpoint whose weights to start from, where they fit.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        net: SegmentationNet,
        labels: dict[str, Any],
        loss: SegmentationLoss | None = None,
        head_weights: list[float] | Literal["halving"] | None = None,
        optimizer: OptimizerCallable = lambda p: torch.optim.AdamW(p, lr=1e-3),
        encoder_lr: float = 1.0,
        schedule: LRSchedulerCallable = lambda o: WarmupDecay(o, warmup=0.05),
        schedule_interval: Literal["step", "epoch"] = "step",
        mean: list[float] | None = None,
        std: list[float] | None = None,
        threshold: float = 0.5,
        boundary_iou: float | None = None,
        surface_distances: bool = False,
        channels_last: bool = True,
        compile: bool = False,
        init_from: str | None = None,
    ) -> None:
        super().__init__()
        self.save_hyperparameters(logger=False)
        self.labels = Labels(**labels)
        self.net = net
        self.tiles = Tiles(net.stride)
        self.loss = loss or CrossEntropy()
        has = net.in_channels, net.num_classes
        needs = self.labels.channels, self.labels.num_outputs
        if has != needs:
            raise InputError(f"the net has (in_channels, num_classes) {has}, but the labels need {needs}")
        self.head_weights = factors_of_heads(head_weights, net.num_heads)
        # Lambdas, because deepcopy (in a weight-averaging callback) shares functions; it would copy what the command
        # line gives, and with it the trainer.
        self.optimizer = lambda groups: optimizer(groups)
        self.schedule = lambda built: schedule(built)
        self.schedule_interval = schedule_interval
        self.encoder_lr = encoder_lr
        self.lr = None  # LearningRateFinder sets it; it replaces the optimizer's
        if not 0 < threshold < 1:
            raise InputError(f"model.threshold {threshold} must be between 0 and 1")
        if not 0 <= (boundary_iou or 0) < 1:
            raise InputError(f"model.boundary_iou {boundary_iou} is a share of the image's diagonal: below 1, or null")
        self.logit_threshold = math.log(threshold / (1 - threshold))
        self.temperature = 1.0
        self.calibration: dict = {}
        self.boundary_iou = boundary_iou
        self.surface_distances = surface_distances
        self.init_from = init_from
        self.channels_last = channels_last
        self.compile_net = compile
        self.logged_step = 0  # index of the step under way, or just done
        self.warned = False  # of a collapse
        channels = self.labels.channels
        self.normalization_given = bool(mean and std)
        # Buffers, so that mean and std are saved in the checkpoint with the weights.
        self.register_buffer("mean", torch.tensor(mean or [0.0] * channels).float())
        self.register_buffer("std", torch.tensor(std or [1.0] * channels).float())
        if len(self.mean) != channels or len(self.std) != channels:
            raise InputError(f"model.mean and model.std need one number per channel: {channels}, not {len(self.mean)}")

    @classmethod
    def load_from_checkpoint(  # type: ignore[override]  # Lightning's has options that every job must do without
        cls,
        checkpoint_path: str | Path,
        weights_only: Literal[True] = True,
    ) -> "SegmentationModule":
        """The trained module, as every job loads it. Lightning's own would call what functions the file names."""
        return load_module(
            cls,
            read_checkpoint(checkpoint_path),
            source=str(checkpoint_path),
        )

    @property
    def data(self) -> SegmentationDataModule:
        """The attached datamodule."""
        return self.trainer.datamodule  # type: ignore[attr-defined]  # Lightning sets it

    def configure_from_data(self) -> None:
        """Compute from the training split what the config leaves open: class weights, normalisation."""
        statistics = self.data.statistics("train")
        self.loss.setup(statistics)
        if not self.normalization_given:
            mean, std = self.net.statistics or (statistics.mean, statistics.std)
            self.mean.copy_(torch.tensor(mean))
            self.std.copy_(torch.tensor([value or 1.0 for value in std]))  # 0: an empty channel

    def setup(self, stage: str) -> None:
        if stage == "fit":
            self.validate_every = self.trainer.check_val_every_n_epoch
            self.configure_from_data()
            if self.init_from:
                warm_start(self.net, self.init_from)
        if self.channels_last:
            self.net.to(memory_format=torch.channels_last)
        if self.compile_net:
            self.net.compile()
        self.train_metrics = SegmentationMetrics(self.labels)
        self.val_metrics = SegmentationMetrics(
            self.labels,
            heads=self.net.num_heads if self.net.num_heads > 1 else 0,
            boundary=self.boundary_iou,
            surface=self.surface_distances,
        )
        self.test_metrics = SegmentationMetrics(
            self.labels,
            images=len(self.data.dataset.names(self.data.test_split)),
            boundary=self.boundary_iou,
            surface=self.surface_distances,
        )

    def normalize(self, image: Tensor) -> Tensor:
        """Scale integers to 0..1 and standardise each channel.

        Shape:
            (N, C, H, W) as the file has it -> (N, C, H, W) float32
        """
        mean = self.mean.view(-1, 1, 1)
        std = self.std.view(-1, 1, 1)
        x = image.float() / scale_of(image.dtype, self.labels)
        x = (x - mean) / std
        if self.channels_last:
            x = x.contiguous(memory_format=torch.channels_last)
        return x

    def forward(self, image: Tensor) -> Tensor:
        """Logits that predict, (N, K, H, W), of images as a file has them, (N, C, H, W)."""
        return self.net.predict(self.normalize(image))

    def classify(self, logits: Tensor) -> Tensor:
        """Class indices: by threshold for one logit, else the largest.

        Shape:
            (..., K, H, W) -> (..., H, W)
        """
        if logits.shape[-3] == 1:
            return (logits[..., 0, :, :] > self.logit_threshold).long()
        return logits.argmax(dim=-3)

    def set_calibration(self, calibration: dict) -> None:
        """Take temperature and threshold from `eval.py --calibrate`."""
        self.calibration = calibration
        self.temperature = float(calibration["temperature"])
        self.logit_threshold = float(calibration["logit_threshold"])
        if not (0 < self.temperature < math.inf and math.isfinite(self.logit_threshold)):
            raise InputError(f"its calibration has temperature {self.temperature}, threshold {self.logit_threshold}")

    def calibrated(self, logits: Tensor) -> Tensor:
        """Logits whose sigmoid or softmax is the probability. `classify` takes those of the net."""
        return logits / self.temperature

    def on_fit_start(self) -> None:
        if self.lr is not None:  # by a LearningRateFinder: the schedule, too, begins from it
            self.trainer.strategy.setup_optimizers(self.trainer)
            self.train_metrics.reset()

    def on_train_start(self) -> None:
        # Not in configure_optimizers: Lightning would make the loader to count the steps before it restores its place.
        steps: float = self.trainer.estimated_stepping_batches
        if self.schedule_interval == "epoch":
            steps = self.trainer.max_epochs or steps
        schedule = self.lr_schedulers()
        if isinstance(schedule, WarmupDecay):
            schedule.set_total_steps(steps, elapsed_share(self.trainer))
        if isinstance(schedule, OneCycleLR) and schedule.total_steps < steps:
            raise InputError(
                f"model.schedule: OneCycleLR ends after {schedule.total_steps} steps, the run after {steps}. "
                f"Fix: --model.schedule.total_steps {steps}"
            )
        # Lightning does not call on_train_epoch_start when a run resumes in mid-epoch: call it here.
        for callback in self.trainer.callbacks:  # type: ignore[attr-defined]  # Lightning does not declare it
            if isinstance(callback, GradientAccumulationScheduler):
                callback.on_train_epoch_start(self.trainer)
        self.on_train_epoch_start()

    def on_train_epoch_start(self) -> None:
        # Always validate after the last epoch. Set it in the others too: a finder's trial run may have left 1.
        every = self.validate_every
        if every and self.current_epoch + 1 == self.trainer.max_epochs:
            every = 1
        self.trainer.check_val_every_n_epoch = every

    def on_train_batch_start(self, batch: Batch, batch_idx: int) -> None:
        # What a step draws (dropout) is a function of (seed, step, rank), so that a resumed run draws it again.
        seed = derive_seed(
            self.data.seed,
            self.trainer.global_step,
            batch_idx,
            self.global_rank,
        )
        torch.manual_seed(seed)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        heads = self.net(self.normalize(batch["image"]))
        # Pixels per class, averaged over the accumulated batches and all processes: dividing by it makes the mean of
        # the batches' losses equal to the loss of one large batch.
        step_pixels = self.trainer.strategy.reduce(batch["step_pixels"].to(self.device), reduce_op="mean")
        loss, terms = self.compute_loss(heads, batch, step_pixels)
        total = loss
        if heads.class_logits is not None:
            terms["presence/loss"] = presence_loss(heads.class_logits, batch["mask"])
            total = loss + terms["presence/loss"]
        with torch.no_grad():
            predictions = self.classify(self.net.combine(heads))[None]
        self.update_metrics(
            "train",
            predictions,
            batch,
            loss,
            step_pixels,
        )
        self.log_step({"loss_step": total, **terms}, batch_idx)
        return total

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        self.evaluate("val", batch)

    def test_step(self, batch: Batch, batch_idx: int) -> dict[str, Tensor]:
        return {"prediction": self.evaluate("test", batch)}

    def evaluate(self, split: str, batch: Batch) -> Tensor:
        """One validation or test batch: forward pass, loss of each image, metrics.

        Large images go by tiles: memory holds the logits of a row of them; those of the whole image only where the loss
        needs all at once. The class-presence loss is left out, as it is not a mean over pixels.

        Returns:
            Predicted class indices, (N, H, W).
        """
        images = split_batch(batch)
        # On a CPU, float32 results depend on the batch size: take the images one at a time.
        if self.device.type == "cpu" and len(images) > 1:
            return torch.cat([self.evaluate(split, image) for image in images])
        height, width = batch["mask"].shape[-2:]
        in_parts = self.loss.additive and self.tiles.cut(height, width)
        pixels = batch["pixels"].to(self.device)
        predictions = []
        losses = []
        strips = []
        for rows, outputs in self.tiles.strips(batch["image"], self.outputs):
            predictions.append(torch.stack([self.classify(logits) for logits in outputs]))
            if in_parts:
                part = {key: batch[key][:, rows] for key in batch.keys() & {"mask", "weight"}}
                losses.append(self.losses(outputs, part, pixels))
            else:
                strips.append(outputs)
        if strips:
            whole = [torch.cat(parts, dim=-2) for parts in zip(*strips, strict=True)]
            losses.append(self.losses(whole, batch, pixels))
        predicted = torch.cat(predictions, dim=-2)
        self.update_metrics(
            split,
            predicted,
            batch,
            loss=torch.stack(losses).sum(dim=0),
            pixels=pixels,
        )
        return predicted[-1]

    def outputs(self, image: Tensor) -> tuple[Tensor, ...]:
        """Logits of every head, and last those that predict, unless they are the last head's; each (N, K, H, W)."""
        heads = self.net(self.normalize(image))
        logits = self.net.combine(heads)
        if logits is heads.logits[-1]:
            return heads.logits
        return (*heads.logits, logits)

    def losses(
        self,
        outputs: Sequence[Tensor],
        batch: Batch,
        pixels: Tensor,
    ) -> Tensor:
        """The loss of each image of a batch, (N,): overlap losses (Dice, ...) depend on how images are batched.

        Args:
            outputs: as `outputs` gives them.
            batch: mask and weight of the images, or of the same rows of each.
            pixels: pixels per class of each whole image, (N, K).
        """
        losses = []
        for i, image in enumerate(split_batch(batch)):
            heads = [logits[i : i + 1] for logits in outputs[: self.net.num_heads]]
            loss, _ = self.compute_loss(Heads(tuple(heads)), image, pixels[i])
            losses.append(loss)
        return torch.stack(losses)

    def compute_loss(
        self,
        heads: Heads,
        batch: Batch,
        step_pixels: Tensor | None = None,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The weighted sum of the heads' losses (deep supervision); of one head, its loss.

        `training_step` adds the class-presence loss; `WeightedSum` in losses/combined.py sums several losses.

        Returns:
            The sum, and its terms by logged key (without the split).
        """
        losses = []
        terms = {}
        for index, logits in enumerate(heads.logits):
            loss = self.loss(
                logits,
                batch["mask"],
                batch.get("weight"),
                step_pixels,
            )
            losses.append(self.head_weights[index] * loss)
            head = ""
            if len(heads.logits) > 1:
                head = f"head{index + 1}/"
                terms[head + "loss"] = loss
            terms |= {head + name: term for name, term in self.loss.terms.items()}
        return torch.stack(losses).sum(), terms

    @torch.no_grad()
    def update_metrics(
        self,
        split: str,
        predictions: Tensor,
        batch: Batch,
        loss: Tensor,
        pixels: Tensor,
    ) -> None:
        """Update the metrics of a split with one batch.

        Args:
            split: `train`, `val` or `test`.
            predictions: class indices, (P, N, H, W): of the heads, where they are measured, and last those that count.
            batch: batch of the datamodule.
            loss: loss of the batch, or of each image, (N,).
            pixels: pixels per class that `loss` was averaged over, (K,), or (N, K).
        """
        metrics = getattr(self, f"{split}_metrics")
        heads = len(metrics["classes"].head_confmat)
        metrics.update(
            preds=predictions[-1],
            target=batch["mask"],
            loss=loss.detach(),
            weight_sum=self.loss.weight_sum(pixels, self.labels.num_outputs),
            index=batch["index"],
            heads=predictions[:heads],
        )

    def log_step(self, losses: dict[str, Tensor], batch_idx: int) -> None:
        """Log the losses of every `log_every_n_steps`-th step, of its last batch."""
        self.logged_step = self.trainer.global_step
        ends_step = (batch_idx + 1) % self.trainer.accumulate_grad_batches == 0
        every = self.trainer.log_every_n_steps  # type: ignore[attr-defined]  # Lightning does not declare it
        if every and ends_step and (self.logged_step + 1) % every == 0:
            self.write_metrics({f"train/{key}": loss.item() for key, loss in losses.items()})
            self.log("loss", losses["loss_step"].detach(), prog_bar=True, logger=False)

    def log_epoch_metrics(self, split: str) -> None:
        """Log a finished epoch's metrics, which are those of all processes, and what callbacks have logged so far."""
        metrics = getattr(self, f"{split}_metrics")
        found = {f"{split}/{key}": value for key, value in metrics.compute().items()}
        self.log_dict(found, logger=False)
        if not self.trainer.sanity_checking:
            logged = self.trainer.callback_metrics.items()
            self.write_metrics({key: value.item() for key, value in logged if key.startswith(f"{split}/")})
            self.step_on_plateau(split, found)
            if metrics["classes"].collapsed and not self.warned:
                self.warned = True
                rank_zero_warn(
                    "every pixel is predicted as one class. Common causes: rare classes (class_weights: auto, "
                    "pos_weight: auto or Dice help), too high or too low a learning rate, masks of other images. "
                    "configs/trainer/debug.yaml tells whether one batch can be learnt"
                )
        metrics.reset()

    def write_metrics(self, metrics: dict[str, float]) -> None:
        """Give metrics to the loggers now.

        Those of `self.log` come after the checkpoint of the same step, and would be missing from metrics.csv if the run
        ended between the two.
        """
        step = self.trainer.global_step if self.trainer.testing else self.logged_step
        metrics = {**metrics, "epoch": self.current_epoch}
        for logger in self.loggers:
            logger.log_metrics(metrics, step)

    def step_on_plateau(self, split: str, found: dict[str, Tensor]) -> None:
        """Tell a ReduceLROnPlateau the metric that it monitors, as soon as it is known.

        Lightning would tell it after the epoch's checkpoint, and a run resumed from that would lack the step.
        """
        scheduler = self.lr_schedulers()
        if not isinstance(scheduler, ReduceLROnPlateau) or not scheduler.monitor.startswith(f"{split}/"):
            return
        if scheduler.monitor not in found:
            raise InputError(f"model.schedule.monitor {scheduler.monitor} is not logged; choose of {', '.join(found)}")
        scheduler.step(found[scheduler.monitor])

    def lr_scheduler_step(self, scheduler, metric) -> None:
        if isinstance(scheduler, WarmupDecay):
            scheduler.elapsed = elapsed_share(self.trainer)
        if not isinstance(scheduler, ReduceLROnPlateau):  # see step_on_plateau
            super().lr_scheduler_step(scheduler, metric)

    def on_train_epoch_end(self) -> None:
        self.log_epoch_metrics("train")

    def on_validation_epoch_end(self) -> None:
        self.log_epoch_metrics("val")

    def on_test_epoch_end(self) -> None:
        # Kept, on every process, for the confusion matrix and the table of images that the run's report shows.
        counts = self.test_metrics.state()["classes"]
        self.test_counts = counts["confmat"], counts["table"]
        self.log_epoch_metrics("test")

    def configure_optimizers(self) -> Any:
        trained = [p for p in self.parameters() if p.requires_grad]
        groups = [trained]
        if self.encoder_lr != 1:
            if self.net.backbone is None:
                raise InputError("model.encoder_lr needs an encoder: set net.encoder, or encoder_lr: 1")
            encoder = set(self.net.backbone.parameters())
            groups = [
                [p for p in trained if p not in encoder],
                [p for p in trained if p in encoder],
            ]
        try:
            optimizer = self.optimizer([{"params": group} for group in groups])
            for group in optimizer.param_groups:
                group["lr"] = self.lr or group["lr"]
            optimizer.param_groups[-1]["lr"] *= self.encoder_lr  # the encoder's group, or the only one times 1
            scheduler = self.schedule(optimizer)
        except ValueError as error:  # torch's own checks of the user's numbers
            raise InputError(f"model.optimizer or model.schedule: {error}") from error
        if isinstance(optimizer, LBFGS):
            raise InputError("model.optimizer LBFGS takes all data at once, not batches. Fix: --model.optimizer AdamW")
        config: dict = {
            "scheduler": scheduler,
            "interval": self.schedule_interval,
        }
        if type(scheduler) is torch.optim.lr_scheduler.ReduceLROnPlateau:
            raise InputError(f"model.schedule {PLATEAU} needs a metric to watch{PLATEAU_FIX}")
        if isinstance(scheduler, ReduceLROnPlateau):
            if not scheduler.monitor.startswith(("train/", "val/")):
                raise InputError(f"model.schedule.monitor {scheduler.monitor} is not logged; val/loss and val/miou are")
            # Not strict: warn where it is not logged, as not every epoch is validated.
            config |= {"interval": "epoch", "monitor": scheduler.monitor, "strict": False}
        return {
            "optimizer": optimizer,
            "lr_scheduler": config,
        }

    def on_save_checkpoint(self, checkpoint: dict) -> None:
        checkpoint["precision"] = self.trainer.precision
        # E.g. by early stopping: a resumed run then only tests. But more time makes a run longer.
        time_is_up = elapsed_share(self.trainer) >= 1
        checkpoint["should_stop"] = self.trainer.should_stop and not time_is_up
        # Training counts of the epoch so far, summed over all processes: a run resumed in mid-epoch continues them.
        checkpoint["train_counts"] = self.train_metrics.state()

    def on_load_checkpoint(self, checkpoint: dict) -> None:
        if not self.trainer.training:
            return
        try:
            if self.trainer.is_global_zero:
                self.train_metrics.load(checkpoint["train_counts"])
            self.trainer.should_stop = checkpoint["should_stop"]
        except (KeyError, TypeError, ValueError) as error:
            raise InputError(
                "last.ckpt is of another version of this project, which alone can go on with it. To start a new run "
                "from its weights: --model.init_from last.ckpt --name another"
            ) from error
