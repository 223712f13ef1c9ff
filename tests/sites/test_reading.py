"""Whether a module calls its layers or reads their weights, told from its source: branches, helpers, short cuts."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import lora_lite as ll
from lora_lite.errors import LoraLiteWarning
from lora_lite.sites.reading import readings

SLOW = False


class Holder(nn.Module):
    def __init__(self, exact=False):
        super().__init__()
        self.exact = exact
        self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)


class Called(Holder):
    def forward(self, x):
        if isinstance(self.b.weight, torch.Tensor) and x.dtype != self.b.weight.dtype:
            x = x.to(self.b.weight.dtype)
        return self.b(self.a(x))


class Read(Holder):
    def forward(self, x):
        return F.linear(self.a(x), self.b.weight, self.b.bias)


class InHelper(Holder):
    def forward(self, x):
        return self.last(self.a(x))

    def last(self, x):
        return x @ self.b.weight.T


class ByOwnFlag(Holder):
    def forward(self, x):
        x = self.a(x)
        return x @ self.b.weight.T if self.exact else self.b(x)


class ByFlagOfTheFile(Holder):
    def forward(self, x):
        x = self.a(x)
        if SLOW:
            return x @ self.b.weight.T
        return self.b(x)


class ByArgument(Holder):
    def forward(self, x, cache=None):
        if cache is not None:
            return x @ self.b.weight.T
        return self.b(self.a(x))


class InTraining(Holder):
    def forward(self, x, cache=None):
        if self.training and not self.exact and cache is None:
            return self.a(x) @ self.b.weight.T
        return self.b(self.a(x))


class ByInput(Holder):
    def forward(self, x):
        return self.a(x) @ self.b.weight.T if x.mean() > 0 else self.b(self.a(x))


class ByReassigned(Holder):
    def forward(self, x, cache=None):
        cache = x.sum() > 0
        return self.a(x) @ self.b.weight.T if cache is not None else self.b(self.a(x))


class OtherDoors(Holder):
    def predict(self, x):
        if self.training:
            return F.linear(self.a(x), self.b.weight)
        return self.b(self.a(x))

    def tie_to(self, other):
        self.a.weight = other.weight

    def forward(self, x):
        return x


class HandsItself(Holder):
    def forward(self, x):
        return run(self, x) + self.b.weight.sum()


def run(owner, x):
    return owner.b(owner.a(x))


CASES = [
    (Called(), "", ""),
    (Read(), "b", ""),
    (InHelper(), "b", ""),
    (ByOwnFlag(), "", ""),
    (ByOwnFlag(exact=True), "b", ""),
    (ByFlagOfTheFile(), "", ""),
    (ByArgument(), "", ""),
    (InTraining(), "", "b"),
    (InTraining(exact=True), "", ""),
    (ByInput(), "", "b"),
    (ByReassigned(), "", "b"),
    (OtherDoors(), "", "b"),
    (HandsItself(), "", ""),
    (nn.TransformerEncoderLayer(8, 2), "", ""),
]


@pytest.mark.parametrize(("owner", "only", "also"), CASES, ids=lambda case: type(case).__name__ if case else "")
def test_a_module_tells_whether_it_calls_its_layers(owner, only, also):
    assert readings(owner) == ({(name,) for name in only}, {(name,) for name in also}, set())


class Deep(nn.Module):
    """Layers at three depths."""

    def __init__(self):
        super().__init__()
        self.k, self.inner, self.enc = nn.Linear(8, 8), Called(), nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8))
        self.ls = nn.ModuleList(nn.Linear(8, 8) for _ in range(2))


class TiedAutoencoder(Deep):
    def forward(self, x):
        return F.linear(self.enc(x), self.enc[0].weight.t())


class Alias(Deep):
    def forward(self, x):
        k = self.k
        return self.inner(F.linear(x, k.weight, k.bias))


class AliasCalled(Deep):
    def forward(self, x):
        k = self.k
        return self.inner(k(x))


class Loop(Deep):
    def forward(self, x):
        for layer in self.ls:
            x = F.linear(x, layer.weight)
        return self.k(x)


class LoopCounted(Deep):
    def forward(self, x):
        for i, (one, two) in enumerate(zip(self.ls, reversed(self.ls))):
            x = x @ one.weight + i * two(x)
        return x


class Comprehension(Deep):
    def forward(self, x):
        return sum([F.linear(x, layer.weight) for layer in self.ls])


class LoopCalled(Deep):
    def forward(self, x):
        for layer in self.ls:
            x = layer(x).to(layer.weight.dtype)
        return x


class OfAnInnerOne(Deep):
    def forward(self, x):
        return F.linear(x, self.inner.b.weight)


class OfAnInnerOneThatRuns(Deep):
    def forward(self, x):
        return F.linear(self.inner(x), self.inner.b.weight)


class OtherName(Deep):
    def forward(s, x):
        return F.linear(x, s.k.weight)


class Unpacked(Deep):
    def forward(self, x):
        first, second = self.ls[0], self.ls[-1]
        return second(F.linear(x, first.weight))


class OneOfTwo(Deep):
    def forward(self, x):
        layer = self.k if x.sum() > 0 else self.inner.a
        return F.linear(x, layer.weight)


class OfItself(nn.Sequential):
    def forward(self, x):
        return self[0](x) @ self[1].weight


NEVER, BESIDE = "read, not called: {} uses its weight", "read: {} uses its weight beside the call"


@pytest.mark.parametrize(
    ("owner", "reason", "paths"),
    [
        (TiedAutoencoder(), BESIDE, "enc.0"),
        (Alias(), NEVER, "k"),
        (AliasCalled(), "", ""),
        (Loop(), NEVER, "ls.0 ls.1"),
        (LoopCounted(), BESIDE, "ls.0 ls.1"),
        (Comprehension(), NEVER, "ls.0 ls.1"),
        (LoopCalled(), "", ""),
        (OfAnInnerOne(), NEVER, "inner.b"),
        (OfAnInnerOneThatRuns(), BESIDE, "inner.b"),
        (OtherName(), NEVER, "k"),
        (Unpacked(), BESIDE, "ls.0"),
        (OneOfTwo(), NEVER, "k inner.a"),
        (OfItself(nn.Linear(8, 8), nn.Linear(8, 8)), NEVER, "1"),
    ],
    ids=lambda case: type(case).__name__,
)
def test_a_weight_is_read_by_whatever_name_and_from_whatever_height(owner, reason, paths):
    model = nn.ModuleDict({"m": owner, "other": nn.Linear(8, 8)})
    handle = ll.attach(model, ll.config("lora", r=2))
    assert handle.skipped == {f"m.{path}": reason.format(type(owner).__name__) for path in paths.split()}


def test_a_layer_that_is_read_in_a_branch_is_left_out_by_default_and_named_with_a_warning():
    model = nn.Sequential(InTraining())
    handle = ll.attach(model, ll.config("lora", r=2))
    assert list(handle.layers) == ["0.a"]
    assert handle.skipped == {"0.b": "read in a branch: InTraining calls it, or uses its weight without a call"}
    ll.detach(model)
    with pytest.warns(LoraLiteWarning, match=r"0\.b: read in a branch[\s\S]*the call alone"):
        ll.attach(model, ll.config("lora", r=2, targets=["0.b"]))
