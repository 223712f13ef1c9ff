"""Roles: which layers read from the residual stream of their block, and which write to it.

Widths decide: a reader maps from the residual width, a writer to it. Where a layer does both, the field's customary names do.
"""

from collections import Counter

from torch import nn

from ..contract.pattern import any_fits
from ..sites.layer import Layer, sizes
from ..sites.model import block_index

READERS = (
    "q_proj k_proj v_proj qkv_proj query key value c_attn wq wk wv gate_proj up_proj gate_up_proj fc1 c_fc w1 w3 in_proj "
    "query_key_value q k v wi wi_0 wi_1 dense_h_to_4h receptance Wqkv to_q to_k to_v"
).split()
WRITERS = "o_proj out_proj down_proj fc2 w2 wo c_proj dense_4h_to_h output.dense attention.dense o Wo to_out.0".split()
WIDTHS = ("hidden_size", "d_model", "n_embd", "dim", "embed_dim")
INNERS = ("q_b_proj", "kv_b_proj", "kv_b_proj_with_mqa")  # second factors, also where they come to the residual width by chance
INNER = "inner"
"""The role of a layer that neither reads nor writes the residual stream, such as the second factor of a low-rank projection."""


def residual_widths(model: nn.Module, layers: dict[str, Layer], lists: dict[str, list[str]]) -> dict[str, int | None]:
    """{path of a list of blocks, "" outside of any: residual width, None where it cannot be told}.

    The width that the nearest configuration names, where layers have it, else the one that more sides of layers have than any
    other.
    """
    modules = dict(model.named_modules())
    members: dict[str, list[str]] = {}
    for path in layers:
        place = block_index(path, lists)
        members.setdefault(place[0] if place else "", []).append(path)
    found: dict[str, int | None] = {}
    for name, paths in members.items():
        sides = Counter(side for path in paths for side in sizes(layers[path]))
        parts = name.split(".") if name else []
        owners = [modules[".".join(parts[:k])] for k in range(len(parts), -1, -1)]
        configs = [getattr(owner, "config", None) for owner in owners]
        named = [getattr(config, width, None) for config in configs if config is not None for width in WIDTHS]
        (most, count), *rest = sides.most_common(2)
        clear = most if not rest or rest[0][1] < count else None
        found[name] = next((n for n in named if isinstance(n, int) and n in sides), clear)
    return found


def roles(model: nn.Module, layers: dict[str, Layer], lists: dict[str, list[str]]) -> dict[str, str | None]:
    """{path: "reader", "writer", INNER, or None where widths and name do not tell}."""
    widths = residual_widths(model, layers, lists)
    found: dict[str, str | None] = {}
    for path, layer in layers.items():
        place = block_index(path, lists)
        width = widths[place[0] if place else ""]
        reads, writes = (side == width for side in sizes(layer)) if not any_fits(INNERS, path_end(path)) else (False, False)
        if width is None or (reads and writes):
            found[path] = (
                "writer" if any_fits(WRITERS, path_end(path)) else "reader" if any_fits(READERS, path_end(path)) else None
            )
        else:
            found[path] = "reader" if reads else "writer" if writes else INNER
    return found


def path_end(path: str) -> str:
    """The last two names: a layer is called by its own name and, where that says nothing, by its owner's."""
    return ".".join(path.split(".")[-2:])
