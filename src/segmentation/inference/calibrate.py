"""eval.py --calibrate: probabilities to be taken at their word, and a threshold that is guaranteed to miss little.

Temperature scaling: Guo et al. 2017. The guarantee: risk-controlling prediction sets, Bates et al. 2021.
"""

import math
from argparse import Namespace

import numpy as np
import torch
import torch.nn.functional as F
from rich.progress import track
from scipy.optimize import minimize_scalar
from scipy.special import expit
from torch import Tensor
from torchmetrics.functional.classification import binary_calibration_error

from segmentation.checkpoint import read_checkpoint
from segmentation.data import SegmentationDataModule
from segmentation.data.labels import IGNORE_INDEX, Labels
from segmentation.errors import InputError
from segmentation.inference.predictor import Predictor
from segmentation.training.trainer import AtomicCheckpointIO

SPLIT = "val"  # is calibrated on
LOGITS = 2**22  # that are kept of a split
BINS = 15  # of the calibration error, as in Guo et al.
THRESHOLDS = np.arange(-16, 16, 1 / 32)  # logits that may become the threshold: fixed before any image is seen


def calibrate(
    options: Namespace,
    trainer: dict,
    data: SegmentationDataModule,
) -> tuple[dict, dict[str, float]]:
    """Fit temperature and threshold on the validation split, and write the checkpoint's copy.

    Args:
        options: those of the command line.
        trainer: options of the trainer, of which accelerator and precision count.
        data: the data, with the split to be tested.

    Returns:
        the calibration, as the copy has it; metrics of the tested split.

    Raises:
        InputError: the guarantee cannot be given.
    """
    data.check([SPLIT])
    if options.max_missed:
        check_guarantee(options, data)
    predictor = Predictor(
        options.checkpoint,
        trainer.get("accelerator", "auto"),
        trainer["precision"],
        options.tile,
        options.tta,
    )
    logits, target, missed = score(predictor, data, SPLIT)
    temperature = fit_temperature(logits, target)
    threshold = predictor.module.logit_threshold
    if options.max_missed:
        threshold = choose_threshold(missed, options.max_missed, options.confidence)
    calibration = {
        "temperature": temperature,
        "logit_threshold": threshold,  # of logits as the net gives them
        "split": SPLIT,
        "max_missed": options.max_missed,
        "confidence": options.confidence,
    }
    checkpoint = {**read_checkpoint(options.checkpoint), "calibration": calibration}
    AtomicCheckpointIO().save_checkpoint(checkpoint, options.calibrate)
    print(f"calibrated {options.calibrate}: on {SPLIT}. The figures below are those of {data.test_split}")

    logits, target, missed = score(predictor, data, data.test_split)
    metrics = {
        "temperature": temperature,
        "threshold": float(expit(threshold / temperature)),
        **calibration_errors(logits, target, data.labels, "ece_before"),
        **calibration_errors(logits / temperature, target, data.labels, "ece"),
    }
    if options.max_missed:
        metrics["missed"] = float(missed[:, threshold == THRESHOLDS].mean())
    return calibration, metrics


def check_guarantee(options: Namespace, data: SegmentationDataModule) -> None:
    """Raises InputError where no guarantee can be given, whatever the net predicts."""
    images = np.count_nonzero(data.statistics(SPLIT).counts[:, 1])
    # With n losses of 0, `is_controlled` has a capital of (1 + max_missed)^n at most.
    needed = math.ceil(-math.log(1 - options.confidence) / math.log1p(options.max_missed))
    if images < needed or data.labels.task != "binary":
        raise InputError(
            f"--max-missed {options.max_missed} with --confidence {options.confidence} takes two classes and {needed} "
            f"{SPLIT} images with foreground, or more; here are {data.labels.num_classes} and {images}"
        )


