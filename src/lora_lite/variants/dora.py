"""DoRA: the direction of every output row learns a low-rank update, its length a number of its own.

paper     Liu et al. 2024, arXiv:2402.09353, eq. 5; the norm is a constant in the backward pass, sec. 4.3
code      NVlabs/DoRA; huggingface/peft, tuners/lora/dora.py
formula   y' = y + c [(m/n - 1) * (y - b) + (m/n) * s B A x],  n = row norms of V = W + s B A, so W' = diag(m/n) V at c = 1;
          A (r, i), B (o, r), m (o) trained, * per output, b the bias, s = alpha / r (rslora: alpha / sqrt(r)), c = coeff
start     A uniform in +-1/sqrt(i), B = 0, m = n0 = row norms of W
coeff     interpolates between W and W' linearly; -1 goes as far the other way
identity  exact: B = 0 gives n = n0 = m, so m/n = 1
invariant row norms of W' are |m| at c = 1; the bias is neither scaled nor moved
cost      r (i + o) + o trained, o frozen; r (i + o) + o multiply-adds per token, r i o + r^2 (i + o) + o r per call
rate      1e-4 with alpha = 2 r: PEFT's method_comparison (MetaMathQA)
differs   the paper forms V to take its norm; here n^2 = n0^2 + 2s (W A^T . B) + s^2 (B A A^T . B), rows of . summed, without an
          o x i matrix, in float32 or better, held above rounding noise where B A cancels a row of W; kept is the norm, whose
          square leaves the range of float16; without gradients m/n is reused while it holds
"""

from functools import partial

import torch

from ..contract import Adapter, AdapterConfig, ParamSpec, Specs, dataclass, register
from ..contract.annotations import Any, Float, Parameter, Tensor
from ..contract.spec import kaiming
from ..mathematics import add_products, length, lin, wide

LEAST = 2.0**-24  # of a row's norm, the smallest number of float16: rows of zeros keep a finite m/n


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
    n0: Float[Tensor, " o"]

    @staticmethod
    def param_specs(d_in: int, d_out: int, cfg: DoRAConfig) -> Specs:
        A, B = ParamSpec((cfg.r, d_in), kaiming, identity=0, decay=True), ParamSpec((d_out, cfg.r), identity=0, decay=True)
        return {"A": A, "B": B, "m": ParamSpec((d_out,)), "n0": ParamSpec((d_out,), trainable=False)}

    @staticmethod
    def upgraded(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Files of version 0.1 keep the squares of the norms."""
        return {"n0" if key == "w2" else key: t.sqrt() if key == "w2" else t for key, t in tensors.items()}

    def init(self, W: Float[Tensor, "o i"]) -> None:
        self.n0.copy_(length(W, 1).clamp(min=LEAST))
        self.m.copy_(self.n0)

    def forward(self, x: Float[Tensor, "... i"], y: Float[Tensor, "... o"], base: Any) -> Float[Tensor, "... o"]:
        stretch, B = self.reuse(partial(self.rescaled, base), self.A, self.B, self.m, self.n0, base=base)
        return add_products(y, [(lin(x, self.A), B)], self.coeff * self.s, self.coeff * stretch, base.bias)

    def rescaled(self, base: Any) -> tuple[Float[Tensor, " o"], Float[Tensor, "o r"]]:
        """m/n - 1 and diag(m/n) B: that costs o r numbers per call, (m/n) * (B A x) would cost o per token."""
        (m,) = wide(self.m)
        with torch.no_grad():
            A, B, n0 = wide(self.A, self.B, self.n0)
            B0 = self.s * B / n0[:, None]  # of rows of length 1: no square leaves the range
            ratio2 = 1 + ((2 * base(A).T / n0[:, None] + B0 @ (A @ A.T)) * B0).sum(1)
            n = n0 * ratio2.clamp(min=torch.finfo(n0.dtype).eps).sqrt()
        gain = m / n
        return gain - 1, gain[:, None] * self.B
