"""Merging: W' and b' from the adapters' own maps, new storage beside the old, every original bit back."""

import copy
import sys
from dataclasses import dataclass

import pytest
import torch
from torch import nn

import lora_lite as ll
from lora_lite.contract.adapter import Adapter
from lora_lite.contract.claims import Claims
from lora_lite.contract.config import RanklessConfig
from lora_lite.contract.registry import borrowed
from lora_lite.core.delta import change, effective
from lora_lite.testing import toy
from lora_lite.testing.checks import demand_same, error, photograph
from tests.core.test_messages import refusal
from tests.oracles.compat_merge import check_algebra, check_merge

merge_module = sys.modules["lora_lite.core.merge"]


def relative(got, want):
    return float((got.double() - want.double()).norm().detach() / want.double().norm().detach())


@pytest.mark.parametrize("name", ll.names())
def test_every_variant_merges_within_1e_5_and_one_rounding_of_bfloat16_and_comes_back(name):
    assert check_merge(name) == "yes"


@pytest.mark.parametrize("name", ll.names())
def test_every_variant_composes_in_delta_space(name):
    assert check_algebra(name) == "yes"


def test_a_change_of_claimed_rank_comes_as_factors_without_a_dense_matrix(monkeypatch):
    model = toy.one(64, 48)
    adapter = toy.perturb(ll.attach(model, ll.config("lora", r=4))).layers["o_proj"]
    want, shifted, W = effective(model.o_proj, [adapter])
    monkeypatch.setattr(sys.modules["lora_lite.core.delta"], "effective", None)
    found = change(model.o_proj, adapter)
    assert found.left.shape == (48, 4)
    assert found.right.shape == (4, 64)
    assert relative(found.dense(), want - W) < 1e-12
    assert error(found.bias, shifted - model.o_proj.bias) < 1e-12


def test_a_claim_below_the_true_rank_is_noticed_and_the_dense_change_taken(monkeypatch):
    model = toy.one(64, 48)
    adapter = toy.perturb(ll.attach(model, ll.config("lora", r=4))).layers["o_proj"]
    monkeypatch.setattr(type(adapter), "claims", Claims(rank=lambda cfg: 3))
    found = change(model.o_proj, adapter)
    want, _, W = effective(model.o_proj, [adapter])
    assert found.right is None
    assert relative(found.left, want - W) < 1e-12


def test_delta_weight_and_delta_bias_are_what_the_layer_adds():
    model = toy.one(24, 32)
    toy.perturb(ll.attach(model, ll.config("ia3")))
    x = toy.inputs(5, 24)
    weight, bias = model.o_proj.weight + ll.delta_weight(model, "o_proj"), model.o_proj.bias + ll.delta_bias(model, "o_proj")
    assert error(model(x), nn.functional.linear(x, weight, bias)) < 1e-6
    assert ll.delta_bias(model, "o_proj").abs().max() > 0.01
    assert ll.delta_bias(model, "o_proj").dtype == torch.float32
    refusal(lambda: ll.delta_bias(model, "other"), "'other' has no adapter", "o_proj")


def test_a_layer_without_bias_gets_one_only_where_the_adapter_moves_the_origin():
    for name, biased in (("lora", False), ("composed", True)):
        model = toy.one(24, 32, bias=False)
        if name == "lora":
            toy.perturb(ll.attach(model, ll.config("lora")))
        else:
            donor = toy.one(24, 32)
            donor.o_proj.weight = model.o_proj.weight
            toy.perturb(ll.attach(donor, ll.config("ia3")))
            shot = ll.snapshot(donor)
            ll.apply(model, ll.compose({shot: 0.5}), name="default", strict_base=False)  # it has no bias
        before, x = photograph(model), toy.inputs(5, 24)
        want = model(x)
        ll.merge(model)
        assert (model.o_proj.bias is not None) == biased
        assert error(model(x), want) < 1e-6
        ll.unmerge(model)
        demand_same(model, before, "after unmerge")


def test_merging_at_coefficient_zero_keeps_every_bit_as_the_hooks_do(monkeypatch):
    """Whatever the variant's own arithmetic makes of 0."""
    model = toy.toy()
    handle = toy.perturb(ll.attach(model, ll.config("lora")))
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    monkeypatch.setattr(ll.get("lora"), "forward", lambda self, x, y, base: 2 * y)
    with ll.scale(model, 0.0):
        ll.merge(model)
        assert all(row.merged for row in ll.status(model).layers)
        assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())
        handle.detach()


def test_merging_under_autocast_is_merging():
    model = toy.toy()
    toy.perturb(ll.attach(model, ll.config("hra", r=4)))
    plain = ll.delta_weight(model, "blocks.1.q_proj")
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(ll.delta_weight(model, "blocks.1.q_proj"), plain)


def test_chunks_of_basis_vectors_give_the_same_weight(monkeypatch):
    model = toy.one(24, 32)
    adapter = toy.perturb(ll.attach(model, ll.config("hra", r=4))).layers["o_proj"]
    whole = effective(model.o_proj, [adapter])[0]
    monkeypatch.setattr(sys.modules["lora_lite.core.delta"], "CHUNK", 7)
    assert error(effective(model.o_proj, [adapter])[0], whole) < 1e-15


def test_merge_holds_the_new_weights_in_their_own_dtype(monkeypatch):
    model = toy.toy().to(torch.bfloat16)
    toy.perturb(ll.attach(model, ll.config("lora")))
    kept = []
    swap = merge_module.swap
    monkeypatch.setattr(merge_module, "swap", lambda found, *new: (kept.append(new), swap(found, *new)))
    ll.merge(model)
    assert {t.dtype for new in kept for t in new if t is not None} == {torch.bfloat16}


