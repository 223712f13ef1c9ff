"""AntiPaSTO ablation: the trainable form of the directional ablation operator.

paper     Arditi et al. 2024, arXiv:2406.11717, Refusal in Language Models Is Mediated by a Single Direction, eq. 4 and 5
code      andyrdt/refusal_direction (operator); wassname/lora-lite, variants/antipasto_ablate.py (trained direction)
formula   y' = y - c D diag(a) D^T t - (z - sg z), D = orth(U v), t = y (include_bias=False: y - b), c = coeff, sg = no grad;
          z = c D diag(max(wake - a, 0)) D^T t is 0 in value and wakes v, which has no gradient where a = 0;
          U (o, r) frozen, v (r, k) and a (k,) trained, a clamped to [0, 1]
start     a = init_alpha; v by seed_direction: contrast m of the classes' mean outputs (add_contrast: U gets it as a column),
          largest variance of U^T (y - b) (also for columns behind m), random; auto: the first that the data allows
coeff     1 removes D^T y whole where a = 1; below 0 the direction is added and outputs can grow
identity  exact where init_alpha = 0, else at coeff 0 only
invariant for 0 <= c <= 1 no two outputs move apart; components of y outside span(U) stay; rank(W' - W) <= k
cost      k (r + 1) trained, o r frozen; 2 o k multiply-adds per token (4 o k with gradient), o r k + o k^2 per call
rate      5e-3, as antipasto: wassname/lora-lite, justfile; no run of this method is published. No scale
differs   trained, one set per layer, in span(U); the paper extracts one direction for all layers without gradients.
          The reference starts at a = 0.05, has no wake term and spares the bias; its force_targets is roles=None
"""

import torch

from ..contract import Claims, ParamSpec, Specs, dataclass, register
from ..contract.annotations import Any, Float, Literal, Parameter, Tensor
from ..contract.spec import constant
from ..families.seeding import SeededConfig, SeededSubspace, along
from ..mathematics import box, lin, orth


@dataclass(frozen=True, kw_only=True)
class AntiPaSTOAblateConfig(SeededConfig):
    init_alpha: float = 0.0
    wake: float = 0.05
    include_bias: bool = True
    roles: tuple[Literal["reader", "writer"], ...] | None = ("writer",)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.init_alpha <= 1 or not 0 <= self.wake <= 1:
            self.refuse("init_alpha, wake", (self.init_alpha, self.wake), "in [0, 1]")


@register(name="antipasto_ablate")
class AntiPaSTOAblate(SeededSubspace):
    Config = AntiPaSTOAblateConfig
    claims = Claims(contraction=True, rank=lambda cfg: cfg.k, safe_coeff=(0.0, 1.0))

    v: Float[Parameter, "r k"]
    a: Float[Parameter, " k"]
    U: Float[Tensor, "o r"]

    @staticmethod
    def core_specs(cfg: AntiPaSTOAblateConfig) -> Specs:
        return {**SeededSubspace.core_specs(cfg), "a": ParamSpec((cfg.k,), constant(cfg.init_alpha), identity=0)}

    def forward(self, x: Float[Tensor, "... i"], y: Float[Tensor, "... o"], base: Any) -> Float[Tensor, "... o"]:
        t, a, D = self.part(y, base), box(self.a, 0, 1), orth(lin(self.v.T, self.U).T)
        change = along(t, D, self.coeff * a)
        if torch.is_grad_enabled():
            z = along(t.detach(), D, self.coeff * (self.cfg.wake - a.detach()).clamp(min=0))
            change = change + (z - z.detach())
        return y - change
