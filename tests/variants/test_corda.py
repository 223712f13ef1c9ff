"""CorDA against the decomposition with an explicit inverse in dense float64 and against PEFT."""

import dataclasses
import importlib.util
import sys
import types

import pytest
import torch

import lora_lite as ll
from lora_lite.families.orientation import oriented_left_svd, required
from lora_lite.testing import toy
from lora_lite.testing.checks import error
from lora_lite.testing.formula import T64, adapted
from tests.oracles.layer import check_agree

SHAPES = [(24, 32), (32, 24)]
CHOICES = [(method, metric) for method in ("ipm", "kpm") for metric in ("full", "sqrt")]


def config(**fields):
    return ll.CorDAConfig(**{"r": 4, **fields})


def started(cfg, data=None, **options):
    """(adapter, weight) right after attach."""
    model, adapter = adapted(cfg, data=data, size=0, **options)
    return adapter, model.o_proj.weight.detach().double()


def product(a):
    return a.s * a.B0 @ a.A0


def tokens(batches):
    return torch.cat([batch["x"][batch["attention_mask"] == 1] for batch in batches]).double()


def root(C):
    values, vectors = torch.linalg.eigh(C)
    return vectors * values.sqrt() @ vectors.T


def with_inverse(W, C, cfg):
    """(B0, A0) as printed: SVD(W M), the inverse of M on the right, the singular values split between both factors."""
    C = C + cfg.damp * C.trace() / len(C) * torch.eye(len(C), dtype=C.dtype)
    M = C if cfg.metric == "full" else root(C)
    U, S, Vh = torch.linalg.svd(W @ M, full_matrices=False)
    kept = slice(cfg.r) if cfg.method == "ipm" else slice(len(S) - cfg.r, None)
    half = (S[kept] / cfg.s).sqrt()
    return U[:, kept] * half, half[:, None] * Vh[kept] @ torch.linalg.inv(M)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("method", "metric"), CHOICES)
def test_start_equals_the_decomposition_with_an_explicit_inverse(method, metric, shape):
    data, cfg = toy.batches(shape[0], dtype=torch.float64), config(method=method, metric=metric, alpha=8)
    a, W = started(cfg, data, d_in=shape[0], d_out=shape[1])
    X = tokens(data)
    B, A = with_inverse(W, X.T @ X / len(X), cfg)
    assert error(product(a), cfg.s * B @ A) < 1e-9
    signs = (a.B0 * B).sum(0).sign()
    assert error(a.B0 * signs, B) < 1e-8
    assert error(a.A0 * signs[:, None], A) < 1e-8


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("split", ["paper", "balanced"])
@pytest.mark.parametrize(("method", "metric"), CHOICES)
def test_product_is_the_projection_of_the_weight_on_the_chosen_outputs(method, metric, split, shape):
    a, W = started(config(method=method, metric=metric, split=split, alpha=8), d_in=shape[0], d_out=shape[1])
    U = torch.linalg.qr(a.B0).Q
    assert error(product(a), U @ U.T @ W) < T64


def test_root_form_has_the_least_output_error_of_its_rank():
    data = toy.batches(dtype=torch.float64)
    X = tokens(data)
    lost = {}
    for metric in ("sqrt", "full"):
        a, W = started(config(metric=metric, damp=0.0), data)
        lost[metric] = float((X @ (W - product(a)).T).square().sum() / len(X))
    U = torch.linalg.svd(W).U[:, :4]
    lost["plain"] = float((X @ (W - U @ U.T @ W).T).square().sum() / len(X))
    eigenvalues = torch.linalg.eigvalsh(W @ X.T @ X @ W.T / len(X))
    assert abs(lost["sqrt"] / float(eigenvalues[:-4].sum()) - 1) < 1e-9
    assert lost["sqrt"] < 0.999 * lost["full"]
    assert lost["sqrt"] < 0.999 * lost["plain"]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("metric", ["full", "sqrt"])
def test_largest_and_smallest_directions_are_orthogonal_and_together_the_weight(metric, shape):
    halves = [started(config(r=12, method=m, metric=metric), d_in=shape[0], d_out=shape[1]) for m in ("ipm", "kpm")]
    (first, W), (second, _) = halves
    assert error(first.B0.T @ second.B0, torch.zeros(12, 12)) < 1e-9
    assert error(product(first) + product(second), W) < 1e-9


@pytest.mark.parametrize(("method", "metric"), CHOICES)
def test_product_does_not_depend_on_the_unit_of_the_activations(method, metric):
    data = toy.batches(dtype=torch.float64)
    louder = [{**batch, "x": 10 * batch["x"]} for batch in data]
    for split in ("paper", "balanced"):
        cfg = config(method=method, metric=metric, split=split)
        (quiet, _), (loud, _) = started(cfg, data), started(cfg, louder)
        assert error(product(loud), product(quiet)) < 1e-9
        growth = {"balanced": 1.0, "paper": 10.0 if metric == "full" else 10**0.5}[split]
        assert error(loud.B0.norm(dim=0), growth * quiet.B0.norm(dim=0)) < 1e-8


