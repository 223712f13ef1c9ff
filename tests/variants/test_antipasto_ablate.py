"""Trained ablation against I - c D diag(a) D^T in dense float64, and against directional ablation of a residual model."""

import copy

import pytest
import torch
from torch import nn

import lora_lite as ll
from lora_lite.contract.registry import card, get
from lora_lite.errors import LoraLiteWarning
from lora_lite.testing import checks, toy
from lora_lite.testing.checks import error
from lora_lite.testing.formula import T64, adapted, check_dense, live_gradients
from tests.families.test_subspace import BASES, batches, kept, projector
from tests.oracles.kinds import of_options
from tests.oracles.layer import check_rest_stays

pytestmark = [
    pytest.mark.filterwarnings("ignore:coeff outside:lora_lite.errors.LoraLiteWarning"),
    pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning"),
]


def config(**fields):
    return ll.AntiPaSTOAblateConfig(**{"r": 8, **fields})


def gram_schmidt(V):
    """Orthonormal columns, each from the one in its place."""
    columns = []
    for v in V.T:
        for d in columns:
            v = v - d * (d @ v)
        columns.append(v / v.norm())
    return torch.stack(columns, dim=1)


def directions(a):
    return gram_schmidt(a.U @ a.v.detach())


def operator(a, c):
    D = gram_schmidt(a.U @ a.v)
    return torch.eye(a.d_out, dtype=D.dtype) - c * (D * a.a.clamp(0, 1)) @ D.T


def dense(a, W, b, c):
    M = operator(a, c)
    return M @ W, M @ b if a.cfg.include_bias and b is not None else b


def layer(strength=1.0, data=None, d_in=24, d_out=32, bias=True, **fields):
    """(model, adapter) in float64 with random directions and these strengths."""
    model, adapter = adapted(config(**fields), d_in, d_out, bias, data=data)
    with torch.no_grad():
        adapter.a.copy_(torch.as_tensor(strength, dtype=torch.float64))
    return model, adapter


def contrasted():
    return {"positive": batches()[:2], "negative": batches()[2:]}


def dense_map(model):
    """W' for W = I of one layer: what the adapter does to y."""
    with torch.no_grad():
        model.o_proj.weight.copy_(torch.eye(24))
    return torch.eye(24, dtype=torch.float64) + ll.delta_weight(model, "o_proj").double()


OPTIONS = [
    {"k": 3, "init_alpha": 0.5},
    {"k": 2, "seed_direction": "contrast"},
    {"seed_direction": "variance", "k": 2},
    {"basis": "corda", "include_bias": False, "wake": 0.0, "init_alpha": 0.3},
]


@pytest.mark.parametrize(
    ("check", "fields"),
    [  # one compilation will do: the others differ in how they start
        pytest.param(
            check, fields, marks=of_options(check) if fields is not OPTIONS[0] else (), id=f"{check.function.__name__}-{fields}"
        )
        for fields in OPTIONS
        for check in checks("antipasto_ablate")
        if check.function.__name__ != "check_compiles" or fields is OPTIONS[0]
    ],
)
def test_options_are_lawful(check, fields):
    if "init_alpha" in fields and check.function.__name__ == "check_starts_at_identity":
        with pytest.raises(AssertionError, match="the start is not the base model"):
            check.function(check.cls, config(**fields))
    else:
        check.function(check.cls, config(**fields))


# --- the operator: R1 to R6, R9, R11 ----------------------------------------------------------------------------------


@pytest.mark.parametrize("k", [1, 3])
@pytest.mark.parametrize("include_bias", [True, False])
def test_output_and_gradients_equal_the_dense_form(include_bias, k):
    cfg = config(k=k, include_bias=include_bias, init_alpha=0.5)
    _, adapter = adapted(cfg)
    assert (adapter.a >= cfg.wake).all()
    assert (adapter.a <= 1).all()
    check_dense(cfg, dense)


