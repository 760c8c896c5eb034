"""What the doctor says about a data set: facts of each split, what is wrong and its remedy, and an overlay for it."""

from collections import Counter
from dataclasses import dataclass, field
from statistics import median
from typing import Any

from segmentation.data.base import SPLITS, SegmentationData
from segmentation.data.datamodule import SegmentationDataModule
from segmentation.data.labels import UndeclaredValues, Value
from segmentation.data.splits import without
from segmentation.data.statistics import SplitStatistics, count, find_leaks
from segmentation.errors import InputError, Problem


@dataclass
class Audit:
    """What was found in a data set."""

    usable: SegmentationData  # without the files that cannot be used
    statistics_of_splits: dict[str, SplitStatistics] = field(
        default_factory=dict
    )  # split -> what its usable samples hold
    values: Counter[Value] = field(default_factory=Counter)  # of masks with undeclared ones, value -> pixels
    bad: list[str] = field(default_factory=list)  # what is wrong with files that cannot be used, a message each
    problems: list[Problem] = field(default_factory=list)  # all that is wrong


def audit(module: SegmentationDataModule) -> Audit:
    """Read every file of a data set once, and say what is wrong with it."""
    data = module.whole
    if not (data.names("train") and data.names("val")):
        raise InputError(f"{type(module.source).__name__} has no sample to train on, or none to validate on")
    found, unusable = Audit(data, bad=[*data.problems]), [*data.problems]
    for split in filter(data.names, SPLITS):
        found.statistics_of_splits[split] = count(data, split)
        for error in found.statistics_of_splits[split].bad.values():
            found.bad.append(str(error))
            if isinstance(error, UndeclaredValues):
                found.values.update(error.counts)
            else:
                unusable.append(str(error))
    for split, statistics in found.statistics_of_splits.items():
        found.usable = without(found.usable, split, statistics.bad)
    found.problems = _problems(module, found, unusable)
    return found


def _problems(module: SegmentationDataModule, found: Audit, unusable: list[str]) -> list[Problem]:
    problems = [Problem(module.labels.explain_undeclared(found.values), not module.skip)] if found.values else []
    if unusable:
        skip = "" if module.skip else " To leave such files out: data.on_bad_file: skip"
        problems.append(Problem(f"{len(unusable)} files cannot be used, e.g. {unusable[0]}{skip}", not module.skip))
    empty = [split for split in ("train", "val") if not found.statistics_of_splits[split].records]
    if empty:
        problems.append(Problem(f"nothing usable is left in {' and '.join(empty)}: mend what is said above", True))
    problems += [Problem(leak) for leak in find_leaks(found.usable, found.statistics_of_splits)]
    for split, statistics in found.statistics_of_splits.items():
        if statistics.absent and statistics.records:
            fix = "take the class out of classes, or divide the data anew (data.folds, split_seed)"
            problems.append(Problem(f"{split} has no pixel of {', '.join(statistics.absent)}. Fix: {fix}"))
    train = found.statistics_of_splits["train"]
    sizes = len(set(train.sizes))
    if sizes > 1 and not module.augment.crop and module.batch_size > 1:
        text = f"training images have {sizes} sizes and cannot be batched. Fix: data.crop: {suggest_crop(train)}"
        problems.append(Problem(text, True))
    return problems


def suggest_crop(train: SplitStatistics) -> int | None:
    """Side of a training crop, a multiple of 32, 512 at most; None where whole images do."""
    if len(set(train.sizes)) == 1 and max(train.sizes[0]) <= 512:
        return None
    return int(min(512, max(64, median(map(min, train.sizes)) // 32 * 32)))


def suggest_overlay(module: SegmentationDataModule, dataset: dict[str, Any], found: Audit) -> dict[str, Any]:
    """An overlay to train on this data: `dataset` (`class_path` and `init_args`) as given, and crop and loss that suit
    what was found."""
    labels, train = module.labels, found.statistics_of_splits["train"]
    options = {key: value for key, value in dataset.get("init_args", {}).items() if value is not None}
    data: dict[str, Any] = {"dataset": {"class_path": dataset["class_path"], "init_args": options}}
    crop = suggest_crop(train)
    if crop:
        data["crop"] = crop
    if len(set(train.sizes)) > 1:
        data["eval_batch_size"] = 1
    rarest = float(train.shares[train.shares > 0].min(initial=1.0))
    loss: dict[str, Any] = {"class_path": "CrossEntropy"}
    if rarest < 0.5 / labels.num_classes:  # every class counts alike in an overlap loss, however rare
        if labels.task == "multiclass":
            loss["init_args"] = {"class_weights": "sqrt_inverse"}
        losses = {"losses": [loss, {"class_path": "Dice"}], "weights": [1.0, 1.0]}
        loss = {"class_path": "WeightedSum", "init_args": losses}
    return {"data": data, "model": {"loss": loss}}
