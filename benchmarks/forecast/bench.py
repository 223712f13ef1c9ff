"""just forecast [key=value ...]: fine-tune a small time-series transformer with and without the attention barrier.

The base (benchmarks/forecast_base, Toto's shapes in small) was pre-trained on sums of two sinusoids. One variant is attached to
its fused projections and MLPs and trained, per task and seed, without a barrier and with the recommended one at weight
`barrier`. On sawtooth, which is generated, three more are tried: the original's defaults, and a tight barrier in its hard and
its soft form (alpha 40 times the automatic one). Real tasks are series that ship with statsmodels, held out by time.

Scored on held-out windows: forecasting loss and mean absolute error of the patch ahead, on clean inputs and on disturbed ones
(noise, spikes, gaps; the forecast is always scored against clean points), and the attention trace.

Keys are fields of Forecasting (tasks=elnino seeds=0,1 steps=100 ...). Writes forecast.json and forecast.png to out= (default
benchmarks/runs).
"""

import dataclasses
import itertools
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import nn

import lora_lite as ll
from benchmarks.common.options import Options, command, folder
from benchmarks.common.places import RUNS
from benchmarks.common.records import environment, write_pair
from benchmarks.embedded.run import fitting
from benchmarks.forecast.base import load_forecaster
from benchmarks.forecast.data import CONTEXT, DISTURBANCES, TASKS, Task, task
from benchmarks.forecast.report import plot, table
from benchmarks.forecast.toto_like import forecasting_loss, patches, toto_adamw
from lora_lite.errors import closest
from lora_lite.observe.objectives import AttentionBarrier

TARGETS = ("wQKV", "wO", "mlp.0", "mlp.2")
TIGHT = 40  # times the automatic alpha: alpha q95 = 20
Make = Callable[[float, float], AttentionBarrier | None]

ARMS: dict[str, Make] = {
    "none": lambda alpha, weight: None,
    "barrier": lambda alpha, weight: AttentionBarrier(alpha=alpha, soft=True, eps=0.01, weight=weight),
    "defaults": lambda alpha, weight: AttentionBarrier(),
    "tight, hard": lambda alpha, weight: AttentionBarrier(alpha=TIGHT * alpha, weight=weight),
    "tight, soft": lambda alpha, weight: AttentionBarrier(alpha=TIGHT * alpha, soft=True, eps=0.1, weight=weight),
}
"""{name: the barrier from the automatic alpha and a weight}."""
EVERYWHERE = ("none", "barrier")


@dataclass(frozen=True, kw_only=True)
class Forecasting(Options):
    """
    variant      what is trained; r and alpha go to its config where it has both
    tasks        sawtooth, co2, elnino, sunspots, macrodata
    barrier      weight of the barrier
    windows      held-out windows that are scored, evenly spaced, at most
    calibration  batches of training windows that alpha, and variants that start from data, are fixed on
    seeds        of the adapter's start and of the order of windows
    """

    variant: str = "lora"
    tasks: tuple[str, ...] = TASKS
    barrier: float = 0.1
    seeds: tuple[int, ...] = (0, 1, 2)
    steps: int = 200
    batch: int = 8
    lr: float = 3e-3
    weight_decay: float = 0.01
    r: int = 4
    alpha: float = 8.0
    windows: int = 1_000
    calibration: int = 8
    out: str = str(RUNS)

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in self.tasks:
            if name not in TASKS:
                raise ll.LoraLiteError(f"There is no task {name!r}.", found=closest(name, TASKS), fix=f"tasks={TASKS[0]}")
        self.config(0)

    def config(self, seed: int) -> Any:
        kept = ll.config(self.variant)
        fields: dict[str, Any] = {"r": self.r, "alpha": self.alpha} if kept.r and kept.alpha else {}
        if hasattr(kept, "loss_fn"):
            fields["loss_fn"] = lambda model, series: forecasting_loss(model(series), series)
        return ll.config(self.variant, targets=TARGETS, roles=None, seed=seed, lr=self.lr, **fields)


