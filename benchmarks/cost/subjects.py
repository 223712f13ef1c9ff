"""Who is measured: models of known sizes with random weights, and their copies with our adapter and with PEFT's."""

import copy
import dataclasses
import warnings
from typing import NamedTuple, cast

import torch
import transformers
from torch import Tensor, nn

import lora_lite as ll
from benchmarks.common.measure import forward_backward, seconds
from benchmarks.cost.peers import peer_config
from benchmarks.embedded.run import Settings, fitting, load_base
from lora_lite.contract.registry import variant_of

RANK = {"hra": 8, "loha": 8, "lokr": 8, "lora_ga": 8, "corda": 16}


class Shape(NamedTuple):
    """Of a Qwen3 with random weights."""

    width: int
    inner: int
    blocks: int
    heads: int
    kv_heads: int
    head: int = 128
    vocabulary: int = 151936


SHAPES = {
    "d512": Shape(512, 1536, 2, 8, 4, 64, 512),
    "d1024": Shape(1024, 3072, 2, 16, 8, 64, 512),
    "0.6B": Shape(1024, 3072, 28, 16, 8),
    "1.7B": Shape(2048, 6144, 28, 16, 8),
    "8B": Shape(4096, 12288, 36, 32, 8),
}


MODELS = ("base", *SHAPES)


def build(name: str, device: str = "cpu", dtype: str = "float32") -> nn.Module:
    """The embedded base, or a Qwen3 of that shape with random weights; frozen, in eval mode."""
    if name == "base":
        return load_base(Settings(device=device, base_dtype=dtype))[0]
    shape = SHAPES[name]
    config = transformers.Qwen3Config(
        vocab_size=shape.vocabulary, hidden_size=shape.width, intermediate_size=shape.inner, num_hidden_layers=shape.blocks,
        num_attention_heads=shape.heads, num_key_value_heads=shape.kv_heads, head_dim=shape.head, use_cache=False,
        dtype=getattr(torch, dtype),
    )  # fmt: skip
    with torch.random.fork_rng(), torch.device(device):
        torch.manual_seed(0)
        return transformers.AutoModelForCausalLM.from_config(config).eval().requires_grad_(False)


def variant_config(name: str, model: nn.Module) -> ll.AdapterConfig:
    """Rank 16 for methods with a small rank; a large default, which a basis or a random pair needs, as far as it fits."""
    cfg = ll.config(name)
    if cfg.r is not None and (cfg.r <= 16 or name in RANK):
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


def compiled(model: nn.Module, ids: Tensor) -> nn.Module:
    """The compiled model, which has run a step."""
    fast = cast(nn.Module, torch.compile(model))
    forward_backward(fast, ids)
    return fast