def test_directions_are_orthonormal_also_with_a_bfloat16_basis():
    for dtype in (torch.float32, torch.bfloat16):
        model = toy.one(dtype=dtype)
        adapter = toy.perturb(ll.attach(model, config(k=3, dtype=torch.float32))).layers["o_proj"]
        with torch.no_grad():
            adapter.a.fill_(1.0)
            model.o_proj.weight.copy_(0)
            model.o_proj.weight[:24].copy_(torch.eye(24))
        D = gram_schmidt(adapter.U.float() @ adapter.v)
        assert error(D.T @ D, torch.eye(3)) < 1e-6
        want = -(D @ D.T)[:, :24]
        assert error(ll.delta_weight(model, "o_proj"), want) < 1e-6


@pytest.mark.parametrize("include_bias", [True, False])
@pytest.mark.parametrize("basis", BASES)
def test_the_whole_layer_is_the_operator_on_its_output_in_every_basis(basis, include_bias):
    data = None if basis == "svd" else batches()
    model, adapter = layer([0.4, 0.9], data, 24, 40, r=12, k=2, basis=basis, include_bias=include_bias)
    W, b = model.o_proj.weight.detach(), model.o_proj.bias.detach()
    x = toy.inputs(5, 24, dtype=torch.float64)
    for c in (1.0, 0.5, -0.7, 2.0):
        with ll.scale(model, c):
            got = model(x)
        t = x @ W.T + b if include_bias else x @ W.T
        assert error(got - (0 if include_bias else b), t @ operator(adapter, c).T) < T64


def test_eigenvalues_are_one_and_one_minus_c_a():
    strengths = torch.tensor([0.0, 0.3, 1.0], dtype=torch.float64)
    for c in (0.0, 0.4, 1.0):
        model, _ = layer(strengths, d_out=24, k=3)
        ll.scale(model, c)
        M = dense_map(model)
        got = torch.linalg.eigvalsh((M + M.T) / 2)
        want = torch.cat([1 - c * strengths, torch.ones(21, dtype=torch.float64)]).sort().values
        assert error(got, want) < 1e-6
        assert (got > -1e-6).all()
        assert (got < 1 + 1e-6).all()
        assert abs(float(M.trace()) - (24 - c * float(strengths.sum()))) < 1e-5


@pytest.mark.parametrize(
    ("product", "excess"), [(-1e-6, 1e-6), (0.0, 0.0), (0.5, 0.0), (1.0, 0.0), (2.0, 0.0), (2 + 1e-6, 1e-6)]
)
def test_the_norm_is_one_exactly_where_c_a_lies_between_zero_and_two(product, excess):
    model, adapter = layer(1.0, d_out=24)
    with ll.scale(model, product), torch.no_grad():
        y = torch.eye(24, dtype=torch.float64)
        M = adapter.forward(y, y, None)
    assert abs(float(torch.linalg.matrix_norm(M, 2)) - 1 - excess) < 1e-11


def test_coeff_between_one_and_two_reflects():
    model, adapter = layer(1.0, bias=False)
    x, D = toy.inputs(5, 24, dtype=torch.float64), directions(adapter)
    with ll.disabled(model):
        base = model(x) @ D
    with ll.scale(model, 1.5):
        assert error(model(x) @ D, -0.5 * base) < T64


def test_endpoints_are_the_identity_and_exact_erasure():
    for dtype in (torch.float32, torch.bfloat16):
        model = toy.one(dtype=dtype)
        x = toy.inputs(50, 24, dtype=dtype)
        base = model(x)
        adapter = toy.perturb(ll.attach(model, config(k=2))).layers["o_proj"]
        with torch.no_grad():
            adapter.a.zero_()
            assert torch.equal(model(x), base)
            adapter.a.fill_(1.0)
            once, D = model(x), gram_schmidt(adapter.U.float() @ adapter.v)
            twice = adapter.forward(x, once, None).to(dtype)
            residue = float((once.float() @ D).norm() / (base.float() @ D).norm())
        assert residue < (1e-5 if dtype is torch.float32 else 1e-2)
        assert error(twice, once) < (1e-5 if dtype is torch.float32 else 1e-2)
        assert error(once, base) > 0.1


