"""IA3: every output of a layer gets a trained gain.

paper     Liu et al. 2022, arXiv:2205.05638, sec. 3.3 (keys and values)
code      r-three/t-few, src/models/lora.py; huggingface/peft, tuners/ia3
formula   y' = y + c g * y,  the paper's l being 1 + g;  g (o) trained, * per output, c = coeff
start     g = 0
coeff     scales g; 0.5 halves the change, -1 reverses it
identity  exact: g = 0
invariant W' = diag(1 + c g) W and b' = (1 + c g) * b: rows keep their direction, the bias is scaled like its row
cost      o trained, none frozen; o multiply-adds per token
rate      5e-3: PEFT's method_comparison (MetaMathQA); the paper (sec. 3.5) and its code 3e-3, with Adafactor. No scale
differs   the paper trains l from 1; the deviation g is stored, so decay pulls to the base and low precision keeps small steps.
          The paper adapts keys and values here and the feed-forward part on its input: two adapters, each with its targets
"""

from ..contract import Adapter, ParamSpec, RanklessConfig, Specs, dataclass, register
from ..contract.annotations import Any, Float, Parameter, Tensor
from ..mathematics import stretched


@dataclass(frozen=True, kw_only=True)
class IA3Config(RanklessConfig):
    lr: float = 5e-3


@register
class IA3(Adapter):
    Config = IA3Config

    g: Float[Parameter, " o"]

    @staticmethod
    def param_specs(d_in: int, d_out: int, cfg: IA3Config) -> Specs:
        return {"g": ParamSpec((d_out,), identity=0, decay=True)}

    def forward(self, x: Float[Tensor, "... i"], y: Float[Tensor, "... o"], base: Any) -> Float[Tensor, "... o"]:
        return stretched(y, self.coeff * self.g)
