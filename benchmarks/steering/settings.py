"""The options of `just steering`."""

from dataclasses import dataclass

import lora_lite as ll
from benchmarks.common.options import Options
from benchmarks.common.places import RUNS

CONTEXT = 64  # bytes of a window that are read but not scored


@dataclass(frozen=True, kw_only=True)
class Steering(Options):
    """
    coeffs       points of the curve; 0, the base model, and 1 are always among them
    calibration  rows of each class, the `length` bytes before a place; drawn with `seed`
    places       rows of each kind, likewise, that P(backquote) is measured on, at most
    windows      evenly spaced windows of `window` bytes that the harm is measured on
    seeds        of the random directions
    """

    coeffs: tuple[float, ...] = (-1.0, -0.5, 0.0, 0.25, 0.5, 0.75, 1.0, 1.25, 1.5)
    calibration: int = 256
    length: int = 64
    places: int = 96
    windows: int = 48
    window: int = 256
    seeds: tuple[int, ...] = (0, 1, 2)
    seed: int = 0
    out: str = str(RUNS)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.window <= CONTEXT:
            raise ll.LoraLiteError(
                f"window={self.window}", expected=f"More than the {CONTEXT} bytes of context.", fix="window=256"
            )
        object.__setattr__(self, "coeffs", tuple(sorted({0.0, 1.0, *self.coeffs})))
