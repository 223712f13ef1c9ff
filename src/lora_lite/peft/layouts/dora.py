"""PEFT's type LORA with use_dora; the norms of the weight's rows are not stored, they come from the weight."""

from dataclasses import replace

from ..layout import Key
from .lora import LAYOUT as PLAIN

LAYOUT = replace(PLAIN, tensors={**PLAIN.tensors, "m": Key("lora_magnitude_vector")}, when={"use_dora": True})
