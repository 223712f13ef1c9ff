"""LoRA-GA against a dense SVD of autograd's weight gradient in float64, one step of SGD, and PEFT."""

import pytest
import torch

import lora_lite as ll
from lora_lite.testing import toy
from lora_lite.testing.checks import error
from lora_lite.testing.formula import T64, adapted
from tests.oracles.layer import check_agree

SHAPES = [(24, 32), (32, 24)]
DIRECTIONS = ["ArB2r", "A2rBr", "ArBr"]
TRIPLES = {  # of A0 and of B0, for r = 4, as algorithm 1 and the authors' code deal them
    "ArB2r": ([0, 1, 2, 3], [4, 5, 6, 7]),
    "A2rBr": ([4, 5, 6, 7], [0, 1, 2, 3]),
    "ArBr": ([1, 3, 5, 7], [0, 2, 4, 6]),
}


def loss_fn(model, batch):
    """A smooth loss whose gradient has all ranks."""
    y, mask = model(batch["x"]), batch["attention_mask"].bool()
    return (y * torch.linspace(-1, 2, y.shape[-1]).to(y)).tanh()[mask].mean() + y[mask].square().mean() / 10


def config(**fields):
    return ll.LoRAGAConfig(**{"r": 4, "loss_fn": loss_fn, **fields})


def started(cfg, data=None, **options):
    """(adapter, weight) right after attach."""
    model, adapter = adapted(cfg, data=data, size=0, **options)
    return adapter, model.o_proj.weight.detach()


def gradient(d_in=24, d_out=32, data=None, loss=loss_fn):
    """dLoss/dW summed over the batches, by autograd."""
    model = toy.one(d_in, d_out, True, torch.float64)
    data = toy.batches(d_in, dtype=torch.float64) if data is None else data
    return torch.autograd.grad(sum(loss(model, batch) for batch in data), model.o_proj.weight)[0]


def size(a, cfg):
    """k of both factors."""
    return {"stable": a.d_out**0.25 / cfg.gamma**0.5, "unit": 1.0, "gd": 1 / a.s}[cfg.scale]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("scale", ["stable", "unit", "gd"])
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_factors_are_the_singular_vectors_that_the_direction_names(direction, scale, shape):
    cfg = config(direction=direction, scale=scale)
    a, _ = started(cfg, d_in=shape[0], d_out=shape[1])
    U, _, Vh = torch.linalg.svd(gradient(*shape))
    of_A, of_B = TRIPLES[direction]
    A, B = size(a, cfg) * Vh[of_A], size(a, cfg) * U[:, of_B]
    assert error(a.A0 * (a.A0 * A).sum(1).sign()[:, None], A) < 1e-8
    assert error(a.B0 * (a.B0 * B).sum(0).sign(), B) < 1e-8
    assert not a.dA.any()
    assert not a.dB.any()


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("scale", ["stable", "unit", "gd"])
@pytest.mark.parametrize("gamma", [16.0, 64.0])
def test_rows_of_A0_and_columns_of_B0_are_orthogonal_of_one_norm(gamma, scale, shape):
    if scale != "stable" and gamma != 16:
        return
    cfg = config(scale=scale, gamma=gamma)
    a, _ = started(cfg, d_in=shape[0], d_out=shape[1])
    k = size(a, cfg)
    assert error(a.A0 @ a.A0.T / k**2, torch.eye(4)) < T64
    assert error(a.B0.T @ a.B0 / k**2, torch.eye(4)) < T64


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("scale", ["stable", "unit", "gd"])
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_first_step_of_sgd_moves_W_along_the_best_rank_2r_part_of_the_gradient(direction, scale, rslora, shape):
    """W' - W = -t s^2 k^2 G_2r up to terms in t^2; a step of full fine-tuning moves it by -t G."""
    cfg = config(direction=direction, scale=scale, rslora=rslora)
    model, a = adapted(cfg, size=0, d_in=shape[0], d_out=shape[1])
    data = toy.batches(shape[0], dtype=torch.float64)
    sum(loss_fn(model, batch) for batch in data).backward()
    t = 1e-7
    with torch.no_grad():
        for p in (a.dA, a.dB):
            p.sub_(t * p.grad)
        moved = a.s * (a.B0 @ a.dA + a.dB @ a.A0 + a.dB @ a.dA)
    U, S, Vh = torch.linalg.svd(gradient(*shape), full_matrices=False)
    best = U[:, :8] * S[:8] @ Vh[:8]
    assert 1 - (moved * -best).sum() / moved.norm() / best.norm() < 1e-12
    assert error(moved / (-t * a.s**2 * size(a, cfg) ** 2), best) < 1e-5
    assert error(U * S @ Vh, best) > 1e-3


def test_first_step_of_other_factors_of_that_rank_moves_W_less_along_the_gradient():
    """Random orthonormal factors of the same norms keep less of it: the property can fail."""
    G = gradient()
    a, _ = started(config(scale="unit"))

    def along(A, B):
        moved = B @ B.T @ G + G @ A.T @ A
        return float((moved * G).sum() / moved.norm() / G.norm())

    random = [torch.linalg.qr(toy.inputs(n, 4, dtype=torch.float64, seed=n)).Q for n in (24, 32)]
    assert along(a.A0, a.B0) > 0.9
    assert along(random[0].T, random[1]) < 0.8 * along(a.A0, a.B0)


