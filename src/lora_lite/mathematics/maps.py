"""Linear algebra shared by the variants: pure functions, row form, shapes as einsum letters.

Letters: o outputs, i inputs, r rank, k kept directions, n a count of blocks, b block size, ... leading axes.
Products with activations run in the activations' dtype; factorizations, solves and norms in float32 or better.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import LoraLiteError

MOST_VALUES = 16  # of one coefficient tensor, for maps that are evaluated once per distinct value


# --- products ---------------------------------------------------------------------------------------------------------


def lin(z: Tensor, M: Tensor) -> Tensor:
    """z M^T on the last axis, in the dtype of z: (..., i), (o, i) -> (..., o)."""
    return F.linear(z, M.to(z.dtype))


def low_rank(x: Tensor, A: Tensor, B: Tensor, scale: float | Tensor = 1.0) -> Tensor:
    """B diag(scale) A x: (..., i), (r, i), (o, r) -> (..., o); scale is a number or broadcasts to (..., r)."""
    return lin((lin(x, A) * scale).to(x.dtype), B)


def add_lin(y: Tensor, z: Tensor, M: Tensor, scale: float | Tensor = 1.0) -> Tensor:
    """y + scale M z, the sum inside the product: (..., o), (..., r), (o, r); scale is a number or broadcasts to (..., r).

    Without a temporary of the size of y, and y bit for bit where M is 0.
    """
    return add_products(y, [(z, M)], scale)


def add_products(
    y: Tensor,
    products: list[tuple[Tensor, Tensor]],
    scale: float | Tensor = 1.0,
    stretch: Tensor | None = None,
    bias: Tensor | None = None,
) -> Tensor:
    """y + scale sum_k M_k z_k, products [(z (..., r), M (o, r)), ...], of `stretched(y, stretch, bias)` where given.

    One pass over y: the first sum makes a new tensor, which the others go into.
    """
    if isinstance(scale, Tensor):
        products, scale = [((z * scale).to(z.dtype), M) for z, M in products], 1.0
    if stretch is not None and stretch.ndim > 1:  # one of each sample
        y, stretch = stretched(y, stretch, bias), None
    Y = y.reshape(-1, y.shape[-1])
    new = Y if stretch is None else stretched(Y, stretch, bias)
    for z, M in products:
        Z = z.reshape(-1, z.shape[-1])
        if new.dtype != z.dtype or torch.is_autocast_enabled(y.device.type):  # autocast would round y
            new = new + scale * lin(Z, M)
        elif new is Y:
            new = torch.addmm(Y, Z, M.to(z.dtype).T, alpha=scale)
        else:
            new = new.addmm_(Z, M.to(z.dtype).T, alpha=scale)
    return new.reshape(y.shape)


def add_low_rank(y: Tensor, x: Tensor, A: Tensor, B: Tensor, scale: float | Tensor = 1.0) -> Tensor:
    """y + B diag(scale) A x, as `low_rank` and `add_lin`."""
    return add_lin(y, lin(x, A), B, scale)


class Chain(torch.autograd.Function):
    """`chain`, which keeps x and the matrices for backward and computes what lies between anew."""

    generate_vmap_rule = True

    @staticmethod
    def forward(turn: int, x: Tensor, *Ms: Tensor) -> Tensor:
        return lin(met(x, turn, Ms)[-1], Ms[-1])

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.turn, *tensors = inputs
        ctx.save_for_backward(*tensors)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (x, *Ms), (g,) = ctx.saved_tensors, grads
        with torch.autocast(g.device.type, enabled=False):
            of_matrices: list[Tensor] = []
            for k, (z, M) in reversed(list(enumerate(zip(met(x.to(g.dtype), ctx.turn, Ms), Ms)))):
                of_matrices.insert(0, (g.reshape(-1, g.shape[-1]).T @ z.reshape(-1, z.shape[-1])).to(M.dtype))
                g = g @ M.to(g.dtype)
                g = g.mT if k == ctx.turn else g
        return None, g.to(x.dtype), *of_matrices


def met(x: Tensor, turn: int, Ms: Sequence[Tensor]) -> list[Tensor]:
    """What each matrix of a chain is applied to."""
    found: list[Tensor] = []
    for k in range(len(Ms)):
        z = lin(found[-1], Ms[k - 1]) if k else x
        found.append(z.mT if k == turn else z)
    return found


def chain(x: Tensor, *Ms: Tensor, turn: int = -1) -> Tensor:
    """x M_0^T M_1^T ... on the last axis; backward keeps x and the matrices alone: (..., i), (r, i), (o, r) -> (..., o).

    turn  the number of the matrix before which the last two axes change places; -1: nowhere
    """
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (x, *Ms)):
        return cast(Tensor, Chain.apply(turn, x, *Ms))
    return lin(met(x, turn, Ms)[-1], Ms[-1])  # torch.compile miscounts the arguments of a Function without gradients


def stretched(y: Tensor, g: Tensor, bias: Tensor | None = None) -> Tensor:
    """y + g * (y - b) in one pass over y; g broadcasts to (..., o), and in bfloat16 keeps its digits beside the 1."""
    g = g.to(torch.promote_types(torch.promote_types(g.dtype, y.dtype), torch.float32))
    return y * (1 + g) if bias is None else torch.addcmul(-g * bias, y, 1 + g)


def unit(V: Tensor, dim: int, floor: float, length: float | Tensor = 1.0) -> Tensor:
    """V with each vector v along `dim` as length v / max(|v|, floor), in float32 or better; one pass over V for all of it."""
    V = V.to(torch.promote_types(V.dtype, torch.float32))
    return V * (length / torch.linalg.vector_norm(V, dim=dim, keepdim=True).clamp(min=floor))


def binade(tensor: Tensor) -> float:
    """A power of two near the largest absolute number where squares of such numbers could leave float32, else 1; NaN where one
    is not finite. Dividing by it and multiplying by it again changes no digit.
    """
    if tensor.is_meta:
        return 1.0
    largest = float(torch.linalg.vector_norm(tensor.detach(), math.inf))
    if not math.isfinite(largest):
        return math.nan
    return 1.0 if largest == 0 or 1e-12 < largest < 1e12 else 2.0 ** math.frexp(largest)[1]


def length(V: Tensor, dim: int | None = None) -> Tensor:
    """Norms of the vectors along `dim`, or of all numbers, in their dtype; their squares may leave its range."""
    return torch.linalg.vector_norm(V, dim=dim, dtype=None if binade(V) == 1 else torch.float64).to(V.dtype)


def wide(*tensors: Tensor) -> list[Tensor]:
    """The tensors in float32 or better: what is squared, divided or summed there stays in its range."""
    return [tensor.to(torch.promote_types(tensor.dtype, torch.float32)) for tensor in tensors]


def is_finite(tensor: Tensor) -> bool:
    """Whether every number is: one pass, as a sum is finite only if all are; a sum that overflows is looked at again."""
    return math.isfinite(tensor.sum().item()) or bool(tensor.isfinite().all())


def distinct(coeff: Tensor) -> Tensor | None:
    """The values (k,) other than 0 of a coefficient tensor, in float64 on the CPU: each multiplies as a Python number does.

    None where there are more than 16 values.
    """
    values = coeff.detach().unique().cpu().double()
    return values[values != 0] if len(values) <= MOST_VALUES else None


def per_value(
    coeff: float | Tensor,
    z: Tensor,
    change: Callable[[Any, Tensor], Tensor],
    at_zero: Tensor | None = None,
    values: Tensor | None = None,
) -> Tensor:
    """`change(c, z)` for a float; for a tensor of coefficients, once per distinct value, each sample taking its own.

    For maps that are not linear in the coefficient, such as the Cayley transform. coeff: aligned with z, last axes 1; c is a
    number or a tensor without axes; at_zero: the result where coeff is 0, None: zeros; values: `distinct(coeff)` where it is
    known already, which a compiled graph needs: it has one pass per value and cannot count them itself.
    Raises LoraLiteError above 16 distinct values, and for a coefficient that is to be trained: values have no gradient.
    """
    if not isinstance(coeff, Tensor):
        return change(coeff, z)
    if coeff.requires_grad:
        raise LoraLiteError(
            "The coefficient tensor requires a gradient.",
            expected="This variant evaluates its map once per value, and values carry no gradient.",
            fix="coeff = coeff.detach()",
        )
    values = distinct(coeff) if values is None else values
    if values is None:
        raise LoraLiteError(
            f"The coefficient tensor holds {len(coeff.unique())} distinct values.",
            expected=f"This variant evaluates its map once per value and takes at most {MOST_VALUES}.",
            fix="coeff = (coeff * 8).round() / 8",
        )
    out = torch.zeros_like(z) if at_zero is None else at_zero
    for value in values:
        out = torch.where(coeff == value, change(value, z), out)
    return out


def without_bias(y: Tensor, bias: Tensor | None) -> Tensor:
    """y - b, (..., o)."""
    return y if bias is None else y - bias


# --- bounded strengths ------------------------------------------------------------------------------------------------


class Box(torch.autograd.Function):
    """clamp(p, lo, hi) whose gradient is cut only where a descent step would leave the box."""

    generate_vmap_rule = True

    @staticmethod
    def forward(p: Tensor, lo: float, hi: float) -> Tensor:
        return p.clamp(lo, hi)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        p, ctx.lo, ctx.hi = inputs
        ctx.save_for_backward(p)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        (p,), (g,) = ctx.saved_tensors, grads
        outward = ((p <= ctx.lo) & (g > 0)) | ((p >= ctx.hi) & (g < 0))
        return torch.where(outward, 0.0, g), None, None


def box(p: Tensor, lo: float, hi: float) -> Tensor:
    """p held in [lo, hi]; a plain clamp has no gradient outside, so a parameter pushed out would never come back."""
    return Box.apply(p, lo, hi)
