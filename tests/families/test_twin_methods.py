"""What the methods promise alike that fill Twin's A0 and B0, against the paper's formula in dense float64 and against PEFT."""

import pytest
import torch
from torch import nn

import lora_lite as ll
from lora_lite.testing import toy
from lora_lite.testing.checks import error
from lora_lite.testing.formula import adapted, check_dense
from tests.oracles.layer import check_parity, peft_layer
from tests.variants.test_lora_ga import loss_fn


def dense(a, W, b, c):
    return W + c * a.s * ((a.B0 + a.dB) @ (a.A0 + a.dA) - a.B0 @ a.A0), b


def started(cfg, weight, dtype=torch.float64):
    """(layer, adapter) right after attach on a layer with this weight."""
    model = nn.ModuleDict({"o_proj": nn.Linear(weight.shape[1], weight.shape[0], bias=False, dtype=dtype)})
    with torch.no_grad():
        model.o_proj.weight.copy_(weight)
    handle = ll.attach(model, cfg)
    return model.o_proj, handle.layers["o_proj"]


FORMS = [
    *(
        (name, fields)
        for name in ("olora", "pissa")
        for fields in ({"alpha": ll.config(name).alpha}, {"alpha": 8.0}, {"alpha": 8.0, "rslora": True})
    ),
    *(
        ("corda", {"method": method, "metric": metric, "split": split, "alpha": 8})
        for method in ("ipm", "kpm")
        for metric in ("full", "sqrt")
        for split in ("paper", "balanced")
    ),
    *(
        ("lora_ga", {"loss_fn": loss_fn, "direction": direction, "scale": scale, "rslora": root})
        for direction in ("ArB2r", "A2rBr", "ArBr")
        for scale in ("stable", "unit", "gd", "peft_stable")
        for root in (False, True)
    ),
]


@pytest.mark.parametrize(
    ("name", "fields"), FORMS, ids=["-".join(map(str, [n, *(v for k, v in f.items() if k != "loss_fn")])) for n, f in FORMS]
)
def test_output_and_gradients_equal_the_dense_form(name, fields):
    check_dense(ll.config(name, r=4, **fields), dense)


@pytest.mark.parametrize("name", ["olora", "pissa"])
def test_identity_does_not_depend_on_the_accuracy_of_the_factors(name):
    x = toy.inputs(5, 24)
    base = toy.one()(x)
    model, adapter = adapted(ll.config(name, r=4), dtype=torch.float32, size=0)
    with torch.no_grad():
        adapter.A0.add_(toy.inputs(4, 24))
        adapter.B0.copy_(1e4 * toy.inputs(32, 4))
    assert torch.equal(model(x), base)


@pytest.mark.parametrize(
    ("name", "recommended"),
    [("olora", {"r": 16, "s": 0.5, "lr": 3e-4}), ("pissa", {"r": 16, "s": 1.0, "svd": "auto", "tol": 1e-3, "lr": 2e-5})],
)
def test_rank_and_recommended_options(name, recommended):
    _, adapter = adapted(ll.config(name, r=4))
    assert adapter.claims.rank(adapter.cfg) == 8
    assert {field: getattr(ll.config(name), field) for field in recommended} == recommended


def configs(name, alpha=4, rslora=False):
    """(ours, PEFT's)"""
    peft = pytest.importorskip("peft")
    theirs = peft.LoraConfig(
        r=4, lora_alpha=alpha, use_rslora=rslora, target_modules=["o_proj"], init_lora_weights=name, lora_dropout=0.0
    )
    return ll.config(name, r=4, alpha=alpha, rslora=rslora), theirs


scales = pytest.mark.parametrize("fields", [{"alpha": 4}, {"alpha": 9, "rslora": True}], ids=str)


@scales
@pytest.mark.parametrize(("name", "shape"), [("olora", (24, 32)), ("olora", (32, 24)), ("pissa", (24, 32))])
def test_start_agrees_with_peft(name, shape, fields):
    cfg, config = configs(name, **fields)
    theirs = peft_layer(config, *shape)
    model, ours = adapted(cfg, *shape, dtype=torch.float32, size=0)
    A, B = theirs.lora_A["default"].weight, theirs.lora_B["default"].weight
    assert error(ours.B0 @ ours.A0, B @ A) < 1e-6
    if name == "olora":  # the same signs, since both are Householder factorizations
        assert error(ours.A0, A) < 1e-6
        assert error(ours.B0, B) < 1e-6
    else:  # single vectors carry the error of a float32 SVD over the gap to the next singular value; their product does not
        assert error(ours.A0.abs(), A.abs()) < 1e-4
        assert error(ours.B0.abs(), B.abs()) < 1e-4
    assert error(theirs.base_layer.weight, model.o_proj.weight - ours.s * ours.B0 @ ours.A0) < 1e-6
    assert torch.equal(model.o_proj.weight, toy.one(*shape).o_proj.weight)


@scales
@pytest.mark.parametrize("name", ["olora", "pissa"])
def test_parity_with_peft_after_training(name, fields):
    def fill(ours, theirs):
        ours.dA.copy_(theirs.lora_A["default"].weight - ours.A0)
        ours.dB.copy_(theirs.lora_B["default"].weight - ours.B0)

    def pairs(ours, theirs):
        return [
            (ours.dA.grad, theirs.lora_A["default"].weight.grad),
            (ours.dB.grad, theirs.lora_B["default"].weight.grad),
        ]

    check_parity(*configs(name, **fields), pairs, fill)


@pytest.mark.parametrize("name", ["olora", "pissa"])
def test_peft_leaves_a_residual_in_the_base_and_we_leave_the_base(name):
    cfg, config = configs(name)
    pristine = toy.one().o_proj.weight
    model, _ = adapted(cfg, dtype=torch.float32)
    ll.detach(model)
    assert torch.equal(model.o_proj.weight, pristine)
    assert error(peft_layer(config).base_layer.weight, pristine) > 0.01
