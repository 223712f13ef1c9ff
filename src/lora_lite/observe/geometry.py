"""Geometry of hidden states, attention maps and weight changes: figures to report, without gradients, in float32 or better.

X (n, D) are hidden rows of valid tokens, centred where the name says nothing else; the figures are those of Surface Tension
Transformers (which calls sigma_ratio isotropy) and the effective rank of Roy and Vetterli 2007.
"""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from ..calibration.calls import call, evaluating, on_device, refuse_one_batch
from ..core import finding
from ..core.delta import Change, change
from ..core.merge import refuse_unmergeable
from ..errors import LoraLiteError
from .capturing import capture
from .objectives import Gossip, formulas
from .objectives.heads import similarities
from .seen import Forward

PAIRS = 2048
"""rep and gossip take all pairs of up to so many rows; of more rows they take that many, drawn with a fixed seed."""


def wide(X: Tensor) -> Tensor:
    return X.detach().to(torch.promote_types(X.dtype, torch.float32))


def spectrum_rank(sigma: Tensor) -> float:
    """exp(-sum p ln p), p = sigma / sum sigma; 0 where every singular value is 0."""
    p = sigma / sigma.sum()
    return float(torch.special.entr(p).sum().exp()) if sigma.any() else 0.0


def centred_spectrum(X: Tensor) -> Tensor:
    """The min(n, D) singular values of X minus its mean row. Raises LoraLiteError for fewer than two rows."""
    if X.ndim != 2 or len(X) < 2:
        raise LoraLiteError(
            f"Rows of shape {tuple(X.shape)} have no spectrum.",
            expected="At least two valid tokens, (n, D).",
            fix="hidden[attention_mask.bool()]",
        )
    X = wide(X)
    if not X.isfinite().all():
        raise LoraLiteError("Rows with numbers that are not finite have no spectrum.", fix="X[X.isfinite().all(1)]")
    return torch.linalg.svdvals(X - X.mean(0))


def effective_rank(X: Tensor) -> float:
    """exp of the entropy of the singular values (not squared) of centred rows (n, D): up to min(n - 1, D), higher is richer."""
    return spectrum_rank(centred_spectrum(X))


def sigma_ratio(X: Tensor) -> float:
    """Largest over mean singular value, of all min(n, D), of centred rows (n, D); 1 is a flat spectrum, lower is flatter."""
    sigma = centred_spectrum(X)
    return float(sigma.max() / sigma.mean()) if sigma.any() else 1.0


def active_fraction(X: Tensor, threshold: float = 0.05) -> float:
    """Share of numbers with |x| above the threshold; lower is sparser."""
    return float((wide(X).abs() > threshold).double().mean())


def head_similarity(P: Tensor, mask: Tensor | None = None) -> float:
    """Mean cosine of the attention maps (B, H, T, T) of different heads; mask (B, T). Lower is more diverse."""
    shape = (P.shape[0], P.shape[-1])
    mask = torch.ones(shape) if mask is None else Forward(mask).mask_for(shape, "attention maps")
    return float(formulas.head_similarity(wide(P), mask.to(P.device)).mean())


def delta_effective_rank(delta: Tensor | Change) -> float:
    """`effective_rank` of a weight change (d_out, d_in) without centring; 0 where nothing changed."""
    if isinstance(delta, Tensor):
        return spectrum_rank(torch.linalg.svdvals(wide(delta)))
    if delta.right is None:
        return delta_effective_rank(delta.left)
    if len(delta.right) == 0:
        return 0.0
    return spectrum_rank(torch.linalg.svdvals(torch.linalg.qr(delta.left).R @ torch.linalg.qr(delta.right.T).R.T))


