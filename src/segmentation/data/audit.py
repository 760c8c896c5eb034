"""What the doctor says about a data set: what is wrong with it and the fix, and an overlay to train on it."""

from collections import Counter
from dataclasses import dataclass
from statistics import median
from typing import Any

from segmentation.data.base import SPLITS, SegmentationData
from segmentation.data.datamodule import SegmentationDataModule
from segmentation.data.labels import UndeclaredValues, Value
from segmentation.data.statistics import SplitStatistics, find_leaks
from segmentation.errors import InputError, Problem


@dataclass
class Audit:
    """What was found in a data set."""

    usable: SegmentationData  # without the files that cannot be used
    statistics_of_splits: dict[str, SplitStatistics]  # split -> what its usable samples hold
    values: Counter[Value]  # of masks with undeclared ones, value -> pixels
    bad: list[str]  # what is wrong with files that cannot be used, a message each
    problems: list[Problem]  # all that is wrong


def audit(module: SegmentationDataModule) -> Audit:
    """Read every file of a data set once, and say what is wrong with it."""
    data = module.dataset
    if not (data.names("train") and data.names("val")):
        raise InputError(f"{module.description} has no sample to train on, or none to validate on")
    splits = {split: module.examine(split) for split in SPLITS if data.names(split)}
    values: Counter[Value] = Counter()
    problems = []
    unusable = list(data.problems)
    for statistics in splits.values():
        for error in statistics.bad.values():
            if isinstance(error, UndeclaredValues):
                values.update(error.counts)
            else:
                unusable.append(str(error))
    if values:
        problems.append(Problem(module.labels.explain_undeclared(values), not module.skip))
    if unusable:
        text = f"{len(unusable)} files cannot be used, e.g. {unusable[0]}. To leave them out: data.on_bad_file: skip"
        problems.append(Problem(text, not module.skip))
    problems += [Problem(leak) for leak in find_leaks(module.dataset, splits)]
    for split, statistics in splits.items():
        if not statistics.records:
            problems.append(Problem(f"nothing usable is left in {split}: mend what is said above", split != "test"))
        elif statistics.absent:
            fix = "take the class out of classes, or divide the data anew (data.folds, split_seed)"
            problems.append(Problem(f"{split} has no pixel of {', '.join(statistics.absent)}. Fix: {fix}"))
    train = splits["train"]
    if len(set(train.sizes)) > 1 and not module.augment.crop and module.batch_size > 1:
        text = f"training images of unequal sizes cannot be batched. Fix: data.crop: {suggest_crop(train)}"
        problems.append(Problem(text, True))
    return Audit(module.dataset, splits, values, module.skipped(), problems)


def suggest_crop(train: SplitStatistics) -> int | None:
    """Side of a training crop, a multiple of 32, 512 at most; None where whole images do."""
    if len(set(train.sizes)) == 1 and max(train.sizes[0]) <= 512:
        return None
    side = median(map(min, train.sizes))
    return int(min(512, max(64, side // 32 * 32)))


def suggest_overlay(module: SegmentationDataModule, dataset: dict[str, Any], found: Audit) -> dict[str, Any]:
    """An overlay to train on this data: `dataset` (`class_path` and `init_args`) as given, and crop and loss that suit
    what was found."""
    train = found.statistics_of_splits["train"]
    options = {key: value for key, value in dataset.get("init_args", {}).items() if value is not None}
    data: dict[str, Any] = {"dataset": {"class_path": dataset["class_path"], "init_args": options}}
    crop = suggest_crop(train)
    if crop:
        data["crop"] = crop
    if len(set(train.sizes)) > 1:
        data["eval_batch_size"] = 1
    loss: dict[str, Any] = {"class_path": "CrossEntropy"}
    rarest = train.shares[train.shares > 0].min(initial=1.0)
    if rarest < 0.5 / module.labels.num_classes:  # every class counts alike in an overlap loss, however rare
        if module.labels.task == "multiclass":
            loss["init_args"] = {"class_weights": "sqrt_inverse"}
        losses = {"losses": [loss, {"class_path": "Dice"}], "weights": [1.0, 1.0]}
        loss = {"class_path": "WeightedSum", "init_args": losses}
    return {"data": data, "model": {"loss": loss}}