def batches(of: Task, settings: Forecasting, seed: int) -> Iterator[torch.Tensor]:
    """Training windows without end, from the seed alone."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        yield of.draw(generator, settings.batch)


def calibration(of: Task, settings: Forecasting) -> list[torch.Tensor]:
    return list(itertools.islice(batches(of, settings, seed=10_000), settings.calibration))


def automatic_alpha(of: Task, settings: Forecasting) -> float:
    barrier = AttentionBarrier(alpha="auto", soft=True, eps=0.01)
    barrier.calibrate(load_forecaster(), calibration(of, settings))
    return barrier.strength


def train(of: Task, barrier: AttentionBarrier | None, settings: Forecasting, seed: int, tick: Callable[[], None]) -> nn.Module:
    """The base with an adapter, trained; the barrier changes nothing but the loss."""
    model, drawn = load_forecaster(), batches(of, settings, seed)
    objective = ll.objectives.Sum([barrier] if barrier else [])
    cfg, kind = fitting(model, settings.config(seed)), ll.get(settings.variant)
    ll.attach(model, cfg, calibration(of, settings) if kind.needs(cfg) or kind.wants(cfg) else None)
    model.train()
    optimizer, schedule = toto_adamw(ll.param_groups(model, weight_decay=settings.weight_decay), settings.steps)
    for _ in range(settings.steps):
        series = next(drawn)
        with ll.capture(model, objective) as seen:
            loss = forecasting_loss(model(series), series)
        (loss + objective(seen)).backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        tick()
    return model.eval()


@torch.no_grad()
def score(model: nn.Module, of: Task, barrier: AttentionBarrier | None) -> dict[str, Any]:
    """Loss and error on clean held-out windows, losses over the sizes of each disturbance, and the trace."""
    probe = barrier or AttentionBarrier()
    with ll.capture(model, probe) as seen:
        clean = model(of.held_out)
    trace = probe.attn_trace(seen)
    error = patches(of.held_out)[:, :, 1:] - clean.mean[:, :, :-1]
    disturbed = {}
    for name, (disturb, sizes) in DISTURBANCES.items():
        inputs = [disturb(of.held_out, size, torch.Generator().manual_seed(0)) for size in sizes]
        disturbed[name] = [float(forecasting_loss(model(x), of.held_out, of.mask)) for x in inputs]
    return {
        "loss": float(forecasting_loss(clean, of.held_out, of.mask)),
        "error": float(error[patches(of.mask)[:, :, 1:]].abs().mean()),
        "trace": trace["mean"],
        "trace_q95": trace["q95"],
        "beyond": trace["beyond"] if barrier else None,
        "disturbed": disturbed,
    }


def last_value_error(of: Task) -> float:
    """Mean absolute error of repeating the last point of the patch before."""
    cut = patches(of.held_out)
    error = cut[:, :, 1:] - cut[:, :, :-1, -1:]
    return float(error[patches(of.mask)[:, :, 1:]].abs().mean())


@torch.no_grad()
def picture_of(models: dict[str, nn.Module], of: Task) -> dict[str, Any]:
    """The points behind the context of one held-out window, and what each model forecast there a patch ahead."""
    window = of.held_out[len(of.held_out) // 2][None]

    def rounded(x: torch.Tensor) -> list[float]:
        return [round(float(v), 4) for v in x]

    ahead = {name: model(window).mean[0, 0, :-1].flatten()[CONTEXT - 8 :] for name, model in models.items()}
    return {"truth": rounded(window[0, 0, CONTEXT:]), **{name: rounded(values) for name, values in ahead.items()}}


def run_task(name: str, settings: Forecasting, tick: Callable[[], None]) -> dict[str, Any]:
    of = task(name).at_most(settings.windows)
    alpha = automatic_alpha(of, settings)
    made: dict[str, Any] = {
        "windows": list(of.held_out.shape),
        "alpha": alpha,
        "last_value_error": last_value_error(of),
        "base": score(load_forecaster(), of, None),
        "arms": {},
    }
    shown: dict[str, nn.Module] = {"base": load_forecaster()}
    for arm in ARMS if name == "sawtooth" else EVERYWHERE:
        runs = made["arms"][arm] = []
        for seed in settings.seeds:
            barrier = ARMS[arm](alpha, settings.barrier)
            model = train(of, barrier, settings, seed, tick)
            made["trained"] = ll.status(model).trainable
            runs.append({"seed": seed, **score(model, of, barrier)})
            if arm in EVERYWHERE:
                shown.setdefault(arm, model)
    return made | {"picture": picture_of(shown, of)}


def experiment(settings: Forecasting, progress: Progress) -> dict[str, Any]:
    started = time.perf_counter()
    arms = sum(len(ARMS if name == "sawtooth" else EVERYWHERE) for name in settings.tasks)
    step = progress.add_task("training", total=arms * len(settings.seeds) * settings.steps)
    tasks = {}
    for name in settings.tasks:
        progress.update(step, description=name)
        tasks[name] = run_task(name, settings, lambda: progress.advance(step))
    return {
        "example": "forecast",
        "settings": {k: v for k, v in dataclasses.asdict(settings).items() if k != "out"},
        "model": "benchmarks/forecast_base",
        "targets": TARGETS,
        "sizes": {name: sizes for name, (_, sizes) in DISTURBANCES.items()},
        "environment": environment(),
        "tasks": tasks,
        "wall_seconds": round(time.perf_counter() - started, 1),
    }


def forecast(words: list[str], console: Console) -> dict[str, Any]:
    """Train, show and write. Raises LoraLiteError for wrong options."""
    settings = Forecasting.parse(words, "just forecast tasks=elnino seeds=0,1")
    out = folder(settings.out)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        record = experiment(settings, progress)
    written = write_pair(out, "forecast", record, plot(record))
    console.print(table(record))
    console.print(f"{record['wall_seconds']:.0f} s; wrote {written}", soft_wrap=True)
    return record


def main(words: list[str]) -> None:
    command(words, __doc__, forecast, "no record was written")
