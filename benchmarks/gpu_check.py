"""A plugin of pytest for `benchmarks/gpu.sh check`: keeps each test's outcome at once in the file that GPU_CHECK names,
and leaves out what has passed before."""

import json
import os
from pathlib import Path

import pytest

KEPT = Path(os.environ["GPU_CHECK"])
outcomes: dict[str, dict] = json.loads(KEPT.read_text()) if KEPT.is_file() else {}


@pytest.hookimpl(trylast=True)  # after -k and -m
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    done = [item for item in items if outcomes.get(name_of(item.nodeid), {}).get("outcome") in ("passed", "skipped")]
    config.hook.pytest_deselected(items=done)
    items[:] = [item for item in items if item not in done]
    for item in items:
        outcomes[name_of(item.nodeid)] = {"outcome": "not run", "seconds": 0.0}
    write()


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    one = outcomes[name_of(report.nodeid)]
    one["seconds"] += report.duration
    if report.outcome != "passed":  # of setting up, running or cleaning up
        one["outcome"] = report.outcome
    elif report.when == "teardown" and one["outcome"] == "not run":
        one["outcome"] = "passed"
    write()


def name_of(nodeid: str) -> str:
    return nodeid.partition("::")[2]


def write() -> None:
    KEPT.write_text(json.dumps(outcomes, indent=1))
