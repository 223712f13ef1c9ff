"""The statistics of the layers' inputs and outputs that a variant may ask for by name; measure.py streams them and
recorder.py adds them up.

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
    y_sq       sum (y_j - b_j)^2                         (o,)
    y_clip[q]  sum of y - b, each token's entries held within the q-th quantile of its |y_j - b_j|, q in [0, 1]   (o,)
    x_sketch[q,m]  x_moment times `sketch_matrix(i, q, m)`: x_moment itself for i up to m, (i, q) beyond
    wgrad      sum d x^T, d = dLoss/dy: the loss's gradient with respect to W, no parameter needing a gradient   (o, i)
               Gradients of a mean loss count by the number of its terms (losses.py), so that they add up over tokens.
               A loss that counts what padding predicts, as the model's own does of labels behind padding on the left, is
               taken without that: padding's rows are left out, and no kept token sees them

    terms      number of terms of those losses                          (1,)
    norm       no sum: what a norm between the layer and the stream multiplies y by (norms.py)          (2, o), without one (0,)

    x_moment|yx_moment, x_moment|y_moment   the first for layers with i <= o and for those that share the input of such a layer,
               the second for the others: W and the first give the second, and layers that share an input hold it once

`NAME/last` sums over the last kept token of each row only; `NAME/labels` over those whose label is not -100, where batches
have labels of their tokens; `NAME/call` after x and y - b of each call were divided by |max x|, so that calls count alike
whatever their scale; `NAME:positive` and `NAME:negative` over the batches of that label, for data given as {"positive":
batches, "negative": batches}. Example: "y_sum/last:positive". scopes.py says which tokens of a batch a layer sees. Layers that
receive the same tensor hold one sum of their inputs together.
"""

import difflib
import functools
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..errors import LoraLiteError, closest, some
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
    "y_sq": lambda x, y: y.square().sum(0),
    "y_moment": lambda x, y: y.T @ y,
    "yx_moment": lambda x, y: y.T @ x,
}


EITHER = ("x_moment|yx_moment", "x_moment|y_moment")
BACKWARD = ("wgrad", "terms")
APART = (*BACKWARD, "norm")  # no sums of kept rows


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
    r"(?P<statistic>[\w|]+)(?:\[(?P<q>\d+|0\.\d+)(?:,(?P<m>\d+))?\])?(?:/(?P<position>last|labels|call))?(?::(?P<label>\w+))?"
)


def parse(name: str) -> Request:
    """The parts of a name. Raises LoraLiteError for a statistic that does not exist."""
    found = NAME.fullmatch(name)
    statistic, q, m, position, label = found.groups() if found else (name.partition("/")[0], None, None, None, None)
    known = statistic in (*STATISTICS, *EITHER) and q is None
    known |= statistic == "x_sketch" and m is not None and "." not in (q or ".")
    known |= statistic == "y_clip" and q is not None and m is None and float(q) <= 1
    known |= statistic in APART and q is None and position is None
    if found is None or not known or label not in (None, *LABELS):
        raise LoraLiteError(
            f"There is no statistic {name!r}.",
            expected=f"<statistic>[/last|/labels|/call][:positive|:negative], and {', '.join(APART)} without a position.",
            found=closest(statistic, (*STATISTICS, *EITHER, "x_sketch[q,m]", "y_clip[q]", *APART)),
        )
    if statistic in EITHER:
        wide, narrow = (parse(name.replace(statistic, part)) for part in statistic.split("|"))
        return wide._replace(narrow=narrow)
    value = STATISTICS.get(statistic)
    if q is not None and m is not None:
        value = functools.partial(sketch, q=int(q), whole=int(m))
    elif q is not None:
        value = functools.partial(clipped, quantile=float(q))
    return Request(statistic, value, position or "", label, statistic in ("n", "calls") or statistic.startswith("x_"))


def sketch(x: Tensor, y: Tensor, q: int, whole: int) -> Tensor:
    i = x.shape[1]
    return x.T @ (x if i <= max(whole, q) else x @ sketch_matrix(i, q, whole).to(x))


def clipped(x: Tensor, y: Tensor, quantile: float) -> Tensor:
    if not len(y):
        return y.sum(0)
    most = y.abs().kthvalue(max(1, math.ceil(quantile * y.shape[1])), dim=1, keepdim=True).values
    return y.clamp(-most, most).sum(0)


@functools.lru_cache(maxsize=8)
def sketch_matrix(i: int, q: int, whole: int) -> Tensor:
    """(i, min(i, q)) with orthonormal columns, the same at every call; the identity (i, i) for i up to `whole`."""
    if i <= max(whole, q):
        return torch.eye(i)
    return torch.linalg.qr(torch.randn(i, q, generator=torch.Generator().manual_seed(0), device="cpu")).Q


def numbers(request: Request, i: int, o: int) -> int:
    """How many numbers the sum holds at a layer with i inputs and o outputs."""
    if request.statistic == "x_sketch" and isinstance(request.value, functools.partial):
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
        refuse_other_labels(data)
        parts = {None: data}
    for label, batches in parts.items():
        if isinstance(batches, (Mapping, Tensor)) or not isinstance(batches, Iterable):
            raise LoraLiteError(
                f"calibration_data{f'[{label!r}]' if label else ''} is a {type(batches).__name__}.",
                expected='An iterable of batches, or {"positive": batches, "negative": batches}.',
                fix="calibration_data=[batch]",
            )
    return parts


def refuse_other_labels(data: Any) -> None:
    """Raise LoraLiteError for batches under keys that are no labels, as the values of one batch are not batches."""

    def are_batches(values: Any) -> bool:
        if isinstance(values, (Tensor, str, Mapping)) or not isinstance(values, Iterable):
            return False
        if not isinstance(values, (list, tuple)):
            return True  # a loader
        first = next(iter(values), None)
        return isinstance(first, (Tensor, Mapping)) or (isinstance(first, tuple) and any(isinstance(t, Tensor) for t in first))

    def nearer(key: Any) -> float:
        positive, negative = (difflib.SequenceMatcher(None, str(key).lower(), label).ratio() for label in LABELS)
        return positive - negative

    if not isinstance(data, Mapping) or len(data) < 2:
        return
    if any(key in LABELS for key in data) or all(are_batches(values) for values in data.values()):
        one, *_, other = sorted(data, key=nearer, reverse=True)
        raise LoraLiteError(
            f"Calibration data has the classes {some(map(repr, data))}.",
            expected="A contrast has the classes 'positive' and 'negative'.",
            fix=f'calibration_data={{"positive": data[{one!r}], "negative": data[{other!r}]}}',
        )
