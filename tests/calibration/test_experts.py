"""Experts in a list, which see some tokens each: what counts there, and layers that the data says too little of."""

import warnings

import pytest
import torch
from torch import nn

import lora_lite as ll
from lora_lite.calibration import TooLittleData, passes
from lora_lite.calibration.enough import left_out
from lora_lite.calibration.measure import measure
from lora_lite.sites.model import linears
from lora_lite.testing import toy
from lora_lite.testing.checks import error

MASK = torch.ones(4, 16, dtype=torch.long)
MASK[0, 8:] = 0
MASK[2, :5] = 0


def ids(seed=1):
    return torch.randint(1, 64, (4, 16), generator=torch.Generator().manual_seed(seed))


class Expert(nn.Module):
    def __init__(self):
        super().__init__()
        self.up_proj, self.down_proj = nn.Linear(16, 24), nn.Linear(24, 16)

    def forward(self, x):
        return self.down_proj(torch.tanh(self.up_proj(x)))


class Experts(nn.Module):
    """As Mixtral's list of experts; scaled: rows are multiplied before the expert, which hides where they come from."""

    def __init__(self, count, k, scaled=False):
        super().__init__()
        self.k, self.scaled, self.gate = k, scaled, nn.Linear(16, count, bias=False)
        self.experts = nn.ModuleList(Expert() for _ in range(count))

    def forward(self, hidden):
        x = hidden.reshape(-1, 16)
        weight, chosen = self.gate(x).softmax(-1).topk(self.k, -1)
        out = torch.zeros_like(x)
        for index, expert in enumerate(self.experts):
            token, slot = (chosen == index).nonzero(as_tuple=True)
            if len(token):
                rows = x[token] * weight[token, slot, None] if self.scaled else x[token]
                out = out.index_add(0, token, expert(rows) * weight[token, slot, None])
        return out.view_as(hidden)


class Model(nn.Module):
    def __init__(self, count=4, k=2, scaled=False):
        super().__init__()
        self.emb, self.q_proj, self.moe = nn.Embedding(64, 16), nn.Linear(16, 16), Experts(count, k, scaled)

    def forward(self, input_ids, attention_mask=None):
        x = self.emb(input_ids)
        return self.moe(x + torch.tanh(self.q_proj(x)))


def model(*args):
    return toy.seeded(lambda: Model(*args)).eval()


def expected(made, words, mask, name):
    """{path: (tokens, sum of x)} of the kept (or last kept) tokens of each expert layer, from its own forward pass."""
    kept = mask.bool()
    if name == "last":
        place = torch.arange(mask.shape[1])
        kept = kept & (place == torch.where(kept, place, -1).amax(1, keepdim=True))
    one = {}
    hooks = [
        layer.register_forward_hook(lambda _, args, y, path=path: one.setdefault(path, []).append(args[0].detach().double()))
        for path, layer in linears(made).items()
        if "experts" in path
    ]
    for row in range(len(words)):
        for t in range(words.shape[1]):
            if kept[row, t]:
                made(words[row : row + 1, t : t + 1])
    for hook in hooks:
        hook.remove()
    return {path: (sum(map(len, parts)), torch.cat(parts).sum(0)) for path, parts in one.items()}


@pytest.mark.parametrize("position", ["", "last"])
@pytest.mark.parametrize("k", [1, 2, 4])
def test_tokens_of_experts_are_found_among_all_and_padding_dropped(position, k):
    """Against single tokens, one call each. With k = 4 every expert sees every token."""
    made, words = model(4, k), ids()
    at = f"/{position}" if position else ""
    paths = {path: layer for path, layer in linears(made).items() if "experts" in path}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        got = measure(made, paths, (f"n{at}", f"x_sum{at}"), [{"input_ids": words, "attention_mask": MASK}], partly=True)
    want = expected(made, words, MASK, position)
    assert set(want) == set(paths) - set(got["lacking"])
    for path, (n, total) in want.items():
        assert got[f"n{at}"][path] == n
        assert error(got[f"x_sum{at}"][path], total) < 1e-5, path


def test_equal_tokens_of_which_some_are_padding_count_as_often_as_they_are_kept():
    made, words = model(4, 1), torch.full((4, 16), 7)
    paths = {path: layer for path, layer in linears(made).items() if "experts" in path}
    n = measure(made, paths, ["n"], [{"input_ids": words, "attention_mask": MASK}], partly=True)["n"]
    assert {int(v) for v in n.values()} == {51}


def test_gradients_of_experts_leave_padding_out():
    made, words = model(), ids()
    paths = {path: layer for path, layer in linears(made).items() if "experts" in path}

    def loss(made, batch):
        return made(batch["input_ids"]).sin().sum()

    got = measure(made, paths, ["wgrad"], [{"input_ids": words, "attention_mask": MASK}], loss, partly=True)["wgrad"]
    y = made(words)
    want = torch.autograd.grad(y[MASK.bool()].sin().sum(), [layer.weight for layer in paths.values()])
    for path, gradient in zip(paths, want):
        assert error(got[path], gradient.double()) < 1e-4, path


def test_rows_that_are_not_found_are_counted_whole_and_it_is_said_once():
    made = model(4, 2, True)
    paths = {path: layer for path, layer in linears(made).items() if "experts" in path}
    with pytest.warns(ll.LoraLiteWarning, match=r"experts.*do not follow attention_mask.*padding included") as seen:
        n = measure(made, paths, ["n"], [{"input_ids": ids(), "attention_mask": MASK}])["n"]
    assert len(seen) == 1
    assert sum(n[path] for path in n if "up" in path) == 2 * 64
    with pytest.raises(ll.LoraLiteError, match=r"moe.experts.\d.up_proj sees activations"):
        measure(made, paths, ["n/last"], [{"input_ids": ids(), "attention_mask": MASK}])