def test_product_does_not_depend_on_alpha_or_bias():
    wanted = product(started(config())[0])
    for other in (config(alpha=64), config(alpha=8, rslora=True)):
        a, _ = started(other)
        assert a.s != 1
        assert error(product(a), wanted) < T64
    assert error(product(started(config(), bias=False)[0]), wanted) < T64
    model = toy.one(24, 32, True, torch.float64)
    with torch.no_grad():
        model.o_proj.bias.add_(100)
    ll.attach(model, config(dtype=torch.float64), toy.batches(dtype=torch.float64))
    assert error(product(model.o_proj.default), wanted) < 1e-9


def test_balanced_factors_have_equal_norms_and_paper_factors_the_singular_values():
    data = toy.batches(dtype=torch.float64)
    balanced, W = started(config(split="balanced", alpha=8), data)
    assert error(balanced.A0.norm(dim=1), balanced.B0.norm(dim=0)) < T64
    paper, _ = started(config(alpha=8), data)
    X = tokens(data)
    C = X.T @ X / len(X)
    S = torch.linalg.svdvals(W @ (C + 0.01 * C.trace() / 24 * torch.eye(24)))[:4]
    assert error(paper.s * paper.B0.square().sum(0), S) < 1e-9
    assert error(paper.A0.norm(dim=1), paper.B0.norm(dim=0)) > 0.1


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("metric", ["full", "sqrt"])
@pytest.mark.parametrize("split", ["paper", "balanced"])
def test_directions_without_data_are_floored_and_keep_the_product(split, metric, shape):
    """Inputs of rank 3, no damping: all kept singular values are rounding noise."""
    basis = toy.inputs(3, shape[0], dtype=torch.float64, seed=5)
    data = [toy.inputs(2, 20, 3, dtype=torch.float64, seed=6) @ basis]
    a, W = started(config(method="kpm", metric=metric, split=split, damp=0.0), data, d_in=shape[0], d_out=shape[1])
    U = torch.linalg.qr(a.B0).Q
    assert error(product(a), U @ U.T @ W) < 1e-8
    if split == "paper":
        leading, _ = started(config(r=1, metric=metric, damp=0.0), data, d_in=shape[0], d_out=shape[1])
        ratio = a.B0.norm(dim=0) / leading.B0.norm()
        assert error(ratio, torch.full((4,), 1e-3)) < 1e-9


def test_silent_layer_starts_finite():
    a, _ = started(config(), [torch.zeros(2, 10, 24, dtype=torch.float64)])
    assert not a.B0.any()
    assert a.A0.isfinite().all()


@pytest.mark.parametrize("metric", ["full", "sqrt"])
def test_damping_leads_to_the_plain_decomposition(metric):
    data = toy.batches(dtype=torch.float64)
    starts = {damp: started(config(metric=metric, damp=damp), data) for damp in (0.0, 1.0, 1e8)}
    U = torch.linalg.svd(starts[0.0][1]).U[:, :4]
    apart = {damp: error(product(a), U @ U.T @ W) for damp, (a, W) in starts.items()}
    assert apart[0.0] > 0.1
    assert apart[1e8] < 1e-6
    assert error(product(starts[0.0][0]), product(starts[1.0][0])) > 0.01


def test_plain_metric_reads_no_data():
    W = toy.inputs(32, 24, dtype=torch.float64)
    U, S = oriented_left_svd("plain", {}, "", W, 24, smallest=True)
    assert required("plain") == ()
    assert error(U * S @ (U * S).T, W @ W.T) < 1e-9


def calls(scales=(1.0, 30.0, 0.1)):
    return [c * toy.inputs(1, 40, 24, dtype=torch.float64, seed=30 + k) for k, c in enumerate(scales)]


@pytest.mark.parametrize(("method", "metric"), CHOICES)
def test_call_norm_is_the_mean_over_calls_each_divided_by_its_largest_entry(method, metric):
    cfg = config(call_norm=True, method=method, metric=metric)
    a, W = started(cfg, calls())
    units = [x[0] / x.max().abs() for x in calls()]
    B, A = with_inverse(W, sum(x.T @ x for x in units) / 3, cfg)
    assert error(product(a), B @ A) < 1e-9
    assert error(a.B0.norm(dim=0), B.norm(dim=0)) < 1e-9
    assert error(product(started(cfg, calls((5.0, 1.0, 2.0)))[0]), product(a)) < 1e-9
    assert error(product(started(config(method=method, metric=metric), calls())[0]), product(a)) > 1e-2


