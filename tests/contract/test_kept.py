"""Results that depend on parameters and the base weight alone are reused without gradients, and only while nothing changed."""

import copy
import pickle

import pytest
import torch
from torch import nn

import lora_lite as ll
from lora_lite.contract.kept import Kept, reusable
from lora_lite.sites.layer import Base
from lora_lite.testing import toy


class Calls:
    """Counts what it is asked to make."""

    def __init__(self, base, *of):
        self.base, self.of, self.count = base, of, 0

    def __call__(self):
        self.count += 1
        return sum(tensor.double().sum() for tensor in self.of) + self.base.layer.weight.double().sum()


@pytest.fixture
def setting():
    layer = nn.Linear(6, 4)
    of = nn.Parameter(toy.inputs(3, 6)), toy.inputs(4)
    return Base(layer), of, Calls(Base(layer), *of), Kept()


def test_a_result_is_made_once_while_nothing_changes(setting):
    base, of, make, kept = setting
    first = kept(make, of, base)
    assert kept(make, of, base) is first
    assert kept(make, tuple(t.detach().clone() for t in of), Base(base.layer)) is first
    assert make.count == 1
    assert kept(make, of) is first, "without a base its weight does not matter"


@pytest.mark.parametrize("numbers", [(0.5, 1.0), (1.0, -1.0), (1, 1.0)])
def test_another_number_makes_it_anew(setting, numbers):
    _, of, make, kept = setting
    before, after = numbers
    kept(make, (*of, before))
    kept(make, (*of, before))
    assert make.count == 1
    kept(make, (*of, after))
    assert make.count == 2


ALIVE = []
CHANGES = {
    "data in place": lambda layer, of: of[0].data.add_(1),
    "in place": lambda layer, of: of[1].add_(1),
    "new data": lambda layer, of: setattr(of[0], "data", of[0].data * 2),
    "dtype": lambda layer, of: setattr(of[0], "data", of[0].data.double()),
    "base in place": lambda layer, of: layer.weight.mul_(2),
    "base replaced": lambda layer, of: setattr(layer, "weight", nn.Parameter(layer.weight * 2)),
    "base replaced, the old one alive": lambda layer, of: (
        ALIVE.append(layer.weight) or setattr(layer, "weight", nn.Parameter(layer.weight * 2))
    ),
    "base in another dtype": lambda layer, of: layer.to(torch.bfloat16),
}


@pytest.mark.parametrize("name", CHANGES)
def test_every_change_makes_it_anew(setting, name):
    base, of, make, kept = setting
    with torch.no_grad():
        first = kept(make, of, base)
        CHANGES[name](base.layer, of)
        assert torch.equal(kept(make, of, base), make()) or name == "dtype"
    assert make.count == 3
    assert kept(make, of, base) is not first


def test_nothing_is_reused_where_a_graph_or_other_arithmetic_could_differ(setting):
    base, of, *_ = setting
    frozen = of[1:]
    assert not reusable(of, frozen, base)
    with torch.no_grad():
        assert reusable(of, frozen, base)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert not reusable(of, frozen, base)
        assert not reusable(of, frozen, lambda z: z)
        assert not reusable(of, (), base)
        assert not reusable((nn.Parameter(of[0].to("meta")),), frozen, base)
    with torch.inference_mode():
        assert reusable(of, frozen, base)
        assert not reusable(of, frozen, Base(nn.Linear(2, 2)))


@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_mapped_parameters_are_not_compared():
    model, x = adapted()
    state = {name: p.detach() for name, p in model.named_parameters()}
    name = next(name for name in state if name.endswith(".m"))
    stacked = torch.stack([state[name], 2 * state[name]])
    with torch.no_grad():
        model(x)
        found = torch.func.vmap(lambda m: torch.func.functional_call(model, {name: m}, (x,)))(stacked)
        model.get_parameter(name).mul_(2)
        assert torch.allclose(found[1], model(x), atol=1e-5)


def adapted(variant="dora", **fields):
    model = toy.toy()
    toy.perturb(ll.attach(model, ll.config(variant, targets="all-linear", roles=None, **fields)))
    return model, toy.inputs(2, 5, toy.WIDTH)


REUSING = {
    "dora": {"r": 2},
    "oft": {},
    "boft": {"block_size": 2, "n_factors": 2},
    "hra": {"r": 2},
    "antipasto_rot": {"r": 4, "rotate": "both"},
}


@pytest.mark.parametrize("variant", REUSING)
def test_variants_keep_it_without_gradients_and_nothing_with_them(variant, monkeypatch):
    made, call = [], Kept.__call__
    monkeypatch.setattr(Kept, "__call__", lambda kept, make, *rest: call(kept, lambda: made.append(kept) or make(), *rest))
    model, x = adapted(variant, **REUSING[variant])
    layers = len(ll.status(model).layers)
    with torch.no_grad():
        for _ in range(3):
            model(x)
    assert len(made) == len({id(kept) for kept in made}) == layers
    with torch.no_grad(), ll.scale(model, 0.5):
        model(x)
    assert len(made) == (layers if variant in ("dora", "hra") else 2 * layers), "they are linear in the coefficient"
    before = len(made)
    model(x).sum().backward()
    assert len(made) == before


@pytest.mark.parametrize("variant", REUSING)
def test_what_is_reused_is_what_a_step_with_gradients_computes(variant):
    model, x = adapted(variant, **REUSING[variant])
    wanted = model(x).detach()
    with torch.no_grad():
        for _ in range(3):
            assert torch.equal(model(x), wanted)


def test_training_between_two_evaluations_is_seen():
    model, x = adapted()
    optimizer = torch.optim.SGD(ll.param_groups(model), lr=0.1)
    for _ in range(3):
        with torch.no_grad():
            model(x)
        model(x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        with torch.no_grad():
            evaluated = model(x)
        assert torch.equal(evaluated, model(x).detach())


def test_copies_and_pickles_leave_it_behind():
    model, x = adapted()
    with torch.no_grad():
        wanted = model(x)
        for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert not any("kept" in vars(found) for found in other.modules())
            assert torch.equal(other(x), wanted)


def test_merge_and_unmerge_leave_the_outputs_what_they_were():
    model, x = adapted()
    with torch.no_grad():
        wanted = model(x)
        ll.merge(model)
        ll.unmerge(model)
        assert torch.equal(model(x), wanted)
