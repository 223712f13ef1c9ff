"""PiSSA: a low-rank update that starts on the leading singular triples of W itself.

paper     Meng, Wang, Zhang 2024, arXiv:2404.02948, sec. 3
code      MuLabPKU/PiSSA; huggingface/peft, tuners/lora (init_lora_weights="pissa")
formula   y' = y + c s (B A - B0 A0) x,  A = A0 + dA,  B = B0 + dB;  dA (r, i), dB (o, r) trained, s = alpha / r, c = coeff
start     W = U S V^T: B0 = U_r (S_r/s)^(1/2), A0 = (S_r/s)^(1/2) V_r^T, so s B0 A0 is W's best rank-r part; dA = dB = 0
coeff     scales the update; 0.5 halves it, -1 reverses it
identity  exact however inaccurate the SVD: B A - B0 A0 = B dA + dB A0 and dA = dB = 0
invariant rank(W' - W) <= 2r; the base weight is never written; the change does not depend on the bias
cost      r (i + o) trained, the same again frozen; 2 r (i + o) multiply-adds per token; one SVD per layer at attach
rate      2e-5 with alpha = r: PEFT's examples/pissa_finetuning, by the paper's authors
differs   the paper stores W - s B0 A0 in the base and trains A, B; here the frozen product is subtracted instead, so the base
          stays W after detach, and what is trained (and decays) is the deviation. svd="fast" checks what is left
          of each singular triple, or takes the exact SVD with a warning; PEFT's fast SVD checks nothing
"""

from ..contract import dataclass, register
from ..contract.annotations import Float, Literal, Tensor
from ..families.twin import Twin, TwinConfig
from ..mathematics import left_svd


@dataclass(frozen=True, kw_only=True)
class PiSSAConfig(TwinConfig):
    """svd: see `spectrum.left_svd`; tol: share of the captured |W|^2 that a fast SVD may lose."""

    svd: Literal["exact", "fast", "auto"] = "auto"
    tol: float = 1e-3

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.tol > 0 or (self.svd == "exact" and self.tol != 1e-3):
            self.refuse("tol", self.tol, 'above 0, and read by svd="fast" and "auto" alone', 'svd="fast"')


@register
class PiSSA(Twin):
    Config = PiSSAConfig

    def init(self, W: Float[Tensor, "o i"]) -> None:
        U, S = left_svd(W, self.cfg.r, self.cfg.svd, tol=self.cfg.tol)
        # Directions that W lacks would divide by 0; the floor leaves the product U U^T W as it is.
        root = (self.s * S.clamp(min=1e-6 * float(S[0]) or 1.0)).sqrt()
        self.B0.copy_(U * root / self.s)
        self.A0.copy_((U / root).T @ W)
