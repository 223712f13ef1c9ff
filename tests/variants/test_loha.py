"""LoHa against the elementwise product in dense float64 and against PEFT."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import lora_lite as ll
from lora_lite.testing import checks, toy
from lora_lite.testing.checks import error
from lora_lite.testing.formula import T64, adapted, check_dense
from tests.oracles.layer import check_agree, check_scale

FACTORED, DENSE = 3, 4  # ranks on the two sides of r^2 (i + o) = i o for the layer of 24 x 32


def change(a):
    """The paper's weight change, entry by entry of both products at once."""
    return a.cfg.s * torch.einsum("op,pi,oq,qi->oi", a.w1_a, a.w1_b, a.w2_a, a.w2_b)


def dense(a, W, b, c):
    return W + c * change(a), b


@pytest.mark.parametrize("check", checks("loha", ll.LoHaConfig(r=FACTORED, rslora=True)), ids=str)
def test_factored_form_is_lawful(check):
    check()


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("r", [1, FACTORED, DENSE, 8])
def test_output_and_gradients_equal_the_dense_form(r, rslora):
    check_dense(ll.LoHaConfig(r=r, rslora=rslora), dense, size=1.0)


@pytest.mark.parametrize("r", [FACTORED, DENSE])
def test_rank_decides_which_form_is_computed(r, monkeypatch):
    model, _ = adapted(ll.LoHaConfig(r=r))

    def refused(*_):
        raise ArithmeticError

    monkeypatch.setattr("lora_lite.variants.loha.chain", refused)
    x = toy.inputs(5, 24, dtype=torch.float64)
    if r == DENSE:
        assert model(x).isfinite().all()
    else:
        with pytest.raises(ArithmeticError):
            model(x)


def test_both_forms_agree_in_values_and_gradients():
    """A rank more, filled with zeros, is the same change on the other side of the threshold."""
    small, a = adapted(ll.LoHaConfig(r=FACTORED, alpha=None), size=1.0)
    large, b = adapted(ll.LoHaConfig(r=DENSE, alpha=None), size=0)
    with torch.no_grad():
        for name, value in a.named_parameters():
            target = getattr(b, name).zero_()
            target[tuple(slice(n) for n in value.shape)] = value

    def gradients():
        return [(p.grad, getattr(b, name).grad[tuple(slice(n) for n in p.shape)]) for name, p in a.named_parameters()]

    check_agree(small, large, toy.inputs(5, 24, dtype=torch.float64), gradients, T64)


class Largest(TorchDispatchMode):
    """Numbers in the largest tensor that any operation gives."""

    numbers = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(tensor, torch.Tensor):
                self.numbers = max(self.numbers, tensor.numel())
        return result


@pytest.mark.parametrize("r", [2, 7])
def test_matrix_of_the_size_of_the_weight_is_formed_only_at_high_rank(r):
    _, adapter = adapted(ll.LoHaConfig(r=r), d_in=64, d_out=96, dtype=torch.float32)
    x, y = toy.inputs(5, 64), toy.inputs(5, 96)
    with Largest() as largest:
        adapter(x, y, None).sum().backward()
    assert (largest.numbers >= 64 * 96) == (r == 7)


def test_rank_of_the_change_is_the_square_of_r():
    for r in (2, 3, 4):
        model, _ = adapted(ll.LoHaConfig(r=r), size=1.0)
        values = torch.linalg.svdvals(ll.delta_weight(model, "o_proj").double())
        assert values[r * r - 1] > 1e-3 * values[0]
        assert values[r * r] < 1e-6 * values[0]


def test_scale_is_alpha_over_r_or_over_its_root():
    assert ll.LoHaConfig().s == 2.0
    for r in (FACTORED, DENSE):
        check_scale(ll.LoHaConfig(r=r))


def test_start_values():
    _, adapter = adapted(ll.LoHaConfig(r=16), d_in=400, d_out=300, size=0)
    for name, bound in (("w1_a", 1 / 4), ("w1_b", 1 / 20), ("w2_a", 1 / 4)):
        assert 0.95 * bound < getattr(adapter, name).abs().max() <= bound, name
    assert not adapter.w2_b.any()
    assert error(adapter.w1_a, adapter.w2_a) > 0.1


def test_decay_acts_on_every_tensor():
    assert all(spec.decay for spec in adapted(ll.LoHaConfig(r=2))[1].specs().values())


def test_trained_numbers_of_a_large_layer():
    shapes = [spec.shape for spec in ll.get("loha").param_specs(3584, 1024, ll.LoHaConfig()).values()]
    assert sum(a * b for a, b in shapes) == 73_728
