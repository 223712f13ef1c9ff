"""Composed: the adapter that algebra makes, a fixed change of weight and bias. It is no method of its own to choose.

formula   y' = y + c (B A x + b),  or y + c (D x + b) where the factors would be the larger form;  c = coeff
"""

from dataclasses import dataclass

from ..contract.adapter import Adapter
from ..contract.annotations import Any, Float, Tensor
from ..contract.claims import Claims
from ..contract.config import AdapterConfig
from ..contract.registry import register
from ..contract.spec import ParamSpec
from ..core.delta import smaller_as_factors
from ..mathematics.maps import lin, low_rank


@dataclass(frozen=True, kw_only=True)
class ComposedConfig(AdapterConfig):
    """r, rank_pattern  rank of the change, layer by layer          bias  whether the bias changes anywhere"""

    alpha: None = None
    bias: bool = False


@register(name="composed")
class Composed(Adapter):
    """A (r, d_in) and B (d_out, r), or D (d_out, d_in), and b (d_out,), all frozen."""

    Config = ComposedConfig
    claims = Claims(rank=lambda cfg: cfg.r)
    listed = False

    A: Float[Tensor, "r i"]
    B: Float[Tensor, "o r"]
    D: Float[Tensor, "o i"]
    b: Float[Tensor, " o"]

    @staticmethod
    def param_specs(d_in: int, d_out: int, cfg: ComposedConfig) -> dict[str, ParamSpec]:
        shapes = {"A": (cfg.r, d_in), "B": (d_out, cfg.r)} if smaller_as_factors(cfg.r, d_out, d_in) else {"D": (d_out, d_in)}
        return {
            name: ParamSpec(shape, trainable=False) for name, shape in (shapes | ({"b": (d_out,)} if cfg.bias else {})).items()
        }

    def forward(self, x: Float[Tensor, "... i"], y: Float[Tensor, "... o"], base: Any) -> Float[Tensor, "... o"]:
        change = lin(x, self.D) if hasattr(self, "D") else low_rank(x, self.A, self.B)
        return y + self.coeff * (change + self.b.to(y.dtype) if self.cfg.bias else change)
