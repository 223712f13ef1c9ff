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
    assert readings(owner) == (frozenset(only), frozenset(also))


def test_a_layer_that_is_read_in_a_branch_is_left_out_by_default_and_named_with_a_warning():
    model = nn.Sequential(InTraining())
    handle = ll.attach(model, ll.config("lora", r=2))
    assert list(handle.layers) == ["0.a"]
    assert handle.skipped == {"0.b": "read in a branch: InTraining calls it, or uses its weight without a call"}
    ll.detach(model)
    with pytest.warns(LoraLiteWarning, match=r"0\.b: the module around it calls the layer in one branch"):
        ll.attach(model, ll.config("lora", r=2, targets=["0.b"]))
