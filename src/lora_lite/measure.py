"""measure: stream calibration data through the base model and add up the statistics that calibrate.py names.

Activations are never kept: every call's share is added and forgotten.
"""

import contextlib
import warnings
import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .calibrate import Request, Stats, Weights, kept_rows, labelled, parse
from .errors import LoraLiteError, LoraLiteWarning, some
from .quantised import as_stored, keep_trainable
from .spec import seeded
from .spectrum import MOST_ROWS
from .targets import Layer

Loss = Callable[[nn.Module, Any], Tensor]


def measure(model: nn.Module, layers: dict[str, Layer], wanted: Iterable[str], data: Any, loss_fn: Loss | None = None) -> Stats:
    """Stream the data once through the base model; {name: {path: sum}} in float64 for the wanted statistics.

    data     batches, or {"positive": batches, "negative": batches}; a batch is a mapping (whose attention_mask drops padding),
             a tuple or a tensor.
    loss_fn  (model, batch) -> scalar, for wgrad; None: see `default_loss`
    Raises LoraLiteError, naming the layer, for no batches, a layer that was never called, non-finite activations or gradients,
    a mask that does not fit, and a loss without a gradient.
    """
    requests = {name: parse(name) for name in wanted}
    parts = labelled(data)
    for name, request in requests.items():
        if request.label is not None and request.label not in parts:
            raise LoraLiteError(
                f"The statistic {name} needs labelled calibration data.",
                found="The batches carry no labels.",
                fix='calibration_data={"positive": batches, "negative": other_batches}',
            )
    gradients = any(request.statistic == "wgrad" for request in requests.values())
    recorder = Recorder(requests)
    handles = [
        layer.register_forward_hook(
            lambda _, args, kwargs, y, path=path: recorder.observe(path, layers[path], args, kwargs, y), with_kwargs=True
        )
        for path, layer in layers.items()
    ]
    handles += keep_trainable(model)
    try:
        with evaluating(model, gradients), as_stored(model):
            for label, batches in parts.items():
                count = 0
                for batch in batches:
                    batch = on_device(model, batch)
                    recorder.begin(label, batch)
                    if gradients:
                        loss = (loss_fn or default_loss)(model, batch)
                        recorder.again = True
                        backward(loss)
                    else:
                        call(model, batch)
                    count += 1
                if count == 0:
                    raise LoraLiteError(
                        f"calibration_data{f'[{label!r}]' if label else ''} is empty.",
                        expected="At least one batch.",
                        fix="calibration_data=[batch, ...]  # a list, not a generator that was read before",
                    )
    finally:
        for handle in handles:
            handle.remove()
    return {**recorder.totals(layers), "weight": Weights(layers)}


