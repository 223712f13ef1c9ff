"""DeLoRA against sums of normalised rank-one matrices in dense float64 and against PEFT."""

import itertools

import pytest
import torch

import lora_lite as ll
from lora_lite.testing import toy
from lora_lite.testing.checks import error
from lora_lite.testing.formula import T32, T64, adapted, check_dense
from tests.oracles.layer import check_parity, peft_layer


def update(A, B, lam):
    """The paper's sum (lam/r) sum_k b_k a_k^T / (|b_k| |a_k|), one rank-one matrix after the other."""
    total = torch.zeros(len(B), A.shape[1], dtype=A.dtype)
    for a, b in zip(A, B.T):
        total = total + torch.outer(b, a) / (b.square().sum() * a.square().sum()).sqrt()
    return lam / len(A) * total


def widths(W, norm):
    return W.square().sum(0).sqrt() if norm == "column" else W.square().sum().sqrt().expand(W.shape[1])


def dense(a, W, b, c):
    change = update(a.A, a.B, a.lam)
    if a.cfg.start == "frozen_copy":
        change = change - update(a.A0, a.B0, a.lam0)
    return W + c * change @ torch.diag(widths(W, a.cfg.norm)), b


def weight_of(model):
    """W' in float64, from unit inputs."""
    units = torch.eye(24, dtype=torch.float64)
    return (model(units) - model(torch.zeros(1, 24, dtype=torch.float64))).T


def change_of(model):
    with ll.disabled(model):
        W = weight_of(model)
    return weight_of(model) - W


def moved_start(start, size):
    """The change of W after B moved by `size` times a random matrix of unit columns, relative to W."""
    model, adapter = adapted(ll.DeLoRAConfig(r=4, start=start), size=0)
    step = toy.inputs(32, 4, dtype=torch.float64, seed=6)
    with torch.no_grad():
        adapter.B.add_(size * step / step.norm(dim=0))
        return float(change_of(model).norm() / model.o_proj.weight.norm())


@pytest.mark.parametrize("norm", ["column", "fro"])
@pytest.mark.parametrize("start", ["frozen_copy", "zero_b"])
def test_output_and_gradients_equal_the_sum_of_unit_rank_one_matrices(start, norm):
    check_dense(ll.DeLoRAConfig(r=4, start=start, norm=norm), dense)


def test_norm_of_columns_or_of_the_whole_matrix():
    model, column = adapted(ll.DeLoRAConfig(r=4))
    W = model.o_proj.weight
    assert error(column.w, W.norm(dim=0)) < T64
    _, whole = adapted(ll.DeLoRAConfig(r=4, norm="fro"))
    assert error(whole.w, W.norm().expand(24)) < T64
    assert whole.w[0] > 2 * column.w.max()


@pytest.mark.parametrize("norm", ["column", "fro"])
@pytest.mark.parametrize("start", ["frozen_copy", "zero_b"])
def test_strength_bounds_the_update_whatever_the_factors(start, norm):
    for size in (0.1, 1.0, 1e6):
        for lam in (0.5, -3.0, 15.0):
            model, adapter = adapted(ll.DeLoRAConfig(r=4, start=start, norm=norm), size=size)
            with torch.no_grad():
                adapter.lam.fill_(lam)
                change = change_of(model) / adapter.w
            frozen = float(adapter.lam0.abs()) if start == "frozen_copy" else 0.0
            assert change.norm() <= (abs(lam) + frozen) * (1 + 1e-9)


def test_bound_is_reached_by_equal_directions():
    model, adapter = adapted(ll.DeLoRAConfig(r=4, start="zero_b"))
    with torch.no_grad():
        adapter.A.copy_(adapter.A[:1].expand(4, 24))
        adapter.B.copy_(adapter.B[:, :1].expand(32, 4))
        change = change_of(model) / adapter.w
    assert error(change.norm(), adapter.lam.abs()[0]) < T64


@pytest.mark.parametrize("start", ["frozen_copy", "zero_b"])
def test_lengths_of_rows_and_columns_do_not_matter(start):
    model, adapter = adapted(ll.DeLoRAConfig(r=4, start=start))
    x = toy.inputs(5, 24, dtype=torch.float64)
    before = model(x)
    factors = torch.tensor([0.01, 0.5, 3.0, 1e4], dtype=torch.float64)
    with torch.no_grad():
        adapter.A.mul_(factors[:, None])
        adapter.B.mul_(factors.flip(0))
        assert error(model(x), before) < T64
        adapter.A.neg_()
    assert error(model(x), before) > 0.1


def test_starting_values_are_the_published_ones():
    _, adapter = adapted(ll.DeLoRAConfig(r=16, lambda0=7.0), d_in=400, d_out=100, dtype=torch.float32, size=0)
    assert 0.99 / 20 < adapter.A.abs().max() <= 1 / 20
    assert 0.99 / 4 < adapter.B.abs().max() <= 1 / 4
    assert adapter.lam.tolist() == [7.0]
    _, zero = adapted(ll.DeLoRAConfig(r=16, start="zero_b"), d_in=400, size=0)
    assert 0.99 / 20 < zero.A.abs().max() <= 1 / 20
    assert not zero.B.any()
    assert zero.lam.tolist() == [15.0]


