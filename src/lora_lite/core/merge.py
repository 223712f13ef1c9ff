"""The adapted layer as a matrix: delta_weight, delta_bias, merge into the weights, unmerge with every original bit.

No variant has merge code: W' and b' come from the adapters' own maps on basis vectors (delta.py).
"""

import warnings

import torch
from torch import Tensor, nn

from ..contract.adapter import Adapter
from ..contract.attachment import Original
from ..errors import LoraLiteError, LoraLiteWarning, some
from ..mathematics.maps import is_finite
from ..sites.layer import Layer, is_conv1d
from ..sites.model import unwrapped
from ..sites.obstacles import computing, tied
from ..sites.offloaded import REMOVE, is_offloaded
from ..sites.quantised import is_packed, parts
from . import finding
from .atomic import atomic
from .delta import effective, refuse_nonlinear
from .quiet import quiet
from .rounding import MergeReport, refuse_lossy


def refuse_unmergeable(found: list[finding.Found]) -> None:
    for f in found:
        if f.adapter.original is not None:
            raise LoraLiteError(f"Adapter {f.name!r} is merged already.", expected="The base weights.", fix="ll.unmerge(model)")
        if "weight" not in dict(f.layer.named_parameters(recurse=False)):
            raise LoraLiteError(
                f"The weight of {f.path} is computed, by a parametrization or weight_norm.",
                expected="Only a weight that is a parameter can be exchanged.",
                fix=computing(f.layer, f.path),
            )
        if is_offloaded(f.layer):
            raise LoraLiteError(
                f"accelerate exchanges the weight of {f.path} around each call, and would put the base's back.",
                expected="Weights in memory.",
                fix=REMOVE,
            )
        if bad := [key for key, tensor in f.adapter.tensors().items() if not is_finite(tensor)]:
            raise LoraLiteError(
                f"Adapter {f.name!r} at {f.path} holds numbers that are not finite: {some(bad)}.",
                expected="Finite numbers: no dtype of the weights mends them.",
                fix=f"ll.detach(model, {f.name!r}); ll.load(model, path)  # of the last good checkpoint",
            )
        refuse_nonlinear(f.adapter, f.path, "ll.save(model, path)  # it is kept, and runs, as an adapter")
        if isinstance(f.adapter.coeff, Tensor):
            raise LoraLiteError(
                f"{f.path} has a coefficient per sample.",
                expected="A weight has one coefficient.",
                fix="ll.scale(model, 1.0)",
            )


def delta_weight(model: nn.Module, layer_path: str, name: str | None = None) -> Tensor:
    """W' - W (d_out, d_in) in float32, of adapter `name` or of all on that layer, at their coefficients.

    Raises LoraLiteError for a layer without such an adapter and for variants that are not linear maps.
    """
    layer, adapters = on_layer(model, layer_path, name)
    adapted, _, W = effective(layer, adapters)
    return (adapted - W).float()


def delta_bias(model: nn.Module, layer_path: str, name: str | None = None) -> Tensor:
    """b' - b (d_out,) in float32, of adapter `name` or of all on that layer, at their coefficients; b = 0 where there is none.

    Raises LoraLiteError for a layer without such an adapter and for variants that are not linear maps.
    """
    layer, adapters = on_layer(model, layer_path, name)
    _, shifted, _ = effective(layer, adapters)
    return (shifted - (0 if layer.bias is None else layer.bias.detach().double())).float()


def on_layer(model: nn.Module, layer_path: str, name: str | None) -> tuple[Layer, list[Adapter]]:
    """The layer at that path and its adapters, of that name or all."""
    found = [f for f in finding.adapters(model, name) if f.path == layer_path]
    if not found:
        raise LoraLiteError(
            f"{layer_path!r} has no adapter.",
            found=f"Adapted layers: {some(dict.fromkeys(f.path for f in finding.present(model, name)))}.",
            fix="ll.status(model)",
        )
    refuse_unmergeable(found)
    return found[0].layer, [f.adapter for f in found]


def refuse_packed(found: list[finding.Found], dense: bool | torch.dtype) -> None:
    for f in found:
        if is_packed(f.layer) and not dense:
            raise LoraLiteError(
                f"The weight of {f.path} is quantised.",
                expected="Rounding the merged weight to its format again would alter it.",
                found=f"It is stored as {parts(f.layer)[0]}.",
                fix="ll.merge(model, dense=True)  # a dense layer in its place, until ll.unmerge(model)",
            )
        if is_packed(f.layer) and "forward" in vars(f.layer):
            raise LoraLiteError(
                f"The forward of {f.path} was replaced by another library, and reads a quantised weight.",
                expected="A layer that runs its own forward.",
                fix="accelerate.hooks.remove_hook_from_module(model, recurse=True)  # where it was accelerate",
            )


