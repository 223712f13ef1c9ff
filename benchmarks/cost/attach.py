"""What attaching costs beside PEFT, and how that grows: the parts `attach`, `growth` and `large` of `just bench-cost`.

Every case runs in a process of its own, after the same on a small model: seconds are the median of its repeats, peak is the
most memory beyond what the model and its libraries took before, in the first of them. Energy is |U^T M|^2 of the start's r
directions U over the largest possible, M = W, or W C and W C^(1/2) for starts from data, the least of the first block's
layers. Growth: one option at a time.
"""

import copy
import json
import math
import os
import statistics
import subprocess
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn

import lora_lite as ll
from benchmarks.common.measure import seconds
from lora_lite.calibration.measure import measure
from lora_lite.contract.registry import variant_of
from lora_lite.sites.layer import dense_weight

CASES: dict[str, dict[str, Any]] = {
    "pissa": {"variant": "pissa", "fields": {"svd": "exact"}, "peer": "pissa"},
    "pissa_fast": {"variant": "pissa", "fields": {"svd": "fast"}, "peer": "pissa"},
    "olora": {"variant": "olora", "peer": "olora"},
    "corda": {"variant": "corda", "peer": "corda"},
    "antipasto": {"variant": "antipasto", "peer": "pissa"},
    "antipasto_corda": {"variant": "antipasto_corda", "peer": "corda"},
}
BASE = {"d": 512, "rank": 16, "layers": 2, "tokens": 256}
GROWTH = {"d": (256, 512, 768, 1024), "rank": (4, 8, 16, 32), "layers": (1, 2, 4, 8), "tokens": (256, 512, 1024, 2048)}
GROWN = ("pissa", "corda")
LARGE = {"pissa_fast": 6, "corda": 16}  # blocks: those of a model outweigh the temporaries of the one layer that is worked on
FEW_TOKENS = 128  # of a batch, there: every group of layers takes a pass through the model


@dataclass(frozen=True, kw_only=True)
class Attach:
    """model: of `cases`, d and its width; seconds: that the repeats of one of them go on for."""

    cases: tuple[str, ...] = tuple(CASES)
    model: str = "d1024"
    rank: int = 16
    tokens: int = 512
    batches: int = 2
    repeats: int = 3
    seconds: float = 3.0
    threads: int = 2
    peer: str = "peft"


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

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
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
    """One case: seconds (median), peak bytes, energy."""
    model = stack(spec["d"], spec["layers"], spec["shape"])
    size = sum(p.numel() * p.element_size() for p in model.parameters())
    work: Callable[[nn.Module, dict[str, Any]], dict[str, Tensor]] = attach_peer if spec["subject"] == "peft" else attach_ours
    work(stack(128, 1), {**spec, "d": 128, "layers": 1, "shape": ""})  # what a process takes once: imports, threads, kernels
    taken, peak = [], 0
    found: dict[str, Tensor] = {}
    while len(taken) < spec["repeats"] or sum(taken) < spec["enough"]:
        ours = model if spec["shape"] else copy.deepcopy(model)  # of a large one there is room for one
        forget_peak()
        before = memory("VmRSS")
        taken.append(seconds(lambda: found.update(work(ours, spec))))  # noqa: B023
        peak = peak if len(taken) > 1 else max(0, memory("VmHWM") - before)  # the kernel's counters lag by some pages
    share = None
    if spec["energy"]:  # on weights that PEFT has not rewritten
        share = energy(stack(spec["d"], spec["layers"], spec["shape"]), spec, found)
    return {"seconds": statistics.median(taken), "peak_bytes": peak, "model_bytes": size, "energy": share}


