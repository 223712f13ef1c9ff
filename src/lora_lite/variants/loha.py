"""LoHa: the trained change is the elementwise product of two low-rank matrices, of rank up to r^2.

paper     Hyeon-Woo et al. 2021, arXiv:2108.06098, sec. 2.2 (FedPara); Yeh et al. 2023, arXiv:2309.14859, eq. 3 (LoHa)
code      KohakuBlueleaf/LyCORIS, lycoris/modules/loha.py; huggingface/peft, tuners/loha
formula   y' = y + c s D x,  D = (w1_a w1_b) * (w2_a w2_b), * per entry;  w1_a, w2_a (o, r) and w1_b, w2_b (r, i) trained,
          s = alpha / r (rslora: alpha / sqrt(r)), c = coeff.
          Computed as B A x: row (p, q) of A (r^2, i) is w1_b[p] * w2_b[q], column (p, q) of B is w1_a[:, p] * w2_a[:, q];
          D itself is formed only where that takes fewer multiplications: r^2 (i + o) > i o
start     w1_a, w2_a uniform in +-1/sqrt(r), w1_b in +-1/sqrt(i); w2_b = 0
coeff     scales the update; 0.5 halves it, -1 reverses it
identity  exact: w2_b = 0, so A = 0 and D = 0
invariant rank(W' - W) <= r^2; the change does not depend on the bias
cost      2 r (i + o) trained, none frozen; min(r^2 (i + o), i o) multiply-adds per token, and per call r^2 (i + o)
          multiplications for A and B or (2 r + 1) i o for D; backward keeps x, A and B, or x and what D is made of
rate      1e-4 with alpha = 2 r: PEFT's method_comparison (MetaMathQA). LyCORIS's paper: up to 1e-3,
          5e-4 in the middle, with alpha = r/2 from another start
differs   start as in PEFT; LyCORIS draws Gaussians and zeroes w2_a. Both always form D. Linear layers only, no dropout of ranks
"""

from einops import rearrange

from ..contract import Adapter, AdapterConfig, Claims, ParamSpec, Specs, dataclass, register
from ..contract.annotations import Any, Float, Parameter, Tensor
from ..contract.spec import kaiming
from ..mathematics import add_lin, chain


@dataclass(frozen=True, kw_only=True)
class LoHaConfig(AdapterConfig):
    alpha: float | None = 16.0


@register
class LoHa(Adapter):
    Config = LoHaConfig
    claims = Claims(rank=lambda cfg: cfg.r**2)

    w1_a: Float[Parameter, "o r"]
    w1_b: Float[Parameter, "r i"]
    w2_a: Float[Parameter, "o r"]
    w2_b: Float[Parameter, "r i"]

    @staticmethod
    def param_specs(d_in: int, d_out: int, cfg: LoHaConfig) -> Specs:
        return {
            "w1_a": ParamSpec((d_out, cfg.r), kaiming, identity=0, decay=True),
            "w1_b": ParamSpec((cfg.r, d_in), kaiming, identity=0, decay=True),
            "w2_a": ParamSpec((d_out, cfg.r), kaiming, identity=0, decay=True),
            "w2_b": ParamSpec((cfg.r, d_in), identity=0, decay=True),
        }

    def forward(self, x: Float[Tensor, "... i"], y: Float[Tensor, "... o"], base: Any) -> Float[Tensor, "... o"]:
        if self.cfg.r**2 * (self.d_in + self.d_out) > self.d_in * self.d_out:
            D = (self.w1_a @ self.w1_b) * (self.w2_a @ self.w2_b)
            return add_lin(y, x, D, self.coeff * self.s)
        A = rearrange(self.w1_b[:, None] * self.w2_b, "p q i -> (p q) i")
        B = rearrange(self.w1_a[:, :, None] * self.w2_a[:, None], "o p q -> o (p q)")
        return y + self.coeff * self.s * chain(x, A, B)
