"""What the fidelity tests share beside `lora_lite.testing.formula`: PEFT's layer as a peer, and promises that several variants
keep in the same sense.
"""

import dataclasses
from collections.abc import Callable, Collection
from typing import Any

import torch
from torch import Tensor, nn

import lora_lite as ll
from lora_lite.testing import toy
from lora_lite.testing.checks import error
from lora_lite.testing.formula import T64, adapted


def base_output(model: nn.Module, x: Tensor) -> Tensor:
    """W x + b of the single layer, without any adapter."""
    return nn.functional.linear(x, model.o_proj.weight, model.o_proj.bias)


def check_ignores_bias(cfg: ll.AdapterConfig, **shape: Any) -> None:
    """What the adapter adds to the output is the same under a bias and under one larger by 100; it is not zero."""
    changes = []
    for offset in (0.0, 100.0):
        model, adapter = adapted(cfg, **shape)
        with torch.no_grad():
            model.o_proj.bias.add_(offset)
        x = toy.inputs(5, adapter.d_in, dtype=torch.float64)
        changes.append(model(x) - base_output(model, x))
    assert error(*changes) < T64
    assert changes[0].abs().max() > 0.01


def check_decay_ends_at_base(cfg: ll.AdapterConfig, spared: Collection[str] = (), **shape: Any) -> None:
    """Weight decay takes random parameters to the base output, bit for bit; `spared` tensors keep their values.

    At lr * weight_decay = 1 and without gradients a single step takes every decaying tensor where it ends: to zero.
    """
    model, adapter = adapted(cfg, **shape)
    x = toy.inputs(5, adapter.d_in, dtype=torch.float64)
    assert error(model(x), base_output(model, x)) > 1e-3
    before = {name: p.detach().clone() for name, p in adapter.named_parameters()}
    optimizer = torch.optim.AdamW(ll.param_groups(model, lr=0.5, weight_decay=2.0))
    for p in adapter.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    for name, p in adapter.named_parameters():
        assert torch.equal(p, before[name] if name in spared else torch.zeros_like(p)), name
    assert torch.equal(model(x), base_output(model, x))


def check_finite_differences(cfg: ll.AdapterConfig, **shape: Any) -> None:
    """Gradients of every trainable tensor, at random parameters, are those of finite differences of the output."""
    model, adapter = adapted(cfg, **shape)
    x = toy.inputs(3, adapter.d_in, dtype=torch.float64)
    names = [name for name, _ in adapter.named_parameters()]

    def run(*values: Tensor) -> Tensor:
        return torch.func.functional_call(model, {f"o_proj.default.{n}": v for n, v in zip(names, values)}, (x,))

    assert torch.autograd.gradcheck(run, [p.detach().requires_grad_() for p in adapter.parameters()])


def check_scale(cfg: ll.AdapterConfig, **shape: Any) -> None:
    """The change at alpha = 2 r is twice that at alpha = r, and that at alpha = 2 sqrt(r) with rslora."""

    def change(alpha: float, rslora: bool) -> Tensor:
        model, adapter = adapted(dataclasses.replace(cfg, alpha=alpha, rslora=rslora), **shape)
        x = toy.inputs(5, adapter.d_in, dtype=torch.float64)
        return model(x) - base_output(model, x)

    once, twice, ranked = change(cfg.r, False), change(2 * cfg.r, False), change(2 * cfg.r**0.5, True)
    assert error(twice, 2 * once) < T64
    assert error(ranked, twice) < T64
    assert once.abs().max() > 0.01


def check_rest_stays(model: nn.Module, adapter: Any) -> None:
    """The output changes along the columns of U, and its part orthogonal to them stays."""
    x = toy.inputs(5, adapter.d_in, dtype=torch.float64)
    change = model(x) - base_output(model, x)
    assert error(change - change @ adapter.U @ adapter.U.T, torch.zeros_like(change)) < T64
    assert change.abs().max() > 0.1


def check_pushed_out_gain_comes_back(cfg: ll.AdapterConfig) -> None:
    """Under suppress_only a gain above its bound acts as at the bound, has only an inward gradient, and trains back."""
    model, adapter = adapted(cfg, size=0)
    with torch.no_grad():
        adapter.g.fill_(0.05)
    x = toy.inputs(5, adapter.d_in, dtype=torch.float64)
    assert torch.equal(model(x), base_output(model, x))
    energy = model(x).square().sum()
    assert not torch.autograd.grad(-energy, adapter.g, retain_graph=True)[0].any()
    assert torch.autograd.grad(energy, adapter.g)[0].any()
    optimizer = torch.optim.AdamW(ll.param_groups(model, lr=1e-2))
    for _ in range(20):
        optimizer.zero_grad()
        model(x).square().sum().backward()
        optimizer.step()
    assert (adapter.g < 0).all()