def score(predictor: Predictor, data: SegmentationDataModule, split: str) -> tuple[Tensor, Tensor, Tensor]:
    """What a net says of a split, and the truth. Memory holds the logits of one image, and what is returned.

    Returns:
        logits (pixels, K) of pixels drawn at random, where the background of a binary task has 0; their class indices,
        (pixels,); and for binary tasks, of each image with foreground, what share of it has no logit above each of
        `THRESHOLDS`: (images, thresholds).
    """
    names = data.dataset.names(split)
    random = torch.Generator().manual_seed(0)
    thresholds = torch.from_numpy(THRESHOLDS)
    logits = []
    targets = []
    missed = [torch.zeros(0, len(thresholds))]
    for index in track(range(len(names)), f"Predicting {split}", transient=True):
        sample = data.dataset.load(split, index)
        target = sample["mask"].flatten()
        found = predictor.logits(sample["image"]).double().flatten(1).T
        if data.labels.task == "binary":
            foreground = found[target == 1, 0].sort().values
            if len(foreground):
                below = torch.searchsorted(foreground, thresholds, right=True)
                missed.append(below[None] / len(foreground))
            found = F.pad(found, (1, 0))
        valid = (target != IGNORE_INDEX).nonzero()[:, 0]
        most = LOGITS // (len(names) * found.shape[1]) + 1
        drawn = valid[torch.randperm(len(valid), generator=random)[:most]]
        logits.append(found[drawn])
        targets.append(target[drawn])
    return torch.cat(logits), torch.cat(targets), torch.cat(missed)


def fit_temperature(logits: Tensor, target: Tensor) -> float:
    """The temperature T, 0.05 to 20, at which softmax(logits / T) makes the truth likeliest (Guo et al. 2017, eq. 9).

    Shape:
        logits (pixels, K), target (pixels,)
    """
    found = minimize_scalar(lambda t: F.cross_entropy(logits / t, target).item(), bounds=(0.05, 20))
    return float(found.x)


def calibration_errors(logits: Tensor, target: Tensor, labels: Labels, key: str) -> dict[str, float]:
    """Expected calibration error of each class (Guo et al. 2017, eq. 3; class by class: Kull et al. 2019), for binary
    tasks of the foreground: over bins of equal width, |share of the class - mean probability|, weighted by pixels.
    """
    probability = logits.softmax(dim=1).T.contiguous()
    errors = {}
    for index in labels.reported:
        error = binary_calibration_error(probability[index], (target == index).long(), BINS)
        errors[f"{key}/{labels.names[index]}"] = float(error)
    return errors


def choose_threshold(missed: Tensor, most: float, confidence: float) -> float:
    """The largest logit that, as all below it, passes the bound on what is missed (Bates et al. 2021, section 2).

    Args:
        missed: as `score` gives it.
        most: what share of an image's foreground may be missed in expectation.
        confidence: that it is not more, over the draw of the images.

    Raises:
        InputError: there is none.
    """
    shuffled = np.random.default_rng(0).permutation(missed.numpy())  # files may be in an order
    passed = np.logical_and.accumulate(is_controlled(shuffled, most, confidence))
    if not passed.any():
        raise InputError(
            f"--max-missed {most}: no threshold can promise it, as the lowest misses {missed[:, 0].mean():.1%} in "
            f"{len(missed)} images. Validate on more, train on, or ask for less"
        )
    return float(THRESHOLDS[passed][-1])


def is_controlled(losses: np.ndarray, risk: float, confidence: float) -> np.ndarray:
    """Whether an expected loss is at most `risk`, by the betting bound of Waudby-Smith and Ramdas (Bates et al. 2021,
    section 3.1): valid for independent losses in 0..1 of any distribution, and any number of them.

    Shape:
        (n, thresholds) -> (thresholds,)
    """
    count = len(losses)
    odds = 1 / (1 - confidence)
    weights = np.arange(2, count + 2)[:, None]
    means = (0.5 + losses.cumsum(axis=0)) / weights
    variances = (0.25 + np.square(losses - means).cumsum(axis=0)) / weights
    # A bet knows only the losses before its own.
    known = np.vstack([np.full_like(variances[:1], 0.25), variances[:-1]])
    bets = np.sqrt(2 * math.log(odds) / count / known).clip(max=1)
    capital = (1 - bets * (losses - risk)).cumprod(axis=0)
    return capital.max(axis=0) >= odds
