"""Whether the data says enough about a layer: how many tokens it gave, and how many directions they span beyond rounding."""

import re
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from ..errors import LoraLiteError
from .statistics import Stats


class TooLittleData(LoraLiteError):
    """lacking: {path: what is missing there}, others of the same attach may have enough; called: they took part at all."""

    def __init__(self, lacking: Mapping[str, str], *, failed: str = "", expected: str = "", fix: str = "", called: bool = True):
        self.lacking, self.called = dict(lacking), called
        path, reason = next(iter(self.lacking.items()))
        super().__init__(failed or f"{path}: {reason}.", expected=expected, fix=fix)


def left_out(lacking: Mapping[str, TooLittleData], layers: Iterable[str], everything: bool) -> dict[str, str]:
    """{path: reason} of the layers that an attach goes without. everything: the user named no layers.

    Raises the first of the errors where nothing would be left; of a layer that took no part, or that the user named, unless
    it has a fellow with enough data, a path that differs in numbers alone, as experts have.
    """

    def kind(path: str) -> str:
        return re.sub(r"\d+", "", path)

    enough = {kind(path) for path in layers if path not in lacking}
    for path, error in lacking.items():
        if not enough or (kind(path) not in enough and not (everything and error.called)):
            raise error
    return {path: error.lacking[path] for path, error in lacking.items()}


FIX = "more batches in calibration_data, or a smaller r"


def require_tokens(stats: Stats, path: str, least: int, what: str, name: str = "n") -> float:
    """The token count at `path`. Raises TooLittleData where it is below `least`: the statistic would be of lower rank."""
    n = float(stats[name][path])
    if n < least:
        counts = stats[name] if isinstance(stats[name], dict) else {}  # layers in turns are asked one by one
        few = {path: n, **{other: m for other, count in counts.items() if (m := float(count)) <= n}}
        reasons = {other: f"{int(m)} calibration tokens are too few" for other, m in few.items()}
        raise TooLittleData(reasons, expected=f"At least {least} for {what}.", fix=FIX)
    return n


def require_rank(found: int, path: str, least: int, what: str) -> None:
    """Raise TooLittleData where fewer directions than `least` stand out from rounding."""
    if found < least:
        reason = f"the calibration tokens span {found} direction{'' if found == 1 else 's'} there beyond rounding"
        raise TooLittleData({path: reason}, expected=f"At least {least} for {what}.", fix=FIX)


def resolved(energy: Tensor, noise: Tensor, width: float, dtype: torch.dtype = torch.float32) -> int:
    """How many of the leading directions have an energy (k,) that is no rounding.

    energy  v^T M v of a sum of products M (width, width) of unknown rank; noise: sum_j v_j^2 M_jj, the energy where nothing
            cancels. Entries are rounded independently, so that a direction in which M is 0 shows about eps sqrt(width) of it
    dtype   of the products
    """
    eps = torch.finfo(torch.promote_types(dtype, torch.float32)).eps
    stands = (energy > 4 * eps * max(1.0, width) ** 0.5 * noise) | (noise == 0)  # nothing was added up: nothing was rounded
    return int(stands.long().cumprod(0).sum())
