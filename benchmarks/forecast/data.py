"""Series for the forecasting example: sinusoids, sawtooths, real ones from statsmodels, and disturbances of the inputs.

Windows are (n, variates, 128) and standardised per series. Synthetic ones are standardised over the whole window. Real ones are
cut from a long series whose last quarter is held out; they are standardised by their first 96 points alone and scored on the
last 32, which for held-out windows lie in the held-out quarter. Earlier points may be their context: they are the past by then.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

POINTS, CONTEXT, VARIATES = 128, 96, 3
HELD_OUT = 0.25


def uniform(generator: torch.Generator, low: float, high: float, *shape: int) -> Tensor:
    return low + (high - low) * torch.rand(*shape, generator=generator)


def standardised(series: Tensor, by: int = POINTS) -> Tensor:
    """Each series less its mean, over its deviation, both of its first `by` points."""
    known = series[..., :by]
    return (series - known.mean(-1, keepdim=True)) / known.std(-1, keepdim=True).clamp_min(1e-6)


def sinusoids(generator: torch.Generator, n: int) -> Tensor:
    """(n, 3, 128): sums of two sinusoids of 2 to 8 cycles and amplitude .3 to 1.3, with noise .05."""
    shape = (n, VARIATES, 2, 1)
    cycles, amplitude = uniform(generator, 2, 8, *shape), uniform(generator, 0.3, 1.3, *shape)
    phase = uniform(generator, 0, 2 * math.pi, *shape)
    waves = amplitude * torch.sin(2 * math.pi * cycles * torch.arange(POINTS) / POINTS + phase)
    return standardised(waves.sum(-2) + 0.05 * torch.randn(n, VARIATES, POINTS, generator=generator))


def sawtooths(generator: torch.Generator, n: int) -> Tensor:
    """(n, 3, 128): sawtooths in [-1, 1] of 6 to 14 cycles with one change of level in [-1, 1] and 1 % spikes in [-3, 3]."""
    shape = (n, VARIATES, 1)
    cycles, phase = uniform(generator, 6, 14, *shape), uniform(generator, 0, 1, *shape)
    series = 2 * ((cycles * torch.arange(POINTS) / POINTS + phase) % 1) - 1
    place, level = torch.randint(1, POINTS, shape, generator=generator), uniform(generator, -1, 1, *shape)
    series = series + level * (torch.arange(POINTS) >= place)
    return standardised(spiked(series, 0.01, generator))


# --- real series ------------------------------------------------------------------------------------------------------


def shipped(name: str) -> Any:
    """The data frame of a dataset of statsmodels."""
    from statsmodels import datasets

    return getattr(datasets, name).load_pandas().data


def co2() -> np.ndarray:
    """Weekly atmospheric carbon dioxide at Mauna Loa, 1958 to 2001; missing weeks repeat the one before. (1, 2284)."""
    return shipped("co2")["co2"].ffill().to_numpy()[None]


def elnino() -> np.ndarray:
    """Monthly sea surface temperature of the eastern tropical Pacific, 1950 to 2010. (1, 732)."""
    return shipped("elnino").drop(columns="YEAR").to_numpy().reshape(1, -1)


def sunspots() -> np.ndarray:
    """Yearly sunspot numbers, 1700 to 2008. (1, 309)."""
    return shipped("sunspots")["SUNACTIVITY"].to_numpy()[None]


def macrodata() -> np.ndarray:
    """Quarterly United States 1959-2009: growth of GDP, consumption, investment; unemployment, inflation, bills. (6, 202)."""
    data = shipped("macrodata")
    growth = 100 * np.diff(np.log(data[["realgdp", "realcons", "realinv"]].to_numpy()), axis=0)
    return np.concatenate([growth, data[["unemp", "infl", "tbilrate"]].to_numpy()[1:]], axis=1).T


REAL: dict[str, Callable[[], np.ndarray]] = {"co2": co2, "elnino": elnino, "sunspots": sunspots, "macrodata": macrodata}


def windows(series: Tensor, first: int, last: int) -> Tensor:
    """Every window of (variates, time) that starts at first, ..., last: (n, variates, 128), standardised by its context."""
    cut = series.unfold(-1, POINTS, 1)[:, first : last + 1]
    return standardised(cut.transpose(0, 1), by=CONTEXT)


# --- tasks ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Task:
    """
    draw      (generator, n) -> training windows (n, variates, 128)
    held_out  windows (m, variates, 128), scored from point `start` on
    """

    name: str
    draw: Callable[[torch.Generator, int], Tensor]
    held_out: Tensor
    start: int

    @property
    def mask(self) -> Tensor:
        """Of the held-out windows: the points that are scored."""
        return (torch.arange(POINTS) >= self.start).expand(self.held_out.shape)

    def at_most(self, n: int) -> "Task":
        """The same task with n evenly spaced held-out windows where it has more."""
        chosen = torch.linspace(0, len(self.held_out) - 1, min(n, len(self.held_out))).long()
        return dataclasses.replace(self, held_out=self.held_out[chosen])


def synthetic(name: str, make: Callable[[torch.Generator, int], Tensor], seed: int = 1_000, n: int = 64) -> Task:
    return Task(name, make, make(torch.Generator().manual_seed(seed), n), start=0)


def real(name: str) -> Task:
    series = torch.from_numpy(REAL[name]().astype(np.float64))
    points = series.shape[-1]
    split = points - round(HELD_OUT * points)
    training = windows(series, 0, split - POINTS).float()
    held_out = windows(series, split - CONTEXT, points - POINTS).float()

    def draw(generator: torch.Generator, n: int) -> Tensor:
        return training[torch.randint(len(training), (n,), generator=generator)]

    return Task(name, draw, held_out, start=CONTEXT)


@functools.cache
def task(name: str) -> Task:
    return synthetic(name, sawtooths) if name == "sawtooth" else real(name)


TASKS = ("sawtooth", *REAL)


# --- disturbances -----------------------------------------------------------------------------------------------------


def noisy(series: Tensor, size: float, generator: torch.Generator) -> Tensor:
    """Gaussian noise of this deviation on every point."""
    return series + size * torch.randn(series.shape, generator=generator)


def spiked(series: Tensor, share: float, generator: torch.Generator) -> Tensor:
    """A value in [-3, 3] added to this share of points."""
    hit = torch.rand(series.shape, generator=generator) < share
    return series + hit * uniform(generator, -3, 3, *series.shape)


def with_gaps(series: Tensor, share: float, generator: torch.Generator, p: int = 8) -> Tensor:
    """This share of patches missing, that is 0, the mean of the context."""
    kept = torch.rand(*series.shape[:-1], series.shape[-1] // p, generator=generator) >= share
    return series * kept.repeat_interleave(p, -1)


DISTURBANCES = {
    "noise": (noisy, (0.0, 0.1, 0.2, 0.4, 0.8)),
    "spikes": (spiked, (0.0, 0.01, 0.02, 0.05, 0.1)),
    "gaps": (with_gaps, (0.0, 0.05, 0.1, 0.2, 0.4)),
}
"""{name: (what it does to the inputs, the sizes that are measured)}; the forecast is scored against undisturbed points."""
