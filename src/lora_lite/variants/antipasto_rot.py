"""AntiPaSTO rotation: singular values shifted and singular directions rotated in small blocks.

paper     Clark 2026, arXiv:2601.07473, eq. 6, W'(c) = U (S + c dS) R V^T + W_res; eq. 7, R = (I - cA/2)(I + cA/2)^-1; eq. 8
code      wassname/AntiPaSTO; wassname/lora-lite, variants/antipasto_rot.py
formula   y' = y + U delta, h = U^T (y - b), p = h / sigma, U (o, r), sigma_k = |W^T u_k| frozen, d (r,) trained, c = coeff;
          V: delta = sigma N_v p + c d (p + N_v p); U: delta = c d p + N_u^T (h + c d p); both: U on h + V's delta;
          N = R - I, R = (I - c X)^-1 (I + c X) in blocks of size b; X is skew(theta)/2, the paper's -A/2, whose entries e are
          capped with t = tan(max_angle/2): cap="plane" to t tanh(e/t), "block" to e / sqrt(1 + |X|_F^2 / (2 t^2));
          theta_v, theta_u (r/b, b(b-1)/2) trained; p_k = 0 where sigma_k is rounding of W
start     theta uniform in +-theta_init, d = d_init; U by `basis`
coeff     multiplies d and X; R(-c) = R(c)^T, so with d = 0 and one side -1 undoes 1; R(2) is not R(1)^2
identity  exact where d_init = theta_init = 0. A loss of the product of both directions, as the paper's, is stationary at every
          exact start. Else (basis="svd") |W' - W| <= sides theta_init sqrt(b(b-1)/2) |W| + |d_init| in spectral norms
invariant R is orthogonal; |c| <= 1: no eigen-angle exceeds max_angle ("plane": no plane alone does); y outside span(U) stays
cost      r + r(b-1)/2 per side trained, o r + r frozen; 2 o r + r b + 4 r multiply-adds per token and side; r/b solves per
          call, which without gradients are reused
rate      5e-3, wassname/lora-lite; the paper's table 9 has 1e-3 at r = 128, its code's config.py 2e-3 at r = 64. No scale
differs   theta turns the other way than A; the paper turns all r directions at once (block_size=r), caps planes at pi/3, starts
          off the base (its code); the reference leaves c out and stores theta/4
"""

from dataclasses import field
from functools import partial

from ..contract import ParamSpec, Specs, dataclass, register
from ..contract.annotations import Float, Literal, Parameter, Tensor
from ..contract.spec import constant
from ..families.subspace import OutputSubspace, SubspaceConfig, angles, read_off, rotation
from ..mathematics import block_product, per_value


@dataclass(frozen=True, kw_only=True)
class AntiPaSTORotConfig(SubspaceConfig):
    block_size: int = 4
    rotate: Literal["V", "U", "both"] = "V"
    max_angle: float | None = 0.5
    cap: Literal["block", "plane"] = field(default="block", metadata={"before": "block"})
    d_init: float = 0.0
    theta_init: float = field(default=0.0, metadata={"before": 0.0})


@register(name="antipasto_rot")
class AntiPaSTORot(OutputSubspace):
    Config = AntiPaSTORotConfig

    d: Float[Parameter, " r"]
    theta_v: Float[Parameter, "n m"]
    theta_u: Float[Parameter, "n m"]
    sigma: Float[Tensor, " r"]

    @staticmethod
    def core_specs(cfg: AntiPaSTORotConfig) -> Specs:
        thetas = {f"theta_{side.lower()}": angles(cfg) for side in "VU" if cfg.rotate in (side, "both")}
        d = ParamSpec((cfg.r,), constant(cfg.d_init), identity=0, decay=True)
        return {"d": d, **thetas, "sigma": ParamSpec((cfg.r,), trainable=False)}

    def core(self, h: Float[Tensor, "... r"]) -> Float[Tensor, "... r"]:
        return per_value(self.coeff, h, self.at, values=self.values)

    def at(self, c: float | Tensor, h: Float[Tensor, "... r"]) -> Float[Tensor, "... r"]:
        sigma, N = self.sigma, self.reuse(partial(self.shifts, c), *self.thetas().values(), c)
        p = read_off(h, sigma)
        turned = block_product(p, N["V"].mT) if "V" in N else 0 * p
        delta = sigma * turned + c * self.d * (p + turned)
        return delta + block_product(h + delta, N["U"]) if "U" in N else delta

    def thetas(self) -> dict[str, Float[Parameter, "n m"]]:
        return {side: getattr(self, f"theta_{side.lower()}") for side in "VU" if self.cfg.rotate in (side, "both")}

    def shifts(self, c: float | Tensor) -> dict[str, Float[Tensor, "n b b"]]:
        """N of each side that turns."""
        cfg = self.cfg
        return {side: rotation(theta, c, cfg.block_size, cfg.max_angle, cfg.cap) for side, theta in self.thetas().items()}
