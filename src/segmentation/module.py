"""The LightningModule: one step for fit, validate and test."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.callbacks import BackboneFinetuning, GradientAccumulationScheduler
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.plugins import Precision
from lightning.pytorch.utilities import GradClipAlgorithmType, rank_zero_warn
from torch import Tensor
from torch.optim.lr_scheduler import ReduceLROnPlateau

from segmentation.checkpoint import load_module, read_checkpoint, warm_start
from segmentation.data import SegmentationDataModule
from segmentation.data.labels import Labels
from segmentation.data.sampler import derive_seed
from segmentation.data.statistics import scale_of
from segmentation.errors import InputError
from segmentation.losses import CrossEntropy, SegmentationLoss
from segmentation.losses.classification import presence_loss
from segmentation.metrics import SegmentationMetrics
from segmentation.nets import Heads, SegmentationNet
from segmentation.nets.base import joined
from segmentation.schedulers import WarmupDecay, tell_length


class SegmentationModule(LightningModule):
    """Trains, validates and tests a segmentation net.

    Args:
        net: the network, by class name; its channels and classes follow from the data.
        labels: `Labels.as_dict()` of the data set; the command line fills it in.
        loss: the loss, applied to every head.
        head_weights: factor on each head's loss, the first head first; null means 1 each, `halving` 1 for the last head
            and half as much for each one before it.
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
        channels_last: bool = True,
        compile: bool = False,
        init_from: str | None = None,
    ) -> None:
        super().__init__()
        self.save_hyperparameters(logger=False)
        self.labels = Labels(**labels)
        self.net = net
        self.loss = loss or CrossEntropy()
        if (net.in_channels, net.num_classes) != (self.labels.channels, self.labels.num_outputs):
            raise InputError(
                f"the net has in_channels {net.in_channels} and num_classes {net.num_classes}, but the labels need "
                f"{self.labels.channels} and {self.labels.num_outputs}"
            )
        if head_weights == "halving":
            head_weights = [0.5**k for k in reversed(range(net.num_heads))]
        self.head_weights = head_weights or [1.0] * net.num_heads
        self.encoder_lr = encoder_lr
        if len(self.head_weights) != net.num_heads:
            raise InputError(f"model.head_weights has {len(self.head_weights)} numbers for {net.num_heads} heads")
        # In functions, which a copy of the module shares: what the command line gives would be copied with its trainer.
        self.optimizer = lambda groups: optimizer(groups)
        self.schedule = lambda built: schedule(built)
        self.schedule_interval = schedule_interval
        self.lr: float | None = None  # in place of the optimizer's: what Lightning's LearningRateFinder has found
        if not 0 < threshold < 1:
            raise InputError(f"model.threshold {threshold} must lie between 0 and 1")
        if boundary_iou is not None and not 0 <= boundary_iou < 1:
            raise InputError(f"model.boundary_iou {boundary_iou} must be a share of the diagonal, e.g. 0.02")
        self.logit_threshold = math.log(threshold / (1 - threshold))
        self.boundary_iou, self.init_from = boundary_iou, init_from
        self.channels_last, self.compile_net = channels_last, compile
        # Normalisation travels with the weights: prediction cannot drift from training.
        self.auto_normalize = mean is None or std is None
        self.warned = False  # of a collapse
        self.logged_step = 0  # index of the step under way, or just done
        self.register_buffer("mean", _per_channel(mean, self.labels.channels, 0.0))
        self.register_buffer("std", _per_channel(std, self.labels.channels, 1.0))

    @classmethod
    def load_from_checkpoint(  # type: ignore[override]  # Lightning's has options that every job must do without
        cls, checkpoint_path: str | Path, weights_only: Literal[True] = True
    ) -> "SegmentationModule":
        """The trained module, as every job loads it. Lightning's own would call what functions the file names."""
        return load_module(cls, read_checkpoint(checkpoint_path), str(checkpoint_path))

    @property
    def data(self) -> SegmentationDataModule:
        """What feeds this module."""
        return self.trainer.datamodule  # type: ignore[attr-defined]  # Lightning sets it

    @property
    def backbone(self) -> torch.nn.Module | None:
        """The net's pretrained encoder, as Lightning's BackboneFinetuning asks for it."""
        return self.net.backbone

    def configure_from_data(self) -> None:
        """Fill in what the config leaves to the training split: weights of the classes, normalisation."""
        statistics = self.data.statistics("train")
        self.loss.setup(statistics)
        if self.auto_normalize:
            mean, std = self.net.statistics or (statistics.mean, statistics.std)
            self.mean.copy_(_per_channel(mean, len(self.mean), 0.0))
            self.std.copy_(_per_channel([value or 1.0 for value in std], len(self.std), 1.0))  # 0: an empty channel

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
        heads = self.net.num_heads if self.net.num_heads > 1 else 0
        images, boundary = len(self.data.dataset.names(self.data.test_split)), self.boundary_iou
        self.train_metrics = SegmentationMetrics(self.labels)
        self.val_metrics = SegmentationMetrics(self.labels, heads, boundary=boundary)
        self.test_metrics = SegmentationMetrics(self.labels, images=images, boundary=boundary)

    def normalize(self, image: Tensor) -> Tensor:
        """Scale integers to 0..1 and standardise each channel: (N, C, H, W) as the file has it -> float32."""
        x = image.float() / scale_of(image.dtype, self.labels)
        x = (x - self.mean.view(-1, 1, 1)) / self.std.view(-1, 1, 1)
        return x.contiguous(memory_format=torch.channels_last) if self.channels_last else x

    def forward(self, image: Tensor) -> Tensor:
        """Logits that predict, (N, K, H, W), of images as a file has them, (N, C, H, W)."""
        return self.net.predict(self.normalize(image))

    def classify(self, logits: Tensor) -> Tensor:
        """Class indices (..., H, W) of logits (..., K, H, W): by threshold for one logit, else the largest."""
        one = logits.shape[-3] == 1
        return (logits[..., 0, :, :] > self.logit_threshold).long() if one else logits.argmax(dim=-3)

    def on_fit_start(self) -> None:
        if self.lr is not None:  # by a LearningRateFinder: the schedule, too, begins from it
            self.trainer.strategy.setup_optimizers(self.trainer)
            self.train_metrics.reset()

    def on_train_start(self) -> None:
        # Not in configure_optimizers: Lightning would make the loader to count the steps before it restores its place.
        tell_length(self.trainer)
        # What Lightning does when an epoch starts, and leaves out where a run goes on within one or after it.
        for callback in self.trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(callback, GradientAccumulationScheduler):
                callback.on_train_epoch_start(self.trainer)
            if isinstance(callback, BackboneFinetuning) and self.current_epoch >= callback.unfreeze_backbone_at_epoch:
                callback.make_trainable(self.net.backbone)  # type: ignore[arg-type]  # it has one, or Lightning says so
        self.on_train_epoch_start()

    def on_train_epoch_start(self) -> None:
        self.net.train()  # a backbone that BackboneFinetuning has just unfrozen too
        last = self.current_epoch + 1 == self.trainer.max_epochs and self.validate_every is not None
        # The last epoch is validated, however many there are; the others as given, if a finder has seen the last one.
        self.trainer.check_val_every_n_epoch = 1 if last else self.validate_every

    def on_train_batch_start(self, batch: dict[str, Any], batch_idx: int) -> None:
        # What a step draws (dropout) is a function of (seed, step, rank), so that a resumed run draws it again.
        torch.manual_seed(derive_seed(self.data.seed, self.trainer.global_step, batch_idx, self.global_rank))

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        heads = self.net(self.normalize(batch["image"]))
        step_pixels = self.step_pixels(batch)
        loss, terms = self.compute_loss(heads, batch, step_pixels)
        weight_sum = None if step_pixels is None else self.loss.step_weight_sum(heads.logits[-1], step_pixels)
        self.update_metrics("train", heads, batch, loss - terms.get("presence/loss", 0.0), weight_sum)
        self.log_step({"loss_step": loss, **terms}, batch_idx)
        return loss

    def configure_gradient_clipping(
        self, optimizer: Any, gradient_clip_val: float | None = None, gradient_clip_algorithm: Any = None
    ) -> None:
        """Clip a fused optimizer's gradient too: in mixed precision Lightning refuses to, as it unscales by itself."""
        precision = self.trainer.precision_plugin
        scaler = getattr(precision, "scaler", None)
        if scaler is not None and optimizer.defaults.get("fused"):
            scaler.unscale_(optimizer)
        algorithm = gradient_clip_algorithm or GradClipAlgorithmType.NORM
        Precision.clip_gradients(precision, optimizer, gradient_clip_val or 0.0, algorithm)

    def step_pixels(self, batch: dict[str, Any]) -> Tensor | None:
        """(K,) pixels of each class in a batch of this step, averaged over its batches and all processes; None where
        the step is this batch alone."""
        if self.trainer.accumulate_grad_batches * self.trainer.world_size == 1:
            return None
        return self.trainer.strategy.reduce(batch["step_pixels"].to(self.device), reduce_op="mean")

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        self.evaluate("val", batch)

    def test_step(self, batch: dict[str, Any], batch_idx: int) -> dict[str, Tensor]:
        return {"logits": self.evaluate("test", batch)}

    def evaluate(self, split: str, batch: dict[str, Any]) -> Tensor:
        """Validation and test: the loss of the ungated heads and the figures of the combined ones, from one pass.

        The loss is taken image by image (and presence, which is no mean over pixels, left out): one of overlap, say,
        would depend on how images are batched.

        Returns:
            Logits that predict, (N, K, H, W).
        """
        image = self.normalize(batch["image"])
        # One by one on a CPU, whose float32 is rounded otherwise for another batch size.
        heads = joined([self.net(part) for part in image.split(1 if image.device.type == "cpu" else len(image))])
        losses: list[Tensor] = []
        weight_sums: list[Tensor] = []
        for i in range(len(image)):
            one: dict[str, Any] = {key: batch[key][i : i + 1] for key in ("mask", "weight") if key in batch}
            logits = tuple(logits[i : i + 1] for logits in heads.logits)
            losses.append(self.compute_loss(Heads(logits), one)[0])
            weight_sums.append(self.loss.mass(logits[-1], one["mask"]))
        return self.update_metrics(split, heads, batch, torch.stack(losses), torch.stack(weight_sums))

    def compute_loss(
        self, heads: Heads, batch: dict[str, Any], step_pixels: Tensor | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Deep supervision: the weighted sum of the heads' losses, and that of class presence where a net predicts it.

        Returns:
            The sum, and its terms by their logged keys (without the split); none where there is one head alone.
        """
        mask, weight = batch["mask"], batch.get("weight")
        each: list[Tensor] = []
        terms: dict[str, Tensor] = {}
        for number, logits in enumerate(heads.logits, start=1):
            head = f"head{number}/" if len(heads.logits) > 1 else ""
            parts = self.loss.terms(logits, mask, weight, step_pixels)
            if parts:
                each.append(torch.stack([*parts.values()]).sum())
            else:
                each.append(self.loss(logits, mask, weight, step_pixels))
            parts |= {"loss": each[-1]} if head else {}
            terms |= {f"{head}{name}": term for name, term in parts.items()}
        total = torch.stack([factor * loss for factor, loss in zip(self.head_weights, each, strict=True)]).sum()
        if heads.presence is not None:
            terms["presence/loss"] = presence_loss(heads.presence.float(), mask)
            total = total + terms["presence/loss"]
        return total, terms

    @torch.no_grad()
    def update_metrics(
        self,
        split: str,
        heads: Heads,
        batch: dict[str, Any],
        loss: Tensor,
        weight_sum: Tensor | None = None,
    ) -> Tensor:
        """Count a batch.

        Args:
            split: `train`, `val` or `test`.
            heads: what the net gave.
            batch: what the datamodule gave.
            loss: of the batch, or of each image, (N,).
            weight_sum: what `loss` was divided by, of the same shape; None for the sum over the batch.

        Returns:
            Logits that predict, (N, K, H, W).
        """
        metrics = getattr(self, f"{split}_metrics")
        logits = self.net.combine(heads)
        if weight_sum is None:
            weight_sum = self.loss.mass(heads.logits[-1], batch["mask"])
        metrics.update(
            preds=self.classify(logits),
            target=batch["mask"],
            loss=loss.detach(),
            weight_sum=weight_sum,
            index=batch["index"],
            heads=[self.classify(head) for head in heads.logits] if "heads" in metrics else [],
        )
        return logits

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
        if self.trainer.training or self.trainer.validating:
            self.step_on_plateau(split, found)
        if metrics["classes"].collapsed and not (self.warned or self.trainer.sanity_checking):
            self.warned = True
            rank_zero_warn(
                f"every {split} pixel of epoch {self.current_epoch + 1} is predicted as one class. Common causes: rare "
                "classes (class_weights or pos_weight: auto, or Dice, help), too high or too low a learning rate, "
                "masks of other images. configs/trainer/debug.yaml tells whether one batch can be learnt"
            )
        metrics.reset()

    def write_metrics(self, metrics: dict[str, float]) -> None:
        """Give metrics to the loggers now. Those of `self.log` come after the checkpoint of the same step, and would be
        missing from metrics.csv if the run ended between the two."""
        step = self.trainer.global_step if self.trainer.testing else self.logged_step
        for logger in self.loggers:
            logger.log_metrics({**metrics, "epoch": self.current_epoch}, step)

    def step_on_plateau(self, split: str, found: dict[str, Tensor]) -> None:
        """Tell a ReduceLROnPlateau the figure that it monitors, as soon as it is known. (Lightning would tell it after
        the epoch's checkpoint, and a run resumed from that would lack the step.)"""
        scheduler = self.lr_schedulers()
        if not isinstance(scheduler, ReduceLROnPlateau) or not self.monitor.startswith(f"{split}/"):
            return
        if self.monitor not in found:
            raise InputError(f"model.schedule.monitor {self.monitor} is not logged; choose one of {', '.join(found)}")
        scheduler.step(found[self.monitor])

    def lr_scheduler_step(self, scheduler: Any, metric: Any) -> None:
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
        backbone = set(self.net.backbone.parameters()) if self.net.backbone is not None else set()
        if self.encoder_lr != 1 and not backbone:
            raise InputError("model.encoder_lr needs an encoder: set net.encoder, or encoder_lr: 1")
        try:
            groups = [trained]
            if self.encoder_lr != 1:
                groups = [[p for p in trained if p not in backbone], [p for p in trained if p in backbone]]
            optimizer = self.optimizer([{"params": group} for group in groups])
            for group in optimizer.param_groups:
                group["lr"] = self.lr or group["lr"]
            optimizer.param_groups[-1]["lr"] *= self.encoder_lr
            scheduler = self.schedule(optimizer)
        except ValueError as error:  # torch's own checks of the user's numbers
            raise InputError(f"model.optimizer or model.schedule: {error}") from error
        config: dict[str, Any] = {"scheduler": scheduler, "interval": self.schedule_interval}
        if isinstance(scheduler, ReduceLROnPlateau):
            self.monitor = getattr(scheduler, "monitor", "val/loss")
            if not self.monitor.startswith(("train/", "val/")):
                raise InputError(f"model.schedule.monitor {self.monitor} is not logged; val/loss and val/miou are")
            config |= {"interval": "epoch", "monitor": self.monitor, "strict": False}
        return {"optimizer": optimizer, "lr_scheduler": config}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["precision"] = self.trainer.precision
        checkpoint["should_stop"] = self.trainer.should_stop  # by early stopping, say: the run is to be tested only
        net = checkpoint["hyper_parameters"]["net"]
        if isinstance(net, dict) and net.get("init_args", {}).get("encoder_weights"):  # they are in this file
            net = {**net, "init_args": {**net["init_args"], "encoder_weights": None}}
            checkpoint["hyper_parameters"] = {**checkpoint["hyper_parameters"], "net": net}
        # Counts of an epoch that a mid-epoch checkpoint interrupts, those of all processes: the sum of them goes on.
        checkpoint["train_counts"] = self.train_metrics.state()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        if not self.trainer.training:
            return
        if self.trainer.is_global_zero:
            self.train_metrics.load(checkpoint["train_counts"])
        self.trainer.should_stop = checkpoint.get("should_stop", False)


def _per_channel(values: Sequence[float] | None, channels: int, default: float) -> Tensor:
    tensor = torch.tensor(values if values is not None else [default] * channels, dtype=torch.float32)
    if len(tensor) != channels:
        raise InputError(f"model.mean and model.std need one number a channel: {channels}, not {len(tensor)}")
    return tensor
