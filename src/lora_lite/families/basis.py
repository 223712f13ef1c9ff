"""The bases of the output-subspace methods: which r output directions of a layer they act on, and what the data says of them.

svd         leading left singular vectors of W
corda       of W C^(1/2), C = E[x x^T]; corda_full: of W C
asvd        of W diag(q), q a mean size of each input channel
select      those left singular vectors of W that score best on the data, in descending order of singular values
"""

import warnings
from collections.abc import Iterable

import torch

from ..calibration.enough import TooLittleData, require_tokens
from ..calibration.statistics import EITHER, LABELS, Stats
from ..contract.annotations import Any, Float, Tensor
from ..errors import LoraLiteWarning, some
from ..mathematics.maps import binade, length
from ..mathematics.spectrum import left_svd
from .orientation import oriented_left_svd, required

METRIC = {"svd": "plain", "corda": "sqrt", "corda_full": "full"}


def needed(cfg: Any) -> tuple[str, ...]:
    """Names of the statistics that `basis` reads."""
    if cfg.basis == "asvd":
        return "n", "x_abs" if cfg.asvd_stat == "abs_mean" else "x_sq"
    if cfg.basis == "select":
        return contrast_names(cfg) if cfg.select_score == "contrast" else ("y_moment",)
    return required(METRIC[cfg.basis])


def basis(cfg: Any, stats: Stats, path: str, W: Float[Tensor, "o i"]) -> Float[Tensor, "o r"]:
    """U in the dtype of W, as `cfg.basis` says. Raises LoraLiteError for fewer tokens than directions."""
    if cfg.basis == "asvd":
        return left_svd(W * channel_scale(cfg, stats, path, W), cfg.r)[0]
    if cfg.basis == "select":
        U = left_svd(W, min(W.shape))[0]
        return U[:, scores(cfg, stats, path, U).topk(cfg.r).indices.sort().values]
    if cfg.basis != "svd":
        require_tokens(stats, path, cfg.r, f"a basis of {cfg.r} directions")
    return oriented_left_svd(METRIC[cfg.basis], stats, path, W, cfg.r, cfg.damp)[0]


def channel_scale(cfg: Any, stats: Stats, path: str, like: Tensor) -> Float[Tensor, " i"]:
    """q of "asvd": (mean |x_j|)^asvd_alpha or, with asvd_stat="rms", (mean x_j^2)^(asvd_alpha / 2)."""
    name = "x_abs" if cfg.asvd_stat == "abs_mean" else "x_sq"
    mean = (stats[name][path] / stats["n"][path]).to(like)
    mean = mean if name == "x_abs" else mean.sqrt()
    q = mean**cfg.asvd_alpha
    q = q / binade(q)  # U is that of any multiple of q
    return q + 1e-6 * q.max()  # a channel that is silent on the data still counts a little


def scores(cfg: Any, stats: Stats, path: str, U: Float[Tensor, "o k"]) -> Float[Tensor, " k"]:
    """What each direction is worth to `basis="select"`, up to a common factor."""
    if cfg.select_score == "contrast":
        return (U.T @ contrast(cfg, stats, path, U)).abs()
    return ((moment(stats, "y_moment", path, U) @ U) * U).sum(0).clamp(min=0).sqrt()


def moment(stats: Stats, name: str, path: str, like: Tensor) -> Tensor:
    """A sum of products in the dtype of `like`, of which it may take a power of two to be in its range."""
    total = stats[name][path]
    return (total / binade(total)).to(like)


