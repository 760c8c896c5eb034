"""What the figures cost: their share of a validation epoch. With SEG_DATA set: python benchmarks/metrics.py

    python benchmarks/metrics.py --config configs/data/nuclei.yaml --model.boundary_iou 0.02     # options as train.py's

Reads the validation split once through the datamodule of a config (CamVid by default), predicts it with the config's
net, untrained, and prints where the time went: waiting for data, the net, the loss, and the figures (class indices, the
confusion matrix of each image, and the sums).
"""

import sys
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "src"))
from segmentation.cli import SegmentationCLI

CAMVID = Path(__file__).parents[1] / "configs/data/camvid.yaml"
seconds: dict[str, float] = defaultdict(float)


@contextmanager
def stage(name: str) -> Iterator[None]:
    start = time.perf_counter()
    yield
    seconds[name] += time.perf_counter() - start


def main() -> None:
    options = sys.argv[1:] if "--config" in sys.argv else ["--config", str(CAMVID), *sys.argv[1:]]
    cli = SegmentationCLI([*options, "--name", f"benchmark-{time.time_ns()}", "--trainer.accelerator", "cpu"])
    module, data = cli.model, cli.datamodule
    module.trainer = cli.trainer
    module.setup("fit")
    module.eval()
    batches = iter(data.val_dataloader())
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16, enabled="bf16" in str(cli.trainer.precision)):
        while True:
            with stage("data"):
                batch = next(batches, None)
            if batch is None:
                break
            with stage("net"):
                heads = module.net(module.normalize(batch["image"]))
            with stage("loss"):
                loss, _ = module.criterion(heads, batch)
            with stage("figures"):
                module.count("val", heads, batch, loss)
    with stage("figures"):
        module.val_metrics.compute()
    whole = sum(seconds.values())
    print(f"{len(data.dataset.names('val'))} images, {whole:.1f} s, {torch.get_num_threads()} threads")
    for name, value in seconds.items():
        print(f"{name:<8} {value / whole:6.1%}")


if __name__ == "__main__":
    main()
