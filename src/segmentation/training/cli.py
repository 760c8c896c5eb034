"""LightningCLI, configured once: the command line of train.py, and a run from its first check to its last table."""

import sys
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import Namespace
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import LearningRateMonitor
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.loggers import WandbLogger
from lightning.pytorch.utilities import rank_zero_only, rank_zero_warn
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from segmentation.checkpoint import find_class, read_checkpoint
from segmentation.data import SegmentationData, SegmentationDataModule
from segmentation.data.writing import write_text
from segmentation.errors import InputError
from segmentation.losses import SegmentationLoss
from segmentation.module import SegmentationModule
from segmentation.nets import SegmentationNet
from segmentation.training.callbacks import EpochPrinter, PictureOptions, Pictures, RunSummary, Throughput
from segmentation.training.entry import close_wandb
from segmentation.training.finite import StopAtNonFinite
from segmentation.training.job import start_job
from segmentation.training.loggers import WandbOptions, make_loggers
from segmentation.training.machine import has_bf16
from segmentation.training.parser import Parser
from segmentation.training.plugins import AtomicCheckpointIO, SyncBatchNorm
from segmentation.training.preemption import PreemptionCheckpoint, check_launch, check_meeting_place
from segmentation.training.report import report
from segmentation.training.run_folder import RunFolder, git_commit, hold, is_rank_zero, new_name, release
from segmentation.training.saving import CheckpointOptions, checkpoint_callbacks
from segmentation.training.trainer import as_list, check_callbacks, make_trainer, refused, without_finders

CONFIGS = Path(__file__).resolve().parents[3] / "configs"

#: Trainer's options that are not a user's: the run folder, the datamodule and the report see to them.
OURS = {
    "logger",
    "default_root_dir",
    "use_distributed_sampler",
    "enable_model_summary",
    "enable_checkpointing",
    "barebones",
    "fast_dev_run",
    "limit_predict_batches",
    "reload_dataloaders_every_n_epochs",
    "enable_autolog_hparams",
    "model_registry",
}

#: Options that a resumed run may change, as they cannot change its result.
FREE = (
    "data.cache",
    "data.num_workers",
    "trainer.enable_progress_bar",
    "checkpoint.every_minutes",
    "pictures.",
    "wandb.",
)

USAGE = "python src/train.py [--config OVERLAY ...] [--name N] [--resume] [--any.option value]"
DESCRIPTION = (
    "Trains a segmentation net, tests its best checkpoint and says where the run folder is. Defaults are those of "
    "configs/default.yaml; overlays in configs/ and options below change what differs. Options of a class: "
    "--model.net.help UNet, --data.dataset.help FolderData, --model.loss.help CrossEntropy. "
    "The whole configuration, as YAML: --print_config."
)


