"""Export as plain LoRA, from the adapted layer's own matrix: W' - W = B A with scale 1, as exact as the rank allows."""

import math
from typing import Any

import torch
from torch import Tensor

from ..core import finding
from ..core.merge import effective, refuse_unmergeable
from ..errors import LoraLiteError, some
from .folder import PREFIX

EXACT = 1e-6  # relative error of an export that counts as exact: rounding to float32 and no more
ByLayer = dict[str, list[finding.Found]]


def as_plain_lora(
    by_layer: ByLayer, rank: int | None, limit: float, obstacle: str
) -> tuple[dict[str, Any], dict[str, Tensor], dict[str, float], tuple[str, ...]]:
    """(options, tensors, errors, notes) with one rank for all layers, since vLLM reads no rank_pattern; zeros fill up."""
    found = [f for group in by_layer.values() for f in group]
    refuse_unmergeable(found)
    bounds = {path: bound(group) for path, group in by_layer.items()}
    unbounded = [path for path, most in bounds.items() if most is None]
    if rank is None and unbounded:
        raise LoraLiteError(
            f"{found[0].adapter.variant} cannot be exported exactly: {obstacle}, and the rank of its change has no bound.",
            expected=f"A rank to cut {some(unbounded)} to.",
            fix="ll.export_peft(model, folder, rank=16)  # what is cut off is stated per layer",
        )
    r = rank or max(most for most in bounds.values() if most)
    pieces: dict[str, tuple[Tensor, Tensor]] = {}
    errors, needs, biases, sizes = {}, {}, {}, {}
    allowed = EXACT if rank is None else max(limit, EXACT)
    for path, group in by_layer.items():
        adapted, bias, W = effective(group[0].layer, [f.adapter for f in group])
        old = group[0].layer.bias
        floor = float(torch.finfo(torch.float32).eps * W.norm())  # a change below it is rounding
        pieces[path], errors[path], needs[path] = factored(adapted - W, r, floor, allowed)
        biases[path] = bias if old is None else bias - old.detach().double()
        sizes[path] = 1 + float(W.norm())
    if above := {path: error for path, error in errors.items() if not error <= allowed}:
        path, worst = max(above.items(), key=lambda item: item[1])
        raise LoraLiteError(
            f"rank={r} cuts off {worst:.2g} of the change of {path}, and more than limit={allowed:g} in {len(above)} layers.",
            expected=f"Every layer is within the limit from rank {max(needs.values())} on.",
            fix=f"ll.export_peft(model, folder, rank={max(needs.values())})  # or limit={math.ceil(20 * worst) / 20}",
        )
    moved = [path for path, b in biases.items() if float(b.abs().max()) > 1e-12 * sizes[path]]
    tensors: dict[str, Tensor] = {}
    for path, (A, B) in pieces.items():
        tensors[f"{PREFIX}model.{path}.lora_A.weight"] = A
        tensors[f"{PREFIX}model.{path}.lora_B.weight"] = B
        if moved:
            tensors[f"{PREFIX}model.{path}.lora_B.bias"] = biases[path]
    options = {"peft_type": "LORA", "r": r, "lora_alpha": r, "use_rslora": False, "use_dora": False, "lora_dropout": 0.0}
    options |= {"bias": "none", "lora_bias": bool(moved), "init_lora_weights": True}
    notes = [f"{some(moved)}: the bias moves too, which PEFT loads and vLLM and llama.cpp refuse (lora_bias)"] if moved else []
    if coefficients := sorted({f.adapter.coeff for f in found} - {1.0}):
        notes.append(f"the coefficient {some(map(str, coefficients))} is part of the numbers")
    return options, tensors, errors, tuple(notes)


def bound(group: list[finding.Found]) -> int | None:
    """Largest rank of what these adapters of one layer change together, None where one of them has no bound."""
    ranks = [f.adapter.claims.rank(f.adapter.cfg) if f.adapter.claims.rank else None for f in group]
    return None if None in ranks else min(sum(ranks), group[0].adapter.d_in, group[0].adapter.d_out)  # type: ignore[arg-type]


def factored(D: Tensor, r: int, floor: float, limit: float) -> tuple[tuple[Tensor, Tensor], float, int]:
    """((A (r, i), B (o, r)) in float32 with B A = D as well as rank r allows, |D - B A| / max(|D|, floor), rank for `limit`).

    A random projection finds the column space where the rank of D is at most r; what it leaves over is measured, and only
    where there is something the full decomposition follows, which cuts best.
    """
    o, i = D.shape
    k = min(r, o, i)
    scale = max(float(D.norm()), floor)
    generator = torch.Generator().manual_seed(0)
    Q = torch.linalg.qr(D @ torch.randn(i, min(k + 8, i), generator=generator, dtype=D.dtype).to(D.device)).Q
    inside = float((D - Q @ (Q.T @ D)).norm()) <= 1e-9 * scale
    U, S, Vh = torch.linalg.svd(Q.T @ D if inside else D, full_matrices=False)
    U = Q @ U if inside else U
    root = S[:k].sqrt()
    A, B = D.new_zeros(r, i).float(), D.new_zeros(o, r).float()
    A[:k], B[:, :k] = root[:, None] * Vh[:k], U[:, :k] * root
    left = S.square().flip(0).cumsum(0).flip(0).sqrt()  # left[k]: what rank k leaves over
    needed = max(1, int((left > limit * scale).sum()))
    return (A, B), float((D - B.double() @ A.double()).norm()) / scale if scale else 0.0, needed
