"""The gain core, in every method that has it, against the reference project's crop-and-put-back form in dense float64."""

import pytest
import torch

import lora_lite as ll
from lora_lite.testing import checks, toy
from lora_lite.testing.checks import error
from lora_lite.testing.formula import T64, adapted, check_dense
from tests.families.test_subspace import BASES, batches
from tests.oracles.layer import check_pushed_out_gain_comes_back, check_rest_stays

METHODS = ("antipasto", "antipasto_corda", "antipasto_asvd")
each = pytest.mark.parametrize("name", METHODS)


def factors(a, c):
    g = torch.minimum(a.g, torch.zeros_like(a.g)) if a.cfg.suppress_only else a.g
    return torch.where(c * g > 0, 1 + c * g, torch.exp((c * g).clamp(max=0)))


def dense(a, W, b, c):
    """W_res + U diag(sigma f) P with P = diag(1/sigma) U^T W."""
    U, f = a.U, factors(a, c)
    P = (U.T @ W) / a.sigma[:, None]
    changed = W - U @ (U.T @ W) + U @ ((a.sigma * f)[:, None] * P)
    return changed, b + U @ ((f - 1) * (U.T @ b)) if a.cfg.include_bias and b is not None else b


def moved(name="antipasto", **fields):
    """(model, adapter, W, b) at random parameters, float64."""
    model, adapter = adapted(ll.config(name, r=8, **fields), size=1.0)
    return model, adapter, model.o_proj.weight.detach(), model.o_proj.bias.detach()


@pytest.mark.parametrize("fields", [{"suppress_only": True}, {"include_bias": True}], ids=str)
@pytest.mark.parametrize("check", checks("antipasto"), ids=lambda check: check.function.__name__)
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
def test_options_are_lawful(check, fields):
    check.function(check.cls, ll.AntiPaSTOConfig(r=8, **fields))


@each
@pytest.mark.parametrize("include_bias", [False, True])
def test_output_and_gradients_equal_the_dense_form(include_bias, name):
    check_dense(ll.config(name, r=8, include_bias=include_bias), dense, size=1.0)


@each
def test_suppressed_gains_equal_the_dense_form(name):
    def inside(a, W, b, c):
        with torch.no_grad():
            a.g.copy_(-a.g.abs() - 0.01)  # the gradient at and beyond the bound is the business of the test below
        return dense(a, W, b, c)

    model, adapter, _, _ = moved(name, suppress_only=True)
    inside(adapter, model.o_proj.weight, None, 1.0)
    x = toy.inputs(5, 24, dtype=torch.float64)
    W, b = dense(adapter, model.o_proj.weight, model.o_proj.bias, 1.0)
    want = x @ W.T + b
    assert error(model(x), want) < T64
    probe = toy.inputs(5, 32, dtype=torch.float64, seed=4)
    ours = torch.autograd.grad((model(x) * probe).sum(), adapter.g)[0]
    assert error(ours, torch.autograd.grad((want * probe).sum(), adapter.g)[0]) < T64 * 10


@pytest.mark.parametrize("basis", BASES)
def test_every_basis_gives_the_dense_form(basis):
    cfg = ll.AntiPaSTOConfig(r=12, basis=basis)
    model, adapter = adapted(cfg, 24, 40, size=1.0, data=None if basis == "svd" else batches())
    x = toy.inputs(5, 24, dtype=torch.float64)
    for coeff in (1.0, 0.5, -0.7, 2.0):
        W, b = dense(adapter, model.o_proj.weight, model.o_proj.bias, coeff)
        with ll.scale(model, coeff):
            assert error(model(x), x @ W.T + b) < T64


def test_the_map_is_the_reference_projects_cut_and_scaled_svd():
    model, adapter, W, b = moved()
    U, S, Vh = torch.linalg.svd(W, full_matrices=False)
    rest = W - U[:, :8] * S[:8] @ Vh[:8]
    f = 1 + torch.nn.functional.elu(adapter.g.detach())
    want = rest + U[:, :8] * (S[:8] * f) @ Vh[:8]
    x = toy.inputs(5, 24, dtype=torch.float64)
    assert error(adapter.sigma, S[:8]) < T64
    assert error(model(x), x @ want.T + b) < T64


def test_factors_are_positive_smooth_and_below_one_where_c_g_is_negative():
    from lora_lite.families.subspace import gain

    g = torch.linspace(-30, 30, 2001, dtype=torch.float64, requires_grad=True)
    for c in (1.0, 0.5, -0.7):
        f = 1 + gain(c, g, False)
        assert (f > 0).all()
        assert torch.equal(f.detach() <= 1, c * g.detach() <= 0)
        slope = torch.autograd.grad(f.sum(), g)[0]
        assert abs(float(slope[1000]) - c) < 1e-12
        assert float(slope.diff().abs().max()) < 0.05 * abs(c)
    large = torch.tensor([1e4, -1e4], requires_grad=True)
    gain(1.0, large, False).sum().backward()
    assert large.grad.isfinite().all()


@each
def test_only_the_product_of_coeff_and_gain_counts(name):
    model, adapter, _, _ = moved(name)
    x = toy.inputs(5, 24, dtype=torch.float64)
    with ll.scale(model, -0.7):
        want = model(x)
    with torch.no_grad():
        adapter.g.mul_(-0.7)
    assert error(model(x), want) < T64


def test_the_rest_of_the_output_stays():
    model, adapter, _, _ = moved()
    check_rest_stays(model, adapter)


@each
def test_suppress_only_never_makes_an_output_longer(name):
    model, adapter, W, b = moved(name, suppress_only=True)
    assert (adapter.g > 0).any()
    x = toy.inputs(200, 24, dtype=torch.float64)
    for coeff in (0.5, 1.0, 3.0):
        f = factors(adapter, coeff)
        assert ((f > 0) & (f <= 1)).all()
        with ll.scale(model, coeff):
            assert ((model(x) - b).norm(dim=1) <= (x @ W.T).norm(dim=1) * (1 + 1e-12)).all()
    free, _, W, b = moved(name)
    assert ((free(x) - b).norm(dim=1) > (x @ W.T).norm(dim=1)).any()


@each
def test_a_suppressed_gain_that_was_pushed_out_comes_back(name):
    check_pushed_out_gain_comes_back(ll.config(name, r=8, suppress_only=True))


def test_bias_is_left_alone_unless_asked():
    x = torch.zeros(1, 24, dtype=torch.float64)
    model, _, _, b = moved()
    assert torch.equal(model(x)[0], b)
    model, _, _, b = moved(include_bias=True)
    assert error(model(x)[0], b) > 0.01


@each
def test_slope_at_the_start_is_coeff_times_the_coordinate(name):
    model, adapter = adapted(ll.config(name, r=8), size=0)
    x, probe = toy.inputs(5, 24, dtype=torch.float64), toy.inputs(5, 32, dtype=torch.float64, seed=4)
    with ll.scale(model, 0.5):
        got = torch.autograd.grad((model(x) * probe).sum(), adapter.g)[0]
    want = 0.5 * ((x @ model.o_proj.weight.T @ adapter.U) * (probe @ adapter.U)).sum(0)
    assert error(got, want) < T64