@pytest.mark.filterwarnings("ignore:.*parameters of experts")
@pytest.mark.parametrize("name", ["corda", "eva", "lora_ga", pytest.param("antipasto_corda", marks=pytest.mark.long)])
@pytest.mark.parametrize(
    ("targets", "turns"),
    [
        ("all-linear", False),
        (("up_proj", "down_proj"), True),
        pytest.param("all-linear", True, marks=pytest.mark.long),
        pytest.param(("up_proj", "down_proj"), False, marks=pytest.mark.long),
    ],
)
def test_experts_that_too_few_tokens_reach_are_left_out_and_it_is_said_once(name, targets, turns, monkeypatch):
    if turns:
        monkeypatch.setattr(passes, "LEAST", 1)
        monkeypatch.setattr(passes, "SHARE", 10**9)
    made = model(24, 1)
    fields = {"loss_fn": lambda made, batch: made(**batch).square().sum()} if name == "lora_ga" else {}
    fields |= {"roles": None} if name == "antipasto_corda" else {}
    with pytest.warns(ll.LoraLiteWarning, match=r"layers are left out, the calibration data says too little.*experts") as seen:
        handle = ll.attach(
            made, ll.config(name, r=2, targets=targets, **fields), [{"input_ids": ids(), "attention_mask": MASK}]
        )
    assert len([w for w in seen if "left out" in str(w.message)]) == 1
    met = measure(made, linears(made), ["n"], [{"input_ids": ids(), "attention_mask": MASK}], partly=True)["n"]
    least = {"eva": 4, "lora_ga": 4}.get(name, 2)
    wanted = [p for p in linears(made) if (targets == "all-linear" or "experts" in p) and met.get(p, 0) >= least]
    assert set(handle.layers) <= set(wanted)
    assert len(handle.layers) > len(wanted) // 2
    assert torch.isfinite(made(ids())).all()


def test_nothing_is_left_out_where_all_lack_or_where_the_user_named_a_layer_without_fellows():
    one = TooLittleData({"a.0.q": "3 tokens"})
    assert left_out({"a.0.q": one}, ["a.0.q", "a.1.q"], False) == {"a.0.q": "3 tokens"}
    assert left_out({"a.0.q": one}, ["a.0.q", "b"], True) == {"a.0.q": "3 tokens"}
    with pytest.raises(TooLittleData, match=r"a\.0\.q: 3 tokens"):
        left_out({"a.0.q": one}, ["a.0.q", "b"], False)
    with pytest.raises(TooLittleData):
        left_out({"a.0.q": one}, ["a.0.q"], True)
    silent = TooLittleData({"b": "never called"}, called=False)
    with pytest.raises(TooLittleData):
        left_out({"b": silent}, ["b", "a.0.q"], True)


# --- tokens and their rank -------------------------------------------------------------------------------------------


def line(count=64, equal=False):
    one = toy.inputs(1, 24)
    return one.repeat(count, 1) if equal else one * torch.linspace(0.5, 1.5, count)[:, None]


@pytest.mark.parametrize("equal", [True, False])
@pytest.mark.parametrize(
    ("name", "fields"),
    [
        ("eva", {"rho": 1.0}), ("eva", {}), ("eva", {"center": False}), ("eva", {"max_moment_dim": 0, "rho": 1.0}),
        ("antipasto_corda", {}),
        ("corda", {"damp": 0.0}), ("corda", {"damp": 0.0, "metric": "sqrt"}), ("corda", {"damp": 0.0, "call_norm": True}),
        ("antipasto", {"basis": "corda"}), ("antipasto", {"basis": "corda_full"}),
    ],
)  # fmt: skip
@pytest.mark.parametrize("d_out", [32, 24, 16])
def test_many_tokens_of_one_direction_are_not_enough(name, fields, d_out, equal):
    made = toy.one(24, d_out)
    data = [line(equal=equal).abs()]
    with pytest.raises(ll.LoraLiteError, match=r"o_proj: the calibration tokens span [01] directions? there beyond rounding"):
        ll.attach(made, ll.config(name, r=4, roles=None, **fields), data)


@pytest.mark.parametrize("rank", [4, 6])
@pytest.mark.parametrize("massive", [1.0, 1e3])
@pytest.mark.parametrize(
    ("name", "fields"), [("eva", {"rho": 1.0}), ("corda", {"damp": 0.0}), ("antipasto", {"basis": "corda"})]
)
def test_as_many_directions_as_the_rank_are_enough_beside_a_massive_channel_too(name, fields, rank, massive):
    made = toy.one(24, 32)
    x = toy.inputs(64, rank) @ toy.inputs(rank, 24, seed=2)
    x[:, 3] *= massive
    handle = ll.attach(made, ll.config(name, r=4, roles=None, **fields), [x])
    assert list(handle.layers) == ["o_proj"]


def test_eva_gives_no_ranks_to_rounding():
    """One layer's inputs span two directions, its fellow's all: the ranks go to the fellow."""

    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.q_proj, self.o_proj = nn.Linear(24, 24), nn.Linear(24, 24)

        def forward(self, x):
            return self.q_proj(x @ self.few) + self.o_proj(x)

    made = toy.seeded(Two)
    made.few = toy.inputs(24, 2) @ toy.inputs(2, 24, seed=2)
    handle = ll.attach(made, ll.config("eva", r=4), [toy.inputs(200, 24)])
    assert {path: len(a.A) for path, a in handle.layers.items()} == {"q_proj": 2, "o_proj": 6}
