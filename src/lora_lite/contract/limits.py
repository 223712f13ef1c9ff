"""Limits that `param_specs` checks before anything is allocated; the core adds the layer's path to each error. And of data."""

from collections.abc import Mapping

from torch import Tensor

from ..errors import LoraLiteError


def refuse_rank(r: int, d_in: int, d_out: int) -> None:
    """Raise where r exceeds the smaller side of the layer."""
    most = min(d_in, d_out)
    if r > most:
        raise LoraLiteError(
            f"r={r} is larger than the layer allows.",
            expected=f"At most min(d_in, d_out) = {most}.",
            fix=f"r={most}  # or for this layer alone: rank_pattern={{'<its path>': {most}}}",
            lawful={"r": most},
        )


def refuse_odd(name: str, value: int) -> None:
    if value % 2:
        raise LoraLiteError(
            f"{name}={value} is odd.",
            expected="An even number.",
            fix=f"{name}={value + 1}",
            lawful={name: value - 1} if value > 1 else {},
        )


def refuse_indivisible(name: str, block: int, width: int) -> None:
    """Raise where `width` channels cannot be cut into blocks of `block`."""
    if width % block:
        fitting = largest_divisor(width, block)
        raise LoraLiteError(
            f"{name}={block} does not divide {width}.",
            expected="Blocks of equal size.",
            fix=f"{name}={fitting}" if fitting > 1 else f"exclude=('<its path>',)  # nothing from 2 to {block} divides {width}",
            lawful={name: fitting} if fitting > 1 else {},
        )


def largest_divisor(width: int, most: int) -> int:
    """The largest divisor of `width` that is at most `most`: a default block size that fits every layer."""
    return max(b for b in range(1, min(width, most) + 1) if width % b == 0)


def summed(stats: Mapping[str, Mapping[str, Tensor]], name: str, path: str) -> Tensor:
    """The sum of that name at `path`. Raises where it is not finite: its products of one batch overflowed."""
    total = stats[name][path]
    if not total.isfinite().all():
        raise LoraLiteError(
            f"{path}: the sums over the calibration data ({name}) overflow float32.",
            expected="Inputs and outputs of the layer whose squares stay below 3e38.",
            fix="model.double()  # with batches in float64",
        )
    return total
