"""AntiPaSTO rotation: singular values shifted and singular directions rotated in small blocks.

paper     Clark 2026, arXiv:2601.07473, W'(c) = U (S + c dS) R(c) V^T + W_res, R(c) = (I - c X)^-1 (I + c X)
code      wassname/AntiPaSTO; wassname/lora-lite, variants/antipasto_rot.py
formula   y' = y + U delta, h = U^T (y - b), p = h / sigma, U (o, r), sigma_k = |W^T u_k| frozen, d (r,) trained, c = coeff;
          V: delta = sigma N_v p + c d (p + N_v p); U: delta = c d p + N_u^T (h + c d p); both: U on h + V's delta;
          N = R(c) - I in blocks of size b, X = skew(theta)/2 bounded by max_angle, theta_v, theta_u (r/b, b(b-1)/2) trained
start     theta = 0, d = d_init (not 0 for losses even in the angle, which have no gradient there); U by `basis`
coeff     multiplies d and X; R(-c) = R(c)^T, so with d = 0 and one side -1 undoes 1; R(2) is not R(1)^2
identity  exact where d_init = 0, else at coeff 0 only
invariant R is orthogonal; at |c| <= 1 no eigen-angle exceeds max_angle; components of y outside span(U) stay
cost      r + r(b-1)/2 per side trained, o r + r frozen; 2 o r + r b + 4 r multiply-adds per token and side; r/b solves per
          call, which without gradients are reused
differs   the paper turns all r directions at once (block_size=r); the reference leaves c out, caps entries of X, which does not
          cap the angle, and stores theta/4; wassname/AntiPaSTO turns the other way round
"""

from functools import partial

from ..contract import ParamSpec, Specs, dataclass, register
from ..contract.annotations import Float, Literal, Parameter, Tensor
from ..contract.spec import constant
from ..families.subspace import OutputSubspace, SubspaceConfig, angles, floored, rotation
from ..mathematics import block_product, per_value


@dataclass(frozen=True, kw_only=True)
class AntiPaSTORotConfig(SubspaceConfig):
    block_size: int = 4
    rotate: Literal["V", "U", "both"] = "V"
    max_angle: float | None = 0.5
    d_init: float = 0.0


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
        sigma, N = floored(self.sigma), self.reuse(partial(self.shifts, c), *self.thetas().values(), c)
        p = h / sigma
        turned = block_product(p, N["V"].mT) if "V" in N else 0 * p
        delta = sigma * turned + c * self.d * (p + turned)
        return delta + block_product(h + delta, N["U"]) if "U" in N else delta

    def thetas(self) -> dict[str, Float[Parameter, "n m"]]:
        return {side: getattr(self, f"theta_{side.lower()}") for side in "VU" if self.cfg.rotate in (side, "both")}

    def shifts(self, c: float | Tensor) -> dict[str, Float[Tensor, "n b b"]]:
        """N of each side that turns."""
        return {side: rotation(theta, c, self.cfg.block_size, self.cfg.max_angle) for side, theta in self.thetas().items()}
