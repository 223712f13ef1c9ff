"""Merging into quantised layers: refused, or a dense layer in their place until unmerge."""

import copy

import pytest
import torch
from torch import nn

import lora_lite as ll
from lora_lite.testing import toy
from lora_lite.testing.checks import error
from tests.core.test_messages import refusal


def int8():
    quantization = pytest.importorskip("torchao.quantization")
    model = toy.one(64, 32)
    quantization.quantize_(model, quantization.Int8WeightOnlyConfig())
    return model


def nf4():
    bitsandbytes = pytest.importorskip("bitsandbytes")
    model = toy.one(64, 32)
    packed = bitsandbytes.nn.Linear4bit(64, 32, compute_dtype=torch.float32, quant_type="nf4")
    packed.load_state_dict(model.o_proj.state_dict())
    model.o_proj = packed.to("cpu")
    return model


@pytest.mark.parametrize("base", [int8, nf4])
@pytest.mark.parametrize("name", ["lora", "ia3"])
def test_a_quantised_layer_is_refused_or_made_dense_and_comes_back(base, name):
    model = base()
    toy.perturb(ll.attach(model, ll.config(name)))
    layer, x = model.o_proj, toy.inputs(5, 64)
    before = layer.weight, layer.bias, type(layer)
    want = model(x)
    refusal(lambda: ll.merge(model), "o_proj is quantised", "dense=True")
    for dense, dtype, tolerance in ((True, torch.float32, 1e-5), (torch.bfloat16, torch.bfloat16, 0.03)):
        ll.merge(model, dense=dense)
        assert type(layer) is nn.Linear
        assert layer.weight.dtype == dtype
        assert type(layer.weight) is nn.Parameter
        assert error(model(x.to(dtype)), want) < tolerance
        twin = copy.deepcopy(model)
        ll.unmerge(twin)
        assert torch.equal(twin(x), want)
        ll.unmerge(model)
        assert (layer.weight, layer.bias, type(layer)) == before
        assert torch.equal(model(x), want)


def test_a_forward_that_another_library_replaced_is_refused():
    model = nf4()
    ll.attach(model, ll.config("lora"))
    model.o_proj.forward = model.o_proj.forward
    refusal(lambda: ll.merge(model, dense=True), "was replaced by another library")
