"""LoKr: the trained change is a Kronecker product of two small matrices.

paper     Yeh et al. 2023, arXiv:2309.14859, eq. 4 and 5; KronA: Edalati et al. 2022, arXiv:2212.10650
code      KohakuBlueleaf/LyCORIS, lycoris/modules/lokr.py; huggingface/peft, tuners/lokr
formula   y' = y + c s (w1 (x) w2) x,  (x) the Kronecker product, w1 (o1, i1), w2 (o2, i2), o = o1 o2, i = i1 i2, c = coeff,
          s = alpha / r (rslora: alpha / sqrt(r)).  Computed as w1 X w2^T, X (i1, i2) holding x row by row.
          w2 is trained or, where r < max(o2, i2) / 2, its factors: w2 = w2_a w2_b, w2_a (o2, r), w2_b (r, i2);
          w1 likewise, where decompose_both and r < max(o1, i1) / 2
start     init="peft": w1 (or w1_a) = 0; "lycoris": w2 (or w2_b) = 0; every other matrix uniform in +-1/sqrt(its columns)
coeff     scales the update; 0.5 halves it, -1 reverses it
identity  exact: one of w1, w2 is 0
invariant rank(W' - W) = rank(w1) rank(w2); the change does not depend on the bias
cost      n1 + n2 trained, the numbers stored for w1 and w2, none frozen; multiply-adds per token: i1 n2 + o2 n1 (w2 first) or
          i2 n1 + o1 n2 (w1 first), whichever is less; backward keeps x alone and computes what lies between anew
rate      3e-3 with alpha = 2 r: PEFT's method_comparison (MetaMathQA), factor 4. LyCORIS's paper: up to
          1e-3, 5e-4 in the middle, with s = 1, factor 8, init="lycoris"
differs   the Kronecker matrix is never formed. With neither matrix factored r acts through s alone, as in PEFT; LyCORIS takes s
          = 1. A factor above the root stays, as in PEFT; LyCORIS swaps the two. Linear layers only, no dropout of ranks
"""

from math import isqrt

from ..contract import Adapter, AdapterConfig, ParamSpec, Specs, dataclass, register
from ..contract.annotations import Any, Float, Literal, Parameter, Tensor
from ..contract.limits import largest_divisor
from ..contract.spec import kaiming, zeros
from ..mathematics import chain


@dataclass(frozen=True, kw_only=True)
class LoKrConfig(AdapterConfig):
    """factor: o1 and i1 where it divides o and i, else the largest divisor up to it and the root; -1: up to the root."""

    alpha: float | None = 16.0
    factor: int = -1
    decompose_both: bool = False
    init: Literal["peft", "lycoris"] = "peft"
    lr: float = 3e-3

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.factor != -1 and self.factor < 1:
            self.refuse("factor", self.factor, "at least 1, or -1 for the divisor closest to the root")

    def split(self, n: int) -> tuple[int, int]:
        most = isqrt(n) if self.factor == -1 else self.factor
        m = most if n % most == 0 else largest_divisor(n, min(most, isqrt(n)))
        return m, n // m


@register
class LoKr(Adapter):
    Config = LoKrConfig

    w1: Float[Parameter, "o1 i1"]
    w1_a: Float[Parameter, "o1 r"]
    w1_b: Float[Parameter, "r i1"]
    w2: Float[Parameter, "o2 i2"]
    w2_a: Float[Parameter, "o2 r"]
    w2_b: Float[Parameter, "r i2"]

    @staticmethod
    def param_specs(d_in: int, d_out: int, cfg: LoKrConfig) -> Specs:
        (o1, o2), (i1, i2), r = cfg.split(d_out), cfg.split(d_in), cfg.r
        low1, low2 = cfg.decompose_both and r < max(o1, i1) / 2, r < max(o2, i2) / 2
        shapes = {"w1_a": (o1, r), "w1_b": (r, i1)} if low1 else {"w1": (o1, i1)}
        shapes |= {"w2_a": (o2, r), "w2_b": (r, i2)} if low2 else {"w2": (o2, i2)}
        zero = ("w1", "w1_a") if cfg.init == "peft" else ("w2", "w2_b")
        return {k: ParamSpec(shape, zeros if k in zero else kaiming, identity=0, decay=True) for k, shape in shapes.items()}

    def stored(self, w: str) -> list[Tensor]:
        """The matrices of w1 or w2, in the order in which they meet x."""
        return [getattr(self, name) for name in (w, f"{w}_b", f"{w}_a") if hasattr(self, name)]

    def forward(self, x: Float[Tensor, "... i"], y: Float[Tensor, "... o"], base: Any) -> Float[Tensor, "... o"]:
        w1, w2 = self.stored("w1"), self.stored("w2")
        (i1, o1, n1), (i2, o2, n2) = ((w[0].shape[1], w[-1].shape[0], sum(p.numel() for p in w)) for w in (w1, w2))
        X, w2_first = x.unflatten(-1, (i1, i2)), i1 * n2 + o2 * n1 <= i2 * n1 + o1 * n2
        Z = chain(X, *w2, *w1, turn=len(w2)).mT if w2_first else chain(X.mT, *w1, *w2, turn=len(w1))
        return y + self.coeff * self.s * Z.flatten(-2)
