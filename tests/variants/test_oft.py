"""OFT against explicit rotation matrices in float64 and against PEFT."""

import pytest
import torch

import lora_lite as ll
from lora_lite.testing import toy
from lora_lite.testing.checks import error
from lora_lite.testing.formula import T64, adapted, check_dense
from tests.oracles.layer import input_map, peft_layer


def rotation(q, c, d_in):
    """R(c) (i, i) from the definition, entry by entry and with an explicit inverse."""
    b = d_in // len(q)
    blocks = []
    for numbers in q:
        X, k = torch.zeros(b, b, dtype=q.dtype), 0
        for row in range(b):
            for column in range(row + 1, b):
                unit = torch.zeros(b, b, dtype=q.dtype)
                unit[row, column], unit[column, row] = 1, -1
                X, k = X + numbers[k] * unit, k + 1
        eye = torch.eye(b, dtype=q.dtype)
        blocks.append((eye + c * X) @ torch.inverse(eye - c * X))
    return torch.block_diag(*blocks)


def dense(a, W, b, c):
    return W @ rotation(a.q, c, a.d_in).T, b


@pytest.mark.parametrize("size", [0.1, 1.0])
@pytest.mark.parametrize("block_size", [2, 3, 8, 24])
def test_output_and_gradients_equal_the_dense_form(block_size, size):
    check_dense(ll.OFTConfig(block_size=block_size), dense, size=size)


@pytest.mark.parametrize(("d_in", "block"), [(24, 24), (40, 20), (64, 32), (896, 32)])
def test_default_block_is_the_largest_divisor_up_to_32(d_in, block):
    specs = ll.get("oft").param_specs(d_in, 8, ll.OFTConfig())
    assert specs["q"].shape == (d_in // block, block * (block - 1) // 2)


def test_minus_one_inverts_one():
    _, adapter = adapted(ll.OFTConfig(block_size=8), size=1.0)
    assert error(input_map(adapter, -1.0) @ input_map(adapter), torch.eye(24)) < T64
    assert error(input_map(adapter, -1.0), input_map(adapter).T) < T64


def test_coefficient_scales_the_tangent_of_half_the_angle():
    _, adapter = adapted(ll.OFTConfig(block_size=2), size=1.0)
    for coeff in (0.5, 2.0, -0.7):
        R = input_map(adapter, coeff)
        for block, q in enumerate(adapter.q[:, 0]):
            part = R[2 * block : 2 * block + 2, 2 * block : 2 * block + 2]
            angle = 2 * torch.atan(coeff * q)
            assert error(part, torch.stack([angle.cos(), angle.sin(), -angle.sin(), angle.cos()]).reshape(2, 2)) < T64


def test_two_is_not_one_applied_twice():
    _, adapter = adapted(ll.OFTConfig(block_size=8), size=1.0)
    assert error(input_map(adapter, 2.0), input_map(adapter) @ input_map(adapter)) > 0.1


def test_blocks_do_not_mix():
    _, adapter = adapted(ll.OFTConfig(block_size=8), size=1.0)
    x = toy.inputs(5, 24, dtype=torch.float64)
    x[:, 8:16] = 0
    turned = adapter.forward_input(x)
    assert not turned[:, 8:16].any()
    assert error(turned[:, :8], x[:, :8]) > 0.1
    assert error(turned[:, 16:], x[:, 16:]) > 0.1


def test_start_and_decay():
    _, adapter = adapted(ll.OFTConfig(), size=0)
    assert not adapter.q.any()
    assert adapter.specs()["q"].decay


def test_a_coefficient_to_be_trained_is_refused():
    model, _ = adapted(ll.OFTConfig(block_size=8), dtype=torch.float32)
    with ll.scale(model, torch.ones(3, requires_grad=True)), pytest.raises(ll.LoraLiteError, match="requires a gradient"):
        model(toy.inputs(3, 24))


def test_width_without_blocks_is_refused():
    with pytest.raises(ll.LoraLiteError, match=r"(?s)o_proj.*a divisor of 37 from 2 to 32, and there is none"):
        adapted(ll.OFTConfig(), d_in=37)
    assert adapted(ll.OFTConfig(block_size=37), d_in=37)[1].q.shape == (1, 37 * 18)


def test_series_of_peft_has_our_sign_and_agrees_for_small_rotations_only():
    peft = pytest.importorskip("peft")
    config = peft.OFTConfig(r=0, oft_block_size=8, target_modules=["o_proj"], init_weights=False, use_cayley_neumann=True)
    theirs = peft_layer(config)
    model, ours = adapted(ll.OFTConfig(block_size=8), dtype=torch.float32, size=0)
    x = toy.inputs(5, 24)
    errors = []
    for size in (0.01, 0.3):
        with torch.no_grad():
            theirs.oft_R["default"].weight.copy_(size * toy.inputs(3, 28))
            ours.q.copy_(theirs.oft_R["default"].weight)
        errors.append(error(model(x), theirs(x)))
    assert errors[0] < 1e-4
    assert errors[1] > 0.05
    R = theirs.oft_R["default"].get_weight()
    assert error(R @ R.T, torch.eye(24)) > 0.05
