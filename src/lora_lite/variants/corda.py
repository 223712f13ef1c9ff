"""CorDA: LoRA started on the directions of W that calibration data uses most (ipm) or least (kpm).

paper     Yang et al. 2024, arXiv:2406.05223, sec. 3: SVD(W C) C^-1
code      iboing/CorDA, cordalib/decomposition.py; huggingface/peft, tuners/lora/corda.py
formula   y' = y + c s (B A - B0 A0) x,  A = A0 + dA (r, i),  B = B0 + dB (o, r);  dA, dB trained, s = alpha / r, c = coeff
start     W C = U S V^T with C = E[x x^T] + d I, d = damp E|x|^2 / i (full), or W C^(1/2) = U S V^T (sqrt); of U the r columns
          of largest S (ipm) or smallest (kpm). As S V^T C^-1 = U^T W: B0 = U sqrt(q / s), A0 = U^T W / sqrt(s q), without an
          inverse; q = S, at least 1e-6 of the largest (paper), or the row norms of U^T W (balanced). dA = dB = 0
coeff     scales the update; -1 reverses it
identity  exact: B A - B0 A0 = B dA + dB A0, and dA = dB = 0
invariant rank(W' - W) <= 2r; s B0 A0 = U U^T W, whatever the split, alpha and the scale of the data
cost      r (i + o) trained, as many frozen; 2 r (i + o) multiply-adds per token; at attach i^2 (i > o: o i or o^2) numbers
rate      2e-5 at r = 128 with alpha = r: the authors' tools/train_CorDA.sh
differs   the paper replaces W by W - B0 A0, we subtract the frozen product. Means are over tokens; call_norm: over calls, each
          divided by |max x|, as in PEFT, which also doubles damp for a poor inverse. "sqrt" and "balanced" are ours
"""

import torch

from ..calibration import require_tokens
from ..contract import dataclass, register
from ..contract.annotations import Any, Literal
from ..families.orientation import oriented_left_svd, required
from ..families.twin import Twin, TwinConfig
from ..mathematics import length, lin


@dataclass(frozen=True, kw_only=True)
class CorDAConfig(TwinConfig):
    r: int = 128
    method: Literal["ipm", "kpm"] = "ipm"
    metric: Literal["full", "sqrt"] = "full"
    split: Literal["paper", "balanced"] = "paper"
    damp: float = 0.01
    call_norm: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.damp < 0:
            self.refuse("damp", self.damp, "at least 0")


@register
class CorDA(Twin):
    Config = CorDAConfig

    @staticmethod
    def needs(cfg: Any) -> tuple[str, ...]:
        return required(cfg.metric, cfg.call_norm)

    @staticmethod
    def group_init(adapters: Any, stats: Any, cfg: Any) -> None:
        for path, a in adapters.items():
            r, W, last = a.cfg.r, stats["weight"][path], cfg.method == "kpm"
            require_tokens(stats, path, r, "r directions")
            count = min(W.shape) if last else r  # the floor of the smallest needs the largest
            U, S = oriented_left_svd(cfg.metric, stats, path, W, count, cfg.damp, last, cfg.call_norm)
            U, S = U[:, -r:], S.clamp(min=1e-6 * S[0])[-r:]
            P = lin(W.T, U.T).T
            q = S if cfg.split == "paper" else length(P, 1)
            a.A0.copy_(torch.where(q > 0, q, 1.0).rsqrt()[:, None] * P / a.s**0.5)
            a.B0.copy_(U * (q / a.s).sqrt())
