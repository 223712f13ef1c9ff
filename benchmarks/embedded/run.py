"""One run: load a base, attach or unfreeze, train a fixed number of steps, score. The same code for every variant and model."""

import copy
import dataclasses
import json
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer

import lora_lite as ll
from benchmarks.common import team
from benchmarks.common.measure import cost, difference, fidelity
from benchmarks.common.places import BASE, SWEEP
from benchmarks.common.text import Part
from benchmarks.embedded.tasks import Code, Math, Task
from lora_lite.contract.registry import variant_of
from lora_lite.sites.layer import sizes

FULL = "full"  # not a variant: every weight of the base is trained, the peer that adapters are measured against
FULL_LR = 1e-3
Progress = Callable[[Iterable[int], str], Iterable[int]]


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Options of a run; the rest of `key=value` belongs to the variant's config.

    model    folder or hub name of a causal language model     task   "code" or "math"
    steps, batch, window   training steps, rows and tokens of a row
    seeds    one run each      lr  None: on the embedded base the one its sweep found, else the config's own
    against  with several seeds, the variant that runs beside this one for a paired comparison
    eval_windows  windows of each held-out text that are scored; eval_every  steps between points of the curve
    """

    model: str = str(BASE)
    task: str = "code"
    steps: int = 200
    batch: int = 8
    window: int = 256
    seeds: tuple[int, ...] = (0,)
    lr: float | None = None
    weight_decay: float = 0.0
    against: str = "lora"
    eval_windows: int = 192
    eval_every: int = 50
    calibration_batches: int = 16
    base_dtype: str = "float32"
    device: str = "cuda" if torch.cuda.is_available() else "cpu"
    train_data: str | None = None
    test_data: str | None = None


def load_base(settings: Settings) -> tuple[nn.Module, Any]:
    """(frozen model in eval mode, tokenizer). Raises LoraLiteError where transformers cannot load them."""
    dtype = getattr(torch, settings.base_dtype)
    try:
        model: Any = AutoModelForCausalLM.from_pretrained(settings.model, dtype=dtype)
        tokenizer = AutoTokenizer.from_pretrained(settings.model)
    except (OSError, ValueError) as error:
        raise ll.LoraLiteError(
            f"model={settings.model} cannot be loaded: {str(error).splitlines()[0]}",
            expected="A folder or hub name of a causal language model with its tokenizer.",
            fix="model=benchmarks/base",
        ) from error
    model.to(settings.device)
    model.config.use_cache = False
    return model.eval().requires_grad_(False), tokenizer


def make_task(settings: Settings, tokenizer: Any, seed: int, scored: Part = "test") -> Task:
    if settings.task == "code":
        return Code(tokenizer, seed, settings.batch, settings.window, settings.eval_windows, scored)
    if settings.task == "math":
        given: dict[str, Any] = {
            k: v for k, v in (("train", settings.train_data), ("test", settings.test_data)) if v is not None
        }
        local: dict[str, Any] = {} if settings.test_data is None else {"test_config": None}
        return Math(tokenizer, seed, settings.batch, settings.window, **given, **local)
    raise ll.LoraLiteError(f"task={settings.task!r} is unknown.", expected='"code" or "math".', fix="task=code")


def train(
    model: nn.Module, groups: list[dict[str, Any]], task: Task, settings: Settings, progress: Progress, label: str
) -> list[dict[str, float]]:
    """AdamW, linear warm-up over a tenth of the steps and linear decay to 0; returns the curve of scores and losses.

    Of several processes each takes its rows of every batch, and only the first scores.
    """
    optimizer = torch.optim.AdamW(groups)
    warmup = max(1, settings.steps // 10)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1.0, (step + 1) / warmup) * (1 - step / settings.steps)
    )
    parameters = [p for group in groups for p in group["params"]]
    curve, losses, replica = [], [], team.replica(model)
    evaluate = task.evaluate if team.is_first() else lambda _: {}
    model.train()
    for step in progress(range(settings.steps), label):
        rows, weight = team.part(task.batch(step))
        loss = weight * replica(**{name: value.to(settings.device) for name, value in rows.items()}).loss
        reached = team.mean(loss.detach().clone())
        if not reached.isfinite():
            raise ll.LoraLiteError(
                f"{label}: the loss is {reached.item()} at step {step}.", expected="A finite loss.", fix="a smaller lr=..."
            )
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        losses.append(reached.item())
        if settings.eval_every and (step + 1) % settings.eval_every == 0 and step + 1 < settings.steps:
            model.eval()
            curve.append({"step": step + 1, "loss": sum(losses) / len(losses), **evaluate(model)})
            losses.clear()
            model.train()
    model.eval()
    curve.append({"step": settings.steps, "loss": sum(losses) / max(1, len(losses)), **evaluate(model)})
    return curve


def calibration_data(task: Task, cls: Any, cfg: ll.AdapterConfig, settings: Settings) -> Any:
    """Training batches for variants that start from data, from steps that training does not reach."""
    if not (cls.needs(cfg) or cls.wants(cfg)):
        return None
    return [task.batch(settings.steps + index) for index in range(settings.calibration_batches)]


def fitting(model: nn.Module, cfg: ll.AdapterConfig) -> ll.AdapterConfig:
    """The config with its default rank lowered to what the smallest target allows: defaults are meant for wider models."""
    if cfg.r is None or cfg.r != type(cfg)().r:
        return cfg
    most = min(min(sizes(layer)) for layer in ll.find_targets(model, cfg).values())
    return dataclasses.replace(cfg, r=min(cfg.r, most))


def train_variant(
    cfg: ll.AdapterConfig, settings: Settings, progress: Progress, *, bare: nn.Module, task: Task
) -> list[dict[str, float]]:
    """Attach to a copy, train, score; nothing else is measured."""
    model, cls = copy.deepcopy(bare), variant_of(cfg)
    ll.attach(model, cfg, calibration_data(task, cls, cfg, settings))
    return train(model, ll.param_groups(model, weight_decay=settings.weight_decay), task, settings, progress, cls.variant)


def run_variant(
    name: str, fields: dict[str, Any], settings: Settings, seed: int, progress: Progress, *, bare: nn.Module, task: Task
) -> dict[str, Any]:
    """Attach, measure cost, train, measure fidelity; detach at the end must give the base back bit for bit.

    Of several processes only the first measures; the others' record ends with the curve.
    """
    cfg = fitting(bare, ll.config(name, **{"seed": seed, **fields, **learning_rate(name, settings)}))
    model = copy.deepcopy(bare)
    ids = task.batch(0)["input_ids"].to(settings.device)
    data = calibration_data(task, ll.get(name), cfg, settings)
    before = bare(input_ids=ids).logits
    start = time.perf_counter()
    handle = ll.attach(model, cfg, data)
    attach_seconds = time.perf_counter() - start
    with torch.no_grad():
        start_error = difference(model(input_ids=ids).logits, before)
    record: dict[str, Any] = {
        "seed": seed,
        "config": {"variant": name, **json.loads(cfg.to_json())},
        "layers": len(handle.layers),
    }
    if team.is_first():
        record["cost"] = {"attach_seconds": attach_seconds, **cost(model, bare, ids)}
    groups = ll.param_groups(model, weight_decay=settings.weight_decay)
    record["curve"] = train(model, groups, task, settings, progress, f"{name}, seed {seed}")
    if not team.is_first():
        return record
    record["fidelity"] = fidelity(model, handle, bare, ids, start_error)
    handle.detach()
    with torch.no_grad():
        record["fidelity"]["detach"] = difference(model(input_ids=ids).logits, before)
    return record


def is_embedded(settings: Settings) -> bool:
    return Path(settings.model).resolve() == BASE.resolve()


def learning_rate(name: str, settings: Settings) -> dict[str, float]:
    """The given rate; on the embedded base the one that its sweep found; else the config's own, meant for language models."""
    swept = best_rate(name) if is_embedded(settings) else None
    rate = settings.lr or swept
    return {} if rate is None else {"lr": rate}


def best_rate(name: str) -> float | None:
    """The rate that the committed sweep found for this variant on the embedded base, None where it was not swept."""
    path = SWEEP / f"{name}.json"
    return json.loads(path.read_text())["best"] if path.exists() else None


def run_full(
    settings: Settings, seed: int, progress: Progress, *, bare: nn.Module, task: Task, lr: float | None = None
) -> dict[str, Any]:
    """Full fine-tuning with the same data, steps and schedule."""
    lr = lr or best_rate(FULL) or FULL_LR
    model = copy.deepcopy(bare).requires_grad_(True)
    groups = [{"params": list(model.parameters()), "lr": lr, "weight_decay": settings.weight_decay}]
    curve = train(model, groups, task, settings, progress, f"{FULL}, seed {seed}")
    return {"seed": seed, "config": {"variant": FULL, "lr": lr}, "curve": curve}


def settings_json(settings: Settings) -> dict[str, Any]:
    """The settings as a record says them: the embedded base by its place in the repository, no paths of a machine."""
    fields = dataclasses.asdict(settings)
    if is_embedded(settings):
        fields["model"] = "benchmarks/base"
    return fields
