"""HRA: the input passed through a chain of trained Householder reflections, a rotation that changes r directions.

paper     Yuan, Liu, Xu 2024, arXiv:2405.17484, sec. 3.1
code      DaShenZi721/HRA, generation/control/hra.py; huggingface/peft, tuners/hra
formula   W' = W (I + c (Q - I)),  Q = H_0 H_1 ... H_(r-1),  H_k = I - 2 v_k v_k^T / |v_k|^2;  V (r, i) trained, its rows v_k,
          r even, c = coeff. Computed on the input as x' = x - c P^T M P x: the rows of P are u and d = v - u of each adjacent
          pair (u, v) of rows of V scaled to length 1; M (r, r) inverts a matrix of determinant 2^-r, so exists for every V
start     r/2 rows uniform in +-sqrt(2/r), each in two adjacent slots, so that H_k H_(k+1) = I
coeff     moves x in a straight line to Q x; 0.5 stops halfway, inside the sphere of radius |x|; -1 is not the inverse of 1
identity  exact: d = 0, and the entries of M that join u to u are then exactly 0
invariant Q is orthogonal with determinant 1 and rank(W' - W) <= r at every V; |x'| <= |x| for 0 <= c <= 1; lengths and signs
          of the rows of V have no influence
cost      r i trained, none frozen; 2 r i multiply-adds per token, 2 r^2 i + r^3 per call, which without gradients is reused
rate      1e-3: the authors' GLUE scripts, nlu/experiments/glue (8e-4 to 3e-3 by task). No scale
differs   an odd r is refused, it cannot start at the base; no Gram-Schmidt mode, it breaks down where rows start equal; the
          paper's pull towards orthogonal rows is `penalty()`, for the training script to add to its loss
"""

import torch

from ..contract import Adapter, AdapterConfig, Claims, ParamSpec, Specs, dataclass, register
from ..contract.annotations import Float, Literal, Parameter, Tensor
from ..contract.limits import refuse_odd
from ..contract.spec import Shape, uniform
from ..mathematics import add_low_rank, reflections


def equal_pairs(shape: Shape) -> Tensor:
    r, i = shape
    return uniform((2 / r) ** 0.5)((r // 2, i)).repeat_interleave(2, dim=0)


@dataclass(frozen=True, kw_only=True)
class HRAConfig(AdapterConfig):
    alpha: None = None
    rslora: Literal[False] = False
    lr: float = 1e-3


@register
class HRA(Adapter):
    Config = HRAConfig
    claims = Claims(isometry=True, rank=lambda cfg: cfg.r)

    V: Float[Parameter, "r i"]

    @staticmethod
    def param_specs(d_in: int, d_out: int, cfg: HRAConfig) -> Specs:
        refuse_odd("r", cfg.r)
        return {"V": ParamSpec((cfg.r, d_in), equal_pairs)}

    def forward_input(self, x: Float[Tensor, "... i"]) -> Float[Tensor, "... i"]:
        MP, P = self.reuse(self.factors, self.V)
        return add_low_rank(x, x, MP, P.T, -self.coeff)

    def factors(self) -> tuple[Float[Tensor, "r i"], Float[Tensor, "r i"]]:
        """M P and P."""
        P, M = reflections(self.V)
        return M @ P, P

    def penalty(self) -> Float[Tensor, ""]:
        """|U U^T - I|_F^2 over the unit rows U of V: 0 where the rows are orthogonal."""
        U = torch.nn.functional.normalize(self.V, dim=1)
        return (U @ U.T - torch.eye(len(U), dtype=U.dtype, device=U.device)).square().sum()