def test_negative_coeff_adds_the_direction_back_and_warns():
    model, _ = layer(1.0, d_out=24)
    with pytest.warns(LoraLiteWarning, match=r"coeff outside \[0.0, 1.0\]"):
        ll.scale(model, -0.5)
    assert abs(float(torch.linalg.matrix_norm(dense_map(model), 2)) - 1.5) < 1e-6


def test_the_rest_of_the_output_stays():
    check_rest_stays(*layer([1.0, 0.5], k=2))


def test_signs_of_directions_and_singular_vectors_do_not_matter():
    model, adapter = layer([1.0, 0.5], k=2)
    x = toy.inputs(5, 24, dtype=torch.float64)
    before = model(x)
    with torch.no_grad():
        adapter.v.neg_()
    assert torch.equal(model(x), before)
    signs = torch.tensor([1.0, -1.0] * 4, dtype=torch.float64)
    adapter.U.mul_(signs)
    with torch.no_grad():
        adapter.v.mul_(signs[:, None])
    assert error(model(x), before) < T64


def test_only_the_span_counts_where_strengths_are_equal():
    mix = torch.tensor([[1.0, 0.5], [-0.3, 2.0]], dtype=torch.float64)
    for strengths, same in (([0.7, 0.7], True), ([0.2, 0.9], False)):
        model, adapter = layer(strengths, k=2)
        x = toy.inputs(5, 24, dtype=torch.float64)
        before = model(x)
        with torch.no_grad():
            adapter.v.copy_(adapter.v @ mix)
        assert (error(model(x), before) < T64) is same


def test_outputs_do_not_grow_in_bfloat16():
    model = toy.one(24, 64, dtype=torch.bfloat16)
    x = toy.inputs(200, 24, dtype=torch.bfloat16)
    base = model(x).float()
    adapter = toy.perturb(ll.attach(model, config(k=2))).layers["o_proj"]
    with torch.no_grad():
        adapter.a.copy_(torch.tensor([0.3, 1.0]))
    assert (model(x).float().norm(dim=1) <= (1 + 2**-7) * base.norm(dim=1)).all()


# --- strengths and the wake term: R7 ----------------------------------------------------------------------------------


@pytest.mark.parametrize(("value", "clamped"), [(-0.1, 0.0), (1.3, 1.0)])
def test_strengths_act_within_their_bounds_and_come_back_from_outside(value, clamped):
    model, adapter = layer(value)
    x = toy.inputs(5, 24, dtype=torch.float64)
    got = model(x)
    gradients = [torch.autograd.grad(sign * got.square().sum(), adapter.a, retain_graph=True)[0].item() for sign in (1, -1)]
    with torch.no_grad():
        adapter.a.fill_(clamped)
    assert torch.equal(model(x), got)
    inward = [g for g in gradients if g != 0]
    assert len(inward) == 1
    assert (inward[0] < 0) is (value < 0)


def test_wake_changes_no_value_and_no_other_gradient():
    x = toy.inputs(5, 24, dtype=torch.float64).requires_grad_()
    results = []
    for wake in (0.0, 0.05):
        model, adapter = layer(0.02, wake=wake)
        out = model(x)
        loss = (out * toy.inputs(5, 32, dtype=torch.float64, seed=4)).sum()
        results.append((out, *torch.autograd.grad(loss, (x, adapter.a, adapter.v))))
    (off, off_x, off_a, off_v), (on, on_x, on_a, on_v) = results
    assert torch.equal(on, off)
    assert torch.equal(on_x, off_x)
    assert torch.equal(on_a, off_a)
    assert error(on_v, off_v * 0.05 / 0.02) < T64


