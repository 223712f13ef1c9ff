"""Statistics of paired runs: the same seed means the same split, order, start and base, so runs are compared pair by pair.

d_i      ours_i - theirs_i, i = 1 ... n; below LEAST pairs nothing is computed but their mean
t        mean(d) sqrt(n) / sd(d), with n - 1 degrees of freedom; p two-sided; interval of 95 %
sign_flip_p   share of the 2^n ways to put signs on the d_i whose |mean| is at least the observed one: exact, n <= EXACT
bootstrap     2.5 and 97.5 % of the means of resampled d; too narrow below ten pairs, so nothing is decided by it
percent  mean(d) over the mean of theirs, only where that is positive and above twice its standard error
finding  n >= CLAIM, and below 0.05 whichever p there are: t needs a spread, sign flips at most EXACT pairs
"""

import itertools
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from scipy import stats

LEAST, CLAIM, EXACT, RESAMPLES = 3, 6, 16, 10_000


def paired(ours: Sequence[float], theirs: Sequence[float]) -> dict[str, Any]:
    """Statistics of ours - theirs; None where there are too few pairs, no spread, or a value that is no number."""
    d = np.subtract(ours, theirs, dtype=float)
    n, mean = len(d), float(d.mean())
    found: dict[str, Any] = {"n": n, "differences": d.tolist(), "mean": mean, "finding": False}
    found |= dict.fromkeys(("sd", "t", "p", "interval", "sign_flip_p", "bootstrap", "percent"))
    if n < LEAST or not math.isfinite(mean):
        return found
    sd = float(d.std(ddof=1))
    found |= {"sd": sd, "sign_flip_p": sign_flip_p(d), "bootstrap": bootstrap(d), "percent": percent(mean, theirs)}
    if sd > 0:
        error = sd / math.sqrt(n)
        half = float(stats.t.ppf(0.975, n - 1)) * error
        found |= {"t": mean / error, "interval": [mean - half, mean + half]}
        found["p"] = float(2 * stats.t.sf(abs(found["t"]), n - 1))
    known = [found[key] for key in ("p", "sign_flip_p") if found[key] is not None]
    found["finding"] = n >= CLAIM and max(known, default=1.0) < 0.05
    return found


def sign_flip_p(d: np.ndarray) -> float | None:
    """None above EXACT pairs."""
    if len(d) > EXACT:
        return None
    signs = np.array(list(itertools.product((1.0, -1.0), repeat=len(d))))
    means = np.abs(signs @ d)
    return float((means >= means[0] * (1 - 1e-12)).mean())


def bootstrap(d: np.ndarray, seed: int = 0) -> list[float]:
    means = np.random.default_rng(seed).choice(d, (RESAMPLES, len(d))).mean(axis=1)
    return np.quantile(means, (0.025, 0.975)).tolist()


def percent(mean: float, theirs: Sequence[float]) -> float | None:
    baseline = np.asarray(theirs, dtype=float)
    error = baseline.std(ddof=1) / math.sqrt(len(baseline))
    return 100 * mean / float(baseline.mean()) if baseline.mean() > 2 * error else None


def described(found: dict[str, Any]) -> str:
    """A cell: the mean difference, and with LEAST pairs or more its interval and p."""
    if found["mean"] is None or not math.isfinite(found["mean"]):
        return "-"
    text = f"{found['mean']:+.4f}"
    if found["sd"] is not None:
        text += f" ± {found['sd']:.4f}"
    if found["p"] is not None:
        low, high = found["interval"]
        text += f" [{low:+.4f}, {high:+.4f}], p = {found['p']:.2g}"
    return text