@pytest.mark.parametrize("stop", range(1, 9))
def test_a_merge_that_is_interrupted_anywhere_leaves_the_original_bits(stop):
    """Interrupted between any two assignments, not only between layers."""
    model = toy.toy()
    toy.perturb(ll.attach(model, ll.config("ia3")))
    before, calls = photograph(model), []
    kind = type(model.blocks[0].q_proj)

    class Interrupting(kind):
        def __setattr__(self, key, value):
            if key in ("weight", "bias") and not undoing:
                calls.append(key)
                if len(calls) == stop:
                    undoing.append(1)
                    raise KeyboardInterrupt
            super().__setattr__(key, value)

    undoing = []
    layers = [m for m in model.modules() if type(m) is kind]
    for layer in layers:
        layer.__class__ = Interrupting
    with pytest.raises(KeyboardInterrupt):
        ll.merge(model)
    for layer in layers:
        layer.__class__ = kind
    demand_same(model, before, "after an interrupted merge")
    assert not any(row.merged for row in ll.status(model).layers)


def test_an_unmerge_that_is_interrupted_is_finished_by_the_next():
    model = toy.toy()
    toy.perturb(ll.attach(model, ll.config("lora"), name="a"))
    toy.perturb(ll.attach(model, ll.config("ia3"), name="b"))
    before = photograph(model)
    ll.merge(model)
    third = [f for f in merge_module.finding.adapters(model)][2]
    adapter, original = third.adapter, third.adapter.original
    adapter.original = original._replace(bias=object())  # no such bias can be set
    with pytest.raises(TypeError):
        ll.unmerge(model)
    adapter.original = original
    ll.unmerge(model)
    demand_same(model, before, "after the second unmerge")


def test_copies_and_moves_of_a_merged_model_come_back_too():
    model = toy.toy()
    toy.perturb(ll.attach(model, ll.config("lora")))
    x = toy.inputs(3, toy.WIDTH)
    want = model(x)
    ll.merge(model)
    twin = copy.deepcopy(model)
    ll.unmerge(twin)
    assert torch.equal(twin(x), want)
    assert any(row.merged for row in ll.status(model).layers)
    model.double()
    ll.unmerge(model)
    assert error(model(x.double()), want) < 1e-6


def test_a_variant_that_is_not_linear_is_refused_by_name():
    @dataclass(frozen=True, kw_only=True)
    class BentConfig(RanklessConfig):
        pass

    class Bent(Adapter):
        Config = BentConfig
        claims = Claims(affine=False)

        @staticmethod
        def param_specs(d_in, d_out, cfg):
            return {"a": ll.ParamSpec((d_out,))}

        def forward(self, x, y, base):
            return y + self.coeff * torch.tanh(self.a * y)

    with borrowed(Bent):
        model = toy.one()
        handle = toy.perturb(ll.attach(model, BentConfig()))
        before, x = photograph(model), toy.inputs(3, toy.WIDTH)
        shot = ll.snapshot(model)
        for call in (
            lambda: ll.merge(model),
            lambda: ll.delta_weight(model, "o_proj"),
            lambda: ll.delta_bias(model, "o_proj"),
            lambda: ll.compose({shot: 0.5}),
            lambda: ll.ties({shot: 1.0}),
        ):
            refusal(call, "bent at o_proj is not a linear map")
        refusal(lambda: ll.compose({shot: 0.5}), 'space="output"')
        demand_same(model, before, "after the refusals")
        want = model(x)
        handle.detach()
        ll.apply(model, ll.compose({shot: 1.0}), name="copy")
        assert torch.equal(model(x), want)
        ll.detach(model)
        base = model(x)
        ll.apply(model, ll.compose({shot: 0.5}, space="output"), name="part")
        assert error(model(x), (want + base) / 2) < 1e-6


def test_detach_of_one_merged_adapter_leaves_those_of_other_layers_merged():
    model = toy.toy()
    toy.perturb(ll.attach(model, ll.config("lora", r=2, targets=("q_proj",)), name="a"), 0.1)
    toy.perturb(ll.attach(model, ll.config("hra", r=2, targets=("down_proj",)), name="b"), 0.1)
    ll.merge(model, "a")
    ll.merge(model, "b")
    ll.detach(model, "b")
    assert {row.state for row in ll.status(model).layers} == {"merged"}
    assert {row.name for row in ll.status(model).layers} == {"a"}


def test_detach_of_one_of_two_merged_into_a_layer_leaves_the_other_acting():
    model, x = toy.toy(), toy.inputs(3, toy.WIDTH)
    toy.perturb(ll.attach(model, ll.config("lora", r=2, targets=("q_proj",)), name="a"), 0.1)
    alone = model(x)
    toy.perturb(ll.attach(model, ll.config("hra", r=2, targets=("q_proj",)), name="b"), 0.1)
    ll.merge(model)
    with pytest.warns(ll.LoraLiteWarning, match=r"a was merged into the same weights .* at blocks.0.q_proj, blocks.1.q_proj"):
        ll.detach(model, "b")
    assert torch.equal(model(x), alone)


def test_the_last_of_several_merged_adapters_leaves_without_a_warning():
    model = toy.toy()
    for name in ("a", "b"):
        ll.attach(model, ll.config("lora", r=2, targets=("q_proj",)), name=name)
    ll.merge(model)
    ll.detach(model)


def test_delta_weight_of_a_model_without_adapters_says_so():
    with pytest.raises(ll.LoraLiteError, match="The model has no adapter"):
        ll.delta_weight(toy.toy(), "q_proj")
