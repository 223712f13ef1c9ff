"""VeRA: one random low-rank pair for all layers, scaled by two small trained vectors per layer.

paper     Kopiczko, Blankevoort, Asano 2023, arXiv:2310.11454
code      huggingface/peft, tuners/vera
formula   y' = y + c b * (B (d * A x)),  * per channel;  A (r, i), B (o, r) frozen, random, the leading part of one pair for
          all layers; lambda_b = b (o,) and lambda_d = d (r,) trained, c = coeff
start     A uniform in +-sqrt(6 / i_max), B in +-sqrt(6 / r), i_max the widest input of the attach; d = d_init, b = 0
coeff     scales the update; 0.5 halves it, -1 reverses it
identity  exact: b = 0
invariant rank(W' - W) <= r; A and B never move; the change does not depend on the bias
cost      o + r trained per layer, r (i_max + o_max) frozen once; r (i + o) + r + o multiply-adds per token
rate      1e-3 at r = 256: PEFT's method_comparison (MetaMathQA); the paper (app. A) 4e-3 to 1e-1. No scale
differs   of the paper's Kaiming draws the uniform one, as in PEFT. A and B stand in the checkpoint; with save_shared=False load
          draws them again from the seed, as the paper does, and refuses numbers whose hash is another
"""

import torch

from ..contract import Adapter, AdapterConfig, Claims, ParamSpec, Specs, dataclass, register
from ..contract.annotations import Any, Float, Literal, Parameter, Tensor
from ..contract.spec import Shape, constant, uniform
from ..mathematics import low_rank


def he_uniform(shape: Shape) -> Tensor:
    return uniform((6 / shape[-1]) ** 0.5)(shape)


@dataclass(frozen=True, kw_only=True)
class VeRAConfig(AdapterConfig):
    """d_init: start of lambda_d, not 0; save_shared: A and B stand in the checkpoint, else their hash."""

    r: int = 256
    alpha: None = None
    rslora: Literal[False] = False
    d_init: float = 0.1
    save_shared: bool = True
    lr: float = 1e-3

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < abs(self.d_init) < float("inf"):
            self.refuse("d_init", self.d_init, "a finite number other than 0: with b = d = 0 nothing would train", "d_init=0.1")


@register
class VeRA(Adapter):
    Config = VeRAConfig
    claims = Claims(rank=lambda cfg: cfg.r)

    lambda_b: Float[Parameter, " o"]
    lambda_d: Float[Parameter, " r"]
    A: Float[Tensor, "r i"]
    B: Float[Tensor, "o r"]

    @staticmethod
    def param_specs(d_in: int, d_out: int, cfg: VeRAConfig) -> Specs:
        common = {"trainable": False, "shared": True, "saved": cfg.save_shared}
        return {
            "lambda_b": ParamSpec((d_out,), identity=0, decay=True),
            "lambda_d": ParamSpec((cfg.r,), constant(cfg.d_init)),
            "A": ParamSpec((cfg.r, d_in), he_uniform, **common),
            "B": ParamSpec((d_out, cfg.r), he_uniform, **common),
        }

    def forward(self, x: Float[Tensor, "... i"], y: Float[Tensor, "... o"], base: Any) -> Float[Tensor, "... o"]:
        return torch.addcmul(y, self.coeff * self.lambda_b, low_rank(x, self.A, self.B, self.lambda_d))
