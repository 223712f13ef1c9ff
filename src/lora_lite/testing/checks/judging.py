"""What the checks share: how a promise is demanded, how a model is compared with what it was."""

from typing import Any

import torch
from torch import Tensor, nn

from ...contract.adapter import Adapter
from ...contract.config import AdapterConfig
from .. import toy

TOLERANCE = 2e-5  # float32, layers of this size

Variant = type[Adapter]


def error(got: Tensor, want: Tensor) -> float:
    """Largest difference relative to the largest value of `want`, at least 1."""
    if got.shape != want.shape:
        raise AssertionError(f"shape {tuple(got.shape)}, expected {tuple(want.shape)}")
    if want.numel() == 0:
        return 0.0
    got, want = got.detach().double(), want.detach().double()
    return float((got - want).abs().max() / want.abs().max().clamp(min=1))


def whole(tensor: Tensor) -> bool:
    """Whether every value is a whole number: places, counts, signs."""
    return torch.equal(tensor, tensor.round())


def demand(truth: Any, promise: str) -> None:
    if not truth:
        raise AssertionError(promise)


def photograph(model: nn.Module) -> dict[str, Any]:
    """Everything of a model that attach may change and detach must restore."""
    return {
        "keys": list(model.state_dict()),
        "values": [t.clone() for t in model.state_dict().values()],
        "flags": {k: p.requires_grad for k, p in model.named_parameters()},
        "modules": [(k, type(m), m.training) for k, m in model.named_modules()],
        "hooks": [len(vars(m)["_forward_hooks"]) + len(vars(m)["_forward_pre_hooks"]) for m in model.modules()],
    }


def demand_same(model: nn.Module, before: dict[str, Any], when: str) -> None:
    after = photograph(model)
    for part in ("keys", "flags", "modules", "hooks"):
        demand(after[part] == before[part], f"{part} differ {when}")
    demand(all(map(torch.equal, after["values"], before["values"])), f"values differ {when}")


def perturbed(cls: Variant, cfg: AdapterConfig, size: float = 0.3) -> tuple[nn.Module, Any]:
    model = toy.toy()
    return model, toy.perturb(toy.attached(model, cls, cfg), size)
