"""IA3 on outputs against the paper's formula in dense float64 and against PEFT."""

import pytest
import torch

import lora_lite as ll
from lora_lite.testing import toy
from lora_lite.testing.checks import error
from lora_lite.testing.formula import T64, adapted, check_dense


def dense(a, W, b, c):
    gain = 1 + c * a.g
    return gain[:, None] * W, None if b is None else gain * b


def test_output_and_gradients_equal_the_dense_form():
    check_dense(ll.IA3Config(), dense)


def test_change_is_a_diagonal_gain_on_the_output():
    model, adapter = adapted(ll.IA3Config(), size=1.0)
    x = toy.inputs(5, 24, dtype=torch.float64)
    changed = model(x)
    with ll.disabled(model):
        base = model(x)
    assert error(changed, base * (1 + adapter.g)) < T64
    assert error(changed / base, (1 + adapter.g).expand(5, -1)) < 1e-9


def test_bias_is_scaled_like_its_row():
    model, adapter = adapted(ll.IA3Config())
    zero = torch.zeros(1, 24, dtype=torch.float64)
    assert error(model(zero)[0], (1 + adapter.g) * model.o_proj.bias) < T64
    assert error(model(zero)[0], model.o_proj.bias) > 0.01


def test_two_in_sequence_multiply():
    model, first = adapted(ll.IA3Config())
    second = toy.perturb(ll.attach(model, ll.IA3Config(dtype=torch.float64), name="second"), seed=7).layers["o_proj"]
    x = toy.inputs(5, 24, dtype=torch.float64)
    changed = model(x)
    with ll.disabled(model):
        assert error(changed, model(x) * (1 + first.g) * (1 + second.g)) < T64


def test_stored_deviation_keeps_steps_that_the_gain_itself_would_lose_in_bfloat16():
    model = toy.one(dtype=torch.float64)
    x = toy.inputs(5, 24, dtype=torch.float64)
    base = model(x)
    adapter = ll.attach(model, ll.IA3Config(dtype=torch.bfloat16)).layers["o_proj"]
    with torch.no_grad():
        adapter.g.fill_(2.0**-10)
    assert error(model(x) - base, base * 2.0**-10) < T64
    assert (1 + adapter.g == 1).all()


def test_float32_gains_reach_a_bfloat16_layer_with_one_rounding():
    model = toy.one(dtype=torch.bfloat16)
    x = toy.inputs(64, 24, dtype=torch.bfloat16)
    base = model(x)
    adapter = toy.perturb(ll.attach(model, ll.IA3Config())).layers["o_proj"]
    assert adapter.g.dtype is torch.float32
    assert torch.equal(model(x), (base.double() * (1 + adapter.g.double())).bfloat16())


def test_papers_recipe_of_two_adapters_trains_saves_and_loads(tmp_path):
    model, x = toy.toy(), toy.inputs(3, 5, 24)
    base = model(x).detach()
    ll.attach(model, ll.IA3Config(targets="q_proj"), name="attention")
    ll.attach(model, ll.IA3FFConfig(targets="down_proj"), name="feedforward")
    optimizer = torch.optim.AdamW(ll.param_groups(model))
    for _ in range(3):
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()
    assert [(row.path.split(".")[-1], bool(row.fired)) for row in ll.status(model).layers] == [
        ("q_proj", True),
        ("down_proj", True),
    ] * 2
    fresh = toy.toy()
    for name in ("attention", "feedforward"):
        ll.save(model, tmp_path / f"{name}.safetensors", name=name)
        ll.load(fresh, tmp_path / f"{name}.safetensors")
    assert torch.equal(fresh(x), model(x))
    assert error(model(x), base) > 1e-3
    with ll.disabled(model, "attention"), ll.disabled(model, "feedforward"):
        assert torch.equal(model(x), base)


def test_peft_does_not_get_its_weight_back_after_unmerge_and_we_do():
    peft = pytest.importorskip("peft")
    theirs = peft.get_peft_model(
        toy.one(), peft.IA3Config(target_modules=["o_proj"], feedforward_modules=[], init_ia3_weights=False)
    ).base_model.model.o_proj
    pristine = toy.one().o_proj.weight
    with torch.no_grad():
        theirs.ia3_l["default"].copy_(1e-4 * toy.inputs(32, 1))
    theirs.merge()
    with pytest.warns(UserWarning, match="Unmerge result can be inaccurate"):
        theirs.unmerge()
    assert error(theirs.base_layer.weight, pristine) > 1e-6
    model, _ = adapted(ll.IA3Config(), dtype=torch.float32)
    ll.merge(model)
    assert not torch.equal(model.o_proj.weight, pristine)
    ll.unmerge(model)
    assert torch.equal(model.o_proj.weight, pristine)
