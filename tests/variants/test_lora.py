"""LoRA against the paper's formula in dense float64 and against PEFT."""

import pytest
import torch

import lora_lite as ll
from lora_lite.testing import checks
from lora_lite.testing.checks import error
from lora_lite.testing.formula import adapted, check_dense
from tests.oracles.layer import check_ignores_bias, check_scale


def dense(a, W, b, c):
    if a.cfg.init == "orthogonal":
        return W + c * a.s * ((a.B0 + a.dB) @ (a.A0 + a.dA) - a.B0 @ a.A0), b
    return W + c * a.s * a.B @ a.A, b


@pytest.mark.parametrize("check", checks("lora", ll.LoRAConfig(r=4, init="orthogonal")), ids=str)
def test_orthogonal_start_is_lawful(check):
    check()


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("init", ["kaiming", "gaussian", "orthogonal"])
def test_output_and_gradients_equal_the_dense_form(init, rslora):
    check_dense(ll.LoRAConfig(r=4, alpha=8, init=init, rslora=rslora), dense)


def test_scale_is_alpha_over_r_or_over_its_root():
    assert ll.LoRAConfig(r=16, alpha=8).s == 0.5
    assert ll.LoRAConfig(r=16, alpha=8, rslora=True).s == 2.0
    check_scale(ll.LoRAConfig(r=16))


def test_change_does_not_depend_on_the_bias():
    check_ignores_bias(ll.LoRAConfig(r=4))


def test_output_is_linear_in_B():
    model, adapter = adapted(ll.LoRAConfig(r=4))
    once = ll.delta_weight(model, "o_proj")
    with torch.no_grad():
        adapter.B.mul_(2)
    assert error(ll.delta_weight(model, "o_proj"), 2 * once) < 1e-6


def test_start_values():
    _, kaiming = adapted(ll.LoRAConfig(r=8), d_in=400, size=0)
    assert 0.9 / 20 < kaiming.A.abs().max() <= 1 / 20
    assert not kaiming.B.any()
    _, gaussian = adapted(ll.LoRAConfig(r=8, init="gaussian"), d_in=400, size=0)
    assert abs(gaussian.A.std() * 8 - 1) < 0.1


def test_orthogonal_start_product_vanishes():
    _, adapter = adapted(ll.LoRAConfig(r=8, init="orthogonal"), dtype=torch.float32, size=0)
    assert adapter.A0.any()
    assert adapter.B0.any()
    assert (adapter.B0 @ adapter.A0).norm() < 1e-6


def test_orthogonal_start_needs_an_even_rank():
    with pytest.raises(ll.LoraLiteError, match=r"o_proj.*r=5 is odd"):
        adapted(ll.LoRAConfig(r=5, init="orthogonal"))
