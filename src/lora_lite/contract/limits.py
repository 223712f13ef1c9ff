"""Limits that `param_specs` checks before anything is allocated; the core adds the layer's path to each error."""

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
