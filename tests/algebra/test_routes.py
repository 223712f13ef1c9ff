"""Routes, gains by groups of layers, and the choice of gains."""

import pytest
import torch
from torch import nn

import lora_lite as ll
from lora_lite.algebra.router import natural
from lora_lite.algebra.routes import absolute
from lora_lite.core.gains import fits, gains
from lora_lite.testing import toy
from lora_lite.testing.checks import error
from tests.core.test_messages import refusal

CHAIN = ("A", "B_related", "C")


class Deep(nn.Module):
    """Blocks in a list called `layers`."""

    def __init__(self, count):
        super().__init__()
        self.layers = nn.ModuleList(toy.Block(bias=True) for _ in range(count))

    def forward(self, x):
        for block in self.layers:
            x = block(x)
        return x


def adapted(count=3):
    model = toy.seeded(lambda: Deep(count))
    return model, toy.perturb(ll.attach(model, ll.config("lora", r=2)))


def coefficients(handle):
    return {path: adapter.coeff for path, adapter in handle.layers.items()}


# --- routes -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "normal", "weights"),
    [
        ("A+0.9B_related+0.25C", "A+0.9B_related+0.25C", (0.1, 0.65, 0.25)),
        (" 0.25*C + A+ .90 * B_related", "A+0.9B_related+0.25C", (0.1, 0.65, 0.25)),
        ("1.0A+1B_related+*C", "A+B_related+C", (0.0, 0.0, 1.0)),
        ("A+0C", "A+0C", (1.0, 0.0, 0.0)),
        ("A+0.4C", "A+0.4C", (1.0, -0.4, 0.4)),
        ("1*A+1.5B_related", "A+1.5B_related", (-0.5, 1.5, 0.0)),
        ("A+0.123456789C", "A+0.123457C", (1.0, -0.123456789, 0.123456789)),
        ("A+0.00000123C", "A+0.00000123C", (1.0, -1.23e-6, 1.23e-6)),
    ],
)
def test_a_route_has_one_normal_form_and_one_set_of_weights(text, normal, weights):
    found = ll.parse_route(text, CHAIN)
    assert ll.format_route(found) == normal
    assert ll.format_route(ll.parse_route(normal, CHAIN)) == normal
    assert tuple(absolute(found, CHAIN).values()) == pytest.approx(weights, abs=1e-12)
    assert list(found) == [name for name in CHAIN if name in found]


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("", "a term is empty"),
        ("A++C", "a term is empty"),
        ("A+C+", "a term is empty"),
        ("A+0.5D", "no phase 'D'"),
        ("A+0.5c", "Closest name: C"),
        ("A+C+0.5C", "'C' stands twice"),
        ("B_related+C", "the stable phase 'A'"),
        ("0.9A+C", "the stable phase 'A'"),
        ("A+1.6C", "1.6 is above 1.5"),
        ("A-0.5C", "cannot be read"),
        ("A+-0.5C", "cannot be read"),
        ("A+5e-1C", "cannot be read"),
        ("A+1e0C", "no phase 'e0C'"),
        ("A+0.5 0.5C", "cannot be read"),
        ("A+0.5*", "cannot be read"),
    ],
)
def test_a_route_that_cannot_be_followed_says_why(text, fault):
    refusal(lambda: ll.parse_route(text, CHAIN), repr(text), fault, "A+0.9B_related+0.9C")


# --- gains ------------------------------------------------------------------------------------------------------------


def test_patterns_are_rows_of_names_with_inclusive_ranges():
    for pattern, path, expected in (
        ("layers.0-7", "model.layers.7.q_proj", True),
        ("layers.0-7", "model.layers.8.q_proj", False),
        ("layers.16-", "layers.160.q_proj", True),
        ("layers.16-", "layers.15.q_proj", False),
        ("layers.1", "layers.1.q_proj", True),
        ("layers.1", "layers.11.q_proj", False),
        ("q_proj", "layers.1.q_proj", True),
        ("q_pro", "layers.1.q_proj", False),
        ("?_proj", "layers.1.q_proj", True),
        ("layers.*.mlp", "layers.1.mlp.up_proj", True),
        ("layers.*.mlp", "layers.1.attn.mlp", False),
        ("0-1.q_proj", "layers.1.q_proj", True),
        ("a.b.c", "b.c", False),
    ):
        assert fits(pattern, path) == expected, (pattern, path)


def test_the_longest_pattern_wins_and_what_none_fits_keeps_1():
    paths = ["layers.0.q_proj", "layers.1.q_proj", "layers.1.o_proj", "head.0"]
    assert list(gains({"layers.0-1": 0.25, "layers.1.q_proj": 0.75}, paths).values()) == [0.25, 0.75, 0.25, 1.0]


