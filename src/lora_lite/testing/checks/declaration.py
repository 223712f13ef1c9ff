"""What a class declares is what is built: tensors, axes, options."""

import dataclasses

import torch
from torch import Tensor, nn

from ...contract.config import AdapterConfig
from .. import toy
from .judging import Variant, demand, whole

WIDE = 1024  # bfloat16 holds every whole number up to 256, float16 up to 2048


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


def check_places_are_exact(cls: Variant, cfg: AdapterConfig) -> None:
    """Whole numbers in frozen tensors, such as places, are kept exactly under a wide layer in bfloat16, where 257 is 256."""
    if all(spec.trainable for spec in cls.param_specs(WIDE, WIDE, cfg).values()):
        return
    exact = wide_buffers(cls, dataclasses.replace(cfg, dtype=torch.float32, buffer_dtype=torch.float32))
    places = {name: t for name, t in exact.items() if whole(t)}
    kept = wide_buffers(cls, cfg) if places else {}
    for name, tensor in places.items():
        demand(
            torch.equal(kept[name].float(), tensor),
            f"{name} holds whole numbers that {kept[name].dtype} rounds on a layer {WIDE} wide: give it one axis, which keeps "
            "cfg.dtype, or its config buffer_dtype: torch.dtype | None = torch.float32",
        )


def wide_buffers(cls: Variant, cfg: AdapterConfig) -> dict[str, Tensor]:
    """The frozen tensors under a layer in bfloat16."""
    model = toy.one(WIDE, WIDE, dtype=torch.bfloat16)
    (adapter,) = toy.attached(model, cls, cfg, width=WIDE).layers.values()
    return dict(adapter.named_buffers())


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
