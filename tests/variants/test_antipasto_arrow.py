"""The arrow core against the reference project's form; tests/families/test_cores.py holds what it shares with other cores."""

import pytest
import torch

import lora_lite as ll
from lora_lite.families.basis import scores
from lora_lite.testing import toy
from lora_lite.testing.checks import error
from lora_lite.testing.formula import T64, adapted
from tests.families.test_subspace import batches, kept


def config(**fields):
    return ll.AntiPaSTOArrowConfig(**{"r": 8, "block": 3, **fields})


def moved(d_in=24, d_out=32, data=None, **fields):
    """(model, adapter, W, b) at random parameters, float64."""
    model, adapter = adapted(config(**fields), d_in, d_out, size=1.0, data=data)
    return model, adapter, model.o_proj.weight.detach(), model.o_proj.bias.detach()


def test_the_map_is_the_reference_projects_cut_and_mixed_svd():
    model, adapter, W, b = moved()
    U, S, Vh = torch.linalg.svd(W, full_matrices=False)
    signs = (adapter.U * U[:, :8]).sum(0).sign()
    U, Vh = U[:, :8] * signs, Vh[:8] * signs[:, None]
    K = torch.zeros(8, 8, dtype=torch.float64)
    K[:3, :3] = torch.eye(3) + adapter.M.detach()
    K[3:, 3:] = torch.diag(1 + torch.nn.functional.elu(adapter.g.detach()))
    want = W - U * S[:8] @ Vh + U @ K @ torch.diag(S[:8]) @ Vh
    x = toy.inputs(5, 24, dtype=torch.float64)
    assert error(model(x), x @ want.T + b) < T64


def test_a_block_of_one_is_a_linear_factor_of_the_first_direction():
    model, adapter, W, b = moved(block=1)
    x = toy.inputs(5, 24, dtype=torch.float64)
    with torch.no_grad():
        adapter.M.fill_(-3.0)  # a factor of -2, which no gain reaches
    first = model(x) @ adapter.U[:, 0] - b @ adapter.U[:, 0]
    assert error(first, -2.0 * (x @ W.T @ adapter.U[:, 0])) < T64


def test_block_and_factors_act_on_directions_of_their_own():
    model, adapter, _, _ = moved()
    x = toy.inputs(5, 24, dtype=torch.float64)
    before = model(x) @ adapter.U
    for tensor, mine, others in ((adapter.M, slice(0, 3), slice(3, 8)), (adapter.g, slice(3, 8), slice(0, 3))):
        with torch.no_grad():
            tensor.add_(0.5)
        change = model(x) @ adapter.U - before
        before = before + change
        assert error(change[:, others], torch.zeros_like(change[:, others])) < T64
        assert (change[:, mine].abs().amax(0) > 1e-2).all()


def test_suppress_only_bounds_the_factors_and_not_the_block():
    model, adapter, W, b = moved(suppress_only=True)
    assert (adapter.g > 0).any()
    x = toy.inputs(200, 24, dtype=torch.float64)
    before, after = x @ W.T @ adapter.U, (model(x) - b) @ adapter.U
    assert (after[:, 3:].abs() <= before[:, 3:].abs() * (1 + 1e-12) + 1e-12).all()
    assert (after[:, :3].norm(dim=1) > before[:, :3].norm(dim=1)).any()
    free, adapter, _, _ = moved()
    assert ((free(x) - b) @ adapter.U)[:, 3:].abs().gt(before[:, 3:].abs() + 1e-9).any()


@pytest.mark.parametrize("score", ["rms", "contrast"])
def test_block_by_score_puts_the_best_scored_directions_first(score):
    data = batches()
    x = kept(data)
    if score == "contrast":
        data = {"positive": data[:2], "negative": [{**d, "x": d["x"] * 0.5} for d in data[2:]]}
        x = kept(data["positive"]).mean(0) - kept(data["negative"]).mean(0)
    fields = {"basis": "select", "select_score": score, **({"positions": "all"} if score == "contrast" else {})}
    _, ordered, W, _ = moved(d_out=40, data=data, **fields)
    _, scored, W, _ = moved(d_out=40, data=data, block_by="score", **fields)
    U = torch.linalg.svd(W, full_matrices=False).U
    values = (x @ W.T @ U).square().mean(0).sqrt() if score == "rms" else (x @ W.T @ U).abs()
    best = values.topk(8).indices
    assert error((scored.U.T @ U[:, best]).abs(), torch.eye(8)) < 1e-7
    assert not torch.equal(best, best.sort().values)
    assert error((ordered.U.T @ U[:, best.sort().values]).abs(), torch.eye(8)) < 1e-7
    if score == "rms":
        stats = {"y_moment": {"o_proj": W @ x.T @ x @ W.T}}
        assert (scores(scored.cfg, stats, "o_proj", scored.U).diff() < 0).all()


def test_the_block_may_learn_at_a_rate_of_its_own():
    model, adapter = adapted(config(lr_block=1e-4), size=0)
    rates = {id(p): group["lr"] for group in ll.param_groups(model) for p in group["params"]}
    assert (rates[id(adapter.M)], rates[id(adapter.g)]) == (1e-4, 5e-3)
    model, adapter = adapted(config(), size=0)
    assert {group["lr"] for group in ll.param_groups(model, lr=1e-2)} == {1e-2}


def test_the_default_block_is_eight_or_half_the_rank():
    for r, b in ((2, 1), (5, 2), (16, 8), (22, 8)):
        _, adapter = adapted(config(r=r, block=None), size=0)
        assert (adapter.M.shape, adapter.g.shape) == ((b, b), (r - b,))


def test_a_unit_change_of_the_block_moves_the_weight_by_the_strengths():
    model, adapter = adapted(config(), size=0)
    S = torch.linalg.svdvals(model.o_proj.weight.detach())
    for k in range(3):
        with torch.no_grad():
            adapter.M.zero_()
            adapter.M[0, k] = 1.0
        assert abs(float(ll.delta_weight(model, "o_proj").norm()) - float(S[k])) < 1e-6
