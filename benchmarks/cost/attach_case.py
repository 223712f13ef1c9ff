"""One attach, in a process of its own: seconds, peak memory, and the energy of the directions that it starts with."""

import copy
import json
import statistics
import sys
import warnings
from collections.abc import Callable
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


if __name__ == "__main__":
    given = json.loads(sys.argv[1])
    torch.set_num_threads(given[0]["threads"])
    transformers.logging.set_verbosity_error()
    print(json.dumps([measured(spec) for spec in given]))
