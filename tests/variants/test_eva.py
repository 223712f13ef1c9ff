"""EVA against the SVD of all centred tokens in dense float64, its deal of ranks written out, and PEFT."""

import dataclasses

import pytest
import torch
from torch import nn

import lora_lite as ll
from lora_lite.contract.pattern import fits
from lora_lite.testing import toy
from lora_lite.testing.checks import error
from lora_lite.testing.formula import T64, adapted, check_dense


def config(**fields):
    return ll.EVAConfig(**{"r": 4, "alpha": 8, **fields})


def dense(a, W, b, c):
    return W + c * a.s * a.B @ a.A, b


def tokens(batches):
    return torch.cat([batch["x"][batch["attention_mask"] == 1] for batch in batches]).double()


class Reader(nn.Module):
    """Three projections of one tensor and one of another, as in a transformer's block."""

    def __init__(self):
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj = nn.Linear(24, 32), nn.Linear(24, 10), nn.Linear(24, 10)
        self.o_proj = nn.Linear(32, 24)

    def forward(self, x, attention_mask=None, labels=None):
        return self.o_proj(torch.tanh(self.q_proj(x)) * (self.k_proj(x) * self.v_proj(x)).mean(-1, keepdim=True))


def decaying(width=24, count=1, rows=40):
    """Batches whose sizes fall by a quarter from one direction to the next, so that each is well apart."""
    falling = 0.75 ** torch.arange(width)
    turned = torch.linalg.qr(toy.inputs(width, width, seed=7)).Q
    return [{"x": (toy.inputs(8, rows, width, seed=40 + k) * falling + 0.3) @ turned * 3} for k in range(count)]


def uneven(make=toy.Toy):
    """The toy with readers that leave the writers inputs of few directions and of many."""
    model = toy.seeded(make)
    with torch.no_grad():
        for path, p in model.named_parameters():
            if path.endswith("q_proj.weight"):
                p.mul_(3 * 0.6 ** torch.arange(len(p))[:, None])
            if path.endswith("up_proj.weight"):
                p.mul_(4)
    return model


def seen(model, batches):
    """{path: (n, i)} of every layer's inputs, kept whole: what the library never does."""
    found, handles = {}, []
    for path in ll.find_targets(model, config()):
        layer = model.get_submodule(path)
        handles.append(layer.register_forward_pre_hook(lambda _, args, path=path: found.setdefault(path, []).append(args[0])))
    with torch.no_grad():
        for batch in batches:
            model(**batch)
    for handle in handles:
        handle.remove()
    return {path: torch.cat(parts).flatten(0, -2).double() for path, parts in found.items()}


def ratios(X, center=True):
    """Explained-variance ratios, descending, by the SVD of the (centred) tokens."""
    S = torch.linalg.svdvals(X - X.mean(0) if center else X).square()
    return S / S.sum()


def dealt(model, batches, r, rho):
    """Algorithm 1's deal: the r L largest ratios of all layers among the first rho r of each."""
    inputs = seen(model, batches)
    entries = []
    for place, (path, X) in enumerate(inputs.items()):
        most = min(round(rho * r), *model.get_submodule(path).weight.shape)
        entries += [(-round(float(q), 9), k, place) for k, q in enumerate(ratios(X)[:most])]
    kept = [place for *_, place in sorted(entries)[: r * len(inputs)]]
    return {path: kept.count(place) for place, path in enumerate(inputs)}


def ranks(handle):
    return {path: a.A.shape[0] for path, a in handle.layers.items()}


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize(
    "fields", [{}, {"rho": 1.0}, {"rank_pattern": {"o_proj": 7}}, {"rank_pattern": {"o_*": 7}, "adjust_alpha": False}]
)
def test_output_and_gradients_equal_the_dense_form(fields, rslora):
    check_dense(config(rslora=rslora, **fields), dense)


