"""A small causal time-series transformer built like Toto: the shapes and names that its fine-tuning meets, 34,768 parameters.

    series (batch, variates, points) -> patches (batch, variates, patches, p) -> embedding -> blocks -> Gaussian of the next one

Time-wise blocks attend causally along the patches of each variate, with rotary embedding; space-wise blocks attend across the
variates of one patch. A block is x + attention(norm(x)), x + mlp(norm(x)) with Linears `attention.wQKV`, `attention.wO`,
`mlp.0` and `mlp.2`; wQKV is fused, and its output is read as (3, head_dim, heads), heads fastest.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

PATCH = 8
LEAST_SCALE = 1e-3


class Forecast(NamedTuple):
    """mean, scale: (batch, variates, patches, p), the Gaussian of the patch that follows."""

    mean: Tensor
    scale: Tensor


def patches(series: Tensor, p: int = PATCH) -> Tensor:
    """(batch, variates, points) -> (batch, variates, patches, p)."""
    return rearrange(series, "b v (t p) -> b v t p", p=p)


def rotary(x: Tensor) -> Tensor:
    """Rotary position embedding of x (..., T, head_dim): pair (i, i + head_dim/2) turned by t 10000^(-2i/head_dim)."""
    T, half = x.shape[-2], x.shape[-1] // 2
    frequency = 10000.0 ** (-torch.arange(half, device=x.device, dtype=x.dtype) / half)
    angle = torch.arange(T, device=x.device, dtype=x.dtype)[:, None] * frequency
    a, b = x[..., :half], x[..., half:]
    return torch.cat([a * angle.cos() - b * angle.sin(), a * angle.sin() + b * angle.cos()], -1)


class Attention(nn.Module):
    """Self-attention along the second axis from the end, (..., T, d) -> (..., T, d)."""

    def __init__(self, d: int, heads: int, causal: bool):
        super().__init__()
        self.heads, self.causal = heads, causal
        self.wQKV = nn.Linear(d, 3 * d)
        self.wO = nn.Linear(d, d)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = rearrange(self.wQKV(x), "b t (three dim heads) -> three b heads t dim", three=3, heads=self.heads)
        if self.causal:
            q, k = rotary(q), rotary(k)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal)
        return self.wO(rearrange(mixed, "b heads t dim -> b t (dim heads)"))


class Block(nn.Module):
    """along: 'time' (causal) or 'space'."""

    def __init__(self, d: int, heads: int, inner: int, along: str):
        super().__init__()
        self.along = along
        self.norm1, self.norm2 = nn.RMSNorm(d), nn.RMSNorm(d)
        self.attention = Attention(d, heads, causal=along == "time")
        self.mlp = nn.Sequential(nn.Linear(d, inner), nn.GELU(), nn.Linear(inner, d))

    def forward(self, x: Tensor) -> Tensor:
        apart = {"time": "(b v) t d", "space": "(b t) v d"}[self.along]
        rows = rearrange(self.norm1(x), f"b v t d -> {apart}")
        x = x + rearrange(self.attention(rows), f"{apart} -> b v t d", v=x.shape[1], t=x.shape[2])
        return x + self.mlp(self.norm2(x))


class TotoLike(nn.Module):
    """series (batch, variates, points), standardised -> Forecast; points is a multiple of p, any number of variates."""

    def __init__(
        self,
        p: int = PATCH,
        d: int = 32,
        heads: int = 4,
        along: Sequence[str] = ("time", "time", "space", "time"),
        inner: int = 64,
    ):
        super().__init__()
        self.p = p
        self.embedding = nn.Linear(p, d)
        self.blocks = nn.ModuleList(Block(d, heads, inner, kind) for kind in along)
        self.norm = nn.RMSNorm(d)
        self.head = nn.Linear(d, 2 * p)

    def forward(self, series: Tensor) -> Forecast:
        x = self.embedding(patches(series, self.p))
        for block in self.blocks:
            x = block(x)
        mean, raw = self.head(self.norm(x)).chunk(2, -1)
        return Forecast(mean, F.softplus(raw) + LEAST_SCALE)


def forecasting_loss(forecast: Forecast, series: Tensor, mask: Tensor | None = None) -> Tensor:
    """Toto's fine-tuning loss: the mean of .575 NLL + .425 ln(1 + (error / .1)^2 / 2) over the points behind the first patch.

    mask  (batch, variates, points), True for the points that count
    """
    mean, scale = (x[:, :, :-1] for x in forecast)
    p = mean.shape[-1]
    error = patches(series, p)[:, :, 1:] - mean
    nll = 0.5 * (error / scale).square() + scale.log() + 0.5 * math.log(2 * math.pi)
    loss = 0.575 * nll + 0.425 * (0.5 * (error / 0.1).square()).log1p()
    return loss.mean() if mask is None else loss[patches(mask, p)[:, :, 1:]].mean()


def toto_schedule(
    optimizer: torch.optim.Optimizer, steps: int, warmup: float = 0.1, flat: float = 0.4, least: float = 0.01
) -> LambdaLR:
    """Linear warm-up, then lr, then least lr + (1 - sqrt(progress)) (1 - least) lr; warmup and flat are shares of the steps."""
    rising, until = max(1, round(warmup * steps)), round((warmup + flat) * steps)

    def factor(step: int) -> float:
        if step < until:
            return min(1.0, (step + 1) / rising)
        return least + (1 - math.sqrt((step - until) / max(1, steps - until))) * (1 - least)

    return LambdaLR(optimizer, factor)


def toto_adamw(groups: list[dict], steps: int) -> tuple[torch.optim.AdamW, LambdaLR]:
    """Toto's optimizer over parameter groups that carry their own rate and decay, and its schedule."""
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.999), eps=1e-7)
    return optimizer, toto_schedule(optimizer, steps)
