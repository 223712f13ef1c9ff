"""LoRA-XS against the authors' construction, in dense float64; the rest is in tests/families/test_cores.py."""

import pytest
import torch

import lora_lite as ll
from lora_lite.testing import toy
from lora_lite.testing.checks import error
from lora_lite.testing.formula import T64, adapted, live_gradients


def config(**fields):
    return ll.LoRAXSConfig(**{"r": 8, **fields})


def authors(W, r):
    """(lora_A, lora_B): W^T = V S U^T, the encoder V S and the decoder U^T, both transposed as nn.Linear stores them."""
    left, S, right = torch.linalg.svd(W.T, full_matrices=False)
    return (left[:, :r] * S[:r]).T, right[:r].T


@pytest.mark.parametrize(("d_in", "d_out"), [(24, 32), (32, 24)])
def test_output_and_gradient_are_those_of_the_authors_construction(d_in, d_out):
    """Their layer: base(x) + lora_B(latent(lora_A(x))) * alpha / r, the latent map an r x r nn.Linear without bias."""
    model, adapter = adapted(config(alpha=12.0), d_in, d_out)
    W = model.o_proj.weight.detach()
    A, B = authors(W, 8)
    signs = (adapter.U * B).sum(0).sign()
    assert error(adapter.U, B * signs) < 1e-9
    latent = torch.nn.Linear(8, 8, bias=False, dtype=torch.float64)
    with torch.no_grad():
        latent.weight.copy_(signs[:, None] * adapter.R * signs)
    x, probe = toy.inputs(5, d_in, dtype=torch.float64), toy.inputs(5, d_out, dtype=torch.float64, seed=4)
    want = x @ W.T + model.o_proj.bias + latent(x @ A.T) @ B.T * 12.0 / 8
    assert error(model(x), want) < T64
    (model(x) * probe).sum().backward()
    (want * probe).sum().backward()
    assert error(adapter.R.grad, signs[:, None] * latent.weight.grad * signs) < T64 * 10
    change = ll.delta_weight(model, "o_proj").double()
    assert error(change, B @ latent.weight @ A * 12.0 / 8) < 1e-6


def test_the_frozen_input_factor_is_read_off_the_output():
    model, adapter = adapted(config(), size=0)
    x = toy.inputs(5, 24, dtype=torch.float64)
    A, B = authors(model.o_proj.weight.detach(), 8)
    h = (model(x) - model.o_proj.bias) @ adapter.U
    assert error(h * (adapter.U * B).sum(0).sign(), x @ A.T) < T64


def test_scale_is_one_unless_alpha_is_given():
    model, _ = adapted(config())
    x = toy.inputs(5, 24, dtype=torch.float64)
    with ll.disabled(model):
        base = model(x)
    unit = model(x) - base
    for fields, scale in (({"alpha": 8.0}, 1.0), ({"alpha": 4.0}, 0.5), ({"alpha": 4.0, "rslora": True}, 2**0.5)):
        other, _ = adapted(config(**fields))
        assert error(other(x) - base, scale * unit) < T64
    assert config().s == ll.LoRAXSConfig().s == 1.0


def test_starts_at_zero_with_a_gradient_from_the_first_step():
    model, adapter = adapted(config(), size=0)
    assert not adapter.R.any()
    x, probe = toy.inputs(5, 24, dtype=torch.float64), toy.inputs(5, 32, dtype=torch.float64, seed=4)
    with ll.disabled(model):
        h = (model(x) - model.o_proj.bias) @ adapter.U
    (model(x) * probe).sum().backward()
    assert error(adapter.R.grad, (probe @ adapter.U).T @ h) < T64
    assert live_gradients(config()) == [{"R"}, {"R"}]
