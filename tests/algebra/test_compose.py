"""Snapshots and their sums: what is composed is exactly the sum of changes, in the tolerances of the acceptance table."""

import copy
import dataclasses
import pickle

import pytest
import torch
from torch import nn

import lora_lite as ll
from lora_lite.algebra.mixture import truncated
from lora_lite.core.delta import Change
from lora_lite.testing import toy
from lora_lite.testing.checks import demand_same, error, photograph
from tests.core.test_messages import refusal
from tests.core.test_old_files import FILES

PATHS = [f"blocks.{block}.{leaf}" for block in (0, 1) for leaf in ("q_proj", "o_proj", "up_proj", "down_proj")]


def phases(model, cfg=None, count=3, **options):
    """Snapshots of one adapter, its tensors moved before each, and its weight changes: [(snapshot, {path: dW})]."""
    handle = ll.attach(model, cfg or ll.config("lora", r=2), **options)
    taken = []
    for seed in range(count):
        toy.perturb(handle, seed=seed)
        taken.append((ll.snapshot(model, handle.name), {p: ll.delta_weight(model, p, handle.name) for p in handle.layers}))
    handle.detach()
    return taken


@pytest.fixture
def chain():
    """(model, snapshots, changes) of three phases of one LoRA on the toy."""
    model = toy.toy()
    taken = phases(model)
    return model, [shot for shot, _ in taken], [changes for _, changes in taken]


def test_what_is_made_in_inference_mode_composes_and_passes_gradients_afterwards():
    model, x = toy.one(32, 32), toy.inputs(4, 32).requires_grad_()
    (a, _), (b, _) = phases(model, count=2)
    with torch.inference_mode():
        made = [ll.compose({a: 1.0}), ll.compose({a: 0.5, b: 0.25}), ll.ties({a: 1.0, b: 1.0}), ll.dare({a: 0.5, b: 0.5})]
    for composed in made:
        assert not any(tensor.is_inference() for tensor in composed.tensors.values())
        handle = ll.apply(model, composed, name="made")
        with torch.inference_mode():
            again = ll.snapshot(model)
            ll.merge(model)
        assert not any(tensor.is_inference() for tensor in (*again.tensors.values(), model.o_proj.weight))
        (gradient,) = torch.autograd.grad(model(x).sum(), x)
        assert error(gradient, model.o_proj.weight.sum(0).expand_as(gradient)) < 1e-5
        handle.detach()


# --- delta space ------------------------------------------------------------------------------------------------------


def test_a_route_of_rank_8_phases_896_wide_is_the_sum_of_changes():
    model = toy.one(896, 896)
    taken = phases(model, ll.config("lora", r=8))
    (a, dA), (b, dB), (c, dC) = [(shot, changes["o_proj"].double()) for shot, changes in taken]
    composed = ll.compose("A+0.9B+0.25C", chain={"A": a, "B": b, "C": c})
    assert composed.tensors["o_proj.A"].shape == (24, 896)
    want = 0.1 * dA + 0.65 * dB + 0.25 * dC
    ll.apply(model, composed, name="mix")
    got = composed.tensors["o_proj.B"].double() @ composed.tensors["o_proj.A"].double()
    assert (got - want).norm() <= 1e-6 * want.norm()
    assert (got - want).abs().max() <= 1e-6
    x, W = toy.inputs(64, 896), model.o_proj.weight.double() + want
    y = nn.functional.linear(x.double(), W, model.o_proj.bias.double())
    assert (model(x) - y).norm() <= 1e-5 * y.norm()
    model.bfloat16()
    assert (model(x.bfloat16()) - y).norm() <= 1e-2 * y.norm()


