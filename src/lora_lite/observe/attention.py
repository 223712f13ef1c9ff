"""Scaled dot-product attention as a model really calls it: recorded references, attention maps, spread of the values.

    with attention.recorded(model) as calls:
        model(**batch)
    maps = attention.maps(calls[0])  # T x S
    trace = attention.value_trace(calls[0])  # without any T x S tensor

Whatever calls torch.nn.functional.scaled_dot_product_attention is recorded, whichever model it belongs to. Eager attention,
nn.MultiheadAttention and fused kernels of other packages do not call it, and leave nothing.
"""

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ..sites.model import plain, unwrapped

FORBIDS = -1e4  # an additive mask at or below it leaves no weight: exp underflows even in float64
SINGLE_CALL = 256  # the widest heads that fused kernels take


@dataclass(frozen=True, eq=False)
class Call:
    """One call of scaled dot-product attention with the very tensors it received, in the graph of the forward.

    layer       path of the module that was running, "" for the model itself
    q           (..., H, T, E) behind rotary embedding; k (..., Hk, S, E); v (..., Hk, S, D)
    mask        None, boolean (True: may attend) or additive, broadcast against (..., H, T, S)
    is_causal   the flag: query t sees keys 0 to t, also where S > T
    scale       of the scores; None means 1 / sqrt(E)
    enable_gqa  Hk divides H, and every key head serves H / Hk queries in a row
    with_grad   gradients were enabled; reentrant checkpointing disables them
    """

    layer: str
    q: Tensor
    k: Tensor
    v: Tensor
    mask: Tensor | None = None
    is_causal: bool = False
    scale: float | None = None
    enable_gqa: bool = False
    with_grad: bool = True


# --- recording --------------------------------------------------------------------------------------------------------