# --- start ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(24, 32), (32, 24)])
@pytest.mark.parametrize("center", [True, False])
def test_A_starts_on_the_leading_right_singular_vectors_of_the_tokens(center, shape):
    data = [{**batch, "x": batch["x"] + 1} for batch in toy.batches(shape[0], dtype=torch.float64)]
    _, a = adapted(config(center=center), data=data, size=0, d_in=shape[0], d_out=shape[1])
    A = a.A.detach()
    X = tokens(data)
    X = X - X.mean(0) if center else X
    Vh = torch.linalg.svd(X, full_matrices=False).Vh[:4]
    signs = (A * Vh).sum(1).sign()[:, None]
    assert error(A * signs, Vh) < 1e-10
    assert not a.B.any()
    assert error(A @ A.T, torch.eye(4)) < T64
    eigenvalues = torch.linalg.eigvalsh(X.T @ X / len(X))
    lost = (X - X @ A.T @ A).square().sum() / len(X)
    assert abs(float(lost / eigenvalues[:-4].sum()) - 1) < 1e-9
    assert abs(a.report["explained"] - float(eigenvalues[-4:].sum() / eigenvalues.sum())) < 1e-9


def test_centring_has_its_effect():
    data = [{**batch, "x": batch["x"] + 5} for batch in toy.batches(dtype=torch.float64)]
    starts = {center: adapted(config(center=center), data=data, size=0)[1].A for center in (True, False)}
    mean = tokens(data).mean(0)
    assert (starts[False][0] @ mean).abs() > 0.99 * mean.norm()
    assert error(starts[True].T @ starts[True], starts[False].T @ starts[False]) > 0.1
    shifted = [{**batch, "x": batch["x"] - 3} for batch in data]
    again = adapted(config(), data=shifted, size=0)[1].A
    assert error(again.T @ again, starts[True].T @ starts[True]) < 1e-9


def test_start_does_not_depend_on_the_order_or_size_of_batches():
    data = toy.batches(dtype=torch.float64)
    rows = [{k: v[i : i + 1] for k, v in batch.items()} for batch in reversed(data) for i in range(4)]
    first, second = (adapted(config(), data=some, size=0)[1].A for some in (data, rows))
    assert error((second * first).sum(1).abs(), torch.ones(4)) < 1e-10


def test_directions_come_from_tokens_with_a_label_unless_asked_otherwise():
    x = toy.inputs(4, 12, 24, dtype=torch.float64)
    x[:, :6] *= torch.linspace(3, 0, 24)  # instructions vary elsewhere than answers
    x[:, 6:] *= torch.linspace(0, 3, 24)
    labels = torch.zeros(4, 12, dtype=torch.long)
    labels[:, :6] = -100
    starts = {}
    for mask in ("labels", "none"):
        model = toy.seeded(Reader).double()
        ll.attach(model, config(mask=mask, dtype=torch.float64, rho=1.0), [{"x": x, "labels": labels}])
        starts[mask] = model.q_proj.default.A
    for mask, kept in (("labels", x[labels != -100]), ("none", x.flatten(0, 1))):
        Vh = torch.linalg.svd(kept - kept.mean(0)).Vh[:4]
        assert error(starts[mask].T @ starts[mask], Vh.T @ Vh) < 1e-9
    assert error(starts["labels"].T @ starts["labels"], starts["none"].T @ starts["none"]) > 0.1


def test_padding_content_has_no_influence():
    starts = []
    for filler in (0.0, 1e6):
        model, data = toy.toy(), toy.batches()
        for batch in data:
            batch["x"][batch["attention_mask"] == 0] = filler
        starts.append(ll.attach(model, config(), data))
    assert ranks(starts[0]) == ranks(starts[1])
    for path, a in starts[0].layers.items():
        assert torch.equal(a.A, starts[1].layers[path].A)


def test_wide_layers_start_from_a_sketch_that_captures_nearly_as_much():
    """200 inputs, variances as 1/k^2, r = 8, one pass with 64 columns: at least 99.9 % of the best variance."""
    x = toy.inputs(8, 50, 200, dtype=torch.float64) * (1.0 / torch.arange(1, 201))
    kept = {}
    for whole in (200, 199, 0):
        _, a = adapted(config(r=8, max_moment_dim=whole), data=[x], d_in=200, size=0)
        A = a.A.detach()
        assert error(A @ A.T, torch.eye(8)) < T64
        Z = x.flatten(0, 1) - x.flatten(0, 1).mean(0)
        kept[whole] = float((Z @ A.T).square().sum() / Z.square().sum())
        assert a.report["explained"] <= kept[whole] + 1e-9
        assert a.report["explained"] > 0.98 * kept[whole]
    assert kept[199] == kept[0]
    assert 0.999 * kept[200] < kept[0] < kept[200]


