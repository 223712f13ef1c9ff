"""Which layers a config hits, and the one way to read the weight of a Linear-like layer; quantised.py knows packed ones."""

import gc
import re
import warnings
from collections import Counter
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from .config import AdapterConfig
from .errors import LoraLiteError, LoraLiteWarning, closest, some
from .quantised import dequantised, is_packed

Layer = nn.Linear
"""Type of an adapted layer: nn.Linear, or a module with its attributes (Conv1D, quantised Linears)."""

READERS = (
    "q_proj k_proj v_proj qkv_proj query key value c_attn wq wk wv gate_proj up_proj gate_up_proj fc1 c_fc w1 w3 in_proj"
).split()
WRITERS = "o_proj out_proj down_proj fc2 w2 wo c_proj dense_4h_to_h".split()


def is_conv1d(layer: nn.Module) -> bool:
    """transformers' Conv1D: a Linear whose weight is stored (d_in, d_out)."""
    return type(layer).__name__ == "Conv1D" and type(layer).__module__ == "transformers.pytorch_utils"


def is_linear(layer: nn.Module) -> bool:
    return isinstance(layer, nn.Linear) or is_conv1d(layer)


def sizes(layer: Layer) -> tuple[int, int]:
    """(d_in, d_out)."""
    if is_conv1d(layer):
        return layer.weight.shape[0], layer.weight.shape[1]
    return layer.in_features, layer.out_features


def oriented_weight(layer: Layer) -> Tensor:
    """The weight as (d_out, d_in), a view of the layer's own storage. Raises for packed and for sharded weights."""
    weight = layer.weight
    if hasattr(weight, "full_tensor"):
        raise LoraLiteError(
            f"The weight of {type(layer).__name__} is sharded over processes.",
            expected="Outside the layer's own forward a whole weight is there on a plain model only.",
            fix="ll.save(model, path); ll.load(plain_model, path); ll.merge(plain_model)",
        )
    if is_packed(layer) or type(weight) not in (Tensor, nn.Parameter):
        raise LoraLiteError(
            f"The weight of {type(layer).__name__} is stored as {type(weight).__name__} of {weight.dtype}.",
            expected="A weight of floating-point numbers is needed here.",
            fix="load the model without quantisation",
        )
    return weight.T if is_conv1d(layer) else weight


@torch.no_grad()
def dense_weight(layer: Layer) -> Tensor:
    """A copy of the weight, (d_out, d_in), in float32 (float64 stays), never the weight itself; packed ones dequantised."""
    if is_packed(layer):
        return dequantised(layer)
    weight = oriented_weight(layer)
    return weight.detach().to(torch.promote_types(weight.dtype, torch.float32), copy=True)


class Base:
    """The frozen layer as lent to `forward` for one call: `base(z)` is W z without bias and without hooks.

    z is (..., d_in); the product runs in the dtype of the weight and comes back in the dtype of z. A packed weight is
    dequantised for the call and again for its backward pass, in the dtype of z; what the layer itself does to activations is
    left out, so that base is linear where an int8 layer is not. `base.bias` is (d_out,) or None.
    """

    def __init__(self, layer: Layer):
        self.layer = layer
        self.bias = layer.bias

    def __call__(self, z: Tensor) -> Tensor:
        if is_packed(self.layer):
            if torch.is_grad_enabled() and z.requires_grad:  # a plain product would keep every dense weight until backward
                return checkpoint(self.unpacked, z, use_reentrant=False, preserve_rng_state=False)
            return self.unpacked(z)
        weight = oriented_weight(self.layer)
        return F.linear(z.to(weight.dtype), weight).to(z.dtype)

    def unpacked(self, z: Tensor) -> Tensor:
        return F.linear(z, dense_weight(self.layer).to(z.dtype))


def role(path: str) -> str | None:
    """'reader' or 'writer' of the residual stream by the field's customary names, None if the name does not tell."""
    leaf = path.rpartition(".")[2]
    return "reader" if leaf in READERS else "writer" if leaf in WRITERS else None


def block_index(path: str) -> int | None:
    found = re.search(r"(?:^|\.)(\d+)(?:\.|$)", path)
    return int(found[1]) if found else None


def unwrapped(model: nn.Module) -> nn.Module:
    """The user's own model inside DDP, DataParallel and torch.compile, whose paths are the ones that are saved."""
    while True:
        if isinstance(model, (nn.parallel.DistributedDataParallel, nn.DataParallel)):
            model = model.module
        elif hasattr(model, "_orig_mod"):
            model = cast(nn.Module, model._orig_mod)
        else:
            return model