def test_call_norm_ignores_padding():
    starts = []
    for filler in (0.0, 1e6):
        batches = toy.batches(dtype=torch.float64)
        for batch in batches:
            batch["x"][batch["attention_mask"] == 0] = filler
        starts.append(started(config(call_norm=True), batches)[0])
    assert torch.equal(starts[0].A0, starts[1].A0)
    assert torch.equal(starts[0].B0, starts[1].B0)


def test_layer_with_another_rank_gets_its_own_start():
    model = toy.toy()
    ll.attach(model, config(rank_pattern={"q_proj": 2}, method="kpm"), toy.batches())
    assert model.blocks[0].q_proj.default.A0.shape == (2, 24)
    assert model.blocks[0].up_proj.default.A0.shape == (4, 24)
    for block in model.blocks:
        for layer in (block.q_proj, block.o_proj, block.up_proj, block.down_proj):
            U = torch.linalg.qr(layer.default.B0).Q
            assert error(product(layer.default), U @ U.T @ layer.weight) < 5e-5


def test_only_what_the_metric_reads_is_measured():
    assert ll.get("corda").needs(config()) == ("n", "x_tr", "x_moment|yx_moment")
    assert ll.get("corda").needs(config(metric="sqrt")) == ("n", "x_tr", "x_moment|y_moment")
    assert ll.get("corda").needs(config(call_norm=True)) == ("n", "calls", "x_tr/call", "x_moment|yx_moment/call")


def test_errors_name_the_cause():
    with pytest.raises(ll.LoraLiteError, match=r"corda starts from data.*yx_moment"):
        ll.attach(toy.one(), config())
    with pytest.raises(ll.LoraLiteError, match=r"o_proj: 3 calibration tokens are too few. At least 4"):
        ll.attach(toy.one(), config(), [toy.inputs(3, 24)])
    with pytest.raises(ll.LoraLiteError, match=r"o_proj.*r=25 is larger"):
        ll.attach(toy.one(), config(r=25), toy.batches())
    with pytest.raises(ll.LoraLiteError, match=r"damp=-0.1.*at least 0"):
        config(damp=-0.1)
    with pytest.raises(ll.LoraLiteError, match="method: one of 'ipm', 'kpm'"):
        config(method="largest")


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("method", ["ipm", "kpm"])
def test_parity_with_peft(method, shape, monkeypatch):
    """Start from one sample per call, then the same deviation of both: product, residual, factors, output, gradients."""
    peft = pytest.importorskip("peft")
    if importlib.util.find_spec("attr") is None:  # PEFT's module takes its dataclass from there and does not require it
        monkeypatch.setitem(sys.modules, "attr", types.SimpleNamespace(dataclass=dataclasses.dataclass))
    from peft.tuners.lora.corda import preprocess_corda

    d_in, d_out = shape
    samples = [c * toy.inputs(1, 40, d_in, seed=30 + k) * torch.linspace(0.5, 2, d_in) for k, c in enumerate((1, 3, 0.2))]
    lora = peft.LoraConfig(
        r=4,
        lora_alpha=8,
        target_modules=["o_proj"],
        lora_dropout=0.0,
        init_lora_weights="corda",
        corda_config=peft.tuners.lora.config.CordaConfig(corda_method=method),
    )
    base = toy.one(d_in, d_out)
    preprocess_corda(base, lora, run_model=lambda: [base(x) for x in samples])
    theirs = peft.get_peft_model(base, lora).base_model.model.o_proj
    A, B = theirs.lora_A["default"].weight, theirs.lora_B["default"].weight

    cfg = config(alpha=8, method=method, call_norm=True)
    model, ours = adapted(cfg, data=samples, d_in=d_in, d_out=d_out, dtype=torch.float32, size=0)
    signs = (ours.B0 * B).sum(0).sign().detach()
    assert error(product(ours), 2 * B @ A) < 1e-5
    assert error(model.o_proj.weight - product(ours), theirs.base_layer.weight) < 1e-5
    assert error(ours.B0 * signs, B) < 5e-5
    assert error(ours.A0 * signs[:, None], A) < 5e-5

    moved_A, moved_B = 0.3 * toy.inputs(4, d_in, seed=20), 0.3 * toy.inputs(d_out, 4, seed=21)
    with torch.no_grad():
        A.add_(moved_A)
        B.add_(moved_B)
        ours.dA.add_(moved_A * signs[:, None])
        ours.dB.add_(moved_B * signs)

    def gradients():
        return [(ours.dA.grad * signs[:, None], A.grad), (ours.dB.grad * signs, B.grad)]

    check_agree(model, theirs, toy.inputs(5, d_in), gradients, of_gradients=5e-5)
