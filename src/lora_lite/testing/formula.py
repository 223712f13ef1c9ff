"""A variant against its formula, for its own test: the dense oracle, and which tensors have gradients from the start on.

T64 and T32 are errors relative to the largest value of the reference (at least 1), for layers up to 512 wide.
"""

import copy
import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..contract.adapter import Adapter
from ..contract.config import AdapterConfig
from ..contract.registry import variant_of
from ..core.attach import attach
from ..core.coefficients import scale
from ..core.runtime import param_groups
from . import toy
from .checks.judging import demand, error

T64, T32 = 1e-10, 2e-5
COEFFS = (1.0, 0.5, -0.7, 2.0)
Dense = tuple[Tensor, Tensor | None]


def adapted(
    cfg: AdapterConfig,
    d_in: int = 24,
    d_out: int = 32,
    bias: bool = True,
    dtype: torch.dtype = torch.float64,
    size: float = 0.3,
    data: Any = None,
) -> tuple[toy.One, Adapter]:
    """(model, adapter) of a single layer `model.o_proj` with this config in `dtype`, trainable tensors moved by `size`.

    A config that starts from data gets the toy's calibration data where no other is given.
    """
    model = toy.one(d_in, d_out, bias, dtype)
    data = toy.calibration(variant_of(cfg), cfg, d_in, dtype) if data is None else data
    handle = attach(model, dataclasses.replace(cfg, dtype=dtype), data)
    if size:
        toy.perturb(handle, size)
    return model, handle.layers["o_proj"]


def check_dense(cfg: AdapterConfig, oracle: Callable[[Any, Tensor, Tensor | None, float], Dense], **shape: Any) -> None:
    """Outputs, and gradients of every trainable tensor, equal those through W', b' = oracle(adapter, W, b, c).

    At random parameters, for several coefficients, in float64 and float32, with and without bias.
    """
    for dtype, tolerance in ((torch.float64, T64), (torch.float32, T32)):
        for bias in (True, False):
            model, adapter = adapted(cfg, bias=bias, dtype=dtype, **shape)
            layer = model.o_proj
            x, probe = toy.inputs(5, adapter.d_in, dtype=dtype), toy.inputs(5, adapter.d_out, dtype=dtype, seed=4)
            for coeff in COEFFS:
                with scale(model, coeff):
                    got = layer(x)
                W, b = oracle(adapter, layer.weight, layer.bias, coeff)
                want = x @ W.T if b is None else x @ W.T + b
                demand(error(got, want) < tolerance, f"output at coeff {coeff}, {dtype}, bias {bias}")
                parameters = list(adapter.parameters())
                ours = torch.autograd.grad((got * probe).sum(), parameters, retain_graph=True)
                theirs = torch.autograd.grad((want * probe).sum(), parameters)
                for (name, _), a, e in zip(adapter.named_parameters(), ours, theirs):
                    demand(error(a, e) < tolerance * 10, f"gradient of {name} at coeff {coeff}, {dtype}, bias {bias}")
    check_bfloat16(cfg, oracle, **shape)


def check_bfloat16(cfg: AdapterConfig, oracle: Callable[[Any, Tensor, Tensor | None, float], Dense], **shape: Any) -> None:
    """As `check_dense` for float32 parameters on a bfloat16 layer, against float64: 2% of the norm of what is compared.

    The rounding of 5 tokens does not average out in a gradient, so there are 64.
    """
    model, adapter = adapted(cfg, dtype=torch.float32, **shape)
    layer, exact = model.o_proj, copy.deepcopy(adapter).double()
    for tensor in (layer.weight, layer.bias):
        tensor.data = tensor.data.bfloat16()
    x, probe = (toy.inputs(64, d, dtype=torch.bfloat16, seed=d) for d in (adapter.d_in, adapter.d_out))
    for coeff in COEFFS[:3]:
        with scale(model, coeff):
            got = layer(x)
        W, b = oracle(exact, layer.weight.double(), layer.bias.double(), coeff)
        want = x.double() @ W.T + (0 if b is None else b)
        demand(got.dtype is torch.bfloat16, "the output is not bfloat16")
        ours = torch.autograd.grad(got, list(adapter.parameters()), probe)
        theirs = torch.autograd.grad(want, list(exact.parameters()), probe.double())
        for name, a, e in zip(("output", *dict(adapter.named_parameters())), (got, *ours), (want, *theirs)):
            if e.numel() > 1:  # the gradient of a single number is a sum that may cancel
                demand((a.double() - e).norm() <= 0.02 * e.norm(), f"{name} at coeff {coeff} in bfloat16")


def live_gradients(cfg: AdapterConfig, steps: int = 2, **shape: Any) -> list[set[str]]:
    """Names of the tensors with a non-zero gradient at each step of a generic loss, from the start on."""
    model, adapter = adapted(cfg, size=0, **shape)
    x, probe = (
        toy.inputs(5, adapter.d_in, dtype=torch.float64),
        toy.inputs(5, adapter.d_out, dtype=torch.float64, seed=4),
    )
    optimizer = torch.optim.AdamW(param_groups(model, lr=1e-2))
    seen = []
    for _ in range(steps):
        optimizer.zero_grad()
        (model(x) * probe).sum().backward()
        seen.append({name for name, p in adapter.named_parameters() if p.grad is not None and bool(p.grad.any())})
        optimizer.step()
    return seen
