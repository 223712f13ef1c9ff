"""python -m benchmarks.cost_attach [key=value ...]: what attaching costs beside PEFT, and how that grows.

Every attach runs in a process of its own: seconds are the median of its repeats, peak is the most memory beyond what the model
and its libraries took before, in the first of them. Energy is |U^T M|^2 of the start's r directions U over the largest
possible, M = W, or W C and W C^(1/2) for starts from data, the least of the first block's layers. Growth: one option at a time.

Keys: variants=pissa,pissa_fast model=d1024 rank=16 tokens=512 batches=2 repeats=3 threads=2 peer=peft|none growth=yes|no
      large=0 (blocks of an 8B-shaped stack in bfloat16; minutes each) out=FOLDER. Writes attach.json.
"""

import copy
import dataclasses
import json
import math
import os
import statistics
import subprocess
import sys
import types
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import transformers
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor, nn

import lora_lite as ll
from benchmarks.bench_variant import RUNS
from benchmarks.cost_attach_report import section
from benchmarks.measure import seconds
from benchmarks.options import Options, command
from benchmarks.run import environment, write_json
from lora_lite.measure import measure
from lora_lite.registry import variant_of
from lora_lite.targets import dense_weight

CASES: dict[str, dict[str, Any]] = {
    "pissa": {"variant": "pissa", "fields": {"svd": "exact"}, "peer": "pissa"},
    "pissa_fast": {"variant": "pissa", "fields": {"svd": "fast"}, "peer": "pissa"},
    "olora": {"variant": "olora", "peer": "olora"},
    "corda": {"variant": "corda", "peer": "corda"},
    "antipasto": {"variant": "antipasto", "peer": "pissa"},
    "antipasto_corda": {"variant": "antipasto_corda", "peer": "corda"},
}
BASE = {"d": 512, "rank": 16, "layers": 2, "tokens": 256}
GROWTH = {"d": (256, 512, 1024, 1536), "rank": (4, 8, 16, 32), "layers": (1, 2, 4, 8), "tokens": (256, 512, 1024, 2048)}
GROWN = ("pissa", "corda")
LARGE = ("pissa_fast", "corda")


@dataclass(frozen=True, kw_only=True)
class Attach(Options):
    variants: tuple[str, ...] = tuple(CASES)
    model: str = "d1024"
    rank: int = 16
    tokens: int = 512
    batches: int = 2
    repeats: int = 3
    threads: int = 2
    peer: str = "peft"
    growth: str = "yes"
    seed: int = 0
    large: str = "0"
    out: str = str(RUNS)

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in self.variants:
            if name not in CASES:
                raise ll.LoraLiteError(f"variants={name!r}", expected=f"Of {', '.join(CASES)}.", fix="variants=pissa")


# --- one attach, in a process of its own ------------------------------------------------------------------------------


def stack(d: int, layers: int, shape: str = "") -> nn.Module:
    """Random blocks of a Qwen3; shape "8b": the sizes of an 8B model, in bfloat16."""
    large = shape == "8b"
    config = transformers.Qwen3Config(
        vocab_size=512, hidden_size=4096 if large else d, intermediate_size=14336 if large else 3 * d, num_hidden_layers=layers,
        num_attention_heads=32 if large else d // 64, num_key_value_heads=8 if large else max(1, d // 128),
        head_dim=128 if large else 64, use_cache=False,
    )  # fmt: skip
    dtype = torch.get_default_dtype()
    try:
        torch.set_default_dtype(torch.bfloat16 if large else torch.float32)
        with torch.random.fork_rng():
            torch.manual_seed(0)
            return transformers.Qwen3ForCausalLM(config).eval().requires_grad_(False)
    finally:
        torch.set_default_dtype(dtype)


def calibration(spec: dict[str, Any]) -> list[dict[str, Tensor]]:
    ids = torch.randint(0, 512, (spec["batches"], 1, spec["tokens"]), generator=torch.Generator().manual_seed(0))
    return [{"input_ids": batch} for batch in ids]


def config(spec: dict[str, Any]) -> ll.AdapterConfig:
    case = CASES[spec["case"]]
    return ll.config(
        case["variant"], r=spec["rank"], targets="all-linear", roles=None, exclude=("lm_head",), **case.get("fields", {})
    )


