"""Which rows of an activation belong to which sample: coefficients per sample follow their rows or are refused.

A layer sees a tensor and not the batch. So while adapters hold a coefficient tensor the model's own entry notes the batch of
the call, for the thread that runs it, and every layer compares.
"""

import sys
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import LoraLiteError
from .here import HERE, Call, setting

MAIN = (
    "input_ids", "inputs_embeds", "decoder_input_ids", "decoder_inputs_embeds",
    "pixel_values", "input_features", "input_values",
)  # fmt: skip
"""Keywords of transformers that hold the batch itself."""

ONE_BY_ONE = (
    "for c, sample in zip(coeff.tolist(), samples):  # one coefficient per call\n        ll.scale(model, c); model(sample)"
)


def main_input(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
    """The tensor whose first axis counts the samples of this call; None where no tensor is given."""
    flat: list[Any] = []
    for one in args:
        flat += one.values() if isinstance(one, dict) else one if isinstance(one, (tuple, list)) else (one,)
    flat += [kwargs.get(name) for name in (getattr(model, "main_input_name", ""), *MAIN)]
    tensors = [one for one in (*flat, *kwargs.values()) if isinstance(one, Tensor) and one.ndim]
    return next((one for one in tensors if one.ndim > 1), tensors[0] if tensors else None)


def varied(coeff: Tensor) -> list[int]:
    """The axes along which a coefficient tensor differs."""
    return [axis for axis, size in enumerate(coeff.shape) if size != 1]


class Entry:
    """The hooks of a model whose adapters hold coefficient tensors: they note the call, and refuse what cannot fit."""

    def __init__(self, model: nn.Module):
        self.adapters: list[Any] = []
        self.handles: list[Any] = []
        try:
            self.handles.append(model.register_forward_pre_hook(self.enter, with_kwargs=True))
            self.handles.append(model.register_forward_hook(self.leave, always_call=True))
        except BaseException:  # one without the other would count calls that never end
            self.remove()
            for table in (model._forward_pre_hooks, model._forward_hooks):
                for key in [key for key, hook in table.items() if getattr(hook, "__self__", None) is self]:
                    del table[key]
            raise

    def remove(self) -> None:
        for handle in self.handles:
            handle.remove()

    def enter(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        x = main_input(model, args, kwargs)
        holding = next((a for a in self.adapters if isinstance(setting(a).coeff, Tensor) and a.original is None), None)
        if x is not None and holding is not None and not torch.compiler.is_compiling():
            refuse_call(holding, model, int(x.size(0)))
        sequence = x is not None and x.ndim == (3 if x.is_floating_point() else 2)
        HERE.call = Call(self, sequence, HERE.call)

    def leave(self, model: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        call = HERE.call
        if call is not None and call.entry is self:  # not where `enter` refused
            HERE.call = call.outer


def entries(modules: Iterable[nn.Module]) -> list[Entry]:
    owners = [getattr(hook, "__self__", None) for module in modules for hook in module._forward_pre_hooks.values()]
    return [owner for owner in owners if isinstance(owner, Entry)]


def watch(model: nn.Module, adapters: list[Any], coeff: Any) -> None:
    """Note the calls of this model from the first time that one of the adapters gets a coefficient tensor."""
    if isinstance(coeff, Tensor):
        entry = next(iter(entries([model])), None) or Entry(model)
        known = {id(adapter) for adapter in entry.adapters}
        entry.adapters += [adapter for adapter in adapters if id(adapter) not in known]


def tidy(modules: Iterable[nn.Module]) -> None:
    """Forget adapters that were taken off, and entries of which none is left."""
    for entry in entries(modules):
        entry.adapters = [adapter for adapter in entry.adapters if adapter.handles]
        if not entry.adapters:
            entry.remove()


def generating() -> bool:
    """Whether some model's `generate` waits for this call."""
    frame = sys._getframe(1)
    while frame is not None:
        if frame.f_code.co_name == "generate" and isinstance(frame.f_locals.get("self"), nn.Module):
            return True
        frame = frame.f_back
    return False


def as_code(adapter: Any, text: str) -> str:
    name = adapter.group.name
    return f"ll.scale(model, {text})" if name in ("", "default") else f"ll.scale(model, {text}, name={name!r})"


def refuse_call(adapter: Any, model: nn.Module, batch: int) -> None:
    """Raise LoraLiteError where this call has another number of samples, or `generate` would outgrow one value per token."""
    coeff: Any = setting(adapter).coeff
    axes, size = varied(coeff), len(coeff) if coeff.ndim else 1
    times = batch // size if size and batch % size == 0 else 0
    spread = f".repeat_interleave({times}, 0)" if 0 in axes and times > 1 else ""
    if 1 in axes and generating():
        raise LoraLiteError(
            f"The coefficient tensor has shape {tuple(coeff.shape)}, one value per token, and generate adds tokens.",
            expected="One value per sample.",
            fix=as_code(adapter, f"coeff[:, -1]{spread}") + "  # each sample goes on with that of its last token",
        )
    if 0 not in axes or size == batch:
        return
    found, fix = "", f"model(x[:{size}])  # as many samples as coefficients"
    if times > 1:
        found = "generate repeats each sample for its beams and returned sequences, side by side." if generating() else ""
        fix = as_code(adapter, f"coeff{spread}")
        if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
            fix = (
                "encoded = model.get_encoder()(input_ids=input_ids, attention_mask=attention_mask)\n"
                f"    {fix}\n    model.generate(encoder_outputs=encoded, attention_mask=attention_mask)  # and your arguments"
            )
    elif batch < size:
        fix = as_code(adapter, f"coeff[:{batch}]") + "  # those of the samples in this call"
    raise LoraLiteError(
        f"The coefficient tensor has shape {tuple(coeff.shape)}, and this call {batch} samples.",
        expected="One value per sample.",
        found=found,
        fix=fix,
    )


def aligned(adapter: Any, coeff: Tensor, x: Tensor, z: Tensor) -> Tensor:
    """The coefficient with axes of size 1 up to those of z, the activation that is changed; x is the layer's input.

    Raises LoraLiteError where it does not line up, and where the rows of z need not be the samples in their order.
    """
    shape, axes = tuple(z.shape), varied(coeff)
    if (coeff.ndim >= z.ndim and axes) or any(coeff.shape[axis] != shape[axis] for axis in axes):
        raise LoraLiteError(
            f"The coefficient tensor has shape {tuple(coeff.shape)}.",
            expected=f"It must line up with the leading axes of the activations of {adapter.path or 'the layer'}, {shape}.",
            fix=ONE_BY_ONE,
        )
    if axes and min(axes) < 2:
        refuse_mixed(adapter, coeff, x, shape)
    lead = coeff.shape if axes else ()
    return coeff.to(z.device).reshape(tuple(lead) + (1,) * (z.ndim - len(lead)))


def refuse_mixed(adapter: Any, coeff: Tensor, x: Tensor, shape: tuple[int, ...]) -> None:
    """Raise LoraLiteError where the first axis need not be the batch in its order."""
    call = HERE.call
    if len(shape) > 2:
        if shape[0] == shape[1] and not adapter.batch_leads:
            raise LoraLiteError(
                f"The coefficient tensor has shape {tuple(coeff.shape)}, and the activations of {adapter.path or 'the layer'} "
                f"{shape}: which of their first two axes is the batch cannot be told.",
                expected="A batch whose size is not its length.",
                fix=ONE_BY_ONE,
            )
        return
    picked = x.shape[0] > 1 and x.stride(0) % x.shape[-1] == 0 and x.stride(0) > x.shape[-1]  # one position of each sample
    if not picked and (adapter.behind_router or (call is not None and call.sequence)):
        raise LoraLiteError(
            f"The coefficient tensor has shape {tuple(coeff.shape)}, and {adapter.path or 'the layer'} is given rows "
            f"{shape} that were gathered: which samples they belong to is not known there.",
            expected="Activations with the leading axes of the call.",
            fix=f"{ONE_BY_ONE}\n    # or leave such layers out: exclude=({adapter.path!r},)",
        )


class Ragged:
    """A batch of sequences of their own lengths, as nn.TransformerEncoder makes it of a padded one: its rows in one matrix."""

    def __init__(self, z: Tensor):
        self.jagged: bool = z.layout == torch.jagged
        self.like: Any = z
        self.lengths = (self.like.offsets().diff() if self.jagged else torch.tensor([len(part) for part in z.unbind()])).cpu()

    def flat(self, z: Tensor) -> Tensor:
        """(sum of lengths, n)."""
        return (z.values() if self.jagged else torch.cat(z.unbind())) if z.is_nested else z

    def whole(self, rows: Tensor) -> Tensor:
        """Nested again."""
        if self.jagged:
            return torch.nested.nested_tensor_from_jagged(rows, self.like.offsets())
        return torch.nested.as_nested_tensor(list(rows.split(self.lengths.tolist())), layout=torch.strided)

    def spread(self, adapter: Any, coeff: Tensor) -> Tensor:
        """(sum of lengths, 1) from one value per sample, or one per sample and token of the padded batch."""
        lengths = self.lengths.tolist()
        per_token = coeff.ndim == 2 and coeff.shape[1] >= max(lengths)
        if coeff.shape[0] not in (1, len(lengths)) or not (per_token or coeff.numel() == coeff.shape[0]):
            raise LoraLiteError(
                f"The coefficient tensor has shape {tuple(coeff.shape)}.",
                expected=f"One value for each of the {len(lengths)} samples that {adapter.path or 'the layer'} is given.",
                fix=ONE_BY_ONE,
            )
        values = coeff.expand(len(lengths), coeff.shape[1]) if per_token else coeff.reshape(-1).expand(len(lengths))[:, None]
        rows = [one[:n] if per_token else one.expand(n) for one, n in zip(values, lengths)]
        return torch.cat(rows)[:, None].to(self.like.device)
