"""Every objective reaches every registered variant, and the base never; weight changes against dense arithmetic."""

import dataclasses

import pytest
import torch

import lora_lite as ll
from lora_lite.core import finding
from lora_lite.testing import toy
from tests.observe.test_capture import IDS, MASK, hooks
from tests.oracles.kinds import one_of_each_kind
from tests.whole.test_engines import language_model

O = ll.objectives


def attached(name):
    """(model, handle) with perturbed adapters on the query and output projections of a small Qwen3.

    Every number is positive: clamped tensors have no gradient below their range.
    """
    model = language_model()
    cls = ll.get(name)
    cfg = dataclasses.replace(toy.small(cls), targets=("q_proj", "o_proj"))
    return model, moved(ll.attach(model, cfg, data(cls, cfg)))


def moved(handle, seed=2):
    toy.perturb(handle, seed=seed)
    for p in handle.parameters():
        p.detach().abs_()
    return handle


def data(cls, cfg):
    needs = cls.needs(cfg)
    batches = [{"input_ids": IDS, "attention_mask": torch.ones_like(IDS), "labels": IDS}]
    return (
        {"positive": batches, "negative": batches[::-1]} if any(":" in name for name in needs) else batches if needs else None
    )


def step(model, objective):
    """The adapter's gradients under the objective alone; the base has none."""
    model.zero_grad()
    with ll.capture(model, objective) as seen:
        model(input_ids=IDS, attention_mask=MASK)
    objective(seen).backward()
    own = {id(p) for f in finding.adapters(model) for p in f.adapter.parameters()}
    assert all(p.grad is None for p in model.parameters() if id(p) not in own)
    return {key: p.grad for key, p in model.named_parameters() if id(p) in own}


@pytest.mark.parametrize("name", one_of_each_kind(ll.names()))
def test_every_objective_reaches_every_variant_and_never_the_base(name):
    """HeadDiversity does not depend on the output projection of the last block; else every tensor has a gradient."""
    model, handle = attached(name)
    taken = ll.snapshot(model)
    moved(handle, seed=3)
    objectives = (O.HeadDiversity(weight=1), O.Repulsion(weight=1), O.L1(weight=1), O.Gossip(tau=-1), O.DeltaNorm())
    for objective in (*objectives, O.DeltaCosine(against=taken)):
        found = step(model, objective)
        assert all(grad.isfinite().all() for grad in found.values() if grad is not None), objective.name
        without = {key for key, grad in found.items() if grad is None or not grad.any()}
        if objective.name == "diversity":
            without -= {key for key in without if "layers.1.self_attn.o_proj" in key}
        assert not without, objective.name


def dense_deltas(model):
    """{path: dW (d_out, d_in)} in float64 by running each layer on basis vectors, with gradients."""
    found = {}
    for f in finding.adapters(model):
        layer = f.layer
        eye = torch.eye(layer.in_features)
        found[f.path] = (layer(eye) - layer(torch.zeros_like(eye)) - eye @ layer.weight.T).T
    return found


def agree(model, found, expected, rel):
    parameters = [p for p in model.parameters() if p.requires_grad]
    assert float(found.detach()) == pytest.approx(float(expected.detach()), rel=rel)
    a, b = (torch.autograd.grad(value, parameters, allow_unused=True) for value in (found, expected))
    top = max(float(g.abs().max()) for g in b if g is not None)
    for g, e in zip(a, b):
        assert torch.allclose(
            torch.zeros(1) if g is None else g, torch.zeros(1) if e is None else e, rtol=1e-3, atol=1e-4 * top
        )


@pytest.mark.parametrize("name", ll.names())
def test_delta_norm_is_the_sum_of_squares_of_all_weight_changes(name):
    model, _ = attached(name)
    with ll.capture(model, O.DeltaNorm()) as seen:
        pass
    expected = torch.stack([D.square().sum() for D in dense_deltas(model).values()]).sum()
    agree(model, O.DeltaNorm()(seen), expected, 1e-4)
    assert float(O.DeltaNorm().value(seen).detach()) == pytest.approx(
        sum(float(ll.delta_weight(model, path).square().sum()) for path in dense_deltas(model)), rel=1e-5
    )


