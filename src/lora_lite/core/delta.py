"""What an adapter does to the matrix of its layer: W' and b' whole, or their change as factors of its rank.

No variant has code for this: everything comes from the adapters' own maps on vectors, in float64.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..contract.adapter import Adapter
from ..contract.spec import seeded
from ..errors import LoraLiteError
from ..sites.layer import Layer, dense_weight

CHUNK = 1024  # basis vectors at once
PROBES = 8  # random vectors beyond the rank: half of them find the range, half test it
LOST = 1e-12  # singular values below this share of the largest are rounding


class DenseBase:
    """`base` for a float64 copy of the weight, with the bias that the caller lends."""

    def __init__(self, W: Tensor, bias: Tensor | None):
        self.W, self.bias = W, bias

    def __call__(self, z: Tensor) -> Tensor:
        return (z.to(self.W.dtype) @ self.W.T).to(z.dtype)


def at_rest(module: Any) -> Any:
    """A view of the module in eval mode, with the very same tensors: a map has no random draw, whatever mode it is in."""
    twin = object.__new__(type(module))
    children = {name: child if child is None else at_rest(child) for name, child in module._modules.items()}
    vars(twin).update({**vars(module), "training": False, "_modules": children})
    return twin


def run(adapters: list[Adapter], base: DenseBase, x: Tensor) -> Tensor:
    """The layer with these adapters, hooks aside: x (n, d_in) -> (n, d_out). Those at coefficient 0 do nothing."""
    active = [at_rest(a) for a in adapters if isinstance(a.coeff, Tensor) or a.coeff != 0.0]
    with torch.autocast(x.device.type, enabled=False):
        for adapter in active:
            if adapter.changes_input():
                x = adapter.forward_input(x).to(x.dtype)
        y = base(x) if base.bias is None else base(x) + base.bias
        for adapter in active:
            if adapter.changes_output():
                y = adapter.forward(x, y, base).to(y.dtype)
    return y


def refuse_nonlinear(adapter: Adapter, path: str, fix: str) -> None:
    if not adapter.claims.affine:
        raise LoraLiteError(
            f"{adapter.variant} at {path} is not a linear map of x.",
            expected="Only linear maps have a weight.",
            fix=fix,
        )


def float64(layer: Layer) -> tuple[Tensor, Tensor | None]:
    """Copies of W (d_out, d_in) and b (d_out,) or None."""
    return dense_weight(layer).double(), None if layer.bias is None else layer.bias.detach().double()


@torch.no_grad()
def effective(layer: Layer, adapters: list[Adapter]) -> tuple[Tensor, Tensor, Tensor]:
    """(W', b', W) in float64 of the layer with these adapters at their coefficients: (d_out, d_in), (d_out,)."""
    W, bias = float64(layer)
    base, origin = DenseBase(W, None), W.new_zeros(1, W.shape[1])
    # Affine maps are linear in (x, y, b) up to a constant: the bias is left out of W' so that no digits cancel.
    constant, adapted = run(adapters, base, origin), torch.empty_like(W)
    for start in range(0, W.shape[1], CHUNK):
        basis = W.new_zeros(min(CHUNK, W.shape[1] - start), W.shape[1])
        basis.diagonal(start).fill_(1)
        adapted[:, start : start + CHUNK] = (run(adapters, base, basis) - constant).T
    return adapted, run(adapters, DenseBase(W, bias), origin)[0], W


class Change(NamedTuple):
    """W' - W as left @ right, (d_out, k) and (k, d_in), or as `left` alone, (d_out, d_in); b' - b as bias (d_out,). float64."""

    left: Tensor
    right: Tensor | None
    bias: Tensor

    def dense(self) -> Tensor:
        return self.left if self.right is None else self.left @ self.right


@torch.inference_mode(False)  # `factors` takes derivatives
@torch.no_grad()
def change(layer: Layer, adapter: Adapter) -> Change:
    """The change that one adapter makes at its coefficient, as factors where it claims a rank that makes them the smaller form.

    Raises LoraLiteError for a variant that is not a linear map.
    """
    refuse_nonlinear(adapter, adapter.path, 'll.compose(weights, space="output")  # runs the adapters themselves')
    k = adapter.claims.rank(adapter.cfg) if adapter.claims.rank else None
    if k is not None and smaller_as_factors(k, adapter.d_out, adapter.d_in):
        found = factors(layer, adapter, k)
        if found is not None:
            return found
    adapted, shifted, W = effective(layer, [adapter])
    return Change(adapted - W, None, shifted - (0 if layer.bias is None else layer.bias.detach().double()))


def smaller_as_factors(k: int, d_out: int, d_in: int) -> bool:
    return k * (d_in + d_out) < d_in * d_out


@torch.no_grad()
def factors(layer: Layer, adapter: Adapter, k: int) -> Change | None:
    """The change as factors of rank k, without a dense matrix; None where it is no map of that rank.

    The images of k + 4 random vectors span the range of a change D of rank k, so D = Q (Q^T D) for an orthonormal basis Q of
    them; the rows of Q^T D come from autograd, as derivatives of Q^T D z. Four further vectors test that nothing is missing.
    """
    W, bias = float64(layer)
    base = DenseBase(W, None)
    constant = run([adapter], base, W.new_zeros(1, W.shape[1]))

    def D(z: Tensor) -> Tensor:
        return run([adapter], base, z) - constant - base(z)

    with seeded("probes"):
        probes = torch.randn(k + PROBES, W.shape[1], dtype=torch.float64).to(W.device)
    images = D(probes)
    U, S, _ = torch.linalg.svd(images[: -PROBES // 2].T, full_matrices=False)
    Q = U[:, :k][:, S[:k] > LOST * S[0]]
    with torch.enable_grad():
        z = probes[: Q.shape[1]].clone().requires_grad_()
        (rows,) = torch.autograd.grad((D(z) * Q.T).sum(), z) if Q.shape[1] else (z.detach(),)
    test = slice(-PROBES // 2, None)
    allowed = 1e-9 * images[test].norm() + 1e-14 * base(probes[test]).norm()
    if (images[test] - probes[test] @ rows.T @ Q.T).norm() > allowed:
        return None
    shifted = run([adapter], DenseBase(W, bias), W.new_zeros(1, W.shape[1]))[0]
    return Change(Q, rows, shifted if bias is None else shifted - bias)
