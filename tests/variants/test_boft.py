"""BOFT against explicit permutations and rotation matrices in float64 and against PEFT."""

import functools

import pytest
import torch

import lora_lite as ll
from lora_lite.testing import toy
from lora_lite.testing.checks import error
from lora_lite.testing.formula import T64, adapted, check_dense
from tests.oracles.layer import check_parity, input_map


def permutation(n, b, f):
    """p_f: within groups of b 2^f channels the half-blocks of even number first, then the odd ones."""
    if f == 0:
        return list(range(n))
    half, order = b // 2, []
    for group in range(0, n, b * 2**f):
        halves = [list(range(start, start + half)) for start in range(group, group + b * 2**f, half)]
        order += [channel for half_block in halves[0::2] + halves[1::2] for channel in half_block]
    return order


def factor(q, b, f, c):
    """B_f (i, i) from the definition: permutation matrix, blocks with an explicit inverse, its transpose."""
    blocks = []
    for numbers in q[f]:
        upper = torch.zeros(b, b, dtype=q.dtype)
        upper[torch.ones(b, b).triu(1).bool()] = numbers
        X, eye = c * (upper - upper.T), torch.eye(b, dtype=q.dtype)
        blocks.append((eye + X) @ torch.inverse(eye - X))
    n = b * q.shape[1]
    P = torch.eye(n, dtype=q.dtype)[permutation(n, b, f)]
    return P @ torch.block_diag(*blocks) @ P.T


def rotation(a, c):
    return functools.reduce(torch.matmul, [factor(a.q, a.cfg.block_size, f, c) for f in reversed(range(len(a.q)))])


def dense(a, W, b, c):
    scale = 1 + c * a.g[:, None] if a.cfg.scale else 1
    return scale * (W @ rotation(a, c).T), b


@pytest.mark.parametrize("scale", [False, True])
@pytest.mark.parametrize("size", [0.1, 1.0])
@pytest.mark.parametrize(("b", "m", "d_in"), [(4, 1, 24), (3, 1, 24), (4, 2, 24), (2, 3, 24), (24, 1, 24), (4, 4, 64)])
def test_output_and_gradients_equal_the_dense_form(b, m, d_in, size, scale):
    check_dense(ll.BOFTConfig(block_size=b, n_factors=m, scale=scale), dense, size=size, d_in=d_in)


def test_one_factor_without_scale_is_oft():
    model, adapter = adapted(ll.BOFTConfig(block_size=8), size=1.0)
    other, rotated = adapted(ll.OFTConfig(block_size=8), size=0)
    with torch.no_grad():
        rotated.q.copy_(adapter.q[0])
    x = toy.inputs(5, 24, dtype=torch.float64)
    assert torch.equal(model(x), other(x))


@pytest.mark.parametrize("m", [1, 2, 3])
def test_every_factor_doubles_the_channels_that_mix(m):
    _, adapter = adapted(ll.BOFTConfig(block_size=8, n_factors=m), d_in=96, size=1.0)
    R = input_map(adapter)
    assert {int(n) for n in (R.abs() > 1e-12).sum(1)} == {int(n) for n in (R.abs() > 1e-12).sum(0)} == {8 * 2 ** (m - 1)}


def test_enough_factors_mix_all_channels_with_fewer_numbers_than_one_block():
    """log2(2 i / b) factors, the paper's butterfly matrix."""
    _, adapter = adapted(ll.BOFTConfig(block_size=4, n_factors=6), d_in=128, size=1.0)
    assert (input_map(adapter).abs() > 1e-12).all()
    assert adapter.q.numel() == 6 * 128 * 3 // 2 < 128 * 127 // 2


def test_factors_meet_the_input_from_the_widest_wiring_to_the_narrowest():
    _, adapter = adapted(ll.BOFTConfig(n_factors=2), size=1.0)
    wide, narrow = factor(adapter.q, 4, 1, 1.0), factor(adapter.q, 4, 0, 1.0)
    assert error(input_map(adapter), wide @ narrow) < T64
    assert error(input_map(adapter), narrow @ wide) > 0.1


def test_scale_multiplies_rows_and_spares_the_bias():
    model, adapter = adapted(ll.BOFTConfig(scale=True), size=0)
    with torch.no_grad():
        adapter.g.copy_(toy.inputs(32, seed=7))
    x, layer = toy.inputs(5, 24, dtype=torch.float64), model.o_proj
    assert error(model(x), (x @ layer.weight.T) * (1 + adapter.g) + layer.bias) < T64
    assert error(model(x), x @ layer.weight.T + layer.bias) > 0.1
    assert error(model(torch.zeros_like(x)), layer.bias.expand(5, -1)) < T64