@pytest.mark.parametrize("name", ["lora", "dora", "hra", "ia3", "oft"])
def test_delta_cosine_compares_what_is_learnt_now_with_each_earlier_phase(name):
    """Of one training the last snapshot is subtracted: phases a and b - a against now - b."""
    model, handle = attached(name)
    a, A = ll.snapshot(model), detached(dense_deltas(model))
    moved(handle, seed=5)
    b, B = ll.snapshot(model), detached(dense_deltas(model))
    moved(handle, seed=6)
    objective = O.DeltaCosine(against=[a, b])
    with ll.capture(model, objective) as seen:
        pass
    cosines = [
        torch.nn.functional.cosine_similarity((D - B[path]).flatten(), phase.flatten(), dim=0)
        for path, D in dense_deltas(model).items()
        for phase in (A[path], B[path] - A[path])
    ]
    agree(model, objective(seen), torch.stack(cosines).mean(), 2e-3)


def detached(deltas):
    return {path: D.detach() for path, D in deltas.items()}


def test_delta_cosine_of_another_training_counts_all_of_the_adapter():
    model, handle = attached("lora")
    taken = ll.snapshot(model)
    handle.detach()
    toy.perturb(ll.attach(model, ll.config("lora", r=4, targets=("q_proj", "o_proj"))), seed=7)
    with ll.capture(model, {"delta"}) as seen:
        pass
    found = float(O.DeltaCosine(against=taken).value(seen).detach())
    now = detached(dense_deltas(model))
    ll.detach(model)
    ll.apply(model, taken, name="back")
    then = detached(dense_deltas(model))
    cosines = [torch.nn.functional.cosine_similarity(now[p].flatten(), then[p].flatten(), dim=0) for p in now]
    assert found == pytest.approx(float(torch.stack(cosines).mean()), abs=1e-4)


def test_delta_cosine_at_the_snapshot_has_no_direction_yet():
    model, _ = attached("lora")
    objective = O.DeltaCosine(against=ll.snapshot(model))
    with ll.capture(model, objective) as seen:
        pass
    assert float(objective(seen)) == 0


def test_delta_objectives_need_no_forward_and_leave_no_hooks():
    model, _ = attached("lora")
    tables = hooks(model)
    objective = O.DeltaNorm()
    with ll.capture(model, objective) as seen:
        pass
    objective(seen).backward()
    assert hooks(model) == tables


def test_delta_norm_follows_the_coefficient_and_the_name():
    model, _ = attached("lora")
    toy.perturb(ll.attach(model, ll.config("ia3", targets=("q_proj",)), name="other"))
    with ll.capture(model, O.DeltaNorm()) as seen:
        pass
    lora, other, both = (float(O.DeltaNorm(adapter=name).value(seen).detach()) for name in ("default", "other", None))
    assert both == pytest.approx(lora + other)
    with ll.scale(model, 0.5, name="default"):
        assert float(O.DeltaNorm(adapter="default").value(seen).detach()) == pytest.approx(lora / 4)


def test_a_minimised_cosine_does_not_stop_at_zero():
    model, handle = attached("lora")
    objective = O.DeltaCosine(against=ll.snapshot(model))
    moved(handle, seed=8)
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.05)
    for _ in range(40):
        with ll.capture(model, objective) as seen:
            pass
        optimizer.zero_grad()
        objective(seen).backward()
        optimizer.step()
    assert float(objective.parts["delta_cosine"]) < -0.7


def test_delta_norm_pulls_the_adapter_back_to_the_base():
    model, _ = attached("lora")
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.005)
    norms = []
    for _ in range(20):
        with ll.capture(model, O.DeltaNorm()) as seen:
            pass
        optimizer.zero_grad()
        loss = O.DeltaNorm()(seen)
        loss.backward()
        optimizer.step()
        norms.append(float(loss.detach()))
    assert norms[-1] < 0.5 * norms[0]
