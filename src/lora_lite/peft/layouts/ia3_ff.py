"""PEFT's type IA3, layers in feedforward_modules: the stored factor of the input is 1 + g."""

from dataclasses import replace

from ..layout import Key
from .ia3 import LAYOUT as OUTPUTS
from .ia3 import feedforward

LAYOUT = replace(
    OUTPUTS,
    tensors={"g": Key("ia3_l", write=lambda g: 1 + g[None], read=lambda l: l - 1)},
    derived=lambda adapter: {"feedforward_modules": [adapter.path]},
    covers=feedforward,
)
