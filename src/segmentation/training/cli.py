"""The command line of train.py, and a run from its first check to its last table."""

import sys
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import Namespace
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import LearningRateMonitor, ProgressBar
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.utilities import rank_zero_only, rank_zero_warn

from segmentation.checkpoint import find_class, fitting_weights, read_checkpoint
from segmentation.data import SegmentationData, SegmentationDataModule
from segmentation.data.writing import write_text
from segmentation.errors import InputError, plural
from segmentation.losses import SegmentationLoss
from segmentation.module import SegmentationModule
from segmentation.nets import SegmentationNet
from segmentation.training.callbacks import CountFromOne, EpochPrinter, RunSummary, StopAtNonFinite, Throughput
from segmentation.training.entry import outcome, start_job
from segmentation.training.parser import Parser
from segmentation.training.preemption import LastCheckpoint, check_launch, check_meeting_place, check_processes
from segmentation.training.report import PictureOptions, Pictures, report
from segmentation.training.run_folder import (
    RUNS,
    BestCheckpoint,
    CheckpointOptions,
    MetricsFile,
    RunFolder,
    acquire_lock,
    is_rank_zero,
    new_name,
    release_lock,
)
from segmentation.training.trainer import (
    AtomicCheckpointIO,
    SyncBatchNorm,
    check_callbacks,
    has_bf16,
    is_refusal,
    make_trainer,
    refused,
    without_finders,
)
from segmentation.training.wandb_run import WandbOptions, close_wandb, make_wandb

PACKAGE = Path(__file__).resolve().parents[1]
CLONE = PACKAGE.parents[1]
CONFIGS = (CLONE if (CLONE / "configs/default.yaml").is_file() else PACKAGE) / "configs"  # in it after pip install