# --- ranks ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [toy.Toy, Reader])
@pytest.mark.parametrize(("r", "rho"), [(4, 2.0), (3, 1.5), (2, 3.0), (5, 1.0), (2, 1.7)])
def test_ranks_are_those_of_the_largest_explained_variance_ratios(r, rho, make):
    data, cfg = decaying(count=2), config(r=r, rho=rho, dtype=torch.float64)
    data = [{"x": batch["x"].double()} for batch in data]
    model = uneven(make).double()
    wanted = dealt(model, data, r, rho)
    handle = ll.attach(model, cfg, data)
    assert ranks(handle) == {path: rank for path, rank in wanted.items() if rank}
    assert handle.skipped == {path: "rank 0" for path, rank in wanted.items() if not rank}
    assert sum(wanted.values()) == r * len(wanted)
    assert max(wanted.values()) <= round(rho * r)
    if rho == 1 or make is toy.Toy:
        assert (len(set(wanted.values())) == 1) is (rho == 1)
    for path, X in seen(uneven(make).double(), data).items():
        if path in handle.layers:
            Vh = torch.linalg.svd(X - X.mean(0), full_matrices=False).Vh[: wanted[path]]
            A = handle.layers[path].A
            assert error((A * Vh).sum(1).abs(), torch.ones(len(A))) < 1e-6


def test_layers_that_share_an_input_start_on_the_same_directions():
    model = toy.seeded(Reader)
    handle = ll.attach(model, config(), decaying(count=2))
    q, k, v, _ = (handle.layers[path].A for path in ("q_proj", "k_proj", "v_proj", "o_proj"))
    for other in (k, v):
        least = min(len(q), len(other))
        assert torch.equal(q[:least], other[:least])


def test_no_layer_gets_more_than_its_smaller_side():
    model = toy.seeded(Reader)
    data = decaying(count=2)
    handle = ll.attach(model, config(r=10, rho=2.0), data)
    found = ranks(handle)
    assert max(found["k_proj"], found["v_proj"]) <= 10
    assert sum(found.values()) == 40
    assert max(found.values()) > 10


def test_ties_go_to_the_leading_direction_and_then_to_the_earlier_layer():
    """Three layers of one input: every ratio stands three times."""
    model = toy.seeded(Reader)
    handle = ll.attach(model, config(r=4, exclude=("o_proj",)), decaying())
    assert list(ranks(handle).values()) == [4, 4, 4]
    budget = ll.attach(toy.seeded(Reader), config(r=1, rho=2.0, exclude=("o_proj",)), decaying())
    assert list(ranks(budget).values()) == [1, 1, 1]


def test_layers_without_a_share_have_no_adapter_and_are_named():
    """One layer's inputs vary equally in all directions, the others' in few: it gets nothing."""

    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.q_proj, self.o_proj = nn.Linear(24, 24), nn.Linear(32, 24)

        def forward(self, x, z):
            return self.q_proj(x) + self.o_proj(z)

    model = toy.seeded(Two)
    few = toy.inputs(200, 2) @ toy.inputs(2, 24, seed=5)
    even = torch.linalg.qr(toy.inputs(200, 32) - toy.inputs(200, 32).mean(0)).Q
    handle = ll.attach(model, config(r=1, rho=2.0), [{"x": few, "z": even}])
    assert ranks(handle) == {"q_proj": 2}
    assert handle.skipped == {"o_proj": "rank 0"}
    assert handle.config.rank_pattern == {"re:^q_proj$": 2, "re:^o_proj$": 0}
    assert not model.o_proj._forward_hooks


def test_rho_of_one_keeps_the_rank_and_measures_no_spectrum(monkeypatch):
    model = toy.toy()
    handle = ll.attach(model, config(rho=1.0), toy.batches())
    assert set(ranks(handle).values()) == {4}
    assert handle.config == config(rho=1.0)