class SegmentationCLI(LightningCLI):
    """`[--config OVERLAY ...] [--name N] [--resume] [--any.option value]`, over configs/default.yaml.

    Args:
        args: the command line, by default the process's own. From a notebook: `SegmentationCLI([])`.
    """

    usage, description = USAGE, DESCRIPTION

    def __init__(self, args: list[str] | None = None) -> None:
        start_job()
        self.arguments = sys.argv[1:] if args is None else args
        super().__init__(
            SegmentationModule,
            SegmentationDataModule,
            args=self.arguments,
            run=False,
            save_config_callback=None,
            seed_everything_default=0,
            auto_configure_optimizers=False,
            parser_class=Parser,
            parser_kwargs={
                "usage": self.usage,
                "description": self.description,
                "allow_abbrev": False,
                "default_config_files": [str(CONFIGS / "default.yaml")],
            },
        )

    def add_core_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.add_lightning_class_args(SegmentationDataModule, "data")
        parser.add_lightning_class_args(SegmentationModule, "model")
        options = {"fail_untyped": False, "instantiate": False, "sub_configs": True, "skip": OURS}
        parser.add_class_arguments(Trainer, "trainer", **options)

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.add_argument("--name", type=str | None, default=None, help="the run's folder is runs/NAME")
        parser.add_argument("--resume", action="store_true", help="go on with run NAME if it has begun, else start it")
        parser.add_dataclass_arguments(CheckpointOptions, "checkpoint")
        parser.add_dataclass_arguments(PictureOptions, "pictures")
        parser.add_dataclass_arguments(WandbOptions, "wandb")
        link = parser.link_arguments
        link("data", "model.net.init_args.in_channels", lambda data: data.labels.channels, apply_on="instantiate")
        link("data", "model.net.init_args.num_classes", lambda data: data.labels.num_outputs, apply_on="instantiate")
        link("data", "model.labels", lambda data: data.labels.as_dict(), apply_on="instantiate")

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Parse the command line; on --resume over the run's own config, which counts."""
        self.config = parser.parse_args(args)
        name, resume = self.config.pop("name"), self.config.pop("resume")
        if resume and not name:
            raise InputError("--resume needs the --name of the run to go on with")
        name = name or new_name()
        hold(name)
        self.run_folder = RunFolder(name, resume)
        if self.run_folder.resuming:
            try:
                own = parser.parse_args(["--config", str(self.run_folder.config)])
            except InputError as error:
                raise InputError(f"{self.run_folder.config}: {error}") from error
            now = parser.parse_args(["--config", str(self.run_folder.config), *args])
            asked, self.config = self.config, own
            for key in _changes(_flat(own), _flat(now), _flat(asked), self.run_folder):
                self.config[key] = now[key]
            for key in ("name", "resume"):
                self.config.pop(key)

    def instantiate_classes(self) -> None:
        """Build what the config says. A net that a checkpoint restores does not need the weights that it began with."""
        config = self.config
        if self.run_folder.last:
            self.config = config.clone()
            self.config.model.init_from = None
            if (config.model.net.init_args or {}).get("encoder_weights"):
                self.config.model.net.init_args.encoder_weights = None
        super().instantiate_classes()
        self.config = config

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """The trainer with its loggers and callbacks, which live in the run folder."""
        config, run = self.config_init, self.run_folder
        check_meeting_place()
        check_launch(config.trainer.devices, config.trainer.num_nodes)
        self.throughput, self.preemption = Throughput(), PreemptionCheckpoint(run, config.checkpoint.every_minutes)
        trainer = dict(config.trainer)
        if trainer["precision"] is None:
            trainer["precision"] = "bf16-mixed" if has_bf16(trainer["accelerator"]) else "32-true"
        callbacks = as_list(trainer["callbacks"])
        check_callbacks(callbacks)
        last = read_checkpoint(run.last) if run.last else None
        if last:  # it goes on with what was found
            callbacks = without_finders(callbacks)
            found = last["datamodule_hyper_parameters"]["batch_size"]
            self.datamodule.batch_size = self.datamodule.hparams["batch_size"] = found  # and into the next checkpoint
        trainer["callbacks"] = [
            *checkpoint_callbacks(run),
            RunSummary(run),
            StopAtNonFinite(),
            self.throughput,
            Pictures(run, config.pictures.images, config.pictures.every_n_epochs),
            LearningRateMonitor("step"),
            EpochPrinter(),
            self.preemption,
            *callbacks,
        ]
        plugins = [AtomicCheckpointIO(), *as_list(trainer["plugins"])]
        trainer |= {
            "plugins": [*plugins, SyncBatchNorm()] if trainer["sync_batchnorm"] else plugins,
            "logger": make_loggers(run, config.wandb, last["global_step"] if last else None),
            "enable_model_summary": False,  # RunSummary says it
            "default_root_dir": str(run.path),
            "use_distributed_sampler": False,  # the datamodule gives each process its share
        }
        built = make_trainer(**trainer)
        if trainer["sync_batchnorm"] and built.world_size > 1 and built.strategy.root_device.type == "cpu":
            raise InputError("trainer.sync_batchnorm is for GPUs only: set it to false here")
        return built

    def run(self) -> None:
        """The whole run; afterwards signals mean what they meant before it, and others may write its folder."""
        try:
            with self.preemption.listening(self.trainer):
                self.train_and_test()
        except MisconfigurationException as error:  # of a callback, say
            raise refused(error) from error
        finally:
            release(self.run_folder.name)

    def train_and_test(self) -> None:
        """Check the data, train, test the best checkpoint, report."""
        run, trainer = self.run_folder, self.trainer
        config = self.parser.dump(self.config, skip_none=False)
        lost = next((line.strip() for line in config.splitlines() if "Unable to serialize" in line), None)
        if lost:  # a number where torchvision declares any Number: config.yaml could not be read again
            fix = "write it as words, numbers or a list, e.g. [-180, 180]"
            raise InputError(f"an option cannot be written to config.yaml ({lost}): {fix}")
        if run.resuming and run.summary.is_file() and run.config.read_text(encoding="utf-8") == config:
            rank_zero_only(print)(f"run folder {run.path}: the run is finished; to go on, raise --trainer.max_epochs")
            return
        if is_rank_zero():
            if self.model.init_from:
                read_checkpoint(self.model.init_from)
            self.datamodule.check()
            _warn_of_classes(self.config)
            run.create(config)
            if skipped := self.datamodule.skipped():
                write_text(run.skipped, "".join(f"{message}\n" for message in skipped))
                print(f"skipped   {len(skipped)} bad files, listed in {run.skipped}", flush=True)
            _tell_wandb(trainer, yaml.safe_load(config), self.datamodule.labels.names)
        trainer.fit(self.model, datamodule=self.datamodule, ckpt_path=run.last, weights_only=True)
        progress: Any = trainer.fit_loop.epoch_progress.current
        progress.completed = progress.processed  # Lightning forgets it where a run that has stopped early is resumed
        if self.config.trainer.overfit_batches:
            miou = trainer.callback_metrics.get("val/miou")
            if trainer.is_global_zero and miou is not None:  # else it had finished before
                print(_verdict(float(miou)), flush=True)
            return
        best = getattr(trainer.checkpoint_callback, "best_model_path", "")
        tested = run.checkpoints / ("best.ckpt" if best else "last.ckpt")  # the last where nothing was validated
        tested = trainer.strategy.broadcast(tested)  # under torchrun only rank 0 may know the run's name
        # Not by ckpt_path, for which a weight-averaging callback would go back to the weights that it averaged.
        self.model.load_state_dict(read_checkpoint(tested)["state_dict"])
        trainer.callbacks = without_finders(trainer.callbacks)  # type: ignore[attr-defined]
        trainer.test(self.model, datamodule=self.datamodule, verbose=False)
        if trainer.is_global_zero:
            report(trainer, self.model, run, tested, self.throughput, self.config_init.wandb.log_checkpoint)
            close_wandb(0)  # a second run of this process, in a notebook, is a run of its own