def test_gains_that_do_not_fit_are_refused():
    paths = ["layers.0.q_proj", "layers.1.q_proj"]
    refusal(lambda: gains({"layer.0": 0.5}, paths), "'layer.0' fits no adapted layer", "layers.0.q_proj")
    refusal(lambda: gains({"layers.0": 0.5, "*.q_proj": 0.25}, paths), "equally long", "layers.0.q_proj")
    assert gains({"layers.0": 0.5, "*.q_proj": 0.5}, paths) == dict.fromkeys(paths, 0.5)
    for bad in (True, "1", float("inf"), None):
        refusal(lambda bad=bad: gains({"layers.0": bad}, paths), "no finite number")


def test_scale_by_groups_multiplies_the_common_coefficient_and_gives_it_back():
    model, handle = adapted()
    ll.scale(model, 0.5)
    with ll.scale(model, {"layers.0-1": 0.25, "layers.1.q_proj": 3.0}):
        expected = {"layers.0": 0.125, "layers.1": 0.125, "layers.1.q_proj": 1.5, "layers.2": 0.5}
        for path, coeff in coefficients(handle).items():
            assert coeff == expected.get(path, expected[path[:8]])
        with ll.scale(model, {"layers.2": 0.0}):
            assert set(coefficients(handle).values()) == {0.5, 0.0}  # gains replace one another
        with ll.scale(model, 1.0):
            assert set(coefficients(handle).values()) == {1.0}
        ll.scale(model, {"layers.0": 1.0})
        assert set(coefficients(handle).values()) == {0.5}
    assert set(coefficients(handle).values()) == {0.5}
    ll.scale(model, {"layers.0": 0.0})
    ll.scale(model, 1.0)
    assert set(coefficients(handle).values()) == {1.0}


@pytest.mark.parametrize("k", [0.3, -1.0, 0.0])
def test_the_same_gain_everywhere_is_that_coefficient(k):
    model, _ = adapted()
    x = toy.inputs(4, toy.WIDTH)
    with ll.disabled(model):
        base = model(x)
    with ll.scale(model, k):
        want = model(x)
    with ll.scale(model, {"layers.0-": k}):
        assert error(model(x), want) <= 1e-6
        assert k != 0 or torch.equal(model(x), base)


def test_gains_multiply_a_coefficient_per_sample():
    model, _ = adapted()
    x, coeff = toy.inputs(3, toy.WIDTH), torch.tensor([0.0, 0.5, 1.0])
    ll.scale(model, coeff)
    with ll.scale(model, {"layers.0-": 0.5}):
        got = model(x)
    with ll.scale(model, coeff / 2):
        assert error(got, model(x)) < 1e-6


def test_scale_by_groups_is_refused_before_anything_changes():
    model, handle = adapted()
    refusal(lambda: ll.scale(model, {"layers.0": 0.5, "layers.9": 0.5}), "'layers.9' fits no adapted layer")
    assert set(coefficients(handle).values()) == {1.0}
    ll.merge(model)
    refusal(lambda: ll.scale(model, {"layers.0": 0.5}), "merged", "ll.unmerge(model)")
    ll.unmerge(model)
    handle.scale({"layers.0": 0.5})
    assert set(coefficients(handle).values()) == {0.5, 1.0}


def test_thirds_of_24_blocks_are_8_8_8():
    paths = [f"model.layers.{i}.q_proj" for i in range(24)]
    patterns = ll.thirds(paths, 0.25, 0.4, 0.6)
    assert patterns == {"layers.0-7": 0.25, "layers.8-15": 0.4, "layers.16-23": 0.6}
    for n in (1, 2, 3, 7, 13):
        of_path = gains(ll.thirds(paths[:n], 1 / 4, 2 / 4, 3 / 4), paths[:n])
        expected = [1 / 4 if i < n / 3 else 2 / 4 if i < 2 * n / 3 else 3 / 4 for i in range(n)]
        assert list(of_path.values()) == expected
    assert ll.thirds(["0", "5.q_proj"], 1, 2, 3) == {"0-1": 1, "4-5": 3}
    refusal(lambda: ll.thirds(["q_proj"], 1, 2, 3), "numbered block")


# --- the choice of gains ----------------------------------------------------------------------------------------------