def test_given_ranks_are_taken_and_stay_with_the_file(tmp_path):
    data = decaying(count=2)
    model, again, fresh = (uneven() for _ in range(3))
    handle = ll.attach(model, config(), data)
    assert len(set(ranks(handle).values())) > 1
    toy.perturb(handle)
    handle.save(tmp_path / "a.safetensors")
    loaded = ll.load(fresh, tmp_path / "a.safetensors")
    assert (ranks(loaded), loaded.config, loaded.skipped) == (ranks(handle), handle.config, handle.skipped)
    assert [a.s for a in loaded.layers.values()] == [a.s for a in handle.layers.values()]
    assert torch.equal(fresh(toy.inputs(3, 24)), model(toy.inputs(3, 24)))
    repeated = ll.attach(again, handle.config, toy.batches())
    assert (ranks(repeated), repeated.config) == (ranks(handle), handle.config)
    large = ll.attach(toy.toy(), config(r=2, rank_pattern={"q_proj": 20}, targets=("q_proj", "o_proj")), toy.batches())
    assert list(ranks(large).values()) == [20, 2, 20, 2]
    assert error(large.layers["blocks.0.q_proj"].A @ large.layers["blocks.0.q_proj"].A.T, torch.eye(20)) < 1e-6


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("alpha", [8, None])
def test_scale_is_that_of_the_mean_rank_unless_asked_otherwise(alpha, rslora):
    power = 0.5 if rslora else 1.0
    for adjust in (True, False):
        handle = ll.attach(uneven(), config(alpha=alpha, rslora=rslora, adjust_alpha=adjust), decaying(count=2))
        assert len(set(ranks(handle).values())) > 2
        for path, a in handle.layers.items():
            rank = len(a.A)
            numerator = (4 if adjust else rank) if alpha is None else 8
            assert a.s == pytest.approx(numerator / (4 if adjust else rank) ** power, rel=1e-14)
            assert dataclasses.replace(handle.config.for_layer(path), rank_pattern={}) == a.cfg
            assert a.cfg.for_layer(path) == a.cfg
        assert handle.config.alpha == (alpha and float(alpha))


# --- life -------------------------------------------------------------------------------------------------------------


def test_A_is_trained_and_never_decays():
    model, a = adapted(config(), size=0)
    before = a.A.detach().clone()
    optimizer = torch.optim.AdamW(ll.param_groups(model, lr=0.1, weight_decay=1.0))
    with torch.no_grad():
        a.B.fill_(1.0)
    for p in a.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    assert torch.equal(a.A, before)
    assert error(a.B, torch.full((32, 4), 0.9)) < 1e-7
    assert a.A.requires_grad


def test_trained_and_frozen_numbers():
    model = uneven()
    handle = ll.attach(model, config(), decaying(count=2))
    sizes = {path: (a.d_in + a.d_out) * len(a.A) for path, a in handle.layers.items()}
    assert (ll.status(model).trainable, ll.status(model).frozen) == (sum(sizes.values()), 0)


def test_only_what_the_options_read_is_measured():
    needs = ll.get("eva").needs
    assert needs(config()) == ("n/labels", "x_tr/labels", "x_sum/labels", "x_sketch[32,8192]/labels")
    assert needs(config(rho=1.2, mask="none", max_moment_dim=64)) == ("n", "x_tr", "x_sum", "x_sketch[20,64]")
    assert needs(config(rank_pattern={"a": 9, "b": 1})) == (
        "n/labels",
        "x_tr/labels",
        "x_sum/labels",
        "x_sketch[36,8192]/labels",
    )


