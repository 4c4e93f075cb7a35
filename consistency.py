"""What a perfectly calibrated model would show: not an ECE of 0, for no test set is large enough.

Of n images of confidence c, such a model gets a binomial number right. Bröcker & Smith (2007) found the spread by
resampling and drew it into reliability diagrams as consistency bars; here it is computed.
"""

from collections.abc import Sequence

import numpy as np


def errors_by_chance(count: Sequence[float], confidence: Sequence[float]) -> np.ndarray:
    """ECE and OE, as `calibration_metrics` defines them, of a perfectly calibrated model: of either its mean and its
    standard deviation between test sets, float64 (2, 2).

    With X_b ~ Binomial(n_b, c_b) right answers in bin b, of n images, ECE is sum_b |X_b - n_b c_b| / n. OE has the
    deviations below the mean, times c_b: one half of them. The mean absolute deviation is de Moivre's (Diaconis &
    Zabell, 1991, sec. 1): E|X - n c| = 2 k (1 - c) P(X = k), k = floor(n c) + 1. Of the variance n c (1 - c), one half
    is taken to lie on either side.

    Args:
        count, confidence: images, a whole number, and their mean confidence in each bin, (n_bins,).

    Raises:
        ValueError: no images, a part of one, or a confidence that is not from 0 to 1.
    """
    from scipy.stats import binom

    n, c = np.asarray(count, float), np.asarray(confidence, float)
    if not (n.sum() > 0 and (n >= 0).all() and (n % 1 == 0).all() and (c >= 0).all() and (c <= 1).all()):
        raise ValueError(f"want whole numbers of images, not all 0, and confidences from 0 to 1, got {n} and {c}")
    k = np.floor(n * c) + 1
    deviation, variance = 2 * k * (1 - c) * binom.pmf(k, n, c), n * c * (1 - c)
    ece = deviation.sum(), (variance - deviation**2).sum() ** 0.5
    oe = (c * deviation / 2).sum(), (c**2 * (variance / 2 - deviation**2 / 4)).sum() ** 0.5
    return np.array([ece, oe]) / n.sum()


def consistency_bars(count: Sequence[float], confidence: Sequence[float]) -> tuple[np.ndarray, np.ndarray]:
    """Lower and upper bounds, (n_bins,) each, between which a perfectly calibrated model's accuracy lies in 95 % of
    test sets, or somewhat more, since right answers come in whole numbers.

    Args:
        count, confidence: as in `errors_by_chance`, without empty bins.
    """
    from scipy.stats import binom

    low, high = binom.interval(0.95, count, confidence)
    return low / count, high / count
