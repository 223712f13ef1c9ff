"""Coverage: which share of a model's numbers lies under adapted layers, and what lies outside."""

from collections.abc import Iterable
from typing import NamedTuple

from torch import nn

from ..contract.adapter import Adapter
from ..sites.layer import is_linear, sizes, unfit
from ..sites.model import plain, unwrapped
from ..sites.obstacles import expert_parameters
from ..sites.quantised import is_packed

CONVOLUTIONS = (nn.modules.conv._ConvNd,)


class Coverage(NamedTuple):
    """share: of all numbers, each counted once; outside {kind: (numbers, paths of some)} in order of size."""

    share: float
    outside: dict[str, tuple[int, list[str]]]

    def __str__(self) -> str:
        total = sum(n for n, _ in self.outside.values()) / (1 - self.share) if self.share < 1 else 0
        parts = [
            f"{kind} {n / total:.0%} ({', '.join(dict.fromkeys(paths))})" for kind, (n, paths) in self.outside.items() if n
        ]
        return f"{self.share:.1%} of the model's numbers are in adapted layers" + (
            f"; outside: {'; '.join(parts)}" if parts else ""
        )


def coverage(model: nn.Module, adapted: Iterable[str]) -> Coverage:
    """Parameters in the layers at these paths over all of the model's, packed ones by their logical size."""
    model = unwrapped(model)
    chosen, experts = set(adapted), {id(p) for p in expert_parameters(model).values()}
    inside, counted = 0, set()
    outside: dict[str, tuple[int, list[str]]] = {}
    modules = [(plain(path), module) for path, module in model.named_modules() if not isinstance(module, Adapter)]
    for path, module in sorted(modules, key=lambda item: item[0] not in chosen):  # a shared weight counts where it is adapted
        for name, parameter in module.named_parameters(recurse=False):
            if id(parameter) in counted or nn.parameter.is_lazy(parameter):
                continue
            counted.add(id(parameter))
            linear = is_linear(module) and name == "weight"
            packed = linear and not unfit(module) and is_packed(module)
            n = sizes(module)[0] * sizes(module)[1] if packed else parameter.numel()  # type: ignore[arg-type]
            if path in chosen:
                inside += n
                continue
            kind = kind_of(module, parameter, id(parameter) in experts)
            before, paths = outside.get(kind, (0, []))
            leaf = path.rpartition(".")[2] if name in ("weight", "bias") else name
            outside[kind] = before + n, paths if leaf in paths or len(paths) > 3 else [*paths, leaf]
    total = inside + sum(n for n, _ in outside.values())
    return Coverage(inside / total if total else 0.0, dict(sorted(outside.items(), key=lambda item: -item[1][0])))


def kind_of(module: nn.Module, parameter: nn.Parameter, expert: bool) -> str:
    if expert:
        return "experts"
    if isinstance(module, (nn.Embedding, nn.EmbeddingBag)):
        return "embeddings"
    if isinstance(module, CONVOLUTIONS):
        return "convolutions"
    if isinstance(module, nn.RNNBase):
        return "recurrent layers"
    if is_linear(module):
        return "other Linears"
    return "norms and biases" if parameter.ndim < 2 else "other parameters"
