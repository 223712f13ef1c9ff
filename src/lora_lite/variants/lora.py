"""LoRA: a trained low-rank matrix added to the frozen weight.

paper     Hu et al. 2021, arXiv:2106.09685, eq. 3; scale alpha/sqrt(r): Kalajdzievski 2023, arXiv:2312.03732
code      microsoft/LoRA, loralib/layers.py; huggingface/peft, tuners/lora
formula   y' = y + c s B A x;  A (r, i), B (o, r) trained, s = alpha / r (rslora: alpha / sqrt(r)), c = coeff
start     kaiming: A uniform in +-1/sqrt(i); gaussian: A ~ N(0, 1/r^2); both B = 0.
          orthogonal: A0, B0 from disjoint rows of one orthogonal matrix, trained as a twin: y' = y + c s (B A - B0 A0) x,
          A = A0 + dA, B = B0 + dB
coeff     scales the update; 0.5 halves it, -1 reverses it
identity  exact: B = 0, or dA = dB = 0
invariant rank(W' - W) <= r (orthogonal: 2r); the change does not depend on the bias
cost      r (i + o) trained, none frozen (orthogonal: the same again); r (i + o) multiply-adds per token
rate      1e-4 with alpha = 2 r: PEFT's method_comparison (MetaMathQA)
differs   the paper draws A Gaussian, its code and PEFT kaiming (our default); there is no dropout
"""

import torch

from ..contract import AdapterConfig, Claims, ParamSpec, Specs, dataclass, register
from ..contract.annotations import Any, Float, Literal, Parameter, Tensor
from ..contract.limits import refuse_odd
from ..contract.spec import kaiming, normal
from ..families.twin import Twin
from ..mathematics import add_low_rank


@dataclass(frozen=True, kw_only=True)
class LoRAConfig(AdapterConfig):
    alpha: float | None = 16.0
    init: Literal["kaiming", "gaussian", "orthogonal"] = "kaiming"


@register
class LoRA(Twin):
    Config = LoRAConfig
    claims = Claims(rank=lambda cfg: cfg.r * (2 if cfg.init == "orthogonal" else 1), reads_weight=False)

    A: Float[Parameter, "r i"]
    B: Float[Parameter, "o r"]

    @staticmethod
    def param_specs(d_in: int, d_out: int, cfg: LoRAConfig) -> Specs:
        if cfg.init == "orthogonal":
            refuse_odd("r", cfg.r)
            return Twin.param_specs(d_in, d_out, cfg)
        A = ParamSpec((cfg.r, d_in), kaiming if cfg.init == "kaiming" else normal(1 / cfg.r), identity=0, decay=True)
        return {"A": A, "B": ParamSpec((d_out, cfg.r), identity=0, decay=True)}

    def init(self, W: Float[Tensor, "o i"]) -> None:
        if self.cfg.init == "orthogonal":
            Q = torch.linalg.qr(torch.randn(self.cfg.r, self.cfg.r)).Q
            self.A0.copy_((torch.randn(self.d_in, self.cfg.r // 2) @ Q[0::2]).T / 10)
            self.B0.copy_((Q[1::2].T @ torch.randn(self.cfg.r // 2, self.d_out)).T / 10)

    def forward(self, x: Float[Tensor, "... i"], y: Float[Tensor, "... o"], base: Any) -> Float[Tensor, "... o"]:
        if self.cfg.init == "orthogonal":
            return super().forward(x, y, base)
        return add_low_rank(y, x, self.A, self.B, self.coeff * self.s)
