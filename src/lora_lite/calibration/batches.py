"""What a batch says: its values by the names of the model's forward, its padding, what may be padding and is not read as such.

`attention_mask` says which tokens count, also to models that take none. The forward's own words are read where they have one
meaning, torch's key_padding_mask (True is padding); of `mask` and `padding_mask` either value may be the padding.
"""

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import LoraLiteError
from .calls import parameters
from .tokens import BESIDE, OWN, Stream, leading, tensors

KEY_PADDING = ("src_key_padding_mask", "key_padding_mask")
WORDS = tuple(name for names in OWN.values() for name in names)


def named(model: nn.Module, batch: Any) -> Any:
    """{name: value} as the forward binds them; the batch itself where positions have no names."""
    if isinstance(batch, Mapping):
        return batch
    known, values = parameters(model), batch if isinstance(batch, tuple) else (batch,)
    names = [name for name, p in known.items() if p.kind is p.POSITIONAL_OR_KEYWORD]
    if len(values) > len(names) or any(p.kind is p.POSITIONAL_ONLY for p in known.values()):
        return batch
    return dict(zip(names, values))


def with_padding(model: nn.Module, fields: Any) -> Any:
    """The fields with the attention_mask that they are known to mean, in the shape of the tokens where it is theirs."""
    if not isinstance(fields, Mapping):
        return fields
    mask, lead = fields.get("attention_mask"), shape_of(fields)
    padding = [name for name in KEY_PADDING if isinstance(fields.get(name), Tensor)]
    if mask is None and len(padding) == 1 and not any(name.startswith("tgt") for name in fields):
        mask = kept(padding[0], fields[padding[0]])
        turned = len(lead) == 2 and mask.shape == lead[::-1]
        if turned and (mask.shape != lead or time_first(model)):
            mask = mask.T
    elif not isinstance(mask, Tensor):
        return fields
    if mask.ndim > 2 and [n for n in mask.shape if n != 1] == [n for n in lead if n != 1]:
        mask = mask.reshape(lead)
    return {**fields, "attention_mask": mask}


def shape_of(fields: Mapping[str, Any]) -> torch.Size:
    """The axes of the tokens: of what is named so, else of the first tensor that is no mask."""
    found = [(name, t) for name, t in tensors(fields) if name not in (*BESIDE, *KEY_PADDING)]
    found.sort(key=lambda one: one[0] not in OWN["source"])
    return leading(*found[0]) if found else torch.Size()


def kept(name: str, padding: Tensor) -> Tensor:
    """The tokens that a mask of torch's attention leaves: False, or 0 of an additive one."""
    tokens = padding == 0
    if not (tokens | (padding.isneginf() if padding.is_floating_point() else padding == 1)).all():
        raise LoraLiteError(
            f"{name} holds numbers that say neither token nor padding.",
            expected="True, or -inf, for padding, and False, or 0, for tokens.",
            fix='batch["attention_mask"] = mask  # 1 for tokens, 0 for padding',
        )
    return tokens


def time_first(model: nn.Module) -> bool:
    said = {one for module in model.modules() if isinstance(one := getattr(module, "batch_first", None), bool)}
    return said == {False}


def unread(fields: Any, streams: Mapping[str, Stream]) -> list[str]:
    """Names of what fits tokens without a mask and could be one."""
    given = fields.get("attention_mask") if isinstance(fields, Mapping) else None
    if given is not None and not isinstance(given, Tensor):
        return ["attention_mask"]
    if streams["source"].mask is not None:
        return []
    shapes = {stream.shape for stream in streams.values() if stream.mask is None and len(stream.shape or ()) == 2}
    values = fields if isinstance(fields, (Mapping, tuple)) else (fields,)
    items = values.items() if isinstance(values, Mapping) else ((f"batch[{k}]", value) for k, value in enumerate(values))
    found = {name: t for name, t in items if isinstance(t, Tensor) and name not in BESIDE}
    masks = [name for name, t in found.items() if may_be_mask(name, t, shapes)]
    if not any(leading(name, t) in shapes for name, t in found.items() if name not in masks):
        masks = masks[1:]  # the first are the tokens
    return [name for name in masks if not bool((found[name] == found[name].flatten()[0]).all())]


def may_be_mask(name: str, t: Tensor, shapes: set[Any]) -> bool:
    fits = t.ndim == 2 and (t.shape in shapes or t.shape[::-1] in shapes)
    return fits and name not in WORDS and not name.endswith("_ids") and bool(((t == 0) | (t == 1) | (t == -torch.inf)).all())


def is_empty(fields: Any) -> bool:
    """Whether a batch holds tensors and no row of them."""
    found = [(name, t) for name, t in tensors(fields) if t.ndim]
    words = [t for name, t in found if name in WORDS] or [t for _, t in found]
    return bool(words) and all(t.numel() == 0 for t in words)


def place(label: str | None, index: int) -> str:
    return f"calibration_data{f'[{label!r}]' if label else ''}[{index}]"


@contextlib.contextmanager
def told(label: str | None, index: int, batch: Any) -> Iterator[None]:
    """Errors name the batch they come from; those of torch or of the model become a LoraLiteError, chained."""
    try:
        yield
    except LoraLiteError as error:
        error.args = (f"{place(label, index)}: {error}",)
        raise
    except (torch.OutOfMemoryError, MemoryError, Warning):  # a warning that the user's filter raises is no failure
        raise
    except Exception as error:
        shown, call = described(batch)
        raise LoraLiteError(
            f"{place(label, index)}, {shown}, does not run through the model ({type(error).__name__}: "
            f"{(str(error).splitlines() or [''])[0]}).",
            expected="A mapping of the forward's keywords, a tuple of its arguments, or a tensor, with the axis of samples.",
            fix=f"batch = list(calibration_data{f'[{label!r}]' if label else ''})[{index}]; {call}  # this call must work",
        ) from error


def described(batch: Any) -> tuple[str, str]:
    """(what a batch is, the call that it stands for)."""

    def one(value: Any) -> str:
        return f"{tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__

    if isinstance(batch, Mapping):
        return "{" + ", ".join(f"{name!r}: {one(value)}" for name, value in batch.items()) + "}", "model(**batch)"
    if isinstance(batch, (tuple, list)):
        return "(" + ", ".join(map(one, batch)) + ")", "model(*batch)"
    return f"a tensor of shape {one(batch)}" if isinstance(batch, Tensor) else f"a {one(batch)}", "model(batch)"
