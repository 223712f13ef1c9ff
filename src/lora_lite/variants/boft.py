"""BOFT: the input rotated by a product of block rotations, wired as a butterfly so that few small blocks mix many channels.

paper     Liu, Qiu et al. 2023, arXiv:2311.06243, sec. 4
code      wy1iu/butterfly-oft; huggingface/peft, tuners/boft
formula   W' = diag(1 + c g) W R^T, b' = b, the scale of the codes being 1 + g;  R = B_(m-1) ... B_0,  B_f = P_f D_f P_f^T,
          D_f = blockdiag of n Cayley rotations (I - c X)^-1 (I + c X), X (b, b) skew with b(b-1)/2 numbers of q above the
          diagonal and their negatives below; q (m, n, b(b-1)/2) trained, b = block_size, n = i/b, m = n_factors, c = coeff.
          P_f puts into one block two half-blocks of b/2 channels that lie 2^f half-blocks apart; P_0 = I.
          Row form: x' = x R, factor after factor as x + x P_f (D_f - I) P_f^T.  g (o) trained with scale=True, else 0
start     q = 0, g = 0
coeff     turns by the angles 2 arctan(c t) where 2 arctan(t) are those at 1, in every factor, and scales g; -1 is the exact
          inverse of 1 for one factor without scale
identity  exact: D_f - I is solved for, and is 0 at q = 0; g = 0
invariant R is orthogonal, det R = 1, for every q and c, without scale W' W'^T = W W^T; at most b 2^(m-1) entries of a row not 0
cost      m i (b-1)/2 trained (scale: + o), none frozen; m i b multiply-adds per token (+ o), m n solves of size b per call;
          a tensor of coefficients takes one pass per distinct value and factor; without gradients D_f is reused while it holds
rate      1e-4: PEFT's method_comparison (MetaMathQA). No scale
differs   the skew numbers alone are stored, PEFT stores full blocks D and uses (D^T - D)/2; the scale is off by default and
          stored as its deviation g; permutations are reshapes, not matrices; no dropout of blocks
"""

from einops import rearrange

from ..contract import Adapter, ParamSpec, RanklessConfig, Specs, dataclass, register
from ..contract.annotations import Any, Float, Parameter, Tensor
from ..contract.limits import refuse_indivisible
from ..mathematics import block_product, cayley_shift, per_value, skew, stretched


@dataclass(frozen=True, kw_only=True)
class BOFTConfig(RanklessConfig):
    block_size: int = 4
    n_factors: int = 1
    scale: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.n_factors < 1:
            self.refuse("n_factors", self.n_factors, "at least 1")
        if self.block_size < 2 or (self.n_factors > 1 and self.block_size % 2):
            self.refuse("block_size", self.block_size, "at least 2, and even where n_factors > 1: half-blocks change places")


@register
class BOFT(Adapter):
    Config = BOFTConfig

    q: Float[Parameter, "m n k"]
    g: Float[Parameter, " o"]

    @staticmethod
    def param_specs(d_in: int, d_out: int, cfg: BOFTConfig) -> Specs:
        b, n, m = cfg.block_size, d_in // cfg.block_size, cfg.n_factors
        refuse_indivisible("block_size", b, d_in)
        if n % 2 ** (m - 1):
            most = (n & -n).bit_length()
            cfg.refuse("n_factors", m, f"at most {most}: 2^(n_factors-1) divides {d_in}/{b}", f"n_factors={most}")
        q = ParamSpec((m, n, b * (b - 1) // 2), identity=0, decay=True)
        return {"q": q, "g": ParamSpec((d_out,), identity=0, decay=True)} if cfg.scale else {"q": q}

    def forward_input(self, x: Float[Tensor, "... i"]) -> Float[Tensor, "... i"]:
        return per_value(self.coeff, x, self.turned, at_zero=x, values=self.values)

    def turned(self, c: float | Tensor, x: Float[Tensor, "... i"]) -> Float[Tensor, "... i"]:
        b = self.cfg.block_size
        shifts = self.reuse(lambda: cayley_shift(c * skew(self.q.flatten(0, 1), b)), self.q, c)
        for f, N in reversed([*enumerate(shifts.chunk(self.cfg.n_factors))]):
            x = x + self.wired(f, N, x)
        return x

    def wired(self, f: int, N: Float[Tensor, "n b b"], x: Float[Tensor, "... i"]) -> Float[Tensor, "... i"]:
        """x P_f N P_f^T."""
        if f == 0:
            return block_product(x, N)
        sizes = {"two": 2, "e": 2**f, "t": self.cfg.block_size // 2}
        z = rearrange(x, "... (groups two e t) -> ... (groups e two t)", **sizes)
        return rearrange(block_product(z, N), "... (groups e two t) -> ... (groups two e t)", **sizes)

    def forward(self, x: Float[Tensor, "... i"], y: Float[Tensor, "... o"], base: Any) -> Float[Tensor, "... o"]:
        return stretched(y, self.coeff * self.g, base.bias) if self.cfg.scale else y
