"""RoAd against explicit 2 x 2 matrices in dense float64 and against PEFT."""

import dataclasses

import pytest
import torch

import lora_lite as ll
from lora_lite.testing import toy
from lora_lite.testing.checks import error
from lora_lite.testing.formula import T32, T64, adapted, check_dense
from tests.oracles.layer import check_parity, peft_layer

MODES = ("road_1", "road_2", "road_4")


def pairs_of(g, o):
    """(group, place in the half, p, q) of every pair of outputs."""
    return [(k, j, k * g + j, k * g + g // 2 + j) for k in range(o // g) for j in range(g // 2)]


def rotation(a, c):
    """R_c entry by entry, each number found by its place in the flat order of the published code."""
    g, mode = 2 * a.theta.shape[2], a.cfg.mode
    theta, alpha = c * a.theta.flatten(), 1 + c * a.a.flatten()
    R = torch.zeros(a.d_out, a.d_out, dtype=theta.dtype)
    for k, j, p, q in pairs_of(g, a.d_out):
        if mode == "road_1":
            cosines = sines = (k * g // 2 + j, k * g // 2 + j)
        elif mode == "road_2":
            cosines = sines = (p, q)
        else:  # 2g numbers per group: g for the cosines of its outputs, then g for the sines
            cosines = tuple(k * 2 * g + half + j for half in (0, g // 2))
            sines = tuple(k * 2 * g + g + half + j for half in (0, g // 2))
        R[p, p], R[p, q] = alpha[cosines[0]] * theta[cosines[0]].cos(), -alpha[sines[0]] * theta[sines[0]].sin()
        R[q, p], R[q, q] = alpha[sines[1]] * theta[sines[1]].sin(), alpha[cosines[1]] * theta[cosines[1]].cos()
    return R


def dense(a, W, b, c):
    R = rotation(a, c)
    return R @ W, None if b is None else R @ b


def turned(mode="road_1", stretched=False, **shape):
    """(model, adapter) with random angles of size 1 and, unless `stretched`, without stretch."""
    model, adapter = adapted(ll.RoAdConfig(mode=mode, group_size=8), size=1.0, **shape)
    if not stretched:
        with torch.no_grad():
            adapter.a.zero_()
    return model, adapter


@pytest.mark.parametrize("group_size", [None, 2, 8])
@pytest.mark.parametrize("mode", MODES)
def test_output_and_gradients_equal_explicit_two_by_two_matrices(mode, group_size):
    check_dense(ll.RoAdConfig(mode=mode, group_size=group_size), dense)


def test_one_pair_is_the_papers_matrix():
    theta, stretch = torch.tensor(0.7, dtype=torch.float64), 1.3
    model, adapter = adapted(ll.RoAdConfig(), d_out=2, size=0)
    x = toy.inputs(5, 24, dtype=torch.float64)
    first, second = model(x).T
    with torch.no_grad():
        adapter.theta.fill_(theta)
        adapter.a.fill_(stretch - 1)
    cos, sin = stretch * theta.cos(), stretch * theta.sin()
    assert error(model(x), torch.stack([cos * first - sin * second, sin * first + cos * second], -1)) < T64


def test_halves_of_a_group_are_paired_and_pairs_do_not_mix():
    model, _ = turned("road_4", stretched=True)
    model.o_proj.weight.data = torch.eye(32, 24, dtype=torch.float64)
    reached = ll.delta_weight(model, "o_proj").abs() > 1e-12
    allowed = torch.zeros(32, 24, dtype=torch.bool)
    for _, _, p, q in pairs_of(8, 32):
        for row, column in ((p, p), (p, q), (q, p), (q, q)):
            if column < 24:
                allowed[row, column] = True
    assert torch.equal(reached, allowed)


@pytest.mark.parametrize("coeff", [1.0, 0.5, -0.7, 2.0])
def test_lengths_stay_under_turns_alone(coeff):
    for dtype, tolerance in ((torch.float64, T64), (torch.float32, 1e-6)):
        model, _ = turned(dtype=dtype)
        x = toy.inputs(5, 24, dtype=dtype)
        with ll.scale(model, 0.0):
            y = model(x)
        with ll.scale(model, coeff):
            assert error(model(x).norm(dim=-1) / y.norm(dim=-1), torch.ones(5)) < tolerance
            assert error(model(x), y) > 0.1


def test_one_number_per_pair_scales_its_length():
    _, adapter = turned(stretched=True)
    R = rotation(adapter, 1.0)
    alpha = torch.cat([(1 + adapter.a).squeeze(1)] * 2, dim=1).flatten()
    assert error(R.T @ R, torch.diag(alpha.square())) < T64


@pytest.mark.parametrize("mode", MODES[1:])
def test_numbers_of_their_own_for_both_outputs_do_not_keep_lengths(mode):
    model, _ = turned(mode)
    x = toy.inputs(5, 24, dtype=torch.float64)
    with ll.disabled(model):
        y = model(x)
    assert error(model(x).norm(dim=-1) / y.norm(dim=-1), torch.ones(5)) > 0.01


def test_minus_one_inverts_one_under_turns_alone():
    model, adapter = turned()
    x = toy.inputs(5, 24, dtype=torch.float64)
    with ll.disabled(model):
        y = model(x)
    with ll.scale(model, -1.0):
        back = model(x)
    assert error(back, y) > 0.1
    assert error(back @ rotation(adapter, 1.0).T, y) < T64


def test_angles_of_two_adapters_add_and_stretches_multiply():
    x = toy.inputs(5, 24, dtype=torch.float64)
    model, first = turned(stretched=True)
    handle = toy.perturb(ll.attach(model, ll.RoAdConfig(group_size=8, dtype=torch.float64), name="second"), 1.0, seed=9)
    second = handle.layers["o_proj"]
    joint, adapter = turned(stretched=True)
    with torch.no_grad():
        adapter.theta.copy_(first.theta + second.theta)
        adapter.a.copy_((1 + first.a) * (1 + second.a) - 1)
    assert error(model(x), joint(x)) < T64


def test_coefficients_of_turns_add():
    x = toy.inputs(5, 24, dtype=torch.float64)
    model, adapter = turned()
    with ll.scale(model, 0.8):
        whole = model(x)
    with ll.scale(model, 0.5):
        part = model(x)
    assert error(part @ rotation(adapter, 0.3).T, whole) < T64


@pytest.mark.parametrize(("small", "large"), [("road_1", "road_2"), ("road_2", "road_4")])
def test_a_larger_mode_with_tied_numbers_is_the_smaller_one(small, large):
    x = toy.inputs(5, 24, dtype=torch.float64)
    model, few = turned(small, stretched=True)
    wide, many = turned(large, stretched=True)
    assert error(wide(x), model(x)) > 0.1
    with torch.no_grad():
        for name in ("theta", "a"):
            getattr(many, name).copy_(torch.cat([getattr(few, name)] * 2, dim=1))
    assert error(wide(x), model(x)) < T64


def test_bias_is_turned_with_the_output():
    model, adapter = turned(stretched=True)
    with torch.no_grad():
        model.o_proj.weight.zero_()
    want = rotation(adapter, 1.0) @ model.o_proj.bias
    assert error(model(toy.inputs(5, 24, dtype=torch.float64)), want.expand(5, 32)) < T64


@pytest.mark.parametrize("mode", MODES)
def test_any_number_of_coefficients_per_token_and_their_gradient(mode):
    model, adapter = turned(mode, stretched=True)
    x = toy.inputs(5, 7, 24, dtype=torch.float64)
    coeff = torch.linspace(-1, 2, 35, dtype=torch.float64).reshape(5, 7).requires_grad_()
    y = model.o_proj.weight @ x[..., None] + model.o_proj.bias[:, None]
    want = torch.stack([torch.stack([rotation(adapter, c) for c in row]) for row in coeff]) @ y
    with ll.scale(model, coeff):
        got = model(x)
    assert error(got, want[..., 0]) < T64
    ours, theirs = (torch.autograd.grad(out.square().sum(), coeff)[0] for out in (got, want))
    assert error(ours, theirs) < T64


def test_small_stretch_survives_a_low_precision_adapter():
    model, adapter = adapted(ll.RoAdConfig(), dtype=torch.float32, size=0)
    x = toy.inputs(5, 24)
    y = model(x)
    adapter.to(torch.bfloat16)
    with torch.no_grad():
        adapter.a.fill_(2.0**-10)  # 1 + 2^-10 is 1 in bfloat16
    assert error(model(x), (1 + 2.0**-10) * y) < 1e-6


def partners(cfg, width):
    """{output: the one that it is turned with}, both read off the weight change of a layer whose weight is the identity."""
    model = toy.one(width, width, dtype=torch.float64)
    toy.perturb(ll.attach(model, dataclasses.replace(cfg, dtype=torch.float64)), 1.0)
    model.o_proj.weight.data = torch.eye(width, dtype=torch.float64)
    reached = ll.delta_weight(model, "o_proj").abs().fill_diagonal_(0) > 1e-6
    assert (reached.sum(1) == 1).all()
    return dict(enumerate(reached.int().argmax(1).tolist()))


@pytest.mark.parametrize("mode", MODES)
def test_groups_of_two_are_the_papers_pairs(mode):
    """Equations 2 to 4: outputs 2i - 1 and 2i, counted from 1."""
    assert partners(ll.RoAdConfig(mode=mode, group_size=2), 64) == {j: j + 1 - 2 * (j % 2) for j in range(64)}


def test_default_pairs_are_those_of_peft_and_not_of_the_paper():
    ours = partners(ll.RoAdConfig(), 128)
    assert ours == {j: j + 32 if j % 64 < 32 else j - 32 for j in range(128)}
    model = torch.nn.Sequential(torch.nn.Linear(128, 128, bias=False))
    torch.nn.init.eye_(model[0].weight)
    peft = pytest.importorskip("peft")
    adapted_by_peft = peft.get_peft_model(model, peft.RoadConfig(target_modules=["0"], init_weights=False))
    W = adapted_by_peft.merge_and_unload()[0].weight
    assert torch.equal(W.detach().abs().fill_diagonal_(0).argmax(1), torch.tensor([ours[j] for j in range(128)]))


def test_recommended_rate_and_defaults():
    cfg = ll.RoAdConfig()
    assert (cfg.mode, cfg.group_size, cfg.lr) == ("road_1", None, 1e-3)


@pytest.mark.parametrize(("width", "size"), [(2, 2), (24, 24), (96, 48), (130, 26), (1024, 64), (3584, 64)])
def test_default_group_is_the_largest_even_divisor_up_to_64(width, size):
    shape = ll.get("road").param_specs(24, width, ll.RoAdConfig())["theta"].shape
    assert shape == (width // size, 1, size // 2)


def test_group_size_decides_which_outputs_are_paired():
    x = toy.inputs(5, 24, dtype=torch.float64)
    outputs = []
    for group_size in (8, 16):
        model, adapter = adapted(ll.RoAdConfig(group_size=group_size), size=0)
        with torch.no_grad():
            adapter.theta.fill_(0.5)
        outputs.append(model(x))
    assert error(*outputs) > 0.1


@pytest.mark.parametrize("group_size", [8, 32])
@pytest.mark.parametrize("mode", MODES)
def test_parity_with_peft(mode, group_size):
    peft = pytest.importorskip("peft")
    config = peft.RoadConfig(variant=mode, group_size=group_size, target_modules=["o_proj"], init_weights=False)

    def fill(ours, theirs):
        ours.theta.copy_(theirs.road_theta["default"].reshape(ours.theta.shape))
        ours.a.copy_(theirs.road_alpha["default"].reshape(ours.a.shape) - 1)

    def pairs(ours, theirs):
        return [
            (ours.theta.grad.flatten(), theirs.road_theta["default"].grad),
            (ours.a.grad.flatten(), theirs.road_alpha["default"].grad),
        ]

    check_parity(ll.RoAdConfig(mode=mode, group_size=group_size), config, pairs, fill)


def test_default_of_peft_is_refused_by_a_width_that_ours_fits():
    peft = pytest.importorskip("peft")
    with pytest.raises(ValueError, match="divisible by group_size"):
        peft_layer(peft.RoadConfig(target_modules=["o_proj"]))
    model, adapter = adapted(ll.RoAdConfig(), dtype=torch.float32)
    assert adapter.theta.shape == (1, 1, 16)
    assert (
        error(ll.delta_weight(model, "o_proj") + model.o_proj.weight, dense(adapter, model.o_proj.weight, None, 1.0)[0]) < T32
    )
