"""A sweep without a server: Optuna proposes, seeds repeat each trial, paired bootstrap intervals choose the winner.

    pip install optuna
    python examples/sweep.py --trials 20 --seeds 3 --config configs/data/nuclei.yaml --trainer.max_epochs 10

What is searched stands in `propose`; all other options go to train.py. The study is in sweep.log: the same command adds
trials to it, and may run several times at once, on all machines that share this folder.

The highest of many figures is often luck. So a trial counts as good as the one with the highest mIoU if the interval of
their difference, over the validation images, holds 0; the smallest net of these wins. The test split chooses nothing.
"""

import argparse
import sys
from pathlib import Path

import numpy as np
import optuna
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import FrozenTrial, Trial, TrialState

sys.path.insert(0, str(Path(__file__).parents[1] / "src"))
from segmentation.inference.bootstrap import bootstrap
from segmentation.inference.compare import read_counts
from segmentation.inference.evaluate import evaluate
from segmentation.training.cli import SegmentationCLI
from segmentation.training.entry import run_job


def propose(trial: Trial) -> list[str]:
    """The options of a trial: what is searched."""
    net = trial.suggest_categorical("net", ["UNet", "UNetPlusPlus", "UNet3Plus"])
    widths = trial.suggest_categorical("widths", ["[4,8,16,32]", "[8,16,32,64]", "[16,32,64,128]"])
    lr = trial.suggest_float("lr", 3e-4, 1e-2, log=True)
    return [f"--model.net={net}", f"--model.net.widths={widths}", f"--model.optimizer.lr={lr}"]


def measure(trial: Trial, seeds: int, options: list[str]) -> float:
    """Train a trial once a seed; return the mean mIoU of the best checkpoints on the validation split."""
    proposed = propose(trial)
    runs = []
    mious = []
    for seed in range(seeds):
        run = f"sweep-{trial.number}-{seed}"
        cli = SegmentationCLI([*options, *proposed, f"--seed_everything={seed}", f"--data.seed={seed}", "--name", run])
        cli.run()
        best = f"runs/{run}/checkpoints/best.ckpt"
        metrics = evaluate([best, "--split", "val", "--output", f"runs/{run}/val.json"])
        mious.append(metrics["miou"])
        runs.append(run)
    trial.set_user_attr("runs", runs)
    trial.set_user_attr("parameters", sum(p.numel() for p in cli.model.net.parameters()))
    return float(np.mean(mious))


def resample(trial: FrozenTrial) -> np.ndarray:
    """A trial's mIoU, averaged over its seeds, on each resample of the validation images: the same for all trials."""
    counts = []
    for run in trial.user_attrs["runs"]:
        _, _, each = read_counts(Path(f"runs/{run}/val_per_image.csv"))
        counts.append(each)
    ious = np.mean(bootstrap(counts), axis=0)  # (resamples, K + 1), the mIoU last
    return ious[:, -1]


def choose(study: optuna.Study) -> FrozenTrial:
    """The smallest net of the trials that the validation images cannot tell from the best."""
    best = study.best_trial
    as_good = []
    for trial in study.get_trials(states=[TrialState.COMPLETE]):
        difference = resample(trial) - resample(best)
        low, high = np.percentile(difference, (2.5, 97.5))
        print(f"trial {trial.number}  mIoU {trial.value:.4f}, to the best [{low:+.4f}, {high:+.4f}]  {trial.params}")
        if high >= 0:
            as_good.append(trial)
    return min(as_good, key=lambda trial: (trial.user_attrs["parameters"], -trial.values[0]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=20)
    parser.add_argument("--seeds", type=int, default=3, help="runs of each trial")
    own, options = parser.parse_known_args()
    study = optuna.create_study(
        storage=JournalStorage(JournalFileBackend("sweep.log")),
        study_name="sweep",
        direction="maximize",
        load_if_exists=True,
    )
    study.optimize(lambda trial: measure(trial, own.seeds, options), n_trials=own.trials)
    winner = choose(study)
    study.set_user_attr("winner", winner.number)
    print(f"winner  {', '.join(winner.user_attrs['runs'])}")


if __name__ == "__main__":
    run_job(main)
