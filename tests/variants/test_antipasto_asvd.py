"""The gain on ASVD's directions against SVD(W S) S^-1 in dense float64.

What concerns the gain alone is held by test_antipasto.py, for this method too.
"""

import pytest
import torch

import lora_lite as ll
from lora_lite.testing import toy
from lora_lite.testing.checks import error
from lora_lite.testing.formula import T64, adapted
from tests.families.test_subspace import based, batches, kept, leading, projector

R, I, O = 12, 24, 40


def config(**fields):
    return ll.AntiPaSTOASVDConfig(**{"r": R, **fields})


def oriented(data=None, d_out=O, size=0.0, **fields):
    """(model, W, adapter) of one float64 layer."""
    model, adapter = adapted(config(**fields), I, d_out, size=size, data=batches() if data is None else data)
    return model, model.o_proj.weight.detach(), adapter


def scaling(alpha=0.5, stat="abs_mean"):
    x = kept(batches())
    q = (x.abs().mean(0) if stat == "abs_mean" else x.square().mean(0).sqrt()) ** alpha
    return q + 1e-6 * q.max()


def test_the_map_is_the_papers_decomposition_scaled():
    model, W, adapter = oriented(size=1.0)
    q = scaling()
    U, S, Vh = torch.linalg.svd(W * q, full_matrices=False)
    P = Vh[:R] / q
    assert error((adapter.U.T @ U[:, :R]).abs(), torch.eye(R)) < 1e-7  # directions in the same order
    x = toy.inputs(5, I, dtype=torch.float64)
    for coeff in (1.0, 0.5, -0.7, 2.0):
        f = 1 + torch.nn.functional.elu(coeff * adapter.g.detach())
        want = W - U[:, :R] * S[:R] @ P + U[:, :R] * (S[:R] * f) @ P
        with ll.scale(model, coeff):
            assert error(model(x), x @ want.T + model.o_proj.bias) < 1e-9


@pytest.mark.parametrize("d_out", [16, 40])
@pytest.mark.parametrize("stat", ["abs_mean", "rms"])
@pytest.mark.parametrize("alpha", [0.5, 1.0])
def test_directions_are_the_leading_left_singular_vectors_of_the_scaled_weight(alpha, stat, d_out):
    _, W, adapter = oriented(d_out=d_out, asvd_alpha=alpha, asvd_stat=stat)
    assert error(projector(adapter.U), leading(W * scaling(alpha, stat))) < T64
    assert error(adapter.U.T @ adapter.U, torch.eye(R)) < 1e-12
    assert error(adapter.sigma, (W.T @ adapter.U).norm(dim=0)) < T64


def test_statistic_and_exponent_choose_other_directions():
    chosen = [projector(oriented(**fields)[2].U) for fields in ({}, {"asvd_alpha": 1.0}, {"asvd_stat": "rms"})]
    for index, P in enumerate(chosen):
        for Q in chosen[:index]:
            assert error(P, Q) > 1e-4


def test_directions_are_those_of_the_gain_method_in_this_basis():
    for fields in ({}, {"asvd_alpha": 0.9}, {"asvd_stat": "rms"}):
        assert torch.equal(oriented(**fields)[2].U, based("asvd", **fields)[1].U)


def test_channels_of_one_size_give_the_plain_decomposition():
    signs = torch.where(kept(batches()) > 0, 1.0, -1.0).double()
    _, W, adapter = oriented([{"x": 3 * signs}])
    assert error(projector(adapter.U), leading(W)) < 1e-9
    _, W, adapter = oriented(asvd_alpha=0.0)
    assert error(projector(adapter.U), leading(W)) < 1e-9
    assert error(projector(oriented()[2].U), leading(W)) > 1e-3


def test_sums_of_batch_means_give_the_same_directions_for_batches_of_one_length():
    whole = [{"x": batch["x"]} for batch in batches()]
    _, W, adapter = oriented(whole)
    q = sum(batch["x"].abs().mean((0, 1)) for batch in whole) ** 0.5
    assert error(projector(adapter.U), leading(W * (q + 1e-6 * q.max()))) < T64


def test_neither_the_unit_of_the_activations_nor_padding_matters():
    _, _, adapter = oriented()
    assert error(projector(oriented(batches(10.0))[2].U), projector(adapter.U)) < 1e-9
    noisy = batches()
    for batch in noisy:
        batch["x"][batch["attention_mask"] == 0] = 1e3
    assert torch.equal(oriented(noisy)[2].U, adapter.U)


def test_a_channel_without_data_stays_finite():
    silent = batches()
    for batch in silent:
        batch["x"][..., :3] = 0
    _, _, adapter = oriented(silent)
    assert error(adapter.U.T @ adapter.U, torch.eye(R)) < 1e-12


def test_where_few_channels_have_data_the_silent_ones_choose_the_other_directions():
    data = batches()
    for batch in data:
        batch["x"][..., 3:] = 0
    _, W, adapter = oriented(data)
    live = torch.linalg.qr(W[:, :3])[0]
    rest = torch.linalg.svd(W[:, 3:] - live @ live.T @ W[:, 3:], full_matrices=False)[0][:, : R - 3]
    assert error(projector(adapter.U), projector(torch.cat([live, rest], 1))) < 1e-4


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"basis": "svd"}, "basis: 'asvd'|basis: one of 'asvd'"),
        ({"asvd_alpha": -0.1}, "asvd_alpha is 0 or more"),
        ({"asvd_stat": "max"}, "asvd_stat: one of 'abs_mean', 'rms'"),
        ({"damp": 0.1}, "has no field 'damp'"),
        ({"alpha": 8.0}, "This method has no alpha"),
    ],
)
def test_options_that_would_not_act_and_bad_values_are_refused(fields, message):
    with pytest.raises(ll.LoraLiteError, match=message):
        config(**fields)


def test_missing_data_are_refused():
    with pytest.raises(ll.LoraLiteError, match=r"antipasto_asvd starts from data and calibration_data is missing"):
        ll.attach(toy.one(I, O), config())
