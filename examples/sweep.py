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

sys.path.insert(0, str(Path(__file__).parents[1] / "src"))
from segmentation.inference.bootstrap import bootstrap, intervals
from segmentation.inference.compare import read_counts
from segmentation.inference.evaluate import evaluate
from segmentation.training.cli import SegmentationCLI
from segmentation.training.entry import run_job


def propose(trial: optuna.Trial) -> list[str]:
    """The options of a trial: what is searched."""
    net = trial.suggest_categorical("net", ["UNet", "UNetPlusPlus", "UNet3Plus"])
    width = trial.suggest_categorical("width", [4, 8, 16])
    lr = trial.suggest_float("lr", 3e-4, 1e-2, log=True)
    widths = [width * 2**level for level in range(5)]
    return ["--model.net", net, "--model.net.widths", str(widths), "--model.optimizer.lr", str(lr)]


def measure(trial: optuna.Trial, seeds: int, options: list[str]) -> float:
    """Train a trial once a seed; return the mean mIoU of the best checkpoints on the validation split."""
    proposed = propose(trial)
    mious = []
    for seed in range(seeds):
        run = f"sweep-{trial.number}-{seed}"
        seeded = ["--seed_everything", str(seed), "--data.seed", str(seed), "--name", run]
        cli = SegmentationCLI([*options, *proposed, *seeded])
        cli.run()
        output = ["--output", f"runs/{run}/val.json"]
        mious.append(evaluate([f"runs/{run}/checkpoints/best.ckpt", "--split", "val", *output])["miou"])
    trial.set_user_attr("mious", mious)
    trial.set_user_attr("parameters", sum(p.numel() for p in cli.model.net.parameters()))
    return float(np.mean(mious))


def resample(trial: optuna.trial.FrozenTrial) -> np.ndarray:
    """A trial's mIoU, averaged over its seeds, on each resample of the validation images: the same for all trials."""
    seeds = range(len(trial.user_attrs["mious"]))
    counts = [read_counts(Path(f"runs/sweep-{trial.number}-{seed}/val_per_image.csv"))[2] for seed in seeds]
    return np.mean(bootstrap(counts), axis=0)[:, -1:]


def choose(study: optuna.Study) -> optuna.trial.FrozenTrial:
    """The smallest net of the trials that the validation images cannot tell from the best; prints them all."""
    best = study.best_trial
    drawn = resample(best)
    as_good = []
    for trial in study.get_trials(states=[optuna.trial.TrialState.COMPLETE]):
        difference = np.array([trial.values[0] - best.values[0]])
        estimate = intervals(["mIoU"], difference, resample(trial) - drawn)["mIoU"]
        if estimate.high >= 0:
            as_good.append(trial)
        seeds = " ".join(f"{miou:.3f}" for miou in trial.user_attrs["mious"])
        size = f"{trial.user_attrs['parameters']:,} parameters"
        print(f"trial {trial.number:<4} mIoU of each seed {seeds}, to the best {estimate:+}, {size}, {trial.params}")
    return min(as_good, key=lambda trial: (trial.user_attrs["parameters"], -trial.values[0]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=20)
    parser.add_argument("--seeds", type=int, default=3, help="runs of each trial")
    own, options = parser.parse_known_args()
    storage = optuna.storages.JournalStorage(optuna.storages.journal.JournalFileBackend("sweep.log"))
    study = optuna.create_study(storage=storage, study_name="sweep", direction="maximize", load_if_exists=True)
    study.optimize(lambda trial: measure(trial, own.seeds, options), n_trials=own.trials)
    winner = choose(study)
    study.set_user_attr("winner", winner.number)
    print(f"winner     trial {winner.number}: runs/sweep-{winner.number}-*")


if __name__ == "__main__":
    run_job(main)
