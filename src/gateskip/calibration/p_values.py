"""One-sided p-values that hold for every sample size: is a mean risk below its limit?

A test by betting (Waudby-Smith and Ramdas, arXiv 2010.09686): under H0, E[X] ≥ 0, the wealth
K_n = Π (1 − λ·X_i) with λ ≥ 0 cannot be expected to grow, so by Ville's inequality
P(max K ≥ 1/α) ≤ α. It needs independent X of one distribution and an upper bound only.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import ArrayLike, NDArray

from gateskip.errors import ConfigError

__all__ = ["betting_p_value", "smallest_sample"]

#: Stakes λ as shares of the largest that cannot lose everything; the wealth is their mean.
STAKES = np.array([0.02, 0.05, 0.1, 0.2, 0.35, 0.5, 0.7, 0.9])


def betting_p_value(x: ArrayLike, upper: float) -> float:
    """p-value of H0: E[X] ≥ 0, valid at any sample size.

    Args:
        x: independent draws, ``[n]``, in an order that does not depend on their values. upper:
            what no draw can exceed, above 0.

    Raises:
        ConfigError: a draw above ``upper``, or not a number.
    """
    x_N: NDArray[np.float64] = np.asarray(x, dtype=np.float64)
    if upper <= 0.0 or not np.isfinite(x_N).all() or (x_N > upper + 1e-12).any():
        raise ConfigError(f"p-value: draws must be finite and at most upper={upper!r}, above 0.")
    if not x_N.size:
        return 1.0
    logs_SN = np.cumsum(np.log1p(-STAKES[:, None] * x_N[None] / upper), axis=1)
    peak_N = logs_SN.max(axis=0)
    wealth_N = peak_N + np.log(np.exp(logs_SN - peak_N).mean(axis=0))
    return float(min(1.0, math.exp(-max(0.0, wealth_N.max()))))


def smallest_sample(limit: float, upper: float, alpha: float) -> int:
    """The least n at which a risk that is always 0 is told from one at ``limit``.

    With X = −limit in every draw; no sample that is smaller can be accepted.
    """
    gains = np.log1p(STAKES * limit / upper)
    n = max(1, math.floor(math.log(1.0 / alpha) / gains[-1]))
    while math.log(np.exp(n * gains - n * gains[-1]).mean()) + n * gains[-1] < math.log(1 / alpha):
        n += 1
    return n