@pytest.mark.parametrize("scale", ["stable", "unit", "gd", "peft_stable"])
def test_start_depends_on_the_size_of_the_loss_only_as_in_peft(scale):
    cfg = config(scale=scale)
    louder = config(scale=scale, loss_fn=lambda model, batch: 50 * loss_fn(model, batch))
    a, b = started(cfg)[0], started(louder)[0]
    assert error(b.A0.abs(), a.A0.abs()) < 1e-9
    assert error(b.B0.abs(), (50 if scale == "peft_stable" else 1) * a.B0.abs()) < 1e-9


def test_peft_stable_multiplies_B_alone_by_the_singular_values_of_the_mean_gradient():
    cfg = config(scale="peft_stable")
    a, _ = started(cfg)
    U, S, Vh = torch.linalg.svd(gradient() / 4)
    k = 32**0.25 / 4
    assert error(a.A0.abs(), Vh[:4].abs()) < 1e-8
    assert error(a.B0.abs(), (U[:, 4:8] * S[4:8] * k).abs()) < 1e-8
    twice = toy.batches(dtype=torch.float64) * 2
    assert error(started(cfg, twice)[0].B0.abs(), a.B0.abs()) < 1e-9


def test_scale_and_gamma_have_their_effect():
    norms = {}
    for fields in ({}, {"gamma": 64.0}, {"scale": "unit"}, {"scale": "gd"}, {"scale": "gd", "rslora": False}):
        a, _ = started(config(**fields))
        norms[tuple(fields.items())] = round(float(a.B0.norm(dim=0).mean()), 9)
    s = 16 / 4**0.5
    assert list(norms.values()) == [round(v, 9) for v in (32**0.25 / 4, 32**0.25 / 8, 1.0, 1 / s, 4 / 16)]
    assert config().s == s
    assert config(rslora=False).s == 4


def test_every_source_of_the_loss_gives_its_own_start():
    data = toy.batches(dtype=torch.float64)
    with pytest.warns(ll.LoraLiteWarning, match="random combination of outputs"):
        probe, _ = started(config(loss_fn=None), data)
    own, _ = started(config(), data)

    class WithLoss(toy.One):
        def forward(self, x, attention_mask=None):
            return {"loss": loss_fn(lambda x: self.o_proj(x), {"x": x, "attention_mask": attention_mask})}

    model = toy.seeded(lambda: WithLoss(24, 32, True)).double()
    ll.attach(model, config(loss_fn=None, dtype=torch.float64), data)
    assert error(model.o_proj.default.A0.abs(), own.A0.abs()) < 1e-9
    assert error(probe.A0.abs(), own.A0.abs()) > 0.01


def test_language_model_starts_from_its_labels_or_from_the_next_token():
    transformers = pytest.importorskip("transformers")
    shape = transformers.Qwen3Config(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2,
        head_dim=8, tie_word_embeddings=True, use_cache=False,
    )  # fmt: skip
    ids = torch.arange(60).reshape(3, 20)
    starts = []
    for labels in (ids, None, ids.flip(1)):
        model = toy.seeded(lambda: transformers.Qwen3ForCausalLM(shape)).eval()
        before = model(ids).logits
        for p in model.parameters():
            p.requires_grad_(False)
        batch = {"input_ids": ids} if labels is None else {"input_ids": ids, "labels": labels}
        handle = ll.attach(model, config(loss_fn=None), [batch])
        assert torch.equal(model(ids).logits, before)
        assert all(p.grad is None for p in model.parameters())
        starts.append({path: a.A0.abs() for path, a in handle.layers.items()})
    assert len(starts[0]) == 7
    for path in starts[0]:
        assert error(starts[1][path], starts[0][path]) < 1e-3
        assert error(starts[2][path], starts[0][path]) > 1e-2


def test_frozen_and_trainable_bases_start_alike():
    starts = []
    for flag in (True, False):
        model = toy.one(24, 32, True, torch.float64)
        for p in model.parameters():
            p.requires_grad_(flag)
        handle = ll.attach(model, config(dtype=torch.float64), toy.batches(dtype=torch.float64))
        starts.append(handle.layers["o_proj"])
    assert torch.equal(starts[0].A0, starts[1].A0)
    assert torch.equal(starts[0].B0, starts[1].B0)


def test_gradient_of_low_rank_still_gives_orthonormal_factors():
    """Two distinct tokens: six of the eight triples are not the data's, and must not be rounding noise."""
    x = toy.inputs(2, 24, dtype=torch.float64).repeat(8, 1)
    for shape in SHAPES:
        x = toy.inputs(2, shape[0], dtype=torch.float64).repeat(8, 1)
        cfg = config(loss_fn=lambda model, x: model(x).square().sum(), scale="unit")
        a, _ = started(cfg, [x], d_in=shape[0], d_out=shape[1])
        assert error(a.A0 @ a.A0.T, torch.eye(4)) < T64
        assert error(a.B0.T @ a.B0, torch.eye(4)) < T64
        assert error(x @ a.A0.T @ a.A0, x) < 1e-6


