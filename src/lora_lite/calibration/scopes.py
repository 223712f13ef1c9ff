"""Scopes: which tokens of a batch a layer sees, told by where it stands and by what the modules around it are called with.

encoder, decoder  get_encoder() and get_decoder() give two trees of modules; layers of the decoder that are given the encoder's
                  own output, by identity, see the tokens of the encoder (cross-attention)
another tower     a module that is called with a tensor of the batch that holds no tokens, such as pixel_values
experts           a module that is called with some rows of what a module around it or beside its list was called with: rows
                  are found again by their bits; equal rows are told apart by their order, which does for sums
elsewhere         the shape decides. What follows no mask is counted whole, and `whole` names it
"""

import weakref
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import LoraLiteError
from .calls import of_this_thread
from .gathered import hashes, match, ranked
from .tokens import BESIDE, NOWHERE, OWN, Stream, follows, last_of, leading, streams, tensors, whole

Ref = weakref.ref[Tensor]


class Scopes:
    """Made for one measurement, which calls `remove` at its end; `begin` before each batch."""

    def __init__(self, model: nn.Module, paths: Iterable[str], positions: Iterable[str]):
        self.positions = set(positions)
        self.whole: dict[str, str] = {}  # path -> the mask that does not follow
        self.encoder, self.decoder = towers(model)
        self.active, self.streams = False, {"source": NOWHERE, "target": NOWHERE}
        self.given: dict[int, tuple[Tensor, bool]] = {}  # of this batch, by id: tensor, whether it is of tokens
        self.reset()
        modules = dict(model.named_modules())
        around = {path[:cut]: None for path in paths for cut, letter in enumerate(path) if letter == "."}
        self.beside = {
            path: [f"{parent}.{name}".lstrip(".") for name, _ in modules[parent].named_children()]
            for path in around
            if isinstance(modules.get(path), (nn.ModuleList, nn.ModuleDict))
            for parent in (path.rpartition(".")[0],)
        }
        around.update({path: None for paths in self.beside.values() for path in paths})
        self.handles = [
            modules[path].register_forward_pre_hook(
                of_this_thread(lambda _, args, kwargs, path=path: self.enter(path, args, kwargs)), with_kwargs=True
            )
            for path in around
            if path in modules
        ]
        if self.encoder:
            left = of_this_thread(lambda _, args, output: self.leave(output))
            self.handles.append(modules[self.encoder].register_forward_hook(left))

    def remove(self) -> None:
        for handle in self.handles:
            handle.remove()

    def reset(self) -> None:
        self.entered: dict[str, Ref] = {}  # path -> the first tensor that its module was last called with
        self.foreign: set[str] = set()
        self.memory: list[Ref] = []
        self.known: dict[tuple, Tensor] = {}  # indices, by what they follow from
        self.hashes: dict[int, tuple[Ref, Tensor, Tensor]] = {}
        self.found: tuple[Ref, Ref, Tensor | None] | None = None

    def begin(self, batch: Any) -> None:
        self.reset()
        self.streams = streams(batch, bool(self.encoder))
        self.active = any(stream.drops(position) for stream in self.streams.values() for position in self.positions)
        own = {name for names in OWN.values() for name in names}
        shape = self.streams["source"].shape
        self.given = {
            id(t): (t, name in (*own, *BESIDE) or (shape is not None and leading(name, t) == shape))
            for name, t in tensors(batch)
            if self.active and name and not self.streams["source"].misfit
        }

    def enter(self, path: str, args: Any, kwargs: Any) -> None:
        """Before the call of a module around layers."""
        if not self.active:
            return
        passed = [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)]
        if not passed:
            return
        self.entered[path] = weakref.ref(passed[0])
        if path == self.decoder and isinstance(memory := kwargs.get("encoder_hidden_states"), Tensor):
            self.memory.append(weakref.ref(memory))
        mine = [self.given[id(t)][1] for t in passed if id(t) in self.given]
        if id(passed[0]) in self.given and not any(mine):
            self.foreign.add(path)

    def leave(self, output: Any) -> None:
        """After the call of the encoder."""
        parts = output.values() if isinstance(output, dict) else output if isinstance(output, (tuple, list)) else (output,)
        self.memory += [weakref.ref(part) for part in parts if isinstance(part, Tensor)]

    def stream(self, path: str, x: Tensor) -> Stream:
        """That of this call of the layer at `path`."""
        if self.foreign and any(path.startswith(f"{tower}.") for tower in self.foreign):
            return NOWHERE
        source, target = self.streams["source"], self.streams["target"]
        if not self.encoder or path.startswith(f"{self.encoder}.") or any(seen() is x for seen in self.memory):
            return source
        if path.startswith(f"{self.decoder}.") or follows(x.shape[:-1], target):
            return target
        return source if follows(x.shape[:-1], source) else target

    def index(self, path: str, x: Tensor, position: str, again: bool = False) -> Tensor | None:
        """Which of the flattened tokens of x count, (n,); None: all. `again`: the call repeats one of this batch."""
        if not self.active:
            return None
        if x.is_nested:
            return self.nested(x, position)
        last = (path, position, x.shape)
        if not again or last not in self.known:
            self.known[last] = self.rows(path, x, position)
        index = self.known[last]
        return None if len(index) == x.shape[:-1].numel() else index

    def nested(self, x: Tensor, position: str) -> Tensor | None:
        """Which of the rows of a nested tensor count: its parts are the tokens of each sample, without padding."""
        lengths = torch.tensor([len(part) for part in x.unbind()], device=x.device)
        held = torch.arange(int(lengths.max()), device=x.device) < lengths[:, None]
        labels = self.streams["source"].counted(position) if position == "labels" else None
        if labels is not None and labels.ndim == 2 and len(labels) == len(held) and labels.shape[1] >= held.shape[1]:
            return labels.to(x.device)[:, : held.shape[1]][held].nonzero()[:, 0]
        return last_of(held)[held].nonzero()[:, 0] if position == "last" else None

    def rows(self, path: str, x: Tensor, position: str) -> Tensor:
        stream, lead = self.stream(path, x), x.shape[:-1]
        mask = stream.counted(position)
        asked = self.streams["source"] if stream is NOWHERE else stream
        if stream.misfit:
            raise misfit(path, x, stream.misfit)
        if mask is not None and mask is stream.labels and stream.shape is not None and mask.numel() != stream.shape.numel():
            raise misfit(path, x, f"labels of shape {tuple(mask.shape)} must cover the same tokens.")
        if follows(lead, stream):
            key = (id(mask), stream.shape, position)
            if key not in self.known:
                self.known[key] = flat(mask, stream.shape, position, x).nonzero()[:, 0]
            return self.known[key]
        every = torch.arange(lead.numel(), device=x.device)
        if not asked.drops(position):
            return every
        rows = None if stream is NOWHERE else self.gathered(path, x, stream)
        if rows is not None and not pooled(rows, stream):
            return flat(mask, stream.shape, position, x)[rows].nonzero()[:, 0]
        drops = asked.counted("" if position == "last" else position)
        if drops is not None and not drops.all():
            self.whole[path] = "attention_mask" if position != "labels" or asked.labels is None else "labels"
        if position != "last":
            return every
        samples = None if asked.shape is None else asked.shape[0]
        if len(lead) > 1 and samples in (None, lead[0]):  # sequences of its own
            return last_of(torch.ones(lead, dtype=torch.bool, device=x.device)).reshape(-1).nonzero()[:, 0]
        if lead.numel() == samples:
            return every
        raise LoraLiteError(
            f"{path} sees activations of shape {tuple(x.shape)}, and the batch does not say where its rows end.",
            expected='positions="last" takes the last token of each row.',
            found=f"The batch's tokens have the shape {asked.shape and tuple(asked.shape)}.",
            fix=f'positions="all"  # or exclude=("{path}",), or attention_mask of shape (rows, tokens) in the batch',
        )

    def gathered(self, path: str, x: Tensor, stream: Stream) -> Tensor | None:
        """Where in the flattened stream each row of x comes from, (n,); None where that cannot be told."""
        inner, n = x, x.shape[:-1].numel()
        cuts = [cut for cut, letter in enumerate(path) if letter == "."]
        for cut in reversed(cuts):
            around = self.entered.get(path[:cut], lambda: None)()
            if around is None:
                near = (self.entered.get(other, lambda: None)() for other in self.beside.get(path[:cut], ()))
                around = next((t for t in near if t is not None and follows(t.shape[:-1], stream)), None)
                if around is None or around.shape[-1] != inner.shape[-1]:
                    continue
            if follows(around.shape[:-1], stream):
                return self.matched(inner, around) if around.shape[-1] == inner.shape[-1] else None
            if around.shape[:-1].numel() != n:
                return None
            inner = around
        return None

    def matched(self, inner: Tensor, outer: Tensor) -> Tensor | None:
        if self.found is not None and self.found[0]() is inner and self.found[1]() is outer:
            return self.found[2]
        known = self.hashes.get(id(outer))
        if known is None or known[0]() is not outer:
            known = self.hashes[id(outer)] = weakref.ref(outer), *ranked(hashes(outer))
        rows = match(hashes(inner), *known[1:])
        self.found = weakref.ref(inner), weakref.ref(outer), rows
        return rows


