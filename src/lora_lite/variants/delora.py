"""DeLoRA: unit rank-one directions, and one trained strength that bounds the whole update.

paper     Bini, Girrbach, Akata 2025, arXiv:2503.18225
code      ExplainableML/DeLoRA; huggingface/peft, tuners/delora
formula   W' = W + c (lam/r B^ A^ - lam0/r B0^ A0^) diag(w);  A (r, i), B (o, r), lam (1) trained, A0, B0, lam0 frozen,
          c = coeff; A^ has the rows of A and B^ the columns of B, each v divided by max(|v|, 1e-4);
          w (i) = norms of W's columns (norm="column") or |W|_F everywhere ("fro"). start="zero_b": no frozen term
start     A uniform in +-1/sqrt(i), B in +-1/sqrt(r), lam = lambda0; A0, B0, lam0 equal in every bit; zero_b: B = 0
coeff     scales the update; 0.5 halves it, -1 reverses it
identity  exact: with lam/r inside B^, B^ A^ - B0^ A0^ = B^ (A^ - A0^) + (B^ - B0^) A0^, both brackets 0; zero_b: B = 0
invariant |(W' - W) diag(1/w)|_F <= |c| (|lam| + |lam0|), zero_b: |c lam|; row and column lengths above 1e-4 do not matter
cost      r (i + o) + 1 trained, r (i + o) + 1 + i frozen (zero_b: i); 2 r (i + o) multiply-adds per token (zero_b: half)
rate      1e-3 with lambda0 = 15: PEFT's method_comparison (MetaMathQA). The paper's Llama 2 (app. B) has lambda0 = 8, lr =
          1e-2, lr_lambda = 5e-3
differs   w is |W|_F in the paper, column norms in its code and PEFT (our default). lam0 is frozen as in eq. 9; the authors'
          code takes the trained lam in both terms. zero_b is PEFT's start: the floor of 1e-4 makes B's first gradient 1e4 times
          too large, and the first step jumps to full strength. Nothing decays
"""

import torch

from ..contract import Adapter, AdapterConfig, Claims, ParamSpec, Specs, dataclass, register
from ..contract.annotations import Any, Float, Literal, Parameter, Tensor
from ..contract.spec import constant, kaiming, zeros
from ..mathematics import add_low_rank, length, unit

FLOOR = 1e-4  # of the length that a vector is divided by


@dataclass(frozen=True, kw_only=True)
class DeLoRAConfig(AdapterConfig):
    r: int = 16
    alpha: None = None
    rslora: Literal[False] = False
    lambda0: float = 15.0
    start: Literal["frozen_copy", "zero_b"] = "frozen_copy"
    norm: Literal["column", "fro"] = "column"
    lr: float = 1e-3
    lr_lambda: float | None = None  # of lam; None: lr

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, value in {"lambda0": self.lambda0, "lr_lambda": self.lr_lambda}.items():
            if value is not None and not 0 < value < float("inf"):
                self.refuse(name, value, "a finite number above 0")


@register
class DeLoRA(Adapter):
    Config = DeLoRAConfig
    claims = Claims(rank=lambda cfg: cfg.r * (2 if cfg.start == "frozen_copy" else 1))

    A: Float[Parameter, "r i"]
    B: Float[Parameter, "o r"]
    lam: Float[Parameter, "1"]
    A0: Float[Tensor, "r i"]
    B0: Float[Tensor, "o r"]
    lam0: Float[Tensor, "1"]
    w: Float[Tensor, " i"]

    @staticmethod
    def param_specs(d_in: int, d_out: int, cfg: DeLoRAConfig) -> Specs:
        copied = cfg.start == "frozen_copy"
        specs = {"A": ParamSpec((cfg.r, d_in), kaiming), "B": ParamSpec((d_out, cfg.r), kaiming if copied else zeros)}
        specs["lam"] = ParamSpec((1,), constant(cfg.lambda0), lr=cfg.lr_lambda)
        frozen = {f"{name}0": ParamSpec(spec.shape, trainable=False) for name, spec in specs.items() if copied}
        return specs | frozen | {"w": ParamSpec((d_in,), trainable=False)}

    def init(self, W: Float[Tensor, "o i"]) -> None:
        self.w.copy_(length(W, 0 if self.cfg.norm == "column" else None))
        if self.cfg.start == "frozen_copy":
            for trained, frozen in ((self.A, self.A0), (self.B, self.B0), (self.lam, self.lam0)):
                trained.copy_(frozen.copy_(trained))  # both hold what the dtype of the buffer can hold

    def forward(self, x: Float[Tensor, "... i"], y: Float[Tensor, "... o"], base: Any) -> Float[Tensor, "... o"]:
        A, B = unit(self.A, 1, FLOOR), unit(self.B, 0, FLOOR, self.lam / self.cfg.r)
        if self.cfg.start == "zero_b":
            return add_low_rank(y, x, A * self.w, B, self.coeff)
        A0, B0 = unit(self.A0, 1, FLOOR), unit(self.B0, 0, FLOOR, self.lam0 / self.cfg.r)
        return add_low_rank(y, x, torch.cat([A - A0, A0]) * self.w, torch.cat([B, B - B0], dim=1), self.coeff)
