"""What the doctor says about a data set: facts of each split, what is wrong and its remedy, and an overlay for it."""

from collections import Counter
from dataclasses import dataclass, field
from inspect import signature
from statistics import median
from typing import Any

import numpy as np
from rich.progress import track

from segmentation.data.base import SPLITS
from segmentation.data.census import Census, Record, examine_all, find_leaks
from segmentation.data.datamodule import SegmentationDataModule
from segmentation.data.labels import FEW, Labels
from segmentation.data.splits import without
from segmentation.data.values import UndeclaredValues, Value
from segmentation.errors import InputError, Problem


@dataclass
class Audit:
    """What was found in a data set.

    Args:
        censuses: split -> what its usable samples hold.
        undeclared: mask value that nobody declared -> (pixels, masks).
        swapped: whether these are the declared two classes in other values.
        bad: what is wrong with files that cannot be used, a message each.
        problems: all that is wrong.
    """

    censuses: dict[str, Census] = field(default_factory=dict)
    undeclared: dict[Value, tuple[int, int]] = field(default_factory=dict)
    swapped: bool = False
    bad: list[str] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)


def audit(module: SegmentationDataModule) -> Audit:
    """Read every file of a data set once, in several threads and with a progress bar."""
    data, found = module.whole, Audit()
    unusable = [*data.problems]
    undeclared: Counter[Value] = Counter()
    masks: Counter[Value] = Counter()
    if not (data.names("train") and data.names("val")):
        raise InputError(f"{type(module.source).__name__} has no sample to train on, or none to validate on")
    for split in SPLITS:
        names = data.names(split)
        results = list(track(examine_all(data, split), f"Reading {split}", len(names), transient=True)) if names else []
        errors = {index: each for index, each in enumerate(results) if isinstance(each, InputError)}
        for error in errors.values():
            if isinstance(error, UndeclaredValues):
                found.swapped = error.swapped and (found.swapped or not undeclared)
                undeclared.update(error.counts)
                masks.update(error.counts.keys())
            else:
                unusable.append(str(error))
        found.bad += [str(error) for error in errors.values()]
        records = [each for each in results if isinstance(each, Record)]
        if names:
            texts = {index: str(error) for index, error in errors.items()}
            found.censuses[split] = Census(data.labels.names, records, texts)
    found.undeclared = {value: (undeclared[value], masks[value]) for value in sorted(undeclared)}
    found.bad = [*data.problems, *found.bad]
    found.problems = _problems(module, found, unusable)
    return found


def undeclared_problem(module: SegmentationDataModule, found: Audit) -> Problem:
    """All mask values that nobody declared, in one."""
    listed = ", ".join(f"{v} ({p:,} pixels in {m} masks)" for v, (p, m) in list(found.undeclared.items())[:8])
    advice = module.labels.advice(found.undeclared, found.swapped)
    return Problem(f"mask values that classes does not declare: {listed}. {advice}", not module.skip)


def _problems(module: SegmentationDataModule, found: Audit, unusable: list[str]) -> list[Problem]:
    data, labels = module.whole, module.labels
    problems = [undeclared_problem(module, found)] if found.undeclared else []
    if unusable:
        skip = "" if module.skip else " To leave such files out: data.on_bad_file: skip"
        text = f"{len(unusable)} files cannot be used, e.g. {unusable[0]}{skip}"
        problems.append(Problem(text, not module.skip))
    empty = [split for split in ("train", "val") if not found.censuses.get(split) or not found.censuses[split].records]
    if empty:
        problems.append(Problem(f"nothing usable is left in {' and '.join(empty)}: mend what is said above", True))
    usable = without(data, {split: set(census.bad) for split, census in found.censuses.items()})
    problems += [Problem(leak) for leak in find_leaks(usable, found.censuses)]
    for split, census in found.censuses.items():
        absent = [name for name, pixels in zip(labels.names, census.pixels, strict=True) if not pixels]
        if absent and census.records:
            problems.append(
                Problem(
                    f"{split} has no pixel of {', '.join(absent)}. Fix: take the class out of classes, or divide the "
                    "data anew (data.folds, split_seed)"
                )
            )
        blank = sum(record.low == record.high for record in census.records)
        if blank:
            problems.append(Problem(f"{blank} {split} images are of one colour: look at them"))
    train = found.censuses.get("train")
    if train and train.records and len(set(train.sizes)) > 1 and not module.augment.crop and module.batch_size > 1:
        problems.append(
            Problem(
                f"training images have {len(set(train.sizes))} sizes and cannot be batched. "
                f"Fix: data.crop: {suggest_crop(train)}",
                True,
            )
        )
    return problems


def mended_classes(labels: Labels, given: dict[str, Any], found: Audit) -> dict[str, Any] | None:
    """`classes` as given, and with the values that nobody declared; None where nothing is to be mended."""
    if not found.undeclared or len(found.undeclared) > FEW:
        return None
    mended = labels.mended(found.undeclared, found.swapped)
    keep = lambda name, value: given[name] | {"value": value} if isinstance(given.get(name), dict) else value  # noqa: E731
    return {name: keep(name, value) for name, value in mended.items()}


def suggest_crop(train: Census) -> int | None:
    """Side of a training crop, a multiple of 32, 512 at most; None where whole images do."""
    sides = [min(size) for size in train.sizes]
    if len(set(train.sizes)) == 1 and max(train.sizes[0]) <= 512:
        return None
    return int(min(512, max(64, median(sides) // 32 * 32)))


def suggest_overlay(module: SegmentationDataModule, dataset: dict[str, Any], found: Audit) -> dict[str, Any]:
    """An overlay to train on this data: what was given, and crop and loss that suit it.

    Args:
        module: of the data set.
        dataset: `class_path` and `init_args` as given.
        found: by `audit`.
    """
    labels, train = module.labels, found.censuses["train"]
    given, defaults = dataset.get("init_args", {}), signature(type(module.source)).parameters
    options = {key: value for key, value in given.items() if key not in defaults or value != defaults[key].default}
    section: dict[str, Any] = {"dataset": {"class_path": _short(dataset["class_path"]), "init_args": options}}
    crop = suggest_crop(train)
    if crop:
        section["crop"] = crop
    if len(set(train.sizes)) > 1:
        section["eval_batch_size"] = 1
    shares = np.array(train.pixels) / max(1, sum(train.pixels))
    rarest = float(shares[shares > 0].min(initial=1.0))
    if crop and rarest < 0.02:
        section["rare_crops"] = 0.3
    cross_entropy: dict[str, Any] = {"class_path": "CrossEntropy"}
    if rarest < 0.5 / labels.num_classes and labels.task == "multiclass":
        cross_entropy["init_args"] = {"class_weights": "sqrt_inverse"}
    loss = cross_entropy
    if rarest < 0.5 / labels.num_classes:  # every class counts alike in an overlap loss, however rare
        losses = {"losses": [cross_entropy, {"class_path": "Dice"}], "weights": [1.0, 1.0]}
        loss = {"class_path": "WeightedSum", "init_args": losses}
    return {"data": section, "model": {"loss": loss}}


def _short(class_path: str) -> str:
    """Classes of ours answer to their name alone; one's own needs its import path."""
    return class_path.rpartition(".")[2] if class_path.startswith("segmentation.") else class_path