def test_the_rank_of_a_mix_is_that_of_the_members_with_a_weight():
    model = toy.one(64, 48)
    taken = dict(zip("ABC", (shot for shot, _ in phases(model, ll.config("lora", r=3)))))
    for route, rank in (("A+0.9B+0.4C", 9), ("A+B+0.4C", 6), ("A+0.5B", 6), ("A", 3)):
        composed = ll.compose(route, chain=taken)
        assert len(composed.tensors["o_proj.A"]) == rank
        handle = ll.apply(model, composed, name="mix")
        assert torch.linalg.matrix_rank(ll.delta_weight(model, "o_proj").double(), rtol=1e-6) == rank
        assert handle.layers["o_proj"].claims.rank(handle.layers["o_proj"].cfg) == rank
        handle.detach()


def test_dictionaries_increments_and_routes_say_the_same(chain):
    _, (a, b, c), _ = chain
    by_route = ll.compose("A + .9*B + 0.4C", chain={"A": a, "B": b, "C": c})
    by_increments = ll.compose({a: 1.0, b - a: 0.9, c - b: 0.4})
    by_weights = ll.compose({a: 1 - 0.9, b: 0.9 - 0.4, c: 0.4})
    for key, tensor in by_route.tensors.items():
        assert error(by_increments.tensors[key], tensor) < 1e-7
        assert error(by_weights.tensors[key], tensor) < 1e-7


def test_one_member_with_weight_1_is_returned_as_a_copy(chain):
    model, (a, b, _), _ = chain
    for cfg in (None, ll.config("hra", r=4), ll.config("vera", r=4), ll.config("dora", r=4)):
        if cfg is not None:
            a = phases(model, cfg, 1)[0][0]
        x = toy.inputs(4, toy.WIDTH)
        handle = ll.apply(model, a, name="itself")
        want = model(x)
        handle.detach()
        for weights in ({a: 1.0}, {a: 1.0, b: 0.0}):
            composed = ll.compose(weights)
            assert composed.cls is a.cls
            with ll.apply(model, composed, name="copy"):
                assert torch.equal(model(x), want)
        assert all(composed.tensors[k].data_ptr() != t.data_ptr() for k, t in a.tensors.items())


def test_different_variants_on_different_layers_compose_with_their_biases():
    model = toy.toy()
    configs = [
        ll.config("lora", r=2),
        ll.config("hra", r=2, targets=("q_proj", "up_proj")),
        ll.config("ia3", targets=("o_proj", "up_proj")),
        ll.config("road", targets=("down_proj", "up_proj")),
    ]
    weights = (0.7, -0.5, 0.3, 1.2)
    shots, dW, db = [], dict.fromkeys(PATHS, 0.0), dict.fromkeys(PATHS, 0.0)
    for cfg, weight in zip(configs, weights):
        with toy.perturb(ll.attach(model, cfg)) as handle:
            shots.append(ll.snapshot(model))
            for path in handle.layers:
                dW[path] = dW[path] + weight * ll.delta_weight(model, path).double()
                db[path] = db[path] + weight * ll.delta_bias(model, path).double()
    handle = ll.apply(model, ll.compose(dict(zip(shots, weights))), name="mix")
    for path in PATHS:
        assert (ll.delta_weight(model, path) - dW[path]).norm() <= 1e-6 * dW[path].norm()
        assert (ll.delta_bias(model, path) - db[path]).norm() <= 1e-6 * max(db[path].norm(), 1e-9)
    assert any(d.abs().max() > 0.01 for d in db.values())
    dense = copy.deepcopy(model)
    ll.detach(dense)
    with torch.no_grad():
        for path in PATHS:
            layer = dense.get_submodule(path)
            layer.weight += dW[path]
            if layer.bias is not None:
                layer.bias += db[path]
    x = toy.inputs(4, toy.WIDTH)
    assert torch.linalg.vector_norm(model(x) - dense(x)) <= 1e-5 * dense(x).norm()
    kinds = {path: sorted(handle.layers[path].state_dict()) for path in PATHS}
    assert kinds["blocks.0.q_proj"] == ["A", "B", "b"]
    assert kinds["blocks.0.up_proj"] == ["D", "b"]


