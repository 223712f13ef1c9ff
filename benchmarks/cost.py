"""just bench-cost [key=value ...]: what every variant costs beside the bare frozen model and beside PEFT, in one run.

For each model and variant three copies of one model, the bare one, ours and PEFT's, take turns in one process on the same
inputs: forward without gradients, forward + backward, bytes kept for backward; attach, file size and load besides. Ranks: r=16
for low-rank methods, 8 where that is the config's default or the method asks for it.

Keys: variants=lora,dora models=base,d512,d1024 repeats=7 tokens=512 peer=peft|none out=FOLDER (default benchmarks/runs).
Writes cost.json, after every variant, so that an interrupted run keeps what it has.
"""

import copy
import dataclasses
import gc
import statistics
import sys
import tempfile
import time
import warnings
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor, nn

import lora_lite as ll
from benchmarks.bench_variant import RUNS
from benchmarks.cost_report import table
from benchmarks.measure import forward_backward, saved_bytes, seconds
from benchmarks.options import Options, command
from benchmarks.peers import peer_config
from benchmarks.run import Settings, environment, fitting, load_base, write_json
from lora_lite.errors import closest
from lora_lite.registry import variant_of

MODELS = ("base", "d512", "d1024")
RANK = {"hra": 8, "loha": 8, "lokr": 8, "lora_ga": 8}


@dataclass(frozen=True, kw_only=True)
class Cost(Options):
    """variants: all, or names; tokens: of a batch, two rows on the base and one elsewhere; peer: peft or none."""

    variants: tuple[str, ...] = ("all",)
    models: tuple[str, ...] = MODELS
    repeats: int = 7
    tokens: int = 512
    peer: str = "peft"
    out: str = str(RUNS)

    def __post_init__(self) -> None:
        super().__post_init__()
        known = {"variants": ("all", *ll.names()), "models": MODELS, "peer": ("peft", "none")}
        for name, lawful in known.items():
            value = getattr(self, name)
            for word in value if isinstance(value, tuple) else (value,):
                if word not in lawful:
                    raise ll.LoraLiteError(f"{name}={word!r}", found=closest(word, lawful), fix=f"{name}={lawful[0]}")


def build(name: str) -> nn.Module:
    """The embedded base, or two random blocks of a Qwen3 that is `d...` wide."""
    if name == "base":
        return load_base(Settings(device="cpu"))[0]
    d = int(name[1:])
    config = transformers.Qwen3Config(
        vocab_size=512, hidden_size=d, intermediate_size=3 * d, num_hidden_layers=2, num_attention_heads=d // 64,
        num_key_value_heads=max(1, d // 128), head_dim=64, use_cache=False,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return transformers.Qwen3ForCausalLM(config).eval().requires_grad_(False)


def variant_config(name: str, model: nn.Module) -> ll.AdapterConfig:
    """Rank 16 for methods with a small rank; a large default, which a basis or a random pair needs, as far as it fits."""
    cfg = ll.config(name)
    if cfg.r is not None and cfg.r <= 16:
        cfg = dataclasses.replace(cfg, r=RANK.get(name, 16))
    return fitting(model, cfg)


def batches(ids: Tensor) -> list[dict[str, Tensor]]:
    return [{"input_ids": ids, "labels": ids}] * 2


def attached(model: nn.Module, cfg: ll.AdapterConfig, ids: Tensor) -> tuple[nn.Module, float]:
    """A copy with our adapter, and the seconds that attaching took."""
    ours, data = copy.deepcopy(model), batches(ids) if variant_of(cfg).needs(cfg) else None
    return ours, seconds(lambda: ll.attach(ours, cfg, data))


def peered(model: nn.Module, cfg: ll.AdapterConfig) -> tuple[nn.Module, float] | None:
    """A copy with PEFT's adapter of the same method, and the seconds; None where there is none."""
    import peft

    leaves = sorted({path.rpartition(".")[2] for path in ll.find_targets(model, cfg)})
    config = peer_config(cfg, leaves)
    if config is None:
        return None
    theirs, made = copy.deepcopy(model), []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        taken = seconds(lambda: made.append(peft.get_peft_model(theirs, config)))
    return made[0].eval(), taken


def times(subjects: dict[str, nn.Module], ids: Tensor, repeats: int) -> dict[str, dict[str, list[float]]]:
    """{subject: {"forward" | "step": seconds of each repeat}}, the subjects taking turns; the first round warms up."""

    def forward(model: nn.Module) -> None:
        with torch.no_grad():
            model(input_ids=ids)

    found: dict[str, dict[str, list[float]]] = {name: {"forward": [], "step": []} for name in subjects}
    for repeat in range(repeats + 1):
        for name, model in subjects.items():
            step, pure = seconds(partial(forward_backward, model, ids)), seconds(partial(forward, model))
            if repeat:
                found[name]["step"].append(step)
                found[name]["forward"].append(pure)
    return found


def spread(values: list[float]) -> dict[str, float]:
    low, _, high = statistics.quantiles(values, n=4) if len(values) > 1 else (values[0],) * 3
    return {"median": statistics.median(values), "low": low, "high": high}


def compare(name: str, model_name: str, model: nn.Module, settings: Cost) -> dict[str, Any]:
    ids = torch.randint(0, 256, (1, settings.tokens), generator=torch.Generator().manual_seed(0))
    ids = ids.reshape(2, -1) if model_name == "base" else ids
    cfg = variant_config(name, model)
    ours, attach_seconds = attached(model, cfg, ids)
    subjects = {"bare": model, "ours": ours}
    record: dict[str, Any] = {"variant": name, "model": model_name, "r": cfg.r, "ours": {"attach_seconds": attach_seconds}}
    if settings.peer == "peft" and (other := peered(model, cfg)) is not None:
        subjects["peft"] = other[0]
        record["peft"] = {"attach_seconds": other[1]}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "adapter.safetensors"
        ll.save(ours, path)
        load_seconds = seconds(partial(ll.load, copy.deepcopy(model), path))
        record["ours"] |= {"file_bytes": path.stat().st_size, "load_seconds": load_seconds}
    for subject, found in times(subjects, ids, settings.repeats).items():
        kept = saved_bytes(subjects[subject], ids)
        record.setdefault(subject, {}).update({key: spread(values) for key, values in found.items()}, saved_bytes=kept)
    gc.collect()
    return record


def run(settings: Cost, console: Console) -> dict[str, Any]:
    names = tuple(ll.names()) if "all" in settings.variants else settings.variants
    started = time.perf_counter()
    record: dict[str, Any] = {
        "benchmark": "cost",
        "settings": dataclasses.asdict(settings) | {"out": None},
        "environment": environment(),
        "rows": [],
    }
    out = Path(settings.out)
    out.mkdir(parents=True, exist_ok=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task("", total=len(names) * len(settings.models))
        for model_name in settings.models:
            model = build(model_name)
            for name in names:
                progress.update(task, description=f"{name}, {model_name}")
                record["rows"].append(compare(name, model_name, model, settings))
                progress.advance(task)
                record["wall_seconds"] = round(time.perf_counter() - started, 1)
                write_json(out / "cost.json", record)
    return record


def measure(words: list[str], console: Console) -> None:
    console.print(table(run(Cost.parse(words, "just bench-cost variants=lora,dora models=d512"), console)))


def main(words: list[str]) -> None:
    command(words, __doc__, measure, "what was measured stands in cost.json")


if __name__ == "__main__":
    main(sys.argv[1:])
