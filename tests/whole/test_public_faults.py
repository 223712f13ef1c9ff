"""Where public code is wrong: each property is one function, which ours satisfies and the wrong version written here fails."""

import dataclasses
import math
import tempfile
import types
import typing
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import lora_lite as ll
from lora_lite.contract import AdapterConfig, registry
from lora_lite.core import checkpoint
from lora_lite.errors import LoraLiteWarning
from lora_lite.families.subspace import rotation
from lora_lite.mathematics import maps, rotations
from lora_lite.testing import toy
from lora_lite.testing.checks import error
from lora_lite.testing.formula import adapted
from tests.mathematics.test_maps import descend
from tests.oracles.kinds import one_of_each_kind
from tests.oracles.layer import input_map
from tests.variants.test_hra import chain

I8 = torch.eye(8, dtype=torch.float64)

# --- HRA: the order of the reflections --------------------------------------------------------------------------------


def follows_the_papers_order(turn: Callable) -> bool:
    """W' = W H_0 ... H_(r-1): the last row reflects x first. At random rows, since equal pairs hide the order."""
    V = toy.inputs(4, 8, dtype=torch.float64)
    return error(turn(V), chain(V)) < 1e-9


def our_reflections(V):
    _, adapter = adapted(ll.HRAConfig(r=4), d_in=8, size=0)
    with torch.no_grad():
        adapter.V.copy_(V)
    return input_map(adapter).T


def reversed_reflections(V):
    return chain(V.flip(0))


def test_order_of_reflections():
    assert follows_the_papers_order(our_reflections)
    assert not follows_the_papers_order(reversed_reflections)
    pairs = toy.inputs(2, 8, dtype=torch.float64).repeat_interleave(2, dim=0)
    assert error(reversed_reflections(pairs), chain(pairs)) < 1e-9  # so that a test at the start cannot see the fault


# --- OFT: the exact and the series branch -----------------------------------------------------------------------------


def branches_turn_the_same_way(exact: Callable, series: Callable) -> bool:
    X = rotations.skew(0.05 * toy.inputs(1, 28, dtype=torch.float64), 8)
    return error((exact(X) - I8)[0], (series(X) - I8)[0]) < 0.1 * float((exact(X) - I8).abs().max())


def series(X):
    """Five terms, with the sign that published code has: (I + X)(I + X + X^2 + ...)."""
    return (I8 + X) @ sum(torch.linalg.matrix_power(X, n) for n in range(5))


def ours_exact(X):
    return I8 + rotations.cayley_shift(X)


def published_exact(X):
    return torch.linalg.solve(I8 + X, I8 - X)


def test_exact_and_series_branch_of_oft():
    assert branches_turn_the_same_way(ours_exact, series)
    assert not branches_turn_the_same_way(published_exact, series)
    assert branches_turn_the_same_way(lambda X: published_exact(X).mT, series)  # the transpose, and nothing else


# --- block rotations: a bound on entries is none on angles ------------------------------------------------------------

LARGEST = 0.5


def keeps_the_angle(turn: Callable, b: int) -> bool:
    count = b * (b - 1) // 2
    for theta in (1e3 * toy.inputs(20, count, dtype=torch.float64), torch.full((1, count), 5.0, dtype=torch.float64)):
        R = torch.eye(b, dtype=torch.float64) + turn(theta, b)
        if float(torch.linalg.eigvals(R).angle().abs().max()) > LARGEST + 1e-9:
            return False
    return True


def bounded_whole(theta, b):
    return rotation(theta, 1.0, b, LARGEST)


def bounded_by_entries(theta, b):
    most = math.tan(LARGEST / 2)
    return rotations.cayley_shift(most * torch.tanh(rotations.skew(theta, b) / most))


def test_bound_on_rotation_angles():
    assert all(keeps_the_angle(bounded_whole, b) for b in (2, 3, 4, 8))
    assert keeps_the_angle(bounded_by_entries, 2)
    assert not any(keeps_the_angle(bounded_by_entries, b) for b in (3, 4, 8))


# --- DeLoRA: the first step -------------------------------------------------------------------------------------------


