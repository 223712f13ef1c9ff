"""Layers and programs around them that are not quite torch's plain Linear: each works, or is refused by name at the call."""

import copy
import dataclasses
import sys

import pytest
import torch
from torch import nn
from torch.nn.parallel import replicate

import lora_lite as ll
from lora_lite.contract.adapter import Adapter
from lora_lite.contract.attachment import Group
from lora_lite.core.install import build_all
from lora_lite.sites.layer import Base, by_keyword, place_of_input, unfit
from lora_lite.testing import toy
from tests.core.test_messages import refusal
from tests.oracles.kinds import one_of_each_kind


def adapted(name, **place):
    model = toy.toy().eval()
    toy.perturb(toy.attached(model, ll.get(name), toy.small(ll.get(name)), **place))
    return model, toy.inputs(2, 3, 24)


@pytest.mark.parametrize("name", one_of_each_kind(ll.names()))
def test_every_variant_exports_without_strictness(name):
    model, x = adapted(name)
    exported = torch.export.export(model, (x,), strict=False).module()
    assert (exported(x) - model(x)).abs().max() < 1e-5


@pytest.mark.parametrize("name", ll.names())
def test_every_variant_runs_where_accelerate_offloads_the_weights(name):
    accelerate = pytest.importorskip("accelerate")
    model, x = adapted(name)
    want = model(x)
    accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
    assert torch.equal(model(x), want)


@pytest.mark.parametrize("name", ll.names())
@pytest.mark.parametrize("gradients", [True, False])
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors is in prototype stage")
def test_every_variant_runs_in_an_encoder_with_a_padding_mask(name, gradients):
    """In eval mode torch packs a padded batch into a nested tensor."""
    block = nn.TransformerEncoderLayer(24, 2, 32, batch_first=True)
    model = toy.seeded(lambda: nn.TransformerEncoder(block, 2)).eval()
    cfg = dataclasses.replace(toy.small(ll.get(name)), targets=("linear1", "linear2"), roles=None)
    x, pad = toy.inputs(2, 5, 24), torch.tensor([[0, 0, 0, 1, 1], [0, 0, 0, 0, 0]]).bool()
    data = None if not ll.get(name).needs(cfg) else [x, x + 1]
    try:
        handle = ll.attach(model, cfg, data)
    except (ll.LoraLiteError, ll.LoraLiteWarning):
        pytest.skip("starts from labels or gradients")
    toy.perturb(handle)
    alone = model(x[:1, :3])
    with torch.set_grad_enabled(gradients):
        y = model(x, src_key_padding_mask=pad)
        assert torch.allclose(y[0, :3], alone[0], atol=1e-4)
        assert torch.allclose(y[1], model(x[1:])[0], atol=1e-4)
        if gradients:
            y.sum().backward()
    with torch.no_grad(), ll.scale(model, torch.tensor([0.0, 1.0])):
        split = model(x, src_key_padding_mask=pad)
    with ll.disabled(model):
        assert torch.allclose(split[0, :3], model(x[:1, :3])[0], atol=1e-4)
    assert torch.allclose(split[1], model(x[1:])[0], atol=1e-4)


@pytest.mark.parametrize("name", ["lora", "oft", "boft"])
def test_a_replica_runs_its_own_adapter(name, monkeypatch):
    """What nn.DataParallel does, with copies on one device."""
    module = sys.modules[replicate.__module__]
    cloned = lambda tensors, devices, detach=False: [[t.clone() for t in tensors] for _ in devices]  # noqa: E731
    monkeypatch.setattr(module, "_broadcast_coalesced_reshape", cloned)
    monkeypatch.setattr(module, "_get_device_index", lambda device, *rest: device)
    model, x = adapted(name)
    first, second = replicate(model, [0, 1])
    want = model(x)
    for adapter in (m for m in second.modules() if isinstance(m, Adapter)):
        for parameter in adapter._former_parameters.values():
            parameter.data.zero_()
    assert torch.equal(first(x), want)
    assert not torch.equal(second(x), want)


