"""Directions and lengths do not depend on the scale of the weight, down to numbers whose squares leave float32."""

import math

import pytest
import torch

import lora_lite as ll
from lora_lite.mathematics import left_svd, length, orth
from lora_lite.testing import toy
from lora_lite.testing.checks import error
from tests.core.test_messages import refusal
from tests.oracles.hard import of_rank, spectrum

SCALES = [2.0**-100, 2.0**100]
COVARIANT = ["antipasto", "antipasto_ablate", "antipasto_arrow", "antipasto_asvd", "antipasto_corda", "delora", "lora_xs"]


def scaled(scale, name):
    """(model, adapter) without a bias, float32, perturbed alike for every scale of the weight."""
    model = toy.one(24, 32, bias=False)
    with torch.no_grad():
        model.o_proj.weight.mul_(scale)
    options = {"init_alpha": 0.5} if name == "antipasto_ablate" else {}
    cfg = ll.config(name, r=8, roles=None, **options)
    handle = toy.perturb(ll.attach(model, cfg, toy.calibration(ll.get(name), cfg)))
    return model, handle.layers["o_proj"]


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("name", COVARIANT)
def test_the_output_scales_with_the_weight(name, scale):
    x = toy.inputs(5, 24)
    want, got = (scaled(s, name)[0](x).detach().double() / s for s in (1.0, scale))
    assert error(got, want) < 2e-5
    assert error(toy.one(24, 32, bias=False)(x), want) > 1e-3


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("name", ["antipasto", "antipasto_dplr", "antipasto_rot"])
def test_strengths_scale_with_the_weight(name, scale):
    (_, one), (_, other) = scaled(1.0, name), scaled(scale, name)
    assert one.sigma.min() > 0
    assert error(other.sigma.double() / scale, one.sigma) < 1e-6
    assert error(other.U, one.U) < 1e-6


@pytest.mark.parametrize("scale", SCALES)
def test_row_norms_are_those_of_the_weight(scale):
    model, adapter = scaled(scale, "dora")
    want = model.o_proj.weight.double().norm(dim=1)
    if scale > 1:
        assert error(adapter.n0.double() / scale, want / scale) < 1e-6
    else:
        assert (adapter.n0 == 2.0**-24).all()  # rows shorter than that act as rows of zeros


@pytest.mark.parametrize("method", ["exact", "fast"])
@pytest.mark.parametrize("scale", [1e-30, 1e30])
@pytest.mark.parametrize("shape", [(600, 640), (640, 600)])
def test_singular_vectors_of_any_scale(shape, scale, method):
    """Wide enough for the ways that square in float32."""
    M = spectrum(*(0.9**k for k in range(600)))(*shape)
    (U, S), (V, T) = left_svd(M, 8, method), left_svd(M * scale, 8, method)
    assert error(V.T @ V, torch.eye(8)) < 1e-5
    assert error(T.double() / scale, S) < 1e-5
    assert (V.T @ U).double().norm() ** 2 == pytest.approx(8, abs=1e-3)


DEGENERATE = {"zeros": torch.zeros, "rank 1": torch.ones, "rank 3": of_rank(3), "equal": spectrum(1.0)}


@pytest.mark.filterwarnings("ignore:the fast SVD missed")
@pytest.mark.parametrize("method", ["exact", "fast", "smallest"])
@pytest.mark.parametrize("shape", [(600, 640), (640, 600)])
@pytest.mark.parametrize(
    "kind", ["rank 3", *(pytest.param(kind, marks=pytest.mark.long) for kind in sorted(DEGENERATE.keys() - {"rank 3"}))]
)
def test_singular_vectors_of_degenerate_matrices_are_orthonormal(kind, shape, method):
    M = DEGENERATE[kind](*shape)
    U, S = left_svd(M, 8, "exact", smallest=True) if method == "smallest" else left_svd(M, 8, method)
    assert error(U.T @ U, torch.eye(8)) < 1e-5
    values = torch.linalg.svdvals(M.double())
    wanted = values[-8:] if method == "smallest" else values[:8]
    assert (S.double() - wanted).abs().max() <= 1e-5 * values[0]


@pytest.mark.parametrize("value", [torch.inf, torch.nan])
@pytest.mark.parametrize("name", [*COVARIANT, "corda", "dora", "eva", "lora_ga", "olora", "pissa"])
def test_a_weight_that_is_not_finite_is_refused_by_its_path(name, value):
    cls, cfg = ll.get(name), ll.config(name, r=8, roles=None)
    model = toy.one(24, 32)
    with torch.no_grad():
        model.o_proj.weight[3, 5] = value
    refusal(lambda: ll.attach(model, cfg, toy.calibration(cls, cfg)), "o_proj", "finite")


def test_sums_that_overflow_are_refused_with_a_repair_that_works():
    cls, cfg = ll.get("antipasto_corda"), ll.config("antipasto_corda", r=8, roles=None)
    model = toy.one(24, 32)
    data = [{"x": 1e30 * batch["x"]} for batch in toy.calibration(cls, cfg)]
    refusal(lambda: ll.attach(model, cfg, data), "o_proj", "overflow float32", "model.double()", model=model)
    ll.attach(model.double(), cfg, [{"x": batch["x"].double()} for batch in data])


@pytest.mark.parametrize("V", [torch.zeros(6, 3), torch.ones(6, 3), torch.eye(6)[:, [0, 0, 1]], 1e-30 * torch.ones(6, 2)])
def test_orth_of_dependent_columns_has_a_finite_gradient(V):
    V = V.clone().requires_grad_()
    Q = orth(V)
    assert error(Q.T @ Q, torch.eye(V.shape[1])) < 1e-6
    (Q * toy.inputs(*V.shape)).sum().backward()
    assert V.grad.isfinite().all()


def test_orth_is_what_qr_gives_where_columns_are_independent():
    V = toy.inputs(9, 4).requires_grad_()
    probe = toy.inputs(9, 4, seed=2)
    want = torch.linalg.qr(V).Q
    assert torch.equal(orth(V), want)
    ours, theirs = (torch.autograd.grad((Q * probe).sum(), V)[0] for Q in (orth(V), want))
    assert torch.equal(ours, theirs)


def test_lengths_of_usual_numbers_keep_their_bits():
    W = toy.inputs(32, 24)
    assert torch.equal(length(W, 0), W.norm(dim=0))
    assert torch.equal(length(W), W.norm())
    assert length(torch.zeros(3, 4), 1).tolist() == [0.0] * 3
    assert math.isnan(length(torch.tensor([1.0, math.nan])))