#: Options of the Trainer that the run folder and the datamodule set.
OURS = {
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

#: Options of the Trainer of which 0 leaves nothing to train, or is divided by.
NOT_ZERO = ("max_epochs", "max_steps", "limit_train_batches", "accumulate_grad_batches", "check_val_every_n_epoch")

#: Options, or prefixes of options, that `--resume` may change, as they do not affect the result.
CHANGEABLE = (
    "data.cache",
    "data.num_workers",
    "trainer.enable_progress_bar",
    "trainer.logger",
    "checkpoint.every_minutes",
    "pictures.",
    "wandb.",
)


class SegmentationCLI(LightningCLI):
    """`[--config OVERLAY ...] [--name N] [--resume] [--any.option value]`, over configs/default.yaml.

    Args:
        args: the command line, by default the process's own. From a notebook: `SegmentationCLI([])`.
    """

    usage = "python src/train.py [--config OVERLAY ...] [--name N] [--resume] [--runs DIR] [--any.option value]"
    description = (
        "Trains a segmentation net, tests its best checkpoint and says where the run folder is. Defaults are those of "
        "configs/default.yaml; overlays in configs/ and options below change what differs. Options of a class: "
        "--model.net.help UNet, --data.dataset.help FolderData, --model.loss.help CrossEntropy. "
        "The whole configuration, as YAML: --print_config."
    )

    def __init__(self, args: list[str] | None = None) -> None:
        start_job()
        super().__init__(
            SegmentationModule,
            SegmentationDataModule,
            args=sys.argv[1:] if args is None else args,
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
        parser.add_class_arguments(
            Trainer,
            "trainer",
            fail_untyped=False,
            instantiate=False,
            sub_configs=True,
            skip=OURS,
        )

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.add_argument("--name", type=str | None, default=None, help="the run's folder is RUNS/NAME")
        parser.add_argument("--runs", type=Path, default=RUNS, help="folder of all runs, e.g. on a scratch disk")
        parser.add_argument("--resume", action="store_true", help="go on with run NAME if it has begun, else start it")
        parser.add_dataclass_arguments(CheckpointOptions, "checkpoint")
        parser.add_dataclass_arguments(PictureOptions, "pictures")
        parser.add_dataclass_arguments(WandbOptions, "wandb")
        link = parser.link_arguments
        link("data", "model.net.init_args.in_channels", lambda data: data.labels.channels, apply_on="instantiate")
        link("data", "model.net.init_args.num_classes", lambda data: data.labels.num_outputs, apply_on="instantiate")
        link("data", "model.labels", lambda data: data.labels.as_dict(), apply_on="instantiate")

    def parse_arguments(self, parser: LightningArgumentParser, args) -> None:
        asked = parser.parse_args(args)
        name = asked.pop("name")
        resume = asked.pop("resume")
        runs = asked.pop("runs")
        if resume and not name:
            raise InputError("--resume needs the --name of the run to go on with")
        name = name or new_name()
        acquire_lock(name, runs)
        run = RunFolder(name, resume, runs)
        self.run_folder = run
        self.config = self.resumed_config(asked, args) if run.last else asked
        for logger in as_list(self.config.trainer.logger):
            name_run(logger, run.name)
        self.config_text = parser.dump(self.config, skip_none=False)
        self.step = None
        if run.last:
            last = read_checkpoint(run.last)
            self.step = last["global_step"]
            self.config.data.batch_size = last["datamodule_hyper_parameters"]["batch_size"]  # BatchSizeFinder's
            self.config.model.init_from = None  # last.ckpt has the weights
            if "model.net.init_args.encoder_weights" in self.config:
                self.config.model.net.init_args.encoder_weights = None

    def resumed_config(self, asked: Namespace, args: list[str]) -> Namespace:
        """The config of the run that goes on, with what the command line changes: options that cannot change a result,
        more epochs, and another limit of time.

        Args:
            asked: the command line over the defaults, as at the start of the run.
            args: the command line.

        Raises:
            InputError: another option differs, or the run would be shorter.
        """
        path = str(self.run_folder.config)
        own = self.parser.parse_args(["--config", path])
        now = self.parser.parse_args(["--config", path, *args])
        for key in ("name", "resume", "runs"):
            own.pop(key)
            now.pop(key)
        wrong = []
        for key in sorted({*now.keys()} - {"config"}):
            before = own.get(key)
            after = now.get(key)
            if after == before or asked.get(key) == before:  # `--trainer.callbacks+=` appends once more to `now`
                continue
            # max_steps is not free: a stop within an epoch ends that epoch
            endless = (None, -1)
            longer = key == "trainer.max_epochs" and before not in endless and (after in endless or after > before)
            own[key] = after
            if longer or key == "trainer.max_time":
                rank_zero_only(print)(
                    f"resume    {key} is {after}, was {before}: WarmupDecay goes on as if it had been so from the "
                    "start. In a longer run the learning rate rises again"
                )
            elif not key.startswith(CHANGEABLE):
                wrong.append(f"{key} (run: {before}, now: {after})")
        if wrong:
            raise InputError(
                f"--resume goes on with {path}, but these options differ: {', '.join(wrong[:4])}. "
                "Take them away, or start another run under another --name"
            )
        return own

    def instantiate_trainer(self, **kwargs) -> Trainer:
        """The trainer with the loggers and callbacks of a run."""
        config = self.config_init
        run = self.run_folder
        options = dict(config.trainer)
        check_meeting_place()
        check_launch(options["num_nodes"])
        callbacks = as_list(options["callbacks"])
        check_callbacks(callbacks)
        for line in self.config_text.splitlines():
            if "Unable to serialize" in line:  # by jsonargparse, in place of the value
                raise InputError(
                    f"an option cannot be written to config.yaml ({line.strip()}): write it as words, numbers or a "
                    "list, e.g. [-180, 180]"
                )
        for name in NOT_ZERO:
            if options[name] == 0:
                raise InputError(
                    f"trainer.{name} is 0: give 1 or more. To test a checkpoint: python src/eval.py CHECKPOINT. "
                    "To validate nothing: --trainer.limit_val_batches 0"
                )
        if run.last:
            callbacks = without_finders(callbacks)
        options["plugins"] = [AtomicCheckpointIO(), *as_list(options["plugins"])]
        if options["sync_batchnorm"]:
            options["plugins"].append(SyncBatchNorm())
        if options["precision"] is None:
            options["precision"] = "bf16-mixed" if has_bf16(options["accelerator"]) else "32-true"
        self.best_checkpoint = BestCheckpoint(run)
        self.throughput = Throughput()
        self.pictures = Pictures(run, config.pictures)
        self.last_checkpoint = LastCheckpoint(run, config.checkpoint.every_minutes)
        options["callbacks"] = [
            self.best_checkpoint,
            RunSummary(run),
            StopAtNonFinite(),
            self.throughput,
            self.pictures,
            LearningRateMonitor("step"),
            EpochPrinter(),
            self.last_checkpoint,
            *callbacks,
        ]
        has_bar = any(isinstance(each, ProgressBar) for each in callbacks)
        if options["enable_progress_bar"] is not False and not has_bar:
            options["callbacks"].append(CountFromOne())
        options["logger"] = [MetricsFile(run, self.step), *as_list(options["logger"])]
        self.wandb = make_wandb(run, config.wandb)
        if self.wandb:
            options["logger"].append(self.wandb)
        trainer = make_trainer(
            **options,
            enable_model_summary=False,  # RunSummary prints it
            default_root_dir=str(run.path),
            use_distributed_sampler=False,  # the datamodule gives each process its share
        )
        check_processes(trainer)
        return trainer

    def run(self) -> None:
        """Train and test; afterwards restore the signal handlers and release the lock of the run folder."""
        try:
            with self.last_checkpoint.listening():
                self.train_and_test()
            close_wandb(0)
        except BaseException as error:
            status, message = outcome(error)
            if message or not is_refusal(error):  # it is known, or a bug
                close_wandb(status)
                raise
            close_wandb(2)
            raise refused(error) from error
        finally:
            release_lock(self.run_folder)

    def train_and_test(self) -> None:
        """Check the data, train, test the best checkpoint, write the summary."""
        run = self.run_folder
        trainer = self.trainer
        if run.last and run.summary.is_file() and run.config.read_text(encoding="utf-8") == self.config_text:
            rank_zero_only(print)(
                f"run folder {run.path}: the run is finished; to go on, raise --trainer.max_epochs or max_time"
            )
            return
        if is_rank_zero():
            self.prepare()
        trainer.fit(self.model, datamodule=self.datamodule, ckpt_path=run.last, weights_only=True)
        progress: Any = trainer.fit_loop.epoch_progress.current
        progress.completed = progress.processed  # Lightning does not set it when it resumes a run that stopped early
        if self.config.trainer.overfit_batches:
            if "val/miou" in trainer.callback_metrics:  # else the run had finished before
                rank_zero_only(print)(overfit_verdict(float(trainer.callback_metrics["val/miou"])))
            return
        tested = run.checkpoints / ("best.ckpt" if self.best_checkpoint.best_model_path else "last.ckpt")
        tested = trainer.strategy.broadcast(tested)  # under torchrun only rank 0 may know the run's name
        # Not by ckpt_path: a weight-averaging callback would go back to the weights that it averaged.
        self.model.load_state_dict(read_checkpoint(tested)["state_dict"])
        trainer.callbacks = without_finders(trainer.callbacks)  # type: ignore[attr-defined]
        trainer.test(self.model, datamodule=self.datamodule, verbose=False)
        if trainer.is_global_zero:
            report(
                trainer,
                self.model,
                run,
                tested,
                self.throughput,
                self.pictures.worst_and_best,
                self.parser.dump(self.config, skip_default=True),
            )
            if self.wandb:
                self.wandb.log_results(tested if self.config.wandb.log_checkpoint else None)

    def prepare(self) -> None:
        """In rank 0, check data and classes before anything is written; then make the run folder."""
        run = self.run_folder
        if self.model.init_from:
            fitting_weights(self.model.net, self.model.init_from)
        self.datamodule.check()
        kinds = {"model.net": SegmentationNet, "model.loss": SegmentationLoss, "data.dataset": SegmentationData}
        for option, base in kinds.items():
            try:
                find_class(self.config[option].class_path, base)
            except InputError as error:
                rank_zero_warn(f"the jobs after training will not load the checkpoint: {error}")
        run.create(self.config_text)
        skipped = self.datamodule.skipped()
        if skipped:
            write_text(run.skipped, "".join(f"{message}\n" for message in skipped))
            print(f"skipped   {plural(len(skipped), 'bad file')}, listed in {run.skipped}", flush=True)
        net = self.config.model.net.get("init_args") or {}
        if net.get("encoder") and "encoder_weights" in net and not run.last:
            weights = net["encoder_weights"] or "random weights; for trained ones: --model.net.encoder_weights imagenet"
            print(f"encoder   {net['encoder']}, {weights}", flush=True)
        described = {**yaml.safe_load(self.config_text), "classes": self.datamodule.labels.names}
        for logger in as_list(self.config_init.trainer.logger):
            logger.log_hyperparams(described)
        if self.wandb:
            self.wandb.describe(described)


def train() -> None:
    """Entry point of src/train.py."""
    SegmentationCLI().run()


def as_list(given: Any) -> list[Any]:
    """An option that Lightning takes as None, as one object or as a list of them."""
    if isinstance(given, list):
        return given
    return [] if given is None else [given]


def name_run(logger: Any, name: str) -> None:
    """Put the run's name in place of `{name}` in the options of a logger, a parsed section of trainer.logger.

    Raises:
        InputError: it is no logger but a bool, as Lightning's own option may be.
    """
    if isinstance(logger, bool):
        raise InputError(
            f"trainer.logger {logger}: metrics.csv is always written. Leave it out, or name a logger beside it: "
            "--config configs/logger/tensorboard.yaml"
        )
    options = logger.get("init_args", {})
    for key, value in options.items():
        if isinstance(value, str):
            options[key] = value.replace("{name}", name)


def overfit_verdict(miou: float) -> str:
    """Whether the net could overfit one batch, as a line to print."""
    if miou > 0.95:
        return f"debug     learnt by heart (mIoU {miou:.3f}): net, loss and masks fit together"
    return (
        f"debug     could not learn the batch by heart (mIoU {miou:.3f}, wanted 0.95). Try more --trainer.max_epochs "
        "first; if it stays, look at the mask values in classes, the loss and the learning rate"
    )
