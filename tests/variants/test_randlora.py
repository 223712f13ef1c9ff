"""RandLoRA against the paper's sum in dense float64 and against PEFT."""

import pytest
import torch

import lora_lite as ll
from lora_lite.contract import shared
from lora_lite.core.merge import effective
from lora_lite.testing import toy
from lora_lite.testing.checks import error
from lora_lite.testing.formula import adapted, check_dense, live_gradients

PROJECTIONS = ["q_proj", "o_proj", "up_proj", "down_proj"]
ORIENTATIONS = pytest.mark.parametrize(("d_in", "d_out"), [(24, 32), (32, 24), (24, 24)])


def dense(a, W, b, c):
    """One basis after the other, as the paper has it: B_k diag(l_k) A diag(g_k)."""
    D = sum(a.B[:, k] @ torch.diag(a.lam[k]) @ a.A @ torch.diag(a.gam[k]) for k in range(len(a.lam)))
    return W + c * a.s * (D if a.d_in <= a.d_out else D.T), b


@ORIENTATIONS
@pytest.mark.parametrize("r", [1, 5, 8, 40])
def test_output_and_gradients_equal_the_dense_sum(d_in, d_out, r):
    check_dense(ll.RandLoRAConfig(r=r, alpha=r), dense, d_in=d_in, d_out=d_out)


def test_scale_is_twenty_or_alpha_over_r_or_over_its_root():
    assert [ll.RandLoRAConfig(r=r).s for r in (1, 8, 32)] == [20, 20, 20]
    assert ll.RandLoRAConfig(r=8, alpha=4).s == 0.5
    assert ll.RandLoRAConfig(r=16, alpha=4, rslora=True).s == 1.0
    assert ll.RandLoRAConfig(r=16, rslora=True).s == 80.0
    layers = ll.attach(toy.toy(), ll.RandLoRAConfig(r=8, rank_pattern={"up_proj": 4})).layers
    assert {a.s for a in layers.values()} == {20.0}
    changes = {}
    for alpha in (None, 4.0):
        model, _ = adapted(ll.RandLoRAConfig(r=8, alpha=alpha))
        changes[alpha] = ll.delta_weight(model, "o_proj")
    assert error(changes[None], 40 * changes[4.0]) < 1e-6


@ORIENTATIONS
@pytest.mark.parametrize("r", [1, 5, 24])
def test_change_has_full_rank_and_one_basis_has_rank_r(d_in, d_out, r):
    model, a = adapted(ll.RandLoRAConfig(r=r), d_in=d_in, d_out=d_out)

    def rank():
        adapted_weight, _, W = effective(model.o_proj, [a])
        return torch.linalg.matrix_rank(adapted_weight - W, rtol=1e-10)

    assert rank() == 24
    with torch.no_grad():
        a.lam[1:] = 0
    assert rank() == r


def test_every_layer_uses_the_leading_part_of_one_pair():
    model = toy.toy()
    layers = ll.attach(model, ll.RandLoRAConfig(r=8, rank_pattern={"o_proj": 5})).layers
    A, B = (layers["blocks.1.o_proj"].shared[name].tensor for name in "AB")
    assert A.shape == (8, 24)
    assert B.shape == (48, 5, 8)  # ceil(24 / 5) bases for o_proj, ceil(24 / 8) for the others
    for path, a in layers.items():
        n, r = a.lam.shape
        assert (n, r) == ((5, 5) if "o_proj" in path else (3, 8))
        assert torch.equal(a.A, A[:r])
        assert torch.equal(a.B, B[: max(a.d_in, a.d_out), :n, :r])
        assert a.A.untyped_storage().data_ptr() == A.untyped_storage().data_ptr()
        assert a.B.untyped_storage().data_ptr() == B.untyped_storage().data_ptr()


def test_start_values():
    _, a = adapted(ll.RandLoRAConfig(r=100), d_in=210, d_out=300, size=0)
    assert not a.lam.any()
    assert torch.equal(a.gam.float(), torch.full((3, 210), 1 / 210))
    for M in (a.A, a.B):
        assert abs(M.std() - 1) < 1e-6
        assert abs(M.mean()) < 0.02
        assert 1.72 < M.abs().max() < 1.75  # sqrt(3) = 1.732


