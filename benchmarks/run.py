"""One run: load a base, attach or unfreeze, train a fixed number of steps, score. The same code for every variant and model."""

import copy
import dataclasses
import platform
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer

import lora_lite as ll
from benchmarks.measure import cost, difference, fidelity, seconds
from benchmarks.tasks import Code, Math, Task

BASE = Path(__file__).parent / "base"
FULL = "full"  # not a variant: every weight of the base is trained, the peer that adapters are measured against
FULL_LR = 1e-3
Progress = Callable[[Iterable[int], str], Iterable[int]]


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Options of a run; the rest of `key=value` belongs to the variant's config.

    model    folder or hub name of a causal language model     task   "code" or "math"
    steps, batch, window   training steps, rows and tokens of a row
    seeds    one run each                                       lr     None: the config's own
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
    """(frozen model in training-free mode, tokenizer)."""
    dtype = getattr(torch, settings.base_dtype)
    model = AutoModelForCausalLM.from_pretrained(settings.model, dtype=dtype).to(settings.device)
    model.config.use_cache = False
    return model.eval().requires_grad_(False), AutoTokenizer.from_pretrained(settings.model)


def make_task(settings: Settings, tokenizer: Any, seed: int) -> Task:
    if settings.task == "code":
        return Code(tokenizer, seed, settings.batch, settings.window, settings.eval_windows)
    if settings.task == "math":
        given = {k: v for k, v in (("train", settings.train_data), ("test", settings.test_data)) if v is not None}
        local = {} if settings.test_data is None else {"test_config": None}
        return Math(tokenizer, seed, settings.batch, settings.window, **given, **local)
    raise ll.LoraLiteError(f"task={settings.task!r} is unknown.", expected='"code" or "math".', fix="task=code")


def environment() -> dict[str, Any]:
    """Where a record was made; no names of machines."""
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "lora_lite": ll.__version__,
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else platform.machine(),
        "threads": torch.get_num_threads(),
        "system": sys.platform,
    }


def train(
    model: nn.Module, groups: list[dict[str, Any]], task: Task, settings: Settings, progress: Progress, label: str
) -> list[dict[str, float]]:
    """AdamW, linear warm-up over a tenth of the steps and linear decay to 0; returns the curve of scores and losses."""
    optimizer = torch.optim.AdamW(groups)
    warmup = max(1, settings.steps // 10)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1.0, (step + 1) / warmup) * (1 - step / settings.steps)
    )
    parameters = [p for group in groups for p in group["params"]]
    curve, losses = [], []
    model.train()
    for step in progress(range(settings.steps), label):
        batch = {name: value.to(settings.device) for name, value in task.batch(step).items()}
        loss = model(**batch).loss
        if not loss.isfinite():
            raise ll.LoraLiteError(
                f"{label}: the loss is {loss.item()} at step {step}.", expected="A finite loss.", fix="a smaller lr=..."
            )
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        if settings.eval_every and (step + 1) % settings.eval_every == 0 and step + 1 < settings.steps:
            model.eval()
            curve.append({"step": step + 1, "loss": sum(losses) / len(losses), **task.evaluate(model)})
            losses.clear()
            model.train()
    model.eval()
    curve.append({"step": settings.steps, "loss": sum(losses) / max(1, len(losses)), **task.evaluate(model)})
    return curve


def calibration_data(task: Task, cls: Any, cfg: ll.AdapterConfig, settings: Settings) -> Any:
    """Unlabelled training batches for variants that start from data, from steps that training does not reach."""
    if not (cls.needs(cfg) or cls.wants(cfg)):
        return None
    batches = [task.batch(settings.steps + index) for index in range(settings.calibration_batches)]
    return [{k: v for k, v in batch.items() if k != "labels"} for batch in batches]


def run_variant(
    name: str, fields: dict[str, Any], settings: Settings, seed: int, progress: Progress, *, bare: nn.Module, task: Task
) -> dict[str, Any]:
    """Attach, measure cost, train, measure fidelity; detach at the end must give the base back bit for bit."""
    rate = {} if settings.lr is None else {"lr": settings.lr}
    cfg = ll.config(name, **{"seed": seed, **fields, **rate})
    model = copy.deepcopy(bare)
    ids = task.batch(0)["input_ids"].to(settings.device)
    data = calibration_data(task, ll.get(name), cfg, settings)
    before = bare(input_ids=ids).logits
    handles: list[Any] = []
    attach_seconds = seconds(lambda: handles.append(ll.attach(model, cfg, data)))
    (handle,) = handles
    with torch.no_grad():
        start_error = difference(model(input_ids=ids).logits, before)
    record: dict[str, Any] = {"seed": seed, "config": {"variant": name, **_json(cfg)}, "layers": len(handle.layers)}
    record["cost"] = {"attach_seconds": attach_seconds, **cost(model, handle, bare, ids)}
    groups = ll.param_groups(model, weight_decay=settings.weight_decay)
    record["curve"] = train(model, groups, task, settings, progress, f"{name}, seed {seed}")
    record["fidelity"] = fidelity(model, handle, bare, ids, start_error)
    handle.detach()
    with torch.no_grad():
        record["fidelity"]["detach"] = difference(model(input_ids=ids).logits, before)
    return record


def run_full(
    settings: Settings, seed: int, progress: Progress, *, bare: nn.Module, task: Task, lr: float = FULL_LR
) -> dict[str, Any]:
    """Full fine-tuning with the same data, steps and schedule."""
    model = copy.deepcopy(bare).requires_grad_(True)
    groups = [{"params": list(model.parameters()), "lr": lr, "weight_decay": settings.weight_decay}]
    curve = train(model, groups, task, settings, progress, f"{FULL}, seed {seed}")
    return {"seed": seed, "config": {"variant": FULL, "lr": lr}, "curve": curve}


def _json(cfg: ll.AdapterConfig) -> dict[str, Any]:
    import json

    return json.loads(cfg.to_json())


def settings_json(settings: Settings) -> dict[str, Any]:
    """The settings as a record says them: the embedded base by its place in the repository, no paths of a machine."""
    fields = dataclasses.asdict(settings)
    if Path(settings.model) == BASE:
        fields["model"] = "benchmarks/base"
    return fields
