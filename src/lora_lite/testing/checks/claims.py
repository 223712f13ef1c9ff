"""What a class claims of its map holds at perturbed values; a check runs where its claim is made."""

import copy
from typing import cast

import torch

from ...contract.config import AdapterConfig
from ...core.coefficients import scale
from ...core.merge import delta_weight, effective, merge, unmerge
from ...sites.layer import Layer
from .. import toy
from .judging import TOLERANCE, Variant, demand, demand_same, error, perturbed, photograph


def check_affine(cls: Variant, cfg: AdapterConfig) -> None:
    """If claimed: unit inputs give one W' and b' that reproduce the layer; merge gives its output, unmerge every bit."""
    if not cls.claims.affine:
        return
    for coeff in (1.0, -0.7):
        model, handle = perturbed(cls, cfg)
        before = photograph(model)
        x = toy.inputs(3, 5, toy.WIDTH)
        with scale(model, coeff):
            for path, adapter in handle.layers.items():
                layer = cast(Layer, model.get_submodule(path))
                z = toy.inputs(7, adapter.d_in)
                weight, bias, W = effective(layer, [adapter])
                demand(error(layer(z), z.double() @ weight.T + bias) < TOLERANCE, f"{path} is not affine")
                demand(error(delta_weight(model, path), weight - W) < 1e-6, "delta_weight is not W' - W")
            wanted = model(x)
            merge(model)
            demand(error(model(x), wanted) < TOLERANCE, "the merged model differs")
            unmerge(model)
            demand(torch.equal(model(x), wanted), "unmerge does not restore the output")
        demand_same(model, before, "after merge and unmerge")


def check_rank(cls: Variant, cfg: AdapterConfig) -> None:
    """If claimed: rank(W' - W) stays within the claim at perturbed values."""
    if cls.claims.rank is None:
        return
    model, handle = perturbed(cls, cfg, 1.0)
    for path, adapter in handle.layers.items():
        values = torch.linalg.svdvals(delta_weight(model, path).double())
        bound = cls.claims.rank(adapter.cfg)
        demand((values[bound:] <= 1e-6 * values[0]).all(), f"{path}: rank above {bound}")


def check_contraction(cls: Variant, cfg: AdapterConfig) -> None:
    """If claimed: outputs are never further apart than those of the base, for coeff in [0, 1] and any parameters."""
    if not cls.claims.contraction:
        return
    for size in (0.1, 1.0, 10.0):
        model = toy.one(24, 32, bias=True)
        base = copy.deepcopy(model)
        toy.perturb(toy.attached(model, cls, cfg, width=24), size)
        x, z = toy.inputs(64, 24), toy.inputs(64, 24, seed=9)
        apart = (base(x) - base(z)).norm(dim=-1)
        for coeff in (0.0, 0.5, 1.0):
            with scale(model, coeff):
                demand(((model(x) - model(z)).norm(dim=-1) <= apart * (1 + 1e-5)).all(), f"amplifies at coeff {coeff}")


def check_isometry(cls: Variant, cfg: AdapterConfig) -> None:
    """If claimed: on the identity layer the adapted weight is orthogonal at perturbed values, coeff 1."""
    if not cls.claims.isometry:
        return
    for size in (0.1, 1.0):
        model = toy.one(24, 24, bias=False)
        with torch.no_grad():
            model.o_proj.weight.copy_(torch.eye(24))
        toy.perturb(toy.attached(model, cls, cfg, width=24), size)
        Q = torch.eye(24) + delta_weight(model, "o_proj").T
        demand(error(Q @ Q.T, torch.eye(24)) < TOLERANCE, "the map is not orthogonal")
        demand(error(Q, torch.eye(24)) > 1e-3, "the map is the identity")
