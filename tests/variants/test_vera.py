"""VeRA against the paper's formula in dense float64 and against PEFT."""

import pytest
import torch

import lora_lite as ll
from lora_lite.testing import toy
from lora_lite.testing.checks import error
from lora_lite.testing.formula import T64, adapted, check_dense

PROJECTIONS = ["q_proj", "o_proj", "up_proj", "down_proj"]


def dense(a, W, b, c):
    return W + c * torch.diag(a.lambda_b) @ a.B @ torch.diag(a.lambda_d) @ a.A, b


@pytest.mark.parametrize(("d_in", "d_out"), [(24, 32), (32, 24)])
@pytest.mark.parametrize("r", [1, 5, 40])
def test_output_and_gradients_equal_the_dense_form(d_in, d_out, r):
    check_dense(ll.VeRAConfig(r=r), dense, d_in=d_in, d_out=d_out)


def test_every_layer_uses_the_leading_part_of_one_pair():
    model = toy.toy()
    layers = ll.attach(model, ll.VeRAConfig(r=8, rank_pattern={"o_proj": 3})).layers
    A, B = (layers["blocks.1.o_proj"].shared[name].tensor for name in "AB")
    assert (A.shape, B.shape) == ((8, 48), (48, 8))  # the widest input and output of the four projections
    for path, a in layers.items():
        assert torch.equal(a.A, A[: a.cfg.r, : a.d_in]), path
        assert torch.equal(a.B, B[: a.d_out, : a.cfg.r]), path
        assert a.A.untyped_storage().data_ptr() == A.untyped_storage().data_ptr()
        assert a.B.untyped_storage().data_ptr() == B.untyped_storage().data_ptr()


def test_start_values():
    _, a = adapted(ll.VeRAConfig(r=100), d_in=600, d_out=500, size=0)
    assert not a.lambda_b.any()
    assert bool((a.lambda_d == torch.tensor(0.1)).all())
    for M, fan_in in ((a.A, 600), (a.B, 100)):
        bound = (6 / fan_in) ** 0.5
        assert 0.999 * bound < M.abs().max() <= bound * (1 + 1e-7)
        assert abs(M.std() / (2 / fan_in) ** 0.5 - 1) < 0.01  # the deviation of Kaiming's draw with a ReLU gain
        assert abs(M.mean()) < 0.01 * bound


def test_bound_of_A_comes_from_the_widest_input():
    widest = ll.attach(toy.toy(), ll.VeRAConfig(r=64)).layers["blocks.0.q_proj"].A
    alone = ll.attach(toy.toy(), ll.VeRAConfig(r=64, targets="q_proj")).layers["blocks.0.q_proj"].A
    assert widest.abs().max() <= (6 / 48) ** 0.5 < alone.abs().max() <= (6 / 24) ** 0.5


def test_d_init_is_the_start_and_the_size_of_the_first_step():
    first = []
    for d_init in (0.1, 0.4):
        model, a = adapted(ll.VeRAConfig(r=4, d_init=d_init), size=0)
        model(toy.inputs(5, 24, dtype=torch.float64)).sum().backward()
        assert torch.equal(a.lambda_d.float(), torch.full((4,), d_init))
        first.append(a.lambda_b.grad)
    assert error(first[1], 4 * first[0]) < T64


def test_trained_and_frozen_numbers():
    model = toy.toy()
    ll.attach(model, ll.VeRAConfig(r=8))
    outputs = 2 * (32 + 24 + 48 + 24)
    assert ll.status(model).trainable == outputs + 8 * 8
    assert ll.status(model).frozen == 8 * (48 + 48)


def test_start_follows_the_distribution_of_peft():
    """The same bounds; the numbers themselves come from another stream."""
    peft = pytest.importorskip("peft")
    config = peft.VeraConfig(r=64, target_modules=PROJECTIONS)
    theirs = peft.get_peft_model(toy.toy(), config).base_model
    layers = ll.attach(toy.toy(), ll.VeRAConfig(r=64)).layers
    for name, other in (("A", theirs.vera_A["default"]), ("B", theirs.vera_B["default"])):
        mine = layers["blocks.0.q_proj"].shared[name].tensor
        assert mine.shape == other.shape
        assert float(abs(mine.abs().max() / other.abs().max() - 1)) < 0.01
        assert float(abs(mine.std() / other.std() - 1)) < 0.05