def test_wake_gives_v_the_gradient_it_has_at_that_strength_and_stops_there():
    def gradient(strength, wake):
        model, adapter = layer(strength, wake=wake)
        out = model(toy.inputs(5, 24, dtype=torch.float64))
        return torch.autograd.grad((out * toy.inputs(5, 32, dtype=torch.float64, seed=4)).sum(), adapter.v)[
            0
        ], adapter.v.detach()

    slept, v = gradient(0.0, 0.05)
    assert error(slept, gradient(0.05, 0.0)[0]) < T64
    assert slept.abs().max() > 1e-3
    assert abs(float((slept * v).sum())) < 1e-12
    assert not gradient(0.0, 0.0)[0].any()
    assert torch.equal(gradient(0.3, 0.05)[0], gradient(0.3, 0.0)[0])


def training(wake, seed, steps=120):
    """(loss before, loss after, strength) on y -> (I - e e^T) y, one direction of a strongly uneven output."""
    model = toy.one(8, 8, bias=False, dtype=torch.float64)
    scales = torch.linspace(0.2, 3.0, 8, dtype=torch.float64)
    mix = torch.linalg.qr(toy.inputs(8, 8, dtype=torch.float64, seed=3)).Q
    with torch.no_grad():
        model.o_proj.weight.copy_(mix * scales)
    x, e = toy.inputs(64, 8, dtype=torch.float64), mix[:, 0] + 0.3 * mix[:, -1]  # weak on its own, strong in what comes with it
    e = e / e.norm()
    base = model(x).detach()
    target = base - torch.outer(base @ e, e)
    handle = ll.attach(model, config(seed=seed, wake=wake, dtype=torch.float64, seed_direction="random"))
    optimizer = torch.optim.Adam(handle.parameters(), lr=5e-2)
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = (model(x) - target).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses[0], losses[-1], float(handle.layers["o_proj"].a.detach())


def test_the_wake_term_leaves_no_start_asleep():
    asleep = [training(0.0, seed) for seed in range(6)]
    awake = [training(0.05, seed) for seed in range(6)]
    assert any(after == before for before, after, _ in asleep)
    assert all(after < 0.02 * before and strength > 0.5 for before, after, strength in awake)


def test_gradient_pattern():
    seen = [live_gradients(config(seed=seed)) for seed in range(4)]
    assert all("v" in names for steps in seen for names in steps)
    assert {"a" in steps[0] for steps in seen} == {True, False}
    still = [live_gradients(config(seed=seed, wake=0.0)) for seed in range(4)]
    assert all("v" not in steps[0] for steps in still)
    assert {frozenset(steps[1]) for steps in still} == {frozenset(), frozenset({"a", "v"})}
    assert live_gradients(config(init_alpha=0.3)) == [{"a", "v"}, {"a", "v"}]


def test_a_start_above_zero_is_the_base_at_coeff_zero_only():
    x = toy.inputs(5, 24, dtype=torch.float64)
    model, adapter = adapted(config(init_alpha=0.4), size=0)
    assert error(adapter.a, torch.full((1,), 0.4)) < 1e-7
    with ll.disabled(model):
        base = model(x)
    assert error(model(x), base) > 1e-3


# --- where the directions start ---------------------------------------------------------------------------------------


def difference(model):
    """m in float64 from the last kept tokens, as the paper takes it."""

    def mean(part):
        rows = [model(batch["x"])[i, int(m.sum()) - 1] for batch in part for i, m in enumerate(batch["attention_mask"])]
        return torch.stack(rows).mean(0)

    data = contrasted()
    with torch.no_grad(), ll.disabled(model):
        return mean(data["positive"]) - mean(data["negative"])