class Recorder:
    """Adds up the requested statistics over the calls of the layers."""

    def __init__(self, requests: dict[str, Request]):
        self.requests = requests
        self.sums: dict[str, dict[str, Tensor]] = {name: {} for name in requests}
        self.leaders: dict[str, str] = {}  # path -> the first layer that receives the same tensor
        self.wide: dict[str, str] = {}  # leader -> the first layer with its input that has i <= o
        self.holders: dict[str, str | None] = {}  # path -> that layer, None: there was none up to this one
        self.seen: Counter[str] = Counter()  # calls, with and without kept tokens
        self.label: str | None = None
        self.again = False  # calls are those of the backward pass, which checkpointing repeats
        self.masks: dict[str, tuple[Tensor | None, str]] = {}
        self.inputs: list[tuple[weakref.ref[Tensor], int, str]] = []  # of this batch: tensor, its version, path

    def begin(self, label: str | None, batch: Any) -> None:
        """The coming calls belong to this batch."""
        fields = batch if isinstance(batch, Mapping) else {}
        mask, labels = fields.get("attention_mask"), fields.get("labels")
        self.label, self.inputs, self.again = label, [], False
        self.masks = {"": (mask, "attention_mask"), "labels": (mask, "attention_mask")}
        if isinstance(labels, Tensor):
            counted = labels != -100
            if mask is not None and mask.numel() == labels.numel():  # else of samples, or of a decoder's tokens
                counted &= mask.bool().reshape(labels.shape)
            self.masks["labels"] = counted, "labels"

    def leader(self, path: str, x: Tensor) -> str:
        """The first layer of this batch that was given this very tensor. Raises where it was another one in earlier batches."""
        version = 0 if x.is_inference() else x._version  # a tensor that was written to is another input
        found = next((p for seen, before, p in self.inputs if seen() is x and before == version), path)
        self.inputs.append((weakref.ref(x), version, path))
        self.seen[path] += 1
        if self.leaders.setdefault(path, found) != found:
            raise unsteady(path, found if found != path else self.leaders[path])
        return found

    def observe(self, path: str, layer: Layer, args: Any, kwargs: Any, y: Tensor) -> Tensor | None:
        """Forward hook of one layer; for wgrad it returns the output that carries the gradient."""
        x = args[0] if args else next(iter(kwargs.values()))
        if not self.again:
            leader = self.leader(path, x)
            if x.shape[-1] <= y.shape[-1]:
                self.wide.setdefault(leader, path)
            self.holders.setdefault(path, self.wide.get(leader))
        kept: dict[str, tuple[Tensor, Tensor]] = {}
        out = y
        for name, request in self.requests.items():
            request = self.at(path, request)
            if (request.label is not None and request.label != self.label) or self.holder(path, request) != path:
                continue
            if self.again and request.value is not None:  # a gradient may come with the repeated call alone
                continue
            if request.position not in kept:
                kept[request.position] = self.rows(path, layer, x, y, request.position)
            if request.value is not None:
                with full_precision(x.device):
                    self.add(name, path, request.value(*kept[request.position]))
            else:
                out = self.with_gradient(name, path, kept[request.position][0], x.shape, out)
        return None if out is y else out

    def at(self, path: str, request: Request) -> Request:
        """The request as it is met at this layer."""
        return request if request.narrow is None or self.holders[path] is not None else request.narrow

    def holder(self, path: str, request: Request) -> str:
        """The layer that holds this sum for `path`: of an input the first that received it."""
        if not request.of_input:
            return path
        return (self.leaders[path] if request.narrow is None else self.holders[path]) or path

    def rows(self, path: str, layer: Layer, x: Tensor, y: Tensor, position: str) -> tuple[Tensor, Tensor]:
        """x and y - b of the tokens that count, (n, i) and (n, o), in float32 or better."""
        mask, what = self.masks["labels" if position == "labels" else ""]
        index = kept_rows(path, x.shape, mask, position == "last", what).to(x.device)
        wide = torch.promote_types(torch.float32, x.dtype)
        kept, seen = (z.detach().reshape(-1, z.shape[-1])[index].to(wide) for z in (x, y))
        seen = seen if layer.bias is None else seen - layer.bias.detach().to(wide)
        unit = kept.max().abs() if position == "call" and len(kept) else 1
        kept, seen = kept / unit, seen / unit
        if not (kept.isfinite().all() and seen.isfinite().all()):
            raise LoraLiteError(
                f"{path} has activations that are not finite on calibration data.",
                expected="Statistics need finite numbers.",
                fix="model.float()  # or look for overflow in the batches",
            )
        return kept, seen

    def with_gradient(self, name: str, path: str, kept: Tensor, shape: torch.Size, y: Tensor) -> Tensor:
        """y as a tensor whose gradient d adds d^T x to the sum: no parameter needs a gradient for that."""
        mask, what = self.masks[""]
        index = kept_rows(path, shape, mask, what=what).to(y.device)
        start = y if y.requires_grad else y.detach().requires_grad_(True)

        def observe(delta: Tensor) -> None:
            d = delta.reshape(-1, delta.shape[-1])[index].to(kept.dtype)
            if not d.isfinite().all():
                raise LoraLiteError(
                    f"{path} has gradients that are not finite on calibration data.",
                    expected="A finite loss.",
                    fix="model.float()  # or look for overflow in the batches",
                )
            with full_precision(d.device):
                self.add(name, path, d.T @ kept)

        start.register_hook(observe)
        return start.clone()  # a model that writes into the output would take the hook off it

    def add(self, name: str, path: str, value: Tensor) -> None:
        sums = self.sums[name]
        if path not in sums:
            sums[path] = torch.zeros_like(value, dtype=torch.float64)
        for rows, more in zip(sums[path].split(MOST_ROWS), value.split(MOST_ROWS)):
            rows.add_(more)  # torch makes a copy of the summand in float64

    def totals(self, layers: dict[str, Layer]) -> dict[str, dict[str, Tensor]]:
        """The sums of all layers, those that share an input with one tensor. Raises for layers without one."""
        for path, first in self.leaders.items():
            if self.seen[path] != self.seen[first]:
                raise unsteady(path, first)
        for name, request in self.requests.items():
            sums = self.sums[name]
            held = {path: self.holder(path, self.at(path, request)) for path in self.leaders}
            sums.update({path: sums[first] for path, first in held.items() if first in sums})
            silent = request.statistic == "wgrad"
            if unseen := [path for path in layers if path not in sums or (silent and not sums[path].any())]:
                done = "had no part in the loss" if silent else "were never called"
                raise LoraLiteError(
                    f"{some(unseen)} {done} on the calibration data.",
                    expected="An adapter acts when its layer is called; a layer that is not cannot be adapted.",
                    fix=f"exclude=({unseen[0]!r},)",
                )
            if request.statistic == "n" and (empty := [path for path, n in sums.items() if n.item() == 0]):
                raise LoraLiteError(
                    f"{name} is 0 at {empty[0]}: every token is padding"
                    + (", or has label -100." if request.position == "labels" else "."),
                    expected="At least one token that attention_mask keeps.",
                    fix="attention_mask = input_ids != pad_token_id",
                )
        return self.sums


