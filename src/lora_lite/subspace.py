"""OutputSubspace: methods that act on the part of a layer's output that lies in a chosen subspace.

formula   h = U^T t,  y' = y + U core(h);  U (o, r) frozen with orthonormal columns, t = y - b (include_bias: t = y)
          U U^T W is the part that the papers cut out of W and put back changed, whatever chose U; so neither it, nor the
          rest, nor singular values with input directions, nor the inverse of a metric has to be kept
"""

import math
from collections.abc import Mapping

import torch
import torch.nn.functional as F

from .annotations import Any, Float, Literal, Parameter, Tensor
from .calibrate import LABELS, Stats, require_tokens
from .contract import Adapter, AdapterConfig, Claims, ParamSpec, Specs, dataclass
from .errors import LoraLiteError
from .limits import refuse_indivisible, refuse_rank
from .linalg import bounded, box, cayley_shift, left_svd, lin, orth, skew, top_eigenvectors, without_bias
from .orientation import oriented_left_svd, required
from .spec import normal

METRIC = {"svd": "plain", "corda": "sqrt", "corda_full": "full"}


@dataclass(frozen=True, kw_only=True)
class SubspaceConfig(AdapterConfig):
    """basis is the choice of U, the r leading left singular vectors of

        svd         W
        corda       W C^(1/2), C = E[x x^T]: what keeps most of the layer's output on the data
        corda_full  W C, as CorDA prints it
        asvd        W diag(q), q_j = (mean |x_j|)^asvd_alpha
        select      W, not the leading ones but those with the largest score, in descending order of singular values

    damp          adds damp tr(C)/i to the diagonal of C; for corda and corda_full
    asvd_stat     abs_mean as above, or rms: the root of mean x_j^2 instead
    select_score  rms of u_k^T (y - b), or contrast: |u_k^T m|, m the difference of the two classes' mean outputs
    positions     tokens that m averages over: the last of each row, or all
    include_bias  the method acts on y, not on y - b
    """

    r: int = 256
    alpha: None = None
    rslora: Literal[False] = False
    basis: Literal["svd", "corda", "corda_full", "asvd", "select"] = "svd"
    damp: float = 0.0
    asvd_alpha: float = 0.5
    asvd_stat: Literal["abs_mean", "rms"] = "abs_mean"
    select_score: Literal["rms", "contrast"] = "rms"
    positions: Literal["last", "all"] = "last"
    include_bias: bool = False
    lr: float = 5e-3

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, used in self.uses().items():
            default = type(self).__dataclass_fields__[name].default
            if not used and getattr(self, name) != default:
                self.refuse(name, getattr(self, name), f"{default!r} with the other options given: nothing would use it")
        if self.damp < 0 or self.asvd_alpha < 0:
            self.refuse("damp or asvd_alpha", min(self.damp, self.asvd_alpha), "0 or more")

    def uses(self) -> dict[str, bool]:
        """Which of the options that belong to one basis have an effect."""
        asvd, select = self.basis == "asvd", self.basis == "select"
        damp, positions = self.basis in ("corda", "corda_full"), select and self.select_score == "contrast"
        return {"damp": damp, "asvd_alpha": asvd, "asvd_stat": asvd, "select_score": select, "positions": positions}