WRAPPING = re.compile(r"(?:^|(?<=\.))(?:_orig_mod|_checkpoint_wrapped_module|_fsdp_wrapped_module)(?:\.|$)")


def plain(path: str) -> str:
    """The path without the names that torch.compile, checkpoint_wrapper and FSDP put around inner modules."""
    return WRAPPING.sub("", path).removesuffix(".")


def is_compiled(module: nn.Module) -> bool:
    """By torch.compile(module) or module.compile()."""
    return type(module).__name__ == "OptimizedModule" or getattr(module, "_compiled_call_impl", None) is not None


def refuse_wrapped(model: nn.Module) -> None:
    """Raise where hooks would go unseen or processes drift apart: compiled, sharded or replicated models."""
    order = "ll.attach(model, cfg); model = torch.compile(model)  # the same order for fully_shard and DDP"
    for path, module in model.named_modules():
        compiled = is_compiled(module)
        wrapped = type(module).__name__ in ("DistributedDataParallel", "FullyShardedDataParallel")
        if compiled or wrapped:
            raise LoraLiteError(
                f"{path or 'The model'} is {'compiled' if compiled else f'wrapped in {type(module).__name__}'}.",
                expected="Adapters join a plain model: hooks that arrive later are not seen.",
                fix=order,
            )
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        for path, parameter in model.named_parameters():
            if hasattr(parameter, "full_tensor"):
                raise LoraLiteError(f"{path} is sharded (DTensor).", expected="Adapters join a plain model.", fix=order)
        warn_replicated(model)


def warn_replicated(model: nn.Module) -> None:
    """Warn where a DistributedDataParallel around this model is alive: parameters that join now are unknown to it."""
    wrapper = nn.parallel.DistributedDataParallel
    replicas = [found for found in gc.get_objects() if type(found) is wrapper]
    if any(module is model for replica in replicas for module in replica.modules()):
        warnings.warn(
            "A DistributedDataParallel holds this model and does not average gradients of what is attached now. "
            "Wrap it again: replica = DistributedDataParallel(model)",
            LoraLiteWarning,
            stacklevel=5,
        )


def selected(path: str, cfg: AdapterConfig) -> bool:
    """Whether targets, exclude and layers take this path (roles come after, see `find_targets`)."""
    wanted = cfg.targets == "all-linear" or any(re.search(pattern, path) for pattern in cfg.targets)
    spared = any(re.search(pattern, path) for pattern in cfg.exclude)
    return wanted and not spared and (cfg.layers is None or block_index(path) in cfg.layers)


def linears(model: nn.Module) -> dict[str, Layer]:
    return {path: cast(Layer, layer) for path, layer in model.named_modules() if is_linear(layer)}


def inventory(paths: list[str]) -> str:
    """'Linears in this model: q_proj x6, v_proj x6'."""
    counts = Counter(path.rpartition(".")[2] for path in paths)
    return "Linears in this model: " + some([f"{leaf} x{n}" for leaf, n in counts.items()], most=12) + "."


