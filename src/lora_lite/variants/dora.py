"""DoRA: the direction of every output row learns a low-rank update, its length a number of its own.

paper     Liu et al. 2024, arXiv:2402.09353, eq. 5; the norm is a constant in the backward pass, sec. 4.3
code      NVlabs/DoRA; huggingface/peft, tuners/lora/dora.py
formula   y' = y + c [(m/n - 1) * (y - b) + (m/n) * s B A x],  n = row norms of V = W + s B A, so W' = diag(m/n) V at c = 1;
          A (r, i), B (o, r), m (o) trained, * per output, b the bias, s = alpha / r (rslora: alpha / sqrt(r)), c = coeff
start     A uniform in +-1/sqrt(i), B = 0, w2 = squared row norms of W, m = sqrt(w2)
coeff     interpolates between W and W' linearly; -1 goes as far the other way
identity  exact: B = 0 gives n = sqrt(w2) = m, so m/n = 1
invariant row norms of W' are |m| at c = 1; the bias is neither scaled nor moved
cost      r (i + o) + o trained, o frozen; r (i + o) + o multiply-adds per token, r i o + r^2 (i + o) + o r per call
differs   the paper forms V to take its norm; here n^2 = w2 + 2s (W A^T . B) + s^2 (B A A^T . B), rows of . summed, without an
          o x i matrix, held above rounding noise where B A cancels a row of W; without gradients m/n is reused while it holds
"""

from functools import partial

import torch

from ..contract import Adapter, AdapterConfig, ParamSpec, Specs, dataclass, register
from ..contract.annotations import Any, Float, Parameter, Tensor
from ..contract.spec import kaiming
from ..mathematics import add_products, lin


@dataclass(frozen=True, kw_only=True)
class DoRAConfig(AdapterConfig):
    r: int = 16
    alpha: float | None = 32.0


@register
class DoRA(Adapter):
    Config = DoRAConfig

    A: Float[Parameter, "r i"]
    B: Float[Parameter, "o r"]
    m: Float[Parameter, " o"]
    w2: Float[Tensor, " o"]

    @staticmethod
    def param_specs(d_in: int, d_out: int, cfg: DoRAConfig) -> Specs:
        A, B = ParamSpec((cfg.r, d_in), kaiming, identity=0, decay=True), ParamSpec((d_out, cfg.r), identity=0, decay=True)
        return {"A": A, "B": B, "m": ParamSpec((d_out,)), "w2": ParamSpec((d_out,), trainable=False)}

    def init(self, W: Float[Tensor, "o i"]) -> None:
        self.w2.copy_(W.square().sum(1).clamp(min=1e-30))  # rows of zeros keep a finite m/n
        self.m.copy_(self.w2.sqrt())

    def forward(self, x: Float[Tensor, "... i"], y: Float[Tensor, "... o"], base: Any) -> Float[Tensor, "... o"]:
        stretch, B = self.reuse(partial(self.rescaled, base), self.A, self.B, self.m, self.w2, base=base)
        return add_products(y, [(lin(x, self.A), B)], self.coeff * self.s, self.coeff * stretch, base.bias)

    def rescaled(self, base: Any) -> tuple[Float[Tensor, " o"], Float[Tensor, "o r"]]:
        """m/n - 1 and diag(m/n) B: that costs o r numbers per call, (m/n) * (B A x) would cost o per token."""
        A, B, s = self.A, self.B, self.s
        with torch.no_grad():
            n2 = self.w2 + s * ((2 * base(A).T + s * B @ (A @ A.T)) * B).sum(1)
            n = n2.maximum(torch.finfo(n2.dtype).eps * self.w2).sqrt()
        gain = self.m / n
        return gain - 1, gain[:, None] * B
