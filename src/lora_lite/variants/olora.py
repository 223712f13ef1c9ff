"""OLoRA: a low-rank update that starts on an orthonormal basis of W's first columns.

paper     Büyükakyüz 2024, arXiv:2406.01775
code      huggingface/peft, tuners/lora (init_lora_weights="olora")
formula   y' = y + c s (B A - B0 A0) x,  A = A0 + dA,  B = B0 + dB;  dA (r, i), dB (o, r) trained, s = alpha / r, c = coeff
start     W = Q R (QR): B0 = Q_r, the first r columns of Q, A0 = R_r, the first r rows of R; dA = dB = 0. The first r columns
          of W alone determine Q_r, and R_r = Q_r^T W, so no more than these columns is factored
coeff     scales the update; 0.5 halves it, -1 reverses it
identity  exact whatever the factors: B A - B0 A0 = B dA + dB A0 and dA = dB = 0
invariant rank(W' - W) <= 2r; the base weight is never written; the change does not depend on the bias
cost      r (i + o) trained, the same again frozen; 2 r (i + o) multiply-adds per token; at attach o r^2 + r o i per layer
rate      3e-4 with alpha = r/2: PEFT's examples/olora_finetuning
differs   the paper stores W - s B0 A0 in the base and trains A, B; here the frozen product is subtracted instead, and what is
          trained (and decays) is the deviation. As in the paper the start depends on the order of the input channels, and s
          does not enter it: with alpha other than r the part of W that moves is s B0 A0
"""

import torch

from ..contract import dataclass, register
from ..contract.annotations import Float, Tensor
from ..families.twin import Twin, TwinConfig


@dataclass(frozen=True, kw_only=True)
class OLoRAConfig(TwinConfig):
    alpha: float | None = 8.0
    lr: float = 3e-4


@register
class OLoRA(Twin):
    Config = OLoRAConfig

    def init(self, W: Float[Tensor, "o i"]) -> None:
        Q = torch.linalg.qr(W[:, : self.cfg.r]).Q
        self.B0.copy_(Q)
        self.A0.copy_(Q.T @ W)