def test_start_does_not_depend_on_the_bias_that_a_linear_loss_ignores():
    starts, probe = [], toy.inputs(4, 12, 32, dtype=torch.float64)
    for offset in (0.0, 100.0):
        model = toy.one(24, 32, True, torch.float64)
        with torch.no_grad():
            model.o_proj.bias.add_(offset)
        cfg = config(dtype=torch.float64, loss_fn=lambda model, batch: (model(batch["x"]) * probe).sum())
        starts.append(ll.attach(model, cfg, toy.batches(dtype=torch.float64)).layers["o_proj"])
    assert error(starts[1].A0, starts[0].A0) < T64
    assert error(starts[1].B0, starts[0].B0) < T64


def test_only_what_the_scale_reads_is_measured():
    assert ll.get("lora_ga").needs(config()) == ("n", "wgrad")
    assert ll.get("lora_ga").needs(config(scale="peft_stable")) == ("n", "wgrad", "terms")


def test_errors_name_the_cause():
    with pytest.raises(ll.LoraLiteError, match=r"lora_ga starts from data.*wgrad"):
        ll.attach(toy.one(), config())
    with pytest.raises(ll.LoraLiteError, match=r"o_proj \(d_in=24, d_out=32\).*r=13.*at most 12 here"):
        ll.attach(toy.one(), config(r=13), toy.batches())
    with pytest.raises(ll.LoraLiteError, match=r"o_proj: 7 calibration tokens are too few. At least 8 for 2 r singular"):
        ll.attach(toy.one(), config(loss_fn=lambda model, x: model(x).square().sum()), [toy.inputs(7, 24)])
    with pytest.raises(ll.LoraLiteError, match=r"o_proj had no part in the loss"):
        ll.attach(toy.one(), config(loss_fn=lambda model, batch: 0 * model(batch["x"]).sum()), toy.batches())
    with pytest.raises(ll.LoraLiteError, match=r"gamma=0\.0.*above 0"):
        config(gamma=0)
    for scale in ("unit", "gd"):
        with pytest.raises(ll.LoraLiteError, match=r'gamma=4\.0.*read by scale="stable" and "peft_stable" alone'):
            config(scale=scale, gamma=4)
    assert config(scale="peft_stable", gamma=4).gamma == 4
    with pytest.raises(ll.LoraLiteError, match="direction: one of 'ArB2r', 'A2rBr', 'ArBr'"):
        config(direction="random")
    with pytest.raises(ll.LoraLiteError, match="scale: one of 'stable', 'unit', 'gd', 'peft_stable'"):
        config(scale="weight_svd")


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_parity_with_peft(direction, shape):
    """Start from the same batches, then the same deviation of both: factors, residual, output and gradients.

    PEFT's SVD is randomised, so rows of A and columns of B have signs of their own.
    """
    peft = pytest.importorskip("peft")
    from peft.tuners.lora import preprocess_loraga

    d_in, d_out = shape
    data = toy.batches(d_in)
    lora = peft.LoraConfig(
        r=4, lora_alpha=16, use_rslora=True, target_modules=["o_proj"], lora_dropout=0.0, init_lora_weights="lora_ga",
        lora_ga_config=peft.tuners.lora.config.LoraGAConfig(direction=direction, scale="stable", stable_gamma=16),
    )  # fmt: skip
    base = toy.one(d_in, d_out)

    def train_step():  # PEFT's hook warns where no input requires a gradient
        for batch in data:
            loss_fn(base, {**batch, "x": batch["x"].clone().requires_grad_(True)}).backward()

    preprocess_loraga(base, lora, train_step)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        theirs = peft.get_peft_model(base, lora).base_model.model.o_proj
    A, B = theirs.lora_A["default"].weight, theirs.lora_B["default"].weight

    model, ours = adapted(config(direction=direction, scale="peft_stable"), data=data, d_in=d_in, d_out=d_out,
                          dtype=torch.float32, size=0)  # fmt: skip
    rows, columns = (ours.A0 * A).sum(1).sign().detach(), (ours.B0 * B).sum(0).sign().detach()
    assert (ours.A0 * rows[:, None] - A).abs().max() < 5e-5 * A.abs().max()
    assert (ours.B0 * columns - B).abs().max() < 5e-5 * B.abs().max()
    # from here on the deviation alone: both factors as PEFT has them, in its signs
    with torch.no_grad():
        ours.A0.copy_(A)
        ours.B0.copy_(B)
        assert error(model.o_proj.weight - ours.s * ours.B0 @ ours.A0, theirs.base_layer.weight) < 1e-6
        moved_A, moved_B = 0.3 * toy.inputs(4, d_in, seed=20), 0.3 * toy.inputs(d_out, 4, seed=21)
        A.add_(moved_A)
        B.add_(moved_B)
        ours.dA.add_(moved_A)
        ours.dB.add_(moved_B)
    check_agree(model, theirs, toy.inputs(5, d_in), lambda: [(ours.dA.grad, A.grad), (ours.dB.grad, B.grad)])
