"""Compiled models: what a change of the coefficient costs. The backend counts graphs and runs them as they are."""

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn

import lora_lite as ll
from lora_lite.contract import Adapter, ParamSpec, RanklessConfig, registry
from lora_lite.contract.spec import normal
from lora_lite.mathematics import maps, rotations
from lora_lite.testing import toy
from lora_lite.testing.checks import error


@dataclass(frozen=True, kw_only=True)
class GainConfig(RanklessConfig):
    pass


class Gain(Adapter):
    """Output side, linear in the coefficient."""

    Config = GainConfig
    g: Tensor

    @staticmethod
    def param_specs(d_in, d_out, cfg):
        return {"g": ParamSpec((d_out,), normal(0.3))}

    def forward(self, x, y, base):
        return y + self.coeff * self.g * y


@dataclass(frozen=True, kw_only=True)
class TurnConfig(RanklessConfig):
    pass


class Turn(Adapter):
    """Input side, one pass per distinct coefficient."""

    Config = TurnConfig
    q: Tensor

    @staticmethod
    def param_specs(d_in, d_out, cfg):
        return {"q": ParamSpec((d_in // 4, 6), normal(0.3))}

    def forward_input(self, x):
        return x + maps.per_value(self.coeff, x, self.turned, values=self.values)

    def turned(self, c, x):
        return rotations.block_product(x, rotations.cayley_shift(c * rotations.skew(self.q, 4)))


X = toy.inputs(3, 5, 24)


def pair() -> nn.Module:
    """Two layers: what a change of all adapters at once costs does not depend on their number."""
    return toy.seeded(lambda: nn.Sequential(nn.Linear(24, 24), nn.Linear(24, 24)))


@pytest.fixture(params=[Gain, Turn], ids=["linear in coeff", "one pass per value"])
def cls(request):
    with registry.borrowed(request.param):
        yield request.param


@pytest.fixture
def watched(cls):
    """(model of two adapted layers, its compiled form, the graphs so far)."""
    graphs = []

    def backend(graph, _):
        graphs.append(graph)
        return graph.forward

    torch.compiler.reset()
    model = pair()
    ll.attach(model, cls.Config())
    yield model, torch.compile(model, backend=backend, fullgraph=True), graphs
    torch.compiler.reset()


def graphs_for(watched, coeffs) -> list[int]:
    """How many graphs there are after a call at each coefficient, every output compared with the plain model's."""
    model, compiled, graphs = watched
    counts = []
    for coeff in coeffs:
        ll.scale(model, coeff)
        assert error(compiled(X), model(X)) < 1e-6
        counts.append(len(graphs))
    return counts


def test_any_number_of_coefficients_costs_one_compilation_beside_the_first(watched):
    assert graphs_for(watched, (1.0, 0.3, 0.7, 1.2, -0.5, 1)) == [1, 2, 2, 2, 2, 2]


def test_zero_costs_one_compilation_and_the_way_back_none(watched):
    assert graphs_for(watched, (1.0, 0.5, 0.0, 1.0, 0.0, 0.7, 0.0)) == [1, 2, 3, 3, 3, 3, 3]


def test_disabling_again_and_again_costs_one_compilation(watched):
    model, compiled, graphs = watched
    base = pair()(X)
    adapted = compiled(X)
    for _ in range(3):
        with ll.disabled(model):
            assert torch.equal(compiled(X), base)
        assert torch.equal(compiled(X), adapted)
    assert len(graphs) == 2


def test_other_numbers_per_sample_cost_no_compilation(watched):
    samples = [torch.tensor(values) for values in ([0.0, 0.5, 1.0], [0.2, 0.0, -0.3], [1.5, 1.5, 0.1], [3.0, 0.0, 0.7])]
    assert graphs_for(watched, samples) == [1] * 4
    assert graphs_for(watched, (1.0, samples[0], 0.5, samples[1])) == [2, 2, 3, 3]


def test_another_count_of_distinct_numbers_costs_a_compilation_only_where_each_takes_a_pass(watched, cls):
    samples = [torch.tensor(values) for values in ([0.0, 0.5, 1.0], [1.0, 1.0, 1.0], [0.0, 0.0, 0.0], [0.0, 0.7, 0.7])]
    assert graphs_for(watched, samples) == ([1] * 4 if cls is Gain else [1, 2, 3, 3])


def test_detaching_takes_the_adapter_out_of_the_compiled_model(watched):
    model, compiled, _ = watched
    base = pair()(X)
    assert error(compiled(X), base) > 1e-3
    ll.detach(model)
    assert torch.equal(compiled(X), base)


def test_coefficient_tensor_is_taken_at_the_time_of_the_call(cls):
    model = pair()
    ll.attach(model, cls.Config())
    coeff = torch.tensor([0.0, 0.5, 1.0])
    ll.scale(model, coeff)
    before = model(X)
    coeff.fill_(7.0)
    assert torch.equal(model(X), before)
    with ll.scale(model, torch.full((3,), 2.0)):
        assert not torch.equal(model(X), before)
    assert torch.equal(model(X), before)


def test_coefficient_that_is_a_parameter_is_trained_and_stays_the_callers(tmp_path):
    with registry.borrowed(Gain):
        model = pair()
        handle = ll.attach(model, GainConfig())
        names = [name for name, _ in model.named_parameters()]
        coeff = nn.Parameter(torch.ones(3))
        with ll.scale(model, coeff):
            model(X).square().sum().backward()
            assert [name for name, _ in model.named_parameters()] == names
            handle.save(tmp_path / "a.safetensors")
        ll.scale(model, 0.5)
        ll.load(pair(), tmp_path / "a.safetensors")
    assert coeff.grad is not None
    assert coeff.grad.all()


def test_coefficient_that_is_trained_is_refused_where_each_number_takes_a_pass():
    with registry.borrowed(Turn):
        model = pair()
        ll.attach(model, TurnConfig())
        ll.scale(model, torch.ones(3))
        ll.scale(model, torch.ones(3, requires_grad=True))
        with pytest.raises(ll.LoraLiteError, match="requires a gradient"):
            model(X)
