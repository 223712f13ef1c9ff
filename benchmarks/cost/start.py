"""What comes before the first step: importing lora_lite, attach of lora beside PEFT, save, and load beside reading the file.

The model has the shapes of Qwen3-0.6B (28 blocks, 196 layers, 1.8 GB in float32) and random weights.
"""

import gc
import subprocess
import sys
import tempfile
import warnings
from functools import partial
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
import transformers
from torch import nn

import lora_lite as ll
from benchmarks.common.measure import seconds
from benchmarks.cost import goals as cost_goals
from benchmarks.cost.peers import peer_config

QWEN3_06B: dict[str, Any] = {
    "vocab_size": 512,  # the embedding takes no part
    "hidden_size": 1024,
    "intermediate_size": 3072,
    "num_hidden_layers": 28,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 128,
}
IMPORT = "import time, torch; start = time.perf_counter(); import lora_lite; print(time.perf_counter() - start)"


def start_rows(settings: Any, sizes: dict[str, Any] = QWEN3_06B) -> list[dict[str, Any]]:
    """One row per thing done: {"measure": name, subject: quartiles of the seconds, ...}; settings has `repeats`, of four turns
    each, and `peer`.
    """
    model = random_model(sizes)
    gc.collect()
    gc.disable()  # a collection of what others left takes longer than anything here
    try:
        return [imports(5), *on_model(model, 4 * settings.repeats, settings.peer == "peft")]
    finally:
        gc.enable()


def imports(repeats: int) -> dict[str, Any]:
    """Seconds that importing lora_lite takes after torch, in fresh interpreters."""
    runs = [subprocess.run([sys.executable, "-c", IMPORT], capture_output=True, text=True, check=True) for _ in range(repeats)]
    return {"measure": "import", "ours": quartiles([float(run.stdout) for run in runs])}


def random_model(sizes: dict[str, Any]) -> nn.Module:
    """A Qwen3 whose weights are parts of one random tensor, each with another first number: built in seconds."""
    with torch.device("meta"):
        model = transformers.Qwen3ForCausalLM(transformers.Qwen3Config(use_cache=False, **sizes))
    model = model.to_empty(device="cpu").eval().requires_grad_(False)
    largest = max(p.numel() for p in model.parameters())
    noise = torch.randn(largest, generator=torch.Generator().manual_seed(0)) * 0.02
    for index, parameter in enumerate(model.parameters()):
        parameter.copy_(noise[: parameter.numel()].view_as(parameter))
        parameter.view(-1)[0] = index
    return model


def on_model(model: nn.Module, repeats: int, peft: bool) -> list[dict[str, Any]]:
    """Everything in turns on one model, which is as before after each; the first turn warms up."""
    cfg = ll.config("lora", r=16)
    attach: dict[str, list[float]] = {"ours": [], **({"peft": []} if peft else {})}
    save: list[float] = []
    load: dict[str, list[float]] = {"ours": [], "load_file": [], "load_file_and_copy": [], "read_bytes": []}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "adapter.safetensors"
        for _ in range(repeats + 1):
            attach["ours"].append(seconds(partial(ll.attach, model, cfg)))
            save.append(seconds(partial(ll.save, model, path)))
            ll.detach(model)
            if peft:
                attach["peft"].append(attached_by_peft(model, cfg))
            load["load_file"].append(seconds(partial(safetensors.torch.load_file, path)))
            load["load_file_and_copy"].append(seconds(partial(copied, path)))
            load["read_bytes"].append(seconds(path.read_bytes))
            load["ours"].append(seconds(partial(ll.load, model, path)))
            ll.detach(model)
        size = path.stat().st_size
    layers = len(ll.find_targets(model, cfg))
    return [
        {"measure": "attach", "layers": layers, **{who: quartiles(found[1:]) for who, found in attach.items()}},
        {"measure": "save", "layers": layers, "file_bytes": size, "ours": quartiles(save[1:])},
        {"measure": "load", "layers": layers, "file_bytes": size, **{who: quartiles(found[1:]) for who, found in load.items()}},
    ]


def copied(path: Path) -> list[torch.Tensor]:
    """load_file maps the file and reads nothing; this reads it."""
    return [tensor.clone() for tensor in safetensors.torch.load_file(path).values()]


def attached_by_peft(model: nn.Module, cfg: ll.AdapterConfig) -> float:
    """Seconds of get_peft_model on the same layers; the model is given back as it was."""
    import peft

    config = peer_config(cfg, sorted({path.rpartition(".")[2] for path in ll.find_targets(model, cfg)}))
    made: list[Any] = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        taken = seconds(lambda: made.append(peft.get_peft_model(model, config)))
        made[0].unload()
    return taken


def quartiles(values: list[float]) -> dict[str, float]:
    low, median, high = cost_goals.quartiles(values)
    return {"median": median, "low": low, "high": high}
