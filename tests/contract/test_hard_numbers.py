"""Every variant on numbers that no formula likes: lawful to the last bit, or a LoraLiteError that says what is wrong.

The cases stand in tests/oracles/hard.py. Every day for one variant of a kind, in the long suite for all and with options.
"""

import dataclasses
import math
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lora_lite as ll
from lora_lite.core.delta import effective
from lora_lite.testing import toy
from lora_lite.testing.checks import demand_same, photograph
from tests.oracles.hard import CASES, INPUTS, NARROW, SHAPES, Case
from tests.oracles.kinds import one_of_each_kind

TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 2**-6, torch.float16: 2**-9}
"""Of an output against its float64 map, as a share of the largest number on the way: some roundings of each dtype."""

RARE = {*SHAPES, *INPUTS, *NARROW, "zero, without a bias", "1e-30, rank 3", "1e30, rank 3", "parameters of 1e3"} - {
    "rank 3 in bfloat16", "1e-7 in float16", "1e4 in float16", "24 -> 1, r=1", "512 -> 2, r=2", "2 -> 1024, r=2",
    "infinities in x", "x of 1e30", "an empty batch of 3 axes", "1 axes", "5 axes", "strides", "a keyword",
}  # fmt: skip
"""Cases of the long suite, of a kind that others stand for every day."""


def configured(name: str, case: Case, **options: Any) -> ll.AdapterConfig:
    """The defaults at the rank of the case, with the largest lawful sizes where that is said to be too much."""
    fields = {f.name for f in dataclasses.fields(ll.get(name).Config)}
    sizes: dict[str, Any] = {"r": case.r} if ll.get(name).Config().r is not None else {}
    sizes |= {"k": min(case.r, 8)} if name == "antipasto_dplr" else {}
    sizes |= {"block_size": 2} if "block_size" in fields and case.i % 4 and case.i > 1 else {}
    cfg = ll.config(name, **{**sizes, "targets": ("o_proj",), "roles": None, **options})
    for _ in range(4):
        try:
            ll.get(name).param_specs(case.i, case.o, cfg)
            break
        except ll.LoraLiteError as error:
            if not error.lawful:
                raise
            cfg = dataclasses.replace(cfg, **error.lawful)
    return cfg


def check(name: str, case: Case, **options: Any) -> str:
    """'' where all is lawful, the error's text where it is refused. Raises AssertionError, and whatever else escapes."""
    model = case.model()
    before, base = photograph(model), case.run(model)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ll.LoraLiteWarning)
            cfg = configured(name, case, **options)
            handle = ll.attach(model, cfg, case.calibration(ll.get(name), cfg))
    except ll.LoraLiteError as error:
        demand_same(model, before, "after a refusal")
        return str(error)
    start, here = case.run(model), base.isfinite().all(-1)
    assert torch.equal(start[here], base[here]), "the start is not the base"
    report = handle.layers["o_proj"].report
    assert all(map(math.isfinite, report.values())), report
    check_gradients(case, handle, model, base)
    case.parameters(handle)
    with ll.scale(model, 0.0):
        assert torch.equal(case.run(model).nan_to_num(7), base.nan_to_num(7)), "coefficient 0 is not the base"
    for coeff in (1.0, -0.7):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ll.LoraLiteWarning)
            scaling = ll.scale(model, coeff)
        with scaling:
            check_output(case, handle, model, base)
    check_gradients(case, handle, model, base)
    check_merge(case, model)
    handle.detach()
    demand_same(model, before, "after detach")
    return ""