def test_output_side_is_idle_without_scale():
    _, adapter = adapted(ll.BOFTConfig())
    y = toy.inputs(5, 32)
    assert adapter(toy.inputs(5, 24), y, None) is y
    assert [name for name, _ in adapter.named_parameters()] == ["q"]


def test_minus_one_inverts_one_for_a_single_factor_only():
    for m in (1, 2):
        _, adapter = adapted(ll.BOFTConfig(n_factors=m), size=1.0)
        both = input_map(adapter, -1.0) @ input_map(adapter)
        assert (error(both, torch.eye(24)) < T64) == (m == 1)


def test_coefficients_per_sample_turn_and_scale():
    model, _ = adapted(ll.BOFTConfig(n_factors=2, scale=True), size=1.0)
    x, values = toy.inputs(4, 3, 24, dtype=torch.float64), [0.0, 0.5, -0.7, 2.0]
    separate = []
    for sample, value in zip(x, values):
        with ll.scale(model, value):
            separate.append(model(sample))
    with ll.scale(model, torch.tensor(values, dtype=torch.float64)):
        assert error(model(x), torch.stack(separate)) < T64


def test_every_factor_has_a_gradient_from_the_first_step_on():
    model, adapter = adapted(ll.BOFTConfig(n_factors=2), size=0)
    (model(toy.inputs(5, 24, dtype=torch.float64)) * toy.inputs(5, 32, seed=4)).sum().backward()
    assert adapter.q.grad.flatten(1).any(1).all()


def test_start_and_decay():
    _, adapter = adapted(ll.BOFTConfig(scale=True), size=0)
    assert not adapter.q.any()
    assert not adapter.g.any()
    assert all(spec.decay for spec in adapter.specs().values())


@pytest.mark.parametrize(("b", "m", "most"), [(4, 3, 2), (8, 2, 1), (2, 4, 3)])
def test_more_factors_than_the_width_has_room_for_are_refused(b, m, most):
    with pytest.raises(ll.LoraLiteError, match=rf"(?s)o_proj.*n_factors={m}.*at most {most}:.*n_factors={most}"):
        adapted(ll.BOFTConfig(block_size=b, n_factors=m))
    assert len(adapted(ll.BOFTConfig(block_size=b, n_factors=most))[1].q) == most


class Extension:
    """Stands in for PEFT's CUDA extension, without which its layer takes one factor only: blocks to a matrix and back."""

    @staticmethod
    def forward(blocks):
        return [torch.stack([torch.block_diag(*factor) for factor in blocks])]

    @staticmethod
    def backward(gradient, blocks):
        n, size = blocks.shape[1], blocks.shape[2]
        whole = gradient.reshape(len(blocks), n, size, n, size)
        return [whole[:, range(n), :, range(n)].transpose(0, 1).contiguous()]


@pytest.mark.parametrize("scale", [False, True])
@pytest.mark.parametrize(("b", "m", "d_in"), [(4, 1, 24), (8, 1, 24), (4, 2, 24), (2, 3, 24), (8, 3, 64)])
def test_parity_with_peft(b, m, d_in, scale, monkeypatch):
    peft = pytest.importorskip("peft")
    monkeypatch.setattr("peft.tuners.boft.layer.get_fbd_cuda", lambda: Extension if m > 1 else None)
    config = peft.BOFTConfig(boft_block_size=b, boft_n_butterfly_factor=m, target_modules=["o_proj"], init_weights=False)
    row, column = torch.triu_indices(b, b, 1)

    def above(D):
        return D[..., row, column] - D[..., column, row]

    def fill(ours, theirs):
        ours.q.copy_(-above(theirs.boft_R["default"]) / 2)
        if scale:
            ours.g.copy_(theirs.boft_s["default"][:, 0] - 1)
        else:
            theirs.boft_s["default"].fill_(1)

    def pairs(ours, theirs):
        gradients = [(ours.q.grad, -above(theirs.boft_R["default"].grad))]
        return gradients + ([(ours.g.grad, theirs.boft_s["default"].grad[:, 0])] if scale else [])

    check_parity(ll.BOFTConfig(block_size=b, n_factors=m, scale=scale), config, pairs, fill, d_in=d_in)


@pytest.mark.parametrize("n", [64, 96])
@pytest.mark.parametrize("b", [4, 8])
def test_permutations_are_those_of_peft(n, b):
    layer = pytest.importorskip("peft.tuners.boft.layer")
    for f in range(3):
        theirs = layer.BOFTLayer.block_butterfly_perm(None, n, n // b // 2**f, b // 2, 2)
        assert theirs.tolist() == permutation(n, b, f)
