"""Calibration in several passes: the same adapter as in one, and never more sums at once than allowed."""

import gc
import threading
import weakref

import pytest
import torch
from torch.utils.checkpoint import checkpoint

import lora_lite as ll
from lora_lite.calibration import measure as measuring
from lora_lite.calibration import passes
from lora_lite.calibration.measure import measure
from lora_lite.calibration.statistics import parse
from lora_lite.sites.model import linears
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


# --- other threads ----------------------------------------------------------------------------------------------------------


class Normed(torch.nn.Module):
    """A norm behind a writer, experts in a list, checkpointed or not: every kind of hook that calibration has."""

    def __init__(self, reentrant=None):
        super().__init__()
        self.reentrant = reentrant
        self.in_proj, self.q_proj, self.o_proj = (torch.nn.Linear(6, 6) for _ in range(3))
        self.norm = torch.nn.RMSNorm(6)
        self.experts = torch.nn.ModuleList([torch.nn.Linear(6, 6), torch.nn.Linear(6, 6)])

    def inner(self, x):
        return self.norm(self.o_proj(torch.tanh(self.q_proj(x))))

    def forward(self, x, attention_mask=None):
        y = self.in_proj(x)
        y = self.inner(y) if self.reentrant is None else checkpoint(self.inner, y, use_reentrant=self.reentrant)
        rows = x.flatten(0, -2)
        return y + torch.cat([self.experts[0](rows[:5]), self.experts[1](rows[5:])]).reshape(y.shape)


def in_a_thread(work):
    errors = []

    def guarded():
        try:
            work()
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=guarded)
    thread.start()
    thread.join()
    if errors:
        raise errors[0]


def padded(seed, *shape):
    mask = torch.ones(shape, dtype=torch.long)
    mask[0, -1] = 0
    return {"x": toy.inputs(*shape, 6, seed=seed).requires_grad_(), "attention_mask": mask}


FORWARD, BACKWARD = ("n", "calls", "x_moment", "y_sum/last", "norm"), ("n", "y_moment", "wgrad", "terms")


def mean_square(model, batch):
    return model(**batch).square().mean(), 1.0


def same(got, want, names):
    return all(torch.equal(got[name][path], want[name][path]) for name in names for path in want[name])


@pytest.mark.parametrize(
    ("reentrant", "names"),
    [(None, FORWARD), (None, BACKWARD), (False, BACKWARD), (True, BACKWARD)],
    ids=["forward", "backward", "checkpoint", "reentrant"],
)
def test_calls_in_other_threads_do_not_count(reentrant, names):
    """Another thread calls the whole model, with a gradient too, between any two modules of a call that is measured."""
    model, data = toy.seeded(lambda: Normed(reentrant)), [padded(1, 3, 4), padded(2, 2, 5)]
    layers, other, me, served = linears(model), padded(3, 3, 4), threading.get_ident(), []

    def serve(module, args):
        if threading.get_ident() == me and len(served) < 40:
            in_a_thread(lambda: served.append(model(**other).sum()))

    want = measure(model, layers, names, data, mean_square)
    handles = [module.register_forward_pre_hook(serve) for module in model.modules()]
    got = measure(model, layers, names, data, mean_square)
    for handle in handles:
        handle.remove()
    assert len(served) > 10
    assert same(got, want, names)
    assert all(len(w) == 2 for path, w in want.get("norm", {}).items() if path == "o_proj")


@pytest.mark.parametrize("reentrant", [False, True], ids=["checkpoint", "reentrant"])
def test_a_recomputation_in_a_thread_of_autograd_counts(reentrant, monkeypatch):
    """As autograd does on accelerators."""
    model, data = toy.seeded(lambda: Normed(reentrant)), [padded(1, 3, 4)]
    layers, backward = linears(model), measuring.backward
    want = measure(model, layers, BACKWARD, data, mean_square)
    monkeypatch.setattr(measuring, "backward", lambda loss: in_a_thread(lambda: backward(loss)))
    assert same(measure(model, layers, BACKWARD, data, mean_square), want, BACKWARD)
    assert all(want["wgrad"][path].any() for path in layers)


@pytest.mark.filterwarnings("ignore:the calibration data gives no loss")
@pytest.mark.parametrize("name", STARTED)
@pytest.mark.parametrize("scale", [1e38, torch.inf])
def test_data_beyond_float32_is_refused_by_layer_and_batch(name, scale):
    data = toy.batches(count=2)
    data[1]["x"] = data[1]["x"] * scale
    with pytest.raises(ll.LoraLiteError, match=r"calibration_data\[1\]: blocks.0.q_proj.*(overflow float32|not finite)"):
        ll.attach(toy.toy(), config(name), data)


HARD = {
    "constant": (torch.ones_like, torch.float16),
    "zero": (torch.zeros_like, torch.float32),
    "one token": (lambda x: x[:1, :1], torch.bfloat16),
    "tiny": (lambda x: 1e-30 * x, torch.float32),
}


@pytest.mark.filterwarnings("ignore::lora_lite.LoraLiteWarning")
@pytest.mark.parametrize("name", STARTED)
@pytest.mark.parametrize("hard", HARD)
def test_hard_data_gives_finite_adapters_or_names_a_layer(hard, name):
    make, dtype = HARD[hard]
    model = toy.toy().to(dtype)
    data = [make(batch["x"]).to(dtype) for batch in toy.batches(count=2)]
    try:
        handle = ll.attach(model, config(name), {"positive": data, "negative": data[::-1]})
    except ll.LoraLiteError as error:
        if "blocks." not in str(error):
            raise
        return
    assert all(t.isfinite().all() for adapter in handle.layers.values() for t in adapter.state_dict().values())
    assert model(data[0]).isfinite().all()


@pytest.mark.parametrize("name", STARTED)
def test_layers_of_one_input_or_output_are_measured(name):
    class Narrow(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.up_proj, self.o_proj = torch.nn.Linear(1, 8), torch.nn.Linear(8, 1)

        def forward(self, x):
            return self.o_proj(torch.tanh(self.up_proj(x)))

    model, x = toy.seeded(Narrow), toy.inputs(4, 9, 1)
    names = [n for n in ll.get(name).needs(config(name)) if ":" not in n]
    got = measure(model, linears(model), names, [x], lambda model, batch: model(batch).square().mean())
    assert all(got[n][path].isfinite().all() for n in names for path in linears(model))
