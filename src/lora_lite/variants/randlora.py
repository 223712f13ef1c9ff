"""RandLoRA: a full-rank update, the sum of random low-rank products that all layers share, with trained diagonals inside.

paper     Albert et al. 2025, arXiv:2502.00987
code      PaulAlbert31/RandLoRA, vision_language/src/rand_lora.py; huggingface/peft, tuners/randlora
formula   y' = y + c s D x,  D = sum_k B_k diag(l_k) A diag(g_k) where i <= o, else the transpose of that;  k = 1 ... n,
          p = min(i, o), q = max(i, o), n = ceil(p / r);  A (r, p) and B_k = B[:, k] (q, r) frozen, random, the leading part of
          one pair for all layers;  l_k (r,) and g_k (p,), the rows of lam and gam, trained;  s = alpha / r (rslora:
          alpha / sqrt(r)), alpha = None: 20 r;  c = coeff.  The sum is one product over the n r directions (k, j)
start     A, B uniform with unit variance over the whole pair; lam = 0, gam = 1 / p
coeff     scales the update; 0.5 halves it, -1 reverses it
identity  exact: lam = 0
invariant A and B never move; the change does not depend on the bias; its rank has no bound below p
cost      n (r + p) trained per layer, p_max r + q_max n_max r frozen once; n r (i + o) multiply-adds per token, 1 to 2 times
          those of the layer itself, and 2 n r p per call; backward keeps one n r x p matrix per layer, in the dtype of x
rate      1e-4 with s = 20: PEFT's method_comparison (MetaMathQA). The paper's language models (C.4): 1e-4 with s = 2/sqrt(n),
          which is alpha = 2 r/sqrt(n) here
differs   both published codes flatten diag(l_k) A diag(g_k) by (j, k) and B by (k, j), so that columns of B meet diagonals of
          another basis; here they meet their own. lam = 0 as in PEFT and the authors' language-model code, their vision code
          has gam = 0 and transposes square layers too. No sparse bases. save_shared=False leaves A and B out of the checkpoint:
          load draws them again and compares a hash
"""

from ..contract import Adapter, AdapterConfig, ParamSpec, Specs, dataclass, register
from ..contract.annotations import Any, Float, Parameter, Tensor
from ..contract.spec import Shape, constant, uniform
from ..mathematics import add_low_rank


def unit_uniform(shape: Shape) -> Tensor:
    drawn = uniform(1.0)(shape)
    return drawn / drawn.std() if drawn.numel() > 1 else drawn.sign()


@dataclass(frozen=True, kw_only=True)
class RandLoRAConfig(AdapterConfig):
    """alpha=None: 20 r, so s = 20; save_shared: A and B stand in the checkpoint, else their hash."""

    r: int = 32
    save_shared: bool = True

    @property
    def s(self) -> float:
        alpha = 20 * self.r if self.alpha is None else self.alpha
        return alpha / (self.r**0.5 if self.rslora else self.r)


@register
class RandLoRA(Adapter):
    Config = RandLoRAConfig

    lam: Float[Parameter, "n r"]
    gam: Float[Parameter, "n p"]
    A: Float[Tensor, "r p"]
    B: Float[Tensor, "q n r"]

    @staticmethod
    def param_specs(d_in: int, d_out: int, cfg: RandLoRAConfig) -> Specs:
        p, q = sorted((d_in, d_out))
        n = -(-p // cfg.r)
        common = {"start": unit_uniform, "trainable": False, "shared": True, "saved": cfg.save_shared}
        return {
            "lam": ParamSpec((n, cfg.r), identity=0, decay=True),
            "gam": ParamSpec((n, p), constant(1 / p)),
            "A": ParamSpec((cfg.r, p), **common),
            "B": ParamSpec((q, n, cfg.r), **common),
        }

    def forward(self, x: Float[Tensor, "... i"], y: Float[Tensor, "... o"], base: Any) -> Float[Tensor, "... o"]:
        # lam * gam first: of its product with the frozen A, backward keeps neither factor.
        A = (self.lam[:, :, None] * self.gam[:, None] * self.A).flatten(0, 1)
        B = self.B.flatten(1)
        down, up = (A, B) if self.d_in <= self.d_out else (B.T, A.T)
        return add_low_rank(y, x, down, up, self.coeff * self.s)
