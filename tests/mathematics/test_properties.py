"""Promises at parameters, shapes and coefficients that hypothesis chooses, far from any start."""

import dataclasses

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import lora_lite as ll
from lora_lite.mathematics import maps, rotations, spectrum
from lora_lite.testing import toy
from lora_lite.testing.checks import error

quick = settings(max_examples=100, deadline=None, derandomize=True)
seeds = st.integers(0, 2**31 - 1)
scales = st.sampled_from([1e-6, 1e-3, 0.1, 1.0, 10.0, 1e3])


def random(*shape: int, seed: int, scale: float = 1.0) -> torch.Tensor:
    return scale * toy.inputs(*shape, dtype=torch.float64, seed=seed)


@quick
@given(seed=seeds, scale=scales, n=st.integers(1, 5), b=st.integers(2, 9), angle=st.floats(0.05, 3.0))
def test_bounded_cayley_rotations_are_orthogonal_within_the_angle(seed, scale, n, b, angle):
    R = torch.eye(b) + rotations.cayley_shift(
        rotations.bounded(rotations.skew(random(n, b * (b - 1) // 2, seed=seed, scale=scale), b), angle)
    )
    assert error(R @ R.mT, torch.eye(b).expand(n, b, b)) < 1e-9
    assert torch.linalg.eigvals(R).angle().abs().max() <= angle * (1 + 1e-9)


@quick
@given(seed=seeds, scale=scales, pairs=st.integers(1, 5), extra=st.integers(0, 9), split=scales)
def test_reflections_equal_their_explicit_product(seed, scale, pairs, extra, split):
    d = 2 * pairs + extra + 1
    V = random(2 * pairs, d, seed=seed, scale=scale)
    V[1::2] = V[0::2] + split * random(pairs, d, seed=seed + 1, scale=scale)
    P, M = rotations.reflections(V)
    Q = torch.eye(d, dtype=torch.float64)
    for v in V:
        Q = Q @ (torch.eye(d) - 2 * torch.outer(v, v) / (v @ v))
    assert error(torch.eye(d) - P.T @ M @ P, Q) < 1e-9


@quick
@given(seed=seeds, o=st.integers(2, 20), i=st.integers(2, 20), data=st.data())
def test_left_svd_is_the_best_subspace_of_its_size(seed, o, i, data):
    r = data.draw(st.integers(1, min(o, i)))
    W = random(o, i, seed=seed)
    U, S = spectrum.left_svd(W, r)
    values = torch.linalg.svdvals(W)
    assert error(U.T @ U, torch.eye(r)) < 1e-9
    assert error(S, values[:r]) < 1e-7
    assert abs((W - U @ U.T @ W).square().sum() - values[r:].square().sum()) < 1e-7


@quick
@given(seed=seeds, scale=scales, coeff=st.floats(0, 1), k=st.integers(1, 4))
def test_ablation_never_amplifies_for_coefficients_in_the_unit_interval(seed, scale, coeff, k):
    model = toy.one(12, 10, dtype=torch.float64)
    W = model.o_proj.weight.detach()
    handle = ll.attach(model, ll.config("antipasto_ablate", r=6, k=k, dtype=torch.float64))
    toy.perturb(handle, scale, seed=seed % 1000)
    with ll.scale(model, coeff):
        map_ = (W + ll.delta_weight(model, "o_proj").double()) @ torch.linalg.pinv(W)
    assert torch.linalg.matrix_norm(map_, ord=2) <= 1 + 1e-6


@quick
@given(seed=seeds, scale=scales, coeff=st.floats(-2, 2), name=st.sampled_from(ll.names()))
def test_coeff_zero_is_the_base_and_merge_is_the_layer_at_any_parameters(seed, scale, coeff, name):
    cls = ll.get(name)
    cfg = dataclasses.replace(toy.small(cls), dtype=torch.float64, roles=None)
    model = toy.one(24, 32, dtype=torch.float64)
    x = toy.inputs(5, 24, dtype=torch.float64, seed=seed % 1000)
    base = model(x)
    handle = toy.attached(model, cls, cfg)
    toy.perturb(handle, scale, seed=seed % 1000)
    for adapter in handle.layers.values():
        adapter.coeff = coeff
    wanted = model(x)
    ll.merge(model)
    assert error(model(x), wanted) < 1e-9
    ll.unmerge(model)
    with ll.disabled(model):
        assert torch.equal(model(x), base)
    handle.detach()
    assert torch.equal(model(x), base)


@quick
@given(
    r=st.integers(1, 64), alpha=st.none() | st.floats(0.1, 100), lr=st.floats(1e-8, 1), seed=seeds, coeff=st.floats(-3, 3),
    targets=st.just("all-linear") | st.lists(st.from_regex(r"[abc_*?]+(\.[abc0-9_]+)*", fullmatch=True), min_size=1),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float64]),
    layers=st.none() | st.lists(st.integers(0, 99), min_size=1),
)  # fmt: skip
def test_configs_survive_json(**fields):
    cfg = ll.config("lora", **fields)
    assert ll.LoRAConfig.from_json(cfg.to_json()) == cfg


@quick
@given(p=st.floats(-1e3, 1e3), g=st.floats(-1e3, 1e3))
def test_box_holds_the_value_and_cuts_the_gradient_only_outwards(p, g):
    x = torch.tensor([p], dtype=torch.float64, requires_grad=True)
    y = maps.box(x, 0.0, 1.0)
    y.backward(torch.tensor([g], dtype=torch.float64))
    assert 0 <= y.item() <= 1
    outward = (p <= 0 and g > 0) or (p >= 1 and g < 0)
    assert x.grad.item() == (0.0 if outward else g)
