"""Which layers a config hits."""

import re
import warnings

from torch import nn

from ..contract.config import AdapterConfig
from ..errors import LoraLiteError, LoraLiteWarning, closest, some
from ..sites.layer import Layer
from ..sites.model import block_index, inventory, linears, unwrapped

READERS = (
    "q_proj k_proj v_proj qkv_proj query key value c_attn wq wk wv gate_proj up_proj gate_up_proj fc1 c_fc w1 w3 in_proj"
).split()
WRITERS = "o_proj out_proj down_proj fc2 w2 wo c_proj dense_4h_to_h".split()


def role(path: str) -> str | None:
    """'reader' or 'writer' of the residual stream by the field's customary names, None if the name does not tell."""
    leaf = path.rpartition(".")[2]
    return "reader" if leaf in READERS else "writer" if leaf in WRITERS else None


def selected(path: str, cfg: AdapterConfig) -> bool:
    """Whether targets, exclude and layers take this path (roles come after, see `find_targets`)."""
    wanted = cfg.targets == "all-linear" or any(re.search(pattern, path) for pattern in cfg.targets)
    spared = any(re.search(pattern, path) for pattern in cfg.exclude)
    return wanted and not spared and (cfg.layers is None or block_index(path) in cfg.layers)


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