def child(specs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """`measured` of each in one fresh process."""
    env = {**os.environ, "OMP_NUM_THREADS": str(specs[0]["threads"])}
    words = [sys.executable, "-m", "benchmarks.cost.attach", json.dumps(specs)]
    done = subprocess.run(words, env=env, capture_output=True, text=True, check=False)
    if done.returncode:
        raise ll.LoraLiteError(f"{specs[0]['case']} of {specs[0]['subject']} failed.", found=done.stderr[-500:])
    return json.loads(done.stdout.splitlines()[-1])


# --- rows -------------------------------------------------------------------------------------------------------------


def spec_of(settings: Attach, **fields: Any) -> dict[str, Any]:
    general = {name: getattr(settings, name) for name in ("threads", "batches", "repeats")}
    return {**general, "enough": 0.0, "shape": "", "energy": False, "subject": "ours", **fields}


def attach_rows(settings: Attach, done: Callable[[str], None] = lambda name: None) -> list[dict[str, Any]]:
    """One row per case: ours and PEFT's seconds, peak bytes and energy; cases with one peer share its figures."""
    rows, peers = [], {}
    sizes = {"d": int(settings.model[1:]), "layers": 2, "rank": settings.rank, "tokens": settings.tokens}
    sizes |= {"energy": True, "enough": settings.seconds}
    for name in settings.cases:
        row: dict[str, Any] = {"case": name, "model": settings.model, "r": settings.rank, "tokens": settings.tokens}
        row["ours"] = child([spec_of(settings, case=name, **sizes)])[0]
        done(name)
        peer = CASES[name]["peer"]
        if settings.peer == "peft":
            if peer not in peers:
                peers[peer] = child([spec_of(settings, case=name, subject="peft", **sizes)])[0]
            row["peft"] = peers[peer]
            done(f"{name}, PEFT")
        rows.append(row)
    return rows


def exponent(sizes: list[float], values: list[float]) -> float:
    """p of the least-squares fit value ~ size^p."""
    x, y = [math.log(size) for size in sizes], [math.log(max(value, 1e-9)) for value in values]
    mx, my = statistics.mean(x), statistics.mean(y)
    return sum((a - mx) * (b - my) for a, b in zip(x, y, strict=True)) / sum((a - mx) ** 2 for a in x)


def growth_rows(settings: Attach, done: Callable[[str], None] = lambda name: None) -> list[dict[str, Any]]:
    """One row per case and option: seconds and peak bytes at four values each, and their fitted exponents."""
    rows = []
    for name in GROWN:
        for key, values in GROWTH.items():
            found = child([spec_of(settings, case=name, **{**BASE, key: value, "repeats": 2}) for value in values])
            done(f"{name} against {key}")
            row = {"case": name, "against": key, "at": list(values), "others": {k: v for k, v in BASE.items() if k != key}}
            for measure_ in ("seconds", "peak_bytes"):
                row[measure_] = [one[measure_] for one in found]
                row[f"{measure_}_exponent"] = exponent(list(values), row[measure_])
            rows.append(row)
    return rows


def large_rows(settings: Attach, done: Callable[[str], None] = lambda name: None) -> list[dict[str, Any]]:
    """One row per case: seconds, peak and model bytes on a stack of an 8B model's blocks, in bfloat16."""
    rows = []
    for name, blocks in LARGE.items():
        spec = spec_of(settings, case=name, d=4096, layers=blocks, rank=16, tokens=FEW_TOKENS, shape="8b", repeats=1)
        rows.append({"case": name, "blocks": blocks, "r": 16, "tokens": FEW_TOKENS, "ours": child([spec])[0]})
        done(f"{name}, 8B")
    return rows


def count(settings: Attach, part: str) -> int:
    """How often a part calls `done`."""
    if part == "attach":
        return len(settings.cases) * (2 if settings.peer == "peft" else 1)
    return len(GROWN) * len(GROWTH) if part == "growth" else len(LARGE)


if __name__ == "__main__":
    given = json.loads(sys.argv[1])
    torch.set_num_threads(given[0]["threads"])
    transformers.logging.set_verbosity_error()
    print(json.dumps([measured(spec) for spec in given]))
