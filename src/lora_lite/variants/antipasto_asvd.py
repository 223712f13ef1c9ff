"""AntiPaSTO gain on ASVD's directions: the singular vectors of W after each input channel is scaled by its mean size.

paper     Yuan et al. 2023, arXiv:2312.05821, sec. 3, SVD(W S), S = diag((mean |x_j|)^alpha); the gain has no paper
code      hahnyuan/ASVD4LLM, modules/svd_linear.py, act_aware_utils.py; wassname/lora-lite, variants/antipasto_asvd.py
formula   y' = y + U (ELU(c g) h),  h = U^T (y - b),  c = coeff;  g (r,) trained, U (o, r) frozen with orthonormal columns: the
          r leading left singular vectors of W diag(q), q_j = m_j^a + 1e-6 max_k m_k^a, a = asvd_alpha, m_j the mean of |x_j|
          over the calibration tokens (asvd_stat="rms": the root of the mean of x_j^2)
start     g = 0; U from calibration data, which is required, sigma_k = |W^T u_k|
coeff     inside the ELU, with g: 0.5 halves small changes, -1 strengthens what 1 weakens without being its inverse
identity  exact: ELU(0) = 0
invariant factors stay above 0; y changes inside span(U) alone; suppress_only and c >= 0: |y' - b| <= |y - b|
cost      r trained, o r + r frozen; 2 o r + r multiply-adds per token; at attach i numbers and one decomposition per layer
rate      5e-3, as antipasto: wassname/lora-lite, justfile; no run of this method is published. No scale
differs   ASVD compresses: it cuts off what is outside the r directions, here that part stays. Its code sums the means of the
          batches, which is the same U for batches of one length, adds 1e-6 itself, and calls the randomised torch.svd_lowrank;
          other scalings of it (maximum, Fisher) are left out. The reference project's scaling is asvd_stat="rms", asvd_alpha=1,
          and is not ASVD's
"""

from ..contract import dataclass, register
from ..contract.annotations import Any, Float, Literal, Tensor
from ..families.basis import channel_scale
from ..families.subspace import GainSubspace, OutputConfig, gain
from ..mathematics import left_svd


@dataclass(frozen=True, kw_only=True)
class AntiPaSTOASVDConfig(OutputConfig):
    """asvd_alpha, asvd_stat: a and m of the formula; suppress_only: g acts as min(g, 0), no factor exceeds 1 at coeff >= 0."""

    basis: Literal["asvd"] = "asvd"
    asvd_alpha: float = 0.5
    asvd_stat: Literal["abs_mean", "rms"] = "abs_mean"
    suppress_only: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.asvd_alpha < 0:
            self.refuse("asvd_alpha", self.asvd_alpha, "0 or more")


@register(name="antipasto_asvd")
class AntiPaSTOASVD(GainSubspace):
    Config = AntiPaSTOASVDConfig

    @staticmethod
    def basis(cfg: AntiPaSTOASVDConfig, stats: Any, path: str, W: Float[Tensor, "o i"]) -> Float[Tensor, "o r"]:
        q = channel_scale(cfg, stats, path, W)
        return left_svd(W * q, cfg.r)[0]

    def core(self, h: Float[Tensor, "... r"]) -> Float[Tensor, "... r"]:
        return gain(self.coeff, self.g, self.cfg.suppress_only) * h
