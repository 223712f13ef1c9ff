"""The gain on CorDA's directions against SVD(W C^(1/2)) C^(-1/2) and SVD(W C) C^-1, with the inverses, in dense float64.

What concerns the gain alone is held by test_antipasto.py, for this method too.
"""

import pytest
import torch

import lora_lite as ll
from lora_lite.testing import toy
from lora_lite.testing.checks import error
from lora_lite.testing.formula import T64, adapted
from tests.families.test_subspace import BASES, based, batches, kept, leading, lost, moment, projector, root

R, I, O = 12, 24, 40
FORMS = ("corda", "corda_full")


def config(**fields):
    return ll.AntiPaSTOCorDAConfig(**{"r": R, **fields})


def oriented(data=None, d_out=O, size=0.0, **fields):
    """(model, W, adapter) of one float64 layer."""
    model, adapter = adapted(config(**fields), I, d_out, size=size, data=batches() if data is None else data)
    return model, model.o_proj.weight.detach(), adapter


def metric(basis, damp=0.0):
    C = moment()
    C = C + damp * C.trace() / I * torch.eye(I, dtype=torch.float64)
    return root(C) if basis == "corda" else C


@pytest.mark.parametrize("damp", [0.0, 0.1])
@pytest.mark.parametrize("basis", FORMS)
def test_the_map_is_the_scaled_decomposition_with_an_explicit_inverse(basis, damp):
    model, W, adapter = oriented(size=1.0, basis=basis, damp=damp)
    M = metric(basis, damp)
    U, S, Vh = torch.linalg.svd(W @ M, full_matrices=False)
    P = Vh[:R] @ torch.linalg.inv(M)
    assert error((adapter.U.T @ U[:, :R]).abs(), torch.eye(R)) < 1e-7  # directions in the same order
    x = toy.inputs(5, I, dtype=torch.float64)
    for coeff in (1.0, 0.5, -0.7, 2.0):
        f = 1 + torch.nn.functional.elu(coeff * adapter.g.detach())
        want = W - U[:, :R] * S[:R] @ P + U[:, :R] * (S[:R] * f) @ P
        with ll.scale(model, coeff):
            assert error(model(x), x @ want.T + model.o_proj.bias) < 1e-9


@pytest.mark.parametrize("d_out", [16, 40])
@pytest.mark.parametrize("damp", [0.0, 0.3])
@pytest.mark.parametrize("basis", FORMS)
def test_directions_are_the_leading_left_singular_vectors(basis, damp, d_out):
    _, W, adapter = oriented(d_out=d_out, basis=basis, damp=damp)
    assert error(projector(adapter.U), leading(W @ metric(basis, damp))) < T64
    assert error(adapter.U.T @ adapter.U, torch.eye(R)) < 1e-12
    assert error(adapter.sigma, (W.T @ adapter.U).norm(dim=0)) < T64


def test_printed_form_root_form_and_damping_choose_other_directions():
    chosen = [projector(oriented(**fields)[2].U) for fields in ({}, {"basis": "corda_full"}, {"damp": 0.3})]
    chosen.append(projector(oriented(basis="corda_full", damp=0.3)[2].U))
    for index, P in enumerate(chosen):
        for Q in chosen[:index]:
            assert error(P, Q) > 1e-3


def test_any_root_of_the_moment_gives_the_same_directions():
    _, W, adapter = oriented()
    assert error(projector(adapter.U), leading(W @ torch.linalg.cholesky(moment()))) < T64


def test_root_form_loses_the_least_output_energy():
    C = moment()
    _, W, adapter = oriented()
    tail = torch.linalg.eigvalsh(W @ C @ W.T).flip(0)[R:].sum()
    assert abs(lost(W, adapter.U, C) - float(tail)) < 1e-9
    others = {basis: lost(W, based(basis)[1].U, C) for basis in BASES}
    assert all(loss >= lost(W, adapter.U, C) - 1e-12 for loss in others.values())
    assert others["svd"] > 1.5 * lost(W, adapter.U, C)


@pytest.mark.parametrize("basis", FORMS)
def test_directions_are_those_of_the_gain_method_in_this_basis(basis):
    for damp in (0.0, 0.2):
        assert torch.equal(oriented(basis=basis, damp=damp)[2].U, based(basis, damp=damp)[1].U)


@pytest.mark.parametrize("basis", FORMS)
def test_neither_the_unit_of_the_activations_nor_padding_matters(basis):
    _, _, adapter = oriented(basis=basis, damp=0.1)
    _, _, scaled = oriented(batches(10.0), basis=basis, damp=0.1)
    assert error(projector(scaled.U), projector(adapter.U)) < 1e-9
    noisy = batches()
    for batch in noisy:
        batch["x"][batch["attention_mask"] == 0] = 1e3
    assert torch.equal(oriented(noisy, basis=basis, damp=0.1)[2].U, adapter.U)


@pytest.mark.parametrize("basis", FORMS)
def test_captured_share_of_the_output_energy_is_reported(basis):
    _, W, adapter = oriented(basis=basis)
    y = kept(batches()) @ W.T
    assert abs(adapter.report["capture"] - float((y @ adapter.U).square().sum() / y.square().sum())) < 1e-9


def test_bfloat16_outputs_cost_no_captured_energy():
    data = [{**batch, "x": batch["x"].bfloat16()} for batch in batches()]
    low = toy.one(I, O, dtype=torch.bfloat16)
    U = ll.attach(low, config(buffer_dtype=torch.float32), data).layers["o_proj"].U.double()
    W, C = low.o_proj.weight.detach().double(), moment([{**batch, "x": batch["x"].double()} for batch in data])
    best = torch.linalg.eigvalsh(W @ C @ W.T).flip(0)
    assert abs(lost(W, U, C) - float(best[R:].sum())) / float(best.sum()) < 1e-6


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"basis": "svd"}, "basis: one of 'corda', 'corda_full'"),
        ({"damp": -0.1}, "damp is 0 or more"),
        ({"asvd_alpha": 0.3}, "has no field 'asvd_alpha'"),
        ({"alpha": 8.0}, "This method has no alpha"),
    ],
)
def test_options_that_would_not_act_and_bad_values_are_refused(fields, message):
    with pytest.raises(ll.LoraLiteError, match=message):
        config(**fields)


@pytest.mark.parametrize("basis", FORMS)
def test_missing_and_too_few_data_are_refused(basis):
    model = toy.one(I, O)
    with pytest.raises(ll.LoraLiteError, match=r"antipasto_corda starts from data and calibration_data is missing"):
        ll.attach(model, config(basis=basis))
    with pytest.raises(ll.LoraLiteError, match=r"o_proj: 11 calibration tokens are too few.*\n*.*At least 12"):
        ll.attach(model, config(basis=basis), [{"x": toy.inputs(11, I)}])
    ll.attach(model, config(basis=basis), [{"x": toy.inputs(12, I)}])
