"""Which rows of one tensor are those of another: how an expert's tokens are found again among all tokens."""

import torch
from torch import Tensor

from ..mathematics.spectrum import MOST_ROWS


def hashes(x: Tensor) -> Tensor:
    """A number for each row (n,) that follows from its bits."""
    rows = x.detach().reshape(-1, x.shape[-1]).contiguous()
    bits = rows.view({1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[rows.element_size()])
    generator = torch.Generator().manual_seed(0)
    factors = torch.randint(-(2**62), 2**62, (bits.shape[1],), generator=generator, device="cpu").to(x.device)
    return torch.cat([(part.to(torch.int64) * factors).sum(1) for part in bits.split(MOST_ROWS)])


def ranked(hashes: Tensor) -> tuple[Tensor, Tensor]:
    """The numbers in ascending order, and the rows they come from; equal ones in the order of the rows."""
    ordered, rows = hashes.sort(stable=True)
    return ordered, rows


def match(wanted: Tensor, ordered: Tensor, rows: Tensor) -> Tensor | None:
    """For each of the wanted numbers a row, no row twice; None where one has none left."""
    mine, order = wanted.sort(stable=True)
    nth = torch.arange(len(mine), device=mine.device) - torch.searchsorted(mine, mine)  # of those equal to it
    place = torch.searchsorted(ordered, mine) + nth
    if bool((place >= len(ordered)).any()) or not torch.equal(ordered[place], mine):
        return None
    found = torch.empty_like(place)
    found[order] = rows[place]
    return found
