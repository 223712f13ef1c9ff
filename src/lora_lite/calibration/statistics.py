"""The statistics of the layers' inputs and outputs that a variant may ask for by name; measure.py streams them.

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
    x_sketch[q,m]  x_moment times `sketch_matrix(i, q, m)`: x_moment itself for i up to m, (i, q) beyond
    wgrad      sum d x^T, d = dLoss/dy: the loss's gradient with respect to W, no parameter needing a gradient   (o, i)
               A loss that counts what padding predicts, as the model's own does of labels behind padding on the left, is
               taken without that: padding's rows are left out, and no kept token sees them

    x_moment|yx_moment, x_moment|y_moment   the first for layers with i <= o and for those that share the input of such a layer,
               the second for the others: W and the first give the second, and layers that share an input hold it once

`NAME/last` sums over the last kept token of each row only; `NAME/labels` over those whose label is not -100, where batches
have labels; `NAME/call` after x and y - b of each call were divided by |max x|, so that calls count alike whatever their scale;
`NAME:positive` and `NAME:negative` over the batches of that label, for data given as {"positive": batches, "negative":
batches}. Example: "y_sum/last:positive". Layers that receive the same tensor hold one sum of their inputs together.
"""

import functools
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..errors import LoraLiteError, closest
from ..sites.layer import Layer, dense_weight

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


EITHER = ("x_moment|yx_moment", "x_moment|y_moment")


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


class Request(NamedTuple):
    """A statistic's name in parts; of_input: it does not depend on y.

    narrow: what is taken instead at layers with fewer outputs than inputs, unless one that shares the input holds this.
    """

    statistic: str
    value: Callable[[Tensor, Tensor], Tensor] | None  # of one call's kept rows; None: comes with the backward pass
    position: str
    label: str | None
    of_input: bool
    narrow: "Request | None" = None


NAME = re.compile(
    r"(?P<statistic>[\w|]+)(?:\[(?P<q>\d+),(?P<m>\d+)\])?(?:/(?P<position>last|labels|call))?(?::(?P<label>\w+))?"
)


def parse(name: str) -> Request:
    """The parts of a name. Raises LoraLiteError for a statistic that does not exist."""
    found = NAME.fullmatch(name)
    statistic, q, m, position, label = found.groups() if found else (name.partition("/")[0], None, None, None, None)
    known = statistic in (*STATISTICS, *EITHER) and q is None
    known |= (statistic == "x_sketch" and q is not None) or (statistic == "wgrad" and q is None and position is None)
    if found is None or not known or label not in (None, *LABELS):
        raise LoraLiteError(
            f"There is no statistic {name!r}.",
            expected="<statistic>[/last|/labels|/call][:positive|:negative], and wgrad without a position.",
            found=closest(statistic, (*STATISTICS, *EITHER, "x_sketch[q,m]", "wgrad")),
        )
    if statistic in EITHER:
        wide, narrow = (parse(name.replace(statistic, part)) for part in statistic.split("|"))
        return wide._replace(narrow=narrow)
    value = STATISTICS.get(statistic)
    if q is not None and m is not None:
        value = functools.partial(sketch, q=int(q), whole=int(m))
    return Request(statistic, value, position or "", label, statistic in ("n", "calls") or statistic.startswith("x_"))


def sketch(x: Tensor, y: Tensor, q: int, whole: int) -> Tensor:
    i = x.shape[1]
    return x.T @ (x if i <= max(whole, q) else x @ sketch_matrix(i, q, whole).to(x))


@functools.lru_cache(maxsize=8)
def sketch_matrix(i: int, q: int, whole: int) -> Tensor:
    """(i, min(i, q)) with orthonormal columns, the same at every call; the identity (i, i) for i up to `whole`."""
    if i <= max(whole, q):
        return torch.eye(i)
    return torch.linalg.qr(torch.randn(i, q, generator=torch.Generator().manual_seed(0), device="cpu")).Q


def numbers(request: Request, i: int, o: int) -> int:
    """How many numbers the sum holds at a layer with i inputs and o outputs."""
    if isinstance(request.value, functools.partial):
        q, whole = request.value.keywords["q"], request.value.keywords["whole"]
        return i * (i if i <= max(whole, q) else q)
    products = {"x_moment": i * i, "y_moment": o * o, "yx_moment": o * i, "wgrad": o * i}
    return products.get(request.statistic.partition("|")[0], max(i, o))


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


def kept_rows(path: str, shape: torch.Size, mask: Tensor | None, last: bool = False, what: str = "attention_mask") -> Tensor:
    """Indices of the flattened tokens that count: those of the mask; with `last` the last of them in each row."""
    tokens = shape[:-1].numel()
    if mask is None:
        mask = torch.ones(shape[:-1] if len(shape) > 2 else (tokens, 1), dtype=torch.bool)
    elif mask.numel() != tokens or (mask.ndim == len(shape) - 1 and mask.shape != shape[:-1]):
        raise LoraLiteError(
            f"{path} sees activations of shape {tuple(shape)}.",
            expected=f"{what} of shape {tuple(mask.shape)} must cover the same tokens.",
            fix=f'exclude=("{path}",)  # or batches without {what}',
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