@pytest.mark.parametrize("seed_direction", ["auto", "contrast"])
def test_contrast_seeds_the_difference_in_means_and_adds_it_to_the_basis(seed_direction):
    model, adapter = adapted(config(seed_direction=seed_direction), size=0, data=contrasted())
    m = difference(model)
    d = directions(adapter)[:, 0]
    assert abs(float(d @ m / m.norm())) > 1 - 1e-9
    assert abs(adapter.report["contrast_capture"] - 1) < 1e-9
    assert error(adapter.U.T @ adapter.U, torch.eye(8)) < 1e-9
    U = torch.linalg.svd(model.o_proj.weight.detach()).U[:, :7]
    assert error(projector(adapter.U) @ U, U) < 1e-9


def test_without_the_added_column_the_direction_is_what_the_basis_holds_of_it():
    model, adapter = adapted(config(add_contrast=False), size=0, data=contrasted())
    m = difference(model)
    inside = adapter.U @ (adapter.U.T @ m)
    assert error(directions(adapter)[:, 0], inside / inside.norm()) < 1e-9
    assert abs(adapter.report["contrast_capture"] - float(inside.norm() / m.norm())) < 1e-9
    assert adapter.report["contrast_capture"] < 0.99


@pytest.mark.parametrize("positions", ["last", "all"])
def test_positions_choose_the_tokens_of_the_mean(positions):
    model, adapter = adapted(config(positions=positions), size=0, data=contrasted())
    W, data = model.o_proj.weight.detach(), contrasted()
    m = difference(model) if positions == "last" else W @ (kept(data["positive"]).mean(0) - kept(data["negative"]).mean(0))
    assert abs(float(directions(adapter)[:, 0] @ m / m.norm())) > 1 - 1e-9


@pytest.mark.parametrize("seed_direction", ["auto", "variance"])
def test_variance_seeds_the_strongest_output_directions_of_the_basis(seed_direction):
    model, adapter = adapted(config(k=2, seed_direction=seed_direction), size=0, data=batches())
    x = kept(batches())
    y = x @ model.o_proj.weight.detach().T
    wanted = torch.linalg.eigh(adapter.U.T @ (y.T @ y) @ adapter.U).eigenvectors[:, -2:]
    assert error(projector(directions(adapter)), projector(adapter.U @ wanted)) < 1e-8


def test_columns_behind_the_contrast_are_the_strongest_orthogonal_to_it():
    model, adapter = adapted(config(k=3), size=0, data=contrasted())
    x, v = kept(batches()), adapter.v.detach()
    y = x @ model.o_proj.weight.detach().T
    assert error(v.T @ v, torch.eye(3)) < 1e-9
    P = torch.eye(8, dtype=torch.float64) - torch.outer(v[:, 0], v[:, 0])
    wanted = torch.linalg.eigh(P @ adapter.U.T @ (y.T @ y) @ adapter.U @ P).eigenvectors[:, -2:]
    assert error(projector(v[:, 1:]), projector(wanted)) < 1e-8


def test_random_directions_ignore_the_data_and_have_unit_expected_length():
    _, bare = adapted(config(r=24, k=24), size=0)
    assert abs(float(bare.v.detach().square().sum(0).mean()) - 1) < 0.1
    _, plain = adapted(config(), size=0)
    _, given = adapted(config(seed_direction="random"), size=0, data=contrasted())
    assert torch.equal(plain.v, given.v)
    assert given.report["contrast_capture"] < 0.99


def test_statistics_are_needed_only_where_the_seed_says_so():
    cls = get("antipasto_ablate")
    assert cls.needs(config()) == cls.needs(config(seed_direction="random")) == ()
    assert cls.needs(config(seed_direction="variance")) == ("y_moment",)
    assert set(cls.needs(config(seed_direction="contrast"))) == {
        f"{name}/last:{label}" for name in ("y_sum", "n", "y_sq") for label in ("positive", "negative")
    }
    assert "y_moment" in cls.needs(config(seed_direction="contrast", k=2))
    assert "y_moment" in cls.wants(config())


