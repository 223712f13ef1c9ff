"""Any lawful call of an adapted layer: shapes, keywords, dtypes, compiled; nothing stale is reused."""

import copy
from collections.abc import Iterable
from typing import Any, cast

import torch
from torch import Tensor

from ...contract.adapter import Adapter
from ...contract.config import AdapterConfig
from ...core.coefficients import disabled, scale
from .. import toy
from .judging import TOLERANCE, Variant, demand, error, perturbed, whole


def check_reuses_nothing_stale(cls: Variant, cfg: AdapterConfig) -> None:
    """Without gradients a change of any tensor, of the base weight or of the coefficient acts at the next call."""
    model, handle = perturbed(cls, cfg)
    x = toy.inputs(3, 5, toy.WIDTH)
    adapter = next(iter(handle.layers.values()))
    weight = cast(Tensor, model.get_submodule(adapter.path).weight)
    with torch.no_grad():
        places = lawful_places(adapter, handle.layers.values())
        for name, tensor in adapter.tensors().items():
            if name not in places:
                model(x)
                tensor.data.mul_(1.25)  # leaves no trace in the tensor's version
                demand(torch.equal(model(x), copy.deepcopy(model)(x)), f"a change of {name} acts late")
        model(x)
        for name, value in places.items():  # together: one may point into another
            adapter.tensors()[name].data.copy_(value)
        demand(torch.equal(model(x), copy.deepcopy(model)(x)), f"a change of {', '.join(places)} acts late")
        weight.mul_(1.25)
        demand(torch.equal(model(x), copy.deepcopy(model)(x)), "a change of the base weight acts late")
        with scale(model, 0.5):
            demand(torch.equal(model(x), copy.deepcopy(model)(x)), "a change of the coefficient acts late")


def lawful_places(adapter: Adapter, others: Iterable[Adapter]) -> dict[str, Tensor]:
    """{frozen tensor of whole numbers, which may be places: other values that are lawful, those of a layer of equal sizes}."""
    places = {name: t for name, t in adapter.named_buffers() if whole(t)}
    shape = {name: t.shape for name, t in adapter.tensors().items()}
    for other in others:
        if other is not adapter and {name: t.shape for name, t in other.tensors().items()} == shape:
            return {name: other.tensors()[name].clone() for name in places}
    return {name: t.clone() for name, t in places.items()}


def check_repeats_itself(cls: Variant, cfg: AdapterConfig) -> None:
    """In eval mode a call gives the same bits again and draws no random number; in train mode it runs, and 0 is the base."""
    model, handle = perturbed(cls, cfg)
    x = toy.inputs(3, 5, toy.WIDTH)
    demand(
        not any(adapter.training for adapter in handle.layers.values()),
        "attached to a model in eval mode, the adapter is in train mode",
    )
    state = torch.random.get_rng_state()
    first, again = model(x), model(x)
    drawn = not torch.equal(state, torch.random.get_rng_state())
    demand(
        not drawn and torch.equal(first, again),
        f"two calls in eval mode {'differ' if not torch.equal(first, again) else 'draw random numbers'}: what is random "
        "in training asks self.training",
    )
    model.train()
    demand(model(x).isfinite().all(), "the output is not finite in train mode")
    with disabled(model):
        base = model(x)
    with scale(model, 0.0):
        demand(torch.equal(model(x), base), "coeff = 0 is not the base model in train mode")
    model.eval()
    demand(torch.equal(model(x), first), "after a call in train mode an output in eval mode is another one")


def check_compiles(cls: Variant, cfg: AdapterConfig) -> None:
    """One graph without breaks, equal output; four compilations: a first number, any other, 0, and a number per sample."""
    model, x = toy.one(), toy.inputs(3, 5, toy.WIDTH)  # a single layer: tracing takes the time of all other checks together
    toy.perturb(toy.attached(model, cls, cfg))
    graphs = []

    def backend(graph: Any, _: Any) -> Any:
        if any(node.op.startswith("call") for node in graph.graph.nodes):  # what the model's hooks do besides has none
            graphs.append(graph)
        return graph.forward

    torch.compiler.reset()
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    samples = (torch.tensor([0.5, 0.0, -1.0]), torch.tensor([0.0, 0.25, 2.0]))
    for coeff in (1.0, 0.5, 0.0, -0.5, samples[0], 0.25, 1.0, samples[1], 0.0, 0.75):
        with scale(model, coeff), torch.no_grad():
            demand(error(compiled(x), model(x)) < TOLERANCE, f"compiled output differs at coeff {coeff}")
    torch.compiler.reset()
    demand(len(graphs) <= 4, f"{len(graphs)} compilations for a sweep of coefficients")


def check_follows_dtype(cls: Variant, cfg: AdapterConfig) -> None:
    """float32 adapter on a bfloat16 base returns bfloat16; model.to(bfloat16) and autocast run."""
    model = toy.toy().to(torch.bfloat16)
    handle = toy.perturb(toy.attached(model, cls, cfg), 0.05)
    x = toy.inputs(3, 5, toy.WIDTH, dtype=torch.bfloat16)
    layer = model.get_submodule(next(iter(handle.layers)))
    z = toy.inputs(3, 5, next(iter(handle.layers.values())).d_in, dtype=torch.bfloat16)
    demand(layer(z).dtype is torch.bfloat16, "the adapter changes the dtype of the layer's output")
    demand(all(p.dtype is cfg.dtype for p in handle.parameters()), f"trainable tensors are not {cfg.dtype}")
    exact = toy.toy().to(torch.bfloat16).float()
    model.float()
    wide = model(x.float())
    demand(exact(x.float()).isfinite().all() and error(wide, exact(x.float())) > 0, "the adapter does nothing")
    model.to(torch.bfloat16)
    demand(error(model(x), wide) < 0.1, "bfloat16 is far from float32")
    model.float()
    with torch.autocast("cpu", torch.bfloat16):
        model(x.float()).sum().backward()
    demand(all(p.grad is not None and p.grad.dtype is p.dtype for p in handle.parameters()), "autocast loses gradients")


def check_calls_and_shapes(cls: Variant, cfg: AdapterConfig) -> None:
    """Keyword calls, any leading axes, an empty batch, with and without bias; no token reads another."""
    for bias in (False, True):
        model = toy.one(24, 32, bias)
        toy.perturb(toy.attached(model, cls, cfg, width=24))
        layer, x = model.o_proj, toy.inputs(4, 6, 24)
        y = layer(x)
        demand(torch.equal(layer(input=x), y), "a keyword call gives another output")
        demand(error(layer(x.reshape(2, 2, 6, 24)), y.reshape(2, 2, 6, 32)) < TOLERANCE, "four axes differ from three")
        demand(error(layer(x[1, 2]), y[1, 2]) < TOLERANCE, "one token alone differs")
        demand(layer(x[:0]).shape == (0, 6, 32), "an empty batch does not pass")
        other = x.clone()
        other[:, 1:] += 1
        demand(error(layer(other)[:, :1], y[:, :1]) < TOLERANCE, "a token reads another")
