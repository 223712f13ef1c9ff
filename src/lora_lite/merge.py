"""The adapted layer as a matrix: delta_weight, merge into the weights, unmerge with every original bit.

No variant has merge code: W' comes from the adapters' own maps on basis vectors, in float64.
"""

import torch
from torch import Tensor, nn

from . import runtime
from .adapter import Adapter
from .errors import LoraLiteError, some
from .quantised import is_packed, parts
from .targets import Layer, dense_weight, is_conv1d, unwrapped

CHUNK = 1024  # basis vectors at once


class DenseBase:
    """`base` for a float64 copy of the weight, with the bias that the caller lends."""

    def __init__(self, W: Tensor, bias: Tensor | None):
        self.W, self.bias = W, bias

    def __call__(self, z: Tensor) -> Tensor:
        return (z.to(self.W.dtype) @ self.W.T).to(z.dtype)


def run(adapters: list[Adapter], base: DenseBase, x: Tensor) -> Tensor:
    """The layer with these adapters, hooks aside: x (n, d_in) -> (n, d_out)."""
    for adapter in adapters:
        if adapter.changes_input():
            x = adapter.forward_input(x).to(x.dtype)
    y = base(x) if base.bias is None else base(x) + base.bias
    for adapter in adapters:
        if adapter.changes_output():
            y = adapter.forward(x, y, base).to(y.dtype)
    return y


@torch.no_grad()
def effective(layer: Layer, adapters: list[Adapter]) -> tuple[Tensor, Tensor, Tensor]:
    """(W', b', W) in float64 of the layer with these adapters at their coefficients: (d_out, d_in), (d_out,)."""
    W = dense_weight(layer).double()
    bias = None if layer.bias is None else layer.bias.detach().double()
    d_in = W.shape[1]
    base = DenseBase(W, None)
    origin = W.new_zeros(1, d_in)
    # Affine maps are linear in (x, y, b) up to a constant: the bias is left out of W' so that no digits cancel.
    constant = run(adapters, base, origin)
    columns = [
        (run(adapters, base, basis) - constant).T for basis in torch.eye(d_in, dtype=W.dtype, device=W.device).split(CHUNK)
    ]
    return torch.cat(columns, dim=1), run(adapters, DenseBase(W, bias), origin)[0], W


def refuse_unmergeable(found: list[runtime.Found]) -> None:
    for f in found:
        if f.adapter.original is not None:
            raise LoraLiteError(f"Adapter {f.name!r} is merged already.", expected="The base weights.", fix="ll.unmerge(model)")
        if "weight" not in dict(f.layer.named_parameters(recurse=False)):
            raise LoraLiteError(
                f"The weight of {f.path} is computed, by a parametrization or weight_norm.",
                expected="Only a weight that is a parameter can be exchanged.",
                fix='torch.nn.utils.parametrize.remove_parametrizations(layer, "weight")  # before ll.attach',
            )
        if not f.adapter.claims.affine:
            raise LoraLiteError(
                f"{f.adapter.variant} at {f.path} is not a linear map of x.",
                expected="Only linear maps have a weight.",
                fix=f"ll.disabled(model, {f.name!r})",
            )
        if isinstance(f.adapter.coeff, Tensor):
            raise LoraLiteError(
                f"{f.path} has a coefficient per sample.",
                expected="A weight has one coefficient.",
                fix="ll.scale(model, 1.0)",
            )


def refuse_packed(found: list[runtime.Found]) -> None:
    if packed := next((f for f in found if is_packed(f.layer)), None):
        raise LoraLiteError(
            f"The weight of {packed.path} is quantised.",
            expected="Rounding the merged weight to its format again would alter it.",
            found=f"It is stored as {parts(packed.layer)[0]}.",
            fix="ll.load(the_model_in_full_precision, path, strict_base=False); ll.merge(the_model_in_full_precision)",
        )


def delta_weight(model: nn.Module, layer_path: str, name: str | None = None) -> Tensor:
    """W' - W (d_out, d_in) in float32, of adapter `name` or of all on that layer, at their coefficients.

    Raises LoraLiteError for a layer without such an adapter and for variants that are not linear maps.
    """
    found = [f for f in runtime.adapters(model, name) if f.path == layer_path]
    if not found:
        raise LoraLiteError(
            f"{layer_path!r} has no adapter.",
            found=f"Adapted layers: {some(dict.fromkeys(f.path for f in runtime.adapters(model)))}.",
            fix="ll.status(model)",
        )
    refuse_unmergeable(found)
    adapted, _, W = effective(found[0].layer, [f.adapter for f in found])
    return (adapted - W).float()


def merge(model: nn.Module, name: str | None = None) -> None:
    """Fold adapter `name`, or all, into new weight storage at the current coefficients; `unmerge` gives the old one back.

    Raises LoraLiteError, before any layer is changed, for variants that are not linear maps, per-sample coefficients, an
    adapter merged already, a quantised layer, and a choice that leaves an adapter of the layer unmerged.
    """
    model = unwrapped(model)
    chosen = runtime.present(model, name)
    by_layer: dict[str, list[runtime.Found]] = {}
    for f in chosen:
        by_layer.setdefault(f.path, []).append(f)
    refuse_unmergeable(chosen)
    refuse_packed(chosen)
    for f in runtime.adapters(model):
        if f.path in by_layer and all(f.adapter is not c.adapter for c in by_layer[f.path]):
            raise LoraLiteError(
                f"{f.path} also carries adapter {f.name!r}.",
                expected="The adapters of a layer act in order and are merged together.",
                fix=f"ll.merge(model)  # or ll.detach(model, {f.name!r}) first",
            )
    new = {path: effective(found[0].layer, [f.adapter for f in found])[:2] for path, found in by_layer.items()}
    for path, (weight, bias) in new.items():
        dtype = by_layer[path][0].layer.weight.dtype
        if not (weight.to(dtype).isfinite().all() and bias.to(dtype).isfinite().all()):
            raise LoraLiteError(f"The merged weight of {path} overflows {dtype}.", fix="model.bfloat16()  # or model.float()")
    try:
        for path, found in by_layer.items():
            swap(found, *new[path])
    except BaseException:
        unmerge(model)
        raise


def swap(found: list[runtime.Found], weight: Tensor, bias: Tensor) -> None:
    """Hang new weight and bias on one layer; its adapters keep the original ones and fall idle."""
    layer = found[0].layer
    dtype = layer.weight.dtype
    for f in found:
        f.adapter.original = (layer.weight, layer.bias)
    layer.weight = nn.Parameter((weight.T if is_conv1d(layer) else weight).to(dtype).contiguous(), requires_grad=False)
    if layer.bias is not None or bias.any():
        layer.bias = nn.Parameter(bias.to(dtype), requires_grad=False)


def unmerge(model: nn.Module) -> None:
    """Put back the original weights, the very same tensors, of every merged layer."""
    for f in runtime.adapters(unwrapped(model)):
        if f.adapter.original is not None:
            f.layer.weight, f.layer.bias = f.adapter.original
            f.adapter.original = None
