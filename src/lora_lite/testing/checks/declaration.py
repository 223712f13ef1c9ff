"""What a class declares is what is built: tensors, axes, options."""

import torch
from torch import Tensor, nn

from ...contract.config import AdapterConfig
from .. import toy
from .judging import Variant, demand


def check_specs_are_declarative(cls: Variant, cfg: AdapterConfig) -> None:
    """param_specs says the same twice, draws nothing, and what is built equals it in name, shape and kind."""
    state = torch.random.get_rng_state()
    first, second = (cls.param_specs(24, 48, cfg) for _ in range(2))
    demand(torch.equal(state, torch.random.get_rng_state()), "param_specs draws random numbers")
    described = [{k: (s.shape, s.trainable, s.decay) for k, s in specs.items()} for specs in (first, second)]
    demand(described[0] == described[1], "param_specs differs between two calls")
    for adapter in toy.attached(toy.toy(), cls, cfg).layers.values():
        specs = cls.param_specs(adapter.d_in, adapter.d_out, adapter.cfg)
        trained = {k: tuple(p.shape) for k, p in adapter.named_parameters()}
        frozen = {k: tuple(b.shape) for k, b in adapter.named_buffers()}
        demand(
            trained == {k: s.shape for k, s in specs.items() if s.trainable},
            f"parameters {trained} are not as declared",
        )
        demand(frozen == {k: s.shape for k, s in specs.items() if not s.trainable}, f"buffers {frozen} are not as declared")
        demand(all(p.ndim > 0 for p in adapter.parameters()), "a 0-d parameter")
        demand(not list(adapter.children()), "an adapter with child modules: another library would adapt or quantise them")


def check_config_goes_to_json_and_back(cls: Variant, cfg: AdapterConfig) -> None:
    demand(cls.Config.from_json(cfg.to_json()) == cfg, "the config changes on the way to JSON and back")


def check_shapes_match_annotations(cls: Variant, cfg: AdapterConfig) -> None:
    """Each annotated tensor has the kind and axes it says; a letter means one size throughout a layer."""
    hints = {}
    for base in reversed(cls.__mro__):
        hints |= {k: h for k, h in vars(base).get("__annotations__", {}).items() if hasattr(h, "dim_str")}
    for path, adapter in toy.attached(toy.toy(), cls, cfg).layers.items():
        sizes = {"i": adapter.d_in, "o": adapter.d_out, **({} if adapter.cfg.r is None else {"r": adapter.cfg.r})}
        for name, tensor in adapter.tensors().items():
            demand(name in hints, f'{name} has no annotation such as {name}: Float[Parameter, "r i"]')
            letters = hints[name].dim_str.split()
            demand(len(letters) == tensor.ndim, f"{path}.{name}: {tuple(tensor.shape)} against {hints[name].dim_str!r}")
            for letter, size in zip(letters, tensor.shape):
                meant = int(letter) if letter.isdigit() else sizes.setdefault(letter, size)
                demand(meant == size, f"{path}.{name}: axis {letter} is {size}, elsewhere {meant}")
            kind = nn.Parameter if isinstance(tensor, nn.Parameter) else Tensor
            demand(hints[name].array_type is kind, f"{name} is annotated as {hints[name].array_type.__name__}")
