"""OutputSubspace: methods that act on the part of a layer's output that lies in a chosen subspace.

formula   h = U^T t,  y' = y + U core(h);  U (o, r) frozen with orthonormal columns, t = y - b (include_bias: t = y)
          U U^T W is the part that the papers cut out of W and put back changed, whatever chose U; so neither it, nor the
          rest, nor singular values with input directions, nor the inverse of a metric has to be kept
"""

import math
from collections.abc import Mapping
from dataclasses import field

import torch
import torch.nn.functional as F

from ..calibration.statistics import Stats
from ..contract import Adapter, AdapterConfig, Claims, ParamSpec, Specs, dataclass
from ..contract.annotations import Any, Float, Literal, Parameter, Tensor
from ..contract.limits import refuse_indivisible, refuse_rank
from ..contract.spec import uniform, zeros
from ..errors import LoraLiteError
from ..mathematics.maps import box, length, lin, without_bias
from ..mathematics.rotations import bounded, cayley_shift, skew, softened
from .basis import basis, capture, contrast, has_contrast, needed, warn_of_massive_channels


@dataclass(frozen=True, kw_only=True)
class OutputConfig(AdapterConfig):
    """include_bias: the method acts on y, not on y - b. A child that stands for one orientation adds `basis` and its own."""

    r: int = 256
    alpha: None = None
    rslora: Literal[False] = False
    include_bias: bool = False
    lr: float = 5e-3