def test_float64_members_stay_in_float64():
    model = toy.one(48, 64, dtype=torch.float64)
    (a, _), (b, _) = phases(model, ll.config("lora", r=2, dtype=torch.float64), 2)
    with ll.apply(model, ll.compose({a: 0.3, b: 0.4}), name="mix") as handle:
        assert {t.dtype for t in handle.layers["o_proj"].state_dict().values()} == {torch.float64}


def test_a_sum_that_cancels_and_one_of_nothing_are_the_base(chain):
    model, (a, _, _), _ = chain
    x = toy.inputs(4, toy.WIDTH)
    base = model(x)
    start = ll.attach(model, ll.config("lora", r=2))
    fresh = ll.snapshot(model)
    start.detach()
    for weights in ({a: 0.0}, {fresh: 2.0}, {a - a: 0.5}):
        with ll.apply(model, ll.compose(weights), name="nothing"):
            assert torch.equal(model(x), base)


def test_composed_adapters_compose_again(chain):
    model, (a, b, c), (dA, dB, dC) = chain
    inner = ll.compose({a: 0.5, b: 0.25})
    with ll.apply(model, ll.compose({inner: 2.0, c: -1.0}), name="outer"):
        for path in PATHS:
            want = dA[path] + 0.5 * dB[path] - dC[path]
            assert (ll.delta_weight(model, path) - want).norm() <= 1e-6 * want.norm()


def test_gains_by_module_pattern_weigh_each_layer(chain):
    model, (a, b, _), (dA, dB, _) = chain
    composed = ll.compose({a: 1.0, b - a: {"blocks.0": 0.25, "blocks.1": 0.75, "blocks.1.q_proj": 0.0}})
    ll.apply(model, composed, name="mix")
    for path in PATHS:
        gain = 0.0 if path == "blocks.1.q_proj" else 0.75 if "1" in path else 0.25
        want = dA[path] + gain * (dB[path] - dA[path])
        assert (ll.delta_weight(model, path) - want).norm() <= 1e-6 * want.norm()


def test_the_numbers_of_a_route_with_group_scales():
    """Stable (1, 2), increments (10, 20) and (100, 200), b = 0.5, group scales of C (0.25, 0.75): 31 and 162."""
    model = nn.ModuleDict({f"part_{i}": nn.Linear(2, 2, bias=False) for i in (1, 2)})
    handle = ll.attach(model, ll.config("lora", r=1, alpha=1.0))
    shots = []
    for numbers in ((1.0, 2.0), (11.0, 22.0), (111.0, 222.0)):
        with torch.no_grad():
            for adapter, number in zip(handle.layers.values(), numbers):
                adapter.A.fill_(1.0)
                adapter.B.fill_(number)
        shots.append(ll.snapshot(model))
    handle.detach()
    a, b, c = shots
    composed = ll.compose({a: 1.0, b - a: 0.5, c - b: {"part_1": 0.25, "part_2": 0.75}})
    ll.apply(model, composed, name="mix")
    for path, number in (("part_1", 31.0), ("part_2", 162.0)):
        assert torch.equal(ll.delta_weight(model, path), torch.full((2, 2), number))


# --- truncation -------------------------------------------------------------------------------------------------------


