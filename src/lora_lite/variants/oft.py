"""OFT: the input rotated block by block, which keeps all lengths of and angles between the rows of W.

paper     Qiu et al. 2023, arXiv:2306.07280, sec. 3; applied to the input: Qiu et al. 2025, arXiv:2506.19847
code      Zeju1997/oft, oft-control/oft.py; huggingface/peft, tuners/oft
formula   W' = W R(c)^T,  R(c) = blockdiag(R_1 ... R_n),  R_k = (I - c X_k)^-1 (I + c X_k),  X_k (b, b) skew with the numbers
          q_k above the diagonal and -q_k below; q (n, m) trained, b = block size, n = i/b, m = b(b-1)/2, c = coeff.
          Computed in row form on the input as x' = x + x blockdiag(R_k - I)
start     q = 0
coeff     turns by the angles 2 arctan(c t) where 2 arctan(t) are those at 1: 0.5 turns small angles half as far and large ones
          further than that; -1 is the exact inverse of 1
identity  exact: R_k - I is solved for, and is 0 at X_k = 0
invariant R(c) is orthogonal with determinant 1 for every q and c, so W' W'^T = W W^T; blocks do not mix
cost      i (b-1)/2 trained, none frozen; i b multiply-adds per token and n solves of size b per call; a tensor of coefficients
          takes one pass per distinct value; without gradients R is reused while it holds
rate      1e-4: PEFT's method_comparison (MetaMathQA). No scale
differs   the Cayley transform is solved exactly, not cut off as a series; sign of q as above, PEFT's exact branch has the other
          one; no bound on R (COFT), no blocks that share their numbers
"""

from ..contract import Adapter, Claims, ParamSpec, RanklessConfig, Specs, dataclass, register
from ..contract.annotations import Float, Parameter, Tensor
from ..contract.limits import largest_divisor, refuse_indivisible
from ..mathematics import block_turn, cayley_shift, per_value, skew


@dataclass(frozen=True, kw_only=True)
class OFTConfig(RanklessConfig):
    """block_size=None: the largest divisor of d_in that is at most 32."""

    block_size: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.block_size is not None and self.block_size < 2:
            self.refuse("block_size", self.block_size, "at least 2: a block of 1 has nothing to rotate")


@register
class OFT(Adapter):
    Config = OFTConfig
    claims = Claims(isometry=True)

    q: Float[Parameter, "n m"]

    @staticmethod
    def param_specs(d_in: int, d_out: int, cfg: OFTConfig) -> Specs:
        b = cfg.block_size or largest_divisor(d_in, 32)
        refuse_indivisible("block_size", b, d_in)
        if b == 1:
            cfg.refuse("block_size", None, f"a divisor of {d_in} from 2 to 32, and there is none", "exclude=('<its path>',)")
        return {"q": ParamSpec((d_in // b, b * (b - 1) // 2), identity=0, decay=True)}

    def forward_input(self, x: Float[Tensor, "... i"]) -> Float[Tensor, "... i"]:
        return per_value(self.coeff, x, self.turned, at_zero=x, values=self.values)

    def turned(self, c: float | Tensor, x: Float[Tensor, "... i"]) -> Float[Tensor, "... i"]:
        b = self.d_in // len(self.q)
        return block_turn(x, self.reuse(lambda: cayley_shift(c * skew(self.q, b)), self.q, c))