@pytest.mark.parametrize("buffers", [None, torch.float32, torch.bfloat16, torch.float16])
def test_frozen_copies_equal_the_trained_tensors_in_every_bit(buffers):
    for dtype in (torch.float32, torch.bfloat16):
        model = toy.one(dtype=dtype)
        adapter = ll.attach(model, ll.DeLoRAConfig(r=4, buffer_dtype=buffers)).layers["o_proj"]
        assert adapter.A0.dtype is adapter.B0.dtype is (buffers or dtype)
        for trained, frozen in ((adapter.A, adapter.A0), (adapter.B, adapter.B0), (adapter.lam, adapter.lam0)):
            assert trained.dtype is torch.float32
            assert torch.equal(trained, frozen.float())
            assert trained.untyped_storage().data_ptr() != frozen.untyped_storage().data_ptr()


@pytest.mark.parametrize("buffers", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("start", ["frozen_copy", "zero_b"])
def test_start_is_the_base_bit_for_bit(start, dtype, buffers):
    for d_in, d_out, r in ((24, 32, 4), (37, 53, 5), (515, 131, 17)):
        model, x = toy.one(d_in, d_out, dtype=dtype), toy.inputs(7, d_in, dtype=dtype)
        base = model(x)
        ll.attach(model, ll.DeLoRAConfig(r=r, start=start, buffer_dtype=buffers, lambda0=15.7))
        assert torch.equal(model(x), base)
        model.to(torch.bfloat16)
        with ll.disabled(model):
            base = model(x.bfloat16())
        assert torch.equal(model(x.bfloat16()), base)


def test_frozen_copy_moves_in_proportion_and_zero_b_jumps():
    smooth = [moved_start("frozen_copy", size) for size in (1e-6, 1e-5, 1e-4)]
    assert 0 < smooth[0] < 1e-4
    for small, large in itertools.pairwise(smooth):
        assert abs(large / small - 10) < 0.01
    assert moved_start("zero_b", 0.0) == 0.0
    at_floor, above = moved_start("zero_b", 1e-4), moved_start("zero_b", 1.0)
    assert above > 0.5
    assert abs(at_floor / above - 1) < 1e-9
    assert abs(moved_start("zero_b", 1e-6) / above - 0.01) < 1e-9


def test_first_gradient_of_zero_b_is_ten_thousand_times_that_of_a_unit_column():
    x, probe = toy.inputs(5, 24, dtype=torch.float64), toy.inputs(5, 32, dtype=torch.float64, seed=4)
    model, adapter = adapted(ll.DeLoRAConfig(r=4, start="zero_b"), size=0)
    (model(x) * probe).sum().backward()
    A = adapter.A.detach()
    h = (x * adapter.w) @ (A / A.norm(dim=1, keepdim=True)).T
    unit = probe.T @ h * 15 / 4  # the gradient with respect to the normalised column
    assert error(adapter.B.grad / 1e4, unit) < T64


@pytest.mark.parametrize("start", ["frozen_copy", "zero_b"])
def test_a_column_of_zeros_in_the_weight_stays_zero(start):
    model = toy.one(dtype=torch.float64)
    with torch.no_grad():
        model.o_proj.weight[:, 3] = 0
    handle = toy.perturb(ll.attach(model, ll.DeLoRAConfig(r=4, start=start, dtype=torch.float64)))
    assert not weight_of(model)[:, 3].any()
    model(toy.inputs(5, 24, dtype=torch.float64)).sum().backward()
    assert all(p.grad.isfinite().all() for p in handle.parameters())


def test_small_moves_keep_their_digits_in_bfloat16():
    _, adapter = adapted(ll.DeLoRAConfig(r=8, lambda0=1.0), d_in=256, d_out=256, dtype=torch.float32, size=1e-3)
    x = toy.inputs(64, 256)
    low, y = x.bfloat16(), torch.zeros(64, 256)
    exact = adapter(low.float(), y, None)
    got = adapter(low, y.bfloat16(), None).float()
    assert (got - exact).norm() / exact.norm() < 0.01
    A, B = (F / F.norm(dim=d, keepdim=True) for F, d in ((adapter.A, 1), (adapter.B, 0)))
    A0, B0 = (F / F.norm(dim=d, keepdim=True) for F, d in ((adapter.A0, 1), (adapter.B0, 0)))
    trained, frozen = (
        low @ (P * adapter.w).T.bfloat16() @ (Q * s / 8).T.bfloat16() for P, Q, s in ((A, B, adapter.lam), (A0, B0, 1.0))
    )
    assert (trained.float() - frozen.float() - exact).norm() / exact.norm() > 0.1


def test_strength_of_zero_silences_both_factors():
    model, adapter = adapted(ll.DeLoRAConfig(r=4, start="zero_b"))
    with torch.no_grad():
        adapter.lam.zero_()
    model(toy.inputs(5, 24, dtype=torch.float64)).square().sum().backward()
    assert not adapter.A.grad.any()
    assert not adapter.B.grad.any()
    assert adapter.lam.grad.any()


def test_start_of_the_strength_scales_the_change():
    models = [adapted(ll.DeLoRAConfig(r=4, start="zero_b", lambda0=value))[0] for value in (1.0, 4.0)]
    assert error(change_of(models[1]), 4 * change_of(models[0])) < T64


@pytest.mark.parametrize("start", ["frozen_copy", "zero_b"])
def test_nothing_decays_and_the_strength_may_have_a_rate_of_its_own(start):
    model, adapter = adapted(ll.DeLoRAConfig(r=4, start=start))
    (group,) = ll.param_groups(model, weight_decay=0.1)
    assert (group["lr"], group["weight_decay"], len(group["params"])) == (1e-3, 0.0, 3)
    model, adapter = adapted(ll.DeLoRAConfig(r=4, start=start, lr_lambda=0.05))
    for lr in (None, 2e-3):
        groups = {group["lr"]: group["params"] for group in ll.param_groups(model, lr=lr)}
        assert groups.keys() == {lr or 1e-3, 0.05}
        assert [id(p) for p in groups[0.05]] == [id(adapter.lam)]


@pytest.mark.parametrize(("start", "frozen"), [("frozen_copy", 4 * (24 + 32) + 1 + 24), ("zero_b", 24)])
def test_trained_and_frozen_numbers(start, frozen):
    model, adapter = adapted(ll.DeLoRAConfig(r=4, start=start))
    assert (ll.status(model).trainable, ll.status(model).frozen) == (4 * (24 + 32) + 1, frozen)
    assert adapter.claims.rank(adapter.cfg) == (8 if start == "frozen_copy" else 4)


def test_lambda_has_a_gradient_at_the_start_where_the_authors_code_has_none():
    """Equation 9 freezes lambda0 in the subtracted term; the authors' code multiplies both terms by the trained lambda."""
    model, adapter = adapted(ll.DeLoRAConfig(r=5, lambda0=8.0), size=0)
    x, probe = toy.inputs(7, 24, dtype=torch.float64), toy.inputs(7, 32, dtype=torch.float64, seed=4)
    (model(x) * probe).sum().backward()

    def units(A, B):
        return (B / B.norm(dim=0)) @ (A / A.norm(dim=1, keepdim=True)) * adapter.w / adapter.cfg.r

    A, B, lam = adapter.A.detach(), adapter.B.detach(), torch.tensor(8.0, dtype=torch.float64, requires_grad=True)
    for frozen, live in ((torch.tensor(8.0, dtype=torch.float64), True), (lam, False)):
        lam.grad = None
        change = lam * units(A, B) - frozen * units(adapter.A0, adapter.B0)
        ((x @ change.T) * probe).sum().backward()
        assert (lam.grad.abs() > 1e-3) == live
        if live:
            assert error(adapter.lam.grad[0], lam.grad) < T64


def test_recommended_rate_and_defaults():
    cfg = ll.DeLoRAConfig()
    assert (cfg.r, cfg.lambda0, cfg.start, cfg.norm, cfg.lr, cfg.lr_lambda) == (16, 15.0, "frozen_copy", "column", 1e-3, None)


def fill(ours, theirs):
    ours.A.copy_(theirs.delora_A["default"])
    ours.B.copy_(theirs.delora_B["default"])
    ours.lam.copy_(theirs.delora_lambda["default"])
    assert error(ours.w, theirs.delora_w_norm["default"]) < 1e-6


def gradients(ours, theirs):
    return [
        (ours.A.grad, theirs.delora_A["default"].grad),
        (ours.B.grad, theirs.delora_B["default"].grad),
        (ours.lam.grad, theirs.delora_lambda["default"].grad),
    ]


def peft_config():
    peft = pytest.importorskip("peft")
    return peft.DeloraConfig(r=4, target_modules=["o_proj"], init_weights=False)


@pytest.mark.parametrize(("d_in", "d_out"), [(24, 32), (32, 24)])
def test_parity_with_peft(d_in, d_out):
    check_parity(ll.DeLoRAConfig(r=4, start="zero_b"), peft_config(), gradients, fill, d_in=d_in, d_out=d_out)


def test_frozen_copy_is_the_update_of_peft_minus_that_of_the_start():
    theirs = peft_layer(peft_config())
    model, ours = adapted(ll.DeLoRAConfig(r=4), dtype=torch.float32)
    deltas = []
    for A, B, lam in ((ours.A, ours.B, ours.lam), (ours.A0, ours.B0, ours.lam0)):
        with torch.no_grad():
            theirs.delora_A["default"].copy_(A)
            theirs.delora_B["default"].copy_(B)
            theirs.delora_lambda["default"].copy_(lam)
            deltas.append(theirs.get_delta_weight("default"))
    assert error(ll.delta_weight(model, "o_proj"), deltas[0] - deltas[1]) < T32
