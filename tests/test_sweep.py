"""The example of a sweep, as its header says to run it."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from conftest import ROOT, TINY
from segmentation.inference.compare import compare


@pytest.mark.slow
def test_two_trials_of_two_seeds() -> None:
    optuna = pytest.importorskip("optuna")
    command = [sys.executable, str(ROOT / "examples/sweep.py"), "--trials", "2", "--seeds", "2", *TINY]
    done = subprocess.run(command, capture_output=True, text=True, timeout=1500)
    assert done.returncode == 0, done.stderr

    storage = optuna.storages.JournalStorage(optuna.storages.journal.JournalFileBackend("sweep.log"))
    study = optuna.load_study(study_name="sweep", storage=storage)
    trials = study.get_trials()
    assert [trial.state.name for trial in trials] == ["COMPLETE"] * 2
    for trial in trials:
        found = []
        for seed in range(2):
            run = Path(f"runs/sweep-{trial.number}-{seed}")
            found.append(json.loads((run / "val.json").read_text())["metrics"]["miou"])
            config = (run / "config.yaml").read_text()
            assert f"class_path: segmentation.nets.{trial.params['net']}" in config
            assert f"seed_everything: {seed}" in config
        assert found[0] != found[1]
        assert trial.values == [np.mean(found)]
    winner = trials[study.user_attrs["winner"]]
    assert winner.user_attrs["parameters"] <= study.best_trial.user_attrs["parameters"]
    assert f"winner  sweep-{winner.number}-0, sweep-{winner.number}-1\n" in done.stdout
    assert set(compare(["sweep-0-0", "sweep-1-0"])["difference"]) == {"sweep-1-0"}