def first_step_is_small(**fields) -> bool:
    """A step of the optimizer a tenth as long moves the layer about a tenth as far: nothing jumps off the start."""
    moved = []
    for lr in (1e-3, 1e-4):
        model, adapter = adapted(ll.DeLoRAConfig(**fields), size=0)
        x = toy.inputs(5, 24, dtype=torch.float64)
        before = model(x).detach()
        optimizer = torch.optim.SGD([p for name, p in adapter.named_parameters() if name != "lam"], lr=1.0)
        (before - model(x) * toy.inputs(5, 32, dtype=torch.float64, seed=4)).sum().backward()
        for p in adapter.parameters():
            p.grad = None if p.grad is None else lr * p.grad.sign()  # what Adam's first step is
        optimizer.step()
        moved.append(error(model(x), before))
    return moved[1] < 0.2 * moved[0]


def test_first_step_of_delora():
    assert first_step_is_small(r=8)
    assert not first_step_is_small(r=8, start="zero_b")  # the start of published code, which ours offers for parity


# --- clamped strengths ------------------------------------------------------------------------------------------------


def comes_back_from_outside(held: Callable) -> bool:
    """Pushed out of [0, 2] at 0 and then pulled to 2, a parameter arrives there."""
    return descend(held)[-1][1] == 2.0


def test_clamped_strengths_do_not_absorb():
    assert comes_back_from_outside(maps.box)
    assert not comes_back_from_outside(torch.clamp)


# --- weight decay -----------------------------------------------------------------------------------------------------


def decays_to_the_base(groups: list, output: Callable, base: torch.Tensor) -> bool:
    """With no other gradient, what decay alone leaves is the base layer."""
    optimizer = torch.optim.AdamW(groups)
    for group in groups:
        for p in group["params"]:
            p.grad = torch.zeros_like(p)
    for _ in range(80):
        optimizer.step()
    with torch.no_grad():
        return error(output(), base) < 1e-6


IDENTITY_ONE = {"ia3": {}, "ia3_ff": {}, "road": {"mode": "road_2"}, "boft": {"scale": True}}
"""Methods whose papers train something from 1, with the option that has it."""


@pytest.mark.parametrize("name", IDENTITY_ONE)
def test_decay_where_the_identity_is_one(name):
    model, adapter = adapted(ll.config(name, **IDENTITY_ONE[name]))
    x = toy.inputs(5, 24, dtype=torch.float64)
    with ll.disabled(model):
        base = model(x)
    assert error(model(x), base) > 0.05
    assert decays_to_the_base(ll.param_groups(model, lr=0.1, weight_decay=5.0), lambda: model(x), base)
    assert all(spec.decay and spec.identity == 0 for spec in adapter.specs().values())

    gains = torch.nn.Parameter(1 + 0.3 * toy.inputs(32, dtype=torch.float64))
    published = [{"params": [gains], "lr": 0.1, "weight_decay": 5.0}]
    assert not decays_to_the_base(published, lambda: gains * base, base)


# --- options without effect -------------------------------------------------------------------------------------------

COMMON = {f.name for f in dataclasses.fields(AdapterConfig)} - {"r", "alpha", "rslora"}
DATA = {"positive": toy.batches(count=2), "negative": toy.batches(count=4)[2:]}


def portrait(cls: type, cfg: AdapterConfig) -> list:
    """What an option may act on: declarations, statistics, warnings, start, outputs, gradients, optimizer groups, the file."""
    model, x = toy.toy(), toy.inputs(2, 5, toy.WIDTH)
    seen: list = [cls.needs(cfg), cls.wants(cfg)]
    with registry.borrowed(cls), warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always", LoraLiteWarning)
        handle = ll.attach(model, cfg, DATA if cls.needs(cfg) or cls.wants(cfg) else None)
        seen.append(sorted(str(w.message) for w in said))
        seen += [{k: dataclasses.replace(s, start=torch.zeros) for k, s in a.specs().items()} for a in handle.layers.values()]
        seen += [t.clone() for a in handle.layers.values() for t in a.state_dict().values()]
        for size in (0.0, 0.3):  # at the start, where a gradient alone may differ, and off it
            toy.perturb(handle, size)
            model.zero_grad()
            out = model(x)
            (out * toy.inputs(2, 5, toy.WIDTH, seed=5)).sum().backward()
            seen += [out.detach(), *(p.grad for p in handle.parameters())]
        groups = ll.param_groups(model, weight_decay=0.1)
        seen += [[(g["lr"], g["weight_decay"], len(g["params"])) for g in groups]]
        with tempfile.TemporaryDirectory() as folder:
            ll.save(model, Path(folder) / "a.safetensors")
            seen.append(sorted(checkpoint.read(Path(folder) / "a.safetensors")[1]))
    return seen