def attach_ours(model: nn.Module, spec: dict[str, Any]) -> dict[str, Tensor]:
    """Attach; {path: matrix whose columns span the directions of the start}."""
    cfg = config(spec)
    handle = ll.attach(model, cfg, calibration(spec) if variant_of(cfg).needs(cfg) else None)
    return {path: a.U if hasattr(a, "U") else a.B0 for path, a in handle.layers.items()}  # type: ignore[misc]


def attach_peer(model: nn.Module, spec: dict[str, Any]) -> dict[str, Tensor]:
    if (
        "attr" not in sys.modules and find_spec("attr") is None
    ):  # PEFT's module takes its dataclass from there and does not require it
        sys.modules["attr"] = types.SimpleNamespace(dataclass=dataclasses.dataclass)  # type: ignore[assignment]
    import peft
    from peft.tuners.lora.corda import preprocess_corda

    start, batches = CASES[spec["case"]]["peer"], calibration(spec)
    paths = list(ll.find_targets(model, config(spec)))
    settings = peft.LoraConfig(
        r=spec["rank"],
        lora_alpha=spec["rank"],
        target_modules=sorted({path.rpartition(".")[2] for path in paths}),
        init_lora_weights=start,
        corda_config=peft.tuners.lora.config.CordaConfig() if start == "corda" else None,
    )

    def forward() -> None:
        with torch.no_grad():
            for batch in batches:
                model(**batch)

    if start == "corda":
        preprocess_corda(model, settings, run_model=forward)
    wrapped = peft.get_peft_model(model, settings)  # type: ignore[arg-type]
    return {path: wrapped.get_submodule(f"base_model.model.{path}").lora_B["default"].weight for path in paths}  # type: ignore[union-attr,index]


def memory(field: str) -> int:
    """Bytes of /proc/self/status: VmRSS, or VmHWM, its peak since `forget_peak`."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))


def forget_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")


def energy(model: nn.Module, spec: dict[str, Any], found: dict[str, Tensor]) -> float | None:
    """The least share of the largest possible |U^T M|^2 among the first block's layers; None where the start seeks none."""
    variant = CASES[spec["case"]]["variant"]
    if variant == "olora":
        return None
    layers = {path: layer for path, layer in ll.find_targets(model, config(spec)).items() if ".layers.0." in path}
    moments = measure(model, layers, ("n", "x_moment"), calibration(spec)) if "corda" in variant else {}
    shares = []
    for path, layer in layers.items():
        M = dense_weight(layer).double()
        if moments:
            C = moments["x_moment"][path] / moments["n"][path]
            values, Q = torch.linalg.eigh(C)
            damped = values.clamp(min=0) + (0.01 * C.trace() / len(C) if variant == "corda" else 0.0)
            M = M @ (Q * (damped if variant == "corda" else damped.sqrt()))
        U = torch.linalg.qr(found[path].detach().double()).Q
        best = torch.linalg.svdvals(M)[: U.shape[1]].square().sum()
        shares.append(float((U.T @ M).square().sum() / best))
    return min(shares)


def measured(spec: dict[str, Any]) -> dict[str, Any]:
    """One case: seconds (median), peak bytes, energy; what a child process prints."""
    torch.set_num_threads(spec["threads"])
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    model = stack(spec["d"], spec["layers"], spec["shape"])
    size = sum(p.numel() * p.element_size() for p in model.parameters())
    work: Callable[[nn.Module, dict[str, Any]], dict[str, Tensor]] = attach_peer if spec["subject"] == "peft" else attach_ours
    taken, peak = [], 0
    found: dict[str, Tensor] = {}
    for repeat in range(spec["repeats"]):
        ours = model if spec["repeats"] == 1 else copy.deepcopy(model)
        forget_peak()
        before = memory("VmRSS")
        taken.append(seconds(lambda: found.update(work(ours, spec))))  # noqa: B023
        peak = peak if repeat else memory("VmHWM") - before
    share = None
    if spec["energy"]:  # on weights that PEFT has not rewritten
        share = energy(stack(spec["d"], spec["layers"], spec["shape"]), spec, found)
    return {"seconds": statistics.median(taken), "peak_bytes": peak, "model_bytes": size, "energy": share}


def child(spec: dict[str, Any]) -> dict[str, Any]:
    """`measured` in a fresh process, whose freed blocks go back to the system at once, so that peaks are of live memory."""
    env = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "1048576", "OMP_NUM_THREADS": str(spec["threads"])}
    words = [sys.executable, "-m", "benchmarks.cost_attach", "case", json.dumps(spec)]
    done = subprocess.run(words, env=env, capture_output=True, text=True, check=False)
    if done.returncode:
        raise ll.LoraLiteError(f"{spec['case']} of {spec['subject']} failed.", found=done.stderr[-500:])
    return json.loads(done.stdout.splitlines()[-1])


