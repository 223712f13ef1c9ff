"""PEFT's methods as peers: for a variant's config the PEFT config of the same method, rank, scale and layers.

The one place that maps names of variants to another library; a variant without an entry has no peer there.
"""

from collections.abc import Callable
from typing import Any

import peft

import lora_lite as ll
from lora_lite.contract.registry import variant_of

Layers = dict[str, Any]  # target_modules, for every PEFT config alike


def low_rank(cfg: Any, layers: Layers, **fields: Any) -> Any:
    return peft.LoraConfig(r=cfg.r, lora_alpha=cfg.alpha or cfg.r, use_rslora=cfg.rslora, **layers, **fields)


PEERS: dict[str, Callable[[Any, Layers], Any]] = {
    "lora": low_rank,
    "dora": lambda cfg, layers: low_rank(cfg, layers, use_dora=True),
    "pissa": lambda cfg, layers: low_rank(cfg, layers, init_lora_weights="pissa"),
    "olora": lambda cfg, layers: low_rank(cfg, layers, init_lora_weights="olora"),
    # Trained, PEFT's form of these is a plain LoRA, over a rewritten weight where the start is not 0.
    "corda": low_rank,
    "lora_ga": low_rank,
    "eva": low_rank,
    "ia3": lambda cfg, layers: peft.IA3Config(feedforward_modules=[], **layers),
    "ia3_ff": lambda cfg, layers: peft.IA3Config(feedforward_modules=layers["target_modules"], **layers),
    "hra": lambda cfg, layers: peft.HRAConfig(r=cfg.r, **layers),
    "oft": lambda cfg, layers: peft.OFTConfig(r=0, oft_block_size=cfg.block_size or 32, **layers),
    "boft": lambda cfg, layers: peft.BOFTConfig(boft_block_size=cfg.block_size, **layers),
    "road": lambda cfg, layers: peft.RoadConfig(variant=cfg.mode, group_size=cfg.group_size or 32, **layers),
    "vera": lambda cfg, layers: peft.VeraConfig(r=cfg.r, d_initial=cfg.d_init, **layers),
    "randlora": lambda cfg, layers: peft.RandLoraConfig(r=cfg.r, randlora_alpha=20 * cfg.r, **layers),
    "loha": lambda cfg, layers: peft.LoHaConfig(r=cfg.r, alpha=cfg.alpha, **layers),
    "lokr": lambda cfg, layers: peft.LoKrConfig(r=cfg.r, alpha=cfg.alpha, **layers),
    "delora": lambda cfg, layers: peft.DeloraConfig(r=cfg.r, delora_lambda=cfg.lambda0, **layers),
}


def peer_config(cfg: ll.AdapterConfig, leaves: list[str]) -> Any:
    """PEFT's config for the layers whose last name is in `leaves`, None where PEFT has no such method."""
    make = PEERS.get(variant_of(cfg).variant)
    return make and make(cfg, {"target_modules": leaves})
