"""AntiPaSTO DPLR: one factor per direction of the layer's output plus a low-rank product that mixes them.

paper     none for this core; low-rank product: Hu et al. 2021, arXiv:2106.09685
code      wassname/lora-lite, variants/antipasto_dplr.py
formula   y' = y + U (ELU(c g) h + c B A p),  h = U^T (y - b),  p = h / sigma;  g (r,), A (k, r), B (r, k) trained, U (o, r)
          frozen with orthonormal columns, sigma_k = |W^T u_k| frozen, c = coeff: with W = U S V^T + rest that is
          W' = U (S diag(1 + ELU(c g)) + c B A) V^T + rest
start     g = 0, B = 0, A uniform within 1/sqrt(r); U by `basis`
coeff     scales the product, multiplies g inside the ELU; 0.5 halves the product, -1 reverses it
identity  exact: B = 0 and ELU(0) = 0
invariant components of y outside span(U) stay; B A has rank k at most and moves W by O(1) per unit, whatever sigma is; with
          suppress_only the factors stay within 1 for c >= 0, the product has no bound
cost      r + 2 r k trained, o r + r frozen; 2 o r + 2 r k + 2 r multiply-adds per token; one eigendecomposition at attach
rate      5e-3, as antipasto: wassname/lora-lite, justfile; no run of this method is published. No scale
differs   the reference cuts U U^T W out of the stored weight and keeps V; this is the same map. With a basis from data p is
          U^T W x in rows of unit length. There is no alpha / k: look for the learning rate again where k changes
"""

from ..contract import ParamSpec, Specs, dataclass, register
from ..contract.annotations import Float, Parameter, Tensor
from ..contract.spec import kaiming
from ..families.subspace import GainConfig, GainSubspace, gain, read_off
from ..mathematics import low_rank


@dataclass(frozen=True, kw_only=True)
class AntiPaSTODPLRConfig(GainConfig):
    """k: rank of the product, 1 to r."""

    k: int = 8

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 1 <= self.k <= self.r:
            self.refuse("k", self.k, f"1 to r={self.r}")


@register(name="antipasto_dplr")
class AntiPaSTODPLR(GainSubspace):
    Config = AntiPaSTODPLRConfig

    A: Float[Parameter, "k r"]
    B: Float[Parameter, "r k"]

    @staticmethod
    def core_specs(cfg: AntiPaSTODPLRConfig) -> Specs:
        A = ParamSpec((cfg.k, cfg.r), kaiming, identity=0, decay=True)
        B = ParamSpec((cfg.r, cfg.k), identity=0, decay=True)
        return {**GainSubspace.core_specs(cfg), "A": A, "B": B}

    def core(self, h: Float[Tensor, "... r"]) -> Float[Tensor, "... r"]:
        p = read_off(h, self.sigma)
        return gain(self.coeff, self.g, self.cfg.suppress_only) * h + low_rank(p, self.A, self.B, self.coeff)
