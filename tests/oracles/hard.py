"""Layers, data and inputs that no formula likes, as a table of cases."""

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from lora_lite.testing import toy


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """W (o, i) = scale * weight(o, i); x = change(size * N) for standard normal N; calibration with data(the toy's batches)."""

    o: int = 32
    i: int = 24
    r: int = 8
    weight: Callable[[int, int], Tensor] = lambda o, i: toy.inputs(o, i, seed=3) / i**0.5
    scale: float = 1.0
    dtype: torch.dtype = torch.float32
    bias: bool = True
    shape: tuple[int, ...] = (5,)
    size: float = 1.0
    change: Callable[[Tensor], Tensor] = lambda x: x
    data: Callable[[Tensor], Tensor] = lambda x: x
    keyword: bool = False
    parameters: Callable[[Any], Any] = toy.perturb

    def model(self) -> nn.Module:
        model = toy.one(self.i, self.o, self.bias)
        with torch.no_grad():
            model.o_proj.weight.copy_(self.scale * self.weight(self.o, self.i))
            if self.bias:
                model.o_proj.bias.mul_(min(self.scale, 1.0))
        return model.to(self.dtype).requires_grad_(False)

    def x(self) -> Tensor:
        return self.change((self.size * toy.inputs(*self.shape, self.i)).to(self.dtype))

    def run(self, model: nn.Module, x: Tensor | None = None) -> Tensor:
        x = self.x() if x is None else x
        return model.o_proj(input=x) if self.keyword else model(x)

    def calibration(self, cls: Any, cfg: Any) -> Any:
        batches = [self.data(batch["x"]) for batch in toy.batches(self.i, dtype=self.dtype)]
        labelled = isinstance(toy.calibration(cls, cfg, self.i), dict)
        return {"positive": batches[:2], "negative": batches[2:]} if labelled else batches if cls.needs(cfg) else None


def of_rank(rank: int) -> Callable[[int, int], Tensor]:
    return lambda o, i: toy.inputs(o, rank, seed=3) @ toy.inputs(rank, i, seed=4) / i**0.5


def spectrum(*values: float) -> Callable[[int, int], Tensor]:
    """Singular values that go through these, repeated or graded."""

    def make(o: int, i: int) -> Tensor:
        n = min(o, i)
        U, V = (torch.linalg.qr(toy.inputs(k, n, dtype=torch.float64, seed=k)).Q for k in (o, i))
        return (U * torch.tensor(values).repeat_interleave(-(-n // len(values)))[:n] @ V.T).float()

    return make


def holes(o: int, i: int) -> Tensor:
    """Rows and columns of zeros."""
    W = toy.inputs(o, i, seed=3)
    W[::2] = W[:, ::3] = 0
    return W


def infinite(x: Tensor) -> Tensor:
    x[1, 0], x[3, 1:] = torch.inf, -torch.inf
    return x


@torch.no_grad()
def filled(value: float) -> Callable[[Any], Any]:
    return lambda handle: [parameter.data.fill_(value) for parameter in handle.parameters()]


def times(size: float) -> Callable[[Any], Any]:
    return lambda handle: [parameter.data.mul_(size) for parameter in toy.perturb(handle).parameters()]


WEIGHTS = {
    "zero": Case(weight=torch.zeros),
    "zero, without a bias": Case(weight=torch.zeros, bias=False),
    "rank 3": Case(weight=of_rank(3)),
    "rank 1": Case(weight=torch.ones),
    "rows and columns of zeros": Case(weight=holes),
    "equal singular values": Case(weight=spectrum(1.0)),
    "singular values in pairs": Case(weight=spectrum(*(2.0 - k / 12 for k in range(12)))),
    "singular values down to 1e-11": Case(weight=spectrum(*(10.0**-k for k in range(12)))),
    "1e-30": Case(scale=1e-30),
    "1e-30, rank 3": Case(scale=1e-30, weight=of_rank(3), bias=False),
    "1e-40": Case(scale=1e-40),
    "1e30": Case(scale=1e30),
    "1e30, rank 3": Case(scale=1e30, weight=of_rank(3), bias=False),
}
NARROW = {
    f"{name} in {str(dtype).removeprefix('torch.')}": dataclasses.replace(case, dtype=dtype)
    for dtype in (torch.bfloat16, torch.float16)
    for name, case in {
        **{name: WEIGHTS[name] for name in ("zero", "rank 3", "rank 1", "rows and columns of zeros", "equal singular values")},
        "usual": Case(),
        "1e-7": Case(scale=1e-7),
        "1e4": Case(scale=1e4, size=0.1),
    }.items()
}
SHAPES = {
    f"{i} -> {o}, r={r}": Case(o=o, i=i, r=r)
    for o, i, r in (
        (1, 1, 1), (1, 24, 1), (32, 1, 1), (2, 2, 2), (2, 512, 2), (512, 2, 2),
        (2, 512, 1), (512, 2, 1), (2, 1024, 2), (1024, 2, 2), (32, 24, 1), (32, 24, 24),
    )
}  # fmt: skip
DATA = {
    "constant data": Case(data=torch.ones_like),
    "data of zeros": Case(data=torch.zeros_like),
    "one token": Case(data=lambda x: x[:1, :1]),
    "data of 1e-30": Case(data=lambda x: 1e-30 * x),
    "data of 1e30": Case(data=lambda x: 1e30 * x),
    "data with silent channels": Case(data=lambda x: x * (torch.arange(x.shape[-1]) % 2)),
    "data of rank 8 over W of rank 3": Case(data=lambda x: x * (torch.arange(x.shape[-1]) < 8), weight=of_rank(3)),
    "data of float16 that overflows in squares": Case(data=lambda x: 1e3 * x, dtype=torch.float16),
}
INPUTS = {
    "infinities in x": Case(change=infinite),
    "infinities in x of float16": Case(change=infinite, dtype=torch.float16),
    "x of zeros": Case(size=0.0),
    "x of 1e-30": Case(size=1e-30),
    "x of 1e30": Case(size=1e30),
    "an empty batch": Case(shape=(0,)),
    "an empty batch of 3 axes": Case(shape=(2, 0)),
    **{f"{len(shape) + 1} axes": Case(shape=shape) for shape in ((), (3,), (2, 3), (2, 1, 3), (2, 1, 3, 2))},
    "strides": Case(shape=(6, 5), change=lambda x: x.transpose(0, 1)[::2]),
    "strides of 2": Case(change=lambda x: torch.stack([x, 3 * x], dim=-1)[..., 0]),
    "one number for all": Case(change=lambda x: x[:1, :1].expand(x.shape)),
    "a keyword": Case(keyword=True),
}
PARAMETERS = {
    "parameters of zeros": Case(parameters=filled(0.0)),
    "equal parameters": Case(parameters=filled(0.1)),
    "parameters of 1e-30": Case(parameters=times(1e-30)),
    "parameters of 1e3": Case(parameters=times(1e3)),
    "parameters of 1e8": Case(parameters=times(1e8)),
}
CASES = {**PARAMETERS, **WEIGHTS, **NARROW, **SHAPES, **DATA, **INPUTS}