def input_map(adapter: Any, coeff: float = 1.0) -> Tensor:
    """R of x -> x R, the matrix that an adapter of the input applies to a row x."""
    adapter.coeff = coeff
    return adapter.forward_input(torch.eye(adapter.d_in, dtype=next(adapter.parameters()).dtype)).detach()


def check_rotates_input(adapter: Any, tolerance: float, coeff: float = 1.0) -> None:
    """x -> x R is a rotation other than the identity: R R^T = I, det R = 1, lengths stay."""
    R = input_map(adapter, coeff)
    I, x = torch.eye(adapter.d_in), toy.inputs(5, adapter.d_in, dtype=R.dtype)
    assert error(R @ R.T, I) < tolerance
    assert abs(torch.linalg.det(R.double()) - 1) < tolerance
    assert error((x @ R).norm(dim=1), x.norm(dim=1)) < 1e-6
    assert error(R, I) > 0.01


def peft_layer(config: Any, d_in: int = 24, d_out: int = 32, bias: bool = True) -> nn.Module:
    """PEFT's own adapted layer over the same base layer as `adapted`, float32; `config` must target "o_proj"."""
    import peft

    return peft.get_peft_model(toy.one(d_in, d_out, bias), config).base_model.model.o_proj


def check_agree(
    ours: Callable[[Tensor], Tensor],
    theirs: Callable[[Tensor], Tensor],
    x: Tensor,
    gradients: Callable[[], list[tuple[Tensor, Tensor]]],
    tolerance: float = 1e-5,
    of_gradients: float | None = None,
) -> None:
    """Two models give the same output for x, and the same gradients of a generic loss.

    gradients()   pairs of them, in one orientation, read after the loss went backward through both models
    of_gradients  their tolerance, relative to the largest entry, where it is another one
    """
    got, want = ours(x), theirs(x)
    assert error(got, want) < tolerance, "outputs differ"
    probe = toy.inputs(*got.shape, dtype=got.dtype, seed=4)
    (got * probe).sum().backward()
    (want * probe).sum().backward()
    for index, (a, e) in enumerate(gradients()):
        assert a.shape == e.shape, f"gradient {index} has another shape"
        assert float((a - e).abs().max() / e.abs().max()) < (of_gradients or tolerance), f"gradient {index} differs"


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
    check_agree(model, theirs, toy.inputs(5, ours.d_in), lambda: pairs(ours, theirs), tolerance)
    assert len(pairs(ours, theirs)) == len(list(ours.parameters())), "a trainable tensor is not compared"


def check_parity_by_name(cfg: ll.AdapterConfig, config: Any, names: dict[str, str], **shape: Any) -> None:
    """check_parity where the tensors of both are the same numbers in the same layout, as {our name: PEFT's name}."""

    def tensor(theirs: Any, name: str) -> Tensor:
        held = getattr(theirs, name)["default"]
        return held.weight if isinstance(held, nn.Module) else held

    def fill(ours: Any, theirs: Any) -> None:
        for mine, other in names.items():
            getattr(ours, mine).copy_(tensor(theirs, other))

    def pairs(ours: Any, theirs: Any) -> list[tuple[Tensor, Tensor]]:
        trained = dict(ours.named_parameters())
        return [(trained[mine].grad, tensor(theirs, other).grad) for mine, other in names.items() if mine in trained]

    check_parity(cfg, config, pairs, fill, **shape)


def check_low_rank(cfg: ll.AdapterConfig, rank: int, dtype: torch.dtype, tolerance: float) -> None:
    """On a weight of this rank, rounded to `dtype`, the layer runs as its own exact map: delta_weight in float64."""
    model = toy.one(24, 32)
    with torch.no_grad():
        model.o_proj.weight.copy_(toy.inputs(32, rank) @ toy.inputs(rank, 24, seed=5) / 5 / rank**0.5)
    toy.perturb(ll.attach(model.to(dtype), cfg), 0.5)
    layer, x = model.o_proj, toy.inputs(64, 24, dtype=dtype)
    W = layer.weight.double() + ll.delta_weight(model, "o_proj").double()
    want = x.double() @ W.T + layer.bias.double()
    assert error(model(x).double(), want) / float(want.abs().max().clamp(max=1)) < tolerance
