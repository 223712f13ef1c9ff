"""The tests, in the rooms of src/lora_lite; whole/ holds what crosses them, oracles/ what several compare with."""

from pathlib import Path

ROOT = Path(__file__).parent.parent
