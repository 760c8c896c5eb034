"""What the metrics cost: their share of a validation epoch. With SEG_DATA set: python benchmarks/metrics.py

    python benchmarks/metrics.py --config configs/data/nuclei.yaml --model.boundary_iou 0.02     # options as train.py's

Validates a config's net (CamVid's by default), untrained, by the trainer, and prints how much of the time went into the
net, the loss and the metrics. The rest is reading, class indices, and the trainer itself.
"""

import sys
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "src"))
from segmentation.metrics import SegmentationMetrics
from segmentation.training.cli import SegmentationCLI

CAMVID = Path(__file__).parents[1] / "configs/data/camvid.yaml"
seconds: dict[str, float] = defaultdict(float)


def timed(name: str, job: Callable) -> Callable:
    def run(*args: Any, **kwargs: Any) -> Any:
        start = time.perf_counter()
        result = job(*args, **kwargs)
        seconds[name] += time.perf_counter() - start
        return result

    return run


def main() -> None:
    options = sys.argv[1:] if "--config" in sys.argv else ["--config", str(CAMVID), *sys.argv[1:]]
    cli = SegmentationCLI([*options, "--name", f"benchmark-{time.time_ns()}", "--trainer.accelerator", "cpu"])
    module, data, trainer = cli.model, cli.datamodule, cli.trainer
    trainer.logger, trainer.callbacks = None, []
    module.loss.setup(data.statistics("train"))
    data.statistics("val")
    trainer.validate(module, data, verbose=False)  # once to warm up
    module.net.forward = timed("net", module.net.forward)
    module.compute_loss = timed("loss", module.compute_loss)
    SegmentationMetrics.update = timed("metrics", SegmentationMetrics.update)
    SegmentationMetrics.compute = timed("metrics", SegmentationMetrics.compute)
    whole = timed("epoch", trainer.validate)
    whole(module, data, verbose=False)
    total = seconds.pop("epoch")
    print(f"{len(data.dataset.names('val'))} images in {total:.1f} s, threads: {torch.get_num_threads()}")
    for name, value in {**seconds, "the rest": total - sum(seconds.values())}.items():
        print(f"{name:<9}{value / total:6.1%}")


if __name__ == "__main__":
    main()