def test_truncation_by_qr_is_the_full_svd_and_its_error_the_tail():
    model = toy.one(96, 64)
    taken = phases(model, ll.config("lora", r=6))
    weights = dict(zip((shot for shot, _ in taken), (0.5, -0.3, 0.9)))
    whole = sum(w * changes["o_proj"].double() for w, (_, changes) in zip(weights.values(), taken))
    U, S, Vh = torch.linalg.svd(whole)
    for rank in (1, 4, 11):
        composed = ll.compose(weights, rank=rank)
        with ll.apply(model, composed, name="cut") as handle:
            got = ll.delta_weight(model, "o_proj").double()
            assert handle.layers["o_proj"].report == composed.report["o_proj"]
            assert "truncation=" in str(ll.status(model))
        best = U[:, :rank] * S[:rank] @ Vh[:rank]
        tail = float(S[rank:].norm() / S.norm())
        assert (got - best).norm() <= 1e-5 * whole.norm()
        assert abs(composed.report["o_proj"]["truncation"] - tail) <= 1e-4 * tail
        assert abs(float((got - whole).norm() / whole.norm()) - tail) <= 1e-4 * tail
    assert ll.compose(weights, rank=18).report["o_proj"]["truncation"] == 0.0


def test_dense_members_are_truncated_too():
    model = toy.one(32, 24)
    shot, changes = phases(model, ll.config("lokr", r=4), 1)[0]
    S = torch.linalg.svdvals(changes["o_proj"].double())
    composed = ll.compose({shot: 1.0}, rank=2)
    assert abs(composed.report["o_proj"]["truncation"] - float(S[2:].norm() / S.norm())) <= 1e-6
    with ll.apply(model, composed, name="cut"):
        assert torch.linalg.matrix_rank(ll.delta_weight(model, "o_proj").double(), rtol=1e-5) == 2


def test_truncating_nothing_loses_nothing():
    zero = torch.zeros(8, 8, dtype=torch.float64)
    for total in (Change(zero, None, zero[0]), Change(zero, zero, zero[0])):
        kept, lost = truncated(total, 2)
        assert lost == 0.0
        assert not kept.dense().any()


# --- factor space -----------------------------------------------------------------------------------------------------


def factors_of(shot, path="o_proj"):
    return shot.tensors[f"{path}.A"].double(), shot.tensors[f"{path}.B"].double()


@pytest.mark.parametrize(("b", "c"), [(0.9, 0.25), (0.5, 0.5), (0.0, 0.0), (1.0, 0.0), (1.0, 1.0)])
def test_factor_space_differs_from_delta_space_by_the_known_products(b, c):
    model = toy.one(64, 48)
    first, second, third = (shot for shot, _ in phases(model, ll.config("lora", r=4, alpha=8.0)))
    weights, s = {first: 1.0, second - first: b, third - second: c}, 2.0
    found = {}
    for space in ("factor", "delta"):
        with ll.apply(model, ll.compose(weights, space=space), name="mix"):
            found[space] = ll.delta_weight(model, "o_proj").double()
    (A0, B0), (A1, B1), (A2, B2) = map(factors_of, (first, second, third))
    dA, dB, eA, eB = A1 - A0, B1 - B0, A2 - A1, B2 - B1
    want = -s * (b * (1 - b) * dB @ dA + c * (1 - c) * eB @ eA + c * (1 - b) * (dB @ eA + eB @ dA))
    difference = found["factor"] - found["delta"]
    assert (difference - want).norm() <= 1e-6 * found["delta"].norm()
    if (b, c) in ((0.0, 0.0), (1.0, 0.0), (1.0, 1.0)):
        assert difference.norm() <= 1e-7 * found["delta"].norm()
    else:
        assert difference.norm() > 1e-3 * found["delta"].norm()


def test_factor_space_refuses_another_lineage_another_sum_and_a_rank(chain):
    model, (a, b, _), _ = chain
    other = phases(model, count=1)[0][0]  # the same config and seed, another attach
    refusal(lambda: ll.compose({a: 1.0, other - a: 0.5}, space="factor"), "no phases of one training", 'space="delta"')
    refusal(lambda: ll.compose({a: 1.0, b: 0.5}, space="factor"), "add up to 1.5", "b - a")
    refusal(lambda: ll.compose({a: 1.0, b - a: 0.5}, space="factor", rank=2), "rank=2 in factor space")
    refusal(lambda: ll.compose({a: 1.0}, space="weight"), "'weight'")
    thawed = dataclasses.replace(b, config=dataclasses.replace(b.config, alpha=1.0))
    refusal(lambda: ll.compose({a: 1.0, thawed - a: 0.5}, space="factor"), "no phases of one training")


