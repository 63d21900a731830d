"""Intervals over seeds and over images, and their agreement with the paper's numbers."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import scipy.stats

from advjax import transfer
from experiments.common.measure import Row

PAPER_IMAGES = 256
"""The number of images behind the paper's rates, judging by their decimals."""


class Estimate(NamedTuple):
    """A mean over seeds, with its 95 % interval."""

    mean: float
    low: float
    high: float


def mean(values: Sequence[float]) -> Estimate:
    """The mean over seeds with Student's 95 % interval, which is NaN for one seed."""
    if len(values) == 1:
        return Estimate(values[0], math.nan, math.nan)
    centre = float(np.mean(values))
    half = _t(len(values)) * float(np.std(values, ddof=1)) / math.sqrt(len(values))
    return Estimate(centre, centre - half, centre + half)


def over(rows: Sequence[Row], what: str, *, scale: float = 1) -> Estimate:
    """The mean of one entry over the rows of all seeds."""
    return mean([scale * row[what] for row in rows])


def fraction(counts: Sequence[int], totals: Sequence[int]) -> Estimate:
    """A fraction of images with the wider of Student's interval and Wilson's over all images.

    Student's reflects how networks and images vary, but has no width where all seeds agree, as
    they do at 0 % and at 100 %.
    """
    among_seeds = mean([k / n for k, n in zip(counts, totals, strict=True)])
    among_images = transfer.wilson_interval(sum(counts), sum(totals))
    low, high = (np.array(ends) for ends in zip(among_seeds[1:], among_images, strict=True))
    return Estimate(among_seeds.mean, max(0.0, np.nanmin(low)), min(1.0, np.nanmax(high)))


def agrees(estimate: Estimate, printed: float) -> bool:
    """Whether a fraction that the paper prints agrees with ours: their intervals meet."""
    low, high = transfer.wilson_interval(round(printed * PAPER_IMAGES), PAPER_IMAGES)
    return bool(low <= estimate.high and estimate.low <= high)


def predicts(values: Sequence[float], printed: float) -> bool:
    """Whether a number is within the 95 % prediction interval of one more seed."""
    if len(values) == 1:
        return False
    half = _t(len(values)) * np.std(values, ddof=1) * math.sqrt(1 + 1 / len(values))
    return bool(abs(printed - np.mean(values)) <= half)


def _t(n: int) -> float:
    return float(scipy.stats.t.ppf(0.975, n - 1))
