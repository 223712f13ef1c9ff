"""The gain on CorDA's and ASVD's directions, against SVD(W M) M^-1 with the inverse of their metric M, in dense float64.

What concerns the gain alone is held by tests/variants/test_antipasto.py, for these methods too.
"""

import pytest
import torch

import lora_lite as ll
from lora_lite.testing import toy
from lora_lite.testing.checks import error
from lora_lite.testing.formula import T64, adapted
from tests.families.test_subspace import based, batches, kept, leading, moment, projector, root

R, I, O = 12, 24, 40
CORDA, FULL, ASVD = ("antipasto_corda", "corda"), ("antipasto_corda", "corda_full"), ("antipasto_asvd", "asvd")
FORMS = [CORDA, FULL, ASVD]


def oriented(form, data=None, d_out=O, size=0.0, **fields):
    """(model, W, adapter) of one float64 layer."""
    name, basis = form
    data = batches() if data is None else data
    model, adapter = adapted(ll.config(name, basis=basis, **{"r": R, **fields}), I, d_out, size=size, data=data)
    return model, model.o_proj.weight.detach(), adapter


def metric(form, damp=0.0, asvd_alpha=0.5, asvd_stat="abs_mean"):
    if form == ASVD:
        x = kept(batches())
        q = (x.abs().mean(0) if asvd_stat == "abs_mean" else x.square().mean(0).sqrt()) ** asvd_alpha
        return torch.diag(q + 1e-6 * q.max())
    C = moment()
    C = C + damp * C.trace() / I * torch.eye(I, dtype=torch.float64)
    return root(C) if form == CORDA else C


def cases(*damps, asvd=({},)):
    corda = [(form, {"damp": damp}) for form in (CORDA, FULL) for damp in damps]
    return pytest.mark.parametrize(("form", "fields"), [*corda, *((ASVD, fields) for fields in asvd)], ids=str)


@cases(0.0, 0.1)
def test_the_map_is_the_scaled_decomposition_with_an_explicit_inverse(form, fields):
    model, W, adapter = oriented(form, size=1.0, **fields)
    M = metric(form, **fields)
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
@cases(0.0, 0.3, asvd=[{"asvd_alpha": a, "asvd_stat": stat} for a in (0.5, 1.0) for stat in ("abs_mean", "rms")])
def test_directions_are_the_leading_left_singular_vectors(form, fields, d_out):
    _, W, adapter = oriented(form, d_out=d_out, **fields)
    assert error(projector(adapter.U), leading(W @ metric(form, **fields))) < T64
    assert error(adapter.U.T @ adapter.U, torch.eye(R)) < 1e-12
    assert error(adapter.sigma, (W.T @ adapter.U).norm(dim=0)) < T64


@pytest.mark.parametrize(
    ("chosen", "least"),
    [
        ([(form, {"damp": damp}) for form in (CORDA, FULL) for damp in (0.0, 0.3)], 1e-3),
        ([(ASVD, fields) for fields in ({}, {"asvd_alpha": 1.0}, {"asvd_stat": "rms"})], 1e-4),
    ],
    ids=["corda", "asvd"],
)
def test_forms_and_options_choose_other_directions(chosen, least):
    projectors = [projector(oriented(form, **fields)[2].U) for form, fields in chosen]
    for index, P in enumerate(projectors):
        for Q in projectors[:index]:
            assert error(P, Q) > least


@cases(0.0, 0.2, asvd=({}, {"asvd_alpha": 0.9}, {"asvd_stat": "rms"}))
def test_directions_are_those_of_the_gain_method_in_this_basis(form, fields):
    assert torch.equal(oriented(form, **fields)[2].U, based(form[1], **fields)[1].U)


@pytest.mark.parametrize(
    ("name", "fields", "message"),
    [
        ("antipasto_corda", {"basis": "svd"}, "basis: one of 'corda', 'corda_full'"),
        ("antipasto_corda", {"damp": -0.1}, "damp is 0 or more"),
        ("antipasto_corda", {"asvd_alpha": 0.3}, "has no field 'asvd_alpha'"),
        ("antipasto_corda", {"alpha": 8.0}, "This method has no alpha"),
        ("antipasto_asvd", {"basis": "svd"}, "basis: 'asvd'|basis: one of 'asvd'"),
        ("antipasto_asvd", {"asvd_alpha": -0.1}, "asvd_alpha is 0 or more"),
        ("antipasto_asvd", {"asvd_stat": "max"}, "asvd_stat: one of 'abs_mean', 'rms'"),
        ("antipasto_asvd", {"damp": 0.1}, "has no field 'damp'"),
        ("antipasto_asvd", {"alpha": 8.0}, "This method has no alpha"),
    ],
)
def test_options_that_would_not_act_and_bad_values_are_refused(name, fields, message):
    with pytest.raises(ll.LoraLiteError, match=message):
        ll.config(name, **{"r": R, **fields})


@pytest.mark.parametrize(("name", "basis"), FORMS)
def test_missing_and_too_few_data_are_refused(name, basis):
    model, cfg = toy.one(I, O), ll.config(name, r=R, basis=basis)
    with pytest.raises(ll.LoraLiteError, match=rf"{name} starts from data and calibration_data is missing"):
        ll.attach(model, cfg)
    if name == "antipasto_corda":
        with pytest.raises(ll.LoraLiteError, match=r"o_proj: 11 calibration tokens are too few.*\n*.*At least 12"):
            ll.attach(model, cfg, [{"x": toy.inputs(11, I)}])
    ll.attach(model, cfg, [{"x": toy.inputs(12, I)}])
