"""Streaming statistics of the layers' inputs and outputs on calibration data; activations are never kept.

A statistic is a sum over kept tokens, accumulated in float64 from float32 (or better) products of one batch:

    n          number of tokens                          (1,)
    calls      number of calls of the layer with tokens  (1,)
    x_tr       sum |x|^2                                 (1,)
    x_abs      sum |x_j|                                 (i,)
    x_sq       sum x_j^2                                 (i,)
    x_sum      sum x                                     (i,)
    x_moment   sum x x^T                                 (i, i)
    y_sum      sum (y - b)                               (o,)
    y_moment   sum (y - b)(y - b)^T                      (o, o)
    yx_moment  sum (y - b) x^T                           (o, i)

`NAME/last` sums over the last kept token of each row only; `NAME/call` after x and y - b of each call were divided by |max x|,
so that calls count alike whatever their scale; `NAME:positive` and `NAME:negative` over the batches of that label, for data
given as {"positive": batches, "negative": batches}. Example: "y_sum/last:positive".
"""

import contextlib
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .errors import LoraLiteError, closest, some
from .targets import Layer, dense_weight

LABELS = ("positive", "negative")
STATISTICS: dict[str, Any] = {
    "n": lambda x, y: x.new_tensor([len(x)]),
    "calls": lambda x, y: x.new_ones(1) if len(x) else x.new_zeros(1),
    "x_tr": lambda x, y: x.square().sum()[None],
    "x_abs": lambda x, y: x.abs().sum(0),
    "x_sq": lambda x, y: x.square().sum(0),
    "x_sum": lambda x, y: x.sum(0),
    "x_moment": lambda x, y: x.T @ x,
    "y_sum": lambda x, y: y.sum(0),
    "y_moment": lambda x, y: y.T @ y,
    "yx_moment": lambda x, y: y.T @ x,
}


class Weights(Mapping[str, Tensor]):
    """{path: float32 copy of the weight (d_out, d_in)}, made when asked for."""

    def __init__(self, layers: dict[str, Layer]):
        self.layers = layers

    def __getitem__(self, path: str) -> Tensor:
        return dense_weight(self.layers[path])

    def __iter__(self) -> Iterator[str]:
        return iter(self.layers)

    def __len__(self) -> int:
        return len(self.layers)


Stats = Mapping[str, Mapping[str, Tensor]]


def parse(name: str) -> tuple[str, str, str | None]:
    """(statistic, "" or "last" or "call", label) of a name. Raises LoraLiteError for a statistic that does not exist."""
    statistic, _, label = name.partition(":")
    statistic, _, position = statistic.partition("/")
    if statistic not in STATISTICS or position not in ("", "last", "call") or label not in ("", *LABELS):
        raise LoraLiteError(
            f"There is no statistic {name!r}.",
            expected="<statistic>[/last|/call][:positive|:negative].",
            found=closest(statistic, STATISTICS),
        )
    return statistic, position, label or None


def labelled(data: Any) -> dict[str | None, Iterable[Any]]:
    """{label: batches}; {None: batches} for data without labels. Raises LoraLiteError for one batch given as data."""
    if isinstance(data, Mapping) and set(data) <= set(LABELS) and data:
        for label in LABELS:
            if label not in data:
                raise LoraLiteError(
                    f"Calibration data has only {next(iter(data))} batches.",
                    expected="A contrast needs samples of both classes.",
                    fix='calibration_data={"positive": batches, "negative": other_batches}',
                )
        parts: dict[str | None, Any] = dict(data)
    else:
        parts = {None: data}
    for label, batches in parts.items():
        if isinstance(batches, (Mapping, Tensor)) or not isinstance(batches, Iterable):
            raise LoraLiteError(
                f"calibration_data{f'[{label!r}]' if label else ''} is a {type(batches).__name__}.",
                expected='An iterable of batches, or {"positive": batches, "negative": batches}.',
                fix="calibration_data=[batch]",
            )
    return parts


def run_batch(model: nn.Module, batch: Any) -> None:
    """Call the model with a mapping, a tuple or list, or a tensor, moved to the model's device."""
    device = next(model.parameters()).device

    def move(value: Any) -> Any:
        return value.to(device) if isinstance(value, Tensor) else value

    if isinstance(batch, Mapping):
        model(**{name: move(value) for name, value in batch.items()})
    elif isinstance(batch, (tuple, list)):
        model(*map(move, batch))
    else:
        model(move(batch))


