"""The small models and the data that the conformance suite runs on."""

import dataclasses
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ..calibration.statistics import parse
from ..contract.adapter import Adapter
from ..contract.config import AdapterConfig
from ..core.attach import attach
from ..core.handle import Attached
from ..errors import LoraLiteWarning

WIDTH, INNER = 24, 48


class Block(nn.Module):
    """Residual pair of readers and writers under the names that language models use."""

    def __init__(self, bias: bool):
        super().__init__()
        self.q_proj = nn.Linear(WIDTH, 32, bias=bias)
        self.o_proj = nn.Linear(32, WIDTH, bias=bias)
        self.up_proj = nn.Linear(WIDTH, INNER, bias=bias)
        self.down_proj = nn.Linear(INNER, WIDTH, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.o_proj(torch.tanh(self.q_proj(x)))
        return x + self.down_proj(torch.nn.functional.silu(self.up_proj(x)))


class Toy(nn.Module):
    """Two blocks, (..., 24) -> (..., 24); the first without bias. attention_mask is only there to be calibrated with."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Block(bias=False), Block(bias=True)])

    def forward(self, x: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x


class One(nn.Module):
    """A single layer under a writer's name, for properties of one map."""

    def __init__(self, d_in: int, d_out: int, bias: bool):
        super().__init__()
        self.o_proj = nn.Linear(d_in, d_out, bias=bias)

    def forward(self, x: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        return self.o_proj(x)


def seeded(make: Callable[[], Any], seed: int = 0) -> Any:
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        return make()


def toy() -> Toy:
    """In eval mode, as every reference output is: a method may draw at random while it trains."""
    return seeded(Toy).eval()


def one(d_in: int = 24, d_out: int = 32, bias: bool = True, dtype: torch.dtype = torch.float32) -> One:
    return seeded(lambda: One(d_in, d_out, bias)).to(dtype).eval()


def inputs(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 1) -> Tensor:
    return seeded(lambda: torch.randn(*shape), seed).to(dtype)


def batches(width: int = WIDTH, count: int = 4, dtype: torch.dtype = torch.float32) -> list[dict[str, Tensor]]:
    """Calibration data of unequal channels, with padding at the end of every second row."""
    scale = torch.linspace(0.2, 3.0, width)
    made = []
    for index in range(count):
        mask = torch.ones(4, 12, dtype=torch.long)
        mask[::2, 9:] = 0
        made.append({"x": (inputs(4, 12, width, seed=10 + index) * scale).to(dtype), "attention_mask": mask})
    return made


def small(cls: type[Adapter]) -> AdapterConfig:
    """The default config with a rank that fits the toy and, so that every layer counts, no filters."""
    cfg = cls.Config()
    return dataclasses.replace(cfg, **({} if cfg.r is None else {"r": min(cfg.r, 8)}), targets="all-linear")


def calibration(cls: type[Adapter], cfg: AdapterConfig, width: int = WIDTH, dtype: torch.dtype = torch.float32) -> Any:
    """What `attach` has to be given for this config: None, batches, or labelled batches."""
    needs = cls.needs(cfg)
    if not needs:
        return None
    data = batches(width, dtype=dtype)
    return {"positive": data[:2], "negative": data[2:]} if any(parse(name).label for name in needs) else data


def attached(
    model: nn.Module, cls: type[Adapter], cfg: AdapterConfig, *, name: str = "default", width: int = WIDTH
) -> Attached:
    dtype = next(model.parameters()).dtype
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", LoraLiteWarning)
        return attach(model, cfg, calibration(cls, cfg, width, dtype), name=name)


@torch.no_grad()
def perturb(handle: Attached, size: float = 0.3, seed: int = 2) -> Attached:
    """Move every trainable tensor off its start: by `size` of its own scale, or of 1 where it is zero."""
    generator = torch.Generator().manual_seed(seed)
    for adapter in handle.layers.values():
        for parameter in adapter.parameters():
            scale = float(parameter.abs().mean()) or 1.0
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.add_((size * scale * noise).to(parameter.dtype))
    return handle
