"""AntiPaSTO gain on CorDA's directions: one trained factor per output direction, for those that the data uses most.

paper     Yang et al. 2024, arXiv:2406.05223, sec. 3, SVD(W C), for the directions; the gain has no paper
code      wassname/lora-lite, variants/antipasto_corda.py; iboing/CorDA, cordalib/decomposition.py
formula   y' = y + U (ELU(c g) h),  h = U^T (y - b);  g (r,) trained, U (o, r) frozen with orthonormal columns, c = coeff:
          U holds the r leading left singular vectors of W C^(1/2) (corda) or of W C, as printed (corda_full), where
          C = E[x x^T] + d I over the calibration tokens, d = damp E|x|^2 / i. As W C^(1/2) = U S V^T implies
          U U^T W = U S V^T C^(-1/2), neither a root nor an inverse of C is formed: U are eigenvectors of
          W C W^T = E[(y - b)(y - b)^T], or left singular vectors of W C = E[(y - b) x^T]
start     g = 0; U from calibration data, which is required, sigma_k = |W^T u_k|
coeff     multiplies g inside the ELU; -1 strengthens what 1 weakens, but is not its inverse
identity  exact: ELU(0) = 0
invariant factors are positive; components of y outside span(U) stay; suppress_only and c >= 0: |y' - b| <= |y - b|
cost      r trained, o r + r frozen; 2 o r + r multiply-adds per token; at attach i^2 (i > o: o^2 or o i) numbers
rate      5e-3, as antipasto: wassname/lora-lite, justfile; no run of this method is published. No scale
differs   the paper starts LoRA's factors on W C. corda is the reference project's form, other directions than the printed ones:
          with damp = 0 no r directions lose less of E|y - b|^2. The reference's damping is absolute, and it cuts U U^T W out of
          the stored weight and inverts the root of C. suppress_only acts with a gradient that lets g return below 0
"""

from ..calibration import require_tokens
from ..contract import dataclass, register
from ..contract.annotations import Any, Float, Literal, Tensor
from ..families.orientation import oriented_left_svd
from ..families.subspace import GainSubspace, OutputConfig, gain


@dataclass(frozen=True, kw_only=True)
class AntiPaSTOCorDAConfig(OutputConfig):
    """basis and damp as in the formula; suppress_only: g acts as min(g, 0), so that no factor exceeds 1 where coeff >= 0."""

    basis: Literal["corda", "corda_full"] = "corda"
    damp: float = 0.0
    suppress_only: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.damp < 0:
            self.refuse("damp", self.damp, "0 or more")


@register(name="antipasto_corda")
class AntiPaSTOCorDA(GainSubspace):
    Config = AntiPaSTOCorDAConfig

    @staticmethod
    def basis(cfg: AntiPaSTOCorDAConfig, stats: Any, path: str, W: Float[Tensor, "o i"]) -> Float[Tensor, "o r"]:
        require_tokens(stats, path, cfg.r, f"a basis of {cfg.r} directions")
        return oriented_left_svd("sqrt" if cfg.basis == "corda" else "full", stats, path, W, cfg.r, cfg.damp)[0]

    def core(self, h: Float[Tensor, "... r"]) -> Float[Tensor, "... r"]:
        return gain(self.coeff, self.g, self.cfg.suppress_only) * h