def test_route_is_greedy_in_natural_order_with_exactly_groups_times_grid_calls():
    model, handle = adapted(11)
    select, report, seen = object(), object(), []
    aim = {f"layers.{i}": (0.5 if i % 2 else 1.0) for i in range(11)}

    def score(data):
        assert data is select
        now = {path.rpartition(".")[0]: coeff for path, coeff in coefficients(handle).items()}
        seen.append(now)
        return -sum(abs(now[block] - aim[block]) for block in aim)

    found = ll.route(model, "layer", (0.0, 0.5, 1.0), score=score, select=select, report=report)
    assert len(seen) == 11 * 3
    assert list(found.gains) == [f"layers.{i}" for i in range(11)]
    assert found.gains == aim
    assert seen[0]["layers.0"] == 0.0
    assert all(now[f"layers.{i}"] == 1.0 for k, now in enumerate(seen) for i in range(k // 3 + 1, 11))
    assert set(coefficients(handle).values()) == {1.0}
    assert found.measure(lambda data: (data is report, coefficients(handle)["layers.1.q_proj"])) == (True, 0.5)
    with found.scale():
        assert set(coefficients(handle).values()) == {0.5, 1.0}
    assert set(coefficients(handle).values()) == {1.0}


def test_a_tie_keeps_the_present_gain():
    model, _ = adapted()
    found = ll.route(model, "module", (0.0, 1.0, 0.5), score=lambda _: 3.0, select=[1], report=[2])
    assert set(found.gains.values()) == {1.0}
    assert len(found.gains) == 12


def test_route_over_adapters_weighs_them_by_name():
    model, _ = adapted()
    toy.perturb(ll.attach(model, ll.config("ia3"), name="second"))

    def score(_):
        return {row.name: row.coeff for row in ll.status(model).layers}["second"]

    found = ll.route(model, "adapter", (0.0, 1.0, 1.5), score=score, select=[1], report=[2])
    assert found.gains == {"default": 1.0, "second": 1.5}


@pytest.mark.parametrize("at", [0.0, 1.0])
def test_a_score_that_is_nan_ends_a_route_with_the_coefficients_of_before(at):
    model = toy.toy()
    ll.attach(model, ll.config("lora"))
    ll.scale(model, 0.5)

    def score(_):
        return float("nan") if ll.status(model).layers[0].coeff == 0.5 * at else 1.0

    refusal(lambda: ll.route(model, "layer", (0.0, 1.0), score=score, select=[1], report=[2]), f"gain {at:g} is NaN")
    assert {row.coeff for row in ll.status(model).layers} == {0.5}


def test_route_refuses_a_grid_without_1_and_one_data_set_for_both():
    model, _ = adapted()
    data, calls = [1], []
    arguments = {"score": calls.append, "select": data, "report": [1]}
    refusal(lambda: ll.route(model, "layer", (0.0, 0.5), **arguments), "1 among them")
    refusal(lambda: ll.route(model, "layer", (1.0, 0.5, 0.5), **arguments), "Different finite gains")
    refusal(lambda: ll.route(model, "layer", (1.0, float("nan")), **arguments), "Different finite gains")
    refusal(lambda: ll.route(model, "head", (1.0,), **arguments), "'head'")
    refusal(lambda: ll.route(model, "layer", (1.0,), **{**arguments, "report": data}), "the same object")
    refusal(lambda: ll.route(toy.toy(), "layer", (1.0,), **arguments), "no adapter")
    assert not calls


def test_natural_order_counts():
    names = ["layers.10.q", "layers.9.q", "head", "layers.9.o", "layers.0"]
    assert sorted(names, key=natural) == ["head", "layers.0", "layers.9.o", "layers.9.q", "layers.10.q"]


METRICS = ("accretion_a", "interference_a", "interference_b", "learning_b", "learning_c")


def test_the_frontier_is_that_of_the_golden_numbers_and_0_for_the_unchanged_route():
    sequential, routed = (dict(zip(METRICS, v)) for v in ((0.2, 0.4, 0.5, 2.0, 1.0), (0.1, 0.0, 0.1, 1.8, 1.6)))
    assert ll.frontier(routed, sequential, centred=False) == pytest.approx(1.25)
    assert ll.frontier(routed, sequential) == pytest.approx(1.25 + 0.4 + 0.5 / 4)
    unchanged = {**sequential, "accretion_a": 0.2 - 0.4, "learning_b": 2.0 - 0.5}  # both counted up to the last phase
    assert ll.frontier(unchanged, sequential) == pytest.approx(0.0)


def test_the_unchanged_route_is_the_sequence():
    model = toy.toy()
    handle, shots, x = ll.attach(model, ll.config("lora", r=2)), [], toy.inputs(4, toy.WIDTH)
    for seed in range(3):
        shots.append(ll.snapshot(toy.perturb(handle, seed=seed).model))
    want = model(x)
    handle.detach()
    for space in ("delta", "factor"):
        with ll.apply(model, ll.compose("A+B+C", chain=dict(zip("ABC", shots)), space=space), name="mix"):
            assert torch.equal(model(x), want)