class OutputSubspace(Adapter):
    """Parent of the methods: a child declares `core_specs` and writes `core`; one that declares sigma gets |W^T u_k|."""

    claims = Claims(rank=lambda cfg: cfg.r)

    U: Float[Tensor, "o r"]
    sigma: Float[Tensor, " r"]  # of the children that declare it

    @classmethod
    def param_specs(cls, d_in: int, d_out: int, cfg: Any) -> Specs:  # type: ignore[override]  # reads the child's core
        refuse_rank(cfg.r, d_in, d_out)
        return {**cls.core_specs(cfg), "U": ParamSpec((d_out, cfg.r), trainable=False)}

    @staticmethod
    def core_specs(cfg: Any) -> Specs:
        """The tensors of the core."""
        raise LoraLiteError("core_specs is missing.", expected="A method on an output subspace declares its tensors.")

    def core(self, h: Tensor) -> Tensor:
        """The change of the coordinates h (..., r), exactly 0 where coeff is 0."""
        raise LoraLiteError("core is missing.", expected="core(self, h) returns the change of the coordinates h.")

    @staticmethod
    def needs(cfg: Any) -> tuple[str, ...]:
        if cfg.basis == "asvd":
            return "n", "x_abs" if cfg.asvd_stat == "abs_mean" else "x_sq"
        if cfg.basis == "select":
            return contrast_names(cfg) if cfg.select_score == "contrast" else ("y_moment",)
        return required(METRIC[cfg.basis])

    @staticmethod
    def wants(cfg: Any) -> tuple[str, ...]:
        return ("y_moment",) if cfg.basis == "svd" else ()

    @staticmethod
    def group_init(adapters: Mapping[str, Any], stats: Stats, cfg: Any) -> None:
        for path, adapter in adapters.items():
            W = stats["weight"][path].double()
            adapter.orient(path, stats, W, basis(adapter.cfg, stats, path, W))

    def orient(self, path: str, stats: Stats, W: Float[Tensor, "o i"], U: Float[Tensor, "o r"]) -> None:
        """Take U as the basis, note sigma where it is declared, report the share of the statistics that U captures."""
        self.U.copy_(U)
        if "sigma" in self.specs():
            self.sigma.copy_((W.T @ U).norm(dim=0))
        if "y_moment" in stats:
            G = stats["y_moment"][path].to(U)
            self.report["capture"] = float((U.T @ G @ U).trace() / G.trace())
        if has_contrast(self.cfg, stats):
            self.report["contrast_capture"] = float((U.T @ contrast(self.cfg, stats, path, U)).norm())

    def part(self, y: Float[Tensor, "... o"], base: Any) -> Float[Tensor, "... o"]:
        """t, what the method acts on."""
        return y if self.cfg.include_bias else without_bias(y, base.bias)

    def forward(self, x: Float[Tensor, "... i"], y: Float[Tensor, "... o"], base: Any) -> Float[Tensor, "... o"]:
        h = lin(self.part(y, base), self.U.T)
        return y + lin(self.core(h).to(h.dtype), self.U)


@dataclass(frozen=True, kw_only=True)
class SeededConfig(SubspaceConfig):
    """For methods that train k directions of the subspace.

    k               number of directions, at most r
    seed_direction  contrast: the first is m, the difference of the two classes' mean outputs; variance: those of the largest
                    mean square of y - b, which is also where the ones behind m come from; random;
                    auto: the first of these that the calibration data allows
    add_contrast    where m is the seed, the basis starts with it and drops its own last column: m lies in span(U)
    """

    k: int = 1
    seed_direction: Literal["auto", "contrast", "variance", "random"] = "auto"
    add_contrast: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 1 <= self.k <= self.r:
            self.refuse("k", self.k, f"1 to r={self.r}")
        if not self.add_contrast and self.seed_direction in ("variance", "random"):
            self.refuse("add_contrast", False, f"True with seed_direction={self.seed_direction!r}: nothing would use it")

    def uses(self) -> dict[str, bool]:
        return {**super().uses(), "positions": True}


class SeededSubspace(OutputSubspace):
    """Parent of the methods with trained directions U v; a child adds to `core_specs`."""

    v: Float[Parameter, "r k"]

    @staticmethod
    def core_specs(cfg: Any) -> Specs:
        return {"v": ParamSpec((cfg.r, cfg.k), normal(cfg.r**-0.5))}

    @staticmethod
    def needs(cfg: Any) -> tuple[str, ...]:
        contrast = contrast_names(cfg) if cfg.seed_direction == "contrast" else ()
        variance = cfg.seed_direction == "variance" or (contrast and cfg.k > 1)
        return (*OutputSubspace.needs(cfg), *contrast, *(("y_moment",) if variance else ()))

    @staticmethod
    def wants(cfg: Any) -> tuple[str, ...]:
        return (*contrast_names(cfg), "y_moment")

    def orient(self, path: str, stats: Stats, W: Float[Tensor, "o i"], U: Float[Tensor, "o r"]) -> None:
        first, seed = None, self.cfg.seed_direction
        if seed in ("auto", "contrast") and has_contrast(self.cfg, stats):
            m = contrast(self.cfg, stats, path, U)
            U = orth(torch.cat([m[:, None], U[:, :-1]], dim=1)) if self.cfg.add_contrast else U
            first = U.T @ m
        super().orient(path, stats, W, U)
        if first is not None or (seed != "random" and "y_moment" in stats):
            moment = U.T @ stats["y_moment"][path].to(U) @ U if "y_moment" in stats else torch.eye(U.shape[1]).to(U)
            self.v.copy_(leading(moment, self.cfg.k, first))