def capture(stats: Stats, path: str, W: Float[Tensor, "o i"], U: Float[Tensor, "o r"]) -> float | None:
    """The share of sum |y - b|^2 that lies in span(U), where the statistics give it."""
    name = next((name for name in ("y_moment", *EITHER) if name in stats), None)
    if name is None:
        return None
    M, W = moment(stats, name, path, W), W / binade(W)
    P = U.T @ W
    if name == "y_moment" or M.shape not in (W.shape, (W.shape[1], W.shape[1])):  # sum (y - b)(y - b)^T
        part, whole = ((M @ U) * U).sum(), M.trace()
    elif M.shape == (W.shape[1], W.shape[1]):  # sum x x^T, also of a square layer
        part, whole = ((P @ M) * P).sum(), ((W @ M) * W).sum()
    else:  # sum (y - b) x^T
        part, whole = ((U.T @ M) * P).sum(), (M * W).sum()
    return float(part / whole) if whole > 0 else None


def contrast_names(cfg: Any) -> tuple[str, ...]:
    """The statistics of the two classes' mean outputs."""
    at = "/last" if cfg.positions == "last" else ""
    sum_ = "y_sum" if cfg.winsorize == 1 else f"y_clip[{cfg.winsorize:g}]"
    return tuple(f"{name}{at}:{label}" for name in (sum_, "n", "y_sq") for label in LABELS)


def has_contrast(cfg: Any, stats: Stats) -> bool:
    return hasattr(cfg, "positions") and set(contrast_names(cfg)) <= set(stats)


def contrast(cfg: Any, stats: Stats, path: str, like: Tensor) -> Float[Tensor, " o"]:
    """m / |m|, m the mean output on positive minus that on negative data, where the bias cancels.

    Raises TooLittleData where m is no more than the rounding of its means.
    """
    m, size = difference(cfg, stats, path)
    standard = torch.where(size > 0, m / size.clamp(min=torch.finfo(size.dtype).tiny), 0.0)
    if float(standard.square().mean().sqrt()) <= rounding(stats, path):
        raise TooLittleData(
            {path: "equal mean outputs on positive and negative data"},
            failed=f"{path}: the mean outputs on positive and negative data are equal up to rounding.",
            expected="Two classes.",
            fix='calibration_data={"positive": batches, "negative": batches_of_another_class}',
        )
    m = m.to(like)
    return m / length(m)


def difference(cfg: Any, stats: Stats, path: str) -> tuple[Float[Tensor, " o"], Float[Tensor, " o"]]:
    """m and the root mean square of each channel, in float64."""
    positive, negative, n_positive, n_negative, *squares = (stats[name][path] for name in contrast_names(cfg))
    means = positive / n_positive, negative / n_negative
    size = ((squares[0] / n_positive + squares[1] / n_negative) / 2).sqrt()
    least = ((means[0].square() + means[1].square()) / 2).sqrt()  # of numbers whose squares in float32 are 0
    return means[0] - means[1], torch.maximum(size, least)


def rounding(stats: Stats, path: str) -> float:
    """How far equal means may lie apart, of a channel's root mean square: other batches give other roundings on the way."""
    layers = getattr(stats.get("weight"), "layers", {})
    dtype = layers[path].weight.dtype if path in layers else torch.float32
    if not dtype.is_floating_point or dtype.itemsize == 1:
        dtype = torch.bfloat16  # packed weights
    return 16 * torch.finfo(dtype).eps if dtype.itemsize >= 4 else torch.finfo(dtype).eps


def warn_of_massive_channels(cfg: Any, stats: Stats, paths: Iterable[str]) -> None:
    """Warn once of layers where one channel of outstanding size holds most of m."""
    found = []
    for path in paths:
        m, size = difference(cfg, stats, path)
        j = int(m.abs().argmax())
        if len(m) >= 8 and m[j].square() > 0.5 * m.square().sum() and size[j] > 10 * size.median():
            found.append(f"{path} (channel {j}, {float(size[j] / size.median()):.0f} times the median size)")
    if found:
        warnings.warn(
            f"One massive channel holds most of the contrast at {some(found)}: it may have little to do with the classes. "
            "winsorize=0.95 in the config holds each token's entries within the 95 % quantile of their size.",
            LoraLiteWarning,
            stacklevel=2,
        )