def wanted(case: Case, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """x W'^T + b' in float64, and what can be lost of it: (..., o) each, of one token by its own numbers."""
    x = case.x().double()
    return x @ weight.T + bias, x.abs() @ weight.abs().T + bias.abs()


def finite_tokens(case: Case, *outputs: Tensor) -> Tensor:
    """(...) bool: x and these outputs are finite, and no number of theirs near the end of the dtype."""
    most = torch.finfo(case.dtype).max / 64
    return torch.stack([(z.detach().abs() < most).all(-1) for z in (case.x(), *outputs)]).all(0)


@torch.no_grad()
def check_output(case: Case, handle: Any, model: nn.Module, base: Tensor) -> None:
    """Finite where the base is and the change can be held, and what the same map gives in float64."""
    (adapter,) = handle.layers.values()
    y = case.run(model)
    assert y.shape == base.shape
    assert y.dtype == base.dtype
    if adapter.claims.affine:
        weight, bias, W = effective(model.o_proj, [adapter])
        assert weight.isfinite().all(), "the map in float64 is not finite"
        assert bias.isfinite().all(), "the map in float64 is not finite"
        want, most = wanted(case, weight, bias)
        here = finite_tokens(case, base, most)
        assert y[here].isfinite().all(), "the output is not finite"
        if here.any():
            scale = torch.maximum(most[here], wanted(case, W, bias)[1][here]).amax(-1, keepdim=True)
            rounding = TOLERANCE[case.dtype] * scale + 8 * torch.finfo(case.dtype).smallest_normal
            share = float(((y[here].double() - want[here]).abs() / rounding).max())
            assert share < 1, f"{share * TOLERANCE[case.dtype]:.2g} off the map in float64"
    else:
        here = finite_tokens(case, base)
        assert y[here].isfinite().all(), "the output is not finite"


def check_gradients(case: Case, handle: Any, model: nn.Module, base: Tensor) -> None:
    """Of every trained tensor and of x, finite where the output is."""
    model.zero_grad()
    x = case.x().requires_grad_()
    y = case.run(model, x)
    if not finite_tokens(case, y, base).all():
        return
    adapter = handle.layers["o_proj"]
    largest = effective(model.o_proj, [adapter])[0].abs().sum() if adapter.claims.affine else 0.0
    held = 8 * largest < torch.finfo(case.dtype).max  # the gradient of x
    (y.float() * toy.inputs(*y.shape, seed=4) / max(1.0, case.scale)).sum().backward()
    for name, parameter in [*([("x", x)] if held else []), *adapter.named_parameters()]:
        assert parameter.grad is not None, f"{name} has no gradient"
        assert parameter.grad.isfinite().all(), f"the gradient of {name} is not finite"


@torch.no_grad()
def check_merge(case: Case, model: nn.Module) -> None:
    """As the adapted output within the dtype, or refused by name; unmerge brings every bit back."""
    y, before = case.run(model), photograph(model)
    try:
        ll.merge(model)
    except ll.LoraLiteError as error:
        if "o_proj" not in str(error):
            raise AssertionError(f"a refusal without a name: {error}") from error
        return
    merged = case.run(model)
    (weight, bias) = model.o_proj.weight.double(), model.o_proj.bias
    most = wanted(case, weight, torch.zeros(1) if bias is None else bias.double())[1]
    here = finite_tokens(case, y, most)
    if here.any():
        rounding = TOLERANCE[case.dtype] * most[here].amax(-1, keepdim=True) + 8 * torch.finfo(case.dtype).smallest_normal
        assert float(((merged[here] - y[here]).double().abs() / rounding).max()) < 2, "merged it is another map"
    ll.unmerge(model)
    demand_same(model, before, "after unmerge")


CALIBRATED = {"antipasto_asvd", "antipasto_corda", "corda", "eva", "lora_ga"}
OF_MOMENTS = {"antipasto_corda", "corda", "eva"}
REFUSED = {  # by whom; each says why, see the tests of its own
    "1e4 in float16": CALIBRATED,  # the base overflows on its calibration data
    "constant data": {"antipasto_corda", "eva"},
    "data of zeros": {"eva", "lora_ga"},
    "one token": CALIBRATED - {"antipasto_asvd"},
    "data of 1e-30": {"eva"},
    "data of 1e30": OF_MOMENTS,
}


def refusing(label: str) -> set[str]:
    case = CASES[label]
    if label in SHAPES and min(case.o, case.i) == 1:
        return set(ll.names())
    if label in SHAPES:  # a pair of directions, or 2 r of them
        return {"antipasto_arrow", "antipasto_rot", "hra"} if case.r == 1 else {"lora_ga"}
    return REFUSED.get(label, set())


DAILY = [pytest.param(label, marks=[pytest.mark.long] * (label in RARE)) for label in CASES]


@pytest.mark.parametrize("name", one_of_each_kind(ll.names()))
@pytest.mark.parametrize("label", DAILY)
def test_hard_numbers_are_lawful_or_refused_for_a_reason(label, name):
    refused = check(name, CASES[label])
    assert (not refused) == (name not in refusing(label)), refused


OPTIONS = {
    "antipasto": [
        {"basis": "corda", "damp": 0.1},
        {"basis": "corda_full"},
        {"basis": "asvd", "asvd_stat": "rms"},
        {"basis": "select"},
        {"basis": "select", "select_score": "contrast", "positions": "all"},
        {"basis": "select", "select_score": "contrast", "winsorize": 0.9},
        {"suppress_only": True, "include_bias": True},
    ],
    "antipasto_ablate": [
        {"k": 3, "seed_direction": "random"},
        {"k": 2, "seed_direction": "contrast"},
        {"seed_direction": "contrast", "add_contrast": False},
        {"k": 2, "seed_direction": "variance", "include_bias": False},
    ],
    "antipasto_arrow": [{"block": 7, "basis": "select", "block_by": "score"}],
    "antipasto_corda": [{"basis": "corda_full"}, {"damp": 0.1, "include_bias": True}],
    "antipasto_rot": [
        {"rotate": rotate, "max_angle": angle, "cap": cap}
        for rotate in ("V", "U", "both")
        for angle, cap in ((None, "block"), (0.5, "block"), (0.5, "plane"))
    ],
    "boft": [{"n_factors": 2, "scale": True}],
    "corda": [
        {"metric": metric, "method": method, "split": split, "call_norm": by_call, "damp": damp}
        for metric in ("full", "sqrt")
        for method, split in (("ipm", "balanced"), ("kpm", "paper"), ("kpm", "balanced"))
        for by_call, damp in ((False, 0.0), (True, 0.01))
    ],
    "delora": [{"start": "zero_b"}, {"norm": "fro", "buffer_dtype": torch.bfloat16}],
    "eva": [{"rho": 1.0, "max_moment_dim": 0}, {"center": False, "mask": "none"}],
    "lokr": [{"decompose_both": True}, {"init": "lycoris"}],
    "lora": [{"init": "orthogonal"}, {"dtype": torch.bfloat16}],
    "lora_ga": [{"scale": "unit", "direction": "ArBr"}, {"scale": "gd"}],
    "lora_xs": [{"basis": "corda", "damp": 0.1, "alpha": 16.0}],
    "pissa": [{"svd": "fast"}, {"svd": "exact", "buffer_dtype": torch.bfloat16}],
    "randlora": [{"r": 40}],
    "road": [{"mode": "road_2"}, {"mode": "road_4"}],
}
SETS = [pytest.param(name, options, id=f"{name}-{n}") for name, sets in OPTIONS.items() for n, options in enumerate(sets)]


@pytest.mark.long
@pytest.mark.parametrize(("name", "options"), SETS)
def test_hard_numbers_are_lawful_with_every_option(name, options):
    for label in CASES.keys() - INPUTS:
        try:
            check(name, CASES[label], **options)
        except Exception as error:
            raise AssertionError(f"{label}: {error!r}") from error