def basis(cfg: Any, stats: Stats, path: str, W: Float[Tensor, "o i"]) -> Float[Tensor, "o r"]:
    """U in float64, as `cfg.basis` says. Raises LoraLiteError for fewer tokens than directions."""
    if cfg.basis == "asvd":
        mean = stats["x_abs" if cfg.asvd_stat == "abs_mean" else "x_sq"][path].to(W) / stats["n"][path].to(W)
        q = (mean if cfg.asvd_stat == "abs_mean" else mean.sqrt()) ** cfg.asvd_alpha
        return left_svd(W * (q + 1e-6 * q.max()), cfg.r)[0]  # a channel that is silent on the data still counts a little
    if cfg.basis == "select":
        U = left_svd(W, min(W.shape))[0]
        return U[:, scores(cfg, stats, path, U).topk(cfg.r).indices.sort().values]
    if cfg.basis != "svd":
        require_tokens(stats, path, cfg.r, f"a basis of {cfg.r} directions")
    return oriented_left_svd(METRIC[cfg.basis], stats, path, W, cfg.r, cfg.damp)[0]


def scores(cfg: Any, stats: Stats, path: str, U: Float[Tensor, "o k"]) -> Float[Tensor, " k"]:
    """What each direction is worth to `basis="select"`, up to a common factor."""
    if cfg.select_score == "contrast":
        return (U.T @ contrast(cfg, stats, path, U)).abs()
    return ((stats["y_moment"][path].to(U) @ U) * U).sum(0).clamp(min=0).sqrt()


def contrast_names(cfg: Any) -> tuple[str, ...]:
    """The statistics of the two classes' mean outputs."""
    at = "/last" if cfg.positions == "last" else ""
    return tuple(f"{sum_}{at}:{label}" for sum_ in ("y_sum", "n") for label in LABELS)


def has_contrast(cfg: Any, stats: Stats) -> bool:
    return set(contrast_names(cfg)) <= set(stats)


def contrast(cfg: Any, stats: Stats, path: str, like: Tensor) -> Float[Tensor, " o"]:
    """m / |m|, m the mean output on positive minus that on negative data, where the bias cancels."""
    positive, negative, n_positive, n_negative = (stats[name][path].to(like) for name in contrast_names(cfg))
    m = positive / n_positive - negative / n_negative
    if not m.any():
        raise LoraLiteError(f"{path}: the mean outputs on positive and negative data are equal.", expected="Two classes.")
    return m / m.norm()


def leading(H: Float[Tensor, "r r"], k: int, first: Tensor | None = None) -> Float[Tensor, "r k"]:
    """The k leading eigenvectors of H; with `first` (r,) that direction and the k - 1 leading ones orthogonal to it."""
    if first is None:
        return top_eigenvectors(H, k)[0]
    v = first / first.norm()
    P = torch.eye(len(v), dtype=H.dtype, device=H.device) - torch.outer(v, v)
    others, _ = top_eigenvectors(P @ H @ P - H.trace() * torch.outer(v, v), k - 1)  # v goes last where H is not of full rank
    return torch.cat([v[:, None], others], dim=1)


def along(t: Float[Tensor, "... o"], D: Float[Tensor, "o k"], strength: Tensor) -> Float[Tensor, "... o"]:
    """D diag(strength) D^T t; strength (..., k) multiplies in its own precision."""
    h = lin(t, D.T)
    return lin((strength * h).to(h.dtype), D)


def gain(coeff: Any, g: Float[Tensor, " r"], suppress_only: bool) -> Float[Tensor, "... r"]:
    """f - 1 of the factors f = exp(c g) for c g <= 0, 1 + c g above; suppress_only holds g at 0 or below."""
    return F.elu(coeff * (box(g, -math.inf, 0.0) if suppress_only else g))


def angles(cfg: Any) -> ParamSpec:
    """Of one side's rotations: r / block_size skew matrices by their entries above the diagonal, about radians."""
    b, most = cfg.block_size, cfg.max_angle
    if b < 2:
        cfg.refuse("block_size", b, "2 or more: one direction has nothing to turn to")
    if most is not None and not 0 < most < math.pi:
        cfg.refuse("max_angle", most, "above 0 and below pi, in radians, or None")
    refuse_indivisible("block_size", b, cfg.r)
    return ParamSpec((cfg.r // b, b * (b - 1) // 2), identity=0, decay=True)


def rotation(theta: Float[Parameter, "n m"], c: float, b: int, max_angle: float | None) -> Float[Tensor, "n b b"]:
    """R - I of the Cayley rotations of c X, X = skew(theta) / 2 bounded: for b = 2 an angle of 2 arctan(c theta / 2)."""
    return cayley_shift(c * bounded(skew(theta, b) / 2, max_angle))