@atomic
@torch.inference_mode(False)  # what it makes outlives the caller's inference mode
def merge(
    model: nn.Module, name: str | None = None, *, dense: bool | torch.dtype = False, limit: float | None = None
) -> MergeReport:
    """Fold adapter `name`, or all, into new weight storage at the current coefficients; `unmerge` gives the old one back.

    limit  the largest share of a layer's change that rounding to its dtype may lose; None: any, the report says which
    dense  what becomes of a quantised layer: False refuses it, a dtype makes it a dense Linear of that dtype until `unmerge`,
           True takes the dtype of its weight, where that is packed in integers that of the model's first dense parameter

    Beside the old weights, which are kept, memory holds the new ones in their own dtype and one layer at a time in float64.
    Raises LoraLiteError, before any layer is changed, for variants that are not linear maps, per-sample coefficients, an
    adapter merged already or with numbers that are not finite, a quantised or offloaded layer, a choice that leaves an adapter
    of the layer unmerged, and a loss above `limit`.
    """
    model = unwrapped(model)
    chosen = finding.present(model, name)
    refuse_tied(model, chosen)
    by_layer: dict[str, list[finding.Found]] = {}
    for f in chosen:
        by_layer.setdefault(f.path, []).append(f)
    finding.refuse_lost(chosen)
    finding.refuse_sharded(chosen)
    refuse_unmergeable(chosen)
    refuse_packed(chosen, dense)
    for f in finding.adapters(model):
        if f.path in by_layer and all(f.adapter is not c.adapter for c in by_layer[f.path]):
            raise LoraLiteError(
                f"{f.path} also carries adapter {f.name!r}.",
                expected="The adapters of a layer act in order and are merged together.",
                fix=f"ll.merge(model)  # or ll.detach(model, {f.name!r}) first",
            )
    new: dict[str, tuple[Tensor, Tensor | None]] = {}
    lost: dict[str, float] = {}
    for path, found in by_layer.items():
        layer = found[0].layer
        dtype = dense if isinstance(dense, torch.dtype) and is_packed(layer) else dense_dtype(model, layer)
        *new[path], lost[path] = merged(path, layer, [f.adapter for f in found], dtype)  # type: ignore[assignment]
    report = MergeReport(lost, {path: weight.dtype for path, (weight, _) in new.items()})
    refuse_lossy(report, limit)
    with quiet(model):
        for path, found in by_layer.items():
            swap(found, *new[path])
    return report


def refuse_tied(model: nn.Module, chosen: list[finding.Found]) -> None:
    """Raise for layers that share a weight: merged they would hold two, and a file of the model has room for one."""
    shared = tied(model)
    if f := next((f for f in chosen if f.path in shared), None):
        raise LoraLiteError(
            f"{f.path} shares its weight with {some(shared[f.path])}.",
            expected="A weight of its own for each layer: merging would end the tie, and adapters differ.",
            fix="ll.save(model, path)  # it is kept, and runs, as an adapter",
        )


def dense_dtype(model: nn.Module, layer: Layer) -> torch.dtype:
    """Of the layer's weight, or of the model's first dense parameter where the weight is packed in integers."""
    if layer.weight.is_floating_point():
        return layer.weight.dtype
    own = (p for m in model.modules() if not isinstance(m, Adapter) for p in m.parameters(recurse=False))
    return next((p.dtype for p in own if p.is_floating_point()), torch.get_default_dtype())


def merged(path: str, layer: Layer, adapters: list[Adapter], dtype: torch.dtype) -> tuple[Tensor, Tensor | None, float]:
    """W' in that dtype, as the layer stores its weight, b' or None where there is neither a bias nor a change of it, and the
    share of the change that rounding loses.
    """
    exact, shifted, W = effective(layer, adapters)
    before = torch.zeros_like(shifted) if layer.bias is None else layer.bias.detach().double()
    weight = exact.to(dtype)
    bias = shifted.to(dtype if layer.bias is None or is_packed(layer) else layer.bias.dtype)
    if not (weight.isfinite().all() and bias.isfinite().all()):
        raise LoraLiteError(f"The merged weight of {path} overflows {dtype}.", fix="model.bfloat16()  # or model.float()")
    change = torch.hypot((exact - W).norm(), (shifted - before).norm())
    rounding = torch.hypot((weight.double() - exact).norm(), (bias.double() - shifted).norm())
    share = float(rounding / change) if change > 0 else 0.0
    stored = (weight.T if is_conv1d(layer) else weight).contiguous()
    return stored, bias if layer.bias is not None or shifted.any() else None, share


def swap(found: list[finding.Found], weight: Tensor, bias: Tensor | None) -> None:
    """Hang new weight and bias on one layer; its adapters keep the original ones and fall idle."""
    layer = found[0].layer
    new = nn.Parameter(weight, requires_grad=False)
    for f in found:
        f.adapter.original = Original(layer.weight, layer.bias, type(layer), (new, new._version))
    if is_packed(layer) and type(layer).forward is not nn.Linear.forward:
        layer.__class__ = nn.Linear  # the layer's own forward reads packed weights only
    layer.weight = new
    if bias is not None:
        layer.bias = nn.Parameter(bias, requires_grad=False)


@atomic
def unmerge(model: nn.Module) -> None:
    """Put back the original weights, the very same tensors, of every merged layer."""
    with quiet(unwrapped(model)):
        put_back(finding.adapters(unwrapped(model)))


def put_back(found: list[finding.Found]) -> None:
    """The original weights of these layers; `found` holds all merged adapters of each of them."""
    warn_overwritten(found)
    for f in found:
        if f.adapter.original is not None:
            f.layer.__class__ = f.adapter.original.kind
            f.layer.weight, f.layer.bias = f.adapter.original[:2]
            f.adapter.original = None


def warn_overwritten(found: list[finding.Found]) -> None:
    """Warn where somebody wrote into merged weights: what comes back is what stood there before the merge."""
    lost = [
        f.path
        for f in found
        if (o := f.adapter.original) is not None and (f.layer.weight is not o.merged[0] or o.merged[0]._version != o.merged[1])
    ]
    if lost:
        warnings.warn(
            f"The merged weights of {some(dict.fromkeys(lost))} were written to or exchanged since ll.merge, which is lost: "
            "those from before it come back. Load other weights of the base after ll.unmerge(model).",
            LoraLiteWarning,
            stacklevel=4,
        )