def test_contrast_without_two_classes_is_refused():
    model = toy.one()
    for data, message in (
        (toy.batches(), "labelled calibration data"),
        ({"positive": toy.batches()}, "has only positive batches"),
        ({"positive": toy.batches(), "negative": toy.batches()}, "o_proj: the mean outputs .* are equal"),
        (None, "starts from data"),
    ):
        with pytest.raises(ll.LoraLiteError, match=message):
            ll.attach(model, config(seed_direction="contrast"), data)


def test_trained_and_frozen_numbers():
    model, _ = adapted(config(k=2))
    assert (ll.status(model).trainable, ll.status(model).frozen) == (2 * (8 + 1), 32 * 8)


def test_neither_directions_nor_strengths_decay():
    model, _ = adapted(config())
    assert all(group["weight_decay"] == 0 for group in ll.param_groups(model, weight_decay=0.1))


# --- roles and words: R8, R10, R12, F6 --------------------------------------------------------------------------------


def test_readers_are_left_out_and_reported():
    model = toy.toy()
    handle = ll.attach(model, config())
    assert {path.rpartition(".")[2] for path in handle.layers} == {"o_proj", "down_proj"}
    assert handle.skipped["blocks.0.q_proj"] == "a reader; roles=('writer',)"
    handle.detach()
    with pytest.raises(ll.LoraLiteError, match="together select no Linear"):
        ll.attach(model, config(targets=("q_proj", "up_proj")))
    assert len(ll.attach(model, config(roles=None)).layers) == 8


def test_a_layer_of_unknown_role_stays_with_a_warning():
    model = nn.Sequential(nn.Linear(16, 16))
    with pytest.warns(LoraLiteWarning, match="cannot tell whether 0 read or write"):
        assert list(ll.attach(model, config()).layers) == ["0"]


def test_every_layer_trains_directions_of_its_own():
    model = toy.toy()
    handle = ll.attach(model, config(), {"positive": toy.batches(count=2), "negative": toy.batches(count=4)[2:]})
    x = toy.inputs(4, 6, toy.WIDTH)
    optimizer = torch.optim.AdamW(ll.param_groups(model, lr=1e-2))
    for _ in range(3):
        optimizer.zero_grad()
        (model(x) * toy.inputs(4, 6, toy.WIDTH, seed=5)).sum().backward()
        optimizer.step()
    found = [directions(a)[:, 0] for a in handle.layers.values()]
    for index, d in enumerate(found):
        for other in found[:index]:
            assert abs(float(d @ other)) < 0.99


def test_the_citation_and_its_limits_are_stated():
    fields = card(get("antipasto_ablate"))
    assert "Arditi et al. 2024, arXiv:2406.11717" in fields["paper"]
    assert "Refusal in Language Models Is Mediated by a Single Direction" in fields["paper"]
    assert "trainable form of the directional ablation operator" in fields["title"]
    assert "without gradients" in fields["differs"]
    assert "roles=None" in fields["differs"]
    assert not {"kl", "layer_limit", "refusal"} & set(ll.AntiPaSTOAblateConfig.__dataclass_fields__)


# --- facts of the paper, on a residual model: F1 to F5 ----------------------------------------------------------------

WIDTH, TOKENS = 16, 11


