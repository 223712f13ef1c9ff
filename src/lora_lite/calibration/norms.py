"""Norms between a layer and the residual stream, such as Gemma's post_attention_layernorm, and directions through them.

Where a module f without children is called with the very tensor that a layer gave out, and f(y) = L y / |y| or L y (a layer
scale), a direction r of what f gives on is L^T r at the layer: with D = L^T r / |L^T r| taken off y, nothing of r is left.
L is diag(w), or diag(w) (I - 1 1^T / o) of a norm that takes the mean off; w is measured on a probe, in float32.
"""

import warnings
import weakref
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from ..errors import LoraLiteWarning, some
from ..sites.layer import Layer, sizes
from .calls import call, evaluating, of_this_thread, on_device


class Norms:
    """Watches one batch: `saw` what layers give out, then `effective`. `remove` takes the hooks off."""

    def __init__(self, model: nn.Module, layers: Iterable[Layer]):
        spared = {id(layer) for layer in layers}

        def may_be(module: nn.Module) -> bool:
            leaf = id(module) not in spared and not any(True for _ in module.children())
            return leaf and all(p.ndim == 1 for p in module.parameters())

        self.outputs: dict[int, tuple[weakref.ref[Tensor], str]] = {}
        self.behind: dict[str, nn.Module] = {}
        self.handles = [m.register_forward_pre_hook(of_this_thread(self.enter)) for m in model.modules() if may_be(m)]

    def saw(self, path: str, y: Tensor) -> None:
        if self.handles:
            self.outputs[id(y)] = weakref.ref(y), path

    def enter(self, module: nn.Module, args: Any) -> None:
        seen, path = self.outputs.get(id(args[0]), (lambda: None, "")) if args else (lambda: None, "")
        if path and seen() is args[0]:
            self.behind.setdefault(path, module)

    def remove(self) -> None:
        while self.handles:
            self.handles.pop().remove()

    def effective(self, sizes: dict[str, int]) -> dict[str, Tensor]:
        """{path: (2, o), w and 1 where the mean is taken off; (0,) without such a module}; warns of unknown ones."""
        found = {path: probed(module, sizes[path]) for path, module in self.behind.items()}
        if odd := [path for path, w in found.items() if w is None and any(True for _ in self.behind[path].parameters())]:
            warnings.warn(
                f"Behind {some(odd)} stands {type(self.behind[odd[0]]).__name__}, which is no norm or scale that is known: "
                "a direction taken off the layer's output is not the same one in what comes out of it.",
                LoraLiteWarning,
                stacklevel=2,
            )
        return {path: w if (w := found.get(path)) is not None else torch.empty(0) for path in sizes}


def norms_behind(model: nn.Module, layers: dict[str, Layer], batch: Any) -> dict[str, Tensor]:
    """{path: (2, o) as `at_layer` reads it, of the norm or scale behind that layer on this batch; (0,) without one}."""
    norms = Norms(model, layers.values())

    def watch(path: str) -> Any:
        return of_this_thread(lambda layer, args, y: norms.saw(path, y))

    hooks = [layer.register_forward_hook(watch(path)) for path, layer in layers.items()]
    try:
        with evaluating(model):
            call(model, on_device(model, batch))
    finally:
        norms.remove()
        for hook in hooks:
            hook.remove()
    return norms.effective({path: sizes(layer)[1] for path, layer in layers.items()})


def in_stream(m: Tensor, norm: Tensor) -> Tensor:
    """L m: the direction (o,) behind the norm that m before it becomes."""
    w, centred = norm.to(m)
    return w * (m - centred * m.mean())


def at_layer(r: Tensor, norm: Tensor) -> Tensor:
    """L^T r / |L^T r|: what to take off the layer's output so that nothing of r (o,) is left behind the norm."""
    w, centred = norm.to(r)
    d = w * r
    d = d - centred * d.mean()
    return d / d.norm()


@torch.no_grad()
def probed(module: nn.Module, o: int) -> Tensor | None:
    """w and whether the mean is taken off, (2, o); None for a module that is no such map."""
    held = {name: t.detach().float() if t.is_floating_point() else t for name, t in states(module)}
    device = next((t.device for t in held.values()), torch.device("cpu"))
    generator = torch.Generator().manual_seed(0)
    signs = torch.randn(2, o, generator=generator, device="cpu").sign()
    probes = (signs * (0.5 + torch.rand(2, o, generator=generator, device="cpu"))).to(device)  # no entry near 0

    def f(p: Tensor) -> Tensor:
        return functional_call(module, held, (64 * p[None, None],))[0, 0].float()

    try:
        zero = f(torch.zeros(o, device=device))
        first, second = (f(p) - zero for p in probes)
        moved, more = (f(p) - zero for p in (probes[0] + 1, 4 * probes[0]))
    except (RuntimeError, TypeError, ValueError, IndexError, AttributeError):
        return None
    centred = torch.allclose(moved, first, rtol=1e-3, atol=1e-5)
    scale = torch.allclose(more, 4 * first, rtol=1e-3, atol=1e-5)
    norm = torch.allclose(more, first, rtol=1e-3, atol=1e-5)
    ws = []
    for p, out in zip(probes, (first, second)):
        q = p - p.mean() if centred else p
        ws.append(out / q / 64 if scale else out * q.square().mean().sqrt() / q)
    if not (scale or norm) or not torch.allclose(*ws, rtol=1e-3, atol=1e-5) or not ws[0].any():
        return None
    return torch.stack([ws[0], torch.full_like(ws[0], float(centred))])


def states(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from module.named_parameters()
    yield from module.named_buffers()
