"""What the cores of the output-subspace methods promise alike, against W_res + U K U^T W in dense float64."""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch

import lora_lite as ll
from lora_lite.testing import toy
from lora_lite.testing.checks import error
from lora_lite.testing.formula import T64, adapted, check_dense
from tests.families.test_subspace import BASES
from tests.oracles.layer import check_low_rank, check_pushed_out_gain_comes_back


def factors(a, c):
    g = torch.minimum(a.g, torch.zeros_like(a.g)) if a.cfg.suppress_only else a.g
    return torch.where(c * g > 0, 1 + c * g, torch.exp((c * g).clamp(max=0)))


def arrow(a, c):
    return torch.block_diag(torch.eye(len(a.M), dtype=a.M.dtype) + c * a.M, torch.diag(factors(a, c)))


def dplr(a, c):
    return (torch.diag(a.sigma * factors(a, c)) + c * a.B @ a.A) @ torch.diag(1 / a.sigma)


def latent(a, c):
    scale = 1.0 if a.cfg.alpha is None else a.cfg.alpha / (a.cfg.r**0.5 if a.cfg.rslora else a.cfg.r)
    return torch.eye(len(a.R), dtype=a.R.dtype) + c * scale * a.R


class Core(NamedTuple):
    """K(adapter, c), the least options, the size of random parameters, and the other options that K reads."""

    K: Callable[[Any, float], torch.Tensor]
    fields: dict[str, Any]
    size: float
    options: list[dict[str, Any]]


CORES = {
    "antipasto_arrow": Core(arrow, {"r": 8, "block": 3}, 1.0, [{"block": 1}, {"block": 7}, {"include_bias": True}]),
    "antipasto_dplr": Core(dplr, {"r": 8, "k": 3}, 1.0, [{"k": 1}, {"k": 8}, {"include_bias": True}]),
    "lora_xs": Core(latent, {"r": 8}, 0.3, [{"alpha": 4.0}, {"alpha": 4.0, "rslora": True}, {"include_bias": True}]),
}


def config(name, **fields):
    return ll.config(name, **{**CORES[name].fields, **fields})


def dense(a, W, b, c):
    change = CORES[a.variant].K(a, c) - torch.eye(a.cfg.r, dtype=W.dtype)
    return W + a.U @ change @ a.U.T @ W, b + a.U @ change @ (a.U.T @ b) if a.cfg.include_bias and b is not None else b


@pytest.mark.parametrize("basis", BASES)
@pytest.mark.parametrize("name", CORES)
def test_output_and_gradients_equal_the_dense_form(name, basis):
    check_dense(config(name, basis=basis), dense, size=CORES[name].size)


@pytest.mark.parametrize(
    ("name", "fields"), [(name, fields) for name, core in CORES.items() for fields in core.options], ids=str
)
def test_output_and_gradients_equal_the_dense_form_with_every_option(name, fields):
    check_dense(config(name, **fields), dense, size=CORES[name].size)


@pytest.mark.parametrize(("name", "more", "first"), [("antipasto_arrow", "M", 3), ("antipasto_dplr", "B", 0)])
def test_without_what_they_have_more_they_are_the_gain(name, more, first):
    model, adapter = adapted(config(name), size=1.0)
    other, gain = adapted(ll.AntiPaSTOConfig(r=8), size=0)
    x = toy.inputs(5, 24, dtype=torch.float64)
    with torch.no_grad():
        getattr(adapter, more).zero_()
        gain.g[first:] = adapter.g
    for coeff in (1.0, -0.7):
        with ll.scale(model, coeff), ll.scale(other, coeff):
            assert error(model(x), other(x)) < T64


@pytest.mark.parametrize("name", ["antipasto_arrow", "antipasto_dplr"])
def test_a_suppressed_factor_that_was_pushed_out_comes_back(name):
    check_pushed_out_gain_comes_back(config(name, suppress_only=True))


@pytest.mark.parametrize(
    ("name", "fields", "size", "least", "transposed"),
    [
        ("antipasto_dplr", {"k": 8}, 1.0, 1e-2, {"A": "B", "B": "A"}),
        ("lora_xs", {}, 0.3, 1e-3, {"R": "R"}),
    ],
)
def test_the_map_of_the_coordinates_is_not_its_transpose(name, fields, size, least, transposed):
    model, adapter = adapted(config(name, **fields), size=size)
    x = toy.inputs(5, 24, dtype=torch.float64)
    before = model(x)
    with torch.no_grad():
        values = {mine: getattr(adapter, other).T.clone() for mine, other in transposed.items()}
        for mine, value in values.items():
            getattr(adapter, mine).copy_(value)
    assert error(model(x), before) > least


