"""Calibration in several passes: the same adapter as in one, and never more sums at once than allowed."""

import gc
import weakref

import pytest
import torch

import lora_lite as ll
from lora_lite.calibration import passes
from lora_lite.calibration.measure import measure
from lora_lite.calibration.statistics import parse
from lora_lite.testing import toy

STARTED = [name for name in ll.names() if any("moment" in n or "grad" in n for n in ll.get(name).needs(ll.config(name)))]


class Counted(list):
    """Batches that count how often they are read."""

    reads = 0

    def __iter__(self):
        self.reads += 1
        return super().__iter__()


def one_input_at_a_time(monkeypatch):
    monkeypatch.setattr(passes, "LEAST", 1)
    monkeypatch.setattr(passes, "SHARE", 10**9)


def config(name):
    return ll.config(name, r=2, targets="all-linear", roles=None)


@pytest.mark.parametrize("name", STARTED)
def test_several_passes_give_the_bits_of_one(name, monkeypatch):
    data = Counted(toy.batches(count=2))
    fields = {"loss_fn": lambda model, batch: model(**batch).square().mean()} if "loss_fn" in dir(ll.config(name)) else {}
    cfg = ll.config(name, r=2, targets="all-linear", roles=None, **fields)
    once, turns = toy.toy(), toy.toy()
    ll.attach(once, cfg, data)
    assert data.reads == 1
    one_input_at_a_time(monkeypatch)
    ll.attach(turns, cfg, data)
    assert data.reads > 4
    want, got = once.state_dict(), turns.state_dict()
    assert want.keys() == got.keys()
    assert all(torch.equal(want[key], got[key]) for key in want)


class Block(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.q_proj, self.k_proj, self.o_proj = (torch.nn.Linear(6, n) for n in (6, 4, 6))

    def forward(self, x):
        return self.o_proj(self.q_proj(x) * self.k_proj(x).mean(-1, keepdim=True))


def test_layers_that_share_an_input_are_measured_together(monkeypatch):
    one_input_at_a_time(monkeypatch)
    seen = []
    monkeypatch.setattr(
        passes, "measure", lambda m, layers, *rest, **kw: seen.append(list(layers)) or measure(m, layers, *rest, **kw)
    )
    ll.attach(Block(), config("corda"), [torch.randn(30, 6, generator=torch.Generator().manual_seed(0))])
    assert seen == [["q_proj", "k_proj", "o_proj"], ["q_proj", "k_proj"], ["o_proj"]]


def test_sums_of_a_group_are_freed_before_the_next_group_is_measured(monkeypatch):
    one_input_at_a_time(monkeypatch)
    model, alive, most = toy.toy(), [], []

    def spied(*args, **kwargs):
        gc.collect()
        most.append(sum(ref() is not None for ref in alive))
        sums = measure(*args, **kwargs)
        alive.extend(weakref.ref(tensor) for tensor in sums.get("x_moment|yx_moment", {}).values())
        return sums

    monkeypatch.setattr(passes, "measure", spied)
    ll.attach(model, config("corda"), toy.batches(count=1))
    assert len(alive) > 4
    assert set(most) == {0}


def test_data_that_can_be_read_once_is_read_once(monkeypatch):
    want = toy.toy()
    ll.attach(want, config("corda"), toy.batches(count=2))
    one_input_at_a_time(monkeypatch)
    got = toy.toy()
    ll.attach(got, config("corda"), iter(toy.batches(count=2)))
    assert all(torch.equal(a, b) for a, b in zip(want.state_dict().values(), got.state_dict().values()))


def test_a_pass_runs_the_base_without_adapters_and_under_the_callers_autocast(monkeypatch):
    want, got = toy.toy(), toy.toy()
    for model in (want, got):
        ll.attach(model, ll.config("lora", r=2, targets="all-linear", roles=None), name="other")
        for p in model.parameters():
            if p.requires_grad:
                torch.nn.init.normal_(p, generator=torch.Generator().manual_seed(1))
        if model is got:
            one_input_at_a_time(monkeypatch)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            ll.attach(model, config("corda"), toy.batches(count=2))
    assert all(torch.equal(a, b) for a, b in zip(want.state_dict().values(), got.state_dict().values()))


def test_groups_keep_their_order_and_their_limit():
    assert passes.grouped({("a",): 3, ("b", "c"): 4, ("d",): 1, ("e",): 9, ("f",): 1}, 7) == [
        ("a", "b", "c"),
        ("d",),
        ("e",),
        ("f",),
    ]


@pytest.mark.parametrize(
    ("names", "shapes", "want"),
    [
        (("x_moment",), [(3, 5), (3, 2)], 8 * 9),
        (("y_moment", "n"), [(3, 5), (3, 2)], 8 * (25 + 4 + 5)),
        (("x_moment|yx_moment",), [(3, 5), (3, 2)], 8 * 9),
        (("x_moment|yx_moment",), [(3, 2)], 8 * 6),
        (("x_sketch[2,4]",), [(5, 5)], 8 * 10),
        (("x_sketch[2,5]",), [(5, 5)], 8 * 25),
        (("wgrad",), [(3, 5)], 8 * 15),
    ],
)
def test_sizes_are_those_of_the_sums(names, shapes, want):
    assert passes.size_of([parse(name) for name in names], shapes) == want