def _warn_of_classes(config: Namespace) -> None:
    """Say before the training which of the classes no job will build from the checkpoint."""
    sections = ((config.model.net, SegmentationNet), (config.model.loss, SegmentationLoss))
    for section, base in (*sections, (config.data.dataset, SegmentationData)):
        try:
            find_class(section.class_path, base)
        except InputError as error:
            rank_zero_warn(f"the jobs after training will not load the checkpoint: {error}")


def _verdict(miou: float) -> str:
    """What overfitting one batch has shown."""
    if miou > 0.95:
        return f"debug     learnt by heart (mIoU {miou:.3f}): net, loss and masks fit together"
    return (
        f"debug     could not learn the batch by heart (mIoU {miou:.3f}, wanted 0.95). Try more --trainer.max_epochs "
        "first; if it stays, look at the mask values in classes, the loss and the learning rate"
    )


def train() -> None:
    """train.py."""
    SegmentationCLI().run()


def _flat(config: Namespace) -> dict[str, Any]:
    skip = ("name", "resume", "config")
    return {key: value for key, value in vars(config.as_flat()).items() if key.split(".")[0] not in skip}


def _changes(own: dict[str, Any], now: dict[str, Any], asked: dict[str, Any], run: RunFolder) -> list[str]:
    """The options of a resumed run that this command line changes: none that could change a result, but the run may be
    longer.

    Args:
        own: the run's config.
        now: the command line over it. Where that appends to a list (`--trainer.callbacks+=`), it does so again.
        asked: the command line over the defaults, as the run began.
        run: the run folder, for the error.
    """
    epochs = "trainer.max_epochs"  # not max_steps: a stop within an epoch ends that epoch
    before, after = (float("inf") if each[epochs] in (None, -1) else each[epochs] for each in (own, now))
    differ = [key for key in sorted(own.keys() | now.keys()) if own.get(key) != now.get(key)]
    changed = [key for key in differ if asked.get(key) != own.get(key)]
    wrong = [key for key in changed if not key.startswith(FREE) and (key != epochs or after < before)]
    if wrong:
        listed = ", ".join(f"{key} (run: {own.get(key)}, now: {now.get(key)})" for key in wrong[:4])
        raise InputError(
            f"--resume goes on with {run.config}, but these options differ: {listed}. "
            "Take them away, or start another run under another --name"
        )
    return changed


def _tell_wandb(trainer: Trainer, config: dict[str, Any], classes: list[str]) -> None:
    for logger in trainer.loggers:
        if isinstance(logger, WandbLogger):
            import wandb

            try:
                logger.log_hyperparams({**config, "git_commit": git_commit(), "classes": classes})
            except wandb.Error as error:  # no such entity, say
                reason = " ".join(str(error).split())
                raise InputError(f"W&B refuses the run: {reason}. To go on without: --wandb.mode offline") from error
            logger.experiment.define_metric("val/miou", summary="max")