def find_targets(model: nn.Module, cfg: AdapterConfig) -> dict[str, Layer]:
    """{path: layer} of what `attach` would hit, in the model's order; touches nothing.

    Targets are Linear-like modules: nn.Linear, bitsandbytes 4-bit and 8-bit, torchao-quantised Linears, and Conv1D.

    Raises LoraLiteError for a model without Linears, patterns or block indices that match nothing, a layer whose weight is
    read but which is never called (inside nn.MultiheadAttention), and a tied weight that another layer outside the selection
    shares. Warns once where `roles` is set and the role of a layer cannot be told from its name.
    """
    model = unwrapped(model)
    present = linears(model)
    if not present:
        raise LoraLiteError(
            f"{type(model).__name__} has no Linear layers.",
            expected="An adapter needs nn.Linear, Conv1D or a quantised Linear to hang on.",
            found=f"Modules: {some({type(m).__name__ for m in model.modules()})}.",
            fix="ll.attach(the_model_that_holds_them, cfg)",
        )
    patterns = () if cfg.targets == "all-linear" else cfg.targets
    for field, unmatched in (("targets", patterns), ("rank_pattern", cfg.rank_pattern)):
        for pattern in unmatched:
            if not any(re.search(pattern, path) for path in present):
                leaves = {path.rpartition(".")[2] for path in present}
                raise LoraLiteError(
                    f"{field}: {pattern!r} selects no Linear.",
                    expected="Every pattern must match at least one.",
                    found=f"{inventory(list(present))} {closest(pattern.strip('$^'), leaves)}",
                    fix=f"{type(cfg).__name__}({field}={(sorted(leaves)[0],)!r})",
                )
    blocks = {block_index(path) for path in present}
    if missing := sorted(set(cfg.layers or ()) - blocks):  # type: ignore[operator]
        raise LoraLiteError(
            f"layers={cfg.layers}: there is no block {missing[0]}.",
            expected=f"Block indices of this model: {sorted(b for b in blocks if b is not None)}.",
            fix=f"{type(cfg).__name__}(layers=None)  # every block",
        )
    chosen = {path: layer for path, layer in present.items() if selected(path, cfg)}
    if cfg.roles is not None:
        unknown = [path for path in chosen if role(path) is None]
        if unknown:
            warnings.warn(
                f"roles={cfg.roles}: cannot tell whether {some(unknown)} read or write the residual stream; they stay. "
                f"Name the layers with targets=... to choose yourself.",
                LoraLiteWarning,
                stacklevel=3,
            )
        chosen = {path: layer for path, layer in chosen.items() if role(path) in (*cfg.roles, None)}
    if not chosen:
        raise LoraLiteError(
            f"targets={cfg.targets}, exclude={cfg.exclude}, layers={cfg.layers}, roles={cfg.roles} together select no Linear.",
            found=inventory(list(present)),
            fix=f"{type(cfg).__name__}(targets={(list(present)[-1].rpartition('.')[2],)!r}, roles=None)",
        )
    refuse_unused_patterns(model, cfg, chosen)
    chosen = {path: layer for path, layer in chosen.items() if cfg.rank_at(path) != 0}
    if not chosen:
        raise LoraLiteError(
            f"rank_pattern={cfg.rank_pattern} gives every layer rank 0.",
            expected="At least one layer with an adapter.",
            fix=f"{type(cfg).__name__}(rank_pattern={{}})",
        )
    refuse_uncalled(model, chosen)
    refuse_tied(model, chosen)
    return chosen


def refuse_unused_patterns(model: nn.Module, cfg: AdapterConfig, chosen: dict[str, Layer]) -> None:
    """Raise for patterns whose layers other options leave out and for exclusions of nothing; `roles` only reports."""
    before_roles = [path for path in linears(model) if selected(path, cfg)]
    patterns = () if cfg.targets == "all-linear" else cfg.targets
    for field, given, kept in (("targets", patterns, before_roles), ("rank_pattern", cfg.rank_pattern, list(chosen))):
        for pattern in given:
            if not any(re.search(pattern, path) for path in kept):
                raise LoraLiteError(
                    f"{field}: {pattern!r} selects only layers that other options leave out.",
                    found=f"targets={cfg.targets}, exclude={cfg.exclude}, layers={cfg.layers}, roles={cfg.roles}.",
                    fix=f"{type(cfg).__name__}({field}=({pattern!r},), exclude=(), layers=None)",
                )
    paths = [path for path, _ in model.named_modules()]
    for pattern in set(cfg.exclude) - set(AdapterConfig().exclude):
        if not any(re.search(pattern, path) for path in paths):
            raise LoraLiteError(
                f"exclude: {pattern!r} matches no module.",
                expected="Every pattern must match at least one.",
                found=f"{inventory(list(linears(model)))} {closest(pattern, {path.rpartition('.')[2] for path in paths})}",
                fix=f"{type(cfg).__name__}(exclude=())",
            )


def refuse_uncalled(model: nn.Module, chosen: dict[str, Layer]) -> None:
    for path, module in model.named_modules():
        for child in ("out_proj",) if isinstance(module, nn.MultiheadAttention) else ():
            target = f"{path}.{child}".lstrip(".")
            if target in chosen:
                raise LoraLiteError(
                    f"{target} is never called: nn.MultiheadAttention reads its weight.",
                    expected="An adapter acts when the layer is called, so it would have no effect here.",
                    fix=f"exclude=({target!r},)",
                )


def refuse_tied(model: nn.Module, chosen: dict[str, Layer]) -> None:
    """A weight shared with an embedding or a layer outside the selection would be merged into both."""
    others = {id(getattr(module, "weight", None)): p for p, module in model.named_modules() if p not in chosen}
    for path, layer in chosen.items():
        if (other := others.get(id(layer.weight))) is not None:
            raise LoraLiteError(
                f"{path} shares its weight with {other}.",
                expected="An adapter changes one use of a weight, merging would change both.",
                fix=f"exclude=({path!r},)",
            )
