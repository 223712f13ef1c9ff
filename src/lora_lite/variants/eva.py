"""EVA: LoRA whose A starts on the principal directions of a layer's inputs, with ranks where these explain most.

paper     Paischer, Hauzenberger et al. 2024, arXiv:2410.07170, sec. 3, algorithm 1
code      ml-jku/EVA, src/svd.py; huggingface/peft, tuners/lora/eva.py
formula   y' = y + c s B A x;  A (r_l, i), B (o, r_l) trained, r_l the rank of layer l, s = alpha / r (rslora: sqrt r), coeff c
start     C = E[x x^T] - E[x] E[x]^T, eigenvalues q_1 >= q_2 ...: A = r_l leading eigenvectors as rows, B = 0; r_l counts layer
          l's q_k / tr(C), k <= rho r, among the r L largest of all L layers
coeff     scales the update; 0.5 halves it, -1 reverses it
identity  exact: B = 0
invariant rank(W' - W) <= r_l, sum r_l = r L; at the start A A^T = I and E|x - E[x]|^2 off A's rows is the sum of the other q_k
cost      r_l (i + o) trained, none frozen; r_l (i + o) multiply-adds per token; at attach i^2 (sketched: 4 rho r i) numbers
rate      5e-4 with alpha = 1 at r = 16: the authors' README and train.py, as PEFT's examples/eva_finetuning
differs   exact moments, the limit of the codes' incremental SVD; A does not decay; s is the same in all layers with rslora too
"""

from dataclasses import replace

from ..contract import Adapter, AdapterConfig, Claims, ParamSpec, Specs, dataclass, register
from ..contract.annotations import Any, Float, Literal, Parameter, Tensor
from ..contract.limits import refuse_rank
from ..families.principal import dealt, directions, principal, required
from ..mathematics import add_low_rank


@dataclass(frozen=True, kw_only=True)
class EVAConfig(AdapterConfig):
    """rho: 1 for equal ranks. center: take E[x] E[x]^T off. mask: labels drops label -100. max_moment_dim: C up to this i."""

    r: int = 16
    alpha: float | None = 1.0
    rho: float = 2.0
    adjust_alpha: bool = True
    center: bool = True
    mask: Literal["labels", "none"] = "labels"
    max_moment_dim: int = 8192
    lr: float = 5e-4

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.rho < 1 or self.max_moment_dim < 0:
            self.refuse("rho or max_moment_dim", min(self.rho, self.max_moment_dim), "at least 1 or 0")

    def for_layer(self, path: str) -> "EVAConfig":
        layer = super().for_layer(path)
        keep = layer.r == self.r or not self.adjust_alpha
        return layer if keep else replace(layer, alpha=self.s * (layer.r**0.5 if self.rslora else layer.r))


@register
class EVA(Adapter):
    Config = EVAConfig
    claims = Claims(rank=lambda cfg: cfg.r)

    A: Float[Parameter, "r i"]
    B: Float[Parameter, "o r"]

    @staticmethod
    def param_specs(d_in: int, d_out: int, cfg: EVAConfig) -> Specs:
        refuse_rank(cfg.r, d_in, d_out)
        return {"A": ParamSpec((cfg.r, d_in)), "B": ParamSpec((d_out, cfg.r), identity=0, decay=True)}

    @staticmethod
    def needs(cfg: EVAConfig) -> tuple[str, ...]:
        return required(max([cfg.rho * cfg.r, *cfg.rank_pattern.values()]), cfg.max_moment_dim, cfg.mask == "labels")

    @staticmethod
    def ranks(adapters: Any, stats: Any, cfg: EVAConfig) -> dict[str, int]:
        most = {path: min(round(cfg.rho * cfg.r), a.d_in, a.d_out) for path, a in adapters.items()}
        shares = {p: principal(adapters[p].needs(cfg), stats, p, k, cfg.center)[1] for p, k in most.items()}
        return dealt(shares, cfg.r)

    @staticmethod
    def group_init(adapters: Any, stats: Any, cfg: EVAConfig) -> None:
        for path, a in adapters.items():
            V, q = directions(a.needs(cfg), stats, path, a.cfg.r, cfg.center)
            a.A.copy_(V.T)
            a.report["explained"] = float(q.sum())

    def forward(self, x: Float[Tensor, "... i"], y: Float[Tensor, "... o"], base: Any) -> Float[Tensor, "... o"]:
        return add_low_rank(y, x, self.A, self.B, self.coeff * self.s)
