"""What CorDA's directions of the gain keep of the output; the rest is in tests/families/test_oriented_gains.py."""

import pytest
import torch

import lora_lite as ll
from lora_lite.testing import toy
from lora_lite.testing.checks import error
from lora_lite.testing.formula import T64
from tests.families.test_oriented_gains import CORDA, FULL, I, O, R, oriented
from tests.families.test_subspace import BASES, based, batches, kept, leading, lost, moment, projector


def test_any_root_of_the_moment_gives_the_same_directions():
    _, W, adapter = oriented(CORDA)
    assert error(projector(adapter.U), leading(W @ torch.linalg.cholesky(moment()))) < T64


def test_root_form_loses_the_least_output_energy():
    C = moment()
    _, W, adapter = oriented(CORDA)
    tail = torch.linalg.eigvalsh(W @ C @ W.T).flip(0)[R:].sum()
    assert abs(lost(W, adapter.U, C) - float(tail)) < 1e-9
    others = {basis: lost(W, based(basis)[1].U, C) for basis in BASES}
    assert all(loss >= lost(W, adapter.U, C) - 1e-12 for loss in others.values())
    assert others["svd"] > 1.5 * lost(W, adapter.U, C)


@pytest.mark.parametrize("form", [CORDA, FULL])
def test_captured_share_of_the_output_energy_is_reported(form):
    _, W, adapter = oriented(form)
    y = kept(batches()) @ W.T
    assert abs(adapter.report["capture"] - float((y @ adapter.U).square().sum() / y.square().sum())) < 1e-9


def test_bfloat16_outputs_cost_no_captured_energy():
    data = [{**batch, "x": batch["x"].bfloat16()} for batch in batches()]
    low = toy.one(I, O, dtype=torch.bfloat16)
    U = ll.attach(low, ll.AntiPaSTOCorDAConfig(r=R, buffer_dtype=torch.float32), data).layers["o_proj"].U.double()
    W, C = low.o_proj.weight.detach().double(), moment([{**batch, "x": batch["x"].double()} for batch in data])
    best = torch.linalg.eigvalsh(W @ C @ W.T).flip(0)
    assert abs(lost(W, U, C) - float(best[R:].sum())) / float(best.sum()) < 1e-6