def pooled(rows: Tensor, stream: Stream) -> bool:
    """Whether there is one row of each sequence, in order: a sample's, not a token's."""
    assert stream.shape is not None
    each = rows // stream.shape[-1]
    return len(stream.shape) > 1 and torch.equal(each, torch.arange(stream.shape[:-1].numel(), device=each.device))


def flat(mask: Tensor | None, shape: torch.Size | None, position: str, x: Tensor) -> Tensor:
    """The mask of what counts, (n,), on the device of x."""
    assert shape is not None
    mask = whole(shape, x.device) if mask is None else mask.to(x.device)
    return (last_of(mask) if position == "last" else mask).reshape(-1)


def misfit(path: str, x: Tensor, expected: str) -> LoraLiteError:
    what = expected.partition(" ")[0]
    return LoraLiteError(
        f"{path} sees activations of shape {tuple(x.shape)}.",
        expected=expected,
        fix=f'exclude=("{path}",)  # or {what} of shape (samples, tokens) in the batches',
    )


def towers(model: nn.Module) -> tuple[str, str]:
    """The paths of encoder and decoder, empty where these are not two modules beside each other."""
    found = [getattr(model, name)() for name in ("get_encoder", "get_decoder") if callable(getattr(model, name, None))]
    paths = {id(module): path for path, module in model.named_modules()}
    if len(found) != 2 or any(paths.get(id(module), "") == "" for module in found):
        return "", ""
    encoder, decoder = (paths[id(module)] for module in found)
    nested = f"{encoder}.".startswith(f"{decoder}.") or f"{decoder}.".startswith(f"{encoder}.")
    return ("", "") if nested else (encoder, decoder)