def unsteady(path: str, other: str) -> LoraLiteError:
    return LoraLiteError(
        f"{path} shares its input with {other} on one call and not on another.",
        expected="The same layers side by side in every call: they hold one sum together.",
        fix=f'exclude=("{path}",)  # or an attach of its own for it',
    )


def default_loss(model: nn.Module, batch: Any) -> Tensor:
    """The model's own loss where it returns one; of logits for input_ids the cross-entropy of the next token; else of a tensor
    its product with fixed random signs, which starts the adapter without labels and is said in a warning.
    """
    output = call(model, batch)
    fields = batch if isinstance(batch, Mapping) else {}
    if (loss := field(output, "loss")) is not None:
        return loss
    mask = fields.get("attention_mask")
    if (logits := field(output, "logits")) is not None and "input_ids" in fields:
        ids = fields["input_ids"]
        targets = ids[:, 1:] if mask is None else ids[:, 1:].masked_fill((mask[:, 1:] == 0) | (mask[:, :-1] == 0), -100)
        return F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), targets.flatten())
    if isinstance(output, Tensor):
        warnings.warn(
            "the calibration data gives no loss: gradients are those of a random combination of outputs. "
            "Give labels that the model turns into output.loss, or loss_fn=lambda model, batch: ...",
            LoraLiteWarning,
            stacklevel=2,
        )
        with seeded("probe"):
            signs = torch.randn(output.shape[1:]).sign().to(output.device)
        kept = output * signs  # in float32 or better: a sum of float16 overflows
        return kept.sum() if mask is None or mask.shape != output.shape[:-1] else kept[mask.bool()].sum()
    raise LoraLiteError(
        f"{type(model).__name__} returns {type(output).__name__} without a loss.",
        expected="output.loss, or output.logits for input_ids, or a tensor.",
        fix="loss_fn=lambda model, batch: ...  # in the config",
    )


def field(output: Any, name: str) -> Tensor | None:
    return output.get(name) if isinstance(output, Mapping) else getattr(output, name, None)


def backward(loss: Tensor) -> None:
    """Raises LoraLiteError for a loss that is no finite scalar or that no adapted layer has a part in."""
    if not isinstance(loss, Tensor) or loss.numel() != 1 or not loss.requires_grad or not loss.isfinite():
        raise LoraLiteError(
            f"The loss of the calibration data is {loss!r}.",
            expected="One finite number that depends on the adapted layers.",
            fix="loss_fn=lambda model, batch: model(**batch).loss  # in the config, and outside torch.no_grad",
        )
    loss.backward()


def on_device(model: nn.Module, batch: Any) -> Any:
    """The batch, a mapping, a tuple or list, or a tensor, with its tensors on the model's device."""
    device = next(model.parameters()).device

    def move(value: Any) -> Any:
        return value.detach().to(device) if isinstance(value, Tensor) else value

    if isinstance(batch, Mapping):
        return {name: move(value) for name, value in batch.items()}
    return tuple(map(move, batch)) if isinstance(batch, (tuple, list)) else move(batch)


def call(model: nn.Module, batch: Any) -> Any:
    if isinstance(batch, Mapping):
        return model(**batch)
    return model(*batch) if isinstance(batch, tuple) else model(batch)


@contextlib.contextmanager
def evaluating(model: nn.Module, gradients: bool = False) -> Iterator[None]:
    """eval mode, every parameter frozen, grad mode as asked; modes and flags come back, also after an error."""
    modes = [(module, module.training) for module in model.modules()]
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    try:
        model.eval()
        for parameter in trainable:
            parameter.requires_grad_(False)
        with torch.set_grad_enabled(gradients):
            yield
    finally:
        for module, mode in modes:
            module.training = mode
        for parameter in trainable:
            parameter.requires_grad_(True)


def refuse_one_batch(batches: Any) -> None:
    """Raise LoraLiteError for what is no iterable of batches, above all for one batch itself."""
    if isinstance(batches, (Mapping, Tensor)) or not isinstance(batches, Iterable):
        raise LoraLiteError(f"batches is a {type(batches).__name__}.", expected="An iterable of batches.", fix="[batch]")


def ambient(device: str) -> torch.autocast:
    """The autocast of the moment, to enter again."""
    return torch.autocast(device, dtype=torch.get_autocast_dtype(device), enabled=torch.is_autocast_enabled(device))


@contextlib.contextmanager
def full_precision(device: torch.device) -> Iterator[None]:
    """float32 products without autocast and TF32, whose 8 and 10 bits would be the accuracy of the sums."""
    matmul = torch.backends.cuda.matmul
    setting, exact = ("fp32_precision", "ieee") if hasattr(matmul, "fp32_precision") else ("allow_tf32", False)
    before = getattr(matmul, setting)
    setattr(matmul, setting, exact)
    try:
        with torch.autocast(device.type, enabled=False):
            yield
    finally:
        setattr(matmul, setting, before)
