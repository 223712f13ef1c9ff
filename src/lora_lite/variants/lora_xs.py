"""LoRA-XS: an r x r matrix trained between frozen singular factors of W.

paper     Balazy, Banaei et al. 2024, arXiv:2405.17604, sec. 3: x W^T + x A R B in row form, A = V S, B = U^T for W = U S V^T
code      MohammadrezaBanaei/LoRA-XS, utils/initialization_utils.py, utils/latent_utils.py
formula   y' = y + c s U R h,  h = U^T (y - b) = S V^T x, the frozen A^T x read off the output;  R (r, r) trained, transposed
          against the row form, U (o, r) frozen with orthonormal columns, s = alpha / r, c = coeff
start     R = 0; U the r leading left singular vectors of W, or other directions by `basis`: then h = U^T W x
coeff     scales the update; -1 reverses it
identity  exact: R = 0
invariant rank(W' - W) <= r; its columns lie in span(U), its rows in those of U^T W
cost      r^2 trained, o r frozen; 2 o r + r^2 multiply-adds per token, where the paper's form takes r (i + o) + r^2
rate      4e-3 at r = 64 with s = 1: the authors' scripts/run_math_tuning.sh and main_math_tuning.py
differs   R starts at 0, not at a standard deviation of 1e-5: its gradient is there from the first step. The SVD is exact, the
          code's scikit-learn's TruncatedSVD, randomised. Other bases, rslora and include_bias (y in place of y - b) are
          additions
"""

from ..contract import ParamSpec, Specs, dataclass, register
from ..contract.annotations import Float, Parameter, Tensor
from ..families.subspace import OutputSubspace, SubspaceConfig
from ..mathematics import lin


@dataclass(frozen=True, kw_only=True)
class LoRAXSConfig(SubspaceConfig):
    """alpha, rslora: as for every method with a scale; alpha=None: s = 1."""

    r: int = 64
    alpha: float | None = None  # type: ignore[assignment]  # its parents have no scale
    rslora: bool = False  # type: ignore[assignment]
    lr: float = 4e-3


@register(name="lora_xs")
class LoRAXS(OutputSubspace):
    Config = LoRAXSConfig

    R: Float[Parameter, "r r"]

    @staticmethod
    def core_specs(cfg: LoRAXSConfig) -> Specs:
        return {"R": ParamSpec((cfg.r, cfg.r), identity=0, decay=True)}

    def core(self, h: Float[Tensor, "... r"]) -> Float[Tensor, "... r"]:
        return self.coeff * self.s * lin(h, self.R)
