"""Does a variant run under an engine? One function per column of the compatibility table: its verdict, or AssertionError.

`check_ddp` and `check_fsdp2` are called inside a group of two processes; `over_two_processes("ddp", names)` makes one.
"""

import copy
import functools
import warnings
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

import lora_lite as ll
from lora_lite.errors import LoraLiteWarning
from lora_lite.sites.sharded import whole
from lora_lite.testing import Check, toy
from lora_lite.testing.checks import check_compiles, error
from tests.oracles.two_processes import in_two_processes

STEPS, RATE = 10, 1e-2
NOISE = 3e-5  # float32: sums over a batch in another order, through ten steps; most end at 1e-7, the worst measured at 1.3e-5


@functools.cache
def prepared(name: str, dtype: torch.dtype) -> nn.Module:
    model, cls = toy.toy().to(dtype), ll.get(name)
    toy.perturb(toy.attached(model, cls, toy.small(cls)), 0.1)
    return model


def adapted(name: str, dtype: torch.dtype = torch.float32) -> nn.Module:
    """The toy with a trained-looking adapter, the same in every process."""
    return copy.deepcopy(prepared(name, dtype))


def train(model: nn.Module, inner: nn.Module, split: Callable[[Tensor], Sequence[Tensor]]) -> None:
    """Ten steps on what `split` makes of ten batches of four; `model` is called, `inner` is the module with the adapter."""
    optimizer = torch.optim.AdamW(ll.param_groups(inner, lr=RATE))
    for step in range(STEPS):
        parts = split(toy.inputs(4, 5, toy.WIDTH, seed=100 + step))
        for part in parts:
            (model(part).square().mean() / len(parts)).backward()
        optimizer.step()
        optimizer.zero_grad()


def trained(model: nn.Module) -> dict[str, Tensor]:
    return {key: whole(p.detach()) for key, p in model.named_parameters() if p.requires_grad}


def own_half(batch: Tensor) -> Tensor:
    return batch.chunk(2)[dist.get_rank()]


def capability(name: str) -> tuple[bool, ...]:
    """(changes the input, changes the output, calls base, shares tensors between layers), found by running it."""
    called: list[Tensor] = []
    model, cls = toy.one(), ll.get(name)
    (adapter,) = toy.perturb(toy.attached(model, cls, toy.small(cls))).layers.values()

    def base(z: Tensor) -> Tensor:
        called.append(z)
        return z @ model.o_proj.weight.T

    base.bias = model.o_proj.bias  # type: ignore[attr-defined]
    if cls.changes_output():
        x = toy.inputs(3, toy.WIDTH)
        adapter.forward(x, base(x), base)
    return cls.changes_input(), cls.changes_output(), len(called) > 1, bool(adapter.shared)


@functools.cache
def representatives() -> list[str]:
    """The first variant of each capability."""
    return list({capability(name): name for name in reversed(ll.names())}.values())


@functools.cache
def alone(name: str, parts: int = 1) -> dict[str, Tensor]:
    """The trained tensors of one process; of several parts of a batch it accumulates the gradients."""
    model = adapted(name)
    train(model, model, lambda batch: batch.chunk(parts))
    return trained(model)


def off(got: dict[str, Tensor], want: dict[str, Tensor]) -> float:
    assert got.keys() == want.keys()
    return max(error(got[key], tensor) for key, tensor in want.items())


def verdict(name: str, wrap: Callable[[nn.Module], nn.Module]) -> str:
    """Two processes with half of every batch each train the adapter of one process that sees it whole, or half by half.

    The two differ where a variant cuts gradients by their sign, as of a strength pushed out of its bounds.
    """
    model = adapted(name)
    assert off(trained(model), alone(name)) > 100 * NOISE, "nothing was trained"
    train(wrap(model), model, lambda batch: [own_half(batch)])
    if (distance := off(trained(model), alone(name))) < NOISE:
        return "yes"
    assert off(trained(model), alone(name, parts=2)) < NOISE, f"{distance:.1e} off the run of one process"
    return "yes, as two half batches accumulated"


def shard(model: nn.Module, **options: Any) -> nn.Module:
    from torch.distributed.fsdp import fully_shard

    for block in model.blocks:  # type: ignore[union-attr]
        fully_shard(block, **options)
    return fully_shard(model, **options)


def shard_layers(model: nn.Module) -> nn.Module:
    """Every adapted layer a shard group of its own: its weight is whole in its own forward only."""
    from torch.distributed.fsdp import fully_shard

    for layer in list(model.modules()):
        if isinstance(layer, nn.Linear):
            fully_shard(layer)
    return fully_shard(model)


def check_ddp(name: str) -> str:
    """DistributedDataParallel. Inside a group of two processes."""
    return verdict(name, nn.parallel.DistributedDataParallel)


def check_fsdp2(name: str) -> str:
    """fully_shard per block, and per adapted layer. Inside a group of two processes."""
    return max((verdict(name, shard), verdict(name, shard_layers)), key=lambda found: found != "yes")


def check_compile(name: str) -> str:
    """torch.compile: one graph, few compilations, equal output."""
    cls = ll.get(name)
    Check(cls, toy.small(cls), check_compiles)()
    return "yes"


def over(engine: str, names: Iterable[str]) -> dict[str, str]:
    """{variant: its verdict or the first line of what went wrong}, inside a group of two processes."""
    check, found = {"ddp": check_ddp, "fsdp2": check_fsdp2}[engine], {}
    for name in names:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", LoraLiteWarning)
                found[name] = check(name)
        except Exception as fault:
            found[name] = f"{type(fault).__name__}: {str(fault).splitlines()[0] if str(fault) else ''}"
    return found


def over_two_processes(engine: str, names: Iterable[str]) -> dict[str, str]:
    """As `over`, from anywhere; of two verdicts the one that is not "yes"."""
    first, second = in_two_processes("tests.oracles.compat_engines:over", engine, list(names), seconds=900)
    return {name: second[name] if found == "yes" else found for name, found in first.items()}
