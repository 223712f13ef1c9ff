"""What merge says: the share of the change that rounding lost, and what it refuses before anything is written."""

import pytest
import torch
from torch import nn

import lora_lite as ll
from lora_lite.core.delta import effective
from lora_lite.testing import toy
from lora_lite.testing.checks import demand_same, photograph
from tests.core.test_messages import refusal


def square(relative, dtype=torch.bfloat16, variant="lora"):
    """One layer in bfloat16 with a change of that share of its weight."""
    model = toy.seeded(lambda: nn.Sequential(nn.Linear(256, 256, bias=False)))
    nn.init.normal_(model[0].weight, std=0.02)
    model.to(dtype)
    adapter = toy.perturb(ll.attach(model, ll.config(variant, r=8))).layers["0"]
    adapter.B.data.mul_(relative * model[0].weight.float().norm() / ll.delta_weight(model, "0").norm())
    return model, adapter


@pytest.mark.parametrize("relative", [1e-1, 1e-2, 3e-3, 1e-3])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_the_share_lost_is_that_against_float64(relative, dtype):
    model, adapter = square(relative, dtype)
    exact, _, W = effective(model[0], [adapter])
    report = ll.merge(model)
    want = float((model[0].weight.double() - exact).norm() / (exact - W).norm())
    assert report.lost == {"0": pytest.approx(want, rel=1e-9)}
    assert report.worst == report.lost["0"]
    if dtype is torch.bfloat16:
        assert want == pytest.approx({1e-1: 0.02, 1e-2: 0.17, 3e-3: 0.48, 1e-3: 0.79}[relative], abs=0.03)


def test_a_loss_above_the_limit_is_refused_before_anything_is_written():
    model, _ = square(1e-3)
    before = photograph(model)
    words = "bfloat16 loses", "of the change of 0", "limit=0.5", "1 of 1 layers", "model.float()"
    refusal(lambda: ll.merge(model, limit=0.5), *words)
    demand_same(model, before, "a refused merge")
    assert ll.merge(model.float(), limit=0.5).worst < 1e-3


def test_the_report_prints_the_worst_layers_first():
    model = toy.toy().bfloat16()
    toy.perturb(ll.attach(model, ll.config("lora", r=2)))
    report = ll.merge(model)
    lines = str(report).splitlines()
    assert len(lines) == 1 + len(report.lost)
    assert lines[1].split()[-1] == max(report.lost, key=lambda path: report.lost[path])
    assert "bfloat16" in lines[1]


def test_a_change_of_nothing_loses_nothing():
    model = toy.toy().bfloat16()
    ll.attach(model, ll.config("lora", r=2))
    assert set(ll.merge(model, limit=0.0).lost.values()) == {0.0}


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_an_adapter_that_is_not_finite_is_named_and_no_dtype_proposed(bad, dtype):
    model = toy.toy().to(dtype)
    handle = ll.attach(model, ll.config("lora", r=2))
    handle.layers["blocks.1.q_proj"].A.data[0, 0] = bad
    with pytest.raises(ll.LoraLiteError, match=r"blocks.1.q_proj holds numbers that are not finite: A") as caught:
        ll.merge(model)
    assert "overflows" not in str(caught.value)
    assert "float" not in str(caught.value)


def test_a_finite_adapter_that_overflows_is_told_so():
    model = toy.toy().half()
    handle = toy.perturb(ll.attach(model, ll.config("lora", r=2)))
    for adapter in handle.layers.values():
        adapter.B.data.mul_(1e7)
    refusal(lambda: ll.merge(model), "overflows torch.float16", "model.bfloat16()")


def test_offloaded_weights_are_refused():
    accelerate = pytest.importorskip("accelerate")
    model = toy.toy()
    ll.attach(model, ll.config("lora", r=2))
    accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
    refusal(lambda: ll.merge(model), "accelerate exchanges the weight", "remove_hook_from_module")
