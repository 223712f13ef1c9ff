"""Twin: low-rank methods that start away from zero, as deviations from a frozen start.

formula   y' = y + c s (B A - B0 A0) x,  A = A0 + dA,  B = B0 + dB
          computed as y + c s (B0 dA x + dB A x): exactly 0 at dA = dB = 0 in every dtype, and precise for small deviations
          where the difference of two products is not. Backward keeps x and A x, of the activations, and nothing else
"""

from ..contract import Adapter, AdapterConfig, Claims, ParamSpec, Specs, dataclass
from ..contract.annotations import Any, Float, Parameter, Tensor
from ..contract.limits import refuse_rank
from ..mathematics.maps import add_products, lin


@dataclass(frozen=True, kw_only=True)
class TwinConfig(AdapterConfig):
    """alpha=None: s = 1, the papers' W = W_res + B A."""

    r: int = 16
    lr: float = 2e-5


class Twin(Adapter):
    """Parent of the methods that fill A0 and B0 and train the deviations."""

    claims = Claims(rank=lambda cfg: 2 * cfg.r)

    dA: Float[Parameter, "r i"]
    dB: Float[Parameter, "o r"]
    A0: Float[Tensor, "r i"]
    B0: Float[Tensor, "o r"]

    @staticmethod
    def param_specs(d_in: int, d_out: int, cfg: Any) -> Specs:
        refuse_rank(cfg.r, d_in, d_out)
        return {
            "dA": ParamSpec((cfg.r, d_in), identity=0, decay=True),
            "dB": ParamSpec((d_out, cfg.r), identity=0, decay=True),
            "A0": ParamSpec((cfg.r, d_in), trainable=False),
            "B0": ParamSpec((d_out, cfg.r), trainable=False),
        }

    def forward(self, x: Tensor, y: Tensor, base: Any) -> Tensor:
        scale, dh = self.coeff * self.s, lin(x, self.dA)
        h = dh + lin(x, self.A0)
        return add_products(y, [(dh, self.B0), (h, self.dB)], scale)
