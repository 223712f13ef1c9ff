"""What the fidelity tests share: one adapted layer at random parameters, the dense oracle, PEFT's layer as a peer.

T64 and T32 are errors relative to the largest value of the reference (at least 1), for layers up to 512 wide.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import lora_lite as ll
from lora_lite.adapter import Adapter
from lora_lite.testing import toy
from lora_lite.testing.checks import error

T64, T32 = 1e-10, 2e-5
COEFFS = (1.0, 0.5, -0.7, 2.0)
Dense = tuple[Tensor, Tensor | None]


def adapted(
    cfg: ll.AdapterConfig,
    d_in: int = 24,
    d_out: int = 32,
    bias: bool = True,
    dtype: torch.dtype = torch.float64,
    size: float = 0.3,
    data: Any = None,
) -> tuple[nn.Module, Adapter]:
    """(model, adapter) of a single layer `model.o_proj` with this config in `dtype`, trainable tensors moved by `size`."""
    model = toy.one(d_in, d_out, bias, dtype)
    fields = {f: getattr(cfg, f) for f in cfg.__dataclass_fields__} | {"dtype": dtype}
    handle = ll.attach(model, type(cfg)(**fields), data)
    if size:
        toy.perturb(handle, size)
    return model, handle.layers["o_proj"]


def check_dense(cfg: ll.AdapterConfig, oracle: Callable[[Any, Tensor, Tensor | None, float], Dense], **shape: Any) -> None:
    """Outputs, and gradients of every trainable tensor, equal those through W', b' = oracle(adapter, W, b, c).

    At random parameters, for several coefficients, in float64 and float32, with and without bias.
    """
    for dtype, tolerance in ((torch.float64, T64), (torch.float32, T32)):
        for bias in (True, False):
            model, adapter = adapted(cfg, bias=bias, dtype=dtype, **shape)
            layer = model.o_proj
            x, probe = toy.inputs(5, adapter.d_in, dtype=dtype), toy.inputs(5, adapter.d_out, dtype=dtype, seed=4)
            for coeff in COEFFS:
                with ll.scale(model, coeff):
                    got = layer(x)
                W, b = oracle(adapter, layer.weight, layer.bias, coeff)
                want = x @ W.T if b is None else x @ W.T + b
                assert error(got, want) < tolerance, f"output at coeff {coeff}, {dtype}, bias {bias}"
                parameters = list(adapter.parameters())
                ours = torch.autograd.grad((got * probe).sum(), parameters, retain_graph=True)
                theirs = torch.autograd.grad((want * probe).sum(), parameters)
                for (name, _), a, e in zip(adapter.named_parameters(), ours, theirs):
                    assert error(a, e) < tolerance * 10, f"gradient of {name} at coeff {coeff}, {dtype}, bias {bias}"


def live_gradients(cfg: ll.AdapterConfig, steps: int = 2, **shape: Any) -> list[set[str]]:
    """Names of the tensors with a non-zero gradient at each step of a generic loss, from the start on."""
    model, adapter = adapted(cfg, size=0, **shape)
    x, probe = (
        toy.inputs(5, adapter.d_in, dtype=torch.float64),
        toy.inputs(5, adapter.d_out, dtype=torch.float64, seed=4),
    )
    optimizer = torch.optim.AdamW(ll.param_groups(model, lr=1e-2))
    seen = []
    for _ in range(steps):
        optimizer.zero_grad()
        (model(x) * probe).sum().backward()
        seen.append({name for name, p in adapter.named_parameters() if p.grad is not None and bool(p.grad.any())})
        optimizer.step()
    return seen


def peft_layer(config: Any, d_in: int = 24, d_out: int = 32, bias: bool = True) -> nn.Module:
    """PEFT's own adapted layer over the same base layer as `adapted`, float32; `config` must target "o_proj"."""
    import peft

    return peft.get_peft_model(toy.one(d_in, d_out, bias), config).base_model.model.o_proj


def check_parity(
    cfg: ll.AdapterConfig,
    config: Any,
    pairs: Callable[[Any, Any], list[tuple[Tensor, Tensor]]],
    fill: Callable[[Any, Any], None],
    tolerance: float = 1e-5,
    **shape: Any,
) -> None:
    """Our layer and PEFT's, float32, same random parameters: same outputs and same gradients.

    fill(ours, theirs)   copies PEFT's random parameters into our adapter
    pairs(ours, theirs)  gradients of corresponding tensors, in one orientation, after the same loss
    """
    theirs = peft_layer(config, **shape)
    with torch.no_grad():
        for seed, p in enumerate(q for q in theirs.parameters() if q.requires_grad):
            p.copy_(0.3 * toy.inputs(*p.shape, seed=20 + seed))
    model, ours = adapted(cfg, dtype=torch.float32, size=0, **shape)
    with torch.no_grad():
        fill(ours, theirs)
    x, probe = toy.inputs(5, ours.d_in), toy.inputs(5, ours.d_out, seed=4)
    got, want = model(x), theirs(x)
    assert error(got, want) < tolerance, "outputs differ"
    (got * probe).sum().backward()
    (want * probe).sum().backward()
    for index, (a, e) in enumerate(pairs(ours, theirs)):
        assert float((a - e).abs().max() / e.abs().max()) < tolerance, f"gradient {index} differs"
