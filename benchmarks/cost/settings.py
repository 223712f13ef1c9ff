"""The options of bench-cost."""

from dataclasses import dataclass

import torch

import lora_lite as ll
from benchmarks.common.options import Options
from benchmarks.common.places import RUNS
from benchmarks.cost.subjects import MODELS
from lora_lite.errors import closest

PARTS = ("step", "attach", "growth", "large", "start")


@dataclass(frozen=True, kw_only=True)
class Cost(Options):
    """variants, models, modes, seconds are of the part step; variants: all, or names; tokens: in two rows on the base."""

    parts: tuple[str, ...] = ("step", "attach", "growth", "start")
    variants: tuple[str, ...] = ("all",)
    models: tuple[str, ...] = ("base", "d512", "d1024")
    modes: tuple[str, ...] = ("eager",)
    repeats: int = 2
    seconds: float = 2.0
    tokens: int = 512
    peer: str = "peft"
    device: str = "cpu"
    dtype: str = "float32"
    out: str = str(RUNS)

    def __post_init__(self) -> None:
        super().__post_init__()
        known = {
            "parts": PARTS,
            "variants": ("all", *ll.names()),
            "models": MODELS,
            "modes": ("eager", "compiled"),
            "peer": ("peft", "none"),
            "device": ("cpu", *(["cuda"] if torch.cuda.is_available() else [])),
            "dtype": ("float32", "bfloat16"),
        }
        for name, lawful in known.items():
            value = getattr(self, name)
            for word in value if isinstance(value, tuple) else (value,):
                if word not in lawful:
                    raise ll.LoraLiteError(f"{name}={word!r}", found=closest(word, lawful), fix=f"{name}={lawful[0]}")


def chosen(settings: Cost) -> tuple[str, ...]:
    return tuple(ll.names()) if "all" in settings.variants else settings.variants