def test_layers_that_took_our_hooks_over_are_refused():
    model, x = adapted("lora")
    other = nn.Linear(24, 32)
    other._forward_hooks.update(model.blocks[0].q_proj._forward_hooks)
    refusal(lambda: other(x), "took over the hooks of adapter 'default'", "ll.detach(model)")
    other = nn.Linear(24, 32)
    for hook in model.blocks[0].q_proj._forward_hooks.values():
        other.register_forward_hook(hook)  # as torch.ao's swap_module: without the keywords
    refusal(lambda: other(x), "took over the hooks")


class Pair(nn.Linear):
    def forward(self, x):
        return nn.functional.linear(x, self.weight), self.bias


class Second(nn.Linear):
    def forward(self, scale, x):
        return nn.functional.linear(x * scale, self.weight, self.bias)


@pytest.mark.parametrize("name", ["lora", "oft"])
def test_the_activation_is_found_by_the_name_that_the_forward_gives_it(name):
    """Installed by hand: selection leaves such layers out."""
    assert place_of_input(Second.forward) == (1, "x")
    cfg = ll.config(name, **({"r": 2} if name == "lora" else {"block_size": 2}))
    layer, plain = nn.Linear(8, 8), nn.Linear(8, 8)
    plain.load_state_dict(layer.state_dict())
    layer.__class__ = Second
    for module in (layer, plain):
        adapter = build_all(ll.get(name), {"0": module}, {"0": cfg})["0"]
        adapter.start("0")
        for parameter in adapter.parameters():
            parameter.data.fill_(0.3)
        adapter.install(module, "0", Group("default", cfg))
    x, scale = toy.inputs(3, 8), torch.ones(3, 8)
    want = plain(x)
    assert not torch.allclose(want, nn.functional.linear(x, plain.weight, plain.bias), atol=1e-3)
    for y in (layer(scale, x), layer(scale, x=x), layer(scale=scale, x=x), layer(x=x, scale=scale)):
        assert torch.equal(y, want)
    refusal(lambda: by_keyword(layer, "x", {"scale": scale, "z": x}), "gives no 'x'", "scale, z")


def test_a_layer_that_returns_a_tuple_is_refused_at_the_call():
    layer = nn.Linear(8, 8)
    ll.attach(nn.Sequential(layer), ll.config("lora", r=2, targets=("0",)))
    layer.__class__ = Pair
    refusal(lambda: layer(toy.inputs(3, 8)), "Pair returns a tuple", "exclude=")


def test_what_cannot_carry_an_adapter_says_why():
    assert "first call" in str(unfit(nn.LazyLinear(4)))
    assert "complex" in str(unfit(nn.Linear(8, 4, dtype=torch.complex64)))
    assert unfit(nn.Linear(8, 4)) is None
    refusal(lambda: ll.attach(nn.Sequential(nn.Linear(8, 4)), ll.config("lora", r=2, dtype=torch.int8)), "torch.int8")


def test_the_adapter_follows_its_layer_into_eval_and_train(tmp_path):
    for training in (True, False):
        model = toy.toy().train(training)
        handle = ll.attach(model, ll.config("lora", r=2))
        assert {a.training for a in handle.layers.values()} == {training}
        handle.save(tmp_path / "a.safetensors")
        other = toy.toy().train(training)
        assert {a.training for a in ll.load(other, tmp_path / "a.safetensors").layers.values()} == {training}
        model.train(not training)
        assert {a.training for a in copy.deepcopy(handle.layers).values()} == {not training}


@pytest.mark.parametrize("name", [n for n in ll.names() if not ll.get(n).needs(toy.small(ll.get(n)))])
def test_starts_do_not_depend_on_the_default_dtype(name):
    found = []
    for dtype in (torch.float32, torch.float64):
        model = toy.toy()
        torch.set_default_dtype(dtype)
        try:
            ll.attach(model, toy.small(ll.get(name)))
        finally:
            torch.set_default_dtype(torch.float32)
        found.append(model.state_dict())
    for key, tensor in found[0].items():
        assert torch.equal(found[1][key], tensor)
        assert found[1][key].dtype == tensor.dtype


def test_who_captures_arguments_as_tensors_is_told_so():
    """Opacus does, for gradients per sample."""
    refusal(lambda: [one.detach() for one in (torch.ones(1), Base(nn.Linear(2, 2)))], "Opacus", "torch.func.vmap")
