"""The diagonal-plus-low-rank core against the reference project's form; the rest is in tests/families/test_cores.py."""

import pytest
import torch

import lora_lite as ll
from lora_lite.testing import toy
from lora_lite.testing.checks import error
from lora_lite.testing.formula import T64, adapted
from tests.families.test_subspace import BASES


def config(**fields):
    return ll.AntiPaSTODPLRConfig(**{"r": 8, "k": 3, **fields})


def moved(size=1.0, **fields):
    """(model, adapter, W, b) at random parameters, float64."""
    model, adapter = adapted(config(**fields), size=size)
    return model, adapter, model.o_proj.weight.detach(), model.o_proj.bias.detach()


def test_the_map_is_the_reference_projects_cut_svd_with_a_core():
    model, adapter, W, b = moved()
    U, S, Vh = torch.linalg.svd(W, full_matrices=False)
    signs = (adapter.U * U[:, :8]).sum(0).sign()
    U, Vh = U[:, :8] * signs, Vh[:8] * signs[:, None]
    x = toy.inputs(5, 24, dtype=torch.float64)
    p = x @ Vh.T
    for coeff in (1.0, -0.7):
        strengths = S[:8] * (1 + torch.nn.functional.elu(coeff * adapter.g))
        mixed = p * strengths + coeff * torch.stack([adapter.B @ (adapter.A @ row) for row in p])
        want = x @ (W - U * S[:8] @ Vh).T + b + mixed @ U.T
        with ll.scale(model, coeff):
            assert error(model(x), want) < T64


def test_a_unit_change_of_the_product_moves_the_weight_by_one_whatever_the_strengths():
    for scale in (1e-3, 1.0, 1e3):
        model = toy.one(dtype=torch.float64)
        with torch.no_grad():
            model.o_proj.weight.mul_(scale)
        adapter = ll.attach(model, config(dtype=torch.float64)).layers["o_proj"]
        sizes = []
        for k in range(8):
            x = torch.eye(24, dtype=torch.float64)
            with torch.no_grad():
                adapter.A.zero_()
                adapter.B.zero_()
                adapter.A[0, k] = adapter.B[0, 0] = 1.0
                sizes.append(float((model(x) - x @ model.o_proj.weight.T - model.o_proj.bias).norm()))
        assert max(abs(size - 1) for size in sizes) < 1e-9


@pytest.mark.parametrize("basis", BASES)
def test_the_input_coordinates_are_rows_of_unit_length(basis):
    _, adapter, W, _ = moved(basis=basis)
    P = (adapter.U.T @ W) / adapter.sigma[:, None]
    assert error(P.norm(dim=1), torch.ones(8)) < T64


def test_suppress_only_bounds_the_factors_and_not_the_product():
    model, adapter, W, b = moved(suppress_only=True)
    assert (adapter.g > 0).any()
    x = toy.inputs(200, 24, dtype=torch.float64)
    before = x @ W.T @ adapter.U
    assert ((model(x) - b).norm(dim=1) > (x @ W.T).norm(dim=1)).any()
    with torch.no_grad():
        adapter.B.zero_()
    assert (((model(x) - b) @ adapter.U).abs() <= before.abs() * (1 + 1e-12) + 1e-12).all()


def test_start_values():
    _, adapter, _, _ = moved(size=0)
    assert not adapter.g.any()
    assert not adapter.B.any()
    bound = 8**-0.5
    assert adapter.A.abs().max() <= bound
    assert abs(float(adapter.A.detach().std()) - bound / 3**0.5) < 0.2 * bound
