"""IA3 on the feed-forward part: every input of a layer gets a trained gain.

paper     Liu et al. 2022, arXiv:2205.05638, sec. 3.3 (feed-forward)
code      r-three/t-few, src/models/lora.py; huggingface/peft, tuners/ia3 (feedforward_modules)
formula   x' = x + c g * x,  the paper's l being 1 + g;  g (i) trained, * per input, c = coeff
start     g = 0
coeff     scales g; 0.5 halves the change, -1 reverses it
identity  exact: g = 0
invariant W' = W diag(1 + c g): columns keep their direction; the bias is untouched
cost      i trained, none frozen; i multiply-adds per token
rate      5e-3, as ia3: PEFT's method_comparison (MetaMathQA); the paper (sec. 3.5) 3e-3, with Adafactor. No scale
differs   the paper trains l from 1; the deviation g is stored, so decay pulls to the base and low precision keeps small steps.
          The paper's place for it is the second feed-forward matrix alone: targets=("down_proj",) or ("fc2",)
"""

from ..contract import Adapter, ParamSpec, RanklessConfig, Specs, dataclass, register
from ..contract.annotations import Float, Parameter, Tensor
from ..mathematics import stretched


@dataclass(frozen=True, kw_only=True)
class IA3FFConfig(RanklessConfig):
    lr: float = 5e-3


@register(name="ia3_ff")
class IA3FF(Adapter):
    Config = IA3FFConfig

    g: Float[Parameter, " i"]

    @staticmethod
    def param_specs(d_in: int, d_out: int, cfg: IA3FFConfig) -> Specs:
        return {"g": ParamSpec((d_in,), identity=0, decay=True)}

    def forward_input(self, x: Float[Tensor, "... i"]) -> Float[Tensor, "... i"]:
        return stretched(x, self.coeff * self.g)