def sdpa_call(
    layer: str,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Call:
    """A Call from the arguments of torch.nn.functional.scaled_dot_product_attention."""
    return Call(layer, query, key, value, attn_mask, is_causal, scale, enable_gqa, torch.is_grad_enabled())


class Recorder(TorchFunctionMode):
    """Notes every call and computes nothing: work done here would be saved for backward a second time by checkpointing."""

    def __init__(self, running: list[str], calls: list[Call]):
        super().__init__()
        self.running, self.calls = running, calls

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention:
            self.calls.append(sdpa_call(self.running[-1] if self.running else "", *args, **kwargs))
        return func(*args, **kwargs)


def follow(module: nn.Module, path: str, running: list[str]) -> list[torch.utils.hooks.RemovableHandle]:
    """Keep the path on top of `running` while the module runs."""

    def enter(module: nn.Module, args: Any) -> None:
        running.append(path)

    def leave(module: nn.Module, args: Any, output: Any) -> None:
        while running and running.pop() != path:
            pass  # a module that left by an exception which the model caught

    return [module.register_forward_pre_hook(enter), module.register_forward_hook(leave)]


@contextlib.contextmanager
def recorded(model: nn.Module) -> Iterator[list[Call]]:
    """The attention calls made inside the block, in their order, as references; on leaving, the model is as it was before.

    What is computed from them belongs behind the block, and so does backward, which would record recomputed layers again.
    A compiled model compiles once more for the block.
    """
    running: list[str] = []
    calls: list[Call] = []
    inner = {plain(path): module for path, module in unwrapped(model).named_modules() if plain(path)}
    hooks = [hook for path, module in inner.items() for hook in follow(module, path, running)]
    try:
        with Recorder(running, calls):
            yield calls
    finally:
        for hook in hooks:
            hook.remove()


# --- computing --------------------------------------------------------------------------------------------------------


def widened(call: Call) -> tuple[Tensor, Tensor, Tensor, Tensor | None, float]:
    """q, k, v in float32 (float64 stays) with as many key heads as query heads, the mask likewise, and the scale."""
    dtype = torch.promote_types(call.q.dtype, torch.float32)
    q, k, v = (x.to(dtype) for x in (call.q, call.k, call.v))
    if call.enable_gqa:
        k, v = (x.repeat_interleave(q.shape[-3] // x.shape[-3], dim=-3) for x in (k, v))
    mask = call.mask
    if mask is not None and mask.dtype != torch.bool:
        mask = mask.to(dtype)
    return q, k, v, mask, call.q.shape[-1] ** -0.5 if call.scale is None else call.scale


def maps(call: Call) -> Tensor:
    """The attention weights w, (..., H, T, S); a query that may see nothing has weights 0, as in the fused kernels."""
    q, k, _, mask, scale = widened(call)
    with torch.autocast(q.device.type, enabled=False):
        scores = scale * q @ k.mT
    if call.is_causal:
        seen = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
        scores = scores.masked_fill(~seen, -torch.inf)
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask
    blind = (scores == -torch.inf).all(-1, keepdim=True)
    return scores.masked_fill(blind, 0.0).softmax(-1).masked_fill(blind, 0.0)


def value_trace(call: Call) -> Tensor:
    """tr Cov_w(v) = E_w |v|^2 - |E_w v|^2 for every query, (..., H, T): how far the values that it sees spread.

    Another attention call with values [v, |v|^2] gives both expectations, in memory linear in T and S. All inputs are padded
    to one width, since fused kernels take nothing else. Values are centred first, which the trace does not notice and rounding
    does: at a common offset of 100 a float32 trace near 1 is off by 1e-3 without.
    """
    q, k, v, mask, scale = widened(call)
    v = v - v.mean(-2, keepdim=True).detach()
    squares = v.square().sum(-1, keepdim=True)
    width = max(q.shape[-1], v.shape[-1] + 1)
    width += -width % 8

    def mean(values: Tensor) -> Tensor:
        """E_w values, (..., H, T, D)."""
        inputs = (F.pad(x, (0, width - x.shape[-1])) for x in (q, k, values))
        out = F.scaled_dot_product_attention(*inputs, attn_mask=mask, is_causal=call.is_causal, scale=scale)
        return out[..., : values.shape[-1]]

    with torch.autocast(q.device.type, enabled=False):
        if width <= SINGLE_CALL:
            first, second = mean(torch.cat([v, squares], -1)).split([v.shape[-1], 1], -1)
        else:
            width = max(q.shape[-1], v.shape[-1])
            first, second = mean(v), mean(squares)
    return (second.squeeze(-1) - first.square().sum(-1)).clamp_min(0)


def value_traces(calls: Sequence[Call]) -> list[Tensor]:
    """`value_trace` of each call. A mask that layers share is widened once for all: attention would make a copy in each call,
    and keep it for backward.
    """
    made: dict[tuple[int, torch.dtype], Tensor | None] = {}
    keys = [(id(call.mask), torch.promote_types(call.q.dtype, torch.float32)) for call in calls]
    for key, call in zip(keys, calls):
        if key not in made:
            made[key] = None if call.mask is None else additive(call.mask, key[1])
    return [value_trace(dataclasses.replace(call, mask=made[key])) for key, call in zip(keys, calls)]


def additive(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """A mask as numbers to add to the scores."""
    if mask.dtype != torch.bool:
        return mask.to(dtype)
    return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill_(~mask, -torch.inf)


def is_causal(call: Call) -> bool:
    """Whether no query sees later keys: the flag is set, or the mask forbids every key s > t + (S - T)."""
    if call.is_causal or call.mask is None:
        return call.is_causal
    allowed = call.mask if call.mask.dtype == torch.bool else call.mask > FORBIDS
    T, S = call.q.shape[-2], call.k.shape[-2]
    return not allowed.expand(*allowed.shape[:-2], T, S).triu(1 + S - T).any()


def causal(calls: Sequence[Call]) -> list[Call]:
    """Those that are causal; a mask that layers share is looked at once."""
    known: dict[tuple[int, bool, int], bool] = {}
    keys = [(id(call.mask), call.is_causal, call.q.shape[-2]) for call in calls]
    for key, call in zip(keys, calls):
        if key not in known:
            known[key] = is_causal(call)
    return [call for key, call in zip(keys, calls) if known[key]]