def test_the_signs_of_factors_do_not_matter_in_delta_space_and_are_refused_in_factor_space():
    model = toy.one(64, 48)
    handle = toy.perturb(ll.attach(model, ll.config("lora", r=4)))
    a = ll.snapshot(model)
    b = ll.snapshot(toy.perturb(handle, seed=5).model)
    with torch.no_grad():
        for parameter in handle.parameters():
            parameter.neg_()
    turned = ll.snapshot(model)
    handle.detach()
    found = []
    for member in (b, turned):
        with ll.apply(model, ll.compose({a: 0.4, member: 0.6}), name="mix"):
            found.append(ll.delta_weight(model, "o_proj"))
    assert error(found[1], found[0]) < 1e-7
    ll.compose({a: 1.0, b - a: 0.6}, space="factor")
    refusal(lambda: ll.compose({a: 1.0, turned - a: 0.6}, space="factor"), "points against", 'space="delta"')


def test_frozen_tensors_that_differ_are_refused_in_factor_space():
    model = toy.one(64, 48)
    (a, _), (b, _) = phases(model, ll.config("pissa", r=4), 2)
    ll.compose({a: 1.0, b - a: 0.5}, space="factor")
    b.tensors["o_proj.A0"].mul_(1.01)
    refusal(lambda: ll.compose({a: 1.0, b - a: 0.5}, space="factor"), "frozen tensors", "o_proj.A0")


# --- output space -----------------------------------------------------------------------------------------------------


def test_output_space_runs_every_member_and_equals_delta_space_for_linear_ones(tmp_path):
    model, x = toy.toy(), toy.inputs(4, toy.WIDTH)
    configs = (
        ll.config("lora", r=2, rank_pattern={"q_proj": 3}, coeff=0.5),
        ll.config("vera", r=4),
        ll.config("hra", r=2, targets=("q_proj", "up_proj")),
        ll.config("ia3", targets=("blocks.1",)),
    )
    shots = [phases(model, cfg, 1)[0][0] for cfg in configs]
    weights = dict(zip(shots, (0.7, -0.5, {"q_proj": 0.3}, 1.2)))
    with ll.apply(model, ll.compose(weights), name="mix"):
        want = model(x)
    before = photograph(model)
    handle = ll.apply(model, ll.compose(weights, space="output"), name="mix")
    got = model(x)
    assert error(got, want) < 1e-5
    refusal(lambda: ll.merge(model), "ensemble at", "not a linear map")
    handle.save(tmp_path / "mix.safetensors")
    assert torch.equal(pickle.loads(pickle.dumps(copy.deepcopy(model)))(x), got)
    handle.detach()
    demand_same(model, before, "after detach")
    with ll.load(model, tmp_path / "mix.safetensors"):
        assert torch.equal(model(x), got)
        model.bfloat16()
        assert error(model(x.bfloat16()), got) < 0.05


def test_an_ensemble_compiles_to_one_graph():
    model, x = toy.one(), toy.inputs(4, toy.WIDTH)
    shots = [phases(model, cfg, 1)[0][0] for cfg in (ll.config("lora", r=2), ll.config("ia3"))]
    ll.apply(model, ll.compose(dict(zip(shots, (0.5, 0.7))), space="output"), name="mix")
    torch.compiler.reset()
    assert error(torch.compile(model, backend="eager", fullgraph=True)(x), model(x)) < 1e-6
    torch.compiler.reset()


