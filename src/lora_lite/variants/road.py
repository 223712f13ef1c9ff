"""RoAd: outputs in pairs, every pair turned by an angle and stretched.

paper     Liao, Monz 2024, arXiv:2409.00119, eq. 2 to 4, which pair outputs 2i-1 and 2i: group_size=2
code      huggingface/peft, tuners/road; none by the authors is known
formula   y' = R y, bias included; on a pair (p, q) of outputs, with theta_c = c theta and alpha_c = 1 + c a, c = coeff,
          R = [[alpha_p cos theta_p, -alpha_p sin theta_p], [alpha_q sin theta_q, alpha_q cos theta_q]].
          Outputs come in n groups of g = 2h; output j of a group's first half is paired with output j of its second half.
          theta, a (n, k, h) trained, k = 1, 2 or 4 by mode. road_1: one (theta, a) per pair; road_2: one per output;
          road_4: one per entry of R, [:, :2] the cosine entries of both halves, [:, 2:] the sine entries
start     theta = a = 0, the paper's alpha = 1 + a
coeff     scales angle and stretch; 0.5 turns half as far, -1 turns back (for road_1 with a = 0 the exact inverse of 1)
identity  exact: theta = a = 0 gives alpha cos theta - 1 = alpha sin theta = 0
invariant pairs do not mix; road_1: R^T R = alpha^2 I on every pair, so lengths stay where a = 0
cost      o (road_1), 2o (road_2) or 4o (road_4) trained, none frozen; 2o multiply-adds per token, sines of 2o numbers per call
rate      1e-3: PEFT's method_comparison (MetaMathQA) and documentation; the paper's LLaMA (C.2) 3e-3, its GLUE 1e-3 and 3e-3.
          No scale
differs   the paper trains alpha from 1; the deviation a is stored, so decay pulls to the base. group_size fits every layer by
          default, with PEFT's pairs where its 64 divides the width, and not the paper's
"""

from einops import rearrange

from ..contract import Adapter, ParamSpec, RanklessConfig, Specs, dataclass, register
from ..contract.annotations import Any, Float, Literal, Parameter, Tensor
from ..contract.limits import largest_divisor
from ..mathematics import stretched


@dataclass(frozen=True, kw_only=True)
class RoAdConfig(RanklessConfig):
    """group_size=None: the largest even divisor of d_out that is at most 64."""

    mode: Literal["road_1", "road_2", "road_4"] = "road_1"
    group_size: int | None = None
    lr: float = 1e-3

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.group_size is not None and (self.group_size < 2 or self.group_size % 2):
            self.refuse("group_size", self.group_size, "even and at least 2: its halves are paired")


@register
class RoAd(Adapter):
    Config = RoAdConfig

    theta: Float[Parameter, "n k h"]
    a: Float[Parameter, "n k h"]

    @staticmethod
    def param_specs(d_in: int, d_out: int, cfg: RoAdConfig) -> Specs:
        if d_out % 2:
            cfg.refuse(
                "group_size", cfg.group_size, f"an even divisor of {d_out}, and there is none", "exclude=('<its path>',)"
            )
        h = largest_divisor(d_out // 2, (cfg.group_size or 64) // 2)
        if cfg.group_size not in (None, 2 * h):
            cfg.refuse("group_size", cfg.group_size, f"an even divisor of {d_out}", f"group_size={2 * h}")
        spec = ParamSpec((d_out // (2 * h), int(cfg.mode[-1]), h), identity=0, decay=True)
        return {"theta": spec, "a": spec}

    def entries(self, rows: slice) -> list[Tensor]:
        """(c theta, c a) of the cosine or the sine entries, one number per output."""
        n, _, h = self.theta.shape
        return [self.coeff * t[:, rows].expand(n, 2, h).flatten() for t in (self.theta, self.a)]

    def forward(self, x: Float[Tensor, "... i"], y: Float[Tensor, "... o"], base: Any) -> Float[Tensor, "... o"]:
        theta, a = self.entries(slice(0, 2))
        phi, b = self.entries(slice(2, 4)) if self.theta.shape[1] == 4 else (theta, a)
        stretch = a - 2 * (1 + a) * (theta / 2).sin().square()  # alpha cos theta - 1; in this form a small a keeps its digits
        shear = (1 + b) * phi.sin()  # alpha sin theta
        n, _, h = self.theta.shape
        first, second = rearrange(shear, "... (n two h) -> two ... n h", n=n, two=2)
        signed = rearrange([-first, second], "two ... n h -> ... (n two h)")
        partner = y.unflatten(-1, (n, 2, h)).roll(1, dims=-2).flatten(-3)
        return stretched(y, stretch).addcmul_(signed, partner)