class Residual(nn.Module):
    """Embeddings, and two blocks of an attention-like and a feed-forward writer, all with biases."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(TOKENS, WIDTH)
        self.position = nn.Embedding(6, WIDTH)
        self.blocks = nn.ModuleList(toy.Block(bias=True) for _ in range(2))
        for block in self.blocks:
            block.q_proj, block.o_proj = nn.Linear(WIDTH, 20), nn.Linear(20, WIDTH)
            block.up_proj, block.down_proj = nn.Linear(WIDTH, 32), nn.Linear(32, WIDTH)
        self.head = nn.Linear(WIDTH, TOKENS, bias=False)

    def forward(self, tokens, seen=lambda x: x):
        x = seen(self.embed(tokens) + self.position(torch.arange(tokens.shape[1])))
        for block in self.blocks:
            mixed = torch.tanh(block.q_proj(x)).cumsum(1) / torch.arange(1, tokens.shape[1] + 1)[:, None]
            x = seen(x + seen(block.o_proj(mixed)))
            x = seen(x + seen(block.down_proj(torch.relu(block.up_proj(x)))))
        return self.head(x)


def residual(dtype=torch.float64):
    model = toy.seeded(Residual).to(dtype)
    tokens = toy.seeded(lambda: torch.randint(0, TOKENS, (4, 6)))
    r = toy.inputs(WIDTH, dtype=dtype, seed=6)
    return model, tokens, r / r.norm()


@torch.no_grad()
def orthogonalise(model, r, writers=True, biases=True):
    """Equation 5 on the embeddings and, with `writers`, on the weights and, with `biases`, the biases of the writers."""
    for embedding in (model.embed, model.position):
        embedding.weight.sub_(torch.outer(embedding.weight @ r, r))
    for block in model.blocks if writers else ():
        for linear in (block.o_proj, block.down_proj):
            linear.weight.sub_(torch.outer(r, r @ linear.weight))
            linear.bias.sub_(biases * r * (r @ linear.bias))


def test_ablating_activations_and_orthogonalising_weights_are_one():
    model, tokens, r = residual()
    at_every_activation = model(tokens, seen=lambda x: x - (x @ r)[..., None] * r)
    base = model(tokens)
    orthogonalise(model, r)
    assert error(model(tokens), at_every_activation) < 1e-12
    assert error(base, at_every_activation) > 1e-2


@pytest.mark.parametrize("include_bias", [True, False])
def test_one_shared_direction_on_every_writer_is_the_papers_ablation(include_bias):
    model, tokens, r = residual()
    want = copy.deepcopy(model)
    orthogonalise(want, r)
    orthogonalise(model, r, writers=False)
    cfg = config(r=WIDTH, include_bias=include_bias, exclude=("head",), dtype=torch.float64)
    handle = ll.attach(model, cfg)
    with torch.no_grad():
        for adapter in handle.layers.values():
            adapter.v.copy_((adapter.U.T @ r)[:, None])
            adapter.a.fill_(1.0)
            assert error(directions(adapter)[:, 0], r) < 1e-12
    difference = error(model(tokens), want(tokens))
    assert difference < 1e-12 if include_bias else difference > 1e-3


def test_a_planted_direction_is_found_and_its_mean_gap_removed():
    model = toy.one(24, 32, dtype=torch.float64)
    planted = toy.inputs(24, dtype=torch.float64, seed=7)
    rows = toy.inputs(2, 4000, 1, 24, dtype=torch.float64, seed=8)
    data = {"positive": [{"x": rows[0] + planted}], "negative": [{"x": rows[1]}]}
    adapter = ll.attach(model, config(dtype=torch.float64), data).layers["o_proj"]
    gap = model.o_proj.weight.detach() @ planted
    assert float(directions(adapter)[:, 0] @ gap / gap.norm()) > 0.999
    with torch.no_grad():
        adapter.a.fill_(1.0)
        means = [model(part[0]["x"]).mean((0, 1)) for part in data.values()]
    assert error(means[0] - means[1], torch.zeros(32)) < 1e-12


def test_a_negative_coeff_is_not_activation_addition():
    model, adapter = layer(1.0)
    x = toy.inputs(6, 24, dtype=torch.float64)
    with torch.no_grad():
        with ll.disabled(model):
            base = model(x)
        with ll.scale(model, -0.5):
            change = model(x) - base
    D = directions(adapter)
    assert error(change, 0.5 * (base @ D) @ D.T) < T64
    assert (change @ D).std() > 0.05
