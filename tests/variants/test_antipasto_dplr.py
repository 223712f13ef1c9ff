"""The diagonal-plus-low-rank core against W_res + U (diag(sigma f) + c B A) P in dense float64."""

import pytest
import torch

import lora_lite as ll
from lora_lite.testing import toy
from lora_lite.testing.checks import error
from lora_lite.testing.formula import T64, adapted, check_dense
from tests.families.test_subspace import BASES
from tests.oracles.layer import check_low_rank, check_pushed_out_gain_comes_back


def config(**fields):
    return ll.AntiPaSTODPLRConfig(**{"r": 8, "k": 3, **fields})


def factors(a, c):
    g = torch.minimum(a.g, torch.zeros_like(a.g)) if a.cfg.suppress_only else a.g
    return torch.where(c * g > 0, 1 + c * g, torch.exp((c * g).clamp(max=0)))


def dense(a, W, b, c):
    D = torch.diag(1 / a.sigma)
    core = torch.diag(a.sigma * factors(a, c)) + c * a.B @ a.A
    changed = W - a.U @ (a.U.T @ W) + a.U @ core @ D @ (a.U.T @ W)
    if a.cfg.include_bias and b is not None:
        b = b + a.U @ (core @ D - torch.eye(len(D))) @ (a.U.T @ b)
    return changed, b


def moved(size=1.0, **fields):
    """(model, adapter, W, b) at random parameters, float64."""
    model, adapter = adapted(config(**fields), size=size)
    return model, adapter, model.o_proj.weight.detach(), model.o_proj.bias.detach()


def low_rank_part(**fields):
    """(change of W by the product alone, adapter, W)."""
    model, adapter, W, _ = moved(**fields)
    with torch.no_grad():
        adapter.g.zero_()
    return ll.delta_weight(model, "o_proj").double(), adapter, W


@pytest.mark.parametrize("basis", BASES)
def test_output_and_gradients_equal_the_dense_form(basis):
    check_dense(config(basis=basis), dense, size=1.0)


@pytest.mark.parametrize("fields", [{"k": 1}, {"k": 8}, {"include_bias": True}], ids=str)
def test_output_and_gradients_equal_the_dense_form_with_every_option(fields):
    check_dense(config(**fields), dense, size=1.0)


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


def test_the_product_is_not_its_transpose():
    model, adapter, _, _ = moved(k=8)
    x = toy.inputs(5, 24, dtype=torch.float64)
    before = model(x)
    with torch.no_grad():
        A, B = adapter.A.clone(), adapter.B.clone()
        adapter.A.copy_(B.T)
        adapter.B.copy_(A.T)
    assert error(model(x), before) > 1e-2


@pytest.mark.parametrize("basis", BASES)
def test_the_product_stays_in_the_outputs_and_inputs_of_the_directions_and_has_rank_k(basis):
    change, adapter, W = low_rank_part(basis=basis)
    rows = torch.linalg.qr(W.T @ adapter.U).Q
    assert error(adapter.U @ (adapter.U.T @ change), change) < 1e-6
    assert error(change @ rows @ rows.T, change) < 1e-6
    values = torch.linalg.svdvals(change)
    assert values[2] > 1e-3
    assert values[3:].max() < 1e-6 * values[0]


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


def test_signs_of_singular_vectors_are_absorbed_by_both_factors():
    model, adapter, _, _ = moved()
    x = toy.inputs(5, 24, dtype=torch.float64)
    before = model(x)
    D = torch.tensor([1.0, -1.0, -1.0, 1.0] * 2, dtype=torch.float64)
    adapter.U.mul_(D)
    assert error(model(x), before) > 1e-3
    with torch.no_grad():
        adapter.A.mul_(D)
        adapter.B.mul_(D[:, None])
    assert error(model(x), before) < T64


def test_without_the_product_it_is_the_gain():
    model, adapter, _, _ = moved()
    with torch.no_grad():
        adapter.B.zero_()
    other, gain = adapted(ll.AntiPaSTOConfig(r=8), size=0)
    with torch.no_grad():
        gain.g.copy_(adapter.g)
    x = toy.inputs(5, 24, dtype=torch.float64)
    assert error(model(x), other(x)) < T64


def test_suppress_only_bounds_the_factors_and_not_the_product():
    model, adapter, W, b = moved(suppress_only=True)
    assert (adapter.g > 0).any()
    x = toy.inputs(200, 24, dtype=torch.float64)
    before = x @ W.T @ adapter.U
    assert ((model(x) - b).norm(dim=1) > (x @ W.T).norm(dim=1)).any()
    with torch.no_grad():
        adapter.B.zero_()
    assert (((model(x) - b) @ adapter.U).abs() <= before.abs() * (1 + 1e-12) + 1e-12).all()


def test_a_suppressed_factor_that_was_pushed_out_comes_back():
    check_pushed_out_gain_comes_back(config(suppress_only=True))


def test_start_values():
    _, adapter, _, _ = moved(size=0)
    assert not adapter.g.any()
    assert not adapter.B.any()
    bound = 8**-0.5
    assert adapter.A.abs().max() <= bound
    assert abs(float(adapter.A.detach().std()) - bound / 3**0.5) < 0.2 * bound


@pytest.mark.parametrize("rows", [4, 0])
def test_directions_of_no_strength_stay_finite(rows):
    model = toy.one(24, 32, dtype=torch.float64)
    with torch.no_grad():
        model.o_proj.weight[:, rows:] = 0
    adapter = toy.perturb(ll.attach(model, config(dtype=torch.float64))).layers["o_proj"]
    assert adapter.sigma[7] < 1e-6
    adapter.sigma[7] = 0
    out = model(toy.inputs(5, 24, dtype=torch.float64))
    assert out.isfinite().all()
    assert out.abs().max() < 100


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 1e-2), (torch.float16, 2e-3)])
@pytest.mark.parametrize("rank", [3, 4, 6])
def test_a_weight_of_low_rank_runs_as_its_own_exact_map(rank, dtype, tolerance):
    check_low_rank(config(), rank, dtype, tolerance)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"k": 0}, "k is 1 to r=8"),
        ({"k": 9}, "k is 1 to r=8"),
        ({"rank_pattern": {"o_proj": 2}}, r"o_proj.*k is 1 to r=2"),
        ({"alpha": 8.0}, "This method has no alpha"),
    ],
)
def test_bad_options_are_refused(fields, message):
    with pytest.raises(ll.LoraLiteError, match=message):
        adapted(config(**fields))
