"""AntiPaSTO arrow: a dense block that mixes the first directions of the layer's output, one factor for each of the others.

paper     none for this core; family: Clark 2026, arXiv:2601.07473
code      wassname/lora-lite, variants/antipasto_arrow.py
formula   y' = y + U [c M h_1; ELU(c g) h_2],  h = U^T (y - b), h_1 its first b coordinates, h_2 the others;  M (b, b) and
          g (r - b,) trained, U (o, r) frozen with orthonormal columns, b = block, c = coeff
start     M = 0, g = 0; U by `basis`
coeff     scales the block, multiplies g inside the ELU; at -1 the block reverses and factors below 1 turn above 1
identity  exact: M = 0 and ELU(0) = 0
invariant components of y outside span(U) stay; factors of h_2 are positive, and at most 1 with suppress_only and c >= 0; the
          block has no bound: a unit change of M moves W by the strengths of the first directions
cost      b^2 + r - b trained, o r frozen; 2 o r + b^2 + r multiply-adds per token; one eigendecomposition per layer at attach
rate      5e-3, as antipasto: wassname/lora-lite, justfile; no run of this method is published. No scale
differs   the reference multiplies singular values by I + c M and cuts U U^T W out of the stored weight: the same map. Its block
          is always on the first singular vectors; block_by="score", lr_block and data-driven bases are additions
"""

import torch

from ..contract import ParamSpec, Specs, dataclass, register
from ..contract.annotations import Any, Float, Literal, Parameter, Tensor
from ..families.basis import scores
from ..families.subspace import GainConfig, OutputSubspace, gain
from ..mathematics import lin


@dataclass(frozen=True, kw_only=True)
class AntiPaSTOArrowConfig(GainConfig):
    """block     size of M, 1 to r - 1; None: 8, or r // 2 where that is less
    block_by  with basis="select": M on the first directions in order of singular values, or on those of the largest score
    lr_block  learning rate of M, best below that of g: M multiplies the largest strengths. None: the same
    """

    block: int | None = None
    block_by: Literal["order", "score"] = "order"
    lr_block: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 1 <= self.b < self.r:
            self.refuse("block", self.block, f"1 to r - 1 = {self.r - 1}; r is at least 2")
        if self.lr_block is not None and not self.lr_block > 0:
            self.refuse("lr_block", self.lr_block, "above 0, or None for the learning rate of g")

    @property
    def b(self) -> int:
        return min(8, self.r // 2) if self.block is None else self.block

    def uses(self) -> dict[str, bool]:
        return {**super().uses(), "block_by": self.basis == "select"}


@register(name="antipasto_arrow")
class AntiPaSTOArrow(OutputSubspace):
    Config = AntiPaSTOArrowConfig

    M: Float[Parameter, "b b"]
    g: Float[Parameter, " n"]

    @staticmethod
    def core_specs(cfg: AntiPaSTOArrowConfig) -> Specs:
        g = ParamSpec((cfg.r - cfg.b,), identity=0, decay=True)
        return {"M": ParamSpec((cfg.b, cfg.b), identity=0, decay=True, lr=cfg.lr_block), "g": g}

    @staticmethod
    def basis(cfg: AntiPaSTOArrowConfig, stats: Any, path: str, W: Float[Tensor, "o i"]) -> Float[Tensor, "o r"]:
        U = OutputSubspace.basis(cfg, stats, path, W)
        return U[:, scores(cfg, stats, path, U).argsort(descending=True)] if cfg.block_by == "score" else U

    def core(self, h: Float[Tensor, "... r"]) -> Float[Tensor, "... r"]:
        h_1, h_2 = h[..., : self.cfg.b], h[..., self.cfg.b :]
        return torch.cat([self.coeff * lin(h_1, self.M), gain(self.coeff, self.g, self.cfg.suppress_only) * h_2], dim=-1)