def test_errors_name_the_cause():
    with pytest.raises(ll.LoraLiteError, match=r"eva starts from data.*x_sketch"):
        ll.attach(toy.one(), config())
    with pytest.raises(ll.LoraLiteError, match=r"o_proj: 7 calibration tokens are too few. At least 8 for 8 principal"):
        ll.attach(toy.one(), config(), [toy.inputs(7, 24)])
    with pytest.raises(ll.LoraLiteError, match=r"o_proj: 3 calibration tokens are too few. At least 4 for 4 principal"):
        ll.attach(toy.one(), config(rho=1.0), [toy.inputs(3, 24)])
    assert ranks(ll.attach(toy.one(), config(), [toy.inputs(8, 24)])) == {"o_proj": 4}
    with pytest.raises(ll.LoraLiteError, match=r"o_proj.*r=25 is larger"):
        ll.attach(toy.one(), config(r=25, targets=("o_proj",)), toy.batches())
    with pytest.raises(ll.LoraLiteError, match=r"rho.*0\.5.*at least 1"):
        config(rho=0.5)
    with pytest.raises(ll.LoraLiteError, match=r"max_moment_dim.*-1"):
        config(max_moment_dim=-1)
    with pytest.raises(ll.LoraLiteError, match="mask: one of 'labels', 'none'"):
        config(mask="all")
    with pytest.raises(ll.LoraLiteError, match="EVAConfig has no field 'whiten'"):
        config(whiten=True)


# --- PEFT -------------------------------------------------------------------------------------------------------------


def peft_started(model, data, r, rho, rslora=False, targets=r".*_proj"):
    """{path: PEFT's layer} after its own start on the batches, repeated until it settles."""
    peft = pytest.importorskip("peft")
    lora = peft.LoraConfig(
        r=r, lora_alpha=8, target_modules=targets, lora_dropout=0.0, init_lora_weights="eva", use_rslora=rslora,
        eva_config=peft.EvaConfig(rho=rho, tau=0.999),
    )  # fmt: skip
    theirs = peft.get_peft_model(model, lora, low_cpu_mem_usage=True)
    peft.initialize_lora_eva_weights(
        theirs, data, prepare_model_inputs_fn=None, prepare_layer_inputs_fn=None, show_progress_bar=False
    )
    layers = {path.removeprefix("base_model.model."): m for path, m in theirs.named_modules()}
    return {path: m for path, m in layers.items() if hasattr(m, "lora_A")}


@pytest.mark.parametrize("make", [toy.Toy, Reader])
@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("rho", [1.0, 2.0])
def test_start_has_parity_with_peft(rho, rslora, make):
    """One batch repeated: the same ranks, rows of A up to sign, and without rslora the same scales."""
    data = decaying()
    theirs = peft_started(uneven(make), data, 4, rho, rslora)
    handle = ll.attach(uneven(make), config(rho=rho, rslora=rslora), data)
    assert ranks(handle) == {path: len(m.lora_A["default"].weight) for path, m in theirs.items()}
    assert (len(set(ranks(handle).values())) > 1) is (rho > 1)
    for path, m in theirs.items():
        a, A = handle.layers[path], m.lora_A["default"].weight
        assert torch.nn.functional.cosine_similarity(a.A, A).abs().min() > 1 - 1e-6, path
        assert not m.lora_B["default"].weight.any()
        drift = (len(A) / 4) ** 0.5 if rslora else 1.0
        assert m.scaling["default"] == pytest.approx(a.s * drift, rel=1e-12)


def test_config_is_narrow_enough_for_its_pattern():
    """What ranks writes is matched by the very path, even where one path is part of another."""
    handle = ll.attach(uneven(), config(), decaying(count=2))
    for path, a in handle.layers.items():
        (rank,) = [r for p, r in handle.config.rank_pattern.items() if fits(p, path)] or [4]
        assert rank == len(a.A)
    assert handle.config == dataclasses.replace(config(), rank_pattern=handle.config.rank_pattern)


def test_the_first_step_of_adam_is_that_of_the_authors_scale():
    """Their 5e-4 is published for alpha = 1; at this rate any other alpha is a step as many times theirs."""

    def step(**fields):
        model = toy.one(24, 32)
        data = [toy.inputs(64, 24, seed=seed) for seed in range(3)]
        ll.attach(model, ll.config("eva", rho=1.0, mask="none", **fields), data)
        optimizer = torch.optim.AdamW(ll.param_groups(model))
        model(toy.inputs(3, 24)).square().sum().backward()
        optimizer.step()
        return float(ll.delta_weight(model, "o_proj").norm())

    assert step() == pytest.approx(step(alpha=1.0))
    assert step(alpha=16.0) == pytest.approx(16 * step(), rel=1e-3)