# --- rows -------------------------------------------------------------------------------------------------------------


def spec_of(settings: Attach, **fields: Any) -> dict[str, Any]:
    general = {
        "threads": settings.threads,
        "batches": settings.batches,
        "repeats": settings.repeats,
        "shape": "",
        "energy": False,
    }
    return {**general, "subject": "ours", **fields}


def attach_rows(settings: Attach, done: Callable[[str], None] = lambda name: None) -> list[dict[str, Any]]:
    """One row per variant: ours and PEFT's seconds, peak bytes and energy."""
    rows = []
    sizes = {"d": int(settings.model[1:]), "layers": 2, "rank": settings.rank, "tokens": settings.tokens, "energy": True}
    for name in settings.variants:
        row: dict[str, Any] = {"variant": name, "model": settings.model, "r": settings.rank, "tokens": settings.tokens}
        for subject in ("ours", *(("peft",) if settings.peer == "peft" else ())):
            row[subject] = child(spec_of(settings, case=name, subject=subject, **sizes))
            done(f"{name}, {subject}")
        rows.append(row)
    return rows


def exponent(sizes: list[float], values: list[float]) -> float:
    """p of the least-squares fit value ~ size^p."""
    x, y = [math.log(size) for size in sizes], [math.log(max(value, 1e-9)) for value in values]
    mx, my = statistics.mean(x), statistics.mean(y)
    return sum((a - mx) * (b - my) for a, b in zip(x, y, strict=True)) / sum((a - mx) ** 2 for a in x)


def growth_rows(settings: Attach, done: Callable[[str], None] = lambda name: None) -> list[dict[str, Any]]:
    """One row per variant and size: seconds and peak bytes at four values each, and their fitted exponents."""
    rows = []
    for name in GROWN:
        for key, values in GROWTH.items():
            found = []
            for value in values:
                found.append(child(spec_of(settings, case=name, **{**BASE, key: value})))
                done(f"{name}, {key}={value}")
            row = {"variant": name, "against": key, "at": list(values), "others": {k: v for k, v in BASE.items() if k != key}}
            for measure_ in ("seconds", "peak_bytes"):
                row[measure_] = [one[measure_] for one in found]
                row[f"{measure_}_exponent"] = exponent(list(values), row[measure_])
            rows.append(row)
    return rows


def large_rows(settings: Attach, done: Callable[[str], None] = lambda name: None) -> list[dict[str, Any]]:
    rows = []
    for name in LARGE:
        spec = spec_of(settings, case=name, d=4096, layers=int(settings.large), rank=16, tokens=settings.tokens, shape="8b")
        rows.append({"variant": name, "blocks": int(settings.large), "r": 16, "ours": child(spec | {"repeats": 1})})
        done(f"{name}, 8B")
    return rows


@contextmanager
def bar(console: Console, total: int) -> Iterator[Callable[[str], None]]:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task("attach", total=total)
        yield lambda name: progress.update(task, description=name, advance=1)


def run(settings: Attach, console: Console) -> dict[str, Any]:
    record: dict[str, Any] = {
        "benchmark": "attach",
        "settings": dataclasses.asdict(settings) | {"out": None},
        "environment": environment(),
    }
    out = Path(settings.out)
    out.mkdir(parents=True, exist_ok=True)
    parts = {"rows": attach_rows}
    parts |= {"growth": growth_rows} if settings.growth == "yes" else {}
    parts |= {"large": large_rows} if settings.large != "0" else {}
    subjects = 2 if settings.peer == "peft" else 1
    total = len(settings.variants) * subjects + 32 * ("growth" in parts) + 2 * ("large" in parts)
    with bar(console, total) as done:
        for key, rows in parts.items():
            record[key] = rows(settings, done)
            write_json(out / "attach.json", record)
    return record


def work(words: list[str], console: Console) -> None:
    settings = Attach.parse(words, "python -m benchmarks.cost_attach variants=pissa growth=no")
    console.print("\n".join(section(run(settings, console))), markup=False, highlight=False, soft_wrap=True)


def main(words: list[str]) -> None:
    if words[:1] == ["case"]:
        print(json.dumps(measured(json.loads(words[1]))))
    else:
        command(words, __doc__, work, "what was measured stands in attach.json")


if __name__ == "__main__":
    main(sys.argv[1:])
