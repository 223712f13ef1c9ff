"""AntiPaSTO gain: one trained factor per singular direction of the layer's output.

paper     none for this core; family: Clark 2026, arXiv:2601.07473 (a frozen singular basis, bounded trained cores)
code      wassname/lora-lite, variants/antipasto.py; wassname/AntiPaSTO
formula   y' = y + U (ELU(c g) h),  h = U^T (y - b);  U (o, r) frozen with orthonormal columns, g (r,) trained, c = coeff:
          the coordinates h of the output are multiplied by exp(c g) where c g <= 0 and by 1 + c g above
start     g = 0; U by `basis`, sigma_k = |W^T u_k|
coeff     multiplies g inside the ELU; -1 strengthens what 1 weakens, but is not its inverse
identity  exact: ELU(0) = 0
invariant factors are positive; components of y outside span(U) stay; suppress_only and c >= 0: |y' - b| <= |y - b|
cost      r trained, o r + r frozen; 2 o r + r multiply-adds per token; one eigendecomposition per layer at attach
rate      5e-3: wassname/lora-lite, justfile. No scale
differs   the reference cuts U U^T W out of the stored weight and puts it back as U diag(S f) V^T; this is the same map of y.
          sigma is kept for inspection only. suppress_only, damp and every basis but svd are additions
"""

from ..contract import dataclass, register
from ..contract.annotations import Float, Tensor
from ..families.subspace import GainConfig, GainSubspace, gain


@dataclass(frozen=True, kw_only=True)
class AntiPaSTOConfig(GainConfig):
    """basis: which directions U are; see its parents."""


@register
class AntiPaSTO(GainSubspace):
    Config = AntiPaSTOConfig

    def core(self, h: Float[Tensor, "... r"]) -> Float[Tensor, "... r"]:
        return gain(self.coeff, self.g, self.cfg.suppress_only) * h
