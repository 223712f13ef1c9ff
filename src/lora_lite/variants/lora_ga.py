"""LoRA-GA: LoRA started so that its first step moves W as a step of full fine-tuning would, as far as rank 2r can.

paper     Wang, Yu, Li 2024, arXiv:2407.05000, theorems 3.1 and 3.2, algorithm 1
code      Outsider565/LoRA-GA, peft/src/peft/tuners/lora/layer.py; huggingface/peft, tuners/lora/layer.py and loraga.py
formula   y' = y + c s (B A - B0 A0) x,  A = A0 + dA (r, i),  B = B0 + dB (o, r);  dA, dB trained, c = coeff,
          s = alpha / sqrt(r) (rslora=False: alpha / r)
start     G = dLoss/dW = U S V^T summed over the terms of all batches' mean losses, however rows are cut into batches, at
          tokens that attention_mask keeps, its 2r leading triples: A0 = k V^T of r of them, B0 = k U of the other r,
          k = o^(1/4) / sqrt(gamma); dA = dB = 0
coeff     scales the update; 0.5 halves it, -1 reverses it
identity  exact: B A - B0 A0 = B dA + dB A0, and dA = dB = 0
invariant rank(W' - W) <= 2r; W is never written. From the start one step of plain SGD of rate t gives W' - W = -t s^2 k^2 G_2r
          up to terms in t^2, G_2r the best approximation of G of rank 2r. The start does not depend on the loss's scale
cost      r (i + o) trained, as many frozen; 2 r (i + o) multiply-adds per token; at attach a backward pass per batch without
          weight gradients, o i numbers and one SVD per layer
rate      2e-5 with r = 8, alpha = 16 and rslora: the paper's Llama 2 runs; its code's examples have r = 32, alpha = 8
differs   paper and code replace W by W - s B0 A0, we subtract the frozen product. PEFT gives A0 no k and B0 the singular values
          of G besides, so that its start depends on the loss's scale: scale="peft_stable"
"""

from dataclasses import field

from ..calibration import Loss, require_tokens
from ..contract import Specs, dataclass, register
from ..contract.annotations import Any, Literal
from ..families.twin import Twin, TwinConfig
from ..mathematics import left_svd, orth


@dataclass(frozen=True, kw_only=True)
class LoRAGAConfig(TwinConfig):
    """direction: the triples that A0 and B0 take: the first half and the second, the reverse, or the odd and the even ones.

    scale    stable: k as above; unit: k = 1; gd: k = 1/s; peft_stable: A0 without k, B0 = k U S with S of the mean over terms
    loss_fn  (model, batch) -> scalar, or (mean, number of its terms); None: output.loss, else of logits the
             next token's cross-entropy, else random signs
    """

    r: int = 8
    alpha: float | None = 16.0
    rslora: bool = True
    gamma: float = 16.0
    direction: Literal["ArB2r", "A2rBr", "ArBr"] = "ArB2r"
    scale: Literal["stable", "unit", "gd", "peft_stable"] = "stable"
    loss_fn: Loss | None = field(default=None, compare=False, metadata={"transient": True})

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.gamma > 0 or (self.scale in ("unit", "gd") and self.gamma != 16):
            self.refuse("gamma", self.gamma, 'above 0, and read by scale="stable" and "peft_stable" alone')


@register(name="lora_ga")
class LoRAGA(Twin):
    Config = LoRAGAConfig

    @staticmethod
    def param_specs(d_in: int, d_out: int, cfg: Any) -> Specs:
        if 2 * cfg.r > min(d_in, d_out):
            cfg.refuse("r", cfg.r, f"at most {min(d_in, d_out) // 2} here: A0 and B0 take 2 r singular vectors of the gradient")
        return Twin.param_specs(d_in, d_out, cfg)

    @staticmethod
    def needs(cfg: Any) -> tuple[str, ...]:
        return ("n", "wgrad", "terms") if cfg.scale == "peft_stable" else ("n", "wgrad")

    @staticmethod
    def group_init(adapters: Any, stats: Any, cfg: Any) -> None:
        for path, a in adapters.items():
            r, G = a.cfg.r, stats["wgrad"][path]
            require_tokens(stats, path, 2 * r, "2 r singular vectors of the gradient")
            U, S = left_svd(G, 2 * r, "auto")
            V = orth(G.T @ U)  # V S, up to signs; they do not matter, as A0 and B0 have no triple in common
            first, second, odd, even = slice(r), slice(r, 2 * r), slice(1, None, 2), slice(0, None, 2)
            of_A, of_B = {"ArB2r": (first, second), "A2rBr": (second, first), "ArBr": (odd, even)}[cfg.direction]
            k = {"unit": 1.0, "gd": 1 / a.s}.get(cfg.scale, a.d_out**0.25 / cfg.gamma**0.5)
            peft = cfg.scale == "peft_stable"
            a.A0.copy_(V[:, of_A].T * (1.0 if peft else k))
            a.B0.copy_(U[:, of_B] * k * (S[of_B] / stats["terms"][path] if peft else 1.0))