def of_rows(X: Tensor, tau: float = Gossip.tau) -> dict[str, float]:
    """eff_rank, sigma_ratio, active_frac, rep and gossip of rows (n, D)."""
    sigma = centred_spectrum(X)
    X = wide(X)
    few = X[formulas.subset(len(X), PAIRS, torch.Generator().manual_seed(0)).to(X.device)]
    return {
        "eff_rank": spectrum_rank(sigma),
        "sigma_ratio": float(sigma.max() / sigma.mean()) if sigma.any() else 1.0,
        "active_frac": active_fraction(X),
        "rep": float(formulas.repulsion(few)),
        "gossip": float(formulas.expected_gossip(few, tau)),
    }


def of_deltas(model: nn.Module, name: str | None = None) -> dict[str, float]:
    """{path: delta_effective_rank} of what adapter `name`, or each on its layer, changes at its coefficient.

    Raises LoraLiteError for a model without an adapter, a merged one and one that is not a linear map.
    """
    found = finding.present(model, name)
    refuse_unmergeable(found)
    twice = len({f.path for f in found}) < len(found)
    return {f"{f.path}:{f.name}" if twice else f.path: delta_effective_rank(change(f.layer, f.adapter)) for f in found}


def measure(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    layers: int | str | Iterable[int | str] | None = None,
    attention: bool = True,
    unmasked: bool = False,
    tau: float = Gossip.tau,
) -> dict[str, float]:
    """The geometry of a model on batches, in evaluation mode: every figure by name.

    eff_rank, sigma_ratio, active_frac, rep, gossip   of the hidden rows of all batches together; mean over `layers`
    head_sim                                          mean over sequences and layers; left out with attention=False
    delta_eff_rank                                    mean over adapted layers that change something; absent where none does,
                                                      and where an adapter is no linear map

    batches   what the model is called with: mappings, tuples or tensors; an `attention_mask` leaves padding out
    layers    as in `capture`; None: the input of the output head
    unmasked  each figure once more with padding counted, as NAME_unmasked: what is published is often measured so
    tau       of gossip

    The hidden rows of all batches are held at once, n x D numbers. Raises LoraLiteError as `capture` does, and without batches.
    """
    refuse_one_batch(batches)
    needs = {"hidden", "mask", *(("attention",) if attention else ())}
    passes: dict[bool, Pool] = {masked: Pool() for masked in ((True, False) if unmasked else (True,))}
    with evaluating(model):
        for batch in batches:
            with capture(model, needs, layers=layers) as seen:
                call(model, on_device(model, batch))
            for masked, pool in passes.items():
                pool.add(seen.only, masked)
    found: dict[str, float] = {}
    for masked, pool in passes.items():
        found |= {key if masked else f"{key}_unmasked": value for key, value in pool.figures(tau).items()}
    adapters = [f.adapter for f in finding.adapters(model)]
    linear = bool(adapters) and all(adapter.claims.affine for adapter in adapters)
    ranks = [rank for rank in of_deltas(model).values() if rank] if linear else []
    return found | ({"delta_eff_rank": sum(ranks) / len(ranks)} if ranks else {})


class Pool:
    """Hidden rows by layer, and head similarities, of several forward passes."""

    def __init__(self) -> None:
        self.rows: list[list[Tensor]] = []
        self.similar: list[Tensor] = []

    def add(self, forward: Forward, masked: bool) -> None:
        rows = forward.rows() if masked else [wide(h).flatten(0, -2) for h in forward.hidden]
        self.rows = self.rows or [[] for _ in rows]
        for held, X in zip(self.rows, rows):
            held.append(X)
        if forward.calls:
            self.similar += [similarity.cpu() for similarity in similarities(forward, "head_sim", masked)]

    def figures(self, tau: float) -> dict[str, float]:
        if not self.rows:
            raise LoraLiteError("There are no batches to measure on.", fix="ll.geometry.measure(model, [batch])")
        layers = [of_rows(torch.cat(held), tau) for held in self.rows]
        found = {key: sum(layer[key] for layer in layers) / len(layers) for key in layers[0]}
        return found | ({"head_sim": float(torch.cat(self.similar).mean())} if self.similar else {})