@dataclass(frozen=True, kw_only=True)
class SubspaceConfig(OutputConfig):
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
    winsorize     below 1, for m: each token's y - b is held within this quantile of its own |y_j - b_j|, so that channels of
                  outstanding size do not take m over
    """

    basis: Literal["svd", "corda", "corda_full", "asvd", "select"] = "svd"
    damp: float = 0.0
    asvd_alpha: float = 0.5
    asvd_stat: Literal["abs_mean", "rms"] = "abs_mean"
    select_score: Literal["rms", "contrast"] = "rms"
    positions: Literal["last", "all"] = "last"
    winsorize: float = field(default=1.0, metadata={"before": 1.0})

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, used in self.uses().items():
            default = type(self).__dataclass_fields__[name].default
            if not used and getattr(self, name) != default:
                self.refuse(name, getattr(self, name), f"{default!r} with the other options given: nothing would use it")
        if not 0.5 <= self.winsorize <= 1:
            self.refuse("winsorize", self.winsorize, "a quantile from 0.5 to 1")
        if self.damp < 0 or self.asvd_alpha < 0:
            self.refuse("damp or asvd_alpha", min(self.damp, self.asvd_alpha), "0 or more")

    def uses(self) -> dict[str, bool]:
        """Which of the options that belong to one basis have an effect."""
        asvd, select = self.basis == "asvd", self.basis == "select"
        damp, means = self.basis in ("corda", "corda_full"), select and self.select_score == "contrast"
        of_means = {"positions": means, "winsorize": means}
        return {"damp": damp, "asvd_alpha": asvd, "asvd_stat": asvd, "select_score": select, **of_means}


class OutputSubspace(Adapter):
    """Parent of the methods: a child declares `core_specs` and writes `core`; one that declares sigma gets `strengths`."""

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

    basis = staticmethod(basis)
    """(cfg, stats, path, W (o, i)) -> U (o, r) in the dtype of W; a child that stands for one orientation writes its own."""

    @staticmethod
    def needs(cfg: Any) -> tuple[str, ...]:
        return needed(cfg)

    @staticmethod
    def wants(cfg: Any) -> tuple[str, ...]:
        return ("y_moment",) if cfg.basis == "svd" else ()

    @staticmethod
    def group_init(adapters: Mapping[str, Any], stats: Stats, cfg: Any) -> None:
        for path, adapter in adapters.items():
            W = stats["weight"][path]
            adapter.orient(path, stats, W, adapter.basis(adapter.cfg, stats, path, W))
        if has_contrast(cfg, stats):
            warn_of_massive_channels(cfg, stats, adapters)

    def orient(self, path: str, stats: Stats, W: Float[Tensor, "o i"], U: Float[Tensor, "o r"]) -> None:
        """Take U as the basis, note sigma where it is declared, report the share of the statistics that U captures."""
        self.U.copy_(U)
        if "sigma" in self.specs():
            self.sigma.copy_(strengths(W, U, torch.finfo(self.U.dtype).smallest_normal))
        share = capture(stats, path, W, U)
        if share is not None:
            self.report["capture"] = share
        if has_contrast(self.cfg, stats):
            self.report["contrast_capture"] = float((U.T @ contrast(self.cfg, stats, path, U)).norm())

    def part(self, y: Float[Tensor, "... o"], base: Any) -> Float[Tensor, "... o"]:
        """t, what the method acts on."""
        return y if self.cfg.include_bias else without_bias(y, base.bias)

    def forward(self, x: Float[Tensor, "... i"], y: Float[Tensor, "... o"], base: Any) -> Float[Tensor, "... o"]:
        h = lin(self.part(y, base), self.U.T)
        return y + lin(self.core(h).to(h.dtype), self.U)


@dataclass(frozen=True, kw_only=True)
class GainConfig(SubspaceConfig):
    """suppress_only: g acts as min(g, 0), so that no factor exceeds 1 where coeff is at least 0."""

    suppress_only: bool = False


class GainSubspace(OutputSubspace):
    """Parent of the methods that train one factor per direction of U."""

    g: Float[Parameter, " r"]
    sigma: Float[Tensor, " r"]

    @staticmethod
    def core_specs(cfg: Any) -> Specs:
        return {"g": ParamSpec((cfg.r,), identity=0, decay=True), "sigma": ParamSpec((cfg.r,), trainable=False)}


def gain(coeff: Any, g: Float[Tensor, " r"], suppress_only: bool) -> Float[Tensor, "... r"]:
    """f - 1 of the factors f = exp(c g) for c g <= 0, 1 + c g above; suppress_only holds g at 0 or below."""
    return F.elu(coeff * (box(g, -math.inf, 0.0) if suppress_only else g))


def strengths(W: Float[Tensor, "o i"], U: Float[Tensor, "o r"], least: float = 0.0) -> Float[Tensor, " r"]:
    """sigma_k = |W^T u_k|, and 0 where rounding W to the numbers that it holds leaves as much in any direction.

    Rounding errors of relative size e are a random matrix of norm about e |W|_F (1/sqrt(o) + 1/sqrt(i)) / 3. Below
    `least`, of float16 6e-5, the outputs that h is read off have lost digits to their dtype.
    """
    held = next((d for d in (torch.bfloat16, torch.float16, torch.float32) if torch.equal(W.to(d).to(W.dtype), W)), W.dtype)
    sigma = length(W.T @ U, 0)
    noise = torch.finfo(held).eps / 2 * length(W) * (W.shape[0] ** -0.5 + W.shape[1] ** -0.5)
    return torch.where(sigma > noise.clamp(min=least), sigma, 0.0)


def read_off(h: Float[Tensor, "... r"], sigma: Float[Tensor, " r"]) -> Float[Tensor, "... r"]:
    """p = h / sigma, and 0 where sigma is at most 1e-6 of the largest: what y shows of such a direction is rounding."""
    present = sigma > 1e-6 * sigma.max()
    return torch.where(present, h / torch.where(present, sigma, 1.0), 0.0)


def angles(cfg: Any) -> ParamSpec:
    """Of one side's rotations: r / block_size skew matrices by their entries above the diagonal, about radians."""
    b, most = cfg.block_size, cfg.max_angle
    if b < 2:
        cfg.refuse("block_size", b, "2 or more: one direction has nothing to turn to")
    if most is not None and not 0 < most < math.pi:
        cfg.refuse("max_angle", most, "above 0 and below pi, in radians, or None")
    if not 0 <= cfg.theta_init < math.inf:
        cfg.refuse("theta_init", cfg.theta_init, "0 or a finite number above it")
    refuse_indivisible("block_size", b, cfg.r)
    start = uniform(cfg.theta_init) if cfg.theta_init else zeros
    return ParamSpec((cfg.r // b, b * (b - 1) // 2), start, identity=0, decay=True)


def rotation(
    theta: Float[Parameter, "n m"], c: float | Tensor, b: int, max_angle: float | None, cap: str = "block"
) -> Float[Tensor, "n b b"]:
    """R - I of the Cayley rotations of c X, X = skew(theta) / 2 capped: for b = 2 an angle of 2 arctan(c theta / 2)."""
    X = skew(theta, b) / 2
    return cayley_shift(c * (bounded(X, max_angle) if cap == "block" else softened(X, max_angle)))
