"""Recorder: adds up statistics over the calls of the layers; every call's share is added and forgotten."""

import weakref
from collections import Counter, defaultdict
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..contract.here import checkpoints
from ..errors import LoraLiteError, some
from ..mathematics.maps import is_finite
from ..mathematics.spectrum import MOST_ROWS
from ..sites.layer import Layer
from .calls import full_precision
from .enough import TooLittleData
from .scopes import Scopes
from .statistics import APART, Request
from .tokens import as_rows


class Recorder:
    """Adds up the requested statistics over the calls of the layers."""

    def __init__(self, requests: dict[str, Request], scopes: Scopes, saw: Callable[[str, Tensor], None] | None = None):
        self.requests, self.scopes = requests, scopes
        self.saw = saw or (lambda path, y: None)  # told of every output
        self.sums: dict[str, dict[str, Tensor]] = {name: {} for name in requests}
        self.leaders: dict[str, str] = {}  # path -> the first layer that receives the same tensor
        self.wide: dict[str, str] = {}  # leader -> the first layer with its input that has i <= o
        self.holders: dict[str, str | None] = {}  # path -> that layer, None: there was none up to this one
        self.seen: Counter[str] = Counter()  # calls, with and without kept tokens
        self.terms: defaultdict[str | None, float] = defaultdict(float)  # of the losses, by label
        self.weight = 1.0  # of this batch's gradients
        self.label: str | None = None
        self.again = False  # calls are those of the backward pass, which checkpointing repeats
        self.idle = True  # between batches: calls are somebody else's
        self.inputs: dict[tuple[int, int], tuple[weakref.ref[Tensor], str]] = {}  # of this batch, by id and version

    def begin(self, label: str | None, batch: Any) -> None:
        """The coming calls belong to this batch."""
        self.label, self.inputs, self.again, self.idle = label, {}, False, False
        self.scopes.begin(batch)

    def weigh(self, terms: float) -> None:
        """What comes is the backward pass of a mean over so many terms."""
        self.weight, self.again = terms, True
        self.terms[self.label] += terms

    def leader(self, path: str, x: Tensor) -> str:
        """The first layer of this batch that was given this very tensor. Raises where it was another one in earlier batches."""
        key = id(x), 0 if x.is_inference() else x._version  # a tensor that was written to is another input
        seen, found = self.inputs.get(key, (lambda: None, path))
        if seen() is not x:
            found = path
            self.inputs[key] = weakref.ref(x), path
        self.seen[path] += 1
        if self.leaders.setdefault(path, found) != found:
            raise unsteady(path, found if found != path else self.leaders[path])
        return found

    def hook(self, path: str, layer: Layer, module: Any, args: Any, kwargs: Any, y: Tensor) -> Tensor | None:
        return self.observe(path, layer, args, kwargs, y)

    def repeats(self) -> bool:
        """Whether this call is one that checkpointing repeats, which autograd may do in a thread of its own."""
        return self.again and checkpoints()[1] is not None

    def observe(self, path: str, layer: Layer, args: Any, kwargs: Any, y: Tensor) -> Tensor | None:
        """Forward hook of one layer; for wgrad it returns the output that carries the gradient."""
        if self.idle:
            return None
        x = args[0] if args else next(iter(kwargs.values()))
        self.saw(path, y)
        if not self.again:
            leader = self.leader(path, x)
            if x.size(-1) <= y.size(-1):
                self.wide.setdefault(leader, path)
            self.holders.setdefault(path, self.wide.get(leader))
        kept: dict[str, tuple[Tensor, Tensor, Tensor | None]] = {}
        out = y
        for name, request in self.requests.items():
            request = self.at(path, request)
            if request.statistic in APART and request.statistic != "wgrad":
                continue
            if (request.label is not None and request.label != self.label) or self.holder(path, request) != path:
                continue
            if self.again and request.value is not None:  # a gradient may come with the repeated call alone
                continue
            if request.position not in kept:
                kept[request.position] = self.rows(path, layer, x, y, request.position)
            if request.value is not None:
                with full_precision(x.device):
                    self.add(name, path, request.value(*kept[request.position][:2]))
            else:
                out = self.with_gradient(name, path, kept[request.position][0], kept[request.position][2], out)
        return None if out is y else out

    def at(self, path: str, request: Request) -> Request:
        """The request as it is met at this layer."""
        return request if request.narrow is None or self.holders[path] is not None else request.narrow

    def holder(self, path: str, request: Request) -> str:
        """The layer that holds this sum for `path`: of an input the first that received it."""
        if not request.of_input:
            return path
        return (self.leaders[path] if request.narrow is None else self.holders[path]) or path

    def rows(self, path: str, layer: Layer, x: Tensor, y: Tensor, position: str) -> tuple[Tensor, Tensor, Tensor | None]:
        """x and y - b of the tokens that count, (n, i) and (n, o), in float32 or better, and which those are (None: all)."""
        index = self.scopes.index(path, x, position, self.again)
        wide = torch.promote_types(torch.float32, x.dtype)
        kept, seen = (as_rows(z.detach()) for z in (x, y))
        kept, seen = ((z if index is None else z[index]).to(wide) for z in (kept, seen))
        seen = seen if layer.bias is None else seen - layer.bias.detach().to(wide)
        unit = kept.max().abs() if position == "call" and len(kept) else 1
        kept, seen = kept / unit, seen / unit
        if not (kept.isfinite().all() and seen.isfinite().all()):
            raise LoraLiteError(
                f"{path} has activations that are not finite on calibration data.",
                expected="Statistics need finite numbers.",
                fix="model.float()  # or look for overflow in the batches",
            )
        return kept, seen, index

    def with_gradient(self, name: str, path: str, kept: Tensor, index: Tensor | None, y: Tensor) -> Tensor:
        """y as a tensor whose gradient d adds d^T x to the sum: no parameter needs a gradient for that."""
        start = y if y.requires_grad else y.detach().requires_grad_(True)

        def observe(delta: Tensor) -> None:
            d = as_rows(delta)
            d = (d if index is None else d[index]).to(kept.dtype)
            if not d.isfinite().all():
                raise LoraLiteError(
                    f"{path} has gradients that are not finite on calibration data.",
                    expected="A finite loss.",
                    fix="model.float()  # or look for overflow in the batches",
                )
            with full_precision(d.device):
                self.add(name, path, d.T @ kept * self.weight)

        start.register_hook(observe)
        return start.clone()  # a model that writes into the output would take the hook off it

    def add(self, name: str, path: str, value: Tensor) -> None:
        if not is_finite(value):
            raise LoraLiteError(
                f"{path}: its sums over the calibration data ({name}) overflow {str(value.dtype).removeprefix('torch.')}.",
                expected="Inputs and outputs of the layer whose squares stay below 3e38.",
                fix="model.double()  # with batches in float64; or look for outliers in this batch",
            )
        sums = self.sums[name]
        if path not in sums:
            sums[path] = torch.zeros_like(value, dtype=torch.float64)
        for rows, more in zip(sums[path].split(MOST_ROWS), value.split(MOST_ROWS)):
            rows.add_(more)  # torch makes a copy of the summand in float64

    def totals(self, layers: dict[str, Layer]) -> tuple[dict[str, dict[str, Tensor]], list[TooLittleData]]:
        """The sums of all layers, those that share an input with one tensor; and what to raise for layers without one."""
        for path, first in self.leaders.items():
            if self.seen[path] != self.seen[first]:
                raise unsteady(path, first)
        errors: list[TooLittleData] = []
        for name, request in self.requests.items():
            sums = self.sums[name]
            if request.statistic == "terms":
                count = float(sum(n for label, n in self.terms.items() if request.label in (None, label)))
                sums.update({path: torch.tensor([count], dtype=torch.float64) for path in layers})
            if request.statistic in APART and request.statistic != "wgrad":
                continue
            held = {path: self.holder(path, self.at(path, request)) for path in self.leaders}
            sums.update({path: sums[first] for path, first in held.items() if first in sums})
            silent = request.statistic == "wgrad"
            unseen = [path for path in layers if path not in sums or (silent and not sums[path].any())]
            if unseen:
                errors.append(uncalled(unseen, "had no part in the loss" if silent else "were never called"))
            if request.statistic == "n" and (empty := [path for path, n in sums.items() if n.item() == 0]):
                errors.append(without_tokens(name, empty, request.position))
        return self.sums, errors


def uncalled(paths: list[str], done: str) -> TooLittleData:
    return TooLittleData(
        dict.fromkeys(paths, f"{done} on the calibration data"),
        called=False,
        failed=f"{some(paths)} {done} on the calibration data.",
        expected="An adapter acts when its layer is called; a layer that is not cannot be adapted.",
        fix=f"exclude=({paths[0]!r},)",
    )


def without_tokens(name: str, paths: list[str], position: str) -> TooLittleData:
    return TooLittleData(
        dict.fromkeys(paths, "met padding alone"),
        failed=f"{name} is 0 at {paths[0]}: every token is padding" + (", or has label -100." if position == "labels" else "."),
        expected="At least one token that attention_mask keeps.",
        fix="attention_mask = input_ids != pad_token_id",
    )


def unsteady(path: str, other: str) -> LoraLiteError:
    return LoraLiteError(
        f"{path} shares its input with {other} on one call and not on another.",
        expected="The same layers side by side in every call: they hold one sum together.",
        fix=f'exclude=("{path}",)  # or an attach of its own for it',
    )