def test_pair_of_single_numbers_starts_finite():
    """No layer of a model is as narrow; the arithmetic divides by norms of one number."""
    a = ll.get("randlora")(1, 1, ll.RandLoRAConfig(r=1))
    shared.allocate({"": a})
    shared.fill({"": a}, shared.draws({"": a}, 0))
    assert a.A.abs() == a.B.abs() == 1


@ORIENTATIONS
def test_gradient_pattern(d_in, d_out):
    assert live_gradients(ll.RandLoRAConfig(r=4), d_in=d_in, d_out=d_out) == [{"lam"}, {"lam", "gam"}]


@pytest.mark.parametrize(("d_in", "d_out"), [(3584, 1024), (1024, 3584)])
def test_trained_and_frozen_numbers_of_a_large_layer(d_in, d_out):
    specs = ll.get("randlora").param_specs(d_in, d_out, ll.RandLoRAConfig())
    size = {name: torch.Size(spec.shape).numel() for name, spec in specs.items()}
    assert size["lam"] + size["gam"] == 32 * (32 + 1024) == 33_792
    assert size["A"] + size["B"] == 32 * 1024 + 3584 * 32 * 32 == 3_702_784


def test_shared_numbers_are_counted_once():
    model = toy.toy()
    ll.attach(model, ll.RandLoRAConfig(r=8))
    assert ll.status(model).trainable == 8 * 3 * (8 + 24)
    assert ll.status(model).frozen == 8 * 24 + 48 * 3 * 8


@ORIENTATIONS
def test_backward_keeps_one_scaled_basis_and_no_copy_of_the_shared_pair(d_in, d_out):
    model, a = adapted(ll.RandLoRAConfig(r=5), d_in=d_in, d_out=d_out, dtype=torch.float32)
    kept = {}
    x = toy.inputs(2, d_in).requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.setdefault(t.untyped_storage().data_ptr(), t), lambda t: t):
        y = model(x)
    y.sum().backward()
    own = {t.untyped_storage().data_ptr() for t in (a.A, a.B, a.gam, a.lam, model.o_proj.weight)}
    large = [t for pointer, t in kept.items() if pointer not in own and t.numel() > 2 * 5 * 5]
    assert [t.numel() for t in large] == [5 * 5 * 24]


def repaired(B):
    """PEFT's B (q, n, r) with the columns where its scaled A, flattened the other way round, meets them."""
    q, n, r = B.shape
    return B.reshape(q, r, n).mT


def test_published_order_of_columns_gives_another_matrix():
    """Without the repair the same numbers are another update: columns of B meet diagonals of another basis."""
    _, a = adapted(ll.RandLoRAConfig(r=8))
    W = torch.zeros(32, 24, dtype=torch.float64)
    right = dense(a, W, None, 1.0)[0]
    with torch.no_grad():
        a.B.copy_(repaired(a.B.clone()))
    assert error(dense(a, W, None, 1.0)[0], right) > 0.1


def test_start_follows_peft():
    peft = pytest.importorskip("peft")
    config = peft.RandLoraConfig(r=32, target_modules=PROJECTIONS)
    theirs = peft.get_peft_model(toy.toy(), config).base_model.model.blocks[0].q_proj
    a = ll.attach(toy.toy(), ll.RandLoRAConfig(r=32)).layers["blocks.0.q_proj"]
    assert torch.equal(a.lam.T, theirs.randlora_lambda["default"])
    assert torch.equal(a.gam, theirs.randlora_gamma["default"])
    for mine, other in (
        (a.shared["A"].tensor, theirs.randlora_A["default"]),
        (a.shared["B"].tensor, theirs.randlora_B["default"]),
    ):
        assert abs(mine.std() - 1) < 1e-5
        assert abs(other.std() - 1) < 1e-2  # in bfloat16 where the machine has it
        assert float(abs(mine.abs().max() / other.abs().max() - 1)) < 0.06
    assert theirs.scaling["default"] == a.s