def kept_rows(path: str, shape: torch.Size, mask: Tensor | None, last: bool) -> Tensor:
    """Indices of the flattened tokens that count: not padding; with `last` the last of them in each row."""
    tokens = shape[:-1].numel()
    if mask is None:
        mask = torch.ones(shape[:-1] if len(shape) > 2 else (tokens, 1), dtype=torch.bool)
    elif mask.numel() != tokens or (mask.ndim == len(shape) - 1 and mask.shape != shape[:-1]):
        raise LoraLiteError(
            f"{path} sees activations of shape {tuple(shape)}.",
            expected=f"attention_mask of shape {tuple(mask.shape)} must cover the same tokens.",
            fix=f'exclude=("{path}",)  # or batches without attention_mask',
        )
    if not ((mask == 0) | (mask == 1)).all():
        raise LoraLiteError(
            "attention_mask holds other numbers than 0 and 1.",
            expected="1 for tokens, 0 for padding.",
            fix="attention_mask = input_ids != pad_token_id",
        )
    mask = mask.bool()
    if last:
        position = torch.arange(mask.shape[-1], device=mask.device)
        final = torch.where(mask, position, -1).amax(-1, keepdim=True)
        mask = mask & (position == final)
    return mask.reshape(-1).nonzero()[:, 0]


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """eval mode and no gradient; every module's own mode comes back, also after an error."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, mode in modes:
            module.training = mode


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


def measure(model: nn.Module, layers: dict[str, Layer], wanted: Iterable[str], data: Any) -> Stats:
    """Stream the data once through the base model; {name: {path: sum}} in float64 for the wanted statistics.

    data  batches, or {"positive": batches, "negative": batches}; a batch is a mapping (whose attention_mask drops padding),
          a tuple or a tensor.
    Raises LoraLiteError, naming the layer, for no batches, a layer that was never called, non-finite activations, and a mask
    that does not fit.
    """
    requests = {name: parse(name) for name in wanted}
    parts = labelled(data)
    for name, (_, _, label) in requests.items():
        if label is not None and label not in parts:
            raise LoraLiteError(
                f"The statistic {name} needs labelled calibration data.",
                found="The batches carry no labels.",
                fix='calibration_data={"positive": batches, "negative": other_batches}',
            )
    sums: dict[str, dict[str, Tensor]] = {name: {} for name in requests}
    state: dict[str, Any] = {"label": None, "mask": None}

    def observe(path: str, layer: Any, args: Any, kwargs: Any, y: Tensor) -> None:
        x = args[0] if args else next(iter(kwargs.values()))
        mask = state["mask"]
        flat_x, flat_y = x.reshape(-1, x.shape[-1]), y.reshape(-1, y.shape[-1])
        chosen = {}
        for name, (statistic, position, label) in requests.items():
            if label is not None and label != state["label"]:
                continue
            if position not in chosen:
                rows = kept_rows(path, x.shape, mask, position == "last").to(x.device)
                wide = torch.promote_types(torch.float32, x.dtype)
                kept, seen = flat_x[rows].to(wide), flat_y[rows].to(wide)
                seen = seen if layer.bias is None else seen - layer.bias.to(wide)
                unit = kept.max().abs() if position == "call" and len(kept) else 1
                chosen[position] = kept / unit, seen / unit
                if not all(t.isfinite().all() for t in chosen[position]):
                    raise LoraLiteError(
                        f"{path} has activations that are not finite on calibration data.",
                        expected="Statistics need finite numbers.",
                        fix="model.float()  # or look for overflow in the batches",
                    )
            with full_precision(x.device):
                value = STATISTICS[statistic](*chosen[position]).double()
            sums[name][path] = sums[name][path] + value if path in sums[name] else value

    handles = [
        layer.register_forward_hook(
            lambda layer, args, kwargs, y, path=path: observe(path, layer, args, kwargs, y), with_kwargs=True
        )
        for path, layer in layers.items()
    ]
    try:
        with evaluating(model):
            for label, batches in parts.items():
                count = 0
                for batch in batches:
                    mask = batch.get("attention_mask") if isinstance(batch, Mapping) else None
                    state.update(label=label, mask=mask)
                    run_batch(model, batch)
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

    for name, by_path in sums.items():
        if unseen := [path for path in layers if path not in by_path]:
            raise LoraLiteError(
                f"{some(unseen)} were never called on the calibration data.",
                expected="An adapter acts when its layer is called; a layer that is not cannot be adapted.",
                fix=f"exclude=({unseen[0]!r},)",
            )
        if parse(name)[0] == "n" and (empty := [path for path, n in by_path.items() if n.item() == 0]):
            raise LoraLiteError(
                f"{name} is 0 at {empty[0]}: every token is padding.",
                expected="At least one token that attention_mask keeps.",
                fix="attention_mask = input_ids != pad_token_id",
            )
    return {**sums, "weight": Weights(layers)}


def require_tokens(stats: Stats, path: str, least: int, what: str, name: str = "n") -> float:
    """The token count at `path`. Raises LoraLiteError where it is below `least`: the statistic would be of lower rank."""
    n = float(stats[name][path])
    if n < least:
        raise LoraLiteError(
            f"{path}: {int(n)} calibration tokens are too few.",
            expected=f"At least {least} for {what}.",
            fix="more batches in calibration_data, or a smaller r",
        )
    return n