def same(a: list, b: list) -> bool:
    return len(a) == len(b) and all(
        torch.equal(p, q) if isinstance(p, torch.Tensor) and isinstance(q, torch.Tensor) else p is q or p == q
        for p, q in zip(a, b)
    )


def other_values(hint: object, default: object) -> list[list]:
    """Groups of values beside the default; one of each group at least must act."""
    options = typing.get_args(hint) if typing.get_origin(hint) in (typing.Union, types.UnionType) else (hint,)
    groups: list[list] = []
    for option in options:
        if typing.get_origin(option) is typing.Literal:
            groups += [[value] for value in typing.get_args(option) if value != default]
        elif option is bool:
            groups.append([not default])
        elif option is int:
            groups.append([*([default // 2, default * 2] if default else []), 2, 4])
        elif option is float:
            groups.append([*([default * 2, default / 2] if default else []), 0.3, 1e-14])
        elif typing.get_origin(option) is Callable:
            groups.append([lambda model, batch: model(**batch).square().mean()])
        elif option is not types.NoneType:
            raise AssertionError(f"no values are known for an option of kind {option}")
    if None in options or types.NoneType in options:
        groups += [[None]] if default is not None else []
    return groups


def acts_or_is_refused(cls: type, field: str, cfg: AdapterConfig | None = None) -> bool:
    """Of every kind of value a lawful one changes something, alone or beside one other option; or all are refused."""
    cfg, hints = cfg or toy.small(cls), typing.get_type_hints(cls.Config)
    others = {
        f.name: other_values(hints[f.name], getattr(cfg, f.name)) for f in dataclasses.fields(cfg) if f.name not in COMMON
    }
    contexts = [{}] + [{name: v} for name, groups in others.items() if name != field for group in groups for v in group]

    without: dict[str, list] = {}

    def acts(context: dict, change: dict) -> bool | None:
        try:
            changed = portrait(cls, dataclasses.replace(cfg, **context, **change))
            if repr(context) not in without:
                without[repr(context)] = portrait(cls, dataclasses.replace(cfg, **context))
            return not same(without[repr(context)], changed)
        except ll.LoraLiteError:
            return None

    for group in others[field]:
        lawful = False
        for found in (acts(context, {field: value}) for context in contexts for value in group):
            lawful = lawful or found is not None
            if found:
                break
        else:
            if lawful:
                return False
    return True


BEYOND_THE_TOY = {("pissa", "svd")}
"""Options whose effect needs layers above 2048 wide: tests/mathematics/test_spectrum.py."""


@pytest.mark.parametrize("name", one_of_each_kind(ll.names()))
def test_every_option_acts_or_is_refused(name):
    cls = ll.get(name)
    assert same(portrait(cls, toy.small(cls)), portrait(cls, toy.small(cls)))
    fields = [f.name for f in dataclasses.fields(cls.Config) if f.name not in COMMON and (name, f.name) not in BEYOND_THE_TOY]
    assert [field for field in fields if not acts_or_is_refused(cls, field)] == []


@dataclasses.dataclass(frozen=True, kw_only=True)
class DeadConfig(ll.LoRAConfig):
    dropout: float = 0.0
    mode: typing.Literal["plain", "better"] = "plain"


class Dead(ll.get("lora")):  # type: ignore[misc]
    """Options that nothing reads, as the dropout of OFT in a public library."""

    Config = DeadConfig


def test_options_that_nothing_reads_are_found():
    with registry.borrowed(Dead):
        assert not acts_or_is_refused(Dead, "dropout")
        assert not acts_or_is_refused(Dead, "mode")
        assert acts_or_is_refused(Dead, "init")


@pytest.mark.parametrize("name", ll.names())
def test_dropout_is_refused(name):
    with pytest.raises(ll.LoraLiteError, match=r"no field '(module_)?dropout'"):
        ll.config(name, dropout=0.1)