# --- snapshots, lineage, files ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ll.names())
def test_snapshot_and_apply_and_the_file_give_every_bit(name, tmp_path):
    model, cls = toy.toy(), ll.get(name)
    handle = toy.perturb(toy.attached(model, cls, toy.small(cls)))
    x = toy.inputs(4, toy.WIDTH)
    want, shot = model(x), ll.snapshot(model)
    with torch.no_grad():
        for parameter in handle.parameters():
            parameter.mul_(1.5)
    handle.detach()
    applied = ll.apply(model, shot, name="again")
    assert torch.equal(model(x), want)
    assert applied.config == handle.config
    applied.save(tmp_path / "a.safetensors")
    applied.detach()
    ll.load(model, tmp_path / "a.safetensors")
    assert torch.equal(model(x), want)


def test_a_composed_adapter_is_an_ordinary_one(chain, tmp_path):
    model, (a, b, _), _ = chain
    bare, x = photograph(model), toy.inputs(4, toy.WIDTH)
    base = model(x)
    handle = ll.apply(model, ll.compose({a: 0.5, b: 0.7}), name="mix")
    whole = model(x)
    assert not list(handle.parameters())
    with ll.scale(model, 0.5):
        half = model(x)
    with ll.scale(model, torch.tensor([0.0, 1.0, 0.5, 0.0])):
        assert error(model(x), torch.stack([base[0], whole[1], half[2], base[3]])) < 1e-6
    with ll.disabled(model):
        assert torch.equal(model(x), base)
    assert {row.variant for row in ll.status(model).layers} == {"composed"}
    ll.save(model, tmp_path / "mix.safetensors")
    ll.merge(model)
    assert error(model(x), whole) < 1e-5
    ll.unmerge(model)
    twin = copy.deepcopy(model)
    assert torch.equal(twin(x), whole)
    assert torch.equal(pickle.loads(pickle.dumps(model))(x), whole)
    torch.compiler.reset()
    assert error(torch.compile(model, backend="eager", fullgraph=True)(x), whole) < 1e-6
    torch.compiler.reset()
    handle.detach()
    demand_same(model, bare, "after detach")
    loaded = ll.load(model, tmp_path / "mix.safetensors")
    assert loaded.name == "mix"
    assert torch.equal(model(x), whole)
    states = [layer.state_dict() for h in (handle, loaded) for layer in h.layers.values()]
    assert all(torch.equal(a[k], b[k]) for a, b in zip(states[:8], states[8:]) for k in a)


def test_a_composed_adapter_is_no_published_method():
    assert "composed" not in ll.names()
    assert "ComposedConfig" not in dir(ll)
    assert ll.get("composed").variant == "composed"
    refusal(lambda: ll.get("compose"), "There is no variant 'compose'")


def test_snapshots_are_copies_of_their_moment(chain):
    model, (a, _, _), _ = chain
    before = {key: tensor.clone() for key, tensor in a.tensors.items()}
    with toy.perturb(ll.apply(model, a, name="more")):
        assert all(torch.equal(a.tensors[key], tensor) for key, tensor in before.items())


def test_a_lineage_is_new_at_attach_and_goes_with_snapshots_and_files(chain, tmp_path):
    model, (a, b, c), _ = chain
    assert len({shot.lineage.id for shot in (a, b, c)}) == 1
    assert [shot.lineage.step for shot in (a, b, c)] == [0, 1, 2]
    handle = ll.apply(model, b, name="on")
    handle.save(tmp_path / "b.safetensors")
    handle.detach()
    branches = []
    for seed in (7, 8):
        with toy.perturb(ll.load(model, tmp_path / "b.safetensors"), seed=seed):
            branches.append(ll.snapshot(model))
    assert {shot.lineage.id for shot in branches} == {a.lineage.id}
    ll.compose({a: 1.0, branches[0] - a: 0.5, branches[1] - a: 0.5}, space="factor")
    assert phases(model, count=1)[0][0].lineage.id != a.lineage.id
    assert ll.compose({a: 0.5}).lineage.id != a.lineage.id


