"""LoRA-XS against the authors' construction from the SVD of the transposed weight, in dense float64."""

import pytest
import torch

import lora_lite as ll
from lora_lite.testing import toy
from lora_lite.testing.checks import error
from lora_lite.testing.formula import T64, adapted, check_dense, live_gradients
from tests.families.test_subspace import BASES


def config(**fields):
    return ll.LoRAXSConfig(**{"r": 8, **fields})


def dense(a, W, b, c):
    """W + c s U R U^T W, and the same of the bias where it takes part."""
    scale = 1.0 if a.cfg.alpha is None else a.cfg.alpha / (a.cfg.r**0.5 if a.cfg.rslora else a.cfg.r)
    change = c * scale * a.U @ a.R @ a.U.T
    return W + change @ W, b + change @ b if a.cfg.include_bias and b is not None else b


def authors(W, r):
    """(lora_A, lora_B): W^T = V S U^T, the encoder V S and the decoder U^T, both transposed as nn.Linear stores them."""
    left, S, right = torch.linalg.svd(W.T, full_matrices=False)
    return (left[:, :r] * S[:r]).T, right[:r].T


@pytest.mark.parametrize("basis", BASES)
def test_output_and_gradients_equal_the_dense_form(basis):
    check_dense(config(basis=basis), dense)


@pytest.mark.parametrize("fields", [{"alpha": 4.0}, {"alpha": 4.0, "rslora": True}, {"include_bias": True}], ids=str)
def test_output_and_gradients_equal_the_dense_form_with_every_option(fields):
    check_dense(config(**fields), dense)


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


def test_the_latent_map_is_not_symmetric():
    model, adapter = adapted(config())
    x = toy.inputs(5, 24, dtype=torch.float64)
    before = model(x)
    with torch.no_grad():
        adapter.R.copy_(adapter.R.T.clone())
    assert error(model(x), before) > 1e-3


def test_the_frozen_input_factor_is_read_off_the_output():
    model, adapter = adapted(config(), size=0)
    x = toy.inputs(5, 24, dtype=torch.float64)
    A, B = authors(model.o_proj.weight.detach(), 8)
    h = (model(x) - model.o_proj.bias) @ adapter.U
    assert error(h * (adapter.U * B).sum(0).sign(), x @ A.T) < T64


@pytest.mark.parametrize("basis", BASES)
def test_the_change_stays_in_the_outputs_and_inputs_of_the_chosen_directions(basis):
    model, adapter = adapted(config(basis=basis), size=1.0)
    W, change = model.o_proj.weight.detach(), ll.delta_weight(model, "o_proj").double()
    rows = torch.linalg.qr(W.T @ adapter.U).Q
    assert error(adapter.U @ (adapter.U.T @ change), change) < 1e-6
    assert error(change @ rows @ rows.T, change) < 1e-6
    values = torch.linalg.svdvals(change)
    assert values[7] > 1e-3
    assert values[8:].max() < 1e-6 * values[0]


def test_signs_of_singular_vectors_are_absorbed_by_both_sides_of_the_latent_map():
    model, adapter = adapted(config())
    x = toy.inputs(5, 24, dtype=torch.float64)
    before = model(x)
    D = torch.tensor([1.0, -1.0, -1.0, 1.0] * 2, dtype=torch.float64)
    adapter.U.mul_(D)
    assert error(model(x), before) > 1e-3
    with torch.no_grad():
        adapter.R.copy_(D[:, None] * adapter.R * D)
    assert error(model(x), before) < T64


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


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"alpha": 0.0}, "alpha is a number above 0"),
        ({"damp": 0.1}, "damp is 0.0 with the other options"),
        ({"basis": "eigen"}, "basis: one of 'svd', 'corda'"),
        ({"r": 25}, "r=25 is larger than the layer allows"),
    ],
)
def test_bad_options_are_refused(fields, message):
    with pytest.raises(ll.LoraLiteError, match=message):
        adapted(config(**fields))