@pytest.mark.parametrize("basis", BASES)
@pytest.mark.parametrize(("name", "rank"), [("antipasto_dplr", 3), ("lora_xs", 8)])
def test_the_change_stays_in_the_outputs_and_inputs_of_the_directions_and_has_its_rank(name, rank, basis):
    model, adapter = adapted(config(name, basis=basis), size=1.0)
    if name == "antipasto_dplr":  # its product alone
        with torch.no_grad():
            adapter.g.zero_()
    W, change = model.o_proj.weight.detach(), ll.delta_weight(model, "o_proj").double()
    rows = torch.linalg.qr(W.T @ adapter.U).Q
    assert error(adapter.U @ (adapter.U.T @ change), change) < 1e-6
    assert error(change @ rows @ rows.T, change) < 1e-6
    values = torch.linalg.svdvals(change)
    assert values[rank - 1] > 1e-3
    assert values[rank:].max() < 1e-6 * values[0]


@pytest.mark.parametrize(("name", "size"), [("antipasto_dplr", 1.0), ("lora_xs", 0.3)])
def test_signs_of_singular_vectors_are_absorbed_by_both_sides_of_the_map(name, size):
    model, adapter = adapted(config(name), size=size)
    x = toy.inputs(5, 24, dtype=torch.float64)
    before = model(x)
    D = torch.tensor([1.0, -1.0, -1.0, 1.0] * 2, dtype=torch.float64)
    adapter.U.mul_(D)
    assert error(model(x), before) > 1e-3
    with torch.no_grad():
        for inputs in {"A", "R"} & dict(adapter.named_parameters()).keys():
            getattr(adapter, inputs).mul_(D)
        for outputs in {"B", "R"} & dict(adapter.named_parameters()).keys():
            getattr(adapter, outputs).mul_(D[:, None])
    assert error(model(x), before) < T64


@pytest.mark.parametrize("rows", [4, 0])
@pytest.mark.parametrize("cfg", [config("antipasto_dplr"), ll.AntiPaSTORotConfig(r=8)], ids=lambda cfg: type(cfg).__name__)
def test_directions_of_no_strength_stay_finite(cfg, rows):
    model = toy.one(24, 32, dtype=torch.float64)
    with torch.no_grad():
        model.o_proj.weight[:, rows:] = 0
    adapter = toy.perturb(ll.attach(model, dataclasses.replace(cfg, dtype=torch.float64))).layers["o_proj"]
    assert adapter.sigma[7] < 1e-6
    adapter.sigma[7] = 0
    out = model(toy.inputs(5, 24, dtype=torch.float64))
    assert out.isfinite().all()
    assert out.abs().max() < 100


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 1e-2), (torch.float16, 2e-3)])
@pytest.mark.parametrize("rank", [3, 4, 6])
@pytest.mark.parametrize("rotate", [None, "V", "U", "both"])
def test_a_weight_of_low_rank_runs_as_its_own_exact_map(rotate, rank, dtype, tolerance):
    cfg = ll.AntiPaSTORotConfig(r=8, rotate=rotate, block_size=8) if rotate else config("antipasto_dplr")
    check_low_rank(cfg, rank, dtype, tolerance)


@pytest.mark.parametrize(
    ("name", "fields", "message"),
    [
        ("antipasto_arrow", {"block": 0}, "block is 1 to r - 1 = 7"),
        ("antipasto_arrow", {"block": 8}, "block is 1 to r - 1 = 7"),
        ("antipasto_arrow", {"r": 1, "block": None}, "r is at least 2"),
        ("antipasto_arrow", {"rank_pattern": {"o_proj": 3}}, r"o_proj.*block is 1 to r - 1 = 2"),
        ("antipasto_arrow", {"block_by": "score"}, "block_by is 'order' with the other options"),
        ("antipasto_arrow", {"basis": "corda", "block_by": "score"}, "block_by is 'order' with the other options"),
        ("antipasto_arrow", {"lr_block": 0.0}, "lr_block is above 0"),
        ("antipasto_dplr", {"k": 0}, "k is 1 to r=8"),
        ("antipasto_dplr", {"k": 9}, "k is 1 to r=8"),
        ("antipasto_dplr", {"rank_pattern": {"o_proj": 2}}, r"o_proj.*k is 1 to r=2"),
        ("antipasto_dplr", {"alpha": 8.0}, "This method has no alpha"),
        ("lora_xs", {"alpha": 0.0}, "alpha is a number above 0"),
        ("lora_xs", {"damp": 0.1}, "damp is 0.0 with the other options"),
        ("lora_xs", {"basis": "eigen"}, "basis: one of 'svd', 'corda'"),
        ("lora_xs", {"r": 25}, "r=25 is larger than the layer allows"),
    ],
)
def test_bad_options_are_refused(name, fields, message):
    with pytest.raises(ll.LoraLiteError, match=message):
        adapted(config(name, **fields))