def test_a_file_without_lineage_starts_a_new_one():
    """Files of version 1 had none."""
    model = toy.one(8, 8)
    lineages = []
    for _ in range(2):
        with ll.load(model, FILES / "version1.safetensors"):
            lineages.append(ll.snapshot(model).lineage)
    assert [lineage.step for lineage in lineages] == [0, 0]
    assert len({lineage.id for lineage in lineages} - {""}) == 2


def test_what_cannot_be_snapshot_or_applied_is_refused(chain):
    model, (a, _, _), _ = chain
    refusal(lambda: ll.snapshot(model), "0 adapters")
    handle = ll.apply(model, a, name="default")
    refusal(lambda: ll.snapshot(model, "other"), "no adapter 'other'")
    refusal(lambda: ll.apply(model, a, name="default"), "There is an adapter 'default'", model=model)
    ll.merge(model)
    refusal(lambda: ll.snapshot(model), "is merged", "ll.unmerge(model)")
    refusal(lambda: ll.compose({a: 0.5}), "has changed since", "ll.unmerge(model)")
    ll.unmerge(model)
    next(iter(handle.layers.values())).handles[0].remove()
    refusal(lambda: ll.snapshot(model), "hooks", "blocks.0.q_proj")
    handle.detach()
    refusal(lambda: ll.apply(toy.one(), a, name="x"), "belongs to another model")
    stranger = toy.toy()
    with torch.no_grad():
        stranger.blocks[1].q_proj.weight.mul_(1.01)
    refusal(lambda: ll.apply(stranger, a, name="x"), "another base", "blocks.1.q_proj", "strict_base=False", model=stranger)
    ll.apply(stranger, a, name="x", strict_base=False).detach()


def test_members_on_different_bases_and_of_different_shapes_are_refused(chain):
    _, (a, _, _), _ = chain
    stranger = toy.toy()
    with torch.no_grad():
        stranger.blocks[1].q_proj.weight.mul_(1.01)
    other = phases(stranger, count=1)[0][0]
    refusal(lambda: ll.compose({a: 0.5, other: 0.5}), "different bases", "blocks.1.q_proj", "its numbers")
    narrow, wide = (phases(toy.one(24, width), count=1)[0][0] for width in (32, 48))
    refusal(lambda: ll.compose({narrow: 0.5, wide: 0.5}), "different bases", "o_proj differs in shape: [32, 24], [48, 24]")


def test_what_cannot_be_composed_is_refused_by_name(chain):
    _, (a, b, _), _ = chain
    refusal(lambda: ll.compose({"default": 1.0}), "'default' is no snapshot", "ll.snapshot(model, name)")
    refusal(lambda: ll.compose({}), "nothing to compose")
    for weight in (float("nan"), "1", True):
        refusal(lambda weight=weight: ll.compose({a: weight}), "no finite number")
    for rank in (0, 2.0, True):
        refusal(lambda rank=rank: ll.compose({a: 1.0, b: 0.5}, rank=rank), f"rank={rank}")
    refusal(lambda: ll.compose({a: {"blocks.7": 1.0}}), "'blocks.7' fits no adapted layer", "blocks.0.q_proj")
    refusal(lambda: ll.compose("A+B"), "A route and a chain", 'chain={"A": a')
    refusal(lambda: ll.compose({a: 1.0}, chain={"A": a}), "A route and a chain")
    refusal(lambda: ll.compose("A+B", chain={"A": b, "B": a}), "out of order", "[1, 0]")
    refusal(lambda: ll.compose("A+X", chain={"A": a, "B": b}), "there is no phase 'X'")


# --- TIES and DARE ----------------------------------------------------------------------------------------------------


