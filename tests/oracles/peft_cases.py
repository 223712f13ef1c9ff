"""Tiny models and PEFT adapters with random parameters far from their start, for the tests of the PEFT layout."""

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from lora_lite.testing import toy

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

TOKENS = torch.arange(24).reshape(2, 12) * 7 % 64


def qwen() -> Any:
    config = transformers.Qwen3Config(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, max_position_embeddings=64, attention_bias=True,
    )  # fmt: skip
    return toy.seeded(lambda: with_biases(transformers.Qwen3ForCausalLM(config))).eval()


def gpt2() -> Any:
    """Its layers are Conv1D."""
    config = transformers.GPT2Config(
        vocab_size=64, n_positions=64, n_embd=32, n_layer=2, n_head=4, bos_token_id=0, eos_token_id=0
    )
    return toy.seeded(lambda: with_biases(transformers.GPT2LMHeadModel(config))).eval()


def with_biases(model: nn.Module) -> nn.Module:
    """Weights and biases of a size that a trained model has; transformers starts with weights of 0.02 and biases of 0."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(".bias"):
                parameter.normal_(std=0.5)
            elif parameter.ndim == 2:
                parameter.mul_(8)
    return model


NAMES = {qwen: ("q_proj", "v_proj", "down_proj"), gpt2: ("c_attn", "mlp.c_proj")}


def quietly(call: Any, *arguments: Any, **options: Any) -> Any:
    """PEFT warns of its own adjustments, such as fan_in_fan_out for Conv1D."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return call(*arguments, **options)


@torch.no_grad()
def randomise(model: nn.Module, size: float = 0.3) -> None:
    for seed, parameter in enumerate(p for p in model.parameters() if p.requires_grad):
        parameter.add_(size * toy.inputs(*parameter.shape, seed=20 + seed))


def saved(base: Any, config: Any, folder: Path) -> torch.Tensor:
    """Write a PEFT folder of `config` over base() with random parameters; returns PEFT's logits."""
    model = quietly(peft.get_peft_model, base(), config).eval()
    randomise(model)
    quietly(model.save_pretrained, folder)
    return logits(model)


def in_peft(base: Any, folder: Path) -> torch.Tensor:
    """Logits of base() with the folder in PEFT; a tensor that PEFT finds missing or does not know fails."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        warnings.filterwarnings("error", message=".*(missing|nexpected).*")
        return logits(peft.PeftModel.from_pretrained(base(), folder).eval())


@torch.no_grad()
def logits(model: nn.Module) -> torch.Tensor:
    return model(TOKENS).logits


def distance(got: torch.Tensor, want: torch.Tensor) -> float:
    return float((got - want).detach().norm() / want.detach().norm())