def test_ties_is_trim_elect_and_disjoint_mean_number_by_number():
    model = toy.one(12, 10)
    taken = []
    for seed in range(3):
        with toy.perturb(ll.attach(model, ll.config("ia3")), seed=seed):
            taken.append((ll.snapshot(model), {"o_proj": ll.delta_weight(model, "o_proj")}))
    lam, density = 0.7, 0.6
    trimmed = []
    for _, changes in taken:
        t = changes["o_proj"].double()
        smallest = t.abs().flatten().sort(descending=True).values[round(density * t.numel()) - 1]
        trimmed.append([[v if abs(v) >= smallest else 0.0 for v in row] for row in t.tolist()])
    want = torch.zeros(10, 12)
    for o in range(10):
        for i in range(12):
            values = [t[o][i] for t in trimmed]
            sign = (sum(values) > 0) - (sum(values) < 0)
            agreeing = [v for v in values if v * sign > 0]
            want[o, i] = lam * sum(agreeing) / len(agreeing) if agreeing else 0.0
    composed = ll.ties({shot: lam for shot, _ in taken}, density=density)
    with ll.apply(model, composed, name="ties"):
        assert error(ll.delta_weight(model, "o_proj"), want) < 1e-6
        assert ll.delta_bias(model, "o_proj").abs().max() > 0
    assert want.count_nonzero() > 20
    signs = torch.tensor(trimmed).sign()
    assert ((signs.amax(0) > 0) & (signs.amin(0) < 0)).any()  # members that disagree


def test_ties_of_one_whole_member_is_that_member(chain):
    model, (a, _, _), (dA, _, _) = chain
    with ll.apply(model, ll.ties({a: 1.0}, density=1.0), name="ties"):
        assert error(ll.delta_weight(model, PATHS[0]), dA[PATHS[0]]) < 1e-6
    cut = ll.ties({a: 1.0}, density=0.5, rank=2)
    assert 0 < cut.report[PATHS[0]]["truncation"] < 1


def test_dare_drops_the_share_keeps_the_mean_and_repeats_with_its_seed():
    model = toy.one(96, 80)
    (a, dA), (b, dB) = phases(model, ll.config("lora", r=4), 2)
    one = ll.dare({a: 1.0}, drop=0.75)
    D, whole = one.tensors["o_proj.D"], dA["o_proj"]
    kept = D != 0
    assert abs(float(kept.float().mean()) - 0.25) < 0.02
    assert error(D[kept], 4 * whole[kept]) < 1e-6
    assert torch.equal(ll.dare({a: 1.0}, drop=0.75).tensors["o_proj.D"], D)
    assert not torch.equal(ll.dare({a: 1.0}, drop=0.75, seed=1).tensors["o_proj.D"], D)
    two = ll.dare({a: 0.5, b: 0.25}, drop=0.0).tensors["o_proj.D"]
    assert error(two, 0.5 * whole + 0.25 * dB["o_proj"]) < 1e-6
    state = torch.random.get_rng_state()
    ll.ties({ll.dare({a: 1.0}, seed=0): 1.0, ll.dare({b: 1.0}, seed=1): 1.0}, density=1.0)
    assert torch.equal(torch.random.get_rng_state(), state)


def test_shares_outside_their_range_are_refused(chain):
    _, (a, _, _), _ = chain
    for density in (0.0, 1.5):
        refusal(lambda density=density: ll.ties({a: 1.0}, density=density), f"density={density}")
    for drop in (-0.1, 1.0):
        refusal(lambda drop=drop: ll.dare({a: 1.0}, drop=drop), f"drop={drop}")


def test_other_types_than_weights_and_snapshots_are_named():
    model = toy.toy()
    ll.attach(model, ll.config("lora", r=2))
    a = ll.snapshot(model)
    with pytest.raises(ll.LoraLiteError, match="not a list"):
        ll.compose([a])
    with pytest.raises(ll.LoraLiteError, match=r"not a Increment(.|\n)*ll.compose"):
        ll.apply(toy.toy(), a - a, name="x")
    with pytest.raises(ll.LoraLiteError, match="not a str"):
        ll.apply(toy.toy(), "a", name="x")
